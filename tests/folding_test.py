"""Folding BatchNorm, and training as if it were folded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from quantized_models import fold, trained

from kd_jax import adapters, quantize

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
