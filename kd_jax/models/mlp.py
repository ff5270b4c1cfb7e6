"""A multi-layer perceptron."""

from collections.abc import Sequence

import jax
from flax import linen as nn


class MLP(nn.Module):
  """Dense layers with ReLU, dropout, and a linear head.

  Taps: `dense1`, `dense2`, ... (before the ReLU) and `head`.

  Attributes:
    num_classes: size of the output, classes or regression values.
    hidden: width of each hidden layer.
    dropout: rate after each hidden layer.
    dtype: dtype of the computation; parameters are float32.
  """

  num_classes: int
  hidden: Sequence[int] = (256, 256)
  dropout: float = 0.0
  dtype: jax.typing.DTypeLike = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, ...]` inputs, flattened -> `[B, num_classes]`."""
    x = x.reshape(x.shape[0], -1)
    for i, width in enumerate(self.hidden, start=1):
      x = nn.Dense(width, dtype=self.dtype, name=f'dense{i}')(x)
      x = nn.relu(x)
      x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x)
