"""Terms that relate the examples of a batch to each other.

Which batch that is, is a choice: `scope='global'` relates all examples of the
step, wherever they are, and gives the numbers of one device; `scope='local'`
relates those of one device only, which is what data-parallel PyTorch code
computes and publishes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.objectives import base, connectors
from kd_jax.objectives.base import Inputs, Objective, Scalar

SCOPES = ('global', 'local')


def over_batch(
  loss: Callable[..., jax.Array],
  inputs: Inputs,
  scope: str,
  *arrays: jax.Array,
) -> jax.Array:
  """A loss over a batch, of the global batch or the mean over its parts.

  Args:
    loss: `(*arrays) -> scalar`.
    inputs: says how the step is mapped over devices.
    scope: 'global' or 'local'.
    *arrays: `[B, ...]`, the batch that this program sees.

  Raises:
    ValueError: for another scope, or a batch that does not divide into
      `inputs.num_shards` parts.
  """
  if scope not in SCOPES:
    raise ValueError(f"scope={scope!r} is not 'global' or 'local'.")
  if scope == 'global':
    if inputs.axis_name is not None:
      arrays = jax.lax.all_gather(arrays, inputs.axis_name, tiled=True)
    return loss(*arrays)
  if inputs.axis_name is not None or inputs.num_shards == 1:
    return loss(*arrays)
  parts, size = inputs.num_shards, arrays[0].shape[0]
  if size % parts:
    raise ValueError(f'A batch of {size} has no {parts} equal local parts.')
  split = jax.tree.map(
    lambda x: x.reshape(parts, size // parts, *x.shape[1:]), arrays
  )
  return jnp.mean(jax.vmap(loss)(*split))


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
    scope: see the module.
    **options: of the loss; a callable among them is a schedule.

  Example:
    >>> sp = on_batch(losses.similarity_preserving, student='s', teacher='t')
    >>> dist = on_batch(losses.dist, temperature=4.0)
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
    scope: see the module.
  """

  def loss_fn(inputs):
    distance, angle = (
      base.value_at(w, inputs.step) for w in (distance_weight, angle_weight)
    )

    def both(s, t):
      return distance * losses.relational_distance(
        s, t
      ) + angle * losses.relational_angle(s, t)

    return over_batch(
      both,
      inputs,
      scope,
      base.student_feature(inputs, student),
      base.teacher_feature(inputs, teacher),
    )

  return base.term(loss_fn, taps=base.read_taps(student, teacher))


def correlation_congruence(
  *, student: str, teacher: str, size: int = 128, scope: str = 'global'
) -> Objective:
  """CC: neighbours in the batch, in two trained embeddings.

  Args:
    student: tap of an embedding `[B, D]`.
    teacher: the teacher's.
    size: of both embeddings.
    scope: see the module.
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
