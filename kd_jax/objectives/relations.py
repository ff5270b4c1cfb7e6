"""Terms that relate the examples of a batch to each other.

Which batch that is, is a choice: the option `scope` of every term, 'global' or
'local', see `scopes`. Owns no formula: those are in `losses`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.objectives import base, connectors
from kd_jax.objectives.base import Objective, Scalar
from kd_jax.objectives.scopes import over_batch


def on_batch(
  loss: Callable[..., jax.Array],
  *,
  student: str = base.OUTPUT,
  teacher: str = base.OUTPUT,
  scope: str = 'global',
  **options: Any,
) -> Objective:
  """A term from any loss that relates the examples of a batch.

  Args:
    loss: `(student, teacher, **options) -> scalar`.
    student: tap of an embedding or of maps; 'output' for the logits.
    teacher: the teacher's; it may have another width.
    scope: see `scopes`.
    **options: of the loss; a callable among them is a schedule.

  Raises:
    ValueError: when applied, for another scope.

  Example:
    The rows of the teacher's similarities are (1, 1) / sqrt(2), those of the
    student's the unit vectors:

    >>> from kd_jax.types import Forward
    >>> student = Forward(None, {'s': jnp.array([[3.0, 0.0], [0.0, 4.0]])})
    >>> teacher = Forward(None, {'t': jnp.array([[5.0], [5.0]])})
    >>> inputs = base.Inputs(student, teacher, {}, jnp.int32(0), None)
    >>> sp = on_batch(losses.similarity_preserving, student='s', teacher='t')
    >>> round(float(sp.apply({}, {}, inputs)[0]), 4)
    0.2929
  """

  def loss_fn(inputs):
    at = base.values_at(options, inputs.step)
    return over_batch(
      lambda s, t: loss(s, t, **at),
      inputs,
      scope,
      base.student_feature(inputs, student),
      base.teacher_feature(inputs, teacher),
    )

  return base.term(loss_fn, taps=base.read_taps(student, teacher))


def relational(
  *,
  student: str,
  teacher: str,
  distance_weight: Scalar = 25.0,
  angle_weight: Scalar = 50.0,
  scope: str = 'global',
) -> Objective:
  """RKD: distances of pairs and angles of triples of embeddings.

  Memory grows with the cube of the batch, for the angles.

  Args:
    student: tap of an embedding `[B, D]`.
    teacher: the teacher's.
    distance_weight: of `losses.relational_distance`.
    angle_weight: of `losses.relational_angle`.
    scope: see `scopes`.

  Raises:
    ValueError: when applied, for another scope.

  References:
    Park et al., "Relational Knowledge Distillation", 2019, arXiv:1904.05068.

  Example:
    25 times 0.0718 for the distances of a line and of half a square, and 50
    times 0.1296 for the angles:

    >>> from kd_jax.types import Forward
    >>> s = jnp.array([[0.0], [1.0], [2.0]])
    >>> t = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> student, teacher = Forward(None, {'s': s}), Forward(None, {'t': t})
    >>> inputs = base.Inputs(student, teacher, {}, jnp.int32(0), None)
    >>> objective = relational(student='s', teacher='t')
    >>> round(float(objective.apply({}, {}, inputs)[0]), 3)
    8.274
  """

  def loss(s, t, *, distance_weight, angle_weight):
    distance = losses.relational_distance(s, t)
    angle = losses.relational_angle(s, t)
    return distance_weight * distance + angle_weight * angle

  return on_batch(
    loss,
    student=student,
    teacher=teacher,
    scope=scope,
    distance_weight=distance_weight,
    angle_weight=angle_weight,
  )


def correlation_congruence(
  *, student: str, teacher: str, size: int = 128, scope: str = 'global'
) -> Objective:
  """CC: neighbours in the batch, in two trained embeddings.

  Args:
    student: tap of an embedding `[B, D]`.
    teacher: the teacher's.
    size: of both embeddings.
    scope: see `scopes`.

  Raises:
    ValueError: when applied, for another scope.

  References:
    Peng et al., "Correlation Congruence for Knowledge Distillation", 2019,
    arXiv:1904.01802.

  Example:
    With kernels of ones the embeddings differ by (0, 0), (2, 2) and (3, 3), and
    the neighbours' products are 0 and 12:

    >>> from kd_jax.types import Forward
    >>> student = Forward(None, {'s': jnp.array([[0.0], [2.0], [3.0]])})
    >>> teacher = Forward(None, {'t': jnp.zeros((3, 4))})
    >>> inputs = base.Inputs(
    ...   student, teacher, {}, jnp.int32(0), jax.random.key(0))
    >>> objective = correlation_congruence(student='s', teacher='t', size=2)
    >>> params, state = objective.init(inputs)
    >>> params['student']['kernel'].shape, params['teacher']['kernel'].shape
    ((1, 2), (4, 2))
    >>> ones = jax.tree.map(jnp.ones_like, params)
    >>> float(objective.apply(ones, state, inputs)[0])
    6.0
  """

  def init(inputs):
    keys = jax.random.split(inputs.rng)
    s = base.student_feature(inputs, student)
    t = base.teacher_feature(inputs, teacher)
    return {
      'student': connectors.dense_params(keys[0], _width(s), size),
      'teacher': connectors.dense_params(keys[1], _width(t), size),
    }, {}

  def apply(params, state, inputs):
    s = _flat(base.student_feature(inputs, student))
    t = _flat(base.teacher_feature(inputs, teacher))
    s = connectors.dense(params['student'], s)
    t = connectors.dense(params['teacher'], t)
    # As one difference, so that both embeddings train, as the public code has
    # it: the loss itself holds the teacher's side constant.
    loss = over_batch(
      lambda d: losses.correlation_congruence(d, jnp.zeros_like(d)),
      inputs,
      scope,
      s - t,
    )
    return loss, state, {}

  return Objective(init, apply, base.read_taps(student, teacher))


def _flat(x: jax.Array) -> jax.Array:
  return x.reshape(x.shape[0], -1)


def _width(x: jax.Array) -> int:
  return x.size // x.shape[0]
