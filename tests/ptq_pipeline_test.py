"""Everything together: trained networks become integers after training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import ptq_cases as cases
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kd_jax import adapters, deploy, parity, quantize

pytestmark = pytest.mark.once


def _agreement(model, integers, test, want):
  forward = deploy.integer_forward(model)
  got = jax.jit(lambda v, b: forward(v, b).output)(integers, test)
  return float((got.argmax(-1) == want.argmax(-1)).mean())


@functools.cache
def _network(name):
  model, variables = cases.trained(name)
  test = cases.images(512, seed=5)
  return model, variables, test, cases.run(model, variables, test)


@pytest.mark.usefixtures('full_optimization')
@pytest.mark.parametrize('name', ['cnn', 'vit'])
def test_static_int8_agrees_with_the_float_network(name):
  model, variables, test, want = _network(name)
  right = float((want.argmax(-1) == test['label']).mean())
  assert right > 0.85
  integers = deploy.post_training_quantize(
    model, variables, iter(cases.calibration())
  )
  kernels = [
    leaf.dtype
    for path, leaf in jax.tree_util.tree_leaves_with_path(integers['int8'])
    if path[-1].key == 'kernel'
  ]
  assert len(kernels) == {'cnn': 3, 'vit': 8}[name]
  assert set(kernels) == {jnp.dtype('int8')}
  assert _agreement(model, integers, test, want) >= 0.99


class _Required(nn.Module):
  """Its caller must say whether it trains, under a name of its own."""

  @nn.compact
  def __call__(self, x, is_training):
    x = nn.BatchNorm(not is_training)(nn.Dense(8)(x))
    return nn.Dense(3)(nn.relu(x))


@pytest.mark.parametrize(
  'model, name',
  [
    (nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]), None),
    (_Required(), 'is_training'),
  ],
  ids=['none', 'another'],
)
def test_the_train_argument_may_have_another_name_or_none(model, name):
  x = np.random.default_rng(0).normal(size=(16, 5)).astype('f')
  options = {} if name is None else {name: True}
  variables = model.init(jax.random.key(0), x, **options)
  float_forward = adapters.from_linen(model, train_argument=name)
  want = float_forward(variables, {'image': x}).output
  batches = [{'image': x}]
  integers = deploy.post_training_quantize(
    model, variables, batches, correct=True, train_argument=name
  )
  assert 'int8' in integers
  assert 'batch_stats' not in integers or not integers['batch_stats']
  forward = deploy.integer_forward(model, train_argument=name)
  got = forward(integers, {'image': x}).output
  np.testing.assert_allclose(got, want, atol=0.05 * np.abs(want).max())


def test_the_whole_pipeline_runs_on_integers():
  """fold, equalise, smooth, calibrate, AdaRound, correct, convert: 4 bits."""
  model, variables, test, want = _network('cnn')
  four = quantize.QuantSpec(bits=4, axis=-1)
  run = functools.partial(
    deploy.post_training_quantize,
    model,
    variables,
    weight_rules=[('.*/kernel', four)],
  )
  plain = run(cases.calibration())
  options = {'equalize': True, 'smooth': 0.5, 'correct': True}
  nearest = run(cases.calibration(), **options)
  best = run(
    iter(cases.calibration()),
    rounding='adaround',
    adaround_steps=300,
    **options,
  )
  assert jax.tree.structure(plain) == jax.tree.structure(best)
  before, after = (_agreement(model, v, test, want) for v in (plain, best))
  assert after >= 0.97 and after > before
  # Some weights are rounded to the other side, by one code.
  kernels = [
    quantize.unpack_int4(v['int8']['conv2']['kernel'], 16)
    for v in (nearest, best)
  ]
  off = np.abs(np.subtract(*map(np.asarray, kernels)))
  assert off.max() == 1 and np.abs(kernels[1]).max() == 7


def test_integers_equal_the_float_that_was_converted():
  """With every option on, what `calibrated` returns rounds to the integers."""
  model, variables, test, _ = _network('cnn')
  options = {'equalize': True, 'smooth': 0.5, 'correct': True}
  ready = deploy.calibrated(model, variables, cases.calibration(), **options)
  assert {'params', 'quant_stats'} <= {*ready}
  report = parity.check_parity(
    model,
    ready,
    deploy.post_training_quantize(
      model, variables, cases.calibration(), **options
    ),
    test,
    weight_rules=deploy.WEIGHT_RULES,
    activation_rules=deploy.ACTIVATION_RULES,
  )
  assert report.exact.agreement == 1.0
  # Here and there a code differs by one, where sums round to the other side.
  assert report.exact.sqnr_db > report.fake.sqnr_db + 10


@pytest.mark.parametrize('name', ['cnn', 'vit'])
def test_dynamic_ranges_and_weights_alone(name):
  """Nothing is learned from the batches; each kind keeps what it says."""
  model, variables, test, want = _network(name)
  run = functools.partial(
    deploy.post_training_quantize, model, variables, cases.calibration(1)
  )
  spec = quantize.QuantSpec(symmetric=False, narrow=False, dynamic=True)
  dynamic = run(activation_rules=[('.*', spec)])
  weights = run(activation_rules=[])
  jax.tree.map(np.testing.assert_array_equal, dynamic, weights)
  floats = run(activation_rules=[('.*', None)])
  jax.tree.map(np.testing.assert_array_equal, floats, weights)
  layers = jax.tree_util.tree_leaves_with_path(dynamic['int8'])
  assert {path[-1].key for path, _ in layers} == {'kernel', 'kernel_scale'}
  assert _agreement(model, weights, test, want) >= 0.99
  forward = deploy.integer_forward(model, dynamic=[('.*', spec)])
  got = jax.jit(lambda v, b: forward(v, b).output)(dynamic, test)
  assert float((got.argmax(-1) == want.argmax(-1)).mean()) >= 0.985
  alone = jax.jit(deploy.integer_forward(model))(dynamic, test).output
  assert jnp.abs(got - alone).max() > 1e-3


def test_observers_choose_the_ranges():
  model, variables, _, _ = _network('cnn')
  run = functools.partial(
    deploy.post_training_quantize, model, variables, cases.calibration(2)
  )
  plain, inputs = run()['int8'], run(observer=quantize.mse())['int8']
  kernels = run(weight_observer=quantize.octav())['int8']
  assert plain['conv2']['input0']['scale'] > inputs['conv2']['input0']['scale']
  kernel = plain['conv2']['kernel']
  assert not (inputs['conv2']['kernel'] != kernel).any()
  assert (kernels['conv2']['kernel'] != kernel).any()
  assert (
    plain['conv2']['kernel_scale'] >= kernels['conv2']['kernel_scale']
  ).all()
  with pytest.raises(ValueError, match='takes no weight_observer'):
    run(rounding='adaround', weight_observer=quantize.octav())


def test_options_have_an_effect_each():
  model, variables, _, _ = _network('cnn')
  run = functools.partial(
    deploy.post_training_quantize, model, variables, cases.calibration(1)
  )
  plain = run()['int8']
  for options in ({'equalize': True}, {'smooth': 0.5}, {'correct': True}):
    other = run(**options)['int8']
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), plain, other)
    kernel = options != {'correct': True}
    assert changed['conv2']['kernel'] == kernel
    assert changed['conv2']['bias']
  with pytest.raises(ValueError, match="Unknown rounding 'up'"):
    run(rounding='up')
  with pytest.raises(ValueError, match='no batch to calibrate'):
    deploy.post_training_quantize(model, variables, [])


def _same_sharding(a, b):
  assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


@pytest.mark.parametrize('kind', ['Auto', 'Explicit'])
def test_sharded_kernels_stay_sharded(kind):
  """Output channels of both layers are spread over devices."""
  mesh = jax.make_mesh((4,), ('model',), axis_types=(AxisType[kind],))
  spec = PartitionSpec(None, 'model')
  rng = np.random.default_rng(0)
  params = {
    'a': jnp.asarray(rng.normal(size=(8, 16)), jnp.float32),
    'b': jnp.asarray(rng.normal(size=(16, 8)), jnp.float32),
  }

  def apply(params, x):
    x = jax.nn.relu(x @ params['a'])
    if kind == 'Explicit' and jax.typeof(x).sharding.spec[1]:
      x = jax.sharding.reshard(x, PartitionSpec())
    return x @ params['b']

  forward = adapters.from_apply(apply)
  x = {'image': jnp.ones((2, 8))}
  want = quantize.equalize(forward, {'params': params}, x)['params']
  assert jnp.abs(want['a'] - params['a']).max() > 0.1
  with jax.set_mesh(mesh):
    sharded = jax.device_put(params, NamedSharding(mesh, spec))
    got = quantize.equalize(forward, {'params': sharded}, x)['params']
    options = quantize.weight_options([quantize.INT8_WEIGHTS])
    rows = quantize.sensitivity(
      forward, {'params': sharded}, [x], [('.*', True)], options
    )
  for name in params:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-5)
    _same_sharding(got[name], sharded[name])
    model = nn.Sequential([nn.Dense(8)])
    variables = model.init(jax.random.key(0), x['image'])
    placed = jax.device_put(
      variables,
      jax.tree.map(
        lambda p: NamedSharding(
          mesh, PartitionSpec(*[None, 'model'][-p.ndim :])
        ),
        variables,
      ),
    )
    for run in (
      functools.partial(quantize.adaround, steps=20),
      quantize.correct_biases,
    ) * (kind == 'Explicit'):
      run = functools.partial(
        run, deploy.evaluation(model, train_argument=None)
      )
      one, many = (run(v, [x], cases.INT4) for v in (variables, placed))
      jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5), one, many
      )
      jax.tree.map(_same_sharding, many, placed)
  plain = quantize.sensitivity(
    forward, {'params': params}, [x], [('.*', True)], options
  )
  for a, b in zip(rows, plain, strict=True):
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-3)
