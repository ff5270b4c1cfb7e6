"""Losses on how predictions relate: across classes and across a batch.

Owns DIST and MLKD; relations of embeddings and maps are in `relations`. They
compare softmax probabilities, `[B, C]`, and treat the teacher as constant. All
but `inter_class_relation` are a float32 scalar over exactly the batch they get:
under a compiled step that is the global batch.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import numerics
from kd_jax.losses.logits import kl_divergence


def _softmaxes(
  student_logits: ArrayLike, teacher_logits: ArrayLike, temperature: ArrayLike
) -> tuple[jax.Array, jax.Array]:
  student, teacher = numerics.softened(
    student_logits, teacher_logits, temperature
  )
  if student.ndim != 2:
    raise ValueError(
      f'relations within a batch need [B, C], not {student.shape}.'
    )
  return jax.nn.softmax(student), jax.nn.softmax(teacher)


def _direction(x: jax.Array, axis: int) -> jax.Array:
  """`x` less its mean, of norm 1; 0 with gradient 0 where `x` is constant."""
  centred = x - jnp.mean(x, axis=axis, keepdims=True)
  varies = numerics.varies(x, centred, axis)
  return numerics.unit(jnp.where(varies, centred, 0.0), axis)


def _pearson(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
  return jnp.sum(_direction(a, axis) * _direction(b, axis), axis=axis)


def inter_class_relation(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  temperature: ArrayLike = 1.0,
) -> jax.Array:
  """DIST's relation between the classes of one example.

  tau**2 * (1 - r), with r Pearson's correlation of the student's and the
  teacher's softmax(logits / tau) over the classes. It ignores any positive
  factor and offset of the probabilities.

  Args:
    student_logits: `[B, C]` unnormalised scores, any float dtype.
    teacher_logits: `[B, C]`, treated as constant.
    temperature: softmax temperature tau > 0.

  Returns:
    `[B]` float32 in [0, 2 tau**2], 0 where the correlation is 1. Where either
    side gives all classes the same probability the correlation counts as 0
    and has no gradient.

  Raises:
    ValueError: if the shapes differ or are not `[B, C]`.

  Example:
    (2, 1, 3) / 6 and (1, 2, 3) / 6 have correlation 1/2, and tau**2 is 4:
    >>> student = 2 * jnp.log(jnp.array([[2.0, 1.0, 3.0]]))
    >>> teacher = 2 * jnp.log(jnp.array([[1.0, 2.0, 3.0]]))
    >>> loss = inter_class_relation(student, teacher, temperature=2.0)
    >>> round(loss.item(), 4)
    2.0

  References:
    Huang et al., "Knowledge Distillation from A Stronger Teacher", 2022,
    arXiv:2205.10536.
  """
  student, teacher = _softmaxes(student_logits, teacher_logits, temperature)
  return (1 - _pearson(student, teacher, -1)) * temperature**2


def intra_class_relation(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  temperature: ArrayLike = 1.0,
) -> jax.Array:
  """DIST's relation between the examples of a batch, class by class.

  tau**2 * (1 - mean_c r_c), with r_c Pearson's correlation over the batch of
  the student's and the teacher's softmax(logits / tau)[:, c].

  Args:
    student_logits: `[B, C]` unnormalised scores, any float dtype.
    teacher_logits: `[B, C]`, treated as constant.
    temperature: softmax temperature tau > 0.

  Returns:
    float32 scalar in [0, 2 tau**2], 0 where all correlations are 1. A class
    whose probability is the same for the whole batch counts as correlation 0
    and has no gradient.

  Raises:
    ValueError: if the shapes differ or are not `[B, C]`.

  Example:
    (1, 2, 3) / 4 and (2, 1, 3) / 4 of class 0 have correlation 1/2, as have
    those of class 1, and tau**2 is 4:
    >>> student = 2 * jnp.log(jnp.array([[1.0, 3.0], [1.0, 1.0], [3.0, 1.0]]))
    >>> teacher = 2 * jnp.log(jnp.array([[1.0, 1.0], [1.0, 3.0], [3.0, 1.0]]))
    >>> loss = intra_class_relation(student, teacher, temperature=2.0)
    >>> round(loss.item(), 4)
    2.0

  References:
    Huang et al., "Knowledge Distillation from A Stronger Teacher", 2022,
    arXiv:2205.10536.
  """
  student, teacher = _softmaxes(student_logits, teacher_logits, temperature)
  return (1 - jnp.mean(_pearson(student, teacher, 0))) * temperature**2


def dist(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  beta: ArrayLike = 1.0,
  gamma: ArrayLike = 1.0,
  temperature: ArrayLike = 1.0,
) -> jax.Array:
  """DIST: relations between classes and between examples, weighted.

  beta * mean of `inter_class_relation` + gamma * `intra_class_relation`.

  Args:
    student_logits: `[B, C]` unnormalised scores, any float dtype.
    teacher_logits: `[B, C]`, treated as constant.
    beta: weight of the relation between classes.
    gamma: weight of the relation between examples.
    temperature: softmax temperature tau > 0: 1 on ImageNet and 4 on CIFAR in
      the paper. Both parts are multiplied by tau**2.

  Returns:
    float32 scalar, >= 0, and 0 when the two softmaxes agree, up to rounding.

  Raises:
    ValueError: if the shapes differ or are not `[B, C]`.

  Example:
    The correlations are 1/2 in both examples and 1, -1, 1 in the classes, so
    this is 4 (2 * 1/2 + 3 * 2/3):
    >>> student = 2 * jnp.log(jnp.array([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]]))
    >>> teacher = 2 * jnp.log(jnp.array([[2.0, 1.0, 3.0], [3.0, 2.0, 1.0]]))
    >>> loss = dist(student, teacher, beta=2.0, gamma=3.0, temperature=2.0)
    >>> round(loss.item(), 4)
    12.0

  References:
    Huang et al., "Knowledge Distillation from A Stronger Teacher", 2022,
    arXiv:2205.10536.
  """
  pair = student_logits, teacher_logits
  inter = jnp.mean(inter_class_relation(*pair, temperature=temperature))
  intra = intra_class_relation(*pair, temperature=temperature)
  return inter * beta + intra * gamma


def batch_relation(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  temperature: ArrayLike = 1.0,
) -> jax.Array:
  """MLKD's batch level: ||P_s P_s^T - P_t P_t^T||_F^2 / B.

  P is softmax(logits / temperature), `[B, C]`; its products over the classes
  say how alike the predictions of two examples are.

  Args:
    student_logits: `[B, C]` unnormalised scores, any float dtype.
    teacher_logits: `[B, C]`, treated as constant.
    temperature: softmax temperature > 0; no factor of it is applied.

  Returns:
    float32 scalar, >= 0, and 0 when the two softmaxes agree.

  Raises:
    ValueError: if the shapes differ or are not `[B, C]`.

  Example:
    The products of two examples are 0.17 and 0.66, those of one are equal, so
    this is 2 * 0.49**2 / 2:
    >>> student = 2 * jnp.log(jnp.array([[8.0, 1.0, 1.0], [1.0, 1.0, 8.0]]))
    >>> teacher = 2 * jnp.log(jnp.array([[8.0, 1.0, 1.0], [8.0, 1.0, 1.0]]))
    >>> round(batch_relation(student, teacher, temperature=2.0).item(), 4)
    0.2401

  References:
    Jin, Wang, Lin, "Multi-Level Logit Distillation", CVPR 2023.
  """
  student, teacher = _softmaxes(student_logits, teacher_logits, temperature)
  difference = _gram(student) - _gram(teacher)
  return jnp.sum(jnp.square(difference)) / student.shape[0]


def class_relation(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  temperature: ArrayLike = 1.0,
) -> jax.Array:
  """MLKD's class level: ||P_s^T P_s - P_t^T P_t||_F^2 / C.

  P is softmax(logits / temperature), `[B, C]`; its products over the batch
  say which classes are likely together. They are sums, so the loss grows with
  the square of the batch.

  Args:
    student_logits: `[B, C]` unnormalised scores, any float dtype.
    teacher_logits: `[B, C]`, treated as constant.
    temperature: softmax temperature > 0; no factor of it is applied.

  Returns:
    float32 scalar, >= 0, and 0 when the two softmaxes agree.

  Raises:
    ValueError: if the shapes differ or are not `[B, C]`.

  Example:
    This is (4 * 0.07**2 + 2 * 0.63**2) / 3:
    >>> student = 2 * jnp.log(jnp.array([[8.0, 1.0, 1.0], [1.0, 1.0, 8.0]]))
    >>> teacher = 2 * jnp.log(jnp.array([[8.0, 1.0, 1.0], [8.0, 1.0, 1.0]]))
    >>> round(class_relation(student, teacher, temperature=2.0).item(), 4)
    0.2711

  References:
    Jin, Wang, Lin, "Multi-Level Logit Distillation", CVPR 2023.
  """
  student, teacher = _softmaxes(student_logits, teacher_logits, temperature)
  difference = _gram(student.T) - _gram(teacher.T)
  return jnp.sum(jnp.square(difference)) / student.shape[1]


def _gram(rows: jax.Array) -> jax.Array:
  return jnp.matmul(rows, rows.T, precision=numerics.HIGHEST)


def multi_level(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  temperatures: Sequence[ArrayLike] = (2.0, 3.0, 4.0, 5.0, 6.0),
) -> jax.Array:
  """Multi-level logit distillation (MLKD): instance, batch and class.

  The sum over the temperatures, as in the paper, of
    mean over the batch of `kl_divergence` (times T**2)
    + `batch_relation` + `class_relation`, all with weight 1.

  The paper trains on a weakly and a strongly augmented view: call it for each.
  The public code differs: in the strong view's instance terms at T = 2 and 6
  it uses the weak view's logits, it computes the strong view's batch and
  class terms without returning them, and its confidence masks only scale
  means that are already reduced. None of that is done here.

  Args:
    student_logits: `[B, C]` unnormalised scores, any float dtype.
    teacher_logits: `[B, C]`, treated as constant.
    temperatures: the softmax temperatures, each > 0.

  Returns:
    float32 scalar, >= 0, and 0 when the two softmaxes agree.

  Raises:
    ValueError: if the shapes differ or are not `[B, C]`, or there is no
      temperature.

  Example:
    Twice the sum of 4 * 0.7 log(8) / 2 and the 0.2401 and 0.2711 of the
    examples of `batch_relation` and `class_relation`:
    >>> student = 2 * jnp.log(jnp.array([[8.0, 1.0, 1.0], [1.0, 1.0, 8.0]]))
    >>> teacher = 2 * jnp.log(jnp.array([[8.0, 1.0, 1.0], [8.0, 1.0, 1.0]]))
    >>> loss = multi_level(student, teacher, temperatures=(2.0, 2.0))
    >>> round(loss.item(), 4)
    6.8449

  References:
    Jin, Wang, Lin, "Multi-Level Logit Distillation", CVPR 2023.
  """
  if not temperatures:
    raise ValueError('multi_level: give at least one temperature.')
  pair = student_logits, teacher_logits
  levels = [
    batch_relation(*pair, temperature=t)
    + class_relation(*pair, temperature=t)
    + jnp.mean(kl_divergence(*pair, temperature=t))
    for t in temperatures
  ]
  return sum(levels[1:], start=levels[0])
