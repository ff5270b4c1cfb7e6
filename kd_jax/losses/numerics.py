"""What the losses share: float32, shapes that fit, safe norms, pooling.

Owns no loss. Gradients are finite where a norm is zero, and matrix products
keep float32's precision on hardware whose default is lower.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kd_jax.types import check_same_shape

HIGHEST = jax.lax.Precision.HIGHEST


def float32(x: ArrayLike) -> jax.Array:
  """An array of any dtype as float32."""
  return jnp.asarray(x, jnp.float32)


def constant(x: ArrayLike) -> jax.Array:
  """A teacher's array: float32, and no gradient flows into it."""
  return jax.lax.stop_gradient(float32(x))


def pair(what: str, **arrays: ArrayLike) -> tuple[jax.Array, jax.Array]:
  """What is trained and what it learns from: `float32` and `constant`.

  Args:
    what: what the caller needs equal shapes for; begins the message.
    **arrays: two named arrays, the constant one last.

  Raises:
    ValueError: if their shapes differ.

  Example:
    >>> student, teacher = pair('kl', student=[1, 2], teacher=[3, 4])
    >>> student.dtype.name
    'float32'
  """
  (trained, x), (target, y) = arrays.items()
  x, y = float32(x), constant(y)
  check_same_shape(what, **{trained: x, target: y})
  return x, y


def logits_pair(
  student_logits: ArrayLike, teacher_logits: ArrayLike
) -> tuple[jax.Array, jax.Array]:
  """`pair` of two networks' logits, `[..., C]`."""
  return pair(
    'teacher and student must have the same classes',
    student_logits=student_logits,
    teacher_logits=teacher_logits,
  )


def softened(
  student_logits: ArrayLike, teacher_logits: ArrayLike, temperature: ArrayLike
) -> tuple[jax.Array, jax.Array]:
  """`logits_pair` over a temperature."""
  student, teacher = logits_pair(student_logits, teacher_logits)
  return student / temperature, teacher / temperature


def batch_pair(
  what: str, student: ArrayLike, teacher: ArrayLike, axes: str = 'B, ...'
) -> tuple[jax.Array, jax.Array]:
  """`float32` and `constant` of one batch, whose examples may differ in shape.

  Args:
    what: the loss; begins the message.
    student: what is trained.
    teacher: what it learns from.
    axes: names of the axes that both have at least.

  Raises:
    ValueError: if an array has fewer axes, or the batches differ.

  Example:
    >>> [x.shape for x in batch_pair('rkd', jnp.ones((2, 3)), jnp.ones((2, 4)))]
    [(2, 3), (2, 4)]
  """
  student, teacher = float32(student), constant(teacher)
  least = len(axes.split(','))
  if min(student.ndim, teacher.ndim) < least or len(student) != len(teacher):
    raise ValueError(
      f'{what}: student and teacher are [{axes}] of one batch, not '
      f'{student.shape} and {teacher.shape}.'
    )
  return student, teacher


def label_of(logits: jax.Array, label: ArrayLike) -> jax.Array:
  """The labels of logits `[..., C]`, with their shape checked.

  Args:
    logits: of which the shape matters.
    label: `[...]` integers.

  Raises:
    ValueError: if there is not one integer per prediction.

  Example:
    >>> label_of(jnp.zeros((2, 3)), [0, 2]).tolist()
    [0, 2]
  """
  label = jnp.asarray(label)
  if not jnp.issubdtype(label.dtype, jnp.integer):
    raise ValueError(f'Labels are integers, not {label.dtype}.')
  check_same_shape(
    'labels are one integer per prediction',
    label=label,
    prediction=logits[..., 0],
  )
  return label


def safe_sqrt(x: jax.Array) -> jax.Array:
  """The square root, 0 with gradient 0 where `x` is not positive."""
  positive = x > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def norm(
  x: jax.Array, axis: int | Sequence[int] = -1, *, keepdims: bool = False
) -> jax.Array:
  """The Euclidean norm over axes, with gradient 0 where it is 0."""
  return safe_sqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=keepdims))


