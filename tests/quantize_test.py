"""Integer execution: what fake-quant computed, on int8."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from quantized_models import INPUTS, MODELS, WEIGHTS, fold, trained

from kd_jax import adapters, quantize
from kd_jax.quantize import QuantSpec


def _rng():
  return np.random.default_rng(0)


@functools.cache
def _calibrated(name):
  """A folded model, its converted variables, and both forwards' inputs."""
  model, variables, batch = trained(name)
  variables, _ = fold(model, variables, batch)
  skip = quantize.skip_folded_batch_norms
  watching = adapters.from_linen(
    model, interceptors=[skip, quantize.quantize_activations(INPUTS)]
  )
  state = jax.jit(lambda v, b: watching(v, b, train=True).model_state)
  variables = {**variables, **state(variables, batch)}
  integers = quantize.convert(variables, WEIGHTS, INPUTS)
  rounded = jax.jit(lambda p: quantize.fake_quant_params(p, WEIGHTS))(
    variables['params']
  )
  rounded = _round_biases(*jax.device_get((rounded, integers['int8'])))
  return model, watching, {**variables, 'params': rounded}, integers, batch


def _round_biases(params, int8):
  """Biases on their int32 grid: the one rounding that training has not."""

  def walk(params, int8):
    out = {}
    for key, value in params.items():
      grid = int8.get(key, {})
      if isinstance(value, dict):
        value = walk(value, grid)
        if 'bias' in grid:
          scale = grid['input0']['scale'] * grid['kernel_scale']
          assert 'bias' in value or not grid['bias'].any()
          if 'bias' in value:
            np.testing.assert_allclose(
              grid['bias'] * scale, value['bias'], atol=scale.max() / 2
            )
            value['bias'] = grid['bias'] * scale
      out[key] = value
    return out

  return walk(params, int8)


@pytest.mark.parametrize('name', MODELS)
def test_integers_compute_what_fake_quant_computed(name):
  """In eight images a code on the edge may flip: then by one step of it."""
  model, watching, rounded, integers, batch = _calibrated(name)

  def executing(simulate):
    return adapters.from_linen(
      model,
      interceptors=[
        quantize.skip_folded_batch_norms,
        quantize.execute_integers(simulate=simulate),
      ],
    )

  want, got, simulated = jax.jit(
    lambda r, i, b: (
      watching(r, b).output,
      executing(False)(i, b).output,
      executing(True)(i, b).output,
    )
  )(rounded, integers, batch)
  spread = np.ptp(want)
  for other in (got, simulated):
    error = np.abs(np.asarray(other - want)) / spread
    assert np.median(error) < 1e-5
    assert error.max() < 0.02


@pytest.mark.parametrize('name', ['cnn', 'mlp'])
def test_every_product_is_int8_by_int8_into_int32(name):
  model, _, _, integers, batch = _calibrated(name)
  forward = adapters.from_linen(
    model,
    interceptors=[
      quantize.skip_folded_batch_norms,
      quantize.execute_integers(),
    ],
  )
  text = str(jax.make_jaxpr(lambda v, b: forward(v, b).output)(integers, batch))
  products = [
    line
    for line in re.split(r'\n\s+(?=[a-z]+:)', text)
    if re.search(r'= (dot_general|conv_general_dilated)\[', line)
  ]
  kernels = [k for k in _leaves(integers['int8'], 'kernel')]
  assert len(products) == len(kernels) > 0
  for product in products:
    assert re.match(r'\s*[a-z]+:i32\[', product), product
    assert 'preferred_element_type=int32' in product
  assert {k.dtype for k in kernels} == {jnp.dtype('int8')}
  # No float kernel is left beside them.
  assert not list(_leaves(integers['params'], 'kernel'))
  assert 'quant_stats' not in integers


def _leaves(tree, name):
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if path[-1].key == name:
      yield leaf


