"""MobileNetV2, for ImageNet and as distillation papers use it on CIFAR.

Owns the inverted residual and both networks made of it. That for small images
keeps the resolution in its second stage, has ReLU in place of ReLU6 and an
expanding convolution in its first block too, and rounds channels down.
MobileNetV1 is in `mobilenet`.
"""

import functools
from collections.abc import Callable, Sequence

import jax
from flax import linen as nn

from kd_jax.models import layers
from kd_jax.models.mobilenet import make_divisible

# (expansion, channels, blocks, stride of the first); see `InvertedResidual`.
STAGES = (
  (0, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)
# The last stage of each resolution, from a quarter of the image's on; on CIFAR
# the same are tapped, as in the published code.
_TAPPED = (2, 3, 5, 7)


class InvertedResidual(nn.Module):
  """Expands by 1x1, filters depthwise by 3x3 and projects by 1x1, linearly.

  Attributes:
    width: output channels.
    expansion: channels inside, in multiples of the input's; 0 leaves out the
      first convolution.
    stride: of the depthwise convolution.
    residual: whether the input is added, which is so where no shape changes.
    relu6: whether the two activations are cut off at 6.
    dtype: dtype of the computation.

  Example:
    >>> x = jax.ShapeDtypeStruct((2, 8, 8, 4), 'float32')
    >>> block = InvertedResidual(16, expansion=6, stride=2)
    >>> y, variables = jax.eval_shape(
    ...   block.init_with_output, jax.random.key(0), x)
    >>> y.shape, variables['params']['conv2']['kernel'].shape
    ((2, 4, 4, 16), (3, 3, 1, 24))
  """

  width: int
  expansion: int
  stride: int = 1
  residual: bool = False
  relu6: bool = False
  dtype: jax.typing.DTypeLike = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, D] -> [B, H / stride, W / stride, width]`."""
    conv_norm = functools.partial(
      layers.conv_norm, train=train, dtype=self.dtype
    )
    relu = nn.relu6 if self.relu6 else nn.relu
    inner = x.shape[-1] * (self.expansion or 1)
    y = x
    if self.expansion:
      y = relu(conv_norm(y, 'conv1', 'norm1', inner, 1))
    y = conv_norm(
      y, 'conv2', 'norm2', inner, 3, stride=self.stride, groups=y.shape[-1]
    )
    y = conv_norm(relu(y), 'conv3', 'norm3', self.width, 1)
    if not self.residual:
      return y
    return layers.Add(name='add')(x, y)


def _taps(num_classes: int) -> layers.Taps:
  """Four stages' ends, which are linear: no activation follows them."""
  blocks = [blocks for _, _, blocks, _ in STAGES]
  ends = layers.last_blocks(blocks)
  stages = tuple(ends[s - 1] for s in _TAPPED)
  return layers.Taps(
    stages=stages,
    preactivations=stages,
    norms=tuple(f'{stage}/norm3' for stage in stages),
    **layers.end_taps(num_classes),
  )


def _run(
  model: 'MobileNetV2 | CifarMobileNetV2',
  x: jax.Array,
  stages: Sequence[tuple[int, int, int, int]],
  scaled: Callable[[int], int],
  last: int,
  *,
  relu6: bool,
  train: bool,
) -> jax.Array:
  """All layers of either network, inside its compact method.

  Args:
    model: the network.
    x: images.
    stages: rows as those of `STAGES`.
    scaled: channels of the table -> channels of the network.
    last: channels of the last convolution.
    relu6: whether activations are cut off at 6.
    train: whether BatchNorm normalises with the batch's statistics.
  """
  conv_norm = functools.partial(
    layers.conv_norm, train=train, dtype=model.dtype
  )
  relu = nn.relu6 if relu6 else nn.relu
  made = scaled(32)
  x = relu(conv_norm(x, 'stem', 'stem_norm', made, 3, stride=2))
  for stage, (expansion, width, blocks, stride) in enumerate(stages, start=1):
    channels = scaled(width)
    for block in range(1, blocks + 1):
      x = InvertedResidual(
        channels,
        expansion,
        stride=stride if block == 1 else 1,
        residual=made == channels and (block > 1 or stride == 1),
        relu6=relu6,
        dtype=model.dtype,
        name=f'stage{stage}_block{block}',
      )(x, train)
      made = channels
  x = relu(conv_norm(x, 'last', 'last_norm', last, 1))
  return layers.end(model, x, train=train)


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
    return _taps(self.num_classes)

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, 3]` images -> `[B, num_classes]` logits."""
    return _run(
      self,
      x,
      STAGES,
      lambda channels: make_divisible(channels * self.width),
      make_divisible(1280 * max(self.width, 1.0)),
      relu6=True,
      train=train,
    )


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
    Distillation", 2019, arXiv:1910.10699, for this variant.

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
    return _taps(self.num_classes)

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, C]` images -> `[B, num_classes]` logits."""
    if int(16 * self.width) < 1:
      raise ValueError(
        f'CifarMobileNetV2: width={self.width} leaves no channel; it must be '
        'at least 1/16.'
      )
    first, second, *others = STAGES
    # Expanded by 1, and without a stride.
    stages = [(1, *first[1:]), (self.expansion, *second[1:3], 1)]
    stages += [(self.expansion, *row[1:]) for row in others]
    return _run(
      self,
      x,
      stages,
      lambda channels: int(channels * self.width),
      int(1280 * max(self.width, 1.0)),
      relu6=False,
      train=train,
    )
