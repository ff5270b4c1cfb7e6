"""One step, four ways to run it: one device, jit, shard_map and pmap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax import adapters, models, objectives, prune, quantize, sharding, step
from kd_jax.types import Forward, TrainState

DEVICES = 8
WEIGHTS = [('.*/kernel', quantize.INT8_WEIGHTS)]
INPUTS = [('.*', quantize.INT8_ACTIVATIONS)]
COMPILERS = list(sharding.COMPILERS)


def _batch():
  rng = np.random.default_rng(0)
  return {
    'image': rng.normal(size=(32, 6, 6, 1)).astype('f'),
    'label': (np.arange(32) % 5).astype('i4'),
  }


@functools.cache
def _teacher():
  model = models.CNN(5, widths=(4,))
  variables = adapters.init_linen(model, jax.random.key(5), _batch())
  return adapters.from_linen(model), variables


def _forward(compiler, fake_quant):
  """BatchNorm, dropout and, if asked for, fake-quantized activations."""
  model = models.CNN(5, widths=(4, 6), dropout=0.3)
  axis_name = None if compiler is None else sharding.axis_name(compiler)
  interceptors = ()
  if fake_quant:
    interceptors = (quantize.quantize_activations(INPUTS, axis_name=axis_name),)
  return model, adapters.from_linen(
    model, interceptors=interceptors, axis_name=axis_name
  )


def _objective():
  return objectives.weighted_sum(
    {
      'kd': (0.9, objectives.soft_targets()),
      'ce': (0.1, objectives.hard_labels()),
    }
  )


def _tx():
  return prune.prune(
    optax.sgd(0.05, momentum=0.9),
    prune.cubic(0.7, begin=0, end=3, initial=0.3),
    [('.*/kernel', True)],
  )


@functools.cache
def _start(fake_quant):
  """The state before the first step, on the host."""
  model, forward = _forward(None, fake_quant)
  variables = adapters.init_linen(model, jax.random.key(0), _batch())
  if fake_quant:
    variables['quant_stats'] = quantize.init_quant_stats(
      forward, variables, _batch(), INPUTS
    )
  teacher_fn, teacher = _teacher()
  return jax.device_get(
    step.init_state(
      forward,
      _objective(),
      _tx(),
      variables,
      _batch(),
      teacher_fn=teacher_fn,
      teacher=teacher,
    )
  )


@functools.cache
def _run(compiler, devices, *, fake_quant):
  """(metrics, state) after each of five steps, and the number of traces."""
  rules = WEIGHTS if fake_quant else ()
  pure = step.make_train_step(
    _forward(compiler, fake_quant)[1],
    _objective(),
    _tx(),
    teacher_fn=_teacher()[0],
    params_fn=lambda params: quantize.fake_quant_params(params, rules),
    axis_name=sharding.axis_name(compiler),
  )
  traces = []

  def counted(*args):
    traces.append(1)
    return pure(*args)

  mesh = sharding.make_mesh(jax.devices()[:devices])
  state = sharding.place_state(_start(fake_quant), mesh, compiler)
  compiled = sharding.compile_step(counted, mesh, compiler)
  batch, history = sharding.shard_batch(_batch(), mesh), []
  for _ in range(5):
    state, metrics = compiled(state, batch, jax.random.key(3))
    history.append(jax.device_get((metrics, state)))
  return history, len(traces)


def _compare(got, want, tolerance):
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_allclose(
      np.asarray(a, float),
      np.asarray(b, float),
      rtol=tolerance,
      atol=tolerance,
      err_msg=jax.tree_util.keystr(path),
    )


@pytest.mark.parametrize('compiler', COMPILERS)
def test_everything_on_equals_one_device(compiler):
  """BatchNorm, dropout, pruning and fake-quant; masks and observers too.

  After one step all numbers agree to rounding. Then a sum in another order
  flips a code now and then, which moves that value by its scale, about 1 %,
  and runs diverge slowly. So after five steps what is asked for is that the
  loss agrees to 2 %, all but a few masks agree, and the parameters differ by
  far less than they moved.
  """
  history, traces = _run(compiler, DEVICES, fake_quant=True)
  wanted, _ = _run('jit', 1, fake_quant=True)
  assert traces == 1
  _compare(history[0], wanted[0], 1e-5)
  kernels = prune.sparsity_report(history[0][1].params, [('.*/kernel', True)])
  size = sum(k.size for k in kernels)
  assert sum(k.nonzero for k in kernels) == size - round(0.3 * size)

  (metrics, state), (want_metrics, want) = history[-1], wanted[-1]
  np.testing.assert_allclose(
    metrics['loss/total'], want_metrics['loss/total'], rtol=0.02
  )
  masks, want_masks = (
    np.concatenate([m.ravel() for m in prune.masks_of(s.opt_state).values()])
    for s in (state, want)
  )
  assert masks.sum() == want_masks.sum()
  assert np.mean(masks != want_masks) < 0.03
  moved = optax.tree.norm(optax.tree.sub(want.params, _start(True).params))
  apart = optax.tree.norm(optax.tree.sub(state.params, want.params))
  assert apart < 0.1 * moved


@pytest.mark.parametrize('compiler', COMPILERS)
def test_several_steps_without_rounding_equal_one_device(compiler):
  history, traces = _run(compiler, DEVICES, fake_quant=False)
  wanted, _ = _run('jit', 1, fake_quant=False)
  _compare(history[-1], wanted[-1], 1e-5)
  assert traces == 1
  assert int(history[-1][1].step) == 5


def test_dropout_and_batch_norm_were_on():
  """Else the tests above would show less than they say."""
  _, forward = _forward(None, False)
  start = _start(False)
  variables = {'params': start.params, **start.model_state}
  run = jax.jit(lambda k: forward(variables, _batch(), k, train=True))
  a, b = run(jax.random.key(0)), run(jax.random.key(1))
  assert jnp.abs(a.output - b.output).max() > 1e-3
  mean = a.model_state['batch_stats']['norm1']['mean']
  assert jnp.abs(mean).max() > 1e-3


def _toy(compiler, objective, variables=None):
  """A linear student without layers, on a mesh of eight devices."""
  variables = variables or {'params': jnp.ones((36, 2))}

  def student_fn(variables, batch, rng, *, train):
    x = batch['image'].reshape(batch['image'].shape[0], -1)
    return Forward(x @ variables['params'])

  tx = optax.sgd(0.01)
  mesh = sharding.make_mesh()
  state = step.init_state(student_fn, objective, tx, variables, _batch())
  pure = step.make_train_step(
    student_fn, objective, tx, axis_name=sharding.axis_name(compiler)
  )
  return (
    sharding.compile_step(pure, mesh, compiler),
    sharding.place_state(state, mesh, compiler),
  )


@pytest.mark.parametrize('compiler', COMPILERS)
def test_counters_and_flags_of_an_objective_keep_their_dtype(compiler):
  def apply(params, state, inputs):
    loss = jnp.mean(jnp.square(inputs.student.output), axis=-1)
    state = {
      'count': state['count'] + 1,
      'seen': ~state['seen'],
      'mean': state['mean'] + inputs.student.output.mean(),
      'key': state['key'],
    }
    return loss, state, {'examples': jnp.int32(len(loss))}

  def init(inputs):
    return {}, {
      'count': jnp.int32(0),
      'seen': jnp.zeros(2, bool),
      'mean': jnp.float32(0),
      'key': jax.random.key(1),
    }

  compiled, state = _toy(compiler, objectives.Objective(init, apply))
  before = jax.device_get(state.params)
  state, _ = compiled(state, _batch(), jax.random.key(0))
  memory = state.objective.state
  assert memory['count'].dtype == jnp.int32 and int(memory['count']) == 1
  assert memory['seen'].dtype == bool and memory['seen'].all()
  want = (_batch()['image'].reshape(32, -1) @ before).mean()
  np.testing.assert_allclose(memory['mean'], want, rtol=1e-4, atol=1e-6)
  assert jax.dtypes.issubdtype(memory['key'].dtype, jax.dtypes.prng_key)


@pytest.mark.parametrize('compiler', COMPILERS)
def test_gradients_are_of_the_mean_over_the_global_batch(compiler):
  """Not the sum over devices: eight times too large, without a word."""
  objective = objectives.term(lambda i: jnp.square(i.student.output).mean(-1))
  compiled, state = _toy(compiler, objective)
  before = jax.device_get(state.params)
  state, metrics = compiled(state, _batch(), jax.random.key(0))
  x = _batch()['image'].reshape(32, -1).astype(np.float64)
  gradient = x.T @ (x @ before) / 32
  np.testing.assert_allclose(
    state.params, before - 0.01 * gradient, rtol=1e-4, atol=1e-6
  )
  np.testing.assert_allclose(
    metrics['grad_norm'], np.linalg.norm(gradient), rtol=1e-5
  )


@pytest.mark.parametrize('compiler', COMPILERS)
def test_the_teacher_is_neither_donated_nor_moved(compiler):
  def apply(variables, batch, rng=None, *, train=False):
    x = batch['image'].reshape(batch['image'].shape[0], -1)
    return Forward(x @ variables['params'])

  objective, tx = objectives.soft_targets(), optax.sgd(0.1)
  mesh, teacher = sharding.make_mesh(), {'params': jnp.ones((36, 2))}
  options = {'teacher_fn': apply}
  state = step.init_state(
    apply,
    objective,
    tx,
    {'params': jnp.zeros((36, 2))},
    _batch(),
    teacher=teacher,
    **options,
  )
  state = sharding.place_state(state, mesh, compiler)
  pure = step.make_train_step(
    apply, objective, tx, axis_name=sharding.axis_name(compiler), **options
  )
  compiled = sharding.compile_step(pure, mesh, compiler)
  new, _ = compiled(state, _batch(), jax.random.key(0))
  for held in (state.teacher, new.teacher, teacher):
    assert not held['params'].is_deleted()
    np.testing.assert_array_equal(held['params'], 1.0)
  # The state itself was donated, where donation is offered.
  assert state.params.is_deleted() == (compiler != 'pmap')


def test_a_step_by_pmap_says_that_it_cannot_be_lowered():
  compiled = sharding.compile_step(None, sharding.make_mesh(), 'pmap')
  state = TrainState(jnp.int32(0), {}, {}, (), None)
  with pytest.raises(ValueError, match="'pmap' cannot be lowered: use 'jit'"):
    compiled.lower(state, _batch(), jax.random.key(0))


def test_batches_are_split_over_the_devices():
  mesh = sharding.make_mesh()
  batch = sharding.shard_batch(_batch(), mesh)
  assert batch['image'].sharding.num_devices == DEVICES
  shards = batch['image'].addressable_shards
  assert {s.data.shape for s in shards} == {(4, 6, 6, 1)}
  np.testing.assert_array_equal(batch['image'], _batch()['image'])
  everywhere = sharding.replicate({'a': jnp.ones(3)}, mesh)['a']
  assert everywhere.is_fully_replicated
  assert everywhere.sharding.num_devices == DEVICES


def test_bad_arguments_are_named():
  mesh = sharding.make_mesh()
  with pytest.raises(ValueError, match='batch of 12 does not divide over 8'):
    sharding.shard_batch({'x': np.ones(12)}, mesh)
  with pytest.raises(ValueError, match="compiler 'pjit'.*jit"):
    sharding.compile_step(lambda *a: a, mesh, 'pjit')
  with pytest.raises(ValueError, match="compiler 'pjit'"):
    sharding.axis_name('pjit')