CONVOLUTIONS = {
  'same': {'padding': 'SAME'},
  'same_lower_strided': {'padding': 'SAME_LOWER', 'strides': 2},
  'same_strided': {'padding': 'SAME', 'strides': (2, 3)},
  'valid': {'padding': 'VALID'},
  'one_number': {'padding': 2},
  'one_a_side': {'padding': (1, 2)},
  'explicit': {'padding': ((0, 2), (3, 1)), 'strides': 2},
  'dilated': {'kernel_dilation': 2, 'padding': 'SAME'},
  'dilated_strided': {'kernel_dilation': (2, 1), 'padding': 1, 'strides': 2},
  'grouped': {'feature_group_count': 2},
  'depthwise': {'feature_group_count': 4, 'padding': 'SAME', 'strides': 2},
  'even_kernel': {'kernel_size': (2, 4), 'padding': 'SAME'},
  'one_dimension': {'kernel_size': (3,), 'strides': (2,)},
}


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


class _One(nn.Module):
  """One layer with a path."""

  layer: nn.Module

  def __call__(self, x):
    return self.layer(x)


def _execute(layer, variables, x, **options):
  forward = adapters.from_linen(
    _One(layer),
    interceptors=[quantize.execute_integers(**options)],
    train_argument=None,
  )
  return forward(variables, {'image': x}).output


@pytest.mark.parametrize('zero_point', [0, -37])
@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_integer_convolution_is_exactly_linens_on_the_quantized_values(
  name, zero_point
):
  """Scales are powers of two: float arithmetic is exact, equality too."""
  options = {'kernel_size': (3, 3)} | CONVOLUTIONS[name]
  rank = len(options['kernel_size'])
  layer = nn.Conv(8, **options)
  groups = options.get('feature_group_count', 1)
  rng = np.random.default_rng(0)
  shape = (2, 7, 6, 4) if rank == 2 else (2, 9, 4)
  x = rng.integers(-128, 128, shape)
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
  np.testing.assert_array_equal(_execute(layer, variables, real), want)
  np.testing.assert_array_equal(
    _execute(layer, variables, real, simulate=True), want
  )


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


@pytest.mark.parametrize(
  'layer, message',
  [
    (nn.Conv(2, (3, 3), padding='CIRCULAR'), "'CIRCULAR' has no integer"),
    (nn.Conv(2, (3, 3), input_dilation=2), 'transposed'),
    (nn.Conv(2, (3, 3), mask=jnp.ones((3, 3, 4, 2))), 'kernel mask'),
  ],
)
def test_unsupported_convolutions_are_named(layer, message):
  kernel = np.ones((3, 3, 4, 2))
  variables = _layer(kernel, np.zeros(2), 1.0, 0, np.ones(2))
  with pytest.raises(ValueError, match=f'layer: .*{message}|{message}'):
    _execute(layer, variables, np.ones((1, 5, 5, 4), 'f'))


def test_unusual_batch_axes_are_named():
  variables = _layer(np.ones((3, 3, 4, 2)), np.zeros(2), 1.0, 0, np.ones(2))
  with pytest.raises(ValueError, match=r'one batch axis.*\(5, 5, 4\)'):
    _execute(nn.Conv(2, (3, 3)), variables, np.ones((5, 5, 4), 'f'))


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


@pytest.mark.parametrize(
  'spec', [quantize.INT8_WEIGHTS, QuantSpec(), QuantSpec(bits=4, axis=-1)]
)
def test_conversion_is_of_the_rounded_weights(spec):
  kernel = jnp.asarray(_rng().normal(size=(6, 3)), jnp.float32)
  variables = _dense_variables(kernel, jnp.zeros(3))
  rules = [('.*/kernel', spec)]
  layer = quantize.convert(variables, rules, INPUTS)['int8']['layer']
  want = quantize.fake_quant_params(variables['params'], rules)
  np.testing.assert_allclose(
    layer['kernel'] * layer['kernel_scale'][None],
    want['layer']['kernel'],
    rtol=1e-6,
    atol=1e-7,
  )
  assert layer['kernel_scale'].shape == (3,)


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
