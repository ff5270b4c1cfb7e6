"""Integer execution: conversion, products on codes, every kind of layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kd_jax import adapters, quantize
from kd_jax.models import layers
from kd_jax.models.vit import Context, Scores
from kd_jax.quantize import QuantSpec, convolution_ways

WEIGHTS = [('.*/(kernel|embedding)', quantize.INT8_WEIGHTS)]
INPUTS = [('.*', quantize.INT8_ACTIVATIONS)]
INT4 = QuantSpec(bits=4, axis=-1)
DYNAMIC = QuantSpec(symmetric=False, narrow=False, dynamic=True)
WAYS = ('direct', 'im2col', 'float32')


def _rng(seed=0):
  return np.random.default_rng(seed)


class _One(nn.Module):
  """One layer with a path."""

  layer: nn.Module

  def __call__(self, *args, **kwargs):
    return self.layer(*args, **kwargs)


def _forward(model, *interceptors):
  return adapters.from_linen(
    model, interceptors=interceptors, train_argument=None
  )


def _walk(jaxpr):
  """Every equation, those of inner jaxprs included."""
  for eqn in jaxpr.eqns:
    yield eqn
    for value in eqn.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          yield from _walk(inner)


def _products(fn, *args):
  """The equations that multiply arrays."""
  names = ('dot_general', 'conv_general_dilated')
  jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
  return [e for e in _walk(jaxpr) if e.primitive.name in names]


# --- packing


@pytest.mark.parametrize('shape', [(1,), (6,), (7,), (3, 4), (2, 3, 5)])
def test_packed_codes_come_back_and_take_half_the_bytes(shape):
  codes = _rng().integers(-8, 8, shape).astype(np.int8)
  packed = jax.jit(quantize.pack_int4)(codes)
  assert packed.dtype == jnp.uint8
  assert packed.shape == (*shape[:-1], -(-shape[-1] // 2))
  unpack = jax.jit(quantize.unpack_int4, static_argnums=1)
  np.testing.assert_array_equal(unpack(packed, shape[-1]), codes)
  with pytest.raises(ValueError, match='do not fill'):
    quantize.unpack_int4(packed, shape[-1] + 2)


def test_the_layout_of_a_byte():
  """The lower index in the lower half, two's complement."""
  packed = quantize.pack_int4(jnp.array([[1, -2], [-8, 7]], jnp.int8))
  np.testing.assert_array_equal(packed, [[0xE1], [0x78]])


# --- one layer: integers against fake-quant


def _calibrated(model, variables, x, weights, inputs):
  """Converted variables with observed ranges, and fake-quant's output.

  The latter with biases on their grid: the one rounding that training has not.
  """
  forward = _forward(model, quantize.quantize_activations(inputs))

  @jax.jit
  def observe(variables, x):
    return forward(variables, {'image': x}, train=True).model_state

  @jax.jit
  def run(variables, converted, x):
    rounded = quantize.fake_quant_params(variables['params'], weights)
    steps = quantize.dequantize_params(converted)['params']
    params = jax.tree_util.tree_map_with_path(
      lambda path, w, step: step if path[-1].key == 'bias' else w,
      rounded,
      steps,
    )
    return forward({**variables, 'params': params}, {'image': x}).output

  variables = {**variables, **observe(variables, x)}
  converted = quantize.convert(variables, weights, inputs)
  return converted, run(variables, converted, x)


def _run(model, converted, x, *options):
  """The output of each way to execute, from one compiled program."""

  @jax.jit
  def run(converted, x):
    return [
      _forward(model, quantize.execute_integers(**o))(
        converted, {'image': x}
      ).output
      for o in options or ({},)
    ]

  outputs = run(converted, x)
  return outputs if options else outputs[0]


def _filled(model, x, seed=0):
  """Variables that are not those of a new model."""
  rng = _rng(seed)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x))
  return jax.tree.map(
    lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), dict(shapes)
  )


def _assert_equal(got, want):
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def _random_convolution(rng):
  rank = int(rng.integers(1, 3))
  groups = int(rng.choice([1, 1, 2, 4]))
  size = tuple(int(v) for v in rng.integers(1, 4, rank))
  explicit = tuple(tuple(int(v) for v in rng.integers(0, 3, 2)) for _ in size)
  paddings = ['SAME', 'SAME_LOWER', 'VALID', 'CIRCULAR', 'REFLECT', 1, explicit]
  paddings += ['CAUSAL'] if rank == 1 else []
  layer = nn.Conv(
    features=int(rng.choice([4, 8, 12])),
    kernel_size=size,
    strides=tuple(int(v) for v in rng.integers(1, 4, rank)),
    padding=paddings[rng.integers(len(paddings))],
    kernel_dilation=tuple(int(v) for v in rng.integers(1, 3, rank)),
    feature_group_count=groups,
    use_bias=bool(rng.integers(2)),
  )
  batch = ((), (3,), (2, 2))[rng.integers(3)]
  return layer, (*batch, *(int(v) for v in rng.integers(6, 9, rank)), 4)


