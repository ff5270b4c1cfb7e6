"""Wide residual networks, which normalise before each convolution.

Owns the pre-activation block and the networks WRN-d-k made of it; residual
networks that normalise after the convolution are in `resnet`.
"""

import jax
from flax import linen as nn

from kd_jax.models import layers


class PreactivationBlock(nn.Module):
  """Twice BatchNorm, ReLU and a 3x3 convolution, and a shortcut.

  Where the shape changes, the shortcut is a 1x1 convolution of the first
  ReLU's output; elsewhere it is the block's input.

  Attributes:
    width: output channels.
    stride: of the first convolution and the projection.
    project: whether the shortcut is projected.
    dropout: rate before the second convolution.
    dtype: dtype of the computation.

  References:
    He et al., "Identity Mappings in Deep Residual Networks", 2016,
    arXiv:1603.05027.

  Example:
    >>> block = PreactivationBlock(8, stride=2, project=True)
    >>> x = jax.ShapeDtypeStruct((2, 8, 8, 4), 'float32')
    >>> y, _ = jax.eval_shape(block.init_with_output, jax.random.key(0), x)
    >>> y.shape
    (2, 4, 4, 8)
  """

  width: int
  stride: int = 1
  project: bool = False
  dropout: float = 0.0
  dtype: jax.typing.DTypeLike = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, D] -> [B, H / stride, W / stride, width]`."""

    def conv(x, name, size, stride=1):
      return layers.convolution(
        name, self.width, size, stride=stride, dtype=self.dtype
      )(x)

    def norm_relu(x, name):
      return nn.relu(layers.batch_norm(name, train=train, dtype=self.dtype)(x))

    y = norm_relu(x, 'norm1')
    if self.project:
      x = conv(y, 'conv_shortcut', 1, self.stride)
    y = norm_relu(conv(y, 'conv1', 3, self.stride), 'norm2')
    y = nn.Dropout(self.dropout, deterministic=not train)(y)
    y = conv(y, 'conv2', 3)
    return layers.Add(name='add')(x, y)


def _blocks(depth: int) -> int:
  """The number of blocks of each stage."""
  if depth < 10 or (depth - 4) % 6:
    raise ValueError(
      f'WideResNet: depth={depth} is not 6n + 4 (10, 16, 22, 28, 40, ...).'
    )
  return (depth - 4) // 6


class WideResNet(nn.Module):
  """WRN-d-k: three stages of pre-activation blocks, k times as wide.

  A 3x3 stem of 16 channels, stages of (d - 4) / 6 blocks with 16k, 32k and
  64k channels, a last BatchNorm with ReLU, pooling and a linear head.

  Taps: `stem`, `stage1_block1`, ..., `stage3_block<n>`, `last_norm`, `pool`
  and `head`.

  Convolutions start He-normal over the fan-out, the head's kernel uniform
  within +-1/sqrt(fan_in) and its bias at 0, all as in the published code.

  Attributes:
    num_classes: size of the output; 0 returns the last feature map,
      `[B, H / 4, W / 4, 64k]`, after its norm and ReLU.
    depth: d, 6n + 4, such as 16, 28, 40.
    widen_factor: k.
    dropout: rate before each block's second convolution.
    dtype: dtype of the computation; parameters are float32.

  Raises:
    ValueError: if the depth is not 6n + 4.

  References:
    Zagoruyko and Komodakis, "Wide Residual Networks", 2016, arXiv:1605.07146.

  Example:
    >>> WideResNet(num_classes=10, depth=16).taps.stages
    ('stage1_block2', 'stage2_block2', 'stage3_block2')
  """

  num_classes: int
  depth: int = 40
  widen_factor: int = 2
  dropout: float = 0.0
  dtype: jax.typing.DTypeLike = 'float32'

  @property
  def taps(self) -> layers.Taps:
    """The stages are the sums at the end of each resolution.

    They go on into the next block's BatchNorm, whose output is the tap before
    the activation: unlike in other models, a stage is the input of that norm
    and not the ReLU of `preactivations`. So does the published code.
    """
    count = _blocks(self.depth)
    norms = ('stage2_block1/norm1', 'stage3_block1/norm1', 'last_norm')
    return layers.Taps(
      stages=tuple(f'stage{s}_block{count}' for s in (1, 2, 3)),
      preactivations=norms,
      norms=norms,
      **layers.end_taps(self.num_classes),
    )

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, C]` images -> `[B, num_classes]` logits."""
    blocks = _blocks(self.depth)
    made = 16
    x = layers.convolution('stem', made, 3, dtype=self.dtype)(x)
    for stage in (1, 2, 3):
      for block in range(1, blocks + 1):
        width = 16 * self.widen_factor * 2 ** (stage - 1)
        stride = 2 if stage > 1 and block == 1 else 1
        x = PreactivationBlock(
          width,
          stride=stride,
          project=stride != 1 or made != width,
          dropout=self.dropout,
          dtype=self.dtype,
          name=f'stage{stage}_block{block}',
        )(x, train)
        made = width
    x = layers.batch_norm('last_norm', train=train, dtype=self.dtype)(x)
    return layers.classify(
      nn.relu(x), self.num_classes, train=train, dtype=self.dtype
    )
