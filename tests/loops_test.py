"""A batch in parts, steps in a row: the numbers of the whole on any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax import (
  adapters,
  guard,
  loops,
  models,
  objectives,
  prune,
  quantize,
  sharding,
  step,
)
from kd_jax.types import Forward

pytestmark = pytest.mark.once

COMPILERS = list(sharding.COMPILERS)
INPUTS = [('.*', quantize.INT8_ACTIVATIONS)]
WEIGHTS = [('.*/kernel', quantize.INT8_WEIGHTS)]


def _batch(size=32):
  rng = np.random.default_rng(0)
  return {
    'image': rng.normal(size=(size, 4, 4, 1)).astype('f'),
    'label': (np.arange(size) % 5).astype('i4'),
    'id': np.arange(size, dtype='i4'),
  }


def _teacher(variables, batch, rng=None, *, train=False):
  x = batch['image'].reshape(batch['image'].shape[0], -1)
  return Forward(jnp.sin(x @ variables['params']))


def _objective():
  return objectives.weighted_sum(
    {
      'kd': (0.9, objectives.soft_targets()),
      'ce': (0.1, objectives.hard_labels()),
    }
  )


def _taylor(tx):
  schedule = prune.constant(0.5, begin=0)
  rules = [('.*/kernel', True)]
  return prune.prune(tx, schedule, rules, score=prune.taylor())


@functools.cache
def _mlp(compiler, accumulate, devices=8, *, fake_quant=False):
  """(metrics, state) after each of three steps."""
  model = models.MLP(5, hidden=(8,))
  axis_name = sharding.axis_name(compiler)
  student = adapters.from_linen(model, axis_name=axis_name)
  round_weights = functools.partial(
    quantize.fake_quant_params, rules=WEIGHTS if fake_quant else ()
  )
  tx = _taylor(optax.sgd(0.05, momentum=0.9))
  state = step.init_state(
    student,
    _objective(),
    tx,
    adapters.init_linen(model, jax.random.key(0), _batch()),
    _batch(),
    teacher_fn=_teacher,
    teacher={'params': jnp.cos(jnp.arange(80.0)).reshape(16, 5)},
  )
  pure = step.make_train_step(
    student,
    _objective(),
    tx,
    teacher_fn=_teacher,
    params_fn=round_weights,
    axis_name=axis_name,
    accumulate=accumulate,
  )
  mesh = sharding.make_mesh(jax.devices()[:devices])
  state = sharding.place_state(state, mesh, compiler)
  compiled = sharding.compile_step(pure, mesh, compiler)
  batch, history = sharding.shard_batch(_batch(), mesh), []
  for _ in range(3):
    state, metrics = compiled(state, batch, jax.random.key(3))
    history.append(jax.device_get((metrics, state)))
  assert len(compiled.traces) == 1
  return history


def _assert_close(got, want, tolerance=1e-5):
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    name = jax.tree_util.keystr(path)
    assert np.asarray(a).dtype == np.asarray(b).dtype, name
    a, b = np.asarray(a, float), np.asarray(b, float)
    np.testing.assert_allclose(a, b, tolerance, tolerance, err_msg=name)


@pytest.mark.parametrize('compiler', COMPILERS)
def test_parts_are_the_whole_batch(compiler):
  """Metrics, masks by the gradient's scores, momentum and parameters."""
  _assert_close(_mlp(compiler, 4), _mlp('jit', 1, 1))


def test_parts_are_the_whole_batch_with_rounded_weights():
  history = _mlp('jit', 2, fake_quant=True)
  _assert_close(history, _mlp('jit', 1, 1, fake_quant=True))
  assert not np.allclose(
    history[-1][0]['loss/total'], _mlp('jit', 1, 1)[-1][0]['loss/total'], 1e-6
  )


