"""MobileNetV1 for ImageNet, and how its family rounds numbers of channels.

Owns the network of the paper. MobileNetV2 is in `mobilenet_v2`.
"""

import functools

import jax
from flax import linen as nn

from kd_jax.models import layers

# (channels, blocks, stride of the first)
STAGES = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2))
# The last stage of each resolution, from a quarter of the image's on.
_TAPPED = (2, 3, 4, 5)


def make_divisible(channels: float) -> int:
  """The multiple of 8 nearest to `channels`, not 10 % below it; 8 at least.

  Args:
    channels: a scaled number of channels, > 0.

  Example:
    >>> make_divisible(24 * 0.75), make_divisible(32 * 0.35)
    (24, 16)
  """
  nearest = max(8, int(channels + 4) // 8 * 8)
  return nearest + 8 if nearest < 0.9 * channels else nearest


class DepthwiseSeparable(nn.Module):
  """A depthwise 3x3 and a 1x1 convolution, each with BatchNorm and ReLU.

  Attributes:
    width: output channels.
    stride: of the depthwise convolution.
    relu6: whether both activations are cut off at 6.
    dtype: dtype of the computation.

  Example:
    >>> x = jax.ShapeDtypeStruct((2, 8, 8, 4), 'float32')
    >>> shapes = jax.eval_shape(
    ...   DepthwiseSeparable(16).init, jax.random.key(0), x)
    >>> [shapes['params'][f'conv{i}']['kernel'].shape for i in (1, 2)]
    [(3, 3, 1, 4), (1, 1, 4, 16)]
  """

  width: int
  stride: int = 1
  relu6: bool = False
  dtype: jax.typing.DTypeLike = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, D] -> [B, H / stride, W / stride, width]`."""
    conv_norm = functools.partial(
      layers.conv_norm, train=train, dtype=self.dtype
    )
    relu = nn.relu6 if self.relu6 else nn.relu
    inner = x.shape[-1]
    x = conv_norm(
      x, 'conv1', 'norm1', inner, 3, stride=self.stride, groups=inner
    )
    return relu(conv_norm(relu(x), 'conv2', 'norm2', self.width, 1))


class MobileNetV1(nn.Module):
  """MobileNet for images of 224x224, which become 7x7.

  A 3x3 stem with stride 2 and five stages of depthwise separable convolutions.

  Taps: `stem` (before its norm), `stage1_block1`, ..., `stage5_block2`, `pool`
  and `head`.

  Convolutions start He-normal over the fan-out, the head's kernel uniform
  within +-1/sqrt(fan_in) and its bias at 0.

  Attributes:
    num_classes: size of the output; 0 returns the last feature map,
      `[B, H / 32, W / 32, 1024 * width]`.
    width: multiplier of all channels; their numbers become multiples of 8.
    relu6: whether activations are cut off at 6, as in weights that were
      trained for integers and in timm's; the paper has ReLU.
    dropout: rate before the head.
    dtype: dtype of the computation; parameters are float32.

  References:
    Howard et al., "MobileNets: Efficient Convolutional Neural Networks for
    Mobile Vision Applications", 2017, arXiv:1704.04861.

  Example:
    >>> MobileNetV1(num_classes=10).taps.stages[:2]
    ('stage2_block2', 'stage3_block2')
  """

  num_classes: int = 1000
  width: float = 1.0
  relu6: bool = False
  dropout: float = 0.0
  dtype: jax.typing.DTypeLike = 'float32'

  @property
  def taps(self) -> layers.Taps:
    """Four stages; the first has half the image's resolution and is left."""
    stages = tuple(f'stage{s}_block{STAGES[s - 1][1]}' for s in _TAPPED)
    norms = tuple(f'{stage}/norm2' for stage in stages)
    return layers.Taps(
      stages=stages,
      preactivations=norms,
      norms=norms,
      **layers.end_taps(self.num_classes),
    )

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, 3]` images -> `[B, num_classes]` logits."""
    x = layers.conv_norm(
      x,
      'stem',
      'stem_norm',
      make_divisible(32 * self.width),
      3,
      stride=2,
      train=train,
      dtype=self.dtype,
    )
    x = nn.relu6(x) if self.relu6 else nn.relu(x)
    for stage, (width, blocks, stride) in enumerate(STAGES, start=1):
      for block in range(1, blocks + 1):
        x = DepthwiseSeparable(
          make_divisible(width * self.width),
          stride=stride if block == 1 else 1,
          relu6=self.relu6,
          dtype=self.dtype,
          name=f'stage{stage}_block{block}',
        )(x, train)
    return layers.end(self, x, train=train)
