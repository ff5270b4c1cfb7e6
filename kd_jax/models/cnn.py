"""A small convolutional network."""

from collections.abc import Sequence

import jax
from flax import linen as nn

from kd_jax.models.layers import GlobalAveragePool


class CNN(nn.Module):
  """3x3 convolutions with BatchNorm and ReLU, halving the resolution between.

  Taps: `conv1`, `norm1`, `conv2`, ..., `pool` and `head`.

  Attributes:
    num_classes: size of the output.
    widths: channels of each convolution; all but the first have stride 2.
    dropout: rate before the head.
    dtype: dtype of the computation; parameters are float32.
  """

  num_classes: int
  widths: Sequence[int] = (16, 32, 64)
  dropout: float = 0.0
  dtype: jax.typing.DTypeLike = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, C]` images -> `[B, num_classes]` logits."""
    for i, width in enumerate(self.widths, start=1):
      stride = 1 if i == 1 else 2
      x = nn.Conv(
        width,
        (3, 3),
        strides=stride,
        padding=1,
        use_bias=False,
        dtype=self.dtype,
        name=f'conv{i}',
      )(x)
      x = nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        dtype=self.dtype,
        name=f'norm{i}',
      )(x)
      x = nn.relu(x)
    x = GlobalAveragePool(name='pool')(x)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x)
