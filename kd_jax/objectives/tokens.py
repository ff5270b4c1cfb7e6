"""Terms on transformers: hidden states, attention maps, relations of tokens.

`batch['attention_mask']` `[B, L]`, 1 for a token and 0 for padding, is
honoured where the batch has it. Means are over the valid tokens of the global
batch, however it is split over devices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.losses import numerics
from kd_jax.objectives import base, connectors
from kd_jax.objectives.base import Inputs, Objective

MASK = 'attention_mask'
Names = str | Sequence[str]


def on_tokens(
  loss: Callable[..., jax.Array],
  *,
  student: Names,
  teacher: Names,
  project: bool = False,
  power: int = 1,
  **options: Any,
) -> Objective:
  """A term from any masked loss of `losses.tokens`, summed over pairs.

  Args:
    loss: `(student, teacher, mask, *, mean_count, **options) -> [B]`.
    student: tap names of hidden states `[B, L, D]` or attention scores
      `[B, N, L, L]`.
    teacher: as many.
    project: trains a linear map from the student's width to the teacher's, as
      TinyBERT does; hidden states only.
    power: of the count that the loss divides by: 1 for tokens, 2 for pairs.
    **options: of the loss; a callable among them is a schedule.

  Example:
    >>> hidden = on_tokens(
    ...   losses.hidden_squared_error,
    ...   student=('block1', 'block2'), teacher=('block2', 'block4'),
    ...   project=True)
  """
  matched = base.pairs(student, teacher)

  def features(inputs, s, t):
    return base.student_feature(inputs, s), base.teacher_feature(inputs, t)

  def init(inputs):
    params = {}
    for i, (s, t) in enumerate(matched):
      a, b = features(inputs, s, t)
      key = jax.random.fold_in(inputs.rng, i)
      if project:
        params[str(i)] = connectors.dense_params(key, a.shape[-1], b.shape[-1])
    return params, {}

  def apply(params, state, inputs):
    mask = inputs.batch.get(MASK)
    total: jax.Array | float = 0.0
    for i, (s, t) in enumerate(matched):
      a, b = features(inputs, s, t)
      if project:
        a = connectors.dense(params[str(i)], a)
      total += loss(
        a,
        b,
        mask,
        mean_count=_mean_count(mask, a, inputs, power),
        **base.values_at(options, inputs.step),
      )
    return total, state, {}

  return Objective(init, apply, base.read_taps(student, teacher))


def _mean_count(
  mask: jax.Array | None, x: jax.Array, inputs: Inputs, power: int
) -> jax.Array:
  """Valid tokens of an example, to a power, averaged over the global batch."""
  if mask is None:
    return jnp.float32(x.shape[-2] ** power)
  count = jnp.mean(jnp.sum(numerics.float32(mask != 0), axis=-1) ** power)
  if inputs.axis_name is not None:
    count = jax.lax.pmean(count, inputs.axis_name)
  return count


def patient(*, student: Names, teacher: Names, position: int = 0) -> Objective:
  """Patient KD: the normalised states of one token in several layers, summed.

  Args:
    student: tap names of hidden states `[B, L, D]`.
    teacher: as many, of the same width.
    position: the token; 0 is the class token.
  """
  matched = base.pairs(student, teacher)

  def loss_fn(inputs):
    return sum(
      losses.patient_kd(
        base.student_feature(inputs, s)[:, position],
        base.teacher_feature(inputs, t)[:, position],
      )
      for s, t in matched
    )

  return base.term(loss_fn, taps=base.read_taps(student, teacher))
