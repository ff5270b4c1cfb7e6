"""Residual networks for ImageNet: ResNet-18, 34 and 50.

Owns the four-stage network with the 7x7 stem and the max-pooling. Its blocks
are those of `resnet`: a bottleneck has its stride in the 3x3 convolution,
which the paper has in the first 1x1 (that change is called v1.5).
"""

from collections.abc import Sequence

import jax
from flax import linen as nn

from kd_jax.models import layers
from kd_jax.models.resnet import (
  BasicBlock,
  Bottleneck,
  check_blocks,
  run_stages,
  stage_taps,
)


class ImageNetResNet(nn.Module):
  """A residual network for images of 224x224, which become 7x7.

  A 7x7 stem with stride 2, 3x3 max-pooling with stride 2, and stages whose
  widths double and whose resolution halves from one to the next.

  Taps: `stem` (before its norm), `stage1_block1`, ..., `stage4_block<n>`,
  `pool` and `head`.

  Convolutions start He-normal over the fan-out, the head's kernel uniform
  within +-1/sqrt(fan_in) and its bias at 0.

  Attributes:
    num_classes: size of the output; 0 returns the last feature map,
      `[B, H / 32, W / 32, D]` with D = 8 * width, or 32 * width of
      bottlenecks.
    blocks: blocks of each stage; (2, 2, 2, 2) is ResNet-18, (3, 4, 6, 3)
      ResNet-34 and, with bottlenecks, ResNet-50.
    bottleneck: whether blocks are bottlenecks.
    width: channels of the stem and of the first stage's 3x3 convolutions.
    dropout: rate before the head.
    dtype: dtype of the computation; parameters are float32.

  Raises:
    ValueError: if a stage has no block.

  References:
    He et al., "Deep Residual Learning for Image Recognition", 2015,
    arXiv:1512.03385; Goyal et al., "Accurate, Large Minibatch SGD", 2017,
    arXiv:1706.02677, for the stride of the bottleneck.

  Example:
    >>> ImageNetResNet(num_classes=10).taps.stages[0]
    'stage1_block2'
  """

  num_classes: int = 1000
  blocks: Sequence[int] = (2, 2, 2, 2)
  bottleneck: bool = False
  width: int = 64
  dropout: float = 0.0
  dtype: jax.typing.DTypeLike = 'float32'

  @property
  def taps(self) -> layers.Taps:
    """The stages are the resolutions, a quarter of the image's and below."""
    norm = 'norm3' if self.bottleneck else 'norm2'
    return stage_taps(self.blocks, norm, self.num_classes)

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, 3]` images -> `[B, num_classes]` logits."""
    check_blocks(self)
    x = layers.conv_norm(
      x,
      'stem',
      'stem_norm',
      self.width,
      7,
      stride=2,
      train=train,
      dtype=self.dtype,
    )
    x = nn.relu(x)
    x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    x = run_stages(
      x,
      Bottleneck if self.bottleneck else BasicBlock,
      self.blocks,
      self.width,
      project=self.bottleneck,
      train=train,
      dtype=self.dtype,
    )
    return layers.end(self, x, train=train)
