"""ShuffleNet V1 and V2 for small images, as distillation papers use them.

Owns both networks and their blocks: a 1x1 stem of 24 channels that keeps the
resolution, then three stages that halve it, so that 32x32 becomes 4x4.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from kd_jax.models import layers

# Channels of the stem.
STEM = 24


def _conv_norm(
  train: bool, dtype: jax.typing.DTypeLike
) -> Callable[..., jax.Array]:
  """Both published networks leave the kernels at PyTorch's initialiser."""
  return functools.partial(
    layers.conv_norm,
    train=train,
    dtype=dtype,
    kernel_init=layers.LECUN_UNIFORM,
  )


def _check_blocks(model: nn.Module, least: int) -> None:
  if len(model.blocks) != len(model.widths):
    raise ValueError(
      f'{type(model).__name__}: blocks={tuple(model.blocks)} and widths='
      f'{tuple(model.widths)} name different numbers of stages.'
    )
  if min(model.blocks, default=0) < least:
    raise ValueError(
      f'{type(model).__name__}: blocks={tuple(model.blocks)}; every stage '
      f'needs at least {least}.'
    )


def _check_groups(widths: Sequence[int], groups: int) -> None:
  """Both kinds of units of a stage must divide into groups."""
  before = STEM
  for width in widths:
    for made in (width - before, width):
      if made < 4 or made % groups or made // 4 % groups:
        raise ValueError(
          f'ShuffleNetV1: widths={tuple(widths)} do not fit groups={groups}: '
          f'the unit that makes {made} channels cannot be grouped.'
        )
    before = width


class ShuffleUnitV1(nn.Module):
  """Grouped 1x1, shuffle, depthwise 3x3 and grouped 1x1, and a shortcut.

  With stride 2 the shortcut is the 3x3 average of the input, put beside the
  result; with stride 1 it is the input, added.

  Attributes:
    width: output channels, those of the shortcut included.
    groups: of the last convolution.
    first_groups: of the first convolution.
    stride: of the depthwise convolution, 1 or 2.
    dtype: dtype of the computation.

  Example:
    >>> block = ShuffleUnitV1(24, groups=2, first_groups=2, stride=2)
    >>> x = jax.ShapeDtypeStruct((2, 8, 8, 8), 'float32')
    >>> y, _ = jax.eval_shape(block.init_with_output, jax.random.key(0), x)
    >>> y.shape
    (2, 4, 4, 24)
  """

  width: int
  groups: int
  first_groups: int
  stride: int = 1
  dtype: jax.typing.DTypeLike = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, D] -> [B, H / stride, W / stride, width]`."""
    conv_norm = _conv_norm(train, self.dtype)
    width = self.width - (x.shape[-1] if self.stride == 2 else 0)
    inner = width // 4
    y = conv_norm(x, 'conv1', 'norm1', inner, 1, groups=self.first_groups)
    y = layers.ChannelShuffle(self.first_groups, name='shuffle')(nn.relu(y))
    y = conv_norm(
      y, 'conv2', 'norm2', inner, 3, stride=self.stride, groups=y.shape[-1]
    )
    y = conv_norm(nn.relu(y), 'conv3', 'norm3', width, 1, groups=self.groups)
    if self.stride == 1:
      return nn.relu(layers.Add(name='add')(x, y))
    x = nn.avg_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    return nn.relu(layers.Concatenate(name='concatenate')(y, x))


class ShuffleNetV1(nn.Module):
  """ShuffleNet V1 for small images.

  Taps: `stem` (before its norm), `stage1_block1`, ..., `pool` and `head`.

  Kernels of convolutions and head start uniform within +-1/sqrt(fan_in), as
  in the published code; the head's bias starts at 0, there it is uniform like
  the kernel.

  Attributes:
    num_classes: size of the output; 0 returns the last feature map,
      `[B, H / 8, W / 8, widths[-1]]`.
    widths: channels of each stage.
    blocks: units of each stage, two or more; the first halves the resolution.
    groups: of the 1x1 convolutions, but for the very first unit's first one.
    dropout: rate before the head.
    dtype: dtype of the computation; parameters are float32.

  Raises:
    ValueError: if a stage has fewer than two units, or the groups do not
      divide the channels of a convolution.

  References:
    Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural
    Network for Mobile Devices", 2017, arXiv:1707.01083; with a ReLU after the
    depthwise convolution, which the paper has not and the published CIFAR
    networks have.

  Example:
    >>> ShuffleNetV1(num_classes=10).taps.stages
    ('stage1_block4', 'stage2_block8', 'stage3_block4')
  """

  num_classes: int
  widths: Sequence[int] = (240, 480, 960)
  blocks: Sequence[int] = (4, 8, 4)
  groups: int = 3
  dropout: float = 0.0
  dtype: jax.typing.DTypeLike = 'float32'

  @property
  def taps(self) -> layers.Taps:
    """The stages are the three resolutions."""
    stages = layers.last_blocks(self.blocks)
    return layers.Taps(
      stages=stages,
      preactivations=tuple(f'{stage}/add' for stage in stages),
      norms=tuple(f'{stage}/norm3' for stage in stages),
      **layers.end_taps(self.num_classes),
    )

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, C]` images -> `[B, num_classes]` logits."""
    _check_blocks(self, least=2)
    _check_groups(self.widths, self.groups)
    x = _conv_norm(train, self.dtype)(x, 'stem', 'stem_norm', STEM, 1)
    x = nn.relu(x)
    for stage, width in enumerate(self.widths, start=1):
      for block in range(1, self.blocks[stage - 1] + 1):
        x = ShuffleUnitV1(
          width,
          groups=self.groups,
          first_groups=1 if stage == block == 1 else self.groups,
          stride=2 if block == 1 else 1,
          dtype=self.dtype,
          name=f'stage{stage}_block{block}',
        )(x, train)
    return layers.end(self, x, train=train)


class ShuffleUnitV2(nn.Module):
  """Half of the channels pass, half are filtered; then both are shuffled.

  With stride 2 both halves are made from the whole input. The ReLU comes
  after the shuffle, which gives the same numbers as one in each branch: what
  passes is not negative.

  Attributes:
    width: output channels, even.
    stride: 1 or 2.
    dtype: dtype of the computation.

  Example:
    >>> block = ShuffleUnitV2(16, stride=2)
    >>> x = jax.ShapeDtypeStruct((2, 8, 8, 4), 'float32')
    >>> y, _ = jax.eval_shape(block.init_with_output, jax.random.key(0), x)
    >>> y.shape
    (2, 4, 4, 16)
  """

  width: int
  stride: int = 1
  dtype: jax.typing.DTypeLike = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, D] -> [B, H / stride, W / stride, width]`.

    With stride 1, `x` has `width` channels and no negative values.
    """
    conv_norm = _conv_norm(train, self.dtype)
    half = self.width // 2
    if self.stride == 1:
      x, y = jnp.split(x, 2, axis=-1)
    else:
      y, channels = x, x.shape[-1]
      x = conv_norm(
        x,
        'conv_shortcut1',
        'norm_shortcut1',
        channels,
        3,
        stride=2,
        groups=channels,
      )
      x = conv_norm(x, 'conv_shortcut2', 'norm_shortcut2', half, 1)
    y = nn.relu(conv_norm(y, 'conv1', 'norm1', half, 1))
    y = conv_norm(
      y, 'conv2', 'norm2', half, 3, stride=self.stride, groups=y.shape[-1]
    )
    y = conv_norm(y, 'conv3', 'norm3', half, 1)
    y = layers.Concatenate(name='concatenate')(x, y)
    return nn.relu(layers.ChannelShuffle(2, name='shuffle')(y))


