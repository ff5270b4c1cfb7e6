"""Losses that treat the label's class apart, or get only a part of a teacher.

Like those of `logits` they are pure, float32, unreduced over the leading axes
(`[..., C] -> [...]`) and without weights or schedules. Owns the distributions
that stand in for a teacher's: split by label, made by hand, or the top k.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import numerics
from kd_jax.losses.logits import kl_divergence
from kd_jax.types import check_same_shape


def _is_label(
  what: str, logits: jax.Array, label: ArrayLike
) -> tuple[jax.Array, jax.Array]:
  """`[..., C]`: the label as one hot of bools, and the other classes."""
  label = numerics.label_of(logits, label)
  classes = logits.shape[-1]
  if classes < 2:
    raise ValueError(f'{what} needs at least two classes.')
  target = jax.nn.one_hot(label, classes, dtype=bool)
  return target, ~target


def _log_softmax_of(classes: jax.Array, logits: jax.Array) -> jax.Array:
  """The log-softmax over some classes; -inf for the others."""
  return jax.nn.log_softmax(jnp.where(classes, logits, -jnp.inf))


def _log_binary(
  target: jax.Array, others: jax.Array, log_p: jax.Array
) -> jax.Array:
  """`[..., 2]`: log p of the target and of all other classes together."""
  return jnp.stack(
    [
      jax.nn.logsumexp(jnp.where(target, log_p, -jnp.inf), axis=-1),
      jax.nn.logsumexp(jnp.where(others, log_p, -jnp.inf), axis=-1),
    ],
    axis=-1,
  )


def decoupled_kd(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  label: ArrayLike,
  *,
  alpha: ArrayLike = 1.0,
  beta: ArrayLike = 8.0,
  temperature: ArrayLike = 4.0,
) -> jax.Array:
  """Decoupled knowledge distillation (DKD): target and other classes apart.

  With b(T) = [p(T)[label], 1 - p(T)[label]] and q(T) the softmax over the
  classes other than the label, the loss of one example is
    T**2 * (alpha * KL(b_teacher || b_student)
            + beta * KL(q_teacher || q_student)).
  `kl_divergence` is the same with alpha = 1 and beta = 1 - p_teacher[label]:
  the more certain the teacher, the less it says of the other classes.

  Args:
    student_logits: `[..., C]` unnormalised scores with C >= 2, any float
      dtype.
    teacher_logits: `[..., C]`, treated as constant.
    label: `[...]` integer class ids in [0, C).
    alpha: weight of the target class.
    beta: weight of the other classes; the paper's differ by pair of networks,
      from 0.5 on ImageNet to 8.
    temperature: softmax temperature T > 0.

  Returns:
    `[...]` float32, 0 when the two softmaxes agree and else positive, up to
    rounding of about 2e-7 * T**2 * beta.

  Raises:
    ValueError: if the shapes do not fit or there is only one class.

  Example:
    At T = 2 this is 4 (alpha log(4/3) / 2 + beta log(2) / 3):
    >>> student = 2 * jnp.log(jnp.array([[1.0, 1.0, 2.0]]))
    >>> teacher = 2 * jnp.log(jnp.array([[3.0, 2.0, 1.0]]))
    >>> loss = decoupled_kd(student, teacher, jnp.array([0]), temperature=2.0)
    >>> round(loss.item(), 3)
    7.969

  References:
    Zhao et al., "Decoupled Knowledge Distillation", 2022, arXiv:2203.08679.
  """
  student, teacher = numerics.softened(
    student_logits, teacher_logits, temperature
  )
  target, others = _is_label('decoupled_kd', student, label)
  target_kl = numerics.kl(
    _log_binary(target, others, jax.nn.log_softmax(teacher)),
    _log_binary(target, others, jax.nn.log_softmax(student)),
  )
  others_kl = numerics.kl(
    _log_softmax_of(others, teacher), _log_softmax_of(others, student)
  )
  return (target_kl * alpha + others_kl * beta) * temperature**2


def normalized_kd(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  label: ArrayLike,
  *,
  gamma: ArrayLike = 1.5,
  temperature: ArrayLike = 1.0,
) -> jax.Array:
  """Normalized knowledge distillation (NKD): two cross-entropies.

  With p = softmax(logits) and q(T) the softmax over the classes other than
  the label, the loss of one example is
    -p_teacher[label] * log p_student[label]
    - gamma * T**2 * sum_{c != label} q_teacher(T)[c] * log q_student(T)[c].
  It comes beside a cross-entropy with the label. Being a cross-entropy it is
  not 0 where student and teacher agree, nor is its gradient there, since the
  first part always pulls towards the label.

  Args:
    student_logits: `[..., C]` unnormalised scores with C >= 2, any float
      dtype.
    teacher_logits: `[..., C]`, treated as constant.
    label: `[...]` integer class ids in [0, C).
    gamma: weight of the other classes.
    temperature: softmax temperature T > 0 of the other classes; the label's
      part has none.

  Returns:
    `[...]` float32, >= 0.

  Raises:
    ValueError: if the shapes do not fit or there is only one class.

  Example:
    At T = 2 the student is (1, 1, 2) / 4 and the teacher (3, 2, 1) / 6, at
    T = 1 they are (1, 1, 4) / 6 and (9, 4, 1) / 14:
    9/14 log(6) + 1.5 * 4 (2/3 log(3) + 1/3 log(3/2)):
    >>> student = 2 * jnp.log(jnp.array([[1.0, 1.0, 2.0]]))
    >>> teacher = 2 * jnp.log(jnp.array([[3.0, 2.0, 1.0]]))
    >>> loss = normalized_kd(student, teacher, jnp.array([0]), temperature=2.0)
    >>> round(loss.item(), 3)
    6.357

  References:
    Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation:
    A Unified Approach with Normalized Loss and Customized Soft Labels", 2023,
    arXiv:2303.13005.
  """
  student, teacher = numerics.logits_pair(student_logits, teacher_logits)
  target, others = _is_label('normalized_kd', student, label)
  of_label = jnp.where(
    target, jax.nn.softmax(teacher) * jax.nn.log_softmax(student), 0.0
  )
  q = jnp.exp(_log_softmax_of(others, teacher / temperature))
  log_q = _log_softmax_of(others, student / temperature)
  of_others = q * jnp.where(q > 0, log_q, 0.0)
  return -jnp.sum(of_label, axis=-1) - gamma * temperature**2 * jnp.sum(
    of_others, axis=-1
  )


def teacher_free_kd(
  student_logits: ArrayLike,
  label: ArrayLike,
  *,
  correct_probability: float = 0.99,
  temperature: ArrayLike = 20.0,
) -> jax.Array:
  """Distillation from a virtual teacher that is made by hand (Tf-KD).

  The virtual teacher gives `correct_probability` to the label and spreads the
  rest evenly over the other classes. Its log-probabilities are its logits:
  the loss is `kl_divergence` with them, so both sides are softened, the
  teacher to a distribution proportional to its probabilities to the power of
  1 / T, and the loss is multiplied by T**2. The paper writes the divergence
  without that factor, T**2 = 400 at its temperature. Its public code instead
  takes the softmax of the probabilities over T, which is nearly uniform, does
  not soften the student, and multiplies by a tuned number.

  Args:
    student_logits: `[..., C]` unnormalised scores with C >= 2, any float
      dtype.
    label: `[...]` integer class ids in [0, C).
    correct_probability: the virtual teacher's probability of the label, in
      (0, 1).
    temperature: softmax temperature T > 0.

  Returns:
    `[...]` float32, 0 where the student is the virtual teacher and else
    positive, up to rounding of about 2e-7 * T**2.

  Raises:
    ValueError: if the shapes do not fit, there is only one class, or the
      probability is outside (0, 1).

  Example:
    >>> loss = teacher_free_kd(jnp.zeros((1, 4)), jnp.array([2]))
    >>> round(float(loss[0]), 2)
    3.32

  References:
    Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing
    Regularization", 2019, arXiv:1909.11723.
  """
  if not 0 < correct_probability < 1:
    raise ValueError(
      'teacher_free_kd: correct_probability must be in (0, 1), not '
      f'{correct_probability}.'
    )
  student_logits = numerics.float32(student_logits)
  target, _ = _is_label('teacher_free_kd', student_logits, label)
  others = student_logits.shape[-1] - 1
  virtual = jnp.where(
    target,
    math.log(correct_probability),
    math.log1p(-correct_probability) - math.log(others),
  )
  return kl_divergence(student_logits, virtual, temperature=temperature)


def top_k_kl_divergence(
  student_logits: ArrayLike,
  top_probabilities: ArrayLike,
  top_index: ArrayLike,
  *,
  temperature: ArrayLike = 1.0,
  tail: str = 'renormalize',
) -> jax.Array:
  """KL(teacher || student) where only the teacher's k likeliest are known.

  Made for stored teachers: k probabilities and class ids in place of C
  logits. The top k of a distribution is a biased picture of it; `tail` says
  what stands for the missing mass:
    'renormalize': nothing. The k probabilities are divided by their sum, and
      the student's softmax is over the same k classes.
    'uniform': the missing mass, 1 less the sum, is spread evenly over the
      other C - k classes, and the student's softmax is over all classes. This
      is the marginal smoothing of FKD.

  Args:
    student_logits: `[..., C]` unnormalised scores, any float dtype.
    top_probabilities: `[..., k]` of the teacher's softmax at the temperature
      given, treated as constant; their sum is at most 1. An example whose
      probabilities are all 0 contributes nothing with 'renormalize'.
    top_index: `[..., k]` integer class ids in [0, C), distinct in an example.
    temperature: softmax temperature T > 0 of the student and, when it was
      stored, of the teacher.
    tail: 'renormalize' or 'uniform'.

  Returns:
    `[...]` float32, 0 when the two distributions agree and else positive, up
    to rounding; times T**2, as `kl_divergence`.

  Raises:
    ValueError: if the shapes do not fit, k exceeds C, or `tail` is unknown.

  Example:
    KL((2/3, 1/3) || (1/3, 2/3)) of classes 3 and 1, and of all classes
    KL((1, 2, 1, 4) / 8 || (1, 4, 1, 2) / 8), both times T**2 = 4:
    >>> student = 2 * jnp.log(jnp.array([[1.0, 4.0, 1.0, 2.0]]))
    >>> top = jnp.array([[0.5, 0.25]]), jnp.array([[3, 1]])
    >>> round(top_k_kl_divergence(student, *top, temperature=2.0).item(), 4)
    0.9242
    >>> loss = top_k_kl_divergence(
    ...   student, *top, temperature=2.0, tail='uniform'
    ... )
    >>> round(loss.item(), 4)
    0.6931

  References:
    Shen, Xing, "A Fast Knowledge Distillation Framework for Visual
    Recognition", 2021, arXiv:2112.01528.
  """
  student_logits = numerics.float32(student_logits)
  top = numerics.constant(top_probabilities)
  top_index = jnp.asarray(top_index)
  check_same_shape('the top k', top_probabilities=top, top_index=top_index)
  check_same_shape(
    'the top k are those of each example',
    student_logits=student_logits[..., 0],
    top_index=top_index[..., 0],
  )
  classes, k = student_logits.shape[-1], top.shape[-1]
  if k > classes:
    raise ValueError(f'the top {k} cannot be of {classes} classes.')
  student = student_logits / temperature
  mass = jnp.sum(top, axis=-1, keepdims=True)
  if tail == 'renormalize':
    student = jnp.take_along_axis(student, top_index, axis=-1)
    teacher = top / jnp.where(mass > 0, mass, 1.0)
  elif tail == 'uniform':
    spread = jnp.maximum(1 - mass, 0.0) / max(classes - k, 1)
    teacher = jnp.put_along_axis(
      jnp.broadcast_to(spread, student.shape),
      top_index,
      top,
      axis=-1,
      inplace=False,
    )
  else:
    raise ValueError(
      f'Unknown tail {tail!r} of top_k_kl_divergence: valid: renormalize, '
      'uniform.'
    )
  kl = numerics.kl(jnp.log(teacher), jax.nn.log_softmax(student))
  return kl * temperature**2
