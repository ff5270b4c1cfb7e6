"""Quantization-aware training on eight devices equals that on one."""

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

from kd_jax import adapters, models, objectives, quantize, sharding, step
from kd_jax.quantize import QuantSpec

OBSERVERS = {
  'min_max': quantize.min_max(),
  'ema': quantize.ema_min_max(decay=0.9),
  'percentile': quantize.percentile(99.9),
  'mse': quantize.mse(),
  'entropy': quantize.entropy(stride=64),
  'octav': quantize.octav(),
  'dynamic': None,
}
AFFINE = quantize.INT8_ACTIVATIONS
DYNAMIC = QuantSpec(symmetric=False, narrow=False, dynamic=True)
WEIGHTS = [('.*/kernel', QuantSpec(bits=4, axis=-1))]


class Branches(nn.Module):
  """A layer on the input for every observer, then BatchNorm and two layers."""

  @nn.compact
  def __call__(self, x, train=False):
    branches = [nn.Conv(4, (3, 3), name=name)(x) for name in OBSERVERS]
    x = nn.Conv(4, (3, 3), name='conv1')(x) + sum(branches)
    x = nn.BatchNorm(not train, name='norm1')(x)
    x = models.layers.GlobalAveragePool(name='pool')(nn.relu(x))
    return nn.Dense(3, name='head')(x)


def _batch():
  """Uneven: one device sees nothing, another much larger values."""
  image = np.random.default_rng(0).normal(size=(16, 4, 4, 1)).astype('f')
  image[:2] = 0
  image[2:4] *= 5
  return {'image': image, 'label': (np.arange(16) % 3).astype('i4')}


def _train(compiler, devices, interceptors, *, model, params_fn, init):
  """The metrics and the state after one step."""
  axis_name = sharding.axis_name(compiler)
  forward = adapters.from_linen(
    model, interceptors=interceptors(axis_name), axis_name=axis_name
  )
  single = adapters.from_linen(model, interceptors=interceptors(None))
  variables = adapters.init_linen(model, jax.random.key(0), _batch())
  # A channel that was pruned away.
  layer = variables['params']['conv1']
  layer['kernel'] = layer['kernel'].at[..., 0].set(0)
  variables = init(single, variables)
  objective, tx = objectives.hard_labels(), optax.sgd(0.1)
  state = step.init_state(single, objective, tx, variables, _batch())
  mesh = sharding.make_mesh(jax.devices()[:devices])
  pure = step.make_train_step(
    forward, objective, tx, params_fn=params_fn, axis_name=axis_name
  )
  compiled = sharding.compile_step(pure, mesh, compiler)
  state, metrics = compiled(
    sharding.place_state(state, mesh, compiler),
    sharding.shard_batch(_batch(), mesh),
    jax.random.key(1),
  )
  return jax.device_get((metrics, state))


def _compare(got, want):
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    assert np.isfinite(a).all(), jax.tree_util.keystr(path)
    np.testing.assert_allclose(
      a, b, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path)
    )


def _fake_quant(params):
  return quantize.fake_quant_params(params, WEIGHTS)


def test_a_step_with_every_observer_equals_that_of_one_device():
  # On the input alone: a last bit in a later layer may move a code there.
  rules = {
    name: [(name, DYNAMIC if name == 'dynamic' else AFFINE)]
    for name in OBSERVERS
  }

  def interceptors(axis_name):
    return [
      quantize.quantize_activations(
        rules[name], observer=observer, axis_name=axis_name
      )
      for name, observer in OBSERVERS.items()
    ]

  def init(forward, variables):
    every = sum(rules.values(), [])
    stats = quantize.init_quant_stats(forward, variables, _batch(), every)
    return {**variables, 'quant_stats': stats}

  options = {'model': Branches(), 'params_fn': _fake_quant, 'init': init}
  want = _train('jit', 1, interceptors, **options)
  for compiler in ('jit', 'shard_map'):
    got = _train(compiler, 8, interceptors, **options)
    _compare(got, want)
  stats = got[1].model_state['quant_stats']
  assert {*stats} == {*OBSERVERS} - {'dynamic'}
  for entry in stats.values():
    seen = entry['input0']
    assert seen['low'] == _batch()['image'].min() and seen['count'] == 1


@pytest.mark.parametrize('method', ['lsq', 'pact'])
def test_learned_ranges_get_the_gradient_of_the_global_batch(method):
  spec = QuantSpec(bits=8, symmetric=False, narrow=False)
  rules = [('pool', spec)]

  def interceptors(axis_name):
    return (
      quantize.learned_activations(rules, method=method),
      quantize.freeze_batch_norm(after=1),
    )

  def init(forward, variables):
    variables = quantize.init_batch_norm_steps(variables)
    params = quantize.init_lsq_params(variables['params'], WEIGHTS)
    variables = {**variables, 'params': params}
    params = quantize.init_learned_activations(
      forward, variables, _batch(), rules
    )
    # Below the largest values, so that some saturate on every device.
    params['pool'] = jax.tree.map(lambda v: v / 8, params['pool'])
    return {**variables, 'params': params}

  def params_fn(params):
    return quantize.lsq_params(params, WEIGHTS)

  model = models.CNN(3, widths=(4,))
  options = {'model': model, 'params_fn': params_fn, 'init': init}
  want = _train('jit', 1, interceptors, **options)
  for compiler in ('jit', 'shard_map'):
    got = _train(compiler, 8, interceptors, **options)
    _compare(got, want)
  assert got[1].model_state['batch_stats']['norm1']['steps'] == 1
  assert np.ndim(jax.tree.leaves(got[1].params['pool'])[0]) == 0
