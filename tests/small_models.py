"""Small models with folded norms and observed ranges, for tests."""

import functools

import jax
import numpy as np
from flax import linen as nn
from quantized_models import INPUTS as INPUTS
from quantized_models import WEIGHTS as WEIGHTS
from quantized_models import Biased, values

from kd_jax import adapters, deploy, models, quantize
from kd_jax.models import layers
from kd_jax.models.mobilenet_v2 import InvertedResidual


class _Inverted(nn.Module):
  """A small MobileNetV2: depthwise convolutions and residual sums."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(8, (3, 3), use_bias=False, name='stem')(x)
    x = nn.relu6(nn.BatchNorm(not train, name='stem_norm')(x))
    for i, stride in enumerate((2, 1), start=1):
      block = InvertedResidual(
        8, 2, stride=stride, residual=stride == 1, name=f'block{i}'
      )
      x = block(x, train)
    return layers.classify(x, 3, train=train, dtype='float32')


MODELS = {
  'mlp': models.MLP(3, hidden=(12, 7)),
  'cnn': models.CNN(3, widths=(4, 5)),
  'biased': Biased(),
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

  variables = values(shapes, rng)
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
