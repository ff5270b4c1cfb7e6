"""Small models with folded norms and observed ranges, for tests."""

import functools

import jax
import numpy as np
from flax import linen as nn

from kd_jax import adapters, deploy, models, quantize
from kd_jax.models import layers
from kd_jax.models.cifar_mobilenet import InvertedResidual

WEIGHTS = [('.*/kernel', quantize.INT8_WEIGHTS)]
INPUTS = [('.*', quantize.INT8_ACTIVATIONS)]


class _Inverted(nn.Module):
  """A small MobileNetV2: depthwise convolutions and residual sums."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(8, (3, 3), use_bias=False, name='stem')(x)
    x = nn.relu6(nn.BatchNorm(not train, name='stem_norm')(x))
    for i, stride in enumerate((2, 1), start=1):
      x = InvertedResidual(8, 2, stride=stride, name=f'block{i}')(x, train)
    return layers.classify(x, 3, train=train, dtype='float32')


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
  'mlp': models.MLP(3, hidden=(12, 7)),
  'cnn': models.CNN(3, widths=(4, 5)),
  'biased': _Biased(),
  'resnet': models.CifarResNet(3, depth=8, width=4),
  'mobilenet': _Inverted(),
  'shufflenet': models.ShuffleNetV2(
    3, widths=(12, 24), blocks=(2, 1), last_width=16
  ),
  'vit': models.ViT(3, patch_size=4, width=12, depth=2, heads=2, mlp_ratio=2),
}


@functools.cache
def calibrated(name):
  """A folded model with observed ranges, and a batch it was not observed on."""
  model, rng = MODELS[name], np.random.default_rng(0)
  batches = [
    {'image': (rng.normal(size=(8, 8, 8, 3)) + 0.3).astype('f')}
    for _ in range(2)
  ]
  shapes = jax.eval_shape(
    lambda: adapters.init_linen(model, jax.random.key(0), batches[0])
  )

  def fill(path, x):
    noise = rng.normal(size=x.shape).astype('f')
    if path[-1].key == 'kernel':
      return noise / np.sqrt(np.prod(x.shape[:-1]), dtype='f')
    if path[-1].key == 'var':
      return np.exp(0.5 * noise)
    return 0.3 * noise + (path[-1].key == 'scale')

  variables = jax.tree_util.tree_map_with_path(fill, shapes)
  variables = deploy.fold(model, variables, batches[0])
  observed = adapters.from_linen(
    model,
    interceptors=[
      quantize.skip_folded_batch_norms,
      quantize.quantize_activations(INPUTS),
    ],
    train_argument=None,
  )
  observe = jax.jit(lambda v, b: observed(v, b, train=True).model_state)
  return model, {**variables, **observe(variables, batches[0])}, batches[1]
