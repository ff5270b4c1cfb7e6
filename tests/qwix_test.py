"""Rules to Qwix and back, and what Qwix computes beside what we do."""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix as real_qwix
from flax import linen as nn
from flax import nnx

import kd_jax
from kd_jax import adapters, quantize, qwix, rules
from kd_jax.quantize import INT8_ACTIVATIONS, INT8_WEIGHTS, QuantSpec

pytestmark = pytest.mark.once

INT4 = QuantSpec(4, axis=-1)
FULL = QuantSpec(narrow=False, axis=-1)
GROUPS = QuantSpec(4, axis=-1, group_size=32)
TENSOR = QuantSpec()
DYNAMIC = QuantSpec(symmetric=False, narrow=False, axis=0, dynamic=True)
STATIC4 = QuantSpec(4, narrow=False)

ROUND_TRIPS = {
  'weights': ([('.*/kernel', INT8_WEIGHTS)], []),
  'both': ([('.*/kernel', INT8_WEIGHTS)], [('.*', INT8_ACTIVATIONS)]),
  'dynamic': ([('a/kernel', INT4)], [('a', DYNAMIC)]),
  'tensor': ([('a/kernel', TENSOR)], [('a', QuantSpec(dynamic=True))]),
  'tensor static': ([('a/kernel', TENSOR)], [('a', STATIC4)]),
  'full range': ([('a.*/kernel', FULL)], [('a.*', STATIC4)]),
  'groups': ([('a/kernel', GROUPS), ('b/kernel', FULL)], []),
  'root': ([('kernel', FULL)], [('', DYNAMIC)]),
  'left out': (
    [('a/kernel', None), ('.*/kernel', INT4)],
    [('a', None), ('.*', INT8_ACTIVATIONS)],
  ),
  'only weights': (
    [('a/kernel', INT4), ('b/kernel', FULL)],
    [('a', None), ('b', DYNAMIC)],
  ),
}


@pytest.mark.parametrize('name', ROUND_TRIPS)
def test_rules_come_back(name):
  ours = ROUND_TRIPS[name]
  assert qwix.from_qwix(qwix.to_qwix(*ours)) == ours


def test_rules_of_qwix_come_back():
  theirs = [
    real_qwix.QtRule(module_path='a', weight_qtype='int8'),
    real_qwix.QtRule(
      module_path='b|c', weight_qtype='int4', act_qtype='int8',
      act_static_scale=True, act_calibration_method='minmax',
      additional_qt_config={'lhs_disable_channelwise_axes': True},
    ),
    real_qwix.QtRule(module_path='d', weight_qtype='int4', tile_size=8),
    real_qwix.QtRule(module_path='e'),
    real_qwix.QtRule(
      weight_qtype='int8', act_qtype='int8', act_calibration_method='absmax',
      act_static_scale=False, disable_channelwise_axes=True,
    ),
  ]  # fmt: skip
  back = qwix.to_qwix(*qwix.from_qwix(theirs))
  paths = [rule.module_path for rule in theirs]
  assert [r.module_path for r in back] == ['a', '(?:b|c)', 'd', 'e', '.*']
  for rule, other, path in zip(back, theirs, paths, strict=True):
    assert vars(rule) | {'module_path': path} == vars(other)


def test_types_may_be_dtypes():
  rule = real_qwix.QuantizationRule(weight_qtype=jnp.int4, act_qtype=jnp.int8)
  weights, activations = qwix.from_qwix([rule])
  assert weights[0][1].bits == 4
  assert activations[0][1] == QuantSpec(narrow=False, axis=0, dynamic=True)


MIXED = (
  [
    ('block0/.*', None),
    ('block[12]/.*/kernel', INT4),
    ('norm/scale', None),
    ('(.*/)?head/kernel', FULL),
    ('.*/kernel', INT8_WEIGHTS),
  ],
  [
    ('block0(/.*)?', None),
    ('(.*/)?head', None),
    ('.*/conv', DYNAMIC),
    ('block1/.*', INT8_ACTIVATIONS),
    ('.*', STATIC4),
  ],
)


def test_a_module_gets_what_its_first_rules_say():
  made = qwix.to_qwix(*MIXED)
  paths = ['block0', 'block0/conv', 'block1/conv', 'block2/dense', 'head']
  paths += ['block1/dense', 'block1/a/head', 'x/head', 'stem', 'stem/conv']
  for path in paths:
    weight = rules.first(MIXED[0], f'{path}/kernel')
    activation = rules.first(MIXED[1], path)
    rule = next(r for r in made if re.fullmatch(r.module_path, path))
    got = qwix.from_qwix([rule])
    assert [pair[1] for pair in got[0]] == [weight] * (weight is not None)
    expected = None if weight is None else activation
    assert [pair[1] for pair in got[1]] == [expected] * (expected is not None)


