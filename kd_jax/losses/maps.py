"""Losses on what maps say after a summary: where, how alike, how related.

Owns losses of summaries; those of the features themselves are in `features`.
Maps are `[B, H, W, D]`; the teacher is constant, and every loss is `[B]`
float32, whose mean over the batch is the published value. A summary removes
channels or positions, so student and teacher may differ in these.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import numerics
from kd_jax.types import check_same_shape


def attention_transfer(
  student: ArrayLike, teacher: ArrayLike, *, p: ArrayLike = 2.0
) -> jax.Array:
  """Attention transfer (AT): where the network looks.

  The attention map is the mean over channels of |F|**p, flattened and divided
  by its Euclidean norm; the loss is the mean over positions of the squared
  difference. The paper sums over channels, which the norm undoes, and takes
  the norm of the difference, where its code takes the mean square.

  Args:
    student: `[B, H, W, D]` maps, any float dtype.
    teacher: `[B, h, w, E]`, treated as constant. The maps of higher resolution
      are averaged to the lower one; any channels.
    p: power, >= 1.

  Returns:
    `[B]` float32; 0 where the attention maps are proportional.

  Raises:
    ValueError: if the batches differ.

  Example:
    The attention maps (0.6, 0.8) and (1, 0):
    >>> student = jnp.array([[[[1.0, -1.0, 1.0], [0.0, 0.0, 2.0]]]])
    >>> teacher = jnp.array([[[[5.0], [0.0]]]])
    >>> round(attention_transfer(student, teacher).item(), 4)
    0.4

  References:
    Zagoruyko, Komodakis, "Paying More Attention to Attention", 2016,
    arXiv:1612.03928.
  """
  student, teacher = _same_resolution('attention_transfer', student, teacher)
  difference = _attention(student, p) - _attention(teacher, p)
  return jnp.mean(jnp.square(difference), axis=-1)


def factor_transfer(
  student: ArrayLike,
  teacher: ArrayLike,
  *,
  p1: ArrayLike = 2.0,
  p2: ArrayLike = 1.0,
) -> jax.Array:
  """Factor transfer (FT): the difference of normalised factors.

  A factor is the mean over channels of |F|**p1, flattened and divided by its
  Euclidean norm; the loss is the mean over positions of |difference|**p2. So
  does the code whose published results the field compares with. The maps are
  what the paper's translator and paraphraser return: a term trains these.

  Args:
    student: `[B, H, W, D]` the translator's maps, any float dtype.
    teacher: `[B, h, w, E]` the paraphraser's, treated as constant. The maps of
      higher resolution are averaged to the lower one; any channels.
    p1: power of the factors, >= 1.
    p2: power of the difference, >= 1.

  Returns:
    `[B]` float32; 0 where the factors are proportional.

  Raises:
    ValueError: if the batches differ.

  Example:
    The factors (0.6, 0.8) and (1, 0):
    >>> student = jnp.array([[[[1.0, -1.0, 1.0], [0.0, 0.0, 2.0]]]])
    >>> teacher = jnp.array([[[[5.0], [0.0]]]])
    >>> round(factor_transfer(student, teacher).item(), 4)
    0.6

  References:
    Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via
    Factor Transfer", 2018, arXiv:1802.04977.
  """
  student, teacher = _same_resolution('factor_transfer', student, teacher)
  difference = _attention(student, p1) - _attention(teacher, p1)
  return jnp.mean(jnp.abs(difference) ** p2, axis=-1)


def _same_resolution(
  what: str, student: ArrayLike, teacher: ArrayLike
) -> tuple[jax.Array, jax.Array]:
  pair = numerics.batch_pair(what, student, teacher, 'B, H, W, D')
  return numerics.to_smaller(*pair)


def _attention(maps: jax.Array, p: ArrayLike) -> jax.Array:
  """`[B, H, W, D] -> [B, H * W]` of norm 1."""
  maps = maps / numerics.largest(maps, (1, 2, 3))
  energy = jnp.mean(jnp.abs(maps) ** p, axis=-1)
  return numerics.unit(energy.reshape(len(maps), -1))


def neuron_selectivity(student: ArrayLike, teacher: ArrayLike) -> jax.Array:
  """Neuron selectivity transfer (NST) with the polynomial kernel.

  The channels are samples: each, flattened over positions, is divided by its
  Euclidean norm, and the two sets are compared by their maximum mean
  discrepancy with k(a, b) = <a, b>**2:
    mean k(t, t') + mean k(s, s') - 2 mean k(s, t).

  Args:
    student: `[B, H, W, D]` maps, any float dtype.
    teacher: `[B, h, w, E]`, treated as constant. The maps of higher resolution
      are averaged to the lower one; any channels.

  Returns:
    `[B]` float32, >= 0 up to rounding; 0 where the sets of channels agree.

  Raises:
    ValueError: if the batches differ.

  Example:
    One channel (1, 0) and the two (1, 0) and (0.6, 0.8):
    >>> student = jnp.array([[[[2.0], [0.0]]]])
    >>> teacher = jnp.array([[[[1.0, 3.0], [0.0, 4.0]]]])
    >>> round(neuron_selectivity(student, teacher).item(), 4)
    0.32

  References:
    Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity
    Transfer", 2017, arXiv:1707.01219.
  """
  student, teacher = (
    numerics.unit(x.reshape(len(x), -1, x.shape[-1]), axis=1)
    for x in _same_resolution('neuron_selectivity', student, teacher)
  )

  def similarity(a, b):
    products = jnp.einsum('bpd,bpe->bde', a, b, precision=numerics.HIGHEST)
    return jnp.mean(jnp.square(products), axis=(1, 2))

  own = similarity(teacher, teacher) + similarity(student, student)
  return own - 2 * similarity(student, teacher)


def flow_of_solution(
  student: tuple[ArrayLike, ArrayLike], teacher: tuple[ArrayLike, ArrayLike]
) -> jax.Array:
  """Flow of solution procedure (FSP): Gram matrices between two stages.

  For maps F `[B, H, W, D]` and G `[B, H, W, E]` of two stages the matrix is
  `[B, D, E]`, the mean over positions of their outer products; the loss is
  the mean squared difference of the student's and the teacher's. Within a pair
  the maps of higher resolution are averaged to the lower one.

  Args:
    student: its maps at two stages, any float dtype.
    teacher: as many channels; other resolutions are fine. Treated as constant.

  Returns:
    `[B]` float32.

  Raises:
    ValueError: if the channels differ.

  Example:
    >>> early, late = jnp.ones((1, 4, 4, 3)), jnp.ones((1, 2, 2, 5))
    >>> flow_of_solution((early, late), (early, 3 * late)).tolist()
    [4.0]

  References:
    Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network
    Minimization and Transfer Learning", CVPR 2017.
  """
  own = _flow(*map(numerics.float32, student))
  target = _flow(*map(numerics.constant, teacher))
  check_same_shape(
    'flow_of_solution needs equal channels, to which the connector of a term '
    'adapts them',
    student=own,
    teacher=target,
  )
  return jnp.mean(jnp.square(own - target), axis=(1, 2))


def _flow(first: jax.Array, second: jax.Array) -> jax.Array:
  first, second = numerics.to_smaller(first, second)
  positions = first.shape[1] * first.shape[2]
  products = jnp.einsum(
    'bhwd,bhwe->bde', first, second, precision=numerics.HIGHEST
  )
  return products / positions


def class_attention(
  student_maps: ArrayLike,
  teacher_maps: ArrayLike,
  *,
  size: int = 2,
  normalize: bool = True,
) -> jax.Array:
  """Class attention transfer (CAT-KD): maps of what speaks for each class.

  Class activation maps, the classifier applied at every position, are averaged
  to `size` x `size`; the loss is the mean squared error over positions and
  classes.

  Args:
    student_maps: `[B, H, W, C]` class activation maps, any float dtype.
    teacher_maps: `[B, h, w, C]`, treated as constant; any resolution.
    size: height and width to which both are averaged, at most theirs.
    normalize: whether each class's averaged map is divided by its Euclidean
      norm over positions.

  Returns:
    `[B]` float32.

  Raises:
    ValueError: if the classes differ or a map is smaller than `size`.

  Example:
    The maps of one class, (0.6, 0.8, 0, 0) and (0, 1, 0, 0):
    >>> student = jnp.array([[1.0, 5.0, 4.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    >>> teacher = jnp.array([[0.0, 5.0], [0.0, 0.0]])
    >>> student, teacher = (x[None, ..., None] for x in (student, teacher))
    >>> round(class_attention(student, teacher).item(), 4)
    0.1

  References:
    Guo et al., "Class Attention Transfer Based Knowledge Distillation", 2023,
    arXiv:2304.12777.
  """
  student, teacher = (
    numerics.average_pool_to(maps, (size, size))
    for maps in (
      numerics.float32(student_maps),
      numerics.constant(teacher_maps),
    )
  )
  check_same_shape(
    'class_attention needs the same classes, to which the connector of a term '
    'adapts the maps',
    student=student,
    teacher=teacher,
  )
  if normalize:
    student, teacher = (
      numerics.unit(x, axis=(1, 2)) for x in (student, teacher)
    )
  return jnp.mean(jnp.square(student - teacher), axis=(1, 2, 3))
