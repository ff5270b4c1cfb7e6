"""Losses on features that student and teacher have in the same shape.

Features are `[B, ..., D]` and maps `[B, H, W, D]`; the teacher is constant,
and every loss is `[B]` float32, whose mean over the batch is the published
value. Owns no connectors: a term adapts the student's features first. Losses
on summaries of maps, which need fewer equal sizes, are in `maps`.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import numerics
from kd_jax.types import check_same_shape


def _pair(
  what: str, student: ArrayLike, teacher: ArrayLike
) -> tuple[jax.Array, jax.Array]:
  """Both as float32 of one shape, the teacher's as a constant."""
  return numerics.pair(
    f'{what} needs equal shapes, to which the connector of a term adapts them',
    student=student,
    teacher=teacher,
  )


def _rest(x: jax.Array) -> tuple[int, ...]:
  """All axes but the batch."""
  return tuple(range(1, x.ndim))


def hint(student: ArrayLike, teacher: ArrayLike) -> jax.Array:
  """FitNets: the mean squared error of hidden features.

  Args:
    student: `[B, ...]` features after the regressor, any float dtype.
    teacher: `[B, ...]`, treated as constant.

  Returns:
    `[B]` float32, the mean over all axes but the batch.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> hint(jnp.array([[1.0, 3.0]]), jnp.zeros((1, 2))).tolist()
    [5.0]

  References:
    Romero et al., "FitNets: Hints for Thin Deep Nets", 2014,
    arXiv:1412.6550.
  """
  student, teacher = _pair('hint', student, teacher)
  return jnp.mean(jnp.square(student - teacher), axis=_rest(student))


def masked_generation(generated: ArrayLike, teacher: ArrayLike) -> jax.Array:
  """Masked generative distillation (MGD): the summed squared error.

  The sum, not the mean, over positions and channels: the published weights,
  2e-5 for detection and 7e-5 for classification, belong to it.

  Args:
    generated: `[B, H, W, D]` what the generator made of the student's masked
      features, any float dtype.
    teacher: `[B, H, W, D]`, treated as constant.

  Returns:
    `[B]` float32.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> masked_generation(jnp.ones((1, 2, 2, 3)), jnp.zeros((1, 2, 2, 3)))
    Array([12.], dtype=float32)

  References:
    Yang et al., "Masked Generative Distillation", 2022, arXiv:2205.01529.
  """
  generated, teacher = _pair('masked_generation', generated, teacher)
  return jnp.sum(jnp.square(generated - teacher), axis=_rest(generated))


def variational_information(
  mean: ArrayLike, teacher: ArrayLike, variance: ArrayLike
) -> jax.Array:
  """Variational information distillation (VID).

  The negative log-likelihood of the teacher's features under a normal
  distribution with the student's prediction as mean and one variance per
  channel, without its constant:
    mean over elements of ((mean - teacher)**2 / variance + log variance) / 2.
  The variance is to be trained; it is differentiated as the mean is.

  Args:
    mean: `[B, ..., D]` the regressor's output, any float dtype.
    teacher: `[B, ..., D]`, treated as constant.
    variance: `[D]`, positive.

  Returns:
    `[B]` float32, of any sign.

  Raises:
    ValueError: if the shapes of `mean` and `teacher` differ.

  Example:
    >>> zeros = jnp.zeros((1, 4, 4, 2))
    >>> variational_information(zeros + 3.0, zeros, jnp.ones(2)).tolist()
    [4.5]

  References:
    Ahn et al., "Variational Information Distillation for Knowledge Transfer",
    2019, arXiv:1904.05835.
  """
  mean, teacher = _pair('variational_information', mean, teacher)
  variance = jnp.broadcast_to(numerics.float32(variance), mean.shape)
  error = jnp.square(mean - teacher) / variance
  return 0.5 * jnp.mean(error + jnp.log(variance), axis=_rest(mean))


def hierarchical_context(student: ArrayLike, teacher: ArrayLike) -> jax.Array:
  """ReviewKD's hierarchical context loss: errors at several resolutions.

  The mean squared error of the maps, and with weights 1/2, 1/4 and 1/8 that
  of the maps averaged to 4 x 4, 2 x 2 and 1 x 1, divided by the sum of the
  weights. Resolutions that are not below the maps' own are left out, and the
  weights move up.

  Args:
    student: `[B, H, W, D]` fused maps, any float dtype.
    teacher: `[B, H, W, D]`, treated as constant.

  Returns:
    `[B]` float32.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> ones = jnp.ones((1, 8, 8, 3))
    >>> hierarchical_context(3 * ones, ones).tolist()
    [4.0]

  References:
    Chen et al., "Distilling Knowledge via Knowledge Review", 2021,
    arXiv:2104.09044.
  """
  student, teacher = _pair('hierarchical_context', student, teacher)
  difference = student - teacher
  total, weight, weights = jnp.mean(jnp.square(difference), (1, 2, 3)), 1.0, 1.0
  for side in (4, 2, 1):
    if side < min(difference.shape[1:3]):
      pooled = numerics.average_pool_to(difference, (side, side))
      weight /= 2
      weights += weight
      total += weight * jnp.mean(jnp.square(pooled), axis=(1, 2, 3))
  return total / weights