class ShuffleNetV2(nn.Module):
  """ShuffleNet V2 for small images.

  Taps: `stem` (before its norm), `stage1_block1`, ..., `last` (before its
  norm), `pool` and `head`.

  It starts as `ShuffleNetV1` does.

  Attributes:
    num_classes: size of the output; 0 returns the last feature map,
      `[B, H / 8, W / 8, last_width]`.
    widths: channels of each stage, even; (116, 232, 464) is size 1.
    blocks: units of each stage; the first halves the resolution.
    last_width: channels of the 1x1 convolution before pooling.
    dropout: rate before the head.
    dtype: dtype of the computation; parameters are float32.

  Raises:
    ValueError: if a stage has no unit or an odd width.

  References:
    Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN
    Architecture Design", 2018, arXiv:1807.11164.

  Example:
    >>> ShuffleNetV2(num_classes=10).taps.preactivations[0]
    'stage1_block4/shuffle'
  """

  num_classes: int
  widths: Sequence[int] = (116, 232, 464)
  blocks: Sequence[int] = (4, 8, 4)
  last_width: int = 1024
  dropout: float = 0.0
  dtype: jax.typing.DTypeLike = 'float32'

  @property
  def taps(self) -> layers.Taps:
    """The stages are the three resolutions.

    `norms` is empty: a stage's channels come from several BatchNorms.
    """
    stages = layers.last_blocks(self.blocks)
    return layers.Taps(
      stages=stages,
      preactivations=tuple(f'{stage}/shuffle' for stage in stages),
      norms=(),
      **layers.end_taps(self.num_classes),
    )

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, C]` images -> `[B, num_classes]` logits."""
    _check_blocks(self, least=1)
    if any(width % 2 for width in self.widths):
      raise ValueError(
        f'ShuffleNetV2: widths={tuple(self.widths)} must be even.'
      )
    conv_norm = _conv_norm(train, self.dtype)
    x = nn.relu(conv_norm(x, 'stem', 'stem_norm', STEM, 1))
    for stage, width in enumerate(self.widths, start=1):
      for block in range(1, self.blocks[stage - 1] + 1):
        x = ShuffleUnitV2(
          width,
          stride=2 if block == 1 else 1,
          dtype=self.dtype,
          name=f'stage{stage}_block{block}',
        )(x, train)
    x = nn.relu(conv_norm(x, 'last', 'last_norm', self.last_width, 1))
    return layers.end(self, x, train=train)
