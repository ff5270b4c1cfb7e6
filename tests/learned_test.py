"""Learned steps and clipping values: LSQ and PACT, alone and in models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from quantized_models import trained

from kd_jax import adapters, models, objectives, quantize, step
from kd_jax.quantize import QuantSpec
from kd_jax.quantize.learned import initial_step

pytestmark = pytest.mark.once

SIGNED = QuantSpec(bits=4, narrow=False)
UNSIGNED = QuantSpec(bits=4, symmetric=False, narrow=False)


def _rng():
  return np.random.default_rng(0)


# --- the maps


def _numpy_lsq(x, s, first, last):
  """Value, and the slopes to x and to the step, by the paper."""
  t = x / s
  inside = (np.rint(t) >= first) & (np.rint(t) <= last)
  slope = np.where(inside, np.rint(t) - t, np.where(t < first, first, last))
  return s * np.rint(np.clip(t, first, last)), inside, slope


@pytest.mark.parametrize('shape', [(), (1, 1), (1, 3), (4, 1)])
@pytest.mark.parametrize('first, last', [(-8, 7), (-7, 7), (0, 15)])
def test_lsq_is_the_papers(first, last, shape):
  rng = _rng()
  x = rng.normal(size=(4, 3)) * 3
  s = rng.uniform(0.2, 0.5, size=shape)
  g = rng.normal(size=(4, 3))
  value, vjp = jax.vjp(
    lambda x, s: quantize.lsq(x, s, first, last, 0.3),
    jnp.asarray(x, jnp.float32),
    jnp.asarray(s, jnp.float32),
  )
  want, inside, slope = _numpy_lsq(x, s, first, last)
  np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-6)
  to_x, to_s = vjp(jnp.asarray(g, jnp.float32))
  np.testing.assert_allclose(to_x, g * inside, rtol=1e-6)
  total = 0.3 * g * slope
  for axis, n in enumerate(shape):
    if n == 1:
      total = total.sum(axis=axis, keepdims=True)
  total = total.sum() if shape == () else total
  np.testing.assert_allclose(to_s, total, rtol=1e-4, atol=1e-5)
  # Something saturated, else this shows less than it says.
  assert 0 < inside.mean() < 1


def test_lsq_passes_gradients_at_both_end_codes():
  x = jnp.array([-8.51, -8.49, 7.49, 7.51])
  gradient = jax.grad(lambda x: quantize.lsq(x, jnp.float32(1), -8, 7).sum())(x)
  np.testing.assert_array_equal(gradient, [0, 1, 1, 0])


def test_a_step_that_went_below_zero_comes_back():
  """Its gradient is that of a tiny step: the values call for a larger one."""
  x = jnp.array([1.0, 2.0])

  def loss(s):
    return jnp.square(quantize.lsq(x, s, -8, 7) - x).sum()

  value, gradient = jax.value_and_grad(loss)(jnp.float32(-0.1))
  assert np.isfinite(value) and gradient < 0


def test_lsq_keeps_bfloat16_and_computes_in_float32():
  x = jnp.asarray(_rng().normal(size=50), jnp.bfloat16)
  s = jnp.float32(0.123)
  value, vjp = jax.vjp(lambda x, s: quantize.lsq(x, s, -8, 7), x, s)
  want = quantize.lsq(x.astype(jnp.float32), s, -8, 7)
  np.testing.assert_array_equal(value, want.astype(jnp.bfloat16))
  to_x, to_s = vjp(value)
  assert to_x.dtype == jnp.bfloat16 and to_s.dtype == jnp.float32


@pytest.mark.parametrize('bits', [4, 8])
def test_pact_is_the_papers(bits):
  x = np.array([-2.0, 0.0, 0.3, 1.1, 2.4999, 2.5, 7.0])
  alpha, g = 2.5, np.arange(1.0, 8.0)
  value, vjp = jax.vjp(
    lambda x, a: quantize.pact(x, a, bits),
    jnp.asarray(x, jnp.float32),
    jnp.float32(alpha),
  )
  levels = 2**bits - 1
  want = np.rint(np.clip(x, 0, alpha) * levels / alpha) * alpha / levels
  np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-6)
  to_x, to_alpha = vjp(jnp.asarray(g, jnp.float32))
  np.testing.assert_array_equal(to_x, g * ((x >= 0) & (x < alpha)))
  assert to_alpha == 6 + 7


def test_pact_has_a_clipping_value_per_channel():
  x = jnp.array([[1.0, 5.0], [3.0, 1.0]])
  alpha = jnp.array([[2.0, 4.0]])
  gradient = jax.grad(lambda a: quantize.pact(x, a, 4).sum())(alpha)
  np.testing.assert_array_equal(gradient, [[1.0, 1.0]])


def test_the_gradient_factor_is_the_papers():
  assert quantize.lsq_gradient_factor(64, 4) == 1 / 16


# --- first steps


def test_the_first_step_is_the_papers_and_ignores_pruned_weights():
  w = _rng().normal(size=(6, 4)).astype('f')
  want = 2 * np.abs(w).mean() / np.sqrt(7)
  np.testing.assert_allclose(initial_step(w, SIGNED), [[want]], rtol=1e-5)
  pruned = np.concatenate([w, np.zeros_like(w)])
  np.testing.assert_allclose(initial_step(pruned, SIGNED), [[want]], rtol=1e-5)
  # Unsigned: 15 codes above 0.
  want = 2 * np.abs(w).mean() / np.sqrt(15)
  np.testing.assert_allclose(initial_step(w, UNSIGNED), [[want]], rtol=1e-5)


def test_the_step_of_a_channel_without_weights_is_one():
  w = jnp.zeros((5, 3)).at[:, 0].set(1.0)
  spec = QuantSpec(bits=4, axis=-1)
  np.testing.assert_allclose(
    initial_step(w, spec), [[2 / np.sqrt(7), 1, 1]], rtol=1e-6
  )


# --- weights

RULES = [
  ('stack/kernel', QuantSpec(bits=4, axis=(0, -1))),
  ('grouped/kernel', QuantSpec(bits=4, axis=-1, group_size=2)),
  ('.*/kernel', QuantSpec(axis=-1)),
]


def _weights():
  rng = _rng()
  shapes = {'conv': (3, 3, 2, 4), 'stack': (2, 5, 3), 'grouped': (6, 3)}
  return {
    name: {
      'kernel': jnp.asarray(rng.normal(size=shape), jnp.float32),
      'bias': None if name == 'conv' else jnp.zeros(shape[-1]),
    }
    for name, shape in shapes.items()
  }


def test_steps_of_weights_are_parameters_with_names_of_their_own():
  params = quantize.init_lsq_params(_weights(), RULES)
  steps = params['quant_steps']
  shapes = jax.tree.map(jnp.shape, steps)
  assert shapes == {
    'conv': {'kernel_step': (1, 1, 1, 4)},
    'stack': {'kernel_step': (2, 1, 3)},
    'grouped': {'kernel_step': (3, 3)},
  }
  rounded = jax.jit(lambda p: quantize.lsq_params(p, RULES))(params)
  assert jax.tree.structure(rounded) == jax.tree.structure(_weights())
  codes = rounded['stack']['kernel'] / steps['stack']['kernel_step']
  np.testing.assert_allclose(codes, jnp.round(codes), atol=1e-5)
  assert jnp.abs(codes).max() <= 7.001


def test_gradients_reach_weights_and_steps_with_the_papers_factor():
  weights = _weights()
  params = quantize.init_lsq_params(weights, RULES)
  g = _rng().normal(size=(2, 5, 3)).astype('f')

  def loss(params):
    return jnp.sum(quantize.lsq_params(params, RULES)['stack']['kernel'] * g)

  grads = jax.grad(loss)(params)
  w, s = (
    np.asarray(v)
    for v in (
      weights['stack']['kernel'],
      params['quant_steps']['stack']['kernel_step'],
    )
  )
  _, inside, slope = _numpy_lsq(w, s, -7, 7)
  np.testing.assert_allclose(grads['stack']['kernel'], g * inside, rtol=1e-6)
  # Five weights share a step.
  want = (g * slope).sum(axis=1, keepdims=True) / np.sqrt(5 * 7)
  got = grads['quant_steps']['stack']['kernel_step']
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_learning_the_steps_lowers_the_error_of_four_bits():
  rng = _rng()
  w = jnp.asarray(rng.standard_t(3, size=(64, 4)), jnp.float32)
  rules = [('w', QuantSpec(bits=4, axis=-1))]
  params = quantize.init_lsq_params({'w': w}, rules)
  tx = optax.masked(
    optax.adam(0.02), {'w': False, 'quant_steps': {'w_step': True}}
  )

  def loss(params):
    return jnp.mean(jnp.square(quantize.lsq_params(params, rules)['w'] - w))

  @jax.jit
  def train(params):
    def one(carry, _):
      params, state = carry
      value, grads = jax.value_and_grad(loss)(params)
      grads = grads | {'w': jnp.zeros_like(w)}
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(one, (params, tx.init(params)), length=100)

  (params, _), losses = train(params)
  extremes = quantize.fake_quant_params({'w': w}, rules)['w']
  assert losses[-1] < 0.95 * losses[0]
  assert losses[-1] < jnp.mean(jnp.square(extremes - w))


def test_mistakes_with_steps_are_named():
  weights = _weights()
  affine = [('.*/kernel', UNSIGNED)]
  with pytest.raises(ValueError, match='conv/kernel: LSQ .* symmetrically'):
    quantize.init_lsq_params(weights, affine)
  with pytest.raises(ValueError, match='init_lsq_params'):
    quantize.lsq_params(weights, RULES)
  few = quantize.init_lsq_params(weights, [('conv/kernel', SIGNED)])
  with pytest.raises(ValueError, match="'grouped/kernel' has no step"):
    quantize.lsq_params(few, RULES)
  with pytest.raises(ValueError, match="weight rule 'convv/kernel'"):
    quantize.init_lsq_params(weights, [('convv/kernel', SIGNED)])
  rules = [('stack/kernel', QuantSpec(group_size=3))]
  with pytest.raises(ValueError, match='stack/kernel: group_size=3'):
    quantize.init_lsq_params(weights, rules)


# --- activations


def _learning(model, rules, method, **options):
  return adapters.from_linen(
    model,
    interceptors=[quantize.learned_activations(rules, method=method)],
    **options,
  )


@pytest.mark.parametrize('method', ['lsq', 'pact'])
def test_ranges_of_activations_are_parameters_of_their_layers(method):
  model, variables, batch = trained('mlp')
  rules = [('.*', UNSIGNED)]
  forward = _learning(model, rules, method)
  params = quantize.init_learned_activations(forward, variables, batch, rules)
  suffix = {'lsq': 'step', 'pact': 'alpha'}[method]
  old, new = (
    {jax.tree_util.keystr(k, simple=True, separator='/') for k, _ in leaves}
    for leaves in map(
      jax.tree_util.tree_leaves_with_path, (variables['params'], params)
    )
  )
  layers = {name.rsplit('/', 1)[0] for name in old}
  assert new - old == {f'{layer}/input0_{suffix}' for layer in layers}
  x = np.asarray(batch['image']).reshape(8, -1)
  first = min(layers)
  want = 2 * np.abs(x[x != 0]).mean() / np.sqrt(15)
  want = want if method == 'lsq' else x.max()
  got = params[first][f'input0_{suffix}']
  assert got.shape == ()
  np.testing.assert_allclose(got, want, rtol=1e-5)

  def loss(params):
    out = forward({**variables, 'params': params}, batch, train=True)
    return jnp.sum(jnp.square(out.output)), out

  grads, out = jax.jit(jax.grad(loss, has_aux=True))(params)
  # No observer is left in the state of a model that learns its ranges.
  assert 'quant_stats' not in out.model_state
  # PACT's alphas start where nothing is clipped but the largest value.
  reached = layers if method == 'lsq' else [first]
  assert all(jnp.abs(grads[n][f'input0_{suffix}']) > 0 for n in reached)


class _Two(nn.Module):
  """A layer of which input and gradient are easy to write down."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(1, use_bias=False, name='dense')(x)


