"""Quantization: grids, gradients, observers, folding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from kd_jax import adapters, models, quantize
from kd_jax.quantize import QuantSpec

WEIGHTS = [('.*/kernel', quantize.INT8_WEIGHTS)]
INPUTS = [('.*', quantize.INT8_ACTIVATIONS)]


def _rng():
  return np.random.default_rng(0)


# --- the quantizer


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


# --- observers


def test_observer_takes_the_first_batch_then_averages():
  observer = quantize.ema_min_max(decay=0.9)
  rng = _rng()
  batches = [rng.normal(size=50).astype('f') * s for s in (1, 3, 2)]
  stats = observer.init()
  low, high = batches[0].min(), batches[0].max()
  for i, x in enumerate(batches):
    stats = observer.update(stats, jnp.asarray(x), None)
    if i:
      low, high = low + 0.1 * (x.min() - low), high + 0.1 * (x.max() - high)
    np.testing.assert_allclose(observer.range(stats), (low, high), rtol=1e-5)
  assert int(stats['count']) == 3
  with pytest.raises(ValueError, match=r'in \[0, 1\)'):
    quantize.ema_min_max(decay=1.0)


def test_observer_learns_no_gradient():
  observer = quantize.ema_min_max()

  def high(x):
    return observer.range(observer.update(observer.init(), x, None))[1]

  np.testing.assert_array_equal(jax.grad(high)(jnp.arange(3.0)), 0.0)


def _watching(model, rules=INPUTS, **options):
  return adapters.from_linen(
    model, interceptors=[quantize.quantize_activations(rules, **options)]
  )


def test_quant_stats_are_created_from_shapes_alone():
  model, variables, batch = _trained('cnn')
  forward = _watching(model)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (variables, batch)
  )
  stats = quantize.init_quant_stats(forward, *shapes, INPUTS)
  assert set(stats) == {'conv1', 'conv2', 'pool', 'head'}
  assert all(leaf == 0 for leaf in jax.tree.leaves(stats))
  # The first training step has the same structure: no retrace after it.
  out = jax.eval_shape(
    lambda v: forward(v, batch, train=True),
    {**variables, 'quant_stats': stats},
  )
  assert jax.tree.structure(
    out.model_state['quant_stats']
  ) == jax.tree.structure(stats)


def test_quant_stats_update_in_training_only():
  model, variables, batch = _trained('cnn')
  forward = _watching(model)
  variables['quant_stats'] = quantize.init_quant_stats(
    forward, variables, batch
  )
  run = jax.jit(forward, static_argnames='train')
  plain = jax.jit(adapters.from_linen(model))
  # Before any batch nothing is rounded.
  before = run(variables, batch, train=False)
  np.testing.assert_allclose(
    before.output, plain(variables, batch).output, rtol=1e-5, atol=1e-6
  )
  trained = run(variables, batch, jax.random.key(0), train=True)
  stats = trained.model_state['quant_stats']
  seen = stats['conv1']['input0']
  np.testing.assert_allclose(seen['low'], batch['image'].min())
  np.testing.assert_allclose(seen['high'], batch['image'].max())
  after = run({**variables, 'quant_stats': stats}, batch, train=False)
  jax.tree.map(
    np.testing.assert_array_equal, after.model_state['quant_stats'], stats
  )
  assert jnp.abs(after.output - before.output).max() > 1e-5


def test_activation_rules_choose_layers_and_name_mistakes():
  model, variables, batch = _trained('cnn')
  spec = quantize.INT8_ACTIVATIONS
  rules = [('conv1', None), ('conv.*|head', spec)]
  stats = quantize.init_quant_stats(
    _watching(model, rules), variables, batch, rules
  )
  assert set(stats) == {'conv2', 'head'}
  rules = [('conv.*', spec), ('haed', spec)]
  with pytest.raises(
    ValueError, match="activation rule 'haed' matches nothing"
  ):
    quantize.init_quant_stats(_watching(model, rules), variables, batch, rules)
  with pytest.raises(ValueError, match='No layer of the model is quantized'):
    quantize.init_quant_stats(
      _watching(model, [('norm1', spec)]), variables, batch
    )


def test_both_inputs_of_a_residual_sum_are_observed():
  model = models.CifarResNet(3, depth=8, width=2)
  batch = {'image': jnp.zeros((2, 8, 8, 1))}
  variables = jax.eval_shape(
    lambda: adapters.init_linen(model, jax.random.key(0), batch)
  )
  stats = quantize.init_quant_stats(_watching(model), variables, batch, INPUTS)
  assert set(stats['stage1_block1']['add']) == {'input0', 'input1'}
  assert set(stats['pool']) == {'input0'}


# --- folding


class _Biased(nn.Module):
  """Layers with biases of their own before BatchNorm; Dense as well."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(4, (3, 3), name='conv')(x)
    x = nn.BatchNorm(not train, use_scale=False, name='norm1')(x)
    x = nn.relu(x).reshape(x.shape[0], -1)
    x = nn.Dense(6, use_bias=False, name='dense')(x)
    x = nn.BatchNorm(not train, use_bias=False, epsilon=0.1, name='norm2')(x)
    # Not foldable: something lies between.
    x = nn.BatchNorm(not train, name='norm3')(nn.relu(x))
    return nn.Dense(3, name='head')(x)


