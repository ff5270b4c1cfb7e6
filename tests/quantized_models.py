"""Models with values, for the tests of quantization."""

import jax
import numpy as np
from flax import linen as nn

from kd_jax import adapters, models, quantize

WEIGHTS = [('.*/kernel', quantize.INT8_WEIGHTS)]
INPUTS = [('.*', quantize.INT8_ACTIVATIONS)]


class Biased(nn.Module):
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
  'biased': Biased(),
  'vit': models.ViT(3, patch_size=3, width=8, depth=2, heads=2),
}


def trained(name, size=6):
  """Variables with statistics and norms that are not those of a new model."""
  model, rng = MODELS[name], np.random.default_rng(0)
  batch = {'image': rng.normal(size=(8, size, size, 1)).astype('f') + 0.3}
  shapes = jax.eval_shape(
    lambda: adapters.init_linen(model, jax.random.key(0), batch)
  )

  return model, values(shapes, rng), batch


def values(shapes, rng):
  """Values for the shapes of variables, with norms that do something."""

  def fill(path, x):
    noise = rng.normal(size=x.shape).astype('f')
    if path[-1].key == 'kernel':
      return noise / np.sqrt(np.prod(x.shape[:-1]), dtype='f')
    if path[-1].key == 'var':
      return np.exp(0.5 * noise)
    return 0.3 * noise + (path[-1].key == 'scale')

  return jax.tree_util.tree_map_with_path(fill, shapes)


def fold(model, variables, batch):
  """The folded variables, and which norms were folded."""
  norms = quantize.foldable_batch_norms(
    lambda i: adapters.from_linen(model, interceptors=[i]), variables, batch
  )
  fold = jax.jit(lambda v: quantize.fold_batch_norm(v, norms))
  return fold(variables), norms


def watching(model, rules=INPUTS, **options):
  """A forward whose activations are fake-quantized."""
  return adapters.from_linen(
    model, interceptors=[quantize.quantize_activations(rules, **options)]
  )
