"""Fake-quantized activations: layers, observers in quant_stats, rules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from quantized_models import INPUTS, trained, watching

from kd_jax import adapters, models, objectives, quantize, step
from kd_jax.quantize import QuantSpec
from kd_jax.types import Forward


def _rng():
  return np.random.default_rng(0)


def test_quant_stats_are_created_from_shapes_alone():
  model, variables, batch = trained('cnn')
  forward = watching(model)
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
  model, variables, batch = trained('cnn')
  forward = watching(model)
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
  after_one = run(variables, batch, jax.random.key(0), train=True)
  stats = after_one.model_state['quant_stats']
  seen = stats['conv1']['input0']
  np.testing.assert_allclose(seen['low'], batch['image'].min())
  np.testing.assert_allclose(seen['high'], batch['image'].max())
  after = run({**variables, 'quant_stats': stats}, batch, train=False)
  jax.tree.map(
    np.testing.assert_array_equal, after.model_state['quant_stats'], stats
  )
  assert jnp.abs(after.output - before.output).max() > 1e-5


def test_activation_rules_choose_layers_and_name_mistakes():
  model, variables, batch = trained('cnn')
  spec = quantize.INT8_ACTIVATIONS
  rules = [('conv1', None), ('conv.*|head', spec)]
  stats = quantize.init_quant_stats(
    watching(model, rules), variables, batch, rules
  )
  assert set(stats) == {'conv2', 'head'}
  rules = [('conv.*', spec), ('haed', spec)]
  with pytest.raises(
    ValueError, match="activation rule 'haed' matches nothing"
  ):
    quantize.init_quant_stats(watching(model, rules), variables, batch, rules)
  with pytest.raises(ValueError, match='No layer of the model is quantized'):
    quantize.init_quant_stats(
      watching(model, [('norm1', spec)]), variables, batch
    )


def test_both_inputs_of_a_residual_sum_are_observed():
  model = models.CifarResNet(3, depth=8, width=2)
  batch = {'image': jnp.zeros((2, 8, 8, 1))}
  variables = jax.eval_shape(
    lambda: adapters.init_linen(model, jax.random.key(0), batch)
  )
  stats = quantize.init_quant_stats(watching(model), variables, batch, INPUTS)
  assert set(stats['stage1_block1']['add']) == {'input0', 'input1'}
  assert set(stats['pool']) == {'input0'}


# --- kinds of layers

DYNAMIC = QuantSpec(symmetric=False, narrow=False, dynamic=True)


def _numpy_round(x, spec=quantize.INT8_ACTIVATIONS):
  """The range of the values at hand, by the formula."""
  x = np.asarray(x)
  low, high = min(x.min(), 0), max(x.max(), 0)
  scale = np.float32(high - low) / np.float32(spec.qmax - spec.qmin)
  zero = np.rint(spec.qmin - low / scale)
  code = np.clip(np.rint(x / scale) + zero, spec.qmin, spec.qmax)
  return ((code - zero) * scale).astype('f')


class Layers(nn.Module):
  """Every kind of layer, once; inputs are given by position and keyword."""

  @nn.compact
  def __call__(self, x, ids):
    conv = nn.Conv(4, (3, 3), name='conv')(x)
    x = nn.Conv(4, (3, 3), feature_group_count=4, name='depthwise')(conv)
    x = nn.Conv(4, (1, 1), feature_group_count=2, name='grouped')(x)
    x = models.layers.Concatenate(name='join')(x, y=conv)
    x = models.layers.GlobalAveragePool(name='pool')(x)
    x = nn.Dense(6, name='dense')(inputs=x)
    x = nn.DenseGeneral((2, 3), name='general')(x)
    x = nn.Einsum((2, 3, 5), 'bhd,hdo->bo', name='einsum')(x)
    return x + nn.Embed(7, 5, name='embed')(ids)


def _layers(rules=INPUTS, **options):
  model = Layers()
  interceptor = quantize.quantize_activations(rules, **options)
  ids = jnp.array([1, 0, 6])

  def forward(variables, batch, rng=None, *, train=False):
    mutable = ['quant_stats'] if train else False
    with nn.intercept_methods(interceptor):
      out = model.apply(dict(variables), batch['image'], ids, mutable=mutable)
    out, state = out if train else (out, variables)
    return Forward(out, {}, {'quant_stats': state.get('quant_stats', {})})

  batch = {'image': jnp.asarray(_rng().normal(size=(3, 5, 5, 4)), 'float32')}
  variables = jax.jit(model.init)(jax.random.key(0), batch['image'], ids)
  return forward, variables, batch


def test_every_kind_of_layer_has_its_inputs_observed():
  forward, variables, batch = _layers()
  stats = quantize.init_quant_stats(forward, variables, batch, INPUTS)
  inputs = {layer: set(entry) for layer, entry in stats.items()}
  one = {'input0'}
  assert inputs == {
    **{name: one for name in ('conv', 'depthwise', 'grouped', 'pool')},
    **{name: one for name in ('dense', 'general', 'einsum')},
    'join': {'input0', 'input1'},
  }


def test_weights_of_every_kind_of_layer_are_quantized_by_rules():
  _, variables, _ = _layers()
  rules = [
    ('general/kernel', QuantSpec(bits=4, axis=(-2, -1))),
    ('.*/embedding', QuantSpec(bits=4, axis=0)),
    ('.*/kernel', QuantSpec(bits=4, axis=-1)),
  ]
  got = quantize.fake_quant_params(variables['params'], rules)
  for layer in ('general', 'depthwise', 'einsum', 'dense'):
    w, rounded = (t[layer]['kernel'] for t in (variables['params'], got))
    assert 0 < jnp.abs(rounded - w).max() < jnp.abs(w).max() / 13
  # Every row of the embedding reaches its own largest value.
  rows = (tree['embed']['embedding'] for tree in (variables['params'], got))
  np.testing.assert_allclose(*(jnp.abs(r).max(axis=1) for r in rows), rtol=1e-6)


def test_layers_compute_on_rounded_inputs():
  """Einsum and DenseGeneral against their formulas."""
  rules = [('general|einsum', quantize.INT8_ACTIVATIONS)]
  forward, variables, batch = _layers(rules)
  params = jax.device_get(variables['params'])
  quiet, _, _ = _layers([('conv', None)])
  out = forward(variables, batch, train=True).output
  # The inputs of `general`, from a model that ends there.
  bare = jax.tree.map(jnp.zeros_like, params['einsum'])
  embedded = quiet({'params': {**params, 'einsum': bare}}, batch).output

  class Start(nn.Module):
    @nn.compact
    def __call__(self, x):
      conv = nn.Conv(4, (3, 3), name='conv')(x)
      x = nn.Conv(4, (3, 3), feature_group_count=4, name='depthwise')(conv)
      x = nn.Conv(4, (1, 1), feature_group_count=2, name='grouped')(x)
      x = jnp.concatenate([x, conv], axis=-1).mean((1, 2))
      return nn.Dense(6, name='dense')(x)

  x = Start().apply(variables, batch['image'])
  x = _numpy_round(x)
  x = np.einsum('bd,dho->bho', x, params['general']['kernel'])
  x = _numpy_round(x + params['general']['bias'])
  want = np.einsum('bhd,hdo->bo', x, params['einsum']['kernel'])
  want = want + params['einsum']['bias']
  np.testing.assert_allclose(out - embedded, want, rtol=1e-4, atol=2e-5)


# --- attention


def _attending(**options):
  return nn.MultiHeadDotProductAttention(
    num_heads=2, qkv_features=6, name='attention', **options
  )


class Attends(nn.Module):
  attention: nn.Module

  def __call__(self, x):
    return self.attention(x)


PRODUCTS = [('attention/(scores|context)', quantize.INT8_ACTIVATIONS)]


def _attention(rules=PRODUCTS, make=_attending, **options):
  model = Attends(make(**options))
  x = _rng().normal(size=(2, 4, 5)).astype('f')
  variables = model.init(jax.random.key(0), x)
  forward = adapters.from_linen(
    model,
    interceptors=[quantize.quantize_activations(rules)],
    train_argument=None,
  )
  return forward, dict(variables), {'image': x}


def test_both_products_of_linens_attention_are_quantized():
  forward, variables, batch = _attention()
  out = forward(variables, batch, train=True)
  params = jax.device_get(variables['params']['attention'])

  def project(name, x):
    y = np.einsum('bld,dhk->blhk', x, params[name]['kernel'])
    return y + params[name]['bias']

  q, k, v = (project(n, batch['image']) for n in ('query', 'key', 'value'))
  q, k, v = _numpy_round(q / np.sqrt(3)), _numpy_round(k), _numpy_round(v)
  p = nn.softmax(jnp.einsum('bqhd,bkhd->bhqk', q, k))
  x = np.einsum('bhqk,bkhd->bqhd', _numpy_round(p), v)
  want = np.einsum('blhd,hdo->blo', x, params['out']['kernel'])
  want += params['out']['bias']
  np.testing.assert_allclose(out.output, want, rtol=1e-4, atol=1e-5)
  stats = out.model_state['quant_stats']['attention']
  assert {k: set(v) for k, v in stats.items()} == {
    'scores': {'input0', 'input1'},
    'context': {'input0', 'input1'},
  }
  assert stats['context']['input0']['low'] >= 0
  assert stats['context']['input0']['high'] <= 1


def test_the_projections_of_attention_are_layers_too():
  forward, variables, batch = _attention(INPUTS)
  stats = quantize.init_quant_stats(forward, variables, batch, INPUTS)
  assert set(stats['attention']) == {
    *('query', 'key', 'value', 'out'),
    *('scores', 'context'),
  }


def test_products_keep_their_precision_and_subclasses_are_quantized_once():
  """linen takes either a precision or functions for the products."""
  plain, variables, batch = _attention()
  precise, _, _ = _attention(precision='highest')
  want = plain(variables, batch, train=True)
  got = precise(variables, batch, train=True)
  np.testing.assert_allclose(got.output, want.output, rtol=1e-5, atol=1e-6)
  text = str(jax.make_jaxpr(lambda v: precise(v, batch).output)(variables))
  highest = text.count('(Precision.HIGHEST, Precision.HIGHEST)')
  assert highest == text.count('dot_general[') == 6

  def make(**options):
    return nn.SelfAttention(
      num_heads=2, qkv_features=6, name='attention', **options
    )

  subclass, _, _ = _attention(make=make)
  got = subclass(variables, batch, train=True)
  jax.tree.map(np.testing.assert_array_equal, got.model_state, want.model_state)


def test_attention_that_cannot_be_quantized_is_named_and_can_be_left_out():
  def attend(query, key, value, mask=None):
    return value

  forward, variables, batch = _attention(attention_fn=attend)
  with pytest.raises(ValueError, match='attention: .*qk_attn_weights_einsum'):
    forward(variables, batch, train=True)
  rules = [('attention/(scores|context)', None), *INPUTS]
  forward, variables, batch = _attention(rules, attention_fn=attend)
  stats = quantize.init_quant_stats(forward, variables, batch, rules)
  assert set(stats['attention']) == {'query', 'key', 'value', 'out'}


def test_our_transformers_products_are_quantized_on_both_sides():
  model = models.ViT(3, patch_size=4, width=6, depth=1, heads=2)
  batch = {'image': jnp.zeros((2, 8, 8, 3))}
  variables = jax.eval_shape(
    lambda: adapters.init_linen(model, jax.random.key(0), batch)
  )
  stats = quantize.init_quant_stats(watching(model), variables, batch, INPUTS)
  attention = stats['block1']['attention']
  for name in ('scores', 'context'):
    assert set(attention[name]) == {'input0', 'input1'}
  assert {'query', 'key', 'value', 'out'} < set(attention)
  assert {'add1', 'add2', 'mlp'} < set(stats['block1'])


# --- modules that are called in unusual ways


class Shared(nn.Module):
  """One layer called twice, once by keyword, and a subclass that defers."""

  @nn.compact
  def __call__(self, x):
    class Deferring(nn.Dense):
      def __call__(self, inputs):
        return super().__call__(2 * inputs)

    dense = nn.Dense(4, name='dense')
    return Deferring(4, name='deferring')(dense(inputs=5 * dense(x)))


def test_a_layer_called_twice_has_one_observer_for_both_calls():
  forward = adapters.from_linen(
    Shared(),
    interceptors=[
      quantize.quantize_activations(INPUTS, observer=quantize.min_max())
    ],
    train_argument=None,
  )
  x = jnp.asarray(_rng().normal(size=(3, 4)), jnp.float32)
  variables = Shared().init(jax.random.key(0), x)
  state = forward(variables, {'image': x}, train=True).model_state
  seen = state['quant_stats']['dense']
  assert set(seen) == {'input0'} and seen['input0']['count'] == 2
  kernel = variables['params']['dense']['kernel']
  second = 5 * _numpy_round(x) @ np.asarray(kernel)
  low = min(x.min(), second.min())
  np.testing.assert_allclose(seen['input0']['low'], low, rtol=1e-4)
  # The __call__ of the base class is no second call.
  assert state['quant_stats']['deferring']['input0']['count'] == 1


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return nn.relu(nn.remat(nn.Dense)(4, name='dense')(x)), None


class Stack(nn.Module):
  axes: tuple = ('params', 'quant_stats')

  @nn.compact
  def __call__(self, x, train=False):
    scan = nn.scan(
      Block,
      variable_axes={name: 0 for name in self.axes},
      split_rngs={'params': True},
      length=3,
    )
    return nn.Dense(2, name='head')(scan(name='blocks')(x, None)[0])


def test_scanned_and_rematerialised_blocks_have_an_observer_each():
  model = Stack()
  x = jnp.asarray(_rng().normal(size=(5, 4)), jnp.float32)
  variables = model.init(jax.random.key(0), x)
  forward = watching(model)
  stats = quantize.init_quant_stats(forward, variables, {'image': x}, INPUTS)
  variables = {**variables, 'quant_stats': stats}

  def loss(params, state):
    out = forward({**state, 'params': params}, {'image': x}, train=True)
    return jnp.sum(out.output**2), out

  (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
    variables['params'], {'quant_stats': stats}
  )
  assert jax.tree.structure(out.model_state['quant_stats']) == (
    jax.tree.structure(stats)
  )
  seen = out.model_state['quant_stats']['blocks']['dense']['input0']
  kernels = variables['params']['blocks']['dense']
  h = np.asarray(x)
  for i in range(3):
    np.testing.assert_allclose(seen['low'][i], h.min(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(seen['high'][i], h.max(), rtol=1e-4)
    h = _numpy_round(h) @ np.asarray(kernels['kernel'][i])
    h = np.maximum(h + np.asarray(kernels['bias'][i]), 0)
  np.testing.assert_array_equal(seen['count'], 1)
  assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_a_scan_that_does_not_carry_the_observers_is_named():
  model = Stack(axes=('params',))
  x = jnp.ones((5, 4))
  variables = model.init(jax.random.key(0), x)
  with pytest.raises(ValueError, match="'blocks/dense'.*variable_axes"):
    quantize.init_quant_stats(watching(model), variables, {'image': x}, INPUTS)
  rules = [('blocks/dense', None), *INPUTS]
  stats = quantize.init_quant_stats(
    watching(model, rules), variables, {'image': x}, rules
  )
  assert set(stats) == {'head'}


@pytest.mark.parametrize('value', [None, quantize.INT8_ACTIVATIONS, DYNAMIC])
def test_a_misspelt_rule_is_an_error_whatever_its_value(value):
  model, variables, batch = trained('cnn')
  rules = [('conv_1', value), *INPUTS]
  with pytest.raises(ValueError, match="'conv_1' matches nothing.*mean conv1"):
    quantize.init_quant_stats(watching(model, rules), variables, batch, rules)


def test_two_interceptors_give_layers_different_observers():
  model, variables, batch = trained('cnn')
  spec = quantize.INT8_ACTIVATIONS
  rules = {'min_max': [('conv.*', spec)], 'octav': [('head', spec)]}
  forward = adapters.from_linen(
    model,
    interceptors=[
      quantize.quantize_activations(r, observer=getattr(quantize, name)())
      for name, r in rules.items()
    ],
  )
  stats = quantize.init_quant_stats(
    forward, variables, batch, [*rules['min_max'], *rules['octav']]
  )
  assert set(stats) == {'conv1', 'conv2', 'head'}
  assert 'counts' in stats['head']['input0']
  assert 'counts' not in stats['conv1']['input0']


# --- dynamic ranges and ranges per axis


def test_dynamic_ranges_are_those_of_the_batch_in_training_and_evaluation():
  model, variables, batch = trained('mlp')
  rules = [('.*', DYNAMIC)]
  forward = watching(model, rules)
  assert quantize.init_quant_stats(forward, variables, batch, rules) == {}
  static = watching(model)
  want = static(variables, batch, train=True).output
  for train in (True, False):
    got = forward(variables, batch, train=train)
    np.testing.assert_array_equal(got.output, want)
    assert 'quant_stats' not in got.model_state


def test_a_range_per_example_makes_examples_independent():
  spec = QuantSpec(symmetric=False, narrow=False, dynamic=True, axis=0)
  x = jnp.asarray(_rng().normal(size=(4, 3, 5)), jnp.float32)
  x = x * jnp.array([1, 10, 0, 0.1])[:, None, None]
  got, stats = quantize.activation(None, x, spec)
  assert stats is None
  for one, rounded in zip(x, got, strict=True):
    want = _numpy_round(one) if one.any() else one
    np.testing.assert_allclose(rounded, want, rtol=1e-5, atol=1e-6)


def test_a_static_range_per_channel_is_learned_for_each():
  spec = QuantSpec(symmetric=False, narrow=False, axis=-1)
  x = _rng().normal(size=(6, 3, 4)).astype('f') * [1, 10, 0, 0.1]
  x = x.astype('f')
  for observer in (quantize.min_max(), quantize.octav()):
    observe = jax.jit(
      lambda x, o=observer: quantize.activation(None, x, spec, o)
    )
    rounded, stats = observe(x)
    assert stats['low'].shape == (4,)
    again, same = jax.jit(
      lambda s, x, o=observer: quantize.activation(
        s, x, spec, o, learning=False
      )
    )(stats, x)
    np.testing.assert_array_equal(again, rounded)
    jax.tree.map(np.testing.assert_array_equal, same, stats)
  rounded, _ = quantize.activation(None, x, spec, quantize.min_max())
  for i in (0, 1, 3):
    want = _numpy_round(x[..., i])
    np.testing.assert_allclose(rounded[..., i], want, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(rounded[..., 2], 0.0)


def test_a_range_is_chosen_for_the_bits_that_it_will_have():
  x = jnp.asarray(_rng().standard_t(3, size=4096), jnp.float32)
  largest = {}
  for bits in (4, 8):
    rounded, _ = quantize.activation(
      None, x, QuantSpec(bits=bits), quantize.mse()
    )
    largest[bits] = float(rounded.max())
  # Fewer levels are spread over less.
  assert 1 < largest[4] < 0.8 * largest[8]


def test_bfloat16_activations_stay_bfloat16():
  x = jnp.asarray(_rng().normal(size=(6, 3)), jnp.bfloat16)
  for spec in (quantize.INT8_ACTIVATIONS, DYNAMIC):
    rounded, stats = quantize.activation(None, x, spec)
    assert rounded.dtype == jnp.bfloat16
    assert stats is None or stats['low'].dtype == jnp.float32


def test_activations_have_no_groups():
  with pytest.raises(ValueError, match='group_size=2 is for weights'):
    quantize.activation(None, jnp.ones((2, 4)), QuantSpec(group_size=2))


# --- nnx modules and plain functions


def test_a_plain_function_trains_with_quantized_activations():
  rng = _rng()
  batch = {
    'image': jnp.asarray(rng.normal(size=(16, 4)), jnp.float32),
    'label': jnp.asarray(rng.integers(0, 3, 16)),
  }
  spec, observer = quantize.INT8_ACTIVATIONS, quantize.min_max()

  def student_fn(variables, batch, rng=None, *, train=False):
    params, stats = variables['params'], variables['quant_stats']
    h, hidden = batch['image'] @ params['w1'], {}
    h, hidden['h'] = quantize.activation(
      stats['h'], nn.relu(h), spec, observer, learning=train
    )
    return Forward(h @ params['w2'], {}, {'quant_stats': hidden})

  params = {
    'w1': jnp.asarray(rng.normal(size=(4, 8)), jnp.float32),
    'w2': jnp.asarray(rng.normal(size=(8, 3)), jnp.float32),
  }
  variables = {
    'params': params,
    'quant_stats': {'h': observer.init()},
  }
  rules = [('w.', quantize.INT8_WEIGHTS)]
  objective, tx = objectives.hard_labels(), optax.sgd(0.1)
  train_step = jax.jit(
    step.make_train_step(
      student_fn,
      objective,
      tx,
      params_fn=lambda p: quantize.fake_quant_params(p, rules),
    )
  )
  state = step.init_state(student_fn, objective, tx, variables, batch)
  losses = []
  for _ in range(5):
    state, metrics = train_step(state, batch, jax.random.key(0))
    losses.append(float(metrics['loss/total']))
  assert losses[-1] < losses[0]
  assert state.model_state['quant_stats']['h']['count'] == 5
  h = nn.relu(batch['image'] @ quantize.fake_quant_params(params, rules)['w1'])
  assert state.model_state['quant_stats']['h']['high'] >= h.max()


class Watched(nnx.Module):
  """An nnx module that keeps an observer among its variables."""

  def __init__(self):
    self.linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    stats = quantize.min_max().init()
    self.stats = nnx.Dict({k: nnx.BatchStat(v) for k, v in stats.items()})
    self.learning = True

  def train(self, **attributes):
    super().train(**attributes)
    self.learning = True

  def eval(self, **attributes):
    super().eval(**attributes)
    self.learning = False

  def __call__(self, x):
    x, stats = quantize.activation(
      {k: v[...] for k, v in self.stats.items()},
      x,
      quantize.INT8_ACTIVATIONS,
      quantize.min_max(),
      learning=self.learning,
    )
    for k, v in stats.items():
      self.stats[k][...] = v
    return self.linear(x)


def test_an_nnx_module_quantizes_its_activations():
  forward, variables = adapters.from_nnx(Watched())
  x = jnp.asarray(_rng().normal(size=(5, 4)), jnp.float32)
  run = jax.jit(forward, static_argnames='train')
  linear = variables['params']['linear']
  before = run(variables, {'image': x}, train=False)
  np.testing.assert_allclose(
    before.output, x @ linear['kernel'] + linear['bias'][None], rtol=1e-5
  )
  out = run(variables, {'image': x}, train=True)
  seen = out.model_state['model_state']['stats']
  assert seen['count'] == 1 and seen['low'] == x.min()
  variables = {**variables, **out.model_state}
  after = run(variables, {'image': 2 * x}, train=False)
  # The range is that of training, which 2 x exceeds.
  clipped = np.clip(2 * np.asarray(x), x.min(), x.max())
  want = clipped @ np.asarray(linear['kernel']) + np.asarray(linear['bias'])
  np.testing.assert_allclose(after.output, want, atol=0.05)
  assert after.model_state['model_state']['stats']['count'] == 1
