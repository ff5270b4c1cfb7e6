"""Losses on how the examples of a batch relate in feature space.

Owns RKD, SP, PKT and CC; relations of predictions are in `correlations`. They
take embeddings `[B, D]`, or maps that are flattened to `[B, -1]`; the teacher
is constant. Each is a float32 scalar over exactly the batch it gets: under a
compiled step that is the global batch. Except for `correlation_congruence`
student and teacher may have different sizes, and the order of the batch is of
no importance.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import numerics
from kd_jax.losses.values import huber
from kd_jax.types import check_same_shape

# The differences [examples, B, D], and what [B, B] is made of them, held at a
# time, in floats.
_CHUNK = 2**24


def _rows(
  what: str, student: ArrayLike, teacher: ArrayLike
) -> tuple[jax.Array, jax.Array]:
  """Both flattened to `[B, -1]` in float32, the teacher's as a constant."""
  student, teacher = numerics.batch_pair(what, student, teacher)
  return student.reshape(len(student), -1), teacher.reshape(len(teacher), -1)


def _from_each(f: Callable[..., jax.Array], *rows: jax.Array) -> jax.Array:
  """`f` of every example's differences from all examples, `[B, D]` each.

  Differences of their own are exact where two examples agree, which the
  products of a Gram matrix are not. They are made for as many examples at a
  time as memory allows, and again in the backward pass.
  """
  count, width = len(rows[0]), max(x.shape[1] for x in rows)

  @jax.checkpoint
  def from_one(one):
    return f(*(x - x_i[None] for x, x_i in zip(rows, one, strict=True)))

  at_a_time = min(count, max(1, _CHUNK // (count * max(count, width))))
  return jax.lax.map(from_one, rows, batch_size=at_a_time)


def _relative_distances(rows: jax.Array) -> jax.Array:
  distance = _from_each(numerics.norm, rows)
  count = jnp.sum(distance > 0)
  mean = jnp.sum(distance) / jnp.maximum(count, 1)
  return distance / jnp.where(count > 0, mean, 1.0)


def relational_distance(student: ArrayLike, teacher: ArrayLike) -> jax.Array:
  """Relational distillation (RKD) of distances between examples.

  All pairwise Euclidean distances of a batch, divided by the mean of those
  that are positive; the mean over the B**2 pairs of smooth L1 (`huber` with
  delta 1) between the student's and the teacher's. Gradients flow through the
  student's mean too. The published weight is 25.

  Args:
    student: `[B, ...]` embeddings or maps, any float dtype.
    teacher: `[B, ...]`, treated as constant; other sizes are fine.

  Returns:
    float32 scalar, >= 0; 0 where the distances are proportional.

  Raises:
    ValueError: if they are not of one batch.

  Example:
    Two of the three relative distances, (0, 1, 1) and (1, 1, 0), differ by 1:
    >>> student = jnp.array([[0.0], [0.0], [3.0]])
    >>> teacher = jnp.array([[0.0], [5.0], [5.0]])
    >>> round(relational_distance(student, teacher).item(), 4)
    0.2222

  References:
    Park et al., "Relational Knowledge Distillation", 2019, arXiv:1904.05068.
  """
  student, teacher = _rows('relational_distance', student, teacher)
  return jnp.mean(
    huber(_relative_distances(student), _relative_distances(teacher))
  )


def relational_angle(student: ArrayLike, teacher: ArrayLike) -> jax.Array:
  """Relational distillation (RKD) of angles between triples of examples.

  For examples i, j, k the cosine at j of the angle between i - j and k - j;
  the mean over the B**3 triples of smooth L1 (`huber` with delta 1) between
  the student's and the teacher's. Where two of the three agree the cosine is
  0. The published weight is 50.

  Args:
    student: `[B, ...]` embeddings or maps, any float dtype.
    teacher: `[B, ...]`, treated as constant; other sizes are fine.

  Returns:
    float32 scalar, >= 0; 0 where the angles agree.

  Raises:
    ValueError: if they are not of one batch.

  Example:
    The cosines (1, -1, 1) of a line and (0, 0.7071, 0.7071) of half a square:
    >>> student = jnp.array([[0.0], [1.0], [2.0]])
    >>> teacher = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> round(relational_angle(student, teacher).item(), 4)
    0.1296

  References:
    Park et al., "Relational Knowledge Distillation", 2019, arXiv:1904.05068.
  """
  student, teacher = _rows('relational_angle', student, teacher)

  def at_vertex(student, teacher):
    return jnp.mean(huber(_cosines(student), _cosines(teacher)))

  return jnp.mean(_from_each(at_vertex, student, teacher))


def _cosines(rows: jax.Array) -> jax.Array:
  rows = numerics.unit(rows)
  return jnp.matmul(rows, rows.T, precision=numerics.HIGHEST)


def similarity_preserving(student: ArrayLike, teacher: ArrayLike) -> jax.Array:
  """Similarity-preserving distillation (SP).

  With F the batch flattened to `[B, -1]` and G the matrix F F^T whose rows
  are divided by their Euclidean norms: ||G_s - G_t||_F^2 / B**2. The published
  weight is 3000.

  Args:
    student: `[B, ...]` maps or embeddings, any float dtype.
    teacher: `[B, ...]`, treated as constant; other sizes are fine.

  Returns:
    float32 scalar, >= 0; 0 where the matrices agree.

  Raises:
    ValueError: if they are not of one batch.

  Example:
    The matrix is the identity for the student and 0.7071 for the teacher:
    >>> student, teacher = jnp.eye(2), jnp.array([[3.0], [3.0]])
    >>> round(similarity_preserving(student, teacher).item(), 4)
    0.2929

  References:
    Tung, Mori, "Similarity-Preserving Knowledge Distillation", 2019,
    arXiv:1907.09682.
  """
  student, teacher = _rows('similarity_preserving', student, teacher)

  def similarity(rows):
    gram = jnp.matmul(rows, rows.T, precision=numerics.HIGHEST)
    return numerics.unit(gram)

  return jnp.mean(jnp.square(similarity(student) - similarity(teacher)))


def probabilistic_transfer(
  student: ArrayLike, teacher: ArrayLike, *, eps: float = 1e-7
) -> jax.Array:
  """Probabilistic knowledge transfer (PKT).

  The cosines of all pairs, moved to [0, 1] by (cos + 1) / 2 and divided by
  the sum of their row, are conditional probabilities K. The loss is the mean
  over the B**2 entries of K_t * log((K_t + eps) / (K_s + eps)): B times
  smaller than the mean divergence of a row, which is why the published weight
  is 30000.

  Args:
    student: `[B, ...]` embeddings or maps, any float dtype.
    teacher: `[B, ...]`, treated as constant; other sizes are fine.
    eps: keeps the logarithm finite.

  Returns:
    float32 scalar, 0 where the probabilities agree and else positive, up to
    `eps` and rounding.

  Raises:
    ValueError: if they are not of one batch.

  Example:
    The first row is (2/3, 1/3) for the student and (1, 0) for the teacher:
    >>> student, teacher = jnp.eye(2), jnp.array([[1.0], [-3.0]])
    >>> round(probabilistic_transfer(student, teacher).item(), 4)
    0.2027

  References:
    Passalis, Tefas, "Learning Deep Representations with Probabilistic
    Knowledge Transfer", 2018, arXiv:1803.10837.
  """
  student, teacher = _rows('probabilistic_transfer', student, teacher)

  def probabilities(rows):
    # Rounded cosines go a little below -1.
    positive = jnp.maximum(_cosines(rows) + 1, 0) / 2
    return positive / jnp.sum(positive, axis=1, keepdims=True)

  k_student, k_teacher = probabilities(student), probabilities(teacher)
  log_ratio = jnp.log(k_teacher + eps) - jnp.log(k_student + eps)
  return jnp.mean(k_teacher * log_ratio)


def correlation_congruence(student: ArrayLike, teacher: ArrayLike) -> jax.Array:
  """Correlation congruence (CC), as the authors' code has it.

  With D the student's embeddings less the teacher's: the mean over the B - 1
  neighbours i, i + 1 in the batch of sum_d |D_i[d]| * |D_{i+1}[d]|. It depends
  on the order of the batch, which should be shuffled, and is 0 when every
  other example agrees. The paper's formula is another: it compares matrices
  of a Gaussian kernel. The published weight is 0.02, after a learned
  projection of both sides to 128 features.

  Args:
    student: `[B, ...]` embeddings with B >= 2, any float dtype.
    teacher: of the student's shape, treated as constant.

  Returns:
    float32 scalar, >= 0; 0 where the embeddings agree.

  Raises:
    ValueError: if the shapes differ or there is only one example.

  Example:
    >>> x = jnp.array([[0.0, 1.0], [3.0, 4.0]])
    >>> correlation_congruence(x, x + 2).item()
    8.0

  References:
    Peng et al., "Correlation Congruence for Knowledge Distillation", 2019,
    arXiv:1904.01802.
  """
  student, teacher = _rows('correlation_congruence', student, teacher)
  check_same_shape('correlation_congruence', student=student, teacher=teacher)
  if len(student) < 2:
    raise ValueError('correlation_congruence needs at least two examples.')
  distance = jnp.abs(student - teacher)
  return jnp.mean(jnp.sum(distance[:-1] * distance[1:], axis=1))
