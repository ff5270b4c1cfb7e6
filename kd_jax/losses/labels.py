"""Losses that learn one class of each example: the label's or the teacher's.

Owns cross-entropy with a class: pure, float32 and unreduced, `[..., C] ->
[...]`, as the losses of `logits`. Those that tell the label's class from the
others are in `targets`.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import numerics


def cross_entropy(
  logits: ArrayLike, label: ArrayLike, *, label_smoothing: float = 0.0
) -> jax.Array:
  """Cross-entropy of logits with integer labels.

  Args:
    logits: `[..., C]` unnormalised scores, any float dtype.
    label: `[...]` integer class ids in [0, C); the loss of others is NaN, also
      of negative ones.
    label_smoothing: share of the target spread evenly over all C classes,
      in [0, 1) (Szegedy et al. 2015, arXiv:1512.00567).

  Returns:
    `[...]` float32, >= 0.

  Raises:
    ValueError: if `label` does not have the shape of `logits` without its
      last axis, or for `label_smoothing` out of its bounds.

  Example:
    -log(3/4), and with smoothing of 0.2 for the target (0.1, 0.9):
    >>> logits = jnp.log(jnp.array([[1.0, 3.0]]))
    >>> round(cross_entropy(logits, jnp.array([1])).item(), 4)
    0.2877
    >>> loss = cross_entropy(logits, jnp.array([1]), label_smoothing=0.2)
    >>> round(loss.item(), 4)
    0.3975
  """
  if not 0 <= label_smoothing < 1:
    raise ValueError(f'label_smoothing={label_smoothing} is not in [0, 1).')
  logits = numerics.float32(logits)
  label = numerics.label_of(logits, label)
  # Indices from the end are none of a class: -1 often marks what has no label.
  label = jnp.where(label < 0, logits.shape[-1], label)
  log_p = jax.nn.log_softmax(logits)
  picked = jnp.take_along_axis(log_p, label[..., None], axis=-1)[..., 0]
  if not label_smoothing:
    return -picked
  uniform = -jnp.mean(log_p, axis=-1)
  return -(1 - label_smoothing) * picked + label_smoothing * uniform


def hard_distillation(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  label_smoothing: float = 0.0,
) -> jax.Array:
  """Cross-entropy with the class that the teacher finds likeliest.

  Args:
    student_logits: `[..., C]` unnormalised scores, any float dtype; in DeiT
      those of the distillation token.
    teacher_logits: `[..., C]`; the first of equal maxima is the label.
    label_smoothing: share of the target spread evenly over all C classes,
      in [0, 1).

  Returns:
    `[...]` float32, >= 0.

  Raises:
    ValueError: if the shapes differ.

  Example:
    -log(3/8), since the teacher's label is class 1:
    >>> student = jnp.log(jnp.array([[1.0, 3.0, 4.0]]))
    >>> teacher = jnp.array([[2.0, 9.0, 0.5]])
    >>> round(hard_distillation(student, teacher).item(), 4)
    0.9808

  References:
    Touvron et al., "Training data-efficient image transformers & distillation
    through attention", 2020, arXiv:2012.12877.
  """
  student, teacher = numerics.logits_pair(student_logits, teacher_logits)
  likeliest = jnp.argmax(teacher, axis=-1)
  return cross_entropy(student, likeliest, label_smoothing=label_smoothing)
