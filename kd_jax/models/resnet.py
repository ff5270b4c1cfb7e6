"""The residual networks for small images of He et al., section 4.2.

Depth 6n + 2: a 3x3 stem, three stages of n basic blocks with widths w, 2w and
4w, the second and third halving the resolution, pooling and a linear head.
"""

import jax
from flax import linen as nn

from kd_jax.models.layers import Add, GlobalAveragePool


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut, projected where shapes change.

  Attributes:
    width: output channels.
    stride: of the first convolution and the projection.
    dtype: dtype of the computation.
  """

  width: int
  stride: int = 1
  dtype: jax.typing.DTypeLike = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, D] -> [B, H / stride, W / stride, width]`."""

    def conv_norm(x, name, size, stride):
      x = nn.Conv(
        self.width,
        (size, size),
        strides=stride,
        padding=size // 2,
        use_bias=False,
        dtype=self.dtype,
        name=f'conv{name}',
      )(x)
      return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        dtype=self.dtype,
        name=f'norm{name}',
      )(x)

    y = nn.relu(conv_norm(x, '1', 3, self.stride))
    y = conv_norm(y, '2', 3, 1)
    if x.shape[-1] != self.width or self.stride != 1:
      x = conv_norm(x, '_shortcut', 1, self.stride)
    return nn.relu(Add(name='add')(x, y))


class CifarResNet(nn.Module):
  """A residual network of depth 6n + 2 for small images.

  Taps: `stem` (before its norm), `stage1_block1`, ..., `stage3_block<n>`,
  `pool` and `head`.

  Attributes:
    num_classes: size of the output.
    depth: 6n + 2, such as 8, 20, 56.
    width: channels of the first stage; the paper's is 16.
    dropout: rate before the head.
    dtype: dtype of the computation; parameters are float32.

  Raises:
    ValueError: if the depth is not 6n + 2.

  References:
    He et al., "Deep Residual Learning for Image Recognition", 2016,
    arXiv:1512.03385; with projection shortcuts.
  """

  num_classes: int
  depth: int = 20
  width: int = 16
  dropout: float = 0.0
  dtype: jax.typing.DTypeLike = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, C]` images -> `[B, num_classes]` logits."""
    if self.depth < 8 or (self.depth - 2) % 6:
      raise ValueError(
        f'CifarResNet: depth={self.depth} is not 6n + 2 (8, 14, 20, ...).'
      )
    x = nn.Conv(
      self.width,
      (3, 3),
      padding=1,
      use_bias=False,
      dtype=self.dtype,
      name='stem',
    )(x)
    x = nn.BatchNorm(
      use_running_average=not train,
      momentum=0.9,
      dtype=self.dtype,
      name='stem_norm',
    )(x)
    x = nn.relu(x)
    for stage in (1, 2, 3):
      for block in range(1, (self.depth - 2) // 6 + 1):
        x = BasicBlock(
          self.width * 2 ** (stage - 1),
          stride=2 if stage > 1 and block == 1 else 1,
          dtype=self.dtype,
          name=f'stage{stage}_block{block}',
        )(x, train)
    x = GlobalAveragePool(name='pool')(x)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x)