MODELS = {
  'cnn': models.CNN(3, widths=(4, 5)),
  'resnet': models.CifarResNet(3, depth=8, width=2),
  'mlp': models.MLP(3, hidden=(12, 7)),
  'biased': _Biased(),
}
FOLDABLE = {'cnn': 2, 'resnet': 9, 'biased': 2}


def _trained(name, size=6):
  """Variables with statistics and norms that are not those of a new model."""
  model, rng = MODELS[name], _rng()
  batch = {'image': rng.normal(size=(8, size, size, 1)).astype('f') + 0.3}
  shapes = jax.eval_shape(
    lambda: adapters.init_linen(model, jax.random.key(0), batch)
  )

  def fill(path, x):
    noise = rng.normal(size=x.shape).astype('f')
    if path[-1].key == 'kernel':
      return noise / np.sqrt(np.prod(x.shape[:-1]), dtype='f')
    if path[-1].key == 'var':
      return np.exp(0.5 * noise)
    return 0.3 * noise + (path[-1].key == 'scale')

  return model, jax.tree_util.tree_map_with_path(fill, shapes), batch


def _fold(model, variables, batch):
  norms = quantize.foldable_batch_norms(
    lambda i: adapters.from_linen(model, interceptors=[i]), variables, batch
  )
  fold = jax.jit(lambda v: quantize.fold_batch_norm(v, norms))
  return fold(variables), norms


@pytest.mark.parametrize('name', FOLDABLE)
def test_a_folded_model_computes_the_same(name):
  model, variables, batch = _trained(name)
  folded, norms = _fold(model, variables, batch)
  assert len(norms) == FOLDABLE[name]
  names = ' '.join(norm for norm, _ in norms.values())
  left = ' '.join(folded.get('batch_stats', {}))
  assert ('norm3' in left) == (name == 'biased') and 'norm3' not in names
  plain = adapters.from_linen(model)
  skipping = adapters.from_linen(
    model, interceptors=[quantize.skip_folded_batch_norms]
  )
  want, got = jax.jit(
    lambda v, f, b: (plain(v, b).output, skipping(f, b).output)
  )(variables, folded, batch)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  assert jnp.abs(want).max() > 0.1


@pytest.mark.parametrize('shared', ['conv', 'norm'])
def test_layers_and_norms_that_are_used_twice_are_not_folded(shared):
  class Shared(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      convs = [nn.Conv(2, (1, 1), name=f'conv{i}') for i in range(2)]
      norms = [nn.BatchNorm(not train, name=f'norm{i}') for i in range(2)]
      if shared == 'conv':
        return norms[0](convs[0](x)) + norms[1](convs[0](x))
      return norms[0](convs[0](x)) + norms[0](convs[1](x))

  x = {'image': jnp.ones((1, 2, 2, 2))}
  variables = Shared().init(jax.random.key(0), x['image'])
  folded, norms = _fold(Shared(), variables, x)
  assert norms == {}
  assert jax.tree.structure(folded) == jax.tree.structure(dict(variables))