def unit(x: jax.Array, axis: int | Sequence[int] = -1) -> jax.Array:
  """`x` over its norm, whatever that is; zeros stay zero, with gradient 0.

  Example:
    >>> unit(jnp.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
  """
  x = x / largest(x, axis)
  length = norm(x, axis, keepdims=True)
  return jnp.where(length > 0, x / jnp.where(length > 0, length, 1.0), 0.0)


def largest(x: jax.Array, axis: int | Sequence[int] = -1) -> jax.Array:
  """The largest `|x|`, a constant; 1 where all are 0.

  What ignores its scale is divided by this first, as squares and other powers
  of the values as they are may underflow or overflow.

  Example:
    >>> largest(jnp.array([[3.0, -4.0], [0.0, 0.0]])).tolist()
    [[4.0], [1.0]]
  """
  size = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
  return jax.lax.stop_gradient(jnp.where(size > 0, size, 1.0))


def varies(x: jax.Array, centred: jax.Array, axis: int = -1) -> jax.Array:
  """Whether values differ by more than float32's rounding of them.

  The direction of rounding errors means nothing and has enormous gradients.

  Args:
    x: the values.
    centred: less their mean.
    axis: of the values; kept, with size 1.

  Example:
    >>> x = jnp.full(7, 0.1)
    >>> varies(x, x - x.mean()).tolist(), varies(x, x - x[0] + 1).tolist()
    ([False], [True])
  """
  spread = jnp.max(jnp.abs(centred), axis=axis, keepdims=True)
  size = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
  return spread > jnp.maximum(1e-6 * size, 1e-30)


def kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
  """KL(p || q) over the last axis, of log-probabilities `[..., C] -> [...]`.

  A class without mass in p contributes 0, value and gradient, even where q
  has none either; mass of p where q has none makes the divergence infinite.
  """
  p = jnp.exp(log_p)
  possible = p > 0
  log_ratio = jnp.where(possible, log_p, 0.0) - jnp.where(possible, log_q, 0.0)
  return jnp.sum(p * log_ratio, axis=-1)


def average_pool_to(x: jax.Array, size: Sequence[int]) -> jax.Array:
  """Averages maps to a lower resolution, which need not divide theirs.

  Bin i of n over a side of length m averages the pixels from floor(i m / n) to
  ceil((i + 1) m / n): bins overlap where n does not divide m, the convention
  of adaptive average pooling.

  Args:
    x: `[..., H, W, D]`.
    size: `(h, w)`, positive and at most `(H, W)`.

  Returns:
    `[..., h, w, D]`; `x` itself if the size is its own.

  Raises:
    ValueError: if a side would grow.

  Example:
    >>> column = jnp.arange(3.0).reshape(3, 1, 1)
    >>> average_pool_to(column, (2, 1)).ravel().tolist()
    [0.5, 1.5]
  """
  height, width = x.shape[-3:-1]
  h, w = size
  if not (0 < h <= height and 0 < w <= width):
    raise ValueError(
      f'average_pool_to: maps of {height} x {width} cannot be averaged to '
      f'{h} x {w}.'
    )
  if (h, w) == (height, width):
    return x
  if height % h == 0 and width % w == 0:
    blocks = (*x.shape[:-3], h, height // h, w, width // w, x.shape[-1])
    return jnp.mean(x.reshape(blocks), axis=(-4, -2))
  rows, columns = _bins(height, h), _bins(width, w)
  return jnp.einsum('hH,wW,...HWd->...hwd', rows, columns, x, precision=HIGHEST)


def _bins(length: int, count: int) -> np.ndarray:
  """The averaging matrix `[count, length]`."""
  i = np.arange(count)[:, None]
  start, end = i * length // count, -(-(i + 1) * length // count)
  inside = (np.arange(length) >= start) & (np.arange(length) < end)
  return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)


def to_smaller(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Two sets of maps, each averaged to the smaller height and width."""
  size = tuple(
    min(m, n) for m, n in zip(a.shape[-3:-1], b.shape[-3:-1], strict=True)
  )
  return average_pool_to(a, size), average_pool_to(b, size)