@pytest.mark.parametrize('seed', range(10))
def test_random_convolutions_on_integers_are_those_of_fake_quant(seed):
  rng = _rng(seed)
  layer, shape = _random_convolution(rng)
  model = _One(layer)
  # Ranges on one side of 0 and on both, so that zero points are everywhere.
  x = (rng.normal(size=shape) + rng.choice([-2, 0, 3])).astype('f')
  weights = [('.*/kernel', QuantSpec(axis=rng.choice([None, -1])))]
  variables = _filled(model, x, seed)
  converted, fake = _calibrated(model, variables, x, weights, INPUTS)
  options = [{'convolution': way} for way in WAYS] + [{'simulate': True}]
  *ways, simulated = _run(model, converted, x, *options)
  _assert_equal(ways[0], fake)
  _assert_equal(simulated, fake)
  for way in ways[1:]:
    np.testing.assert_array_equal(way, ways[0])


DENSE = {
  'dense': (nn.Dense(6), (5, 8)),
  'dense without batch': (nn.Dense(6), (8,)),
  'dense of tokens': (nn.Dense(6, use_bias=False), (2, 3, 8)),
  'heads': (nn.DenseGeneral((2, 3)), (2, 5, 8)),
  'heads without bias': (nn.DenseGeneral((2, 3), use_bias=False), (2, 5, 8)),
  'from heads': (nn.DenseGeneral(6, axis=(-2, -1)), (2, 5, 2, 8)),
  'other axes': (nn.DenseGeneral((3, 2), axis=(1, -1)), (2, 3, 4, 5)),
  'batch axes': (nn.DenseGeneral(3, batch_dims=(0,)), (4, 2, 5)),
  'batch axes, square': (nn.DenseGeneral(3, batch_dims=(0,)), (5, 2, 5)),
  'einsum': (nn.Einsum((4, 6), '...i,io->...o'), (2, 3, 4)),
  'einsum of experts': (nn.Einsum((3, 4, 5), 'ebi,eio->ebo'), (3, 2, 4)),
  'einsum, bias turned': (nn.Einsum((4, 3, 3), 'bi,ijk->bkj'), (2, 4)),
  'einsum, output turned': (nn.Einsum((4, 5), 'bi,io->ob'), (3, 4)),
}


@pytest.mark.parametrize('name', DENSE)
def test_dense_layers_on_integers_are_those_of_fake_quant(name):
  layer, shape = DENSE[name]
  axis = None if name in ('dense', 'heads') else -1
  model = _One(layer)
  x = (_rng().normal(size=shape) + 1).astype('f')
  weights = [('.*/kernel', QuantSpec(axis=axis))]
  variables = _filled(model, x)
  converted, fake = _calibrated(model, variables, x, weights, INPUTS)
  options = ({}, {'simulate': True})
  for got in _run(model, converted, x, *options):
    _assert_equal(got, fake)
  forward = _forward(model, quantize.execute_integers())
  (product,) = _products(lambda x: forward(converted, {'image': x}).output, x)
  assert {v.aval.dtype for v in product.invars} == {jnp.dtype('int8')}
  assert product.outvars[0].aval.dtype == jnp.int32


# --- by hand


def _layer(kernel, bias, scale, zero_point, kernel_scale):
  """Converted variables of one layer, as `convert` makes them."""
  return {
    'int8': {
      'layer': {
        'kernel': jnp.asarray(kernel, jnp.int8),
        'bias': jnp.asarray(bias, jnp.int32),
        'kernel_scale': jnp.asarray(kernel_scale, jnp.float32),
        'input0': {
          'scale': jnp.float32(scale),
          'zero_point': jnp.int8(zero_point),
        },
      }
    }
  }


def _execute(layer, variables, x, **options):
  forward = _forward(_One(layer), quantize.execute_integers(**options))
  return forward(variables, {'image': x}).output


CONVOLUTIONS = {
  'same': {'padding': 'SAME'},
  'dilated, strided': {'kernel_dilation': (2, 1), 'padding': 1, 'strides': 2},
  'grouped': {'feature_group_count': 2},
  'depthwise': {'feature_group_count': 4, 'strides': 2},
  'even kernel': {'kernel_size': (2, 4)},
  'circular': {'kernel_size': (2, 4), 'padding': 'CIRCULAR'},
  'reflected': {'kernel_size': (4, 3), 'padding': 'REFLECT'},
  'transposed': {'input_dilation': 2, 'padding': 1},
  'patches': {'kernel_size': (3, 2), 'strides': (3, 2), 'padding': ((2, 0), 0)},
}


