"""Small trained maps between a student's features and a teacher's.

Owns layers and what is made of them, and no loss. A connector is an (init,
apply) pair of plain functions: `init` makes parameters from a key and shapes
alone, `apply` runs them in float32. They train beside the student and are
dropped with the objective. Normalisation takes the statistics of the batch at
hand, over all devices; nothing here is used in evaluation.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kd_jax import rules
from kd_jax.losses import numerics

_HE = jax.nn.initializers.he_normal()
_LECUN = jax.nn.initializers.lecun_normal()


class Connector(NamedTuple):
  """A trained map.

  Attributes:
    init: `(key, student_shape, teacher_shape) -> params`.
    apply: `(params, x, axis_name) -> y`; `x` has the student's shape, `y` the
      teacher's number of channels.
  """

  init: Callable[..., Any]
  apply: Callable[..., jax.Array]


def dense_params(key: jax.Array, inner: int, outer: int) -> dict[str, Any]:
  """Kernel `[inner, outer]` and bias `[outer]` of a linear map."""
  return {
    'kernel': _LECUN(key, (inner, outer)),
    'bias': jnp.zeros(outer, jnp.float32),
  }


def dense(params: Any, x: jax.Array) -> jax.Array:
  """`[..., inner] -> [..., outer]`; on maps it is a 1x1 convolution."""
  y = jnp.einsum('...i,io->...o', numerics.float32(x), params['kernel'])
  return y + params['bias'].reshape((1,) * (y.ndim - 1) + (-1,))


def conv_params(
  key: jax.Array, size: int, inner: int, outer: int
) -> dict[str, Any]:
  """Kernel `[size, size, inner, outer]` of a convolution without bias."""
  return {'kernel': _HE(key, (size, size, inner, outer))}


def conv(params: Any, x: jax.Array) -> jax.Array:
  """A convolution with stride 1 that keeps the resolution, NHWC."""
  return jax.lax.conv_general_dilated(
    numerics.float32(x),
    params['kernel'],
    window_strides=(1, 1),
    padding='SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


def norm_params(size: int) -> dict[str, Any]:
  """Scale 1 and bias 0 of a normalisation."""
  return {'scale': jnp.ones(size), 'bias': jnp.zeros(size)}


def batch_norm(params: Any, x: jax.Array, axis_name: str | None) -> jax.Array:
  """Normalises by the mean and variance of the global batch, per channel."""
  axes = tuple(range(x.ndim - 1))
  mean = jnp.mean(x, axis=axes, keepdims=True)
  square = jnp.mean(jnp.square(x), axis=axes, keepdims=True)
  if axis_name is not None:
    mean, square = jax.lax.pmean((mean, square), axis_name)
  variance = jnp.maximum(square - jnp.square(mean), 0.0)
  shape = (1,) * (x.ndim - 1) + (-1,)
  y = (x - mean) * jax.lax.rsqrt(variance + 1e-5)
  return y * params['scale'].reshape(shape) + params['bias'].reshape(shape)


def _linear(*, norm: bool, relu: bool) -> Connector:
  def init(key, student, teacher):
    params = dense_params(key, student[-1], teacher[-1])
    return params | ({'norm': norm_params(teacher[-1])} if norm else {})

  def apply(params, x, axis_name=None):
    y = dense(params, x)
    y = batch_norm(params['norm'], y, axis_name) if norm else y
    return jax.nn.relu(y) if relu else y

  return Connector(init, apply)


def _bottleneck() -> Connector:
  """Three 1x1 convolutions with ReLU between, as wide as the teacher."""

  def init(key, student, teacher):
    widths = [student[-1], teacher[-1], teacher[-1], teacher[-1]]
    keys = jax.random.split(key, 3)
    return [
      dense_params(k, *w)
      for k, w in zip(keys, itertools.pairwise(widths), strict=True)
    ]

  def apply(params, x, axis_name=None):
    for layer in params[:-1]:
      x = jax.nn.relu(dense(layer, x))
    return dense(params[-1], x)

  return Connector(init, apply)


def _identity() -> Connector:
  return Connector(
    lambda key, student, teacher: {},
    lambda params, x, axis_name=None: numerics.float32(x),
  )


CONNECTORS = {
  'identity': _identity(),
  'linear': _linear(norm=False, relu=False),
  'norm': _linear(norm=True, relu=False),
  'norm_relu': _linear(norm=True, relu=True),
  'bottleneck': _bottleneck(),
}


def make_connector(name: str) -> Connector:
  """A connector by name; each acts on the last axis of any rank.

  Args:
    name: 'identity'; 'linear' (a 1x1 convolution on maps); 'norm' and
      'norm_relu', which add batch normalisation and a ReLU; 'bottleneck'
      (three linear maps with ReLU between).

  Raises:
    ValueError: for an unknown name.

  Example:
    >>> connector = make_connector('linear')
    >>> params = connector.init(jax.random.key(0), (2, 4, 4, 3), (2, 4, 4, 8))
    >>> connector.apply(params, jnp.ones((2, 4, 4, 3))).shape
    (2, 4, 4, 8)
  """
  return rules.choose('connector', name, CONNECTORS)


def same_places(
  student: jax.Array, teacher: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Averages the larger maps, or the longer sequence, to the other's places.

  Args:
    student: `[B, H, W, D]`, `[B, L, D]` or `[B, D]`.
    teacher: as many axes.

  Raises:
    ValueError: if the ranks differ, such as maps and a pooled vector.
  """
  if student.ndim != teacher.ndim:
    raise ValueError(
      f'A student feature of shape {student.shape} cannot be compared with a '
      f'teacher feature of shape {teacher.shape}: choose taps of one rank.'
    )
  if student.ndim == 4:
    return numerics.to_smaller(student, teacher)
  if student.ndim == 3:
    a, b = numerics.to_smaller(student[:, None], teacher[:, None])
    return a[:, 0], b[:, 0]
  return student, teacher


def upsample(x: jax.Array, size: Sequence[int]) -> jax.Array:
  """Repeats the nearest pixel, `[B, h, w, D] -> [B, *size, D]`."""
  batch, height, width, channels = x.shape
  rows, columns = size[0] // height, size[1] // width
  if (rows * height, columns * width) != tuple(size):
    return jax.image.resize(x, (batch, *size, channels), 'nearest')
  # Whole repetitions: XLA fuses a broadcast, and gathers for a resize.
  x = jnp.broadcast_to(
    x[:, :, None, :, None], (batch, height, rows, width, columns, channels)
  )
  return x.reshape(batch, *size, channels)
