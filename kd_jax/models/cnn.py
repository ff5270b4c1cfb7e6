"""A small convolutional network, without residuals.

Owns the network that examples and tests train in seconds; those of published
tables are in the other files.
"""

from collections.abc import Sequence

import jax
from flax import linen as nn

from kd_jax.models import layers


class CNN(nn.Module):
  """3x3 convolutions with BatchNorm and ReLU, halving the resolution between.

  Taps: `conv1`, `norm1`, `relu1`, `conv2`, ..., `pool` and `head`.

  Attributes:
    num_classes: size of the output; 0 returns the last feature map.
    widths: channels of each convolution; all but the first have stride 2.
    dropout: rate before the head.
    dtype: dtype of the computation; parameters are float32.

  Example:
    >>> x = jax.ShapeDtypeStruct((2, 8, 8, 3), 'float32')
    >>> for classes in (10, 0):
    ...   model = CNN(num_classes=classes, widths=(4, 8))
    ...   y, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    ...   print(y.shape)
    (2, 10)
    (2, 4, 4, 8)
    >>> model.taps.stages
    ('relu1', 'relu2')
  """

  num_classes: int
  widths: Sequence[int] = (16, 32, 64)
  dropout: float = 0.0
  dtype: jax.typing.DTypeLike = 'float32'

  @property
  def taps(self) -> layers.Taps:
    """Each convolution is a stage."""
    numbers = range(1, len(self.widths) + 1)
    norms = tuple(f'norm{i}' for i in numbers)
    return layers.Taps(
      stages=tuple(f'relu{i}' for i in numbers),
      preactivations=norms,
      norms=norms,
      **layers.end_taps(self.num_classes),
    )

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
      x = layers.batch_norm(f'norm{i}', train=train, dtype=self.dtype)(x)
      x = layers.Relu(name=f'relu{i}')(x)
    if not self.num_classes:
      return x
    x = layers.GlobalAveragePool(name='pool')(x)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x)