NOT_OURS_TO_GIVE = {
  'a/bias': ([('a/bias', INT4)], []),
  'a|b/kernel': ([('a|b/kernel', INT4)], []),
  'zero points': ([('a/kernel', QuantSpec(symmetric=False, axis=-1))], []),
  "'b/.*kernel'": ([('b/.*kernel', None), ('.*/kernel', INT4)], []),
  'axis=1': ([('a/kernel', QuantSpec(axis=1))], []),
  'axis=(-3, -1)': ([('a/kernel', QuantSpec(axis=(-3, -1)))], []),
  'group_size=4 with axis=None': ([('a/kernel', QuantSpec(group_size=4))], []),
  'group_size=32 too': ([('a/kernel', GROUPS)], [('a', DYNAMIC)]),
  'narrow=False': ([('a/kernel', INT4)], [('a', QuantSpec(symmetric=False))]),
  'is for weights': ([('a/kernel', INT4)], [('a', GROUPS)]),
  'axis=-1': ([('a/kernel', INT4)], [('a', QuantSpec(axis=-1))]),
  'not axis=None': ([('a/kernel', INT4)], [('a', QuantSpec(dynamic=True))]),
  'not axis=0': ([('a/kernel', TENSOR)], [('a', DYNAMIC)]),
  "'b/kernel'": ([('a/kernel', INT4)], [('b', DYNAMIC)]),
  "('a', None) before": (
    [('a/kernel', None), ('.*/kernel', INT4)],
    [('.*', DYNAMIC)],
  ),
}


@pytest.mark.parametrize('message', NOT_OURS_TO_GIVE)
def test_what_qwix_cannot_express_is_named(message):
  with pytest.raises(ValueError, match=re.escape(message)):
    qwix.to_qwix(*NOT_OURS_TO_GIVE[message])


NOT_THEIRS_TO_GIVE = [
  {'weight_qtype': 'float8_e4m3fn'},
  {'weight_qtype': 'nf4'},
  {'act_qtype': jnp.float8_e4m3fn},
  {'weight_calibration_method': 'rms,3'},
  {'weight_calibration_method': 'absmax,0.8'},
  {'weight_calibration_method': 'minmax'},
  {'act_qtype': 'int8', 'act_calibration_method': 'fixed,-1,1'},
  {'tile_size': 0.5},
  {'tile_size': 8, 'act_qtype': 'int8'},
  {'op_names': ('einsum',)},
  {'act_batch_axes': (0, 1)},
  {'bwd_qtype': 'int8'},
  {'additional_qt_config': {'disable_gradient_clipping': True}},
]


@pytest.mark.parametrize('fields', NOT_THEIRS_TO_GIVE)
def test_what_a_spec_cannot_express_is_named(fields):
  fields = {'weight_qtype': 'int8', 'module_path': 'a/b'} | fields
  rule = real_qwix.QtRule(**fields)
  with pytest.raises(
    ValueError, match=r"Rule 'a/b': \w+=.*no counterpart"
  ) as e:
    qwix.from_qwix([rule])
  assert any(
    f'{name}={value!r}' in str(e.value) for name, value in fields.items()
  )


def test_options_go_to_the_rules_that_quantize():
  weights = [('a/kernel', None), ('b/kernel', INT4), ('c/kernel', INT4)]
  made = qwix.to_qwix(
    weights,
    [('b', QuantSpec(narrow=False, axis=0, dynamic=True))],
    act_qtype='float8_e4m3fn',
    bwd_qtype='float8_e4m3fn',
  )
  assert [r.bwd_qtype for r in made] == [None, *2 * ['float8_e4m3fn']]
  assert [r.act_qtype for r in made] == [None, 'float8_e4m3fn', None]
  assert [r.weight_qtype for r in made] == [None, 'int4', 'int4']
  with pytest.raises(ValueError, match='did you mean bwd_qtype'):
    qwix.to_qwix(weights, bwd_qtyp='int8')
  with pytest.raises(ValueError, match='needs symmetric activations'):
    qwix.to_qwix(weights, [('b', DYNAMIC)], bwd_qtype='int8')


def test_without_qwix_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'qwix', None)
  with pytest.raises(ImportError, match=r'kd_jax\[qwix\]'):
    qwix.to_qwix([('a/kernel', INT4)])


