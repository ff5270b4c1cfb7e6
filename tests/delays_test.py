"""What begins or stops at a step of its own, in one compiled step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from quantized_models import trained

from kd_jax import adapters, quantize
from kd_jax.quantize import QuantSpec

pytestmark = pytest.mark.once


def _rng():
  return np.random.default_rng(0)


# --- activations and observers


def test_activations_are_rounded_after_the_batches_that_begin_says():
  spec = QuantSpec(bits=4, symmetric=False, narrow=False)
  observer = quantize.min_max()

  @jax.jit
  def run(stats, x):
    trained = quantize.activation(stats, x, spec, observer, begin=2)
    evaluated, _ = quantize.activation(
      trained[1], x, spec, observer, begin=2, learning=False
    )
    return *trained, evaluated

  stats, rounded, evaluated = observer.init(), [], []
  for batch in _rng().normal(size=(4, 50)).astype('f'):
    y, stats, z = run(stats, batch)
    rounded.append(bool((y != batch).any()))
    evaluated.append(bool((z != batch).any()))
  assert rounded == [False, False, True, True]
  # In evaluation as soon as the next batch of training would be.
  assert evaluated == [False, True, True, True]
  assert stats['count'] == 4 and run._cache_size() == 1


@pytest.mark.parametrize('name', ['min_max', 'ema_min_max', 'mse'])
def test_a_frozen_observer_learns_from_its_first_batches_only(name):
  plain = getattr(quantize, name)()
  frozen = quantize.freeze_observer(plain, after=2)
  update = jax.jit(lambda s, x: frozen.update(s, x, None))
  stats, wanted = frozen.init(), plain.init()
  for i, scale in enumerate((1.0, 3.0, 9.0, 27.0)):
    x = jnp.asarray(_rng().normal(size=40) * scale, jnp.float32)
    stats = update(stats, x)
    if i < 2:
      wanted = plain.update(wanted, x, None)
  jax.tree.map(
    np.testing.assert_array_equal, stats | {'count': wanted['count']}, wanted
  )
  assert stats['count'] == 4
  with pytest.raises(ValueError, match='after=0'):
    quantize.freeze_observer(plain, after=0)


def test_rounding_may_begin_after_the_observers_froze():
  model, variables, batch = trained('cnn')
  observer = quantize.freeze_observer(quantize.min_max(), after=1)
  rules = [('.*', quantize.INT8_ACTIVATIONS)]
  forward = adapters.from_linen(
    model,
    interceptors=[
      quantize.quantize_activations(rules, observer=observer, begin=2)
    ],
  )
  plain = adapters.from_linen(model)
  variables['quant_stats'] = quantize.init_quant_stats(
    forward, variables, batch, rules
  )
  run = jax.jit(lambda v, b: forward(v, b, train=True))
  wanted = jax.jit(lambda v, b: plain(v, b, train=True).output)
  rounded, highs = [], []
  for scale in (1.0, 2.0, 3.0):
    scaled = {'image': scale * batch['image']}
    out = run(variables, scaled)
    rounded.append(
      bool(jnp.abs(out.output - wanted(variables, scaled)).max() > 1e-4)
    )
    stats = out.model_state['quant_stats']
    highs.append(float(stats['conv1']['input0']['high']))
    variables = {**variables, 'quant_stats': stats}
  assert rounded == [False, False, True]
  np.testing.assert_allclose(highs, batch['image'].max(), rtol=1e-6)


# --- weights


def test_weights_are_rounded_from_a_step_on():
  w = jnp.asarray(_rng().normal(size=(4, 3)), jnp.float32)
  rules = [('w', QuantSpec(bits=4))]
  params_fn = quantize.delayed(
    lambda p: quantize.fake_quant_params(p, rules), begin=3
  )
  run = jax.jit(params_fn)
  params = {'w': w, 'b': None, 'c': jnp.ones(2)}
  for at in range(5):
    got = run(params, jnp.int32(at))
    assert jax.tree.structure(got) == jax.tree.structure(params)
    want = quantize.fake_quant_params(params, rules) if at >= 3 else params
    jax.tree.map(np.testing.assert_array_equal, got, want)
  assert run._cache_size() == 1
  gradient = jax.grad(lambda w: params_fn({'w': w}, 0)['w'].sum())(w)
  np.testing.assert_array_equal(gradient, 1.0)


def test_learned_steps_may_be_delayed_too():
  w = jnp.asarray(_rng().normal(size=(4, 3)), jnp.float32)
  rules = [('w', QuantSpec(bits=4))]
  params = quantize.init_lsq_params({'w': w}, rules)
  params_fn = quantize.delayed(lambda p: quantize.lsq_params(p, rules), begin=1)
  assert set(params_fn(params, 0)) == {'w'}
  np.testing.assert_array_equal(params_fn(params, 0)['w'], w)
  assert jnp.abs(params_fn(params, 1)['w'] - w).max() > 0
  gradient = jax.grad(lambda p: params_fn(p, 0)['w'].sum())(params)
  assert gradient['quant_steps']['w_step'] == 0


# --- BatchNorm


class Norms(nn.Module):
  """Norms with and without scale and bias, one over another axis."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(4, name='dense')(x)
    x = nn.BatchNorm(not train, name='full')(x)
    x = nn.BatchNorm(not train, use_scale=False, epsilon=0.1, name='bias')(x)
    x = nn.BatchNorm(not train, use_bias=False, axis=1, name='axis')(x)
    return nn.BatchNorm(name='call')(x=x, use_running_average=not train)


