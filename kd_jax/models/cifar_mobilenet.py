"""MobileNetV2 for small images, as distillation papers use it on CIFAR.

Owns that variant only: its stem and strides differ from the ImageNet network,
it has ReLU in place of ReLU6, and also its first blocks have an expansion
convolution.
"""

import functools

import jax
from flax import linen as nn

from kd_jax.models import layers

# (expansion or None for the model's, channels, blocks, stride of the first)
STAGES = (
  (1, 16, 1, 1),
  (None, 24, 2, 1),
  (None, 32, 3, 2),
  (None, 64, 4, 2),
  (None, 96, 3, 1),
  (None, 160, 3, 2),
  (None, 320, 1, 1),
)
# The stages that are tapped, as in the published code.
_TAPPED = (2, 3, 5, 7)


class InvertedResidual(nn.Module):
  """Expands by 1x1, filters depthwise by 3x3 and projects by 1x1, linearly.

  The input may be added; the network does so where no shape changes.

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
    y = nn.relu(conv_norm(x, 'conv1', 'norm1', inner, 1))
    y = conv_norm(
      y, 'conv2', 'norm2', inner, 3, stride=self.stride, groups=y.shape[-1]
    )
    y = conv_norm(nn.relu(y), 'conv3', 'norm3', self.width, 1)
    if not self.residual:
      return y
    return layers.Add(name='add')(x, y)


class CifarMobileNetV2(nn.Module):
  """MobileNetV2 for small images: 32x32 becomes 2x2.

  A 3x3 stem with stride 2, seven stages of inverted residuals, a 1x1
  convolution to 1280 channels, pooling and a linear head.

  Taps: `stem` (before its norm), `stage1_block1`, ..., `stage7_block1`,
  `last` (before its norm), `pool` and `head`.

  Convolutions start He-normal over the fan-out, as in the published code; the
  head's kernel starts uniform within +-1/sqrt(fan_in), there normal with
  deviation 0.01.

  Attributes:
    num_classes: size of the output; 0 returns the last feature map,
      `[B, H / 16, W / 16, 1280]`.
    width: multiplier of all channels, rounded down; those of the last
      convolution grow with it but do not fall below 1280.
    expansion: channels inside the blocks, in multiples of their input's; the
      first stage's do not expand.
    dropout: rate before the head.
    dtype: dtype of the computation; parameters are float32.

  Raises:
    ValueError: if a width is too small for a channel in every layer.

  References:
    Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks",
    2018, arXiv:1801.04381; and Tian et al., "Contrastive Representation
    Distillation", 2020, arXiv:1910.10699, for this variant.

  Example:
    >>> CifarMobileNetV2(num_classes=10).taps.stages[:2]
    ('stage2_block2', 'stage3_block3')
  """

  num_classes: int
  width: float = 0.5
  expansion: int = 6
  dropout: float = 0.0
  dtype: jax.typing.DTypeLike = 'float32'

  @property
  def taps(self) -> layers.Taps:
    """Four stages' ends, which are linear: no activation follows them."""
    stages = tuple(f'stage{s}_block{STAGES[s - 1][2]}' for s in _TAPPED)
    return layers.Taps(
      stages=stages,
      preactivations=stages,
      norms=tuple(f'{stage}/norm3' for stage in stages),
      **layers.end_taps(self.num_classes),
    )

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, C]` images -> `[B, num_classes]` logits."""
    if int(16 * self.width) < 1:
      raise ValueError(
        f'CifarMobileNetV2: width={self.width} leaves no channel; it must be '
        'at least 1/16.'
      )
    conv_norm = functools.partial(
      layers.conv_norm, train=train, dtype=self.dtype
    )
    made = int(32 * self.width)
    x = conv_norm(x, 'stem', 'stem_norm', made, 3, stride=2)
    x = nn.relu(x)
    for stage, (expansion, width, blocks, stride) in enumerate(STAGES, start=1):
      for block in range(1, blocks + 1):
        channels = int(width * self.width)
        x = InvertedResidual(
          channels,
          self.expansion if expansion is None else expansion,
          stride=stride if block == 1 else 1,
          residual=made == channels and (block > 1 or stride == 1),
          dtype=self.dtype,
          name=f'stage{stage}_block{block}',
        )(x, train)
        made = channels
    last = int(1280 * max(self.width, 1.0))
    x = nn.relu(conv_norm(x, 'last', 'last_norm', last, 1))
    return layers.classify(
      x,
      self.num_classes,
      train=train,
      dtype=self.dtype,
      dropout=self.dropout,
    )