@pytest.mark.parametrize('zero_point', [0, -37])
@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_integer_convolution_is_exactly_linens_on_the_quantized_values(
  name, zero_point
):
  """Scales are powers of two: float arithmetic is exact, equality too."""
  options = {'kernel_size': (3, 3)} | CONVOLUTIONS[name]
  layer = nn.Conv(8, **options)
  groups = options.get('feature_group_count', 1)
  rng = _rng()
  x = rng.integers(-128, 128, (2, 7, 6, 4))
  kernel = rng.integers(-127, 128, (*options['kernel_size'], 4 // groups, 8))
  bias = rng.integers(-1000, 1000, 8)
  kernel_scale = 2.0 ** -np.arange(3, 11)
  variables = _layer(kernel, bias, 0.25, zero_point, kernel_scale)
  real = ((x - zero_point) * 0.25).astype('f')
  params = {
    'kernel': (kernel * kernel_scale).astype('f'),
    'bias': (bias * kernel_scale * 0.25).astype('f'),
  }
  want = layer.apply({'params': params}, real)
  assert zero_point == 0 or np.asarray(want).any()
  ways = [{'convolution': way} for way in WAYS] + [{'simulate': True}]
  for got in _run(_One(layer), variables, real, *ways):
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('shape', [(5, 6), (2, 3, 6), (6,)])
def test_integer_dense_is_exact_on_any_leading_axes(shape):
  rng = np.random.default_rng(0)
  x, kernel = rng.integers(-128, 128, shape), rng.integers(-127, 128, (6, 4))
  bias = rng.integers(-1000, 1000, 4)
  variables = _layer(kernel, bias, 0.5, 11, np.full(4, 0.125))
  got = _execute(nn.Dense(4), variables, ((x - 11) * 0.5).astype('f'))
  want = ((x - 11) @ kernel + bias) * 0.0625
  np.testing.assert_array_equal(got, want)


def test_the_accumulator_does_not_overflow_int8_or_int16():
  kernel = np.full((600, 1), 127)
  variables = _layer(kernel, [0], 1.0, -128, [1.0])
  got = _execute(nn.Dense(1), variables, np.full((1, 600), 255.0, 'f'))
  assert float(got[0, 0]) == 600 * 127 * 255


def test_auto_is_the_way_that_was_measured_to_be_fastest():
  def kernel(*shape):
    return jnp.ones(shape, jnp.int8)

  new = jax.__version_info__ >= (0, 12)
  way = 'direct' if new else 'im2col'
  assert convolution_ways.fastest(kernel(3, 3, 64, 64), groups=1) == way
  for shape, groups in (
    ((3, 3, 16, 16), 1),
    ((1, 1, 64, 64), 1),
    ((3, 3, 32, 64), 2),
  ):
    assert convolution_ways.fastest(kernel(*shape), groups=groups) == 'im2col'


def test_what_cannot_be_executed_is_named():
  variables = _layer(np.ones((3, 3, 4, 2)), np.zeros(2), 1.0, 0, np.ones(2))
  layer = nn.Conv(2, (3, 3), mask=jnp.ones((3, 3, 4, 2)))
  with pytest.raises(ValueError, match='layer: a convolution with a kernel ma'):
    _execute(layer, variables, np.ones((1, 5, 5, 4), 'f'))
  variables = _layer(np.ones((4, 2)), np.zeros(2), 1.0, 0, np.ones(2))
  for text in ('bi,io->o', 'b...,i...->b...', 'bb,io->bo'):
    with pytest.raises(ValueError, match='layer: the einsum .* plain|layer: '):
      _execute(nn.Einsum((4, 2), text), variables, np.ones((4, 4), 'f'))
  with pytest.raises(ValueError, match="convolution 'im2cool': did you mean"):
    quantize.execute_integers(convolution='im2cool')


def _dense_variables(kernel, bias, low=-1.0, high=3.0, count=1.0):
  stats = {'low': low, 'high': high, 'count': count}
  return {
    'params': {'layer': {'kernel': jnp.asarray(kernel), 'bias': bias}},
    'quant_stats': {'layer': {'input0': jax.tree.map(jnp.float32, stats)}},
  }


def test_what_has_no_integer_execution_is_named():
  variables = _dense_variables(jnp.ones((4, 2)), jnp.zeros(2))
  affine = QuantSpec(symmetric=False, narrow=False)
  wide = {'symmetric': False, 'narrow': False}
  for spec in (affine, QuantSpec(axis=0)):
    with pytest.raises(ValueError, match='layer/kernel.*symmetric weights'):
      quantize.convert(variables, [('.*/kernel', spec)], INPUTS)
  ends = {'low': -jnp.ones(3), 'high': jnp.ones(3), 'count': jnp.ones(3)}
  stack = _dense_variables(jnp.ones((3, 4, 2)), jnp.zeros((3, 2)), **ends)
  with pytest.raises(ValueError, match='layer/kernel.*symmetric weights'):
    rules = [('.*/kernel', QuantSpec(axis=(0, 1)))]
    quantize.convert(stack, rules, INPUTS)
  for spec in (
    QuantSpec(bits=4, **wide),
    QuantSpec(axis=-1, **wide),
    QuantSpec(),
  ):
    with pytest.raises(ValueError, match='layer/input0: .*8-bit activations'):
      quantize.convert(variables, WEIGHTS, [('.*', spec)])
  for options in ({'count': 0.0}, {'high': jnp.nan}, {'high': jnp.inf}):
    unseen = _dense_variables(jnp.ones((4, 2)), jnp.zeros(2), **options)
    with pytest.raises(ValueError, match='layer/input0: its observer'):
      quantize.convert(unseen, WEIGHTS, INPUTS)
  with pytest.raises(ValueError, match='no layer has quantized inputs'):
    quantize.convert({'params': variables['params']}, WEIGHTS, INPUTS)


def test_what_is_no_kernel_stays_float_on_its_grid():
  variables = _dense_variables(jnp.ones((4, 3)), jnp.array([0.1, -2.0, 0.7]))
  rules = [('.*/kernel', quantize.INT8_WEIGHTS), ('.*/bias', QuantSpec(bits=4))]
  converted = quantize.convert(variables, rules, [])
  bias = converted['params']['layer']['bias']
  want = quantize.fake_quant_params(variables['params'], rules=rules)
  np.testing.assert_allclose(bias, want['layer']['bias'], rtol=1e-6)
  assert np.abs(bias - variables['params']['layer']['bias']).max() > 0.01


@pytest.mark.parametrize('inputs', [INPUTS, []])
@pytest.mark.parametrize(
  'spec',
  [
    quantize.INT8_WEIGHTS,
    QuantSpec(),
    QuantSpec(bits=4, axis=-1),
    QuantSpec(bits=4),
    QuantSpec(group_size=2, axis=-1),
    QuantSpec(bits=4, group_size=3, axis=-1),
  ],
)
def test_conversion_is_of_the_rounded_weights(spec, inputs):
  kernel = jnp.asarray(_rng().normal(size=(6, 3)), jnp.float32)
  variables = _dense_variables(kernel, jnp.array([0.1, 0.0, -3.0]))
  rules = [('.*/kernel', spec)]
  converted = quantize.convert(variables, rules, inputs)
  layer = converted['int8']['layer']
  assert layer['kernel'].dtype == ('uint8' if spec.bits == 4 else 'int8')
  assert layer['kernel'].shape == ((6, 2) if spec.bits == 4 else (6, 3))
  groups = 1 if spec.group_size is None else 6 // spec.group_size
  assert layer['kernel_scale'].shape == (groups, 3)
  # Not where a channel's scale is that of a sum.
  assert ('bias' in layer) == (inputs == INPUTS and groups == 1)
  got = quantize.dequantize_params(converted)['params']['layer']
  want = quantize.fake_quant_params(variables['params'], rules)['layer']
  np.testing.assert_allclose(got['kernel'], want['kernel'], rtol=1e-6)
  np.testing.assert_allclose(got['bias'], want['bias'], atol=3e-3)


@pytest.mark.parametrize('factor', [0.0, 1e-12, 1e-30])
def test_the_bias_of_a_channel_without_weight_survives(factor):
  """Pruned away, or made tiny by a folded norm: its bias is its output."""
  kernel = jnp.asarray(_rng().normal(size=(6, 3)), jnp.float32)
  kernel = kernel.at[:, 1].multiply(factor)
  bias = jnp.array([0.1, 0.0123, -0.2])
  variables = _dense_variables(kernel, bias)
  integers = quantize.convert(variables, WEIGHTS, INPUTS)
  x = _rng().uniform(-1, 3, size=(5, 6)).astype('f')
  got = _execute(nn.Dense(3), integers, x)
  np.testing.assert_allclose(got[:, 1], bias[1], rtol=1e-4)
  exact = x @ kernel + bias[None]
  np.testing.assert_allclose(got, exact, atol=0.1)


def test_a_layer_whose_weights_are_not_quantized_stays_float():
  kernel = jnp.asarray(_rng().normal(size=(6, 3)), jnp.float32)
  variables = _dense_variables(kernel, jnp.zeros(3))
  integers = quantize.convert(variables, [('.*/kernel', None)], INPUTS)
  assert set(integers['int8']['layer']) == {'input0'}
  x = _rng().uniform(-1, 3, size=(5, 6)).astype('f')
  grid = integers['int8']['layer']['input0']
  rounded = quantize.fake_quant(
    jnp.asarray(x), grid['scale'], grid['zero_point'].astype('f'), -128, 127
  )
  np.testing.assert_allclose(
    _execute(nn.Dense(3), integers, x), rounded @ kernel, rtol=1e-5, atol=1e-5
  )


# --- groups, attention, dynamic ranges, weights alone


GROUPED = {
  'dense': (nn.Dense(5), (3, 12), 4),
  'groups of one': (nn.Dense(5), (3, 6), 1),
  'from heads': (nn.DenseGeneral(5, axis=(-2, -1)), (3, 2, 2, 6), 3),
  'convolution': (nn.Conv(6, (3, 2)), (2, 5, 5, 8), 2),
  'grouped convolution': (
    nn.Conv(6, (3, 3), strides=2, feature_group_count=2),
    (2, 6, 5, 8),
    2,
  ),
}


@pytest.mark.parametrize('name', GROUPED)
def test_groups_are_summed_exactly(name):
  layer, shape, size = GROUPED[name]
  bits = 8 if size == 2 else 4
  model = _One(layer)
  x = (_rng().normal(size=shape) - 1).astype('f')
  weights = [('.*/kernel', QuantSpec(bits=bits, axis=-1, group_size=size))]
  variables = _filled(model, x)
  converted, fake = _calibrated(model, variables, x, weights, INPUTS)
  ways = [{'convolution': way} for way in WAYS] + [{'simulate': True}]
  for got in _run(model, converted, x, *ways):
    _assert_equal(got, fake)
  # Each group's sum is one of integers.
  forward = _forward(model, quantize.execute_integers())
  (product,) = _products(lambda x: forward(converted, {'image': x}).output, x)
  assert product.outvars[0].aval.dtype == jnp.int32


class _Attention(nn.Module):
  @nn.compact
  def __call__(self, x):
    heads = [
      nn.DenseGeneral((2, 4), name=n)(x) + i for i, n in enumerate('qkv')
    ]
    scores = Scores(name='scores')(heads[0], keys=heads[1])
    p = nn.softmax(scores)
    return Context(name='context')(values=heads[2], probabilities=p)


class _LinenAttention(nn.Module):
  @nn.compact
  def __call__(self, x):
    attention = nn.MultiHeadDotProductAttention(2, qkv_features=8)
    return attention(x + 1, mask=nn.make_causal_mask(x[..., 0]))


@pytest.mark.parametrize(
  'model, count', [(_Attention(), 5), (_LinenAttention(), 6)]
)
@pytest.mark.parametrize('rules', ['static', 'dynamic', 'dynamic per head'])
def test_both_zero_points_of_attention_are_corrected(rules, model, count):
  x = _rng().normal(size=(2, 5, 6)).astype('f')
  inputs = {
    'static': INPUTS,
    'dynamic': [('.*', DYNAMIC)],
    # Heads are axis 2 of queries and keys; the scores vary along them.
    'dynamic per head': [
      ('(.*/)?scores', dataclasses.replace(DYNAMIC, axis=(0, 2))),
      ('.*', DYNAMIC),
    ],
  }[rules]
  variables = _filled(model, x)
  converted, fake = _calibrated(model, variables, x, WEIGHTS, inputs)
  options = [{'dynamic': inputs}, {'dynamic': inputs, 'simulate': True}]
  for got in _run(model, converted, x, *options):
    # A softmax lies between: a code on the edge may flip.
    error = np.abs(np.asarray(got - fake)) / np.ptp(fake)
    assert np.median(error) < 1e-5 and error.max() < 0.01
  forward = _forward(model, quantize.execute_integers(dynamic=inputs))
  found = _products(lambda x: forward(converted, {'image': x}).output, x)
  assert len(found) == count
  for product in found:
    assert {v.aval.dtype for v in product.invars} == {jnp.dtype('int8')}
    assert product.outvars[0].aval.dtype == jnp.int32


@pytest.mark.parametrize(
  'spec',
  [
    DYNAMIC,
    QuantSpec(dynamic=True),
    dataclasses.replace(DYNAMIC, axis=0),
    QuantSpec(dynamic=True, axis=0),
  ],
)
@pytest.mark.parametrize(
  'layer, shape',
  [
    (nn.DenseGeneral((2, 2)), (3, 5, 6)),
    (nn.Conv(4, (2, 2), padding=2, feature_group_count=2), (3, 5, 5, 2)),
  ],
)
def test_dynamic_ranges_are_those_of_the_batch_at_hand(spec, layer, shape):
  model, inputs = _One(layer), [('.*', spec)]
  x = (_rng().normal(size=shape) + 1).astype('f')
  # Each example has a range of its own; one has none.
  x *= np.arange(len(x)).reshape(-1, *(1,) * (x.ndim - 1))
  variables = _filled(model, x)
  converted, fake = _calibrated(model, variables, x, WEIGHTS, inputs)
  assert set(converted['int8']['layer']) == {'kernel', 'kernel_scale'}
  options = [{'dynamic': inputs, 'convolution': way} for way in WAYS]
  options += [{'dynamic': inputs, 'simulate': True}]
  for got in _run(model, converted, x, *options):
    _assert_equal(got, fake)
  if spec.axis is None:
    return
  # With a range for each example, a batch of one computes the same.
  (alone,) = _run(model, converted, x[2:3], options[0])
  _assert_equal(alone, fake[2:3])


@pytest.mark.parametrize('layer', [nn.Dense(6), nn.Conv(6, (3,))])
def test_a_dynamic_range_along_what_is_summed_is_an_error(layer):
  model, spec = _One(layer), dataclasses.replace(DYNAMIC, axis=-1)
  x = _rng().normal(size=(4, 5, 6)).astype('f')
  converted = quantize.convert(_filled(model, x), WEIGHTS, [])
  with pytest.raises(ValueError, match='layer: a scale of shape.* summed'):
    _run(model, converted, x, {'dynamic': [('.*', spec)]})


def test_channels_that_are_not_summed_may_have_dynamic_ranges():
  model = _One(nn.Conv(6, (3,), feature_group_count=6))
  x = _rng().normal(size=(4, 5, 6)).astype('f')
  x *= np.arange(1, 7, dtype='f')
  converted = quantize.convert(_filled(model, x), WEIGHTS, [])
  options = {'dynamic': [('.*', dataclasses.replace(DYNAMIC, axis=-1))]}
  got, want = _run(model, converted, x, options, {**options, 'simulate': True})
  _assert_equal(got, want)


def test_an_input_that_a_rule_leaves_alone_stays_float():
  model, x = (
    nn.Sequential([nn.Dense(5), nn.Dense(4)]),
    _rng().normal(size=(3, 6)),
  )
  x = x.astype('f')
  converted = quantize.convert(_filled(model, x), WEIGHTS, [])
  coarse = dataclasses.replace(DYNAMIC, bits=4)
  rules = [('layers_1', None), ('.*', coarse)]
  got = _run(model, converted, x, {'dynamic': rules})[0]
  want = _run(model, converted, x, {'dynamic': [('layers_0', coarse)]})[0]
  np.testing.assert_array_equal(got, want)


def test_a_bias_keeps_the_rounding_of_its_own_rule():
  model, x = _One(nn.Dense(2)), _rng().normal(size=(3, 6)).astype('f')
  variables = _filled(model, x)
  variables['params']['layer']['bias'] = jnp.array([1.0, 0.3])
  rules = [('.*', QuantSpec(bits=4))]
  observing = _forward(model, quantize.quantize_activations(INPUTS))
  batch = {'image': x}
  stats = quantize.init_quant_stats(observing, variables, batch, INPUTS)
  stats = observing(
    {**variables, 'quant_stats': stats}, batch, train=True
  ).model_state
  variables = {**variables, **stats}
  converted = quantize.convert(variables, rules, INPUTS)
  params = quantize.fake_quant_params(variables['params'], rules)
  want = observing({**variables, 'params': params}, batch).output
  np.testing.assert_allclose(
    _run(model, converted, x), want, rtol=0.01, atol=0.005
  )


class _Transposed(nn.Module):
  """A layer whose kernel has no integer product here."""

  @nn.compact
  def __call__(self, x):
    return nn.ConvTranspose(3, (2, 2), strides=(2, 2), name='layer')(x)


WEIGHT_ONLY = {
  'dense': (_One(nn.Dense(4)), (3, 6)),
  'heads': (_One(nn.DenseGeneral((2, 2))), (3, 6)),
  'einsum': (_One(nn.Einsum((6, 4), '...i,io->...o')), (2, 3, 6)),
  'convolution': (_One(nn.Conv(4, (3, 3), padding='CIRCULAR')), (2, 5, 5, 3)),
  'depthwise': (_One(nn.Conv(3, (3, 3), feature_group_count=3)), (2, 5, 5, 3)),
  'transposed': (_Transposed(), (2, 3, 3, 2)),
  'bfloat16': (_One(nn.Dense(4, dtype='bfloat16')), (3, 6)),
  'odd': (_One(nn.Dense(5)), (3, 6)),
}


@pytest.mark.parametrize('name', WEIGHT_ONLY)
def test_weights_alone_are_dequantized_in_the_product(name):
  model, shape = WEIGHT_ONLY[name]
  spec = quantize.INT8_WEIGHTS if name in ('dense', 'heads') else INT4
  x, rules = _rng().normal(size=shape).astype('f'), [('.*/kernel', spec)]
  variables = _filled(model, x)
  converted = quantize.convert(variables, rules, [])
  params = quantize.fake_quant_params(variables['params'], rules)
  kernel = converted['int8']['layer']['kernel']
  bits = 8 * kernel.nbytes / params['layer']['kernel'].size
  assert spec.bits <= bits <= spec.bits * 1.5
  want = model.apply({'params': params}, x)
  for got in _run(model, converted, x, {}, {'simulate': True}):
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  plain = model.apply(quantize.dequantize_params(converted), x)
  np.testing.assert_allclose(plain, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('inputs', [[], INPUTS])
@pytest.mark.parametrize('group_size', [None, 2])
def test_learned_steps_and_chosen_ranges_are_the_scales(inputs, group_size):
  """What training rounded to is what is stored, not the extremes' grid."""
  model, x = _One(nn.Dense(5)), _rng().normal(size=(4, 6)).astype('f')
  spec = QuantSpec(bits=4, axis=-1, group_size=group_size)
  rules = [('.*/kernel', spec)]
  variables = _filled(model, x)
  if inputs:
    forward = _forward(model, quantize.quantize_activations(inputs))
    variables |= forward(variables, {'image': x}, train=True).model_state
  params = quantize.init_lsq_params(variables['params'], rules)
  params['quant_steps'] = jax.tree.map(lambda s: 0.7 * s, params['quant_steps'])
  learned = quantize.convert({**variables, 'params': params}, rules, inputs)
  observer = quantize.mse()
  chosen = quantize.convert(variables, rules, inputs, weight_observer=observer)
  wanted = (
    quantize.lsq_params(params, rules),
    quantize.fake_quant_params(variables['params'], rules, observer=observer),
  )
  for converted, want in zip((learned, chosen), wanted, strict=True):
    got = quantize.dequantize_params(converted)['params']
    assert jax.tree.structure(got) == jax.tree.structure(variables['params'])
    np.testing.assert_allclose(
      got['layer']['kernel'], want['layer']['kernel'], rtol=1e-6
    )
    extremes = quantize.fake_quant_params(variables['params'], rules)
    difference = got['layer']['kernel'] - extremes['layer']['kernel']
    assert np.abs(difference).max() > 0.01


@pytest.mark.parametrize(
  'spec',
  [
    QuantSpec(axis=0),
    QuantSpec(bits=4, axis=0),
    QuantSpec(bits=4, axis=-1),
    QuantSpec(bits=4),
  ],
)
@pytest.mark.parametrize('width', [6, 5])
def test_embeddings_are_looked_up_as_codes(spec, width):
  class Tied(nn.Module):
    @nn.compact
    def __call__(self, x):
      embed = nn.Embed(7, width, name='embed')
      return embed.attend(embed(inputs=x))

  ids = jnp.array([[0, 6, 2], [3, 3, 1]])
  variables = _filled(Tied(), ids)
  rules = [('embed/embedding', spec)]
  converted = quantize.convert(variables, rules, [])
  params = quantize.fake_quant_params(variables['params'], rules)
  want = Tied().apply({'params': params}, ids)
  for got in _run(Tied(), converted, ids, {}, {'simulate': True}):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  plain = Tied().apply(quantize.dequantize_params(converted), ids)
  np.testing.assert_allclose(plain, want, rtol=1e-5, atol=1e-5)


# --- how layers are called, and where


class _Twice(nn.Module):
  """Keyword inputs, and a layer that is called twice."""

  @nn.compact
  def __call__(self, x):
    dense = nn.Dense(6, name='layer')
    y = dense(inputs=nn.relu(dense(inputs=x)))
    y = layers.Add(name='add')(y=x, x=y)
    return layers.Concatenate(name='concatenate')(y, y=x)


@pytest.mark.parametrize('inputs', [INPUTS, [('.*', DYNAMIC)]])
def test_keyword_inputs_and_a_layer_called_twice(inputs):
  model, x = _Twice(), _rng().normal(size=(4, 6)).astype('f')
  variables = _filled(model, x)
  converted, fake = _calibrated(model, variables, x, WEIGHTS, inputs)
  if inputs == INPUTS:
    assert set(converted['int8']) == {'layer', 'add', 'concatenate'}
    assert {'input0', 'input1'} == set(converted['int8']['concatenate'])
  options = [{'dynamic': inputs}, {'dynamic': inputs, 'simulate': True}]
  for got in _run(model, converted, x, *options):
    error = np.abs(np.asarray(got - fake)) / np.ptp(fake)
    assert np.median(error) < 1e-5 and error.max() < 0.02
    # Its outputs are rounded: both halves lie on a grid of 256 values.
    if inputs == INPUTS:
      for half, name in zip(
        np.split(got, 2, -1), ('input0', 'input1'), strict=True
      ):
        grid = converted['int8']['concatenate'][name]
        codes = half / grid['scale']
        np.testing.assert_allclose(codes, np.round(codes), atol=1e-3)


class _Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    y = nn.Conv(4, (3, 3), name='conv')(nn.relu(x))
    y = nn.Dense(4, use_bias=False, name='dense')(nn.relu(y))
    return layers.Add(name='add')(x, y), None


class _Scanned(nn.Module):
  remat: bool = False

  @nn.compact
  def __call__(self, x):
    block = nn.remat(_Block) if self.remat else _Block
    stack = nn.scan(
      block,
      variable_axes={
        'params': 0,
        'quant_stats': 0,
        'int8': 0,
        'intermediates': 0,
      },
      split_rngs={'params': True},
      length=3,
    )
    x, _ = stack(name='stack')(x, None)
    return x.mean((1, 2))


@pytest.mark.parametrize(
  'inputs, bits, remat',
  [
    ('static', 8, True),
    ('static', 4, False),
    ('dynamic', 4, True),
    ('weights', 4, False),
  ],
)
def test_scanned_stacks(inputs, bits, remat):
  model, x = _Scanned(remat), _rng().normal(size=(2, 5, 5, 4)).astype('f')
  rules = {'static': INPUTS, 'dynamic': [('.*', DYNAMIC)], 'weights': []}
  rules = rules[inputs]
  weights = [('.*/kernel', QuantSpec(bits=bits, axis=(0, -1)))]
  variables = _filled(model, x)
  converted, fake = _calibrated(model, variables, x, weights, rules)
  conv = converted['int8']['stack']['conv']
  assert conv['kernel'].shape == (3, 3, 3, 4, 4 if bits == 8 else 2)
  if inputs == 'static':
    assert conv['input0']['scale'].shape == (3,)
    assert conv['bias'].shape == (3, 4)
  options = [{'dynamic': rules}, {'dynamic': rules, 'simulate': True}]
  for got in _run(model, converted, x, *options):
    error = np.abs(np.asarray(got - fake)) / np.ptp(fake)
    assert np.median(error) < 1e-4 and error.max() < 0.02


def test_zeros_and_bfloat16_leaves():
  model = _One(nn.Conv(4, (3, 3)))
  x = _rng().normal(size=(2, 5, 5, 3)).astype('f')
  variables = _filled(model, x)
  variables = jax.tree.map(lambda v: v.astype(jnp.bfloat16), variables)
  empty = variables['params']['layer']['kernel'].at[..., 1].set(0)
  variables['params']['layer']['kernel'] = empty
  converted, fake = _calibrated(model, variables, x, WEIGHTS, INPUTS)
  assert converted['int8']['layer']['kernel_scale'].dtype == jnp.float32
  # Codes are exact; bfloat16 holds their values to one part in 256.
  np.testing.assert_allclose(_run(model, converted, x), fake, atol=0.3)
  zeros = jax.tree.map(jnp.zeros_like, variables)
  converted, _ = _calibrated(model, zeros, np.zeros_like(x), WEIGHTS, INPUTS)
  np.testing.assert_array_equal(_run(model, converted, np.zeros_like(x)), 0.0)


def test_a_model_that_is_one_layer():
  model, x = nn.Dense(3), _rng().normal(size=(4, 6)).astype('f')
  weights = [('kernel', quantize.INT8_WEIGHTS)]
  variables = _filled(model, x)
  converted, fake = _calibrated(model, variables, x, weights, INPUTS)
  assert set(converted['int8']) == {'kernel', 'kernel_scale', 'bias', 'input0'}
  np.testing.assert_allclose(_run(model, converted, x), fake, rtol=1e-4)


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_codes_keep_the_sharding_of_their_weights(kind):
  mesh = jax.make_mesh((8,), ('d',), axis_types=(kind,))
  model, x = _One(nn.Dense(32)), _rng().normal(size=(4, 6)).astype('f')
  variables = _filled(model, x)
  split = NamedSharding(mesh, PartitionSpec(None, 'd'))
  kernel = jax.device_put(variables['params']['layer']['kernel'], split)
  want = quantize.convert(variables, [('.*/kernel', INT4)], [])
  variables['params']['layer']['kernel'] = kernel
  got = quantize.convert(variables, [('.*/kernel', INT4)], [])
  stored = got['int8']['layer']['kernel']
  assert stored.sharding.is_equivalent_to(split, stored.ndim)
  np.testing.assert_array_equal(stored, want['int8']['layer']['kernel'])
  kernel = quantize.dequantize_params(got)['params']['layer']['kernel']
  assert kernel.sharding.is_equivalent_to(split, 2)