def test_the_factor_of_an_activation_counts_features_not_examples():
  forward = _learning(_Two(), [('dense', SIGNED)], 'lsq', train_argument=None)
  x = _rng().normal(size=(10, 6)).astype('f')
  s = jnp.float32(0.2)
  params = {'dense': {'kernel': jnp.ones((6, 1)), 'input0_step': s}}

  def loss(params):
    return forward({'params': params}, {'image': x}, train=True).output.sum()

  got = jax.grad(loss)(params)['dense']['input0_step']
  _, _, slope = _numpy_lsq(x, 0.2, -8, 7)
  np.testing.assert_allclose(got, slope.sum() / np.sqrt(6 * 7), rtol=1e-4)


def test_learned_ranges_train_in_a_step_and_become_observed_ones():
  model, variables, batch = trained('cnn')
  batch = {**batch, 'label': jnp.arange(8) % 3}
  rules = [('conv1|head', QuantSpec(narrow=False)), ('conv2|pool', UNSIGNED)]
  weights = [('.*/kernel', quantize.INT8_WEIGHTS)]
  forward = _learning(model, rules, 'lsq')
  params = quantize.init_lsq_params(variables['params'], weights)
  params = quantize.init_learned_activations(
    forward, {**variables, 'params': params}, batch, rules
  )
  objective, tx = objectives.hard_labels(), optax.sgd(0.01)
  train_step = jax.jit(
    step.make_train_step(
      forward,
      objective,
      tx,
      params_fn=lambda p: quantize.lsq_params(p, weights),
    )
  )
  state = step.init_state(
    forward, objective, tx, {**variables, 'params': params}, batch
  )
  losses = []
  for _ in range(4):
    state, metrics = train_step(state, batch, jax.random.key(0))
    losses.append(float(metrics['loss/total']))
  assert losses[-1] < losses[0]
  before, after = (
    p['quant_steps']['conv2']['kernel_step'] for p in (params, state.params)
  )
  assert before.shape == after.shape and jnp.abs(before - after).max() > 0

  rounded = quantize.lsq_params(state.params, weights)
  plain, stats = quantize.learned_ranges(rounded, rules)
  assert jax.tree.structure(plain) == jax.tree.structure(variables['params'])
  observing = adapters.from_linen(
    model,
    interceptors=[
      quantize.quantize_activations(rules, observer=quantize.min_max())
    ],
  )
  want = forward({**state.model_state, 'params': rounded}, batch).output
  state = {**state.model_state, 'quant_stats': stats, 'params': plain}
  np.testing.assert_allclose(
    observing(state, batch).output, want, rtol=1e-4, atol=1e-4
  )


