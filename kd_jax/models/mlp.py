"""A multi-layer perceptron, for classes or regression values.

Owns the one network here that is not convolutional or a transformer; its inputs
are flattened.
"""

from collections.abc import Sequence

import jax
from flax import linen as nn

from kd_jax.models import layers


class MLP(nn.Module):
  """Dense layers with ReLU, dropout, and a linear head.

  Taps: `dense1`, `dense2`, ... (before the ReLU), `relu1`, `relu2`, ... and
  `head`.

  Attributes:
    num_classes: size of the output, classes or regression values.
    hidden: width of each hidden layer.
    dropout: rate after each hidden layer.
    dtype: dtype of the computation; parameters are float32.
    reads: the entry of a batch that it sees.

  Example:
    >>> model = MLP(num_classes=3, hidden=(16,))
    >>> variables = model.init(jax.random.key(0), jax.numpy.ones((2, 4, 5)))
    >>> {k: v['kernel'].shape for k, v in variables['params'].items()}
    {'dense1': (20, 16), 'head': (16, 3)}
    >>> model.taps.stages, model.taps.embedding
    (('dense1',), 'relu1')
  """

  num_classes: int
  hidden: Sequence[int] = (256, 256)
  dropout: float = 0.0
  dtype: jax.typing.DTypeLike = 'float32'
  reads: str = 'image'

  @property
  def taps(self) -> layers.Taps:
    """Each hidden layer before its ReLU is a stage, `[B, width]`.

    The embedding is the last hidden layer after its ReLU, before dropout; an
    empty string in a model without hidden layers.
    """
    count = len(self.hidden)
    dense = tuple(f'dense{i}' for i in range(1, count + 1))
    return layers.Taps(
      stages=dense,
      preactivations=dense,
      norms=(),
      embedding=f'relu{count}' if count else '',
      head='head',
    )

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, ...]` inputs, flattened -> `[B, num_classes]`."""
    x = x.reshape(x.shape[0], -1)
    for i, width in enumerate(self.hidden, start=1):
      x = nn.Dense(width, dtype=self.dtype, name=f'dense{i}')(x)
      x = layers.Relu(name=f'relu{i}')(x)
      x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x)
