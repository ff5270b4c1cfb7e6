"""Residual networks for small images, of basic blocks and of bottlenecks.

Owns the networks of He et al., section 4.2 (depth 6n + 2: a 3x3 stem, three
stages of n basic blocks with widths w, 2w and 4w, the second and third halving
the resolution) and the four-stage network of bottlenecks with the stem made
for small images; and the blocks and stages that `imagenet_resnet` shares.
Networks that normalise before the convolution are in `wide_resnet`.
"""

import functools
from collections.abc import Sequence

import jax
from flax import linen as nn

from kd_jax.models import layers


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut, projected where shapes change.

  Attributes:
    width: output channels.
    stride: of the first convolution and the projection.
    project: whether the shortcut is projected.
    dtype: dtype of the computation.

  Example:
    >>> block = BasicBlock(8, stride=2, project=True)
    >>> x = jax.ShapeDtypeStruct((2, 8, 8, 4), 'float32')
    >>> y, _ = jax.eval_shape(block.init_with_output, jax.random.key(0), x)
    >>> y.shape
    (2, 4, 4, 8)
  """

  width: int
  stride: int = 1
  project: bool = False
  dtype: jax.typing.DTypeLike = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, D] -> [B, H / stride, W / stride, width]`."""
    conv_norm = functools.partial(
      layers.conv_norm, train=train, dtype=self.dtype
    )
    y = conv_norm(x, 'conv1', 'norm1', self.width, 3, stride=self.stride)
    y = conv_norm(nn.relu(y), 'conv2', 'norm2', self.width, 3)
    if self.project:
      x = conv_norm(
        x, 'conv_shortcut', 'norm_shortcut', self.width, 1, stride=self.stride
      )
    return nn.relu(layers.Add(name='add')(x, y))