def test_parameters_of_others_are_no_learned_ranges():
  params = {
    'input0_step': jnp.float32(0.5),
    'res_alpha': jnp.float32(2.0),
    'block': {'layer_step': jnp.float32(3.0)},
  }
  rest, stats = quantize.learned_ranges(params, [('.*', UNSIGNED)])
  assert rest == {k: params[k] for k in ('res_alpha', 'block')}
  assert set(stats) == {'input0'}


def test_both_products_of_attention_learn_their_ranges():
  model = models.ViT(3, patch_size=4, width=6, depth=1, heads=2)
  x = jnp.asarray(_rng().normal(size=(2, 8, 8, 3)), jnp.float32)
  variables = adapters.init_linen(model, jax.random.key(0), {'image': x})
  rules = [('.*/context', UNSIGNED), ('.*/scores', SIGNED)]
  forward = _learning(model, rules, 'lsq')
  params = quantize.init_learned_activations(
    forward, variables, {'image': x}, rules
  )
  attention = params['block1']['attention']
  assert set(attention['context']) == {'input0_step', 'input1_step'}
  linen = nn.MultiHeadDotProductAttention(num_heads=2, name='attention')

  class Attends(nn.Module):
    @nn.compact
    def __call__(self, x):
      return linen.clone(parent=self)(x)

  x = x.reshape(2, -1, 6)
  variables = Attends().init(jax.random.key(0), x)
  rules = [('attention/(context|scores)', SIGNED)]
  forward = _learning(Attends(), rules, 'lsq', train_argument=None)
  params = quantize.init_learned_activations(
    forward, variables, {'image': x}, rules
  )
  assert set(params['attention']['scores']) == {'input0_step', 'input1_step'}
  grads = jax.grad(lambda p: forward({'params': p}, {'image': x}).output.sum())(
    params
  )
  assert jnp.abs(grads['attention']['context']['input0_step']) > 0


def test_mistakes_with_learned_activations_are_named():
  model, variables, batch = trained('cnn')
  with pytest.raises(ValueError, match="method 'lsqq'.*mean lsq"):
    quantize.learned_activations([('.*', SIGNED)], method='lsqq')
  with pytest.raises(ValueError, match='PACT is for inputs'):
    quantize.learned_activations([('.*', SIGNED)], method='pact')
  dynamic = QuantSpec(dynamic=True)
  with pytest.raises(ValueError, match='dynamic or has groups'):
    quantize.learned_activations([('.*', dynamic)])
  rules = [('conv1', SIGNED), ('hea', None)]
  with pytest.raises(ValueError, match="rule 'hea' matches nothing"):
    quantize.init_learned_activations(
      _learning(model, rules, 'lsq'), variables, batch, rules
    )
  rules = [('norm1', SIGNED)]
  with pytest.raises(ValueError, match='No layer .* learned range'):
    quantize.init_learned_activations(
      _learning(model, rules, 'lsq'), variables, batch, rules
    )
