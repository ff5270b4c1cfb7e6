"""The quantizer of one tensor, its gradients, and weights by rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import quantize
from kd_jax.quantize import QuantSpec


def _rng():
  return np.random.default_rng(0)


@pytest.mark.parametrize('bits', [4, 8])
@pytest.mark.parametrize('narrow', [True, False])
def test_codes_span_the_bits(bits, narrow):
  spec = QuantSpec(bits=bits, narrow=narrow)
  assert spec.qmax == 2 ** (bits - 1) - 1
  assert spec.qmin == -spec.qmax - (not narrow)
  with pytest.raises(ValueError, match='bits=3'):
    QuantSpec(bits=3)


def test_rounding_is_half_to_even():
  x = jnp.array([-1.5, -0.5, 0.5, 1.5, 2.5])
  got = quantize.fake_quant(x, jnp.float32(1), jnp.float32(0), -128, 127)
  np.testing.assert_array_equal(got, [-2, 0, 0, 2, 2])


def test_gradient_is_one_inside_the_rounded_range_and_zero_outside():
  """Both ends are inside, as the mask is on the rounded code."""
  x = jnp.array([-129, -128.51, -128.49, -128, 0.3, 127, 127.49, 127.51, 300.0])

  def total(x, scale, zero_point):
    return quantize.fake_quant(x, scale, zero_point, -128, 127).sum()

  one, zero = jnp.float32(1), jnp.float32(0)
  gradients = jax.grad(total, argnums=(0, 1, 2))(x, one, zero)
  np.testing.assert_array_equal(gradients[0], [0, 0, 1, 1, 1, 1, 1, 0, 0])
  # Nothing leaks into scale and zero point.
  assert gradients[1] == 0 and gradients[2] == 0


def test_the_element_that_sets_the_scale_gets_its_whole_gradient():
  w = jnp.array([[1.0, -2.0], [-0.5, 0.1]])
  rules = [('w', quantize.INT8_WEIGHTS)]
  gradient = jax.grad(
    lambda w: quantize.fake_quant_params({'w': w}, rules)['w'].sum()
  )(w)
  np.testing.assert_array_equal(gradient, 1.0)


def test_fake_quant_keeps_dtype_and_computes_in_float32():
  x = jnp.asarray(_rng().normal(size=100), jnp.bfloat16)
  scale = jnp.float32(0.013)
  args = (scale, jnp.float32(0), -127, 127)
  got = quantize.fake_quant(x, *args)
  assert got.dtype == jnp.bfloat16
  want = quantize.fake_quant(x.astype(jnp.float32), *args)
  np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))
  gradient = jax.grad(lambda x: quantize.fake_quant(x, *args).sum())(x)
  assert gradient.dtype == jnp.bfloat16


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize(
  'low, high', [(-1.0, 2.0), (0.5, 2.0), (-3.0, -0.5), (-5.0, 5.0)]
)
def test_ranges_contain_zero_exactly_and_both_ends(low, high, symmetric):
  spec = QuantSpec(symmetric=symmetric, narrow=symmetric)
  scale, zero_point = quantize.scale_and_zero_point(low, high, spec)
  ends = jnp.array([min(low, 0), 0.0, max(high, 0)])
  got = quantize.fake_quant(ends, scale, zero_point, spec.qmin, spec.qmax)
  assert got[1] == 0
  np.testing.assert_allclose(got, ends, atol=float(scale) * 0.501)
  assert int(zero_point) == float(zero_point)
  if symmetric:
    assert zero_point == 0


@pytest.mark.parametrize(
  'spec', [quantize.INT8_WEIGHTS, quantize.INT8_ACTIVATIONS]
)
def test_an_empty_range_has_scale_one(spec):
  scale, zero_point = quantize.scale_and_zero_point(0.0, 0.0, spec)
  assert scale == 1
  got = quantize.fake_quant(
    jnp.zeros(3), scale, zero_point, spec.qmin, spec.qmax
  )
  np.testing.assert_array_equal(got, 0.0)


@pytest.mark.parametrize('value', [3.7, -3.7, 1e-30, 1e30])
@pytest.mark.parametrize('symmetric', [True, False])
def test_a_single_value_is_kept(value, symmetric):
  spec = QuantSpec(symmetric=symmetric, narrow=symmetric)
  x = jnp.full(3, value, jnp.float32)
  scale, zero_point = quantize.scale_and_zero_point(value, value, spec)
  got = quantize.fake_quant(x, scale, zero_point, spec.qmin, spec.qmax)
  np.testing.assert_allclose(got, x, rtol=1e-6)


def test_nan_stays_visible_and_reaches_no_other_channel():
  w = jnp.array([[jnp.nan, 1.0], [0.5, -0.25]])
  got = quantize.fake_quant_params({'w': w}, [('w', quantize.INT8_WEIGHTS)])
  assert jnp.isnan(got['w'][0, 0])
  clean = quantize.fake_quant_params(
    {'w': w.at[0, 0].set(0)}, [('w', quantize.INT8_WEIGHTS)]
  )
  np.testing.assert_array_equal(got['w'][:, 1], clean['w'][:, 1])


def test_pruned_weights_stay_zero_and_a_dead_channel_too():
  w = jnp.asarray(_rng().normal(size=(3, 3, 4, 5)), jnp.float32)
  w = w.at[..., 2].set(0).at[0].set(0)
  got = quantize.fake_quant_params({'w': w}, [('w', quantize.INT8_WEIGHTS)])
  np.testing.assert_array_equal(np.asarray(got['w'])[np.asarray(w) == 0], 0.0)


def test_fake_quant_is_idempotent():
  w = jnp.asarray(_rng().normal(size=(8, 5)), jnp.float32)
  once = quantize.fake_quant_params({'w': w}, [('w', quantize.INT8_WEIGHTS)])
  twice = quantize.fake_quant_params(once, [('w', quantize.INT8_WEIGHTS)])
  np.testing.assert_allclose(twice['w'], once['w'], rtol=1e-6)


def test_codes_dequantize_to_what_fake_quant_gives():
  x = jnp.asarray(_rng().normal(size=200), jnp.float32)
  spec = quantize.INT8_ACTIVATIONS
  scale, zero_point = quantize.scale_and_zero_point(-1.0, 1.5, spec)
  codes = quantize.quantize(x, scale, zero_point, spec)
  assert codes.dtype == jnp.int8
  assert codes.min() == -128 and codes.max() == 127
  np.testing.assert_array_equal(
    quantize.dequantize(codes, scale, zero_point),
    quantize.fake_quant(x, scale, zero_point, spec.qmin, spec.qmax),
  )


def test_rules_choose_parameters_and_name_mistakes():
  params = {'a': {'kernel': jnp.array([[0.3, 1.0]])}, 'b': jnp.array([0.3])}
  rules = [('a/kernel', QuantSpec(bits=4)), ('b', None)]
  got = quantize.fake_quant_params(params, rules)
  np.testing.assert_allclose(got['a']['kernel'], [[2 / 7, 1.0]], rtol=1e-6)
  assert got['b'] is params['b']
  with pytest.raises(ValueError, match="weight rule 'a/kernl'.*mean a/kernel"):
    quantize.fake_quant_params(params, [('a/kernl', QuantSpec())])


# --- which values share a scale


def _numpy_fake_quant(w, spec, blocks):
  """By the formula in float32, block by block; `blocks` yields index tuples."""
  out = np.empty_like(w)
  for index in blocks:
    block = w[index]
    low, high = min(block.min(), 0), max(block.max(), 0)
    if spec.symmetric:
      scale, zero = np.float32(max(-low, high)) / np.float32(spec.qmax), 0
    else:
      scale = np.float32(high - low) / np.float32(spec.qmax - spec.qmin)
      scale = scale if scale > 0 else np.float32(1)
      zero = np.clip(np.rint(spec.qmin - low / scale), spec.qmin, spec.qmax)
    scale = scale if scale > 0 else np.float32(1)
    code = np.clip(np.rint(block / scale) + zero, spec.qmin, spec.qmax)
    out[index] = (code - zero) * scale
  return out


ALL = slice(None)
SHARED = {
  'tensor': ((4, 6), {}, lambda: [(ALL, ALL)]),
  'channel': (
    (3, 3, 2, 4),
    {'axis': -1},
    lambda: [(..., i) for i in range(4)],
  ),
  'scanned': (
    (3, 5, 4),
    {'axis': (0, -1)},
    lambda: [(i, ALL, j) for i in range(3) for j in range(4)],
  ),
  'heads': (
    (5, 3, 4),
    {'axis': (-2, -1)},
    lambda: [(ALL, i, j) for i in range(3) for j in range(4)],
  ),
  'groups': (
    (6, 3),
    {'axis': -1, 'group_size': 2},
    lambda: [(slice(i, i + 2), j) for i in (0, 2, 4) for j in range(3)],
  ),
  'groups_only': (
    (6, 3),
    {'group_size': 3},
    lambda: [(slice(i, i + 3), ALL) for i in (0, 3)],
  ),
  'scanned_groups': (
    (2, 4, 3),
    {'axis': (0, -1), 'group_size': 2},
    lambda: [
      (i, slice(g, g + 2), j)
      for i in range(2)
      for g in (0, 2)
      for j in range(3)
    ],
  ),
  'conv_groups': (
    (2, 2, 4, 3),
    {'axis': -1, 'group_size': 2},
    lambda: [(ALL, ALL, slice(g, g + 2), j) for g in (0, 2) for j in range(3)],
  ),
}


@pytest.mark.parametrize('bits, symmetric', [(4, True), (8, False)])
@pytest.mark.parametrize('name', SHARED)
def test_values_share_the_scales_that_the_spec_says(name, bits, symmetric):
  shape, options, blocks = SHARED[name]
  spec = QuantSpec(bits=bits, symmetric=symmetric, narrow=symmetric, **options)
  w = _rng().normal(size=shape).astype('f') + 0.2
  # Blocks that differ in size, one of which was pruned away.
  for i, index in enumerate(blocks()):
    w[index] *= i % 4
  got = quantize.fake_quant_params({'w': w}, [('w', spec)])['w']
  want = _numpy_fake_quant(w, spec, blocks())
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  scale, zero_point = quantize.weight_scale(jnp.asarray(w), spec)
  assert scale.size == len(blocks())
  codes = quantize.quantize(jnp.asarray(w), scale, zero_point, spec)
  assert codes.dtype == jnp.int8 and codes.shape == w.shape
  np.testing.assert_array_equal(
    quantize.dequantize(codes, scale, zero_point), got
  )


@pytest.mark.parametrize('name', ['scanned', 'groups', 'conv_groups'])
def test_the_gradient_passes_straight_through_whatever_shares_a_scale(name):
  shape, options, _ = SHARED[name]
  w = jnp.asarray(_rng().normal(size=shape), jnp.float32)
  rules = [('w', QuantSpec(bits=4, **options))]
  gradient = jax.grad(
    lambda w: quantize.fake_quant_params({'w': w}, rules)['w'].sum()
  )(w)
  np.testing.assert_array_equal(gradient, 1.0)


@pytest.mark.parametrize('name', ['channel', 'scanned', 'groups'])
def test_scales_of_bfloat16_weights_are_those_of_their_float32_values(name):
  shape, options, _ = SHARED[name]
  w = jnp.asarray(_rng().normal(size=shape), jnp.bfloat16)
  spec = QuantSpec(**options)
  scale, _ = quantize.weight_scale(w, spec)
  assert scale.dtype == jnp.float32
  want, zero = quantize.weight_scale(w.astype(jnp.float32), spec)
  np.testing.assert_array_equal(scale, want)
  np.testing.assert_array_equal(
    quantize.quantize(w, scale, zero, spec),
    quantize.quantize(w.astype(jnp.float32), want, zero, spec),
  )
  got = quantize.fake_quant_params({'w': w}, [('w', spec)])['w']
  assert got.dtype == jnp.bfloat16


def test_trees_keep_none_leaves_and_what_no_rule_names():
  params = {
    'a': {'kernel': jnp.zeros((4, 2)), 'bias': None},
    'stack': {'kernel': jnp.ones((3, 4, 2))},
  }
  rules = [('stack/kernel', QuantSpec(axis=(0, -1))), ('a/.*', QuantSpec())]
  got = quantize.fake_quant_params(params, rules)
  assert jax.tree.structure(got) == jax.tree.structure(params)
  np.testing.assert_array_equal(got['a']['kernel'], 0.0)
  np.testing.assert_allclose(got['stack']['kernel'], 1.0, rtol=1e-6)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'group_size': 4}, r'deep/w: group_size=4 does not divide axis -2 of sha'),
    ({'axis': 2}, r'deep/w: axis=2 is not an axis of shape \(6, 3\)'),
    ({'axis': (-3, -1)}, r'deep/w: axis=-3 is not an axis'),
    ({'axis': (0, 1), 'group_size': 2}, r'deep/w: axis=\(0, 1\).*group_size=2'),
  ],
)
def test_a_spec_that_does_not_fit_names_the_parameter(options, message):
  params = {'deep': {'w': jnp.ones((6, 3))}}
  with pytest.raises(ValueError, match=message):
    quantize.fake_quant_params(params, [('.*', QuantSpec(**options))])


def test_groups_need_a_reduction_axis_and_a_size():
  with pytest.raises(ValueError, match=r'b: group_size=2 .* shape \(6,\)'):
    quantize.fake_quant_params(
      {'b': jnp.ones(6)}, [('b', QuantSpec(group_size=2))]
    )
  with pytest.raises(ValueError, match='group_size=0 is not a positive'):
    QuantSpec(group_size=0)


def test_a_tuple_of_one_axis_is_that_axis():
  assert QuantSpec(axis=(-1,)) == QuantSpec(axis=-1)
  assert QuantSpec(axis=()) == QuantSpec()
  # Specs are keys: a list is as good as a tuple.
  assert len({QuantSpec(axis=[0, -1]), QuantSpec(axis=(0, -1))}) == 1


@pytest.mark.parametrize('factor', [2.0**-60, 0.5, 2.0**60])
@pytest.mark.parametrize('name', ['tensor', 'groups'])
def test_codes_do_not_change_when_all_is_scaled(name, factor):
  shape, options, _ = SHARED[name]
  w = jnp.asarray(_rng().normal(size=shape), jnp.float32)
  spec = QuantSpec(bits=4, **options)
  codes = [
    quantize.quantize(v, *quantize.weight_scale(v, spec), spec)
    for v in (w, w * factor)
  ]
  np.testing.assert_array_equal(*codes)


def test_rounding_is_monotonic():
  x = jnp.sort(jnp.asarray(_rng().normal(size=300), jnp.float32))
  for spec in (QuantSpec(bits=4), quantize.INT8_ACTIVATIONS):
    scale, zero_point = quantize.scale_and_zero_point(-0.7, 1.1, spec)
    codes = quantize.quantize(x, scale, zero_point, spec).astype(int)
    assert (jnp.diff(codes) >= 0).all()


# --- ranges of weights that an observer chooses


def test_an_observer_chooses_the_range_of_every_block():
  rng = _rng()
  w = rng.normal(size=(1024, 3)).astype('f') * [1, 10, 0.1]
  w[rng.random(w.shape) < 0.8] = 0
  spec = QuantSpec(bits=4, axis=-1)
  observer = quantize.octav(ignore_zeros=True)

  def error(**options):
    rules = [('w', spec)]
    got = jax.jit(
      lambda w: quantize.fake_quant_params({'w': w}, rules, **options)['w']
    )(w)
    return np.square(got - w).sum(axis=0) / np.square(w).sum(axis=0)

  assert (error(observer=observer) < 0.8 * error()).all()
  scale = jax.jit(lambda w: quantize.weight_scale(w, spec, observer)[0])(w)
  for i in range(3):
    alone = np.abs(w[:, i][w[:, i] != 0])
    a = 0.0
    for _ in range(30):
      out = alone > a
      a = alone[out].sum() / (4.0**-4 / 3 * (~out).sum() + out.sum())
    np.testing.assert_allclose(scale[0, i], a / 7, rtol=2e-3)


def test_an_observer_sees_each_group():
  w = _rng().normal(size=(8, 4, 2)).astype('f')
  spec = QuantSpec(axis=(0, -1), group_size=2)
  scale, _ = quantize.weight_scale(jnp.asarray(w), spec, quantize.min_max())
  want, _ = quantize.weight_scale(jnp.asarray(w), spec)
  assert scale.shape == (8, 2, 2)
  np.testing.assert_array_equal(scale, want)


# --- sharded weights

PARTS = [('rows', 'columns'), (('rows', 'columns'), None)]


@pytest.mark.parametrize('kind', ['Auto', 'Explicit'])
@pytest.mark.parametrize(
  'options',
  [{'axis': -1}, {'axis': -1, 'group_size': 8}, {'group_size': 16}],
)
def test_sharded_weights_stay_where_they_are(options, kind):
  """Groups too that are larger than a device's part of the weight."""
  types = (getattr(jax.sharding.AxisType, kind),) * 2
  mesh = jax.make_mesh((4, 2), ('rows', 'columns'), axis_types=types)
  w = jnp.asarray(_rng().normal(size=(32, 6)), jnp.float32)
  rules = [('w', QuantSpec(bits=4, **options))]

  def loss(w):
    rounded = quantize.fake_quant_params({'w': w}, rules)['w']
    return jnp.sum(rounded**2), rounded

  wanted = jax.grad(loss, has_aux=True)(w)
  with jax.set_mesh(mesh):
    for part in PARTS:
      sharding = jax.NamedSharding(mesh, jax.P(*part))
      placed = jax.device_put(w, sharding)
      for got, want in zip(
        jax.jit(jax.grad(loss, has_aux=True))(placed), wanted, strict=True
      ):
        assert got.sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_allclose(jax.device_get(got), want, rtol=1e-6)
