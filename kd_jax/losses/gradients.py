"""Losses on derivatives with respect to the input, and these derivatives.

Owns both, and runs no network with a state. The derivatives are functions of a
network `fn: x -> logits`. They sum over the batch before they differentiate, so
examples must not interact within `fn`: evaluate BatchNorm with its running
statistics. A loss on them differentiates the student twice. The teacher is
constant.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import numerics
from kd_jax.losses.labels import cross_entropy
from kd_jax.types import check_same_shape


def input_gradient(
  fn: Callable[[jax.Array], jax.Array],
  x: ArrayLike,
  label: ArrayLike,
  *,
  of: str = 'cross_entropy',
) -> jax.Array:
  """The gradient of each example's loss or logit with respect to its input.

  Args:
    fn: `[B, ...] -> [B, C]` logits; examples must not interact.
    x: `[B, ...]`, any dtype; `fn` gets it in float32.
    label: `[B]` integer class ids in [0, C).
    of: 'cross_entropy' with the label, as in gradient-based attention, or the
      label's 'logit', a row of the Jacobian.

  Returns:
    `[B, ...]` float32.

  Raises:
    ValueError: if `of` is unknown.

  Example:
    >>> double = lambda x: 2 * x
    >>> x, label = jnp.array([[0.0, 0.0]]), jnp.array([1])
    >>> input_gradient(double, x, label).tolist()
    [[1.0, -1.0]]
    >>> input_gradient(double, x, label, of='logit').tolist()
    [[0.0, 2.0]]

  References:
    Zagoruyko, Komodakis, "Paying More Attention to Attention", 2016,
    arXiv:1612.03928, section 3.2.
  """
  x, label = numerics.float32(x), jnp.asarray(label)
  if of == 'cross_entropy':
    return jax.grad(lambda x: jnp.sum(cross_entropy(fn(x), label)))(x)
  if of == 'logit':
    logits, vjp = jax.vjp(fn, x)
    one_hot = jax.nn.one_hot(label, logits.shape[-1], dtype=logits.dtype)
    return vjp(one_hot)[0]
  raise ValueError(f'Unknown {of!r} for input_gradient: cross_entropy, logit.')


def projected_jacobian(
  fn: Callable[[jax.Array], jax.Array], x: ArrayLike, direction: ArrayLike
) -> jax.Array:
  """Each example's Jacobian of the logits, projected on a direction.

  The gradient with respect to x of <fn(x), direction>. For Sobolev training
  draw random unit directions anew in every step and compare the projections
  with `gradient_matching`; a one-hot direction picks a row of the Jacobian.

  Args:
    fn: `[B, ...] -> [B, C]` logits; examples must not interact.
    x: `[B, ...]`, any dtype; `fn` gets it in float32.
    direction: `[B, C]`.

  Returns:
    `[B, ...]` float32.

  Raises:
    ValueError: if `direction` does not have the logits' shape.

  Example:
    >>> double = lambda x: 2 * x
    >>> projected_jacobian(double, jnp.zeros((1, 2)), jnp.array([[1.0, -1.0]]))
    Array([[ 2., -2.]], dtype=float32)

  References:
    Czarnecki et al., "Sobolev Training for Neural Networks", 2017,
    arXiv:1706.04859.
  """
  logits, vjp = jax.vjp(fn, numerics.float32(x))
  direction = jnp.asarray(direction, logits.dtype)
  check_same_shape('projected_jacobian', direction=direction, logits=logits)
  return vjp(direction)[0]


def gradient_matching(
  student_gradient: ArrayLike,
  teacher_gradient: ArrayLike,
  *,
  normalize: bool = False,
) -> jax.Array:
  """The mean squared difference of gradients with respect to the input.

  The papers take the Euclidean distance or its square, which is the number of
  elements of an input times as much.

  Args:
    student_gradient: `[B, ...]` from `input_gradient` or `projected_jacobian`,
      any float dtype.
    teacher_gradient: `[B, ...]`, treated as constant.
    normalize: whether each example's gradient is divided by its Euclidean
      norm, so that only its direction counts (saliency).

  Returns:
    `[B]` float32.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> gradient_matching(jnp.array([[1.0, 3.0]]), jnp.zeros((1, 2))).tolist()
    [5.0]

  References:
    Zagoruyko, Komodakis, "Paying More Attention to Attention", 2016,
    arXiv:1612.03928, section 3.2.
    Czarnecki et al., "Sobolev Training for Neural Networks", 2017,
    arXiv:1706.04859.
  """
  student, teacher = numerics.pair(
    'gradient_matching', student=student_gradient, teacher=teacher_gradient
  )
  axes = tuple(range(1, student.ndim))
  if normalize:
    student, teacher = (
      numerics.unit(student, axes),
      numerics.unit(teacher, axes),
    )
  return jnp.mean(jnp.square(student - teacher), axis=axes)


def jacobian_matching(
  student_jacobian: ArrayLike, teacher_jacobian: ArrayLike
) -> jax.Array:
  """The squared distance of normalised rows of the Jacobian, summed over rows.

  A row is the gradient of one logit with respect to the input, divided by its
  Euclidean norm over the whole input. Where there are many classes, the row of
  the teacher's largest logit alone keeps the cost at one backward pass.

  Args:
    student_jacobian: `[B, R, ...]`, R rows per example, any float dtype.
    teacher_jacobian: `[B, R, ...]`, treated as constant.

  Returns:
    `[B]` float32 in [0, 4 R]. A row of zeros stays zero.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> jacobian_matching(jnp.array([[[3.0, 0.0]]]), jnp.array([[[0.0, 5.0]]]))
    Array([2.], dtype=float32)

  References:
    Srinivas, Fleuret, "Knowledge Transfer with Jacobian Matching", 2018,
    arXiv:1803.00443.
  """
  student, teacher = numerics.pair(
    'jacobian_matching', student=student_jacobian, teacher=teacher_jacobian
  )
  inputs = tuple(range(2, student.ndim))
  difference = numerics.unit(student, inputs) - numerics.unit(teacher, inputs)
  return jnp.sum(jnp.square(difference), axis=tuple(range(1, student.ndim)))
