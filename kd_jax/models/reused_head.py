"""A student with a projector and its teacher's classifier (SimKD).

Owns the network around any backbone of this room. That the head is copied from
the teacher and kept from training is for the caller.
"""

import jax
from flax import linen as nn

from kd_jax.models.layers import Taps, classify, conv_norm, end_taps


class ReusedHead(nn.Module):
  """A backbone, a projector to the teacher's width, and the teacher's head.

  The projector is part of the network that is served: count its parameters.
  Copy the teacher's head into `params['head']` and keep it from training, as
  `optim.freeze(tx, 'head/.*')` does. Taps: `projector` (after its ReLU),
  `pool`, `head`, and the backbone's under `backbone/`.

  Attributes:
    backbone: a convolutional model with `num_classes=0`, named 'backbone'.
    width: channels of the teacher's last feature map.
    num_classes: size of the output.
    factor: the projector's inner width is `width // factor`.
    dtype: dtype of the computation; parameters are float32.

  References:
    Chen et al., "Knowledge Distillation with the Reused Teacher Classifier",
    2022, arXiv:2203.14001.

  Example:
    >>> from kd_jax.models.cnn import CNN
    >>> backbone = CNN(num_classes=0, widths=(4, 8))
    >>> model = ReusedHead(backbone, width=32, num_classes=10)
    >>> x = jax.ShapeDtypeStruct((2, 8, 8, 3), 'float32')
    >>> shapes = jax.eval_shape(model.init, jax.random.key(0), x)['params']
    >>> sorted(shapes), shapes['head']['kernel'].shape
    (['backbone', 'head', 'projector'], (32, 10))
    >>> model.taps.stages
    ('backbone/relu1', 'projector')
  """

  backbone: nn.Module
  width: int
  num_classes: int
  factor: int = 2
  dtype: jax.typing.DTypeLike = 'float32'

  @property
  def taps(self) -> Taps:
    """The backbone's stages; the last is the projector."""
    inner = self.backbone.taps

    def prefixed(names):
      return tuple(f'backbone/{n}' for n in names)

    return Taps(
      stages=(*prefixed(inner.stages[:-1]), 'projector'),
      preactivations=prefixed(inner.preactivations),
      norms=prefixed(inner.norms),
      **end_taps(self.num_classes),
    )

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, C]` images -> `[B, num_classes]` logits."""
    x = self.backbone(x, train)
    x = Projector(self.width, self.factor, self.dtype, name='projector')(
      x, train
    )
    return classify(x, self.num_classes, train=train, dtype=self.dtype)


class Projector(nn.Module):
  """1x1, 3x3 and 1x1 convolutions, each with BatchNorm and ReLU.

  Attributes:
    width: output channels.
    factor: the first two have `width // factor` channels, one at least.
    dtype: dtype of the computation.

  Example:
    >>> x = jax.ShapeDtypeStruct((2, 4, 4, 6), 'float32')
    >>> variables = jax.eval_shape(Projector(32).init, jax.random.key(0), x)
    >>> [variables['params'][f'conv{i}']['kernel'].shape for i in (1, 2, 3)]
    [(1, 1, 6, 16), (3, 3, 16, 16), (1, 1, 16, 32)]
  """

  width: int
  factor: int = 2
  dtype: jax.typing.DTypeLike = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, D] -> [B, H, W, width]`."""
    inner = max(1, self.width // self.factor)
    layers = ((inner, 1), (inner, 3), (self.width, 1))
    for i, (width, size) in enumerate(layers, start=1):
      x = conv_norm(
        x,
        f'conv{i}',
        f'norm{i}',
        width,
        size,
        train=train,
        dtype=self.dtype,
      )
      x = nn.relu(x)
    return x
