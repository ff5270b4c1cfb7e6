"""Folding BatchNorm, and training as if it were folded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from quantized_models import fold, trained

from kd_jax import adapters, objectives, quantize, step
from kd_jax.quantize import QuantSpec
from kd_jax.quantize.fold import FoldableNorm

FOLDABLE = {'cnn': 2, 'resnet': 9, 'biased': 2}


@pytest.mark.parametrize('name', FOLDABLE)
def test_a_folded_model_computes_the_same(name):
  model, variables, batch = trained(name)
  folded, norms = fold(model, variables, batch)
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
  folded, norms = fold(Shared(), variables, x)
  assert norms == {}
  assert jax.tree.structure(folded) == jax.tree.structure(dict(variables))


@pytest.mark.parametrize('how', ['keyword', 'list'])
def test_a_second_reader_is_seen_however_it_is_called(how):
  class Sum(nn.Module):
    def __call__(self, xs):
      return sum(xs)

  class Gated(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      h = nn.Dense(3, name='dense')(x)
      n = nn.BatchNorm(not train, name='norm')(x=h)
      if how == 'list':
        return Sum()([n, h])
      return n * nn.Dense(3, name='gate')(inputs=h)

  x = jnp.ones((1, 2))
  variables = Gated().init(jax.random.key(0), x)
  assert _norms_of(Gated(), variables, {'image': x}) == {}


def test_a_norm_whose_input_is_named_is_folded():
  class Named(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      h = nn.Dense(3, name='dense')(inputs=x)
      return nn.BatchNorm(not train, name='norm')(x=h)

  x = jnp.ones((1, 2))
  variables = Named().init(jax.random.key(0), x)
  folded, norms = fold(Named(), variables, {'image': x})
  assert norms == {'dense': FoldableNorm('norm', 1e-5)}
  skipping = adapters.from_linen(
    Named(), interceptors=[quantize.skip_folded_batch_norms]
  )
  got = skipping(folded, {'image': x}).output
  want = Named().apply(variables, x)
  np.testing.assert_allclose(got, want, rtol=1e-5)


# --- training as if it were folded


def _norms_of(model, variables, batch):
  return quantize.foldable_batch_norms(
    lambda i: adapters.from_linen(model, interceptors=[i]), variables, batch
  )


@pytest.mark.parametrize('bits', [4, 8])
def test_rounding_per_channel_before_folding_is_rounding_after_it(bits):
  """Q(w g) / g = Q(w): the codes are the same, but for the sign of g."""
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=(3, 3, 4, 6)), jnp.float32)
  gain = rng.choice([-1, 1], 6) * np.exp(rng.normal(size=6))
  gain = jnp.asarray(gain, jnp.float32)[None, None, None]
  spec = QuantSpec(bits=bits, axis=-1)

  def codes(w):
    return quantize.quantize(w, *quantize.weight_scale(w, spec), spec)

  before, after = codes(w), codes(w * gain) * jnp.sign(gain).astype(jnp.int8)
  # Values between two codes may fall to either side by an error of rounding.
  assert jnp.mean(before != after) < 2e-3
  assert jnp.abs(before.astype(int) - after.astype(int)).max() <= 1
  # With powers of two nothing is rounded twice, and they are equal.
  powers = jnp.sign(gain) * 2.0 ** jnp.round(jnp.log2(jnp.abs(gain)))
  rounded = quantize.fake_quant_params({'w': w * powers}, [('w', spec)])['w']
  want = quantize.fake_quant_params({'w': w}, [('w', spec)])['w']
  np.testing.assert_array_equal(rounded / powers, want)


SPECS = {
  'tensor': QuantSpec(),
  'groups': QuantSpec(bits=4, group_size=1),
  'affine': QuantSpec(symmetric=False, narrow=False),
}


@pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)
@pytest.mark.parametrize('name', ['cnn', 'biased'])
def test_training_sees_the_weights_that_folding_gives(name, spec):
  model, variables, batch = trained(name)
  norms = _norms_of(model, variables, batch)
  rules = [('head/kernel', None), ('.*/kernel', spec)]
  simulated = quantize.simulate_folding(variables, norms, rules)
  folded = quantize.fold_batch_norm(variables, norms)
  rounded = quantize.fake_quant_params(folded['params'], rules)
  skipping = adapters.from_linen(
    model, interceptors=[quantize.skip_folded_batch_norms]
  )
  plain = adapters.from_linen(model)
  want, got, other = jax.jit(
    lambda f, s, v: (
      skipping(f, batch).output,
      plain(s, batch).output,
      plain(v, batch).output,
    )
  )(
    {**folded, 'params': rounded},
    simulated,
    {
      **variables,
      'params': quantize.fake_quant_params(variables['params'], rules),
    },
  )
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
  # Rounding the weights themselves is something else.
  assert jnp.abs(other - want).max() > 10 * jnp.abs(got - want).max()


def test_a_channel_that_its_norm_cancels_keeps_its_weights():
  model, variables, batch = trained('cnn')
  norms = _norms_of(model, variables, batch)
  scale = jnp.asarray(variables['params']['norm1']['scale']).at[0].set(0.0)
  params = {
    **variables['params'],
    'norm1': {**variables['params']['norm1'], 'scale': scale},
  }
  variables = {**variables, 'params': params}
  rules = [('.*/kernel', QuantSpec())]

  def kernel(variables):
    params = quantize.simulate_folding(variables, norms, rules)['params']
    return params['conv1']['kernel']

  got = kernel(variables)
  np.testing.assert_array_equal(got[..., 0], params['conv1']['kernel'][..., 0])
  assert np.isfinite(got).all()


def test_the_gradient_of_simulated_folding_is_straight_through():
  model, variables, batch = trained('cnn')
  norms = _norms_of(model, variables, batch)
  rules = [('.*/kernel', QuantSpec())]

  def total(params):
    out = quantize.simulate_folding(
      {**variables, 'params': params}, norms, rules
    )
    return sum(jnp.sum(v) for v in jax.tree.leaves(out['params']))

  grads = jax.jit(jax.grad(total))(variables['params'])
  for gradient in jax.tree.leaves(grads):
    np.testing.assert_allclose(gradient, 1.0, rtol=1e-5)


def test_a_student_function_trains_as_if_folded():
  model, variables, batch = trained('cnn')
  batch = {**batch, 'label': jnp.arange(8) % 3}
  norms = _norms_of(model, variables, batch)
  rules = [('.*/kernel', QuantSpec(bits=4))]
  plain = adapters.from_linen(model)

  def student_fn(variables, batch, rng=None, *, train=False):
    variables = quantize.simulate_folding(variables, norms, rules)
    return plain(variables, batch, rng, train=train)

  objective, tx = objectives.hard_labels(), optax.sgd(0.05)
  train_step = jax.jit(step.make_train_step(student_fn, objective, tx))
  state = step.init_state(student_fn, objective, tx, variables, batch)
  losses = []
  for _ in range(4):
    state, metrics = train_step(state, batch, jax.random.key(0))
    losses.append(float(metrics['loss/total']))
  assert losses[-1] < losses[0]


def test_scanned_layers_are_folded_layer_by_layer():
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(2, 5, 3)).astype('f')
  norm = rng.uniform(0.5, 2, size=(4, 2, 3)).astype('f')
  variables = {
    'params': {
      'dense': {'kernel': kernel},
      'norm': {'scale': norm[0], 'bias': norm[1]},
    },
    'batch_stats': {'norm': {'mean': norm[2], 'var': norm[3]}},
  }
  norms = {'dense': FoldableNorm('norm', 1e-5)}
  folded = quantize.fold_batch_norm(variables, norms)
  for i in range(2):
    layer = jax.tree.map(lambda v, i=i: v[i], variables)
    want = quantize.fold_batch_norm(layer, norms)['params']['dense']
    for key, value in want.items():
      np.testing.assert_allclose(
        folded['params']['dense'][key][i], value, rtol=1e-6
      )