def _norms(after, model=None):
  model = model or Norms()
  x = _rng().normal(size=(6, 5, 3)).astype('f')
  variables = adapters.init_linen(model, jax.random.key(0), {'image': x})
  variables = jax.tree.map(
    lambda v: v + jnp.asarray(_rng().uniform(0, 0.3, v.shape), v.dtype),
    variables,
  )
  freezing = adapters.from_linen(
    model, interceptors=[quantize.freeze_batch_norm(after)]
  )
  return freezing, adapters.from_linen(model), variables, {'image': x}


def test_batch_norm_freezes_after_a_number_of_steps():
  freezing, plain, variables, batch = _norms(after=2)
  state = quantize.init_batch_norm_steps(variables)
  run = jax.jit(lambda v, b: freezing(v, b, train=True))
  train = jax.jit(lambda v, b: plain(v, b, train=True))
  evaluate = jax.jit(lambda v, b: plain(v, b))
  for i in range(4):
    batch = {'image': batch['image'] * 1.5 + 0.1}
    out = run(state, batch)
    if i < 2:
      want = train(variables, batch)
      variables = {**variables, **want.model_state}
    else:
      want = evaluate(variables, batch)
    np.testing.assert_allclose(out.output, want.output, rtol=1e-4, atol=1e-5)
    state = {**state, **out.model_state}
    stats = {
      name: {k: v for k, v in entry.items() if k != 'steps'}
      for name, entry in state['batch_stats'].items()
    }
    jax.tree.map(np.testing.assert_array_equal, stats, variables['batch_stats'])
    assert {int(e['steps']) for e in state['batch_stats'].values()} == {i + 1}
  assert run._cache_size() == 1
  # In evaluation it is what it was.
  np.testing.assert_allclose(
    freezing(state, batch).output, want.output, rtol=1e-5, atol=1e-6
  )


def test_gradients_of_a_frozen_norm_are_those_of_evaluation():
  freezing, plain, variables, batch = _norms(after=0)
  state = quantize.init_batch_norm_steps(variables)

  def loss(forward, state, train):
    def of(params, x):
      out = forward({**state, 'params': params}, {'image': x}, train=train)
      return jnp.sum(jnp.sin(out.output))

    return jax.jit(jax.grad(of, argnums=(0, 1)))(
      variables['params'], batch['image']
    )

  got, want = loss(freezing, state, True), loss(plain, variables, False)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    got,
    want,
  )


class _Block(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    return nn.BatchNorm(not train, name='norm')(nn.Dense(3)(x)), None


class Stacked(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    scan = nn.scan(
      _Block,
      variable_axes={'params': 0, 'batch_stats': 0},
      split_rngs={'params': True},
      in_axes=nn.broadcast,
      length=2,
    )
    return scan(name='blocks')(x, train)[0]


def test_scanned_norms_freeze_and_folding_drops_the_counter():
  freezing, plain, variables, batch = _norms(0, Stacked())
  state = quantize.init_batch_norm_steps(variables)
  assert state['batch_stats']['blocks']['norm']['steps'].shape == (2,)
  out = freezing(state, batch, train=True)
  np.testing.assert_allclose(
    out.output, plain(variables, batch).output, rtol=1e-4, atol=1e-5
  )
  model, variables, batch = trained('cnn')
  norms = quantize.foldable_batch_norms(
    lambda i: adapters.from_linen(model, interceptors=[i]), variables, batch
  )
  folded = quantize.fold_batch_norm(
    quantize.init_batch_norm_steps(variables), norms
  )
  assert 'batch_stats' not in folded


def test_a_norm_without_its_counter_is_named():
  freezing, _, variables, batch = _norms(after=1)
  with pytest.raises(ValueError, match='full: .*init_batch_norm_steps'):
    freezing(variables, batch, train=True)
  freezing(variables, batch, train=False)
  with pytest.raises(ValueError, match='no BatchNorm'):
    quantize.init_batch_norm_steps({'params': {}})
