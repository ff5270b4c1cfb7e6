"""MobileNetV1 and MobileNetV2 for ImageNet.

Owns the networks of the papers. The variant of MobileNetV2 for small images is
in `cifar_mobilenet`.
"""

import functools

import jax
from flax import linen as nn

from kd_jax.models import layers

# (channels, blocks, stride of the first)
V1_STAGES = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2))
# (expansion, channels, blocks, stride of the first)
V2_STAGES = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)
# The last stage of each resolution, from a quarter of the image's on.
_V1_TAPPED = (2, 3, 4, 5)
_V2_TAPPED = (2, 3, 5, 7)


def make_divisible(channels: float, divisor: int = 8) -> int:
  """The multiple of `divisor` nearest to `channels`, not 10 % below it.

  Args:
    channels: a scaled number of channels, > 0.
    divisor: also the least that is returned.

  Example:
    >>> make_divisible(24 * 0.75), make_divisible(32 * 0.35)
    (24, 16)
  """
  nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
  return nearest + divisor if nearest < 0.9 * channels else nearest


class DepthwiseSeparable(nn.Module):
  """A depthwise 3x3 and a 1x1 convolution, each with BatchNorm and ReLU.

  Attributes:
    width: output channels.
    stride: of the depthwise convolution.
    relu6: whether both activations are cut off at 6.
    dtype: dtype of the computation.
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
    stages = tuple(f'stage{s}_block{V1_STAGES[s - 1][1]}' for s in _V1_TAPPED)
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
    for stage, (width, blocks, stride) in enumerate(V1_STAGES, start=1):
      for block in range(1, blocks + 1):
        x = DepthwiseSeparable(
          make_divisible(width * self.width),
          stride=stride if block == 1 else 1,
          relu6=self.relu6,
          dtype=self.dtype,
          name=f'stage{stage}_block{block}',
        )(x, train)
    return layers.classify(
      x,
      self.num_classes,
      train=train,
      dtype=self.dtype,
      dropout=self.dropout,
    )


class InvertedResidual(nn.Module):
  """Expands by 1x1, filters depthwise by 3x3 and projects by 1x1, linearly.

  The first two have ReLU6; without expansion (1) there is no first one. The
  input is added where asked for.

  Attributes:
    width: output channels.
    expansion: channels inside, in multiples of the input's.
    stride: of the depthwise convolution.
    residual: whether the input is added.
    dtype: dtype of the computation.
  """

  width: int
  expansion: int
  stride: int = 1
  residual: bool = False
  dtype: jax.typing.DTypeLike = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, D] -> [B, H / stride, W / stride, width]`."""
    conv_norm = functools.partial(
      layers.conv_norm, train=train, dtype=self.dtype
    )
    inner = x.shape[-1] * self.expansion
    y = x
    if self.expansion != 1:
      y = nn.relu6(conv_norm(y, 'conv1', 'norm1', inner, 1))
    y = conv_norm(
      y, 'conv2', 'norm2', inner, 3, stride=self.stride, groups=y.shape[-1]
    )
    y = conv_norm(nn.relu6(y), 'conv3', 'norm3', self.width, 1)
    if not self.residual:
      return y
    return layers.Add(name='add')(x, y)


class MobileNetV2(nn.Module):
  """MobileNetV2 for images of 224x224, which become 7x7.

  A 3x3 stem with stride 2, seven stages of inverted residuals, a 1x1
  convolution to 1280 channels, pooling and a linear head.

  Taps: `stem` (before its norm), `stage1_block1`, ..., `stage7_block1`,
  `last` (before its norm), `pool` and `head`.

  Convolutions start He-normal over the fan-out, the head's kernel uniform
  within +-1/sqrt(fan_in) and its bias at 0.

  Attributes:
    num_classes: size of the output; 0 returns the last feature map,
      `[B, H / 32, W / 32, 1280]`.
    width: multiplier of all channels; their numbers become multiples of 8.
      Those of the last convolution grow with it but do not fall below 1280.
    dropout: rate before the head; the published training has 0.2.
    dtype: dtype of the computation; parameters are float32.

  References:
    Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks",
    2018, arXiv:1801.04381.

  Example:
    >>> MobileNetV2(num_classes=10).taps.stages[:2]
    ('stage2_block2', 'stage3_block3')
  """

  num_classes: int = 1000
  width: float = 1.0
  dropout: float = 0.0
  dtype: jax.typing.DTypeLike = 'float32'

  @property
  def taps(self) -> layers.Taps:
    """Four stages' ends, which are linear: no activation follows them."""
    stages = tuple(f'stage{s}_block{V2_STAGES[s - 1][2]}' for s in _V2_TAPPED)
    return layers.Taps(
      stages=stages,
      preactivations=stages,
      norms=tuple(f'{stage}/norm3' for stage in stages),
      **layers.end_taps(self.num_classes),
    )

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, 3]` images -> `[B, num_classes]` logits."""
    conv_norm = functools.partial(
      layers.conv_norm, train=train, dtype=self.dtype
    )
    made = make_divisible(32 * self.width)
    x = nn.relu6(conv_norm(x, 'stem', 'stem_norm', made, 3, stride=2))
    for stage, row in enumerate(V2_STAGES, start=1):
      expansion, width, blocks, stride = row
      for block in range(1, blocks + 1):
        channels = make_divisible(width * self.width)
        x = InvertedResidual(
          channels,
          expansion,
          stride=stride if block == 1 else 1,
          residual=made == channels and (block > 1 or stride == 1),
          dtype=self.dtype,
          name=f'stage{stage}_block{block}',
        )(x, train)
        made = channels
    last = make_divisible(1280 * max(self.width, 1.0))
    x = nn.relu6(conv_norm(x, 'last', 'last_norm', last, 1))
    return layers.classify(
      x,
      self.num_classes,
      train=train,
      dtype=self.dtype,
      dropout=self.dropout,
    )