# --- what is computed


class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(8, (3, 3), strides=2, name='conv')(x)
    x = nn.BatchNorm(use_running_average=not train, name='norm')(x)
    x = nn.relu(x).mean((1, 2))
    return nn.Dense(4, name='head')(x)


class Mlp(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(nn.Dense(16, name='hidden')(x.reshape(len(x), -1)))
    return nn.Dense(4, name='head')(x)


def _batch(size=16):
  rng = np.random.default_rng(0)
  label = rng.integers(0, 4, size)
  image = rng.normal(size=(size, 8, 8, 3)) + label[:, None, None, None]
  return {'image': jnp.asarray(image, jnp.float32), 'label': jnp.asarray(label)}


def _ours(model, variables, batch, weights, activations):
  forward = adapters.from_linen(
    model, interceptors=(quantize.quantize_activations(activations),)
  )
  params = quantize.fake_quant_params(variables['params'], weights)
  return _forward(forward, {**variables, 'params': params}, batch).output


def _forward(forward, variables, batch):
  call = jax.jit(functools.partial(forward, train=True))
  return call(variables, batch, jax.random.key(0))


KERNELS = '.*/kernel'


@pytest.mark.parametrize(
  'network, weight', [('Net', INT8_WEIGHTS), ('Net', TENSOR), ('Mlp', INT4)]
)
def test_dynamic_forwards_are_equal(network, weight):
  """Codes are the same; sums of integers are exact, ours are rounded."""
  model, batch = {'Net': Net, 'Mlp': Mlp}[network](), _batch()
  variables = model.init(jax.random.key(0), batch['image'])
  axis = None if weight is TENSOR else 0
  activation = QuantSpec(symmetric=False, narrow=False, axis=axis, dynamic=True)
  both = [(KERNELS, weight)], [('.*', activation)]
  ours = _ours(model, variables, batch, *both)
  quantized = adapters.from_linen(qwix.quantize_model(model, *both))
  theirs = _forward(quantized, variables, batch).output
  np.testing.assert_allclose(theirs, ours, atol=2e-6)
  plain = adapters.from_linen(model)
  plain = _forward(plain, variables, batch).output
  assert jnp.abs(plain - ours).max() > 1e-3


@pytest.mark.parametrize('weight', [INT4, TENSOR])
def test_static_ranges_are_equal_in_the_first_batch_of_dense_layers(weight):
  model, batch = Mlp(), _batch()
  both = [(KERNELS, weight)], [('.*', INT8_ACTIVATIONS)]
  quantized = qwix.quantize_model(model, *both)
  variables = quantized.init(jax.random.key(0), batch['image'])
  stats = variables['quant_stats']['head']['dot_general0_lhs']
  assert stats['sum_of_max'].shape == (1, 1)
  theirs = _forward(adapters.from_linen(quantized), variables, batch)
  plain = {'params': variables['params']}
  ours = _ours(model, plain, batch, *both)
  np.testing.assert_allclose(theirs.output, ours, atol=2e-6)
  counts = [
    layer['dot_general0_lhs']['count']
    for layer in theirs.model_state['quant_stats'].values()
  ]
  assert counts == [1, 1]


@pytest.mark.parametrize('bits', [8, 4])
def test_the_full_range_is_half_a_code_wider(bits):
  """The step of Qwix's own absmax, as the docstring gives it."""
  w = jax.random.normal(jax.random.key(0), (32, 6))
  spec = QuantSpec(bits, narrow=False, axis=-1)
  [rule] = qwix.to_qwix([('a/kernel', spec)])
  got = real_qwix.quantize(
    w,
    rule.weight_qtype,
    channelwise_axes=[1],
    calibration_method=rule.weight_calibration_method,
  )
  ours = quantize.weight_scale(w, spec)[0]
  ratio = (2 ** (bits - 1) - 1) / (2 ** (bits - 1) - 0.5)
  np.testing.assert_allclose(got.scale, ours * ratio, rtol=1e-6)
  narrow = QuantSpec(bits, axis=-1)
  [rule] = qwix.to_qwix([('a/kernel', narrow)])
  got = real_qwix.quantize(
    w,
    rule.weight_qtype,
    channelwise_axes=[1],
    calibration_method=rule.weight_calibration_method,
  )
  np.testing.assert_allclose(got.scale, ours, rtol=1e-6)
  codes = quantize.quantize(w, *quantize.weight_scale(w, narrow), narrow)
  np.testing.assert_array_equal(got.qvalue.astype(jnp.int8), codes)


def test_the_backward_product_takes_values_before_rounding():
  model, batch = nn.Dense(4, use_bias=False), _batch()
  x = batch['image'].reshape(16, -1)
  variables = model.init(jax.random.key(0), x)
  quantized = qwix.quantize_model(model, [('kernel', INT4)])
  gradient = jax.grad(lambda x: quantized.apply(variables, x).sum())(x)
  kernel = variables['params']['kernel']
  expected = np.broadcast_to(kernel.sum(1), x.shape)
  np.testing.assert_allclose(gradient, expected, atol=1e-5)


def _train(quantized, batch, steps=15):
  forward = adapters.from_linen(quantized)
  objective = kd_jax.weighted_sum({'ce': (1.0, kd_jax.hard_labels())})
  tx = optax.adam(3e-2)
  variables = quantized.init(jax.random.key(0), batch['image'])
  step = jax.jit(kd_jax.make_train_step(forward, objective, tx))
  state = kd_jax.init_state(forward, objective, tx, variables, batch)
  losses = []
  for _ in range(steps):
    state, metrics = step(state, batch, jax.random.key(1))
    losses.append(float(metrics['loss/total']))
  return state, losses


def test_training_with_static_ranges_learns_both():
  batch = _batch()
  quantized = qwix.quantize_model(
    Net(), [(KERNELS, INT8_WEIGHTS)], [('.*', INT8_ACTIVATIONS)]
  )
  state, losses = _train(quantized, batch)
  assert losses[-1] < 0.5 * losses[0]
  stats = state.model_state['quant_stats']['conv']['conv_general_dilated0_lhs']
  assert stats['count'] == 15
  image = np.asarray(batch['image'])
  # The mean over batches and examples of each one's largest value.
  expected = 15 * image.max((1, 2, 3)).mean()
  np.testing.assert_allclose(stats['sum_of_max'].ravel(), expected, rtol=1e-5)


@pytest.mark.parametrize(
  'options',
  [
    {'weight_qtype': 'float8_e4m3fn', 'act_qtype': 'float8_e4m3fn'},
    {'bwd_qtype': 'int8'},
  ],
  ids=['fp8', 'int8 gradients'],
)
def test_fp8_and_quantized_gradients_train(options):
  batch = _batch()
  both = (
    [(KERNELS, INT8_WEIGHTS)],
    [('.*', QuantSpec(narrow=False, axis=0, dynamic=True))],
  )
  quantized = qwix.quantize_model(Net(), *both, **options)
  _, losses = _train(quantized, batch)
  assert losses[-1] < 0.5 * losses[0]
  _, other = _train(qwix.quantize_model(Net(), *both), batch, 3)
  assert other != losses[:3]


def test_serving_runs_on_integers():
  model, batch = Net(), _batch()
  variables = model.init(jax.random.key(0), batch['image'])
  both = (
    [(KERNELS, INT8_WEIGHTS)],
    [('.*', QuantSpec(narrow=False, axis=0, dynamic=True))],
  )
  serving = qwix.quantize_model(model, *both, provider='serve')
  abstract = jax.eval_shape(serving.init, jax.random.key(0), batch['image'])
  params = real_qwix.quantize_params(variables['params'], abstract['params'])
  codes = params['conv']['kernel'].array.qvalue
  assert codes.dtype == jnp.int8
  trained = qwix.quantize_model(model, *both).apply(variables, batch['image'])
  got = serving.apply({**variables, 'params': params}, batch['image'])
  np.testing.assert_allclose(got, trained, atol=1e-6)
  with pytest.raises(ValueError, match='one per tensor'):
    qwix.quantize_model(model, [(KERNELS, TENSOR)], provider='serve')
  with pytest.raises(ValueError, match="Unknown provider 'qat'"):
    qwix.quantize_model(model, *both, provider='qat')


def test_nnx_modules_are_quantized_too():
  model = nnx.Sequential(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), nnx.relu)
  x = jax.random.normal(jax.random.key(0), (4, 6))
  quantized = qwix.quantize_model(model, [(KERNELS, INT4)], inputs=(x,))
  w = model.layers[0].kernel[...]
  [rounded] = quantize.fake_quant_params([w], [('0', INT4)])
  expected = jax.nn.relu(x @ rounded)
  np.testing.assert_allclose(quantized(x), expected, atol=1e-6)
  forward, variables = adapters.from_nnx(quantized)
  out = forward(variables, {'image': x}, jax.random.key(0), train=True)
  np.testing.assert_allclose(out.output, expected, atol=1e-6)