def activation_boundary(
  student: ArrayLike, teacher: ArrayLike, *, margin: ArrayLike = 1.0
) -> jax.Array:
  """Activation boundaries (AB): which neurons are active, with a margin.

  Summed over all elements, with s and t the values before the ReLU,
    max(0, margin - s)**2 where t > 0, and max(0, margin + s)**2 elsewhere.
  The published code multiplies the mean over the batch by 3/1000 and by
  2**(i - n + 1) for the i-th of n layers, counted from 0.

  Args:
    student: `[B, ..., D]` features before the ReLU, any float dtype.
    teacher: `[B, ..., D]` the teacher's, treated as constant.
    margin: how far the student's values should be from 0, >= 0.

  Returns:
    `[B]` float32, 0 where all signs agree and all values are beyond the
    margin.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> activation_boundary(jnp.array([[0.5, 2.0]]), jnp.array([[1.0, -1.0]]))
    Array([9.25], dtype=float32)

  References:
    Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries
    Formed by Hidden Neurons", 2018, arXiv:1811.03233.
  """
  student, teacher = _pair('activation_boundary', student, teacher)
  missing = jnp.where(teacher > 0, margin - student, margin + student)
  return jnp.sum(jnp.square(jax.nn.relu(missing)), axis=_rest(student))


def overhaul(
  student: ArrayLike, teacher: ArrayLike, margin: ArrayLike
) -> jax.Array:
  """Overhaul of feature distillation (OFD): partial L2 with a margin ReLU.

  The target is max(teacher, margin). The squared error is summed over all
  elements except those where the target is not positive and the student is
  not above it: the ReLU that follows makes no difference of them. The
  published code weighs the i-th of n layers, counted from 0, by
  2**(i - n + 1), times 1e-3 on CIFAR.

  Args:
    student: `[B, ..., D]` features before the ReLU, any float dtype.
    teacher: `[B, ..., D]` the teacher's, treated as constant.
    margin: `[D]`, not positive, see `batch_norm_margin`; treated as constant.

  Returns:
    `[B]` float32.

  Raises:
    ValueError: if the shapes of `student` and `teacher` differ.

  Example:
    >>> student, teacher = jnp.array([[-3.0, 1.0]]), jnp.array([[-2.0, -2.0]])
    >>> overhaul(student, teacher, jnp.array([-0.5, -0.5])).tolist()
    [2.25]

  References:
    Heo et al., "A Comprehensive Overhaul of Feature Distillation", 2019,
    arXiv:1904.01866.
  """
  student, teacher = _pair('overhaul', student, teacher)
  margin = jnp.broadcast_to(numerics.constant(margin), teacher.shape)
  target = jnp.maximum(teacher, margin)
  counts = (student > target) | (target > 0)
  error = jnp.where(counts, student - target, 0.0)
  return jnp.sum(jnp.square(error), axis=_rest(student))


def batch_norm_margin(scale: ArrayLike, bias: ArrayLike) -> jax.Array:
  """The margins of `overhaul`: the mean of a channel's negative values.

  After BatchNorm a channel is taken as normal with mean `bias` and standard
  deviation |scale|; the margin is E[x | x < 0]. Where negative values are
  rarer than 1 in 1000 it is -3 |scale|, as in the published code. A channel of
  scale 0 is constant, and its margin min(bias, 0).

  Args:
    scale: `[D]` the scale (gamma) of the teacher's BatchNorm before the ReLU.
    bias: `[D]` its bias (beta).

  Returns:
    `[D]` float32, not positive and constant.

  Example:
    >>> margin = batch_norm_margin(jnp.array([1.0, 2.0]), jnp.array([0.0, 9.0]))
    >>> [round(m, 4) for m in margin.tolist()]
    [-0.7979, -6.0]

  References:
    Heo et al., "A Comprehensive Overhaul of Feature Distillation", 2019,
    arXiv:1904.01866, equation 3.
  """
  std, bias = jnp.abs(numerics.constant(scale)), numerics.constant(bias)
  varies = std > 0
  ratio = bias / jnp.where(varies, std, 1.0)
  normal = jax.scipy.stats.norm
  mean = bias - std * jnp.exp(normal.logpdf(ratio) - normal.logcdf(-ratio))
  common = jnp.where(varies, normal.cdf(-ratio) > 1e-3, bias < 0)
  return jnp.where(common, mean, -3 * std)


def norm_direction(
  student: ArrayLike,
  teacher: ArrayLike,
  class_means: ArrayLike,
  label: ArrayLike,
) -> jax.Array:
  """KD++'s norm and direction (ND) loss on embeddings.

  With e the unit vector along the teacher's mean embedding of the class,
    1 - <student, e> / max(|student|, |teacher|),
  which is small for a student that points along e and is as long as the
  teacher.

  Args:
    student: `[B, D]` embeddings before the classifier, any float dtype.
    teacher: `[B, D]`, treated as constant.
    class_means: `[C, D]` the teacher's mean embedding of each class, treated
      as constant.
    label: `[B]` integer class ids in [0, C).

  Returns:
    `[B]` float32 in [0, 2].

  Raises:
    ValueError: if student, teacher and class means differ in their sizes.

  Example:
    >>> means, label = jnp.eye(2), jnp.array([0])
    >>> student, teacher = jnp.array([[3.0, 0.0]]), jnp.array([[0.0, 4.0]])
    >>> norm_direction(student, teacher, means, label).tolist()
    [0.25]

  References:
    Wang et al., "Improving Knowledge Distillation via Regularizing Feature
    Norm and Direction", 2023, arXiv:2305.17007.
  """
  student, teacher = _pair('norm_direction', student, teacher)
  means = numerics.constant(class_means)[jnp.asarray(label)]
  check_same_shape('norm_direction', student=student, class_mean=means)
  along = jnp.sum(student * numerics.unit(means), axis=-1)
  length = jnp.maximum(numerics.norm(student), numerics.norm(teacher))
  return 1 - along / jnp.where(length > 0, length, 1.0)