def test_many_parts_in_bfloat16_lose_nothing(monkeypatch):
  """Summed in bfloat16 they would be 0.96 of the mean."""
  monkeypatch.setattr(
    loops, 'scan', functools.partial(loops.scan, unroll=False)
  )
  half = jnp.bfloat16(0)
  values = jnp.linspace(0.5, 1.5, 512)

  def gradients(carried, batch, rng, part):
    return carried, {}, jnp.mean(batch['x']).astype(half.dtype)

  _, _, grad = loops.accumulate(
    gradients, (), half, {'x': values}, jax.random.key(0), 512
  )
  assert grad.dtype == half.dtype and float(grad) == 1.0


@pytest.mark.parametrize('compiler', COMPILERS)
def test_parts_in_a_loop_are_parts_written_out(compiler, monkeypatch):
  """Accelerators loop, CPUs do not."""
  monkeypatch.setattr(
    loops, 'scan', functools.partial(loops.scan, unroll=False)
  )
  looped = _mlp.__wrapped__(compiler, 2)
  _assert_close(looped, _mlp('jit', 1, 1))


def test_no_example_moves_between_devices():
  student = adapters.from_linen(models.MLP(5, hidden=(8,)))
  tx = optax.sgd(0.1)
  objective = objectives.hard_labels()
  variables = adapters.init_linen(
    models.MLP(5, hidden=(8,)), jax.random.key(0), _batch()
  )
  state = step.init_state(student, objective, tx, variables, _batch())
  pure = step.make_train_step(student, objective, tx, accumulate=4)
  mesh = sharding.make_mesh()
  split = jax.NamedSharding(mesh, sharding.batch_spec())
  text = (
    jax.jit(pure, in_shardings=(None, split, None))
    .lower(state, _batch(), jax.random.key(0))
    .compile()
    .as_text()
  )
  assert 'all-reduce' in text
  for collective in ('all-gather', 'all-to-all', 'collective-permute'):
    assert collective not in text


def test_states_advance_with_every_part_and_averages_once():
  model = models.CNN(5, widths=(4,))
  observed = adapters.from_linen(
    model, interceptors=[quantize.quantize_activations(INPUTS)], taps=['pool']
  )
  bank = objectives.contrastive(
    student='pool',
    teacher='pool',
    labels=np.arange(32) % 5,
    negatives=4,
    size=4,
  )
  objective = objectives.weighted_sum(
    {
      'ema': (1.0, objectives.ema_teacher(_objective(), decay=0.5)),
      'crd': (1.0, bank),
    }
  )
  variables = adapters.init_linen(model, jax.random.key(0), _batch())
  variables['quant_stats'] = quantize.init_quant_stats(
    observed, variables, _batch(), INPUTS
  )
  teacher_fn = adapters.from_linen(model, taps=['pool'])
  teacher = adapters.init_linen(model, jax.random.key(1), _batch())
  tx = optax.sgd(0.1)
  options = {'teacher_fn': teacher_fn, 'objective_tx': tx}
  state = step.init_state(
    observed, objective, tx, variables, _batch(), teacher=teacher, **options
  )
  pure = step.make_train_step(observed, objective, tx, accumulate=2, **options)
  run = jax.jit(guard.drop_nonfinite(pure))
  first, metrics = run(state, _batch(), jax.random.key(0))
  assert float(metrics['dropped']) == 0
  counts = [
    float(x)
    for path, x in jax.tree_util.tree_leaves_with_path(
      first.model_state['quant_stats']
    )
    if 'count' in jax.tree_util.keystr(path)
  ]
  assert counts and set(counts) == {2.0}
  # Two batches of 16, each a tenth of the running mean.
  x = observed({'params': state.params, **state.model_state}, _batch())
  assert x.output.shape == (32, 5)
  mean = first.model_state['batch_stats']['norm1']['mean']
  assert float(jnp.abs(mean).max()) > 0
  before = state.objective.state['crd']['bank_student'][:32]
  after = first.objective.state['crd']['bank_student'][:32]
  assert bool((before != after).any(axis=1).all())
  second, _ = run(first, _batch(), jax.random.key(0))
  average = second.objective.state['ema']['average']
  want = jax.tree.map(lambda a, b: (a + b) / 2, state.params, first.params)
  _assert_close(average, want)

  bad = _batch()
  bad['image'][3] = np.nan  # one part alone
  dropped, metrics = run(second, bad, jax.random.key(0))
  assert float(metrics['dropped']) == 1 and int(dropped.step) == 3
  _assert_close(dropped.replace(step=0), second.replace(step=0), 0)


