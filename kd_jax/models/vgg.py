"""VGG with BatchNorm for small images.

Owns the variant that distillation papers use on CIFAR: one linear layer after
global pooling, and a resolution that halves three times at 32x32.
"""

import jax
from flax import linen as nn

from kd_jax.models import layers

# Convolutions of each stage.
STAGES = {
  8: (1, 1, 1, 1, 1),
  11: (1, 1, 2, 2, 2),
  13: (2, 2, 2, 2, 2),
  16: (2, 2, 3, 3, 3),
  19: (2, 2, 4, 4, 4),
}


class VGGStage(nn.Module):
  """3x3 convolutions of one width, each with BatchNorm and ReLU.

  Attributes:
    width: channels.
    convolutions: how many.
    dtype: dtype of the computation.

  Example:
    >>> block = VGGStage(8, convolutions=2)
    >>> x = jax.ShapeDtypeStruct((2, 4, 4, 3), 'float32')
    >>> y, _ = jax.eval_shape(block.init_with_output, jax.random.key(0), x)
    >>> y.shape
    (2, 4, 4, 8)
  """

  width: int
  convolutions: int
  dtype: jax.typing.DTypeLike = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, D] -> [B, H, W, width]`."""
    for i in range(1, self.convolutions + 1):
      x = layers.conv_norm(
        x,
        f'conv{i}',
        f'norm{i}',
        self.width,
        3,
        use_bias=True,
        train=train,
        dtype=self.dtype,
      )
      x = nn.relu(x)
    return x


def _stages(depth: int) -> tuple[int, ...]:
  if depth not in STAGES:
    valid = ', '.join(map(str, STAGES))
    raise ValueError(f'VGG: depth={depth} is not one of {valid}.')
  return STAGES[depth]


class VGG(nn.Module):
  """VGG with BatchNorm, and a single linear layer after global pooling.

  Five stages with w, 2w, 4w, 8w and 8w channels. 2x2 max-pooling follows each
  of the first three, and the fourth too where images have 64 or more pixels a
  side. Convolutions have a bias beside their BatchNorm, as published.

  Taps: `stage1`, ..., `stage5` (before pooling), `stage1/conv1`, ..., `pool`
  and `head`.

  Convolutions start He-normal over the fan-out with a bias of 0, as in the
  published code; the head's kernel starts uniform within +-1/sqrt(fan_in),
  there normal with deviation 0.01.

  Attributes:
    num_classes: size of the output; 0 returns the last feature map,
      `[B, H / 8, W / 8, 8 * width]` (H / 16 from 64 pixels on).
    depth: 8, 11, 13, 16 or 19: its convolutions, and the three dense layers
      of the original; 8 has one convolution a stage.
    width: channels of the first stage; the paper's is 64.
    dropout: rate before the head.
    dtype: dtype of the computation; parameters are float32.

  Raises:
    ValueError: for another depth.

  References:
    Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale
    Image Recognition", 2014, arXiv:1409.1556; and Tian et al., "Contrastive
    Representation Distillation", 2019, arXiv:1910.10699, for this variant.

  Example:
    >>> VGG(num_classes=10, depth=13).taps.norms
    ('stage2/norm2', 'stage3/norm2', 'stage4/norm2', 'stage5/norm2')
  """

  num_classes: int
  depth: int = 13
  width: int = 64
  dropout: float = 0.0
  dtype: jax.typing.DTypeLike = 'float32'

  @property
  def taps(self) -> layers.Taps:
    """Stages 2 to 5: where other networks have a stem, this has stage 1."""
    counts = list(enumerate(_stages(self.depth), start=1))[1:]
    norms = tuple(f'stage{s}/norm{n}' for s, n in counts)
    return layers.Taps(
      stages=tuple(f'stage{s}' for s, _ in counts),
      preactivations=norms,
      norms=norms,
      **layers.end_taps(self.num_classes),
    )

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, C]` images -> `[B, num_classes]` logits."""
    poolings = 4 if x.shape[1] >= 64 else 3
    for stage, convolutions in enumerate(_stages(self.depth), start=1):
      x = VGGStage(
        self.width * (1, 2, 4, 8, 8)[stage - 1],
        convolutions,
        dtype=self.dtype,
        name=f'stage{stage}',
      )(x, train)
      if stage <= poolings:
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
    return layers.end(self, x, train=train)
