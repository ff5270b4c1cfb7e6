"""Losses on logits and regression values: one formula, one paper, one function.

Every loss is pure, computed in float32 whatever the inputs' dtype, unreduced
over the leading axes (`[..., C] -> [...]`), and takes its hyper-parameters by
keyword. Owns no weights, no schedules and no batch mean: see `objectives`.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.types import check_same_shape


def _f32(x: ArrayLike) -> jax.Array:
  return jnp.asarray(x, jnp.float32)


def kl_divergence(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  temperature: ArrayLike = 4.0,
) -> jax.Array:
  """Knowledge distillation: KL(teacher || student) of softened softmaxes.

  With p(T) = softmax(logits / T) the loss of one example is
    T**2 * sum_c p_teacher(T)[c] * log(p_teacher(T)[c] / p_student(T)[c]),
  summed over classes. Its mean over a batch is the canonical convention of
  this library; T**2 keeps the gradient's size independent of T.

  Args:
    student_logits: `[..., C]` unnormalised scores, any float dtype.
    teacher_logits: `[..., C]`, treated as constant.
    temperature: softmax temperature T > 0, a float or a scalar array.

  Returns:
    `[...]` float32, 0 when the two softmaxes agree and else positive, up to
    rounding of about 2e-7 * T**2.

  Raises:
    ValueError: if the shapes differ, as they do when teacher and student were
      built for other classes.

  Example:
    >>> logits = jnp.array([[2.0, -1.0, 0.5]])
    >>> kl_divergence(logits, logits).tolist()
    [0.0]

  References:
    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network",
    2015, arXiv:1503.02531.
  """
  student_logits, teacher_logits = _f32(student_logits), _f32(teacher_logits)
  check_same_shape(
    'teacher and student must have the same classes',
    student_logits=student_logits,
    teacher_logits=teacher_logits,
  )
  teacher_logits = jax.lax.stop_gradient(teacher_logits)
  log_student = jax.nn.log_softmax(student_logits / temperature)
  log_teacher = jax.nn.log_softmax(teacher_logits / temperature)
  # A class the teacher gives no mass (logit -inf) contributes 0, not NaN.
  possible = jnp.isfinite(log_teacher)
  log_ratio = jnp.where(possible, log_teacher, 0.0) - jnp.where(
    possible, log_student, 0.0
  )
  kl = jnp.sum(jnp.exp(log_teacher) * log_ratio, axis=-1)
  return temperature**2 * kl


def cross_entropy(
  logits: ArrayLike, label: ArrayLike, *, label_smoothing: float = 0.0
) -> jax.Array:
  """Cross-entropy of logits with integer labels.

  Args:
    logits: `[..., C]` unnormalised scores, any float dtype.
    label: `[...]` integer class ids in [0, C).
    label_smoothing: share of the target spread evenly over all C classes,
      in [0, 1) (Szegedy et al. 2016, arXiv:1512.00567).

  Returns:
    `[...]` float32, >= 0.

  Raises:
    ValueError: if `label` does not have the shape of `logits` without its
      last axis.

  Example:
    >>> round(float(cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))[0]), 4)
    1.3863
  """
  logits, label = _f32(logits), jnp.asarray(label)
  check_same_shape(
    'labels are one integer per prediction',
    label=label,
    prediction=logits[..., 0],
  )
  log_p = jax.nn.log_softmax(logits)
  picked = jnp.take_along_axis(log_p, label[..., None], axis=-1)[..., 0]
  if not label_smoothing:
    return -picked
  uniform = -jnp.mean(log_p, axis=-1)
  return -(1 - label_smoothing) * picked + label_smoothing * uniform


def squared_error(prediction: ArrayLike, target: ArrayLike) -> jax.Array:
  """Mean over the last axis of the squared difference.

  On regression values the ordinary mean squared error; on logits the
  distillation of Ba and Caruana. Averaged over a batch it is the mean over
  all elements.

  Args:
    prediction: `[..., D]`, any float dtype.
    target: `[..., D]`; gradients do not flow into it.

  Returns:
    `[...]` float32.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> squared_error(jnp.array([[1.0, 3.0]]), jnp.zeros((1, 2))).tolist()
    [5.0]

  References:
    Ba, Caruana, "Do Deep Nets Really Need to be Deep?", 2014,
    arXiv:1312.6184.
  """
  prediction, target = _f32(prediction), _f32(target)
  check_same_shape('squared_error', prediction=prediction, target=target)
  difference = prediction - jax.lax.stop_gradient(target)
  return jnp.mean(jnp.square(difference), axis=-1)
