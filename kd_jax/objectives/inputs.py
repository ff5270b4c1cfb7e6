"""What an objective sees of a step, and means over its batch.

Owns which tokens count and how parts on devices become one mean. What terms
read out of the inputs is in `base`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kd_jax.types import (
  ATTENTION_MASK,
  Batch,
  Forward,
  StudentFn,
  TeacherFn,
  Variables,
  check_same_shape,
)


class Inputs(NamedTuple):
  """What an objective sees of one step.

  Attributes:
    student: the student's forward.
    teacher: the teacher's forward, already constant; None without a teacher.
    batch: the batch, with `label` `[B]` int for classification or `target`
      `[B, D]` for regression.
    step: int32 scalar, number of completed steps; drives schedules.
    rng: a typed key of this step, the same on every device.
    student_fn: the student's function, for terms that run it again.
    student_variables: what it ran with: fake-quantized if the step does so.
    teacher_fn: the teacher's function, or None.
    teacher_variables: its variables, constant.
    axis_name: the mapped axis when the step runs per device, else None.
    num_shards: under `jit`, into how many equal parts a term with
      `scope='local'` divides the batch; None refuses such terms.
    part: which part of the step's batch this is, from 0; what moves once a
      step moves with part 0.
    tokens: the `attention_mask` of the step's whole batch, if it has one; None
      where that is `batch`.

  Example:
    >>> student, teacher = Forward(jnp.ones((1, 3))), Forward(jnp.zeros((1, 3)))
    >>> inputs = Inputs(
    ...   student, teacher, {'label': jnp.array([2])}, jnp.int32(0),
    ...   jax.random.key(0))
    >>> inputs.teacher.output.tolist(), inputs.axis_name
    ([[0.0, 0.0, 0.0]], None)
  """

  student: Forward
  teacher: Forward | None
  batch: Batch
  step: jax.Array
  rng: jax.Array
  student_fn: StudentFn | None = None
  student_variables: Variables = {}
  teacher_fn: TeacherFn | None = None
  teacher_variables: Variables | None = None
  axis_name: str | None = None
  num_shards: int | None = None
  part: jax.Array | int = 0
  tokens: jax.Array | None = None


def mean(values: Any, inputs: Inputs) -> jax.Array:
  """The mean of a loss or of hits, without the tokens that only pad.

  Args:
    values: a scalar, `[B]` of examples, or `[B, L]` of tokens. Those of tokens
      where `batch['attention_mask']` `[B, L]` is 0 do not count, and each other
      token of the global batch counts the same.
    inputs: those of the step.

  Returns:
    A float32 scalar. On a part of the batch it is this part's share: the mean
    over devices is that of the global batch. 0 where all tokens pad.

  Raises:
    ValueError: if values of tokens are not one for each of the mask.

  Example:
    >>> batch = {'attention_mask': jnp.array([[1, 1], [1, 0]])}
    >>> inputs = Inputs(None, None, batch, None, None)
    >>> float(mean(jnp.array([[1.0, 2.0], [3.0, jnp.nan]]), inputs))
    2.0
  """
  values = jnp.asarray(values, jnp.float32)
  mask = inputs.batch.get(ATTENTION_MASK)
  if mask is None or values.ndim < 2:
    return jnp.mean(values)
  check_same_shape(
    'a mean over tokens needs one mask entry per token',
    values=values,
    attention_mask=mask,
  )
  valid = mask != 0
  whole = token_mask(inputs) != 0
  share = over_devices(jnp.mean(whole, dtype=jnp.float32), inputs)
  # where, not a product: the loss of what pads may be NaN.
  kept = jnp.mean(jnp.where(valid, values, 0.0))
  return kept / jnp.where(share > 0, share, 1.0)


def token_mask(inputs: Inputs) -> Any:
  """`batch['attention_mask']` of the whole step, or None without one.

  With `accumulate` an objective sees one part of the batch at a time, and parts
  have different numbers of tokens.
  """
  if inputs.tokens is not None:
    return inputs.tokens
  return inputs.batch.get(ATTENTION_MASK)


def over_devices(value: jax.Array, inputs: Inputs) -> jax.Array:
  """The mean over the mapped axis, if there is one."""
  if inputs.axis_name is None:
    return value
  return jax.lax.pmean(value, inputs.axis_name)
