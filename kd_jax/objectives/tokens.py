"""Terms on transformers: hidden states, attention maps, relations of tokens.

Owns how masks and counts reach the losses of `losses.tokens`.
`batch['attention_mask']` `[B, L]`, 1 for a token and 0 for padding, is honoured
where the batch has it. Means are over the valid tokens of the global batch,
however it is split over devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.losses import numerics
from kd_jax.objectives import base, connectors
from kd_jax.objectives.base import Objective
from kd_jax.objectives.features import Names, over_pairs
from kd_jax.objectives.inputs import Inputs, over_devices, token_mask
from kd_jax.types import ATTENTION_MASK


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

  Raises:
    ValueError: if there are not as many taps of one as of the other.

  Example:
    The second token only pads:

    >>> from kd_jax.types import Forward
    >>> student = Forward(jnp.zeros(1), {'block1': jnp.ones((1, 2, 4))})
    >>> teacher = Forward(jnp.zeros(1), {'block3': jnp.full((1, 2, 4), 4.0)})
    >>> batch = {'attention_mask': jnp.array([[1, 0]])}
    >>> inputs = Inputs(
    ...   student, teacher, batch, jnp.int32(0), jax.random.key(0))
    >>> hidden = on_tokens(
    ...   losses.hidden_squared_error, student='block1', teacher='block3')
    >>> hidden.apply(*hidden.init(inputs), inputs)[0].tolist()
    [9.0]
  """
  connect = connectors.make_connector('linear' if project else 'identity')

  def compare(params, inputs, s, t, i):
    mask = inputs.batch.get(ATTENTION_MASK)
    count = _mean_count(s, inputs, power)
    at = base.values_at(options, inputs.step)
    return loss(connect.apply(params, s), t, mask, mean_count=count, **at)

  return over_pairs(student, teacher, connect.init, compare)


def _mean_count(x: jax.Array, inputs: Inputs, power: int) -> jax.Array:
  """Valid tokens of an example, to a power, averaged over the global batch."""
  mask = token_mask(inputs)
  if mask is None:
    return jnp.float32(x.shape[-2] ** power)
  counts = jnp.sum(numerics.float32(mask != 0), axis=-1)
  return over_devices(jnp.mean(counts**power), inputs)


def patient(*, student: Names, teacher: Names, position: int = 0) -> Objective:
  """Patient KD: the normalised states of one token in several layers, summed.

  Args:
    student: tap names of hidden states `[B, L, D]`.
    teacher: as many, of the same width.
    position: the token; 0 is the class token.

  Raises:
    ValueError: if there are not as many taps of one as of the other.

  References:
    Sun et al., "Patient Knowledge Distillation for BERT Model Compression",
    2019, arXiv:1908.09355.

  Example:
    >>> from kd_jax.types import Forward
    >>> x = jnp.array([[[3.0, 4.0], [1.0, 0.0]]])
    >>> student, teacher = Forward(x, {'s': x}), Forward(x, {'t': x[:, ::-1]})
    >>> inputs = Inputs(student, teacher, {}, jnp.int32(0), jax.random.key(0))
    >>> objective = patient(student='s', teacher='t')
    >>> loss, _, _ = objective.apply(*objective.init(inputs), inputs)
    >>> [round(v, 3) for v in loss.tolist()]
    [0.8]
  """

  def compare(params, inputs, s, t, i):
    return losses.patient_kd(s[:, position], t[:, position])

  return over_pairs(student, teacher, lambda *shapes: {}, compare)
