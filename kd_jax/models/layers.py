"""Layers that models share, and the paths at which they can be tapped.

Some are arithmetic as a module. They compute what their names say; as modules
they are places at which `quantize_activations` can round (a runtime adds and
pools in integers only when both sides of the operation are quantized), and
whose outputs `adapters.from_linen` can tap. The functions build a layer inside
the compact method that calls them. What a network is made of stays in its own
file.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

# He et al., 2015, arXiv:1502.01852, with the variance of the backward pass.
HE_NORMAL = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
# Uniform within +-1/sqrt(fan_in).
LECUN_UNIFORM = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


class Add(nn.Module):
  """The sum of two arrays of one shape: a residual connection.

  Example:
    >>> Add().apply({}, jnp.array([1.0, 2.0]), jnp.array([3.0, 5.0])).tolist()
    [4.0, 7.0]
  """

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    return x + y


class Concatenate(nn.Module):
  """Two arrays side by side: `[..., D]` and `[..., E]` -> `[..., D + E]`.

  Example:
    >>> Concatenate().apply({}, jnp.ones((1, 1)), jnp.zeros((1, 2))).tolist()
    [[1.0, 0.0, 0.0]]
  """

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.concatenate([x, y], axis=-1)


class ChannelShuffle(nn.Module):
  """Reorders channels, so that each group's next neighbour is another group's.

  With g groups of n channels, channel `i * n + j` goes to `j * g + i`.

  Attributes:
    groups: number of groups; it divides the number of channels.

  References:
    Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural
    Network for Mobile Devices", 2017, arXiv:1707.01083.

  Example:
    >>> ChannelShuffle(2).apply({}, jnp.arange(6)).tolist()
    [0, 3, 1, 4, 2, 5]
  """

  groups: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    grouped = x.reshape(*x.shape[:-1], self.groups, -1)
    return jnp.swapaxes(grouped, -1, -2).reshape(x.shape)


class Relu(nn.Module):
  """max(x, 0), where a tap after the activation is wanted.

  Example:
    >>> Relu().apply({}, jnp.array([-1.0, 2.0])).tolist()
    [0.0, 2.0]
  """

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return nn.relu(x)


class GlobalAveragePool(nn.Module):
  """The mean over all positions: `[B, H, W, D] -> [B, D]`.

  Example:
    >>> x = jnp.arange(8.0).reshape(1, 2, 2, 2)
    >>> GlobalAveragePool().apply({}, x).tolist()
    [[3.0, 4.0]]
  """

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=(1, 2))


def convolution(
  name: str,
  width: int,
  size: int,
  *,
  dtype: jax.typing.DTypeLike,
  stride: int = 1,
  groups: int = 1,
  use_bias: bool = False,
  kernel_init: Callable[..., Any] = HE_NORMAL,
) -> nn.Conv:
  """A square convolution, padded so that stride 1 keeps the resolution.

  Args:
    name: of the layer.
    width: output channels.
    size: of the kernel, odd: `size // 2` zeros are padded on each side.
    dtype: dtype of the computation; parameters are float32.
    stride: in both directions.
    groups: groups of channels that do not see each other; as many as input
      channels for a depthwise convolution.
    use_bias: whether it has a bias.
    kernel_init: initialiser of the kernel; He-normal over the fan-out.

  Example:
    >>> layer = convolution('conv', 8, 3, stride=2, dtype='float32')
    >>> x = jnp.ones((2, 8, 8, 3))
    >>> layer.init_with_output(jax.random.key(0), x)[0].shape
    (2, 4, 4, 8)
  """
  return nn.Conv(
    width,
    (size, size),
    strides=stride,
    padding=size // 2,
    feature_group_count=groups,
    use_bias=use_bias,
    dtype=dtype,
    kernel_init=kernel_init,
    name=name,
  )


def batch_norm(
  name: str, *, train: bool, dtype: jax.typing.DTypeLike
) -> nn.BatchNorm:
  """BatchNorm as in the published CIFAR networks.

  The scale starts at 1 and the bias at 0, epsilon is 1e-5, and the running
  statistics keep 0.9 of their value (PyTorch calls this a momentum of 0.1).

  Args:
    name: of the layer.
    train: whether it normalises with the batch's statistics.
    dtype: dtype of the computation; parameters and statistics are float32.

  Example:
    >>> batch_norm('norm', train=False, dtype='float32').epsilon
    1e-05
  """
  return nn.BatchNorm(
    use_running_average=not train,
    momentum=0.9,
    epsilon=1e-5,
    dtype=dtype,
    name=name,
  )


def conv_norm(
  x: jax.Array,
  conv: str,
  norm: str,
  width: int,
  size: int,
  *,
  train: bool,
  dtype: jax.typing.DTypeLike,
  **options: Any,
) -> jax.Array:
  """A convolution and its BatchNorm.

  Args:
    x: `[B, H, W, D]`.
    conv: name of the convolution.
    norm: name of the BatchNorm.
    width: output channels.
    size: of the kernel.
    train: see `batch_norm`.
    dtype: of the computation.
    **options: others of `convolution`.

  Returns:
    `[B, H / stride, W / stride, width]`.

  Example:
    >>> class Layer(nn.Module):
    ...   @nn.compact
    ...   def __call__(self, x):
    ...     return conv_norm(
    ...       x, 'conv', 'norm', 8, 3, train=False, dtype='float32'
    ...     )
    >>> x = jnp.ones((1, 4, 4, 3))
    >>> variables = jax.eval_shape(Layer().init, jax.random.key(0), x)
    >>> sorted(variables['params'])
    ['conv', 'norm']
  """
  x = convolution(conv, width, size, dtype=dtype, **options)(x)
  return batch_norm(norm, train=train, dtype=dtype)(x)


def classify(
  x: jax.Array,
  num_classes: int,
  *,
  train: bool,
  dtype: jax.typing.DTypeLike,
  dropout: float = 0.0,
) -> jax.Array:
  """The end of a classifier: `pool`, dropout and the linear layer `head`.

  The head's kernel starts uniform within +-1/sqrt(fan_in), its bias at 0.

  Args:
    x: the last feature map, `[B, H, W, D]`.
    num_classes: size of the output; 0 for a backbone without an end.
    train: whether dropout acts.
    dtype: of the computation.
    dropout: rate before the head.

  Returns:
    `[B, num_classes]` logits, or `x` itself where `num_classes` is 0.

  Example:
    >>> x = jnp.ones((2, 4, 4, 8))
    >>> classify(x, 0, train=False, dtype='float32').shape
    (2, 4, 4, 8)
  """
  if not num_classes:
    return x
  x = GlobalAveragePool(name='pool')(x)
  x = nn.Dropout(dropout, deterministic=not train)(x)
  return nn.Dense(
    num_classes, dtype=dtype, kernel_init=LECUN_UNIFORM, name='head'
  )(x)


def end(model: Any, x: jax.Array, *, train: bool) -> jax.Array:
  """`classify` by a model's own attributes, inside its compact method.

  Args:
    model: it has `num_classes`, `dtype` and `dropout`, the rate before the
      head.
    x: the last feature map, `[B, H, W, D]`.
    train: whether dropout acts.

  Example:
    >>> class Model(nn.Module):
    ...   num_classes, dtype, dropout = 3, 'float32', 0.0
    ...   @nn.compact
    ...   def __call__(self, x):
    ...     return end(self, x, train=False)
    >>> x = jnp.ones((2, 4, 4, 8))
    >>> Model().init_with_output(jax.random.key(0), x)[0].shape
    (2, 3)
  """
  return classify(
    x,
    model.num_classes,
    train=train,
    dtype=model.dtype,
    dropout=model.dropout,
  )


class Taps(NamedTuple):
  """Where a model's features are, as paths for `adapters.from_linen`.

  Attributes:
    stages: the output of each stage, after its last activation where it has
      one, shallow to deep; `[B, H, W, D]`, or `[B, L, D]` of a transformer.
    preactivations: the same places before that activation; equal to `stages`
      where nothing follows.
    norms: for each of `preactivations`, the BatchNorm whose scale and bias
      give its distribution (the last one on its main branch); empty in models
      without BatchNorm.
    embedding: the pooled feature `[B, D]` that the head reads.
    head: the linear classifier.

  Example:
    >>> from kd_jax.models import make_model
    >>> taps = make_model('resnet', num_classes=10, depth=8).taps
    >>> taps.stages[-1], taps.preactivations[-1], taps.norms[-1]
    ('stage3_block1', 'stage3_block1/add', 'stage3_block1/norm2')
  """

  stages: tuple[str, ...]
  preactivations: tuple[str, ...]
  norms: tuple[str, ...]
  embedding: str
  head: str


def end_taps(num_classes: int) -> dict[str, str]:
  """`embedding` and `head` of `Taps` for a model that ends in `classify`.

  Args:
    num_classes: of the model.

  Returns:
    The two fields; empty strings where `num_classes` is 0, for there is
    neither pooling nor head.

  Example:
    >>> end_taps(10)
    {'embedding': 'pool', 'head': 'head'}
  """
  if not num_classes:
    return {'embedding': '', 'head': ''}
  return {'embedding': 'pool', 'head': 'head'}


def last_blocks(blocks: Sequence[int]) -> tuple[str, ...]:
  """Paths of the last block of every stage, of models that name them alike.

  Args:
    blocks: blocks of each stage.

  Example:
    >>> last_blocks((2, 3))
    ('stage1_block2', 'stage2_block3')
  """
  return tuple(f'stage{s}_block{n}' for s, n in enumerate(blocks, start=1))