def test_parts_must_divide_the_batch():
  with pytest.raises(ValueError, match='accumulate=3 .* batch of 32 examples'):
    _mlp.__wrapped__('jit', 3, 1)


def _cnn_step(compiler, *, fake_quant=True):
  model = models.CNN(5, widths=(4, 6), dropout=0.3)
  axis_name = sharding.axis_name(compiler)
  interceptor = quantize.quantize_activations(INPUTS, axis_name=axis_name)
  student = adapters.from_linen(
    model, interceptors=[interceptor], axis_name=axis_name
  )
  tx = _taylor(optax.adamw(0.01))
  variables = adapters.init_linen(model, jax.random.key(0), _batch())
  plain = adapters.from_linen(
    model, interceptors=[quantize.quantize_activations(INPUTS)]
  )
  variables['quant_stats'] = quantize.init_quant_stats(
    plain, variables, _batch(), INPUTS
  )
  objective = objectives.hard_labels()
  state = jax.device_get(
    step.init_state(plain, objective, tx, variables, _batch())
  )
  pure = step.make_train_step(student, objective, tx, axis_name=axis_name)
  return pure, state


@pytest.mark.parametrize('compiler', COMPILERS)
def test_several_steps_in_one_dispatch_are_single_steps(compiler):
  """States, pruning, rounding, and the metrics of every step."""
  pure, start = _cnn_step(compiler)
  mesh = sharding.make_mesh(jax.devices()[:2])
  batches = [
    {k: np.roll(v, i, axis=0) for k, v in _batch().items()} for i in range(2)
  ]
  single = sharding.compile_step(pure, mesh, compiler)
  state, rows = sharding.place_state(start, mesh, compiler), []
  for batch in batches:
    batch = sharding.shard_batch(batch, mesh)
    state, metrics = single(state, batch, jax.random.key(1))
    rows.append(jax.device_get(metrics))
  stack = {k: np.stack([b[k] for b in batches]) for k in batches[0]}
  stack = sharding.shard_batch(stack, mesh, stacked=True)
  together = sharding.compile_step(pure, mesh, compiler, stacked=True)
  placed = sharding.place_state(start, mesh, compiler)
  got, metrics = together(placed, stack, jax.random.key(1))
  _assert_close(got, state)
  assert int(got.step) == 2
  want = {name: [row[name] for row in rows] for name in rows[0]}
  for name, values in metrics.items():
    np.testing.assert_allclose(values, want[name], 1e-5, 1e-6, err_msg=name)
  assert want['loss/total'][0] != want['loss/total'][1]
  assert len(together.traces) == len(single.traces) == 1


def test_several_steps_in_a_loop_are_several_written_out():
  pure, start = _cnn_step('jit')
  stack = jax.tree.map(lambda x: np.stack([x, x[::-1]]), _batch())
  out, looped = (
    jax.jit(loops.several(pure, unroll=unroll))(start, stack, jax.random.key(1))
    for unroll in (True, False)
  )
  _assert_close(looped, out, 1e-4)


def test_a_loop_is_written_out_for_cpus_alone():
  """Wherever it is compiled: a plan for TPUs is made on a CPU."""
  calls = []

  def body(carry, x):
    calls.append(x)
    return carry @ x, carry.sum()

  x = jnp.ones((4, 4))
  xs = jnp.ones((3, 4, 4))
  traced = jax.jit(functools.partial(loops.scan, body)).trace(x, xs)
  lowered = {
    name: traced.lower(lowering_platforms=(name,)).as_text()
    for name in ('cpu', 'tpu', 'cuda')
  }
  loops_of = {name: 'stablehlo.while' in text for name, text in lowered.items()}
  assert loops_of == {'cpu': False, 'tpu': True, 'cuda': True}
  assert len(calls) == 1