class Bottleneck(nn.Module):
  """1x1, 3x3 and 1x1 convolutions and a shortcut, projected where needed.

  The 3x3 convolution has the stride, as in most published code; in the paper
  the first one has it.

  Attributes:
    width: channels of the 3x3 convolution; the output has four times as many.
    stride: of the 3x3 convolution and the projection.
    project: whether the shortcut is projected.
    dtype: dtype of the computation.

  Example:
    >>> block = Bottleneck(8, stride=2, project=True)
    >>> x = jax.ShapeDtypeStruct((2, 8, 8, 4), 'float32')
    >>> y, _ = jax.eval_shape(block.init_with_output, jax.random.key(0), x)
    >>> y.shape
    (2, 4, 4, 32)
  """

  width: int
  stride: int = 1
  project: bool = False
  dtype: jax.typing.DTypeLike = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, D] -> [B, H / stride, W / stride, 4 * width]`."""
    conv_norm = functools.partial(
      layers.conv_norm, train=train, dtype=self.dtype
    )
    out = 4 * self.width
    y = conv_norm(x, 'conv1', 'norm1', self.width, 1)
    y = conv_norm(
      nn.relu(y), 'conv2', 'norm2', self.width, 3, stride=self.stride
    )
    y = conv_norm(nn.relu(y), 'conv3', 'norm3', out, 1)
    if self.project:
      x = conv_norm(
        x, 'conv_shortcut', 'norm_shortcut', out, 1, stride=self.stride
      )
    return nn.relu(layers.Add(name='add')(x, y))


def stage_taps(
  blocks: Sequence[int], norm: str, num_classes: int
) -> layers.Taps:
  """Taps at the last block of every stage.

  Args:
    blocks: blocks of each stage.
    norm: the last BatchNorm of a block's main branch.
    num_classes: of the model.

  Example:
    >>> stage_taps((2, 2), 'norm2', 10).norms
    ('stage1_block2/norm2', 'stage2_block2/norm2')
  """
  last = layers.last_blocks(blocks)
  return layers.Taps(
    stages=last,
    preactivations=tuple(f'{block}/add' for block in last),
    norms=tuple(f'{block}/{norm}' for block in last),
    **layers.end_taps(num_classes),
  )


def check_blocks(model: nn.Module) -> None:
  """Raises ValueError if one of the stages in `model.blocks` has no block.

  Args:
    model: a module with an attribute `blocks`, the number of each stage.

  Raises:
    ValueError: if one of them is below 1, or there are no stages.

  Example:
    >>> check_blocks(CifarBottleneckResNet(num_classes=10, blocks=(1, 0)))
    Traceback (most recent call last):
    ...
    ValueError: CifarBottleneckResNet: blocks=(1, 0); every stage needs ...
  """
  if min(model.blocks, default=0) < 1:
    raise ValueError(
      f'{type(model).__name__}: blocks={tuple(model.blocks)}; every stage '
      'needs at least one block.'
    )


def run_stages(
  x: jax.Array,
  block_class: type[BasicBlock] | type[Bottleneck],
  blocks: Sequence[int],
  width: int,
  *,
  project: bool,
  train: bool,
  dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """The stages of a residual network, inside its compact method.

  Widths double and the resolution halves from one stage to the next, whose
  first block projects its shortcut.

  Args:
    x: `[B, H, W, D]`, what the stem made.
    block_class: of all blocks.
    blocks: blocks of each stage.
    width: of the first stage's blocks.
    project: whether the first block of all projects too, as it must where it
      changes the channels.
    train: whether BatchNorm normalises with the batch's statistics.
    dtype: of the computation.

  Returns:
    The last feature map.
  """
  for stage, count in enumerate(blocks, start=1):
    for block in range(1, count + 1):
      x = block_class(
        width * 2 ** (stage - 1),
        stride=2 if stage > 1 and block == 1 else 1,
        project=block == 1 and (stage > 1 or project),
        dtype=dtype,
        name=f'stage{stage}_block{block}',
      )(x, train)
  return x


def _blocks(depth: int) -> int:
  """The number of basic blocks of each stage."""
  if depth < 8 or (depth - 2) % 6:
    raise ValueError(
      f'CifarResNet: depth={depth} is not 6n + 2 (8, 14, 20, ...).'
    )
  return (depth - 2) // 6


class CifarResNet(nn.Module):
  """A residual network of depth 6n + 2 for small images.

  Taps: `stem` (before its norm), `stage1_block1`, ..., `stage3_block<n>`,
  `pool` and `head`.

  Convolutions start He-normal over the fan-out, the head's kernel uniform
  within +-1/sqrt(fan_in), as in the published code; the head's bias starts at
  0, there it is uniform like the kernel.

  Attributes:
    num_classes: size of the output; 0 returns the last feature map,
      `[B, H / 4, W / 4, 4 * width]`.
    depth: 6n + 2, such as 8, 20, 56.
    width: channels of the first stage; the paper's is 16.
    stem_width: channels of the stem, `width` when None. The networks called
      x4 have 64 channels in the first stage and 32 in the stem.
    dropout: rate before the head.
    dtype: dtype of the computation; parameters are float32.

  Raises:
    ValueError: if the depth is not 6n + 2.

  References:
    He et al., "Deep Residual Learning for Image Recognition", 2015,
    arXiv:1512.03385; with projection shortcuts.

  Example:
    >>> CifarResNet(num_classes=10, depth=20).taps.stages
    ('stage1_block3', 'stage2_block3', 'stage3_block3')
  """

  num_classes: int
  depth: int = 20
  width: int = 16
  stem_width: int | None = None
  dropout: float = 0.0
  dtype: jax.typing.DTypeLike = 'float32'

  @property
  def taps(self) -> layers.Taps:
    """The stages are the three resolutions."""
    blocks = [_blocks(self.depth)] * 3
    return stage_taps(blocks, 'norm2', self.num_classes)

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, C]` images -> `[B, num_classes]` logits."""
    blocks = _blocks(self.depth)
    made = self.width if self.stem_width is None else self.stem_width
    x = layers.conv_norm(
      x, 'stem', 'stem_norm', made, 3, train=train, dtype=self.dtype
    )
    x = run_stages(
      nn.relu(x),
      BasicBlock,
      [blocks] * 3,
      self.width,
      project=made != self.width,
      train=train,
      dtype=self.dtype,
    )
    return layers.end(self, x, train=train)


class CifarBottleneckResNet(nn.Module):
  """ResNet-50 for small images: a 3x3 stem with stride 1 and no max-pooling.

  Stages of bottlenecks whose widths double and whose resolution halves from
  one to the next.

  Taps: `stem` (before its norm), `stage1_block1`, ..., `pool` and `head`.

  It starts as `CifarResNet` does.

  Attributes:
    num_classes: size of the output; 0 returns the last feature map,
      `[B, H / 8, W / 8, 32 * width]` with four stages.
    blocks: bottlenecks of each stage; (3, 4, 6, 3) is ResNet-50.
    width: channels of the stem and inside the first stage's bottlenecks.
    dropout: rate before the head.
    dtype: dtype of the computation; parameters are float32.

  Raises:
    ValueError: if a stage has no block.

  References:
    He et al., "Deep Residual Learning for Image Recognition", 2015,
    arXiv:1512.03385.

  Example:
    >>> CifarBottleneckResNet(num_classes=10).taps.norms[0]
    'stage1_block3/norm3'
  """

  num_classes: int
  blocks: Sequence[int] = (3, 4, 6, 3)
  width: int = 64
  dropout: float = 0.0
  dtype: jax.typing.DTypeLike = 'float32'

  @property
  def taps(self) -> layers.Taps:
    """The stages are the four resolutions."""
    return stage_taps(self.blocks, 'norm3', self.num_classes)

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, C]` images -> `[B, num_classes]` logits."""
    check_blocks(self)
    x = layers.conv_norm(
      x, 'stem', 'stem_norm', self.width, 3, train=train, dtype=self.dtype
    )
    x = run_stages(
      nn.relu(x),
      Bottleneck,
      self.blocks,
      self.width,
      # From w to 4w channels, though the resolution stays.
      project=True,
      train=train,
      dtype=self.dtype,
    )
    return layers.end(self, x, train=train)
