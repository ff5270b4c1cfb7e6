"""Steps with NaN or infinity: dropped whole, counted, and the end of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quantized_models import INPUTS, WEIGHTS, trained, watching

from kd_jax import guard, loops, objectives, prune, quantize, sharding, train
from kd_jax.step import init_state, make_train_step
from kd_jax.storage.checkpoint import Checkpoints
from kd_jax.types import Forward


def _everything():
  """A step with BatchNorm, observers, masks, momentum and an average."""
  model, variables, batch = trained('cnn')
  forward = watching(model)
  variables['quant_stats'] = quantize.init_quant_stats(
    forward, variables, batch, INPUTS
  )
  schedule = prune.cubic(0.8, begin=0, end=10, every=1)
  tx = prune.prune(optax.adam(0.01), schedule, [('.*/kernel', True)])
  objective = objectives.hard_labels()

  def params_fn(params):
    return quantize.fake_quant_params(params, WEIGHTS)

  batch = {**batch, 'label': np.arange(8) % 3}

  def make(axis_name=None):
    return guard.drop_nonfinite(
      make_train_step(
        forward, objective, tx, params_fn=params_fn, axis_name=axis_name
      )
    )

  state = init_state(forward, objective, tx, variables, batch)
  return make, state, batch


def _same(a, b):
  leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.array_equal(x, y, equal_nan=True) for x, y in leaves)


@pytest.mark.parametrize('compiler', ['jit', 'shard_map'])
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_bad_batch_changes_nothing_but_the_step(compiler, value):
  make, state, batch = _everything()
  mesh = sharding.make_mesh()
  step = sharding.compile_step(
    make(sharding.axis_name(compiler)), mesh, compiler, donate=False
  )
  state = sharding.place_state(state, mesh, compiler)
  rng = jax.random.key(0)
  put = functools.partial(sharding.shard_batch, mesh=mesh)
  once, metrics = step(state, put(batch), rng)
  assert metrics['dropped'] == 0 and not _same(once.params, state.params)
  # One value of one image, so that one device alone sees it.
  image = batch['image'].copy()
  image[5, 0, 0, 0] = value
  bad, metrics = step(once, put({**batch, 'image': image}), rng)
  assert metrics['dropped'] == 1 and int(bad.step) == 2
  assert _same(bad.replace(step=0), once.replace(step=0))
  again, metrics = step(bad, put(batch), rng)
  assert metrics['dropped'] == 0 and not _same(again.params, bad.params)
  # As if the bad batch had not been there: this model draws nothing.
  without, _ = step(once, put(batch), rng)
  assert _same(again.replace(step=0), without.replace(step=0))


@pytest.mark.parametrize('wrap', [guard.drop_nonfinite, loops.several])
def test_a_wrapped_step_is_compiled_by_its_own_compiler_only(wrap):
  def compiled(axis_name):
    step = make_train_step(
      lambda variables, batch, rng, *, train: Forward(batch['x']),
      objectives.hard_labels(),
      optax.sgd(0.1),
      axis_name=axis_name,
    )
    return sharding.compile_step(wrap(step), sharding.make_mesh(), 'pmap')

  with pytest.raises(ValueError, match="axis_name='data'"):
    compiled(None)
  assert not compiled(sharding.axis_name('pmap')).traces


def test_gradients_alone_may_be_at_fault():
  def student(v, batch, rng, *, train):
    return Forward(jnp.sqrt(v['params'] * batch['x']))

  objective = objectives.term(lambda i: i.student.output)
  tx, batch = optax.sgd(1.0), {'x': jnp.zeros(2)}
  step = jax.jit(guard.drop_nonfinite(make_train_step(student, objective, tx)))
  state = init_state(student, objective, tx, {'params': jnp.float32(1)}, batch)
  after, metrics = step(state, batch, jax.random.key(0))
  assert np.isfinite(metrics['loss/total']) and metrics['dropped'] == 1
  assert after.params == 1.0


def _row(loss, dropped=0, **more):
  return {'loss/total': loss, 'dropped': dropped, **more}


def test_gradients_of_what_an_objective_owns_may_be_at_fault():
  def apply(params, state, inputs):
    return jnp.sqrt(params) + jnp.sum(inputs.student.output), state, {}

  objective = objectives.Objective(lambda inputs: (jnp.float32(0), {}), apply)
  tx = optax.sgd(0.1)

  def student(variables, batch, rng=None, *, train=False):
    return Forward(variables['params'] * batch['x'])

  batch, options = {'x': jnp.ones(2)}, {'objective_tx': tx}
  step = make_train_step(student, objective, tx, **options)
  state = init_state(
    student, objective, tx, {'params': jnp.float32(1)}, batch, **options
  )
  new, metrics = jax.jit(guard.drop_nonfinite(step))(
    state, batch, jax.random.key(0)
  )
  assert metrics['dropped'] == 1 and np.isinf(metrics['grad_norm/objective'])
  assert new.objective.params == 0 and new.params == 1


def test_the_norm_of_gradients_in_float16_does_not_overflow():
  objective, tx = objectives.regression(), optax.sgd(1e-3)

  def student(variables, batch, rng=None, *, train=False):
    return Forward(variables['params'] * batch['x'])

  batch = {'x': jnp.full((1, 2), 30.0, jnp.float16)}
  batch['target'] = jnp.full((1, 2), -30.0)
  params = {'params': jnp.ones((1, 2), jnp.float16)}
  step = make_train_step(student, objective, tx)
  state = init_state(student, objective, tx, params, batch)
  _, metrics = jax.jit(guard.drop_nonfinite(step))(
    state, batch, jax.random.key(0)
  )
  assert metrics['dropped'] == 0
  np.testing.assert_allclose(metrics['grad_norm'], 1800 * 2**0.5, rtol=1e-2)


def test_failures_in_a_row_stop_and_name_the_terms():
  failures = guard.Failures(limit=3)
  bad = _row(np.nan, 1, **{'loss/kd': np.nan, 'loss/ce': 1.0, 'grad_norm': 2.0})
  said = failures.add([_row(1.0), bad, bad, _row(1.0)], 4)
  assert said == ['step 2 was dropped: loss/kd is nan, loss/total is nan']
  # Over the border of two windows.
  failures.add([_row(1.0), bad, bad], 7)
  with pytest.raises(FloatingPointError, match='3 steps in a row') as e:
    failures.add([bad], 8)
  assert 'up to step 8' in str(e.value) and 'loss/ce' not in str(e.value)


def test_spikes_are_said():
  failures = guard.Failures(spike=4.0)
  assert failures.add([_row(1.0)] * 50 + [_row(3.9)], 51) == []
  (said,) = failures.add([_row(8.0), _row(1.0)], 53)
  assert said.startswith('step 52: the loss of 8 is ') and '7.' in said
  assert guard.Failures().add([_row(-1.0), _row(5.0)], 2) == []
  # A step of one's own need not call its loss as ours does.
  assert guard.Failures().add([{'loss': 1.0}], 1) == []


class _Batches:
  """Batches whose loss is their number; NaN where asked for."""

  def __init__(self, bad):
    self.at, self.bad = 0, bad

  def __next__(self):
    self.at += 1
    value = np.nan if self.at in self.bad else 1.0
    return {'x': np.full(2, value, np.float32), 'id': np.zeros(2)}

  def get_state(self):
    return {'at': self.at}

  def set_state(self, state):
    self.at = state['at']


def _loop(folder, bad, steps=40):
  def student(v, batch, rng, *, train):
    return Forward(v['params'] * batch['x'])

  objective = objectives.term(lambda i: i.student.output)
  tx = optax.sgd(0.001)
  batches = _Batches(bad)
  state = init_state(
    student, objective, tx, {'params': jnp.float32(1)}, next(_Batches(()))
  )
  step = guard.drop_nonfinite(make_train_step(student, objective, tx))
  with Checkpoints(folder, fingerprint={}) as checkpoints:
    return train.train(
      jax.jit(step),
      state,
      batches,
      rng=jax.random.key(0),
      total_steps=steps,
      put=dict,
      checkpoints=checkpoints,
      evaluate_every=10,
      log_every=5,
      title='here',
    )


def test_the_loop_counts_and_goes_on(tmp_path, capsys):
  trained = _loop(tmp_path, {7, 8, 21})
  counts = {row['step']: row['dropped'] for row in trained.history}
  assert {s for s, n in counts.items() if n} == {10, 25}
  assert counts[10] == 2 and counts[25] == 1
  assert all(np.isfinite(row['loss/total']) for row in trained.history)
  # 37 of 40 steps were made.
  np.testing.assert_allclose(trained.state.params, 1 - 0.001 * 37, rtol=1e-5)
  error = capsys.readouterr().err
  assert 'here: step 7 was dropped: ' in error and 'loss/total is nan' in error
  assert 'step 8' not in error and 'step 21 was dropped' in error


def test_the_loop_stops_and_names_the_last_checkpoint(tmp_path):
  with pytest.raises(FloatingPointError, match='here: 10 steps in a row') as e:
    _loop(tmp_path, range(23, 40))
  assert 'up to step 32' in str(e.value)
  assert str(e.value).endswith('Step 30 is saved.')
  with Checkpoints(tmp_path, fingerprint={}) as checkpoints:
    assert checkpoints.latest_step() == 30
