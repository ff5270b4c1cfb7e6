"""Cases of `losses.tokens`: hidden states, attention scores, relations."""

import functools

import jax.numpy as jnp
import numpy as np

from kd_jax import losses
from loss_cases.case import Case

B, L, D, HEADS = 8, 5, 4, 2
# One example has no token at all, and one has all.
LENGTHS = np.array([5, 3, 1, 0, 4, 2, 3, 2])


def _normal(rng, *shape):
  return rng.normal(size=shape).astype(np.float32)


def _mask(dtype=np.int32):
  return (np.arange(L) < LENGTHS[:, None]).astype(dtype)


def _hidden(rng):
  return {'student': _normal(rng, B, L, D), 'teacher': _normal(rng, B, L, D)}


def _widths(rng):
  """Of other widths, both of which the relation heads divide."""
  return {
    'student': _normal(rng, B, L, D),
    'teacher': _normal(rng, B, L, 3 * D),
  }


def _attention(rng):
  shape = (B, HEADS, L, L)
  return {'student': _normal(rng, *shape), 'teacher': _normal(rng, *shape)}


def _causal(loss):
  """The loss of scores in which no query sees a later key."""
  later = np.triu(np.full((1, 1, L, L), -np.inf, np.float32), 1)
  return lambda student, teacher: loss(student + later, teacher + later)


def _masked(inputs, dtype=np.int32):
  return lambda rng: {**inputs(rng), 'mask': _mask(dtype)}


def _nan_padding(rng):
  """Padding that spoils every number it enters."""
  inputs = {**_hidden(rng), 'mask': _mask()}
  for key in ('student', 'teacher'):
    inputs[key][inputs['mask'] == 0] = np.nan
  return inputs


def _log_softmax(x):
  x = x - x.max()
  return x - np.log(np.exp(x).sum())


def _over_tokens(of_token, mask, mean_count, power=1):
  """The sum of each example's tokens over the mean count of the batch."""
  if mask is None:
    mask = np.ones((B, L))
  total = np.zeros(B)
  for i in range(B):
    keys = np.flatnonzero(mask[i])
    total[i] = sum(of_token(i, query, keys) for query in keys)
  if mean_count is None:
    mean_count = (mask.sum(axis=1) ** power).mean()
  return total / mean_count if mean_count else total


def _hidden_squared_error(student, teacher, mask=None, mean_count=None):
  def of_token(i, j, keys):
    return ((student[i, j] - teacher[i, j]) ** 2).mean()

  return _over_tokens(of_token, mask, mean_count)


def _hidden_cosine(student, teacher, mask=None, mean_count=None):
  def of_token(i, j, keys):
    s, t = student[i, j], teacher[i, j]
    return 1 - s @ t / np.linalg.norm(s) / np.linalg.norm(t)

  return _over_tokens(of_token, mask, mean_count)


def _attention_squared_error(student, teacher, mask=None, mean_count=None):
  def of_token(i, j, keys):
    difference = (student - teacher)[i, :, j][:, keys]
    return (difference**2).sum() / HEADS

  return _over_tokens(of_token, mask, mean_count, power=2)


def _attention_cross_entropy(student, teacher, mask=None, mean_count=None):
  def of_token(i, j, keys):
    total = 0.0
    for s, t in zip(student[i, :, j], teacher[i, :, j], strict=True):
      counted = [k for k in keys if t[k] > -np.inf]
      p = np.exp(_log_softmax(t))[counted]
      total -= (p * _log_softmax(s)[counted]).sum() / HEADS
    return total

  return _over_tokens(of_token, mask, mean_count)


def _teacher_entropy(inputs, change=lambda loss: loss):
  teacher = inputs['teacher']
  return change(_attention_cross_entropy)(teacher, teacher)


def _minilm_relation(student, teacher, mask=None, heads=1, mean_count=None):
  def log_relation(x, query, keys):
    return _log_softmax(x[keys] @ x[query] / np.sqrt(x.shape[-1]))

  def of_token(i, j, keys):
    total = 0.0
    parts = (np.split(x[i], heads, axis=-1) for x in (student, teacher))
    for s, t in zip(*parts, strict=True):
      log_s, log_t = (log_relation(x, j, keys) for x in (s, t))
      total += (np.exp(log_t) * (log_t - log_s)).sum() / heads
    return total

  return _over_tokens(of_token, mask, mean_count)


def _patient_kd(student, teacher):
  s, t = (
    x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (student, teacher)
  )
  return ((s - t) ** 2).sum(axis=-1)


def _case(loss, value, inputs, *, options=None, **fields):
  options = options or {}
  return Case(
    functools.partial(loss, **options),
    functools.partial(value, **options),
    inputs,
    **{'per_example': True, **fields},
  )


def _over_batch(loss, value, inputs, *, options=None, **fields):
  """The mean over a batch whose own tokens are counted: the published value."""
  options = options or {}
  return Case(
    lambda **inputs: jnp.mean(loss(**inputs, **options)),
    lambda **inputs: np.mean(value(**inputs, **options)),
    inputs,
    per_example=False,
    **fields,
  )


# What a caller knows that sees a part of the global batch.
COUNT = {'mean_count': 2.5}
RELATION = {'heads': HEADS}

CASES: dict[str, Case] = {
  'hidden_squared_error': _case(
    losses.hidden_squared_error, _hidden_squared_error, _hidden
  ),
  'hidden_squared_error/masked': _over_batch(
    losses.hidden_squared_error, _hidden_squared_error, _masked(_hidden)
  ),
  'hidden_squared_error/nan_padding': _over_batch(
    losses.hidden_squared_error, _hidden_squared_error, _nan_padding
  ),
  'hidden_squared_error/part_of_a_batch': _case(
    losses.hidden_squared_error,
    _hidden_squared_error,
    _masked(_hidden),
    options=COUNT,
  ),
  'hidden_cosine': _case(losses.hidden_cosine, _hidden_cosine, _hidden),
  'hidden_cosine/masked': _over_batch(
    losses.hidden_cosine, _hidden_cosine, _masked(_hidden)
  ),
  'hidden_cosine/nan_padding': _over_batch(
    losses.hidden_cosine, _hidden_cosine, _nan_padding
  ),
  'hidden_cosine/part_of_a_batch': _case(
    losses.hidden_cosine,
    _hidden_cosine,
    _masked(_hidden, bool),
    options=COUNT,
  ),
  'attention_squared_error': _case(
    losses.attention_squared_error, _attention_squared_error, _attention
  ),
  'attention_squared_error/masked': _over_batch(
    losses.attention_squared_error,
    _attention_squared_error,
    _masked(_attention),
  ),
  'attention_squared_error/part_of_a_batch': _case(
    losses.attention_squared_error,
    _attention_squared_error,
    _masked(_attention, np.float32),
    options=COUNT,
  ),
  'attention_cross_entropy': _case(
    losses.attention_cross_entropy,
    _attention_cross_entropy,
    _attention,
    minimum=_teacher_entropy,
  ),
  'attention_cross_entropy/causal': _case(
    _causal(losses.attention_cross_entropy),
    _causal(_attention_cross_entropy),
    _attention,
    minimum=functools.partial(_teacher_entropy, change=_causal),
  ),
  'attention_cross_entropy/masked': _over_batch(
    losses.attention_cross_entropy,
    _attention_cross_entropy,
    _masked(_attention),
    minimum=None,
  ),
  'attention_cross_entropy/part_of_a_batch': _case(
    losses.attention_cross_entropy,
    _attention_cross_entropy,
    _masked(_attention),
    options=COUNT,
    minimum=None,
  ),
  'minilm_relation': _case(
    losses.minilm_relation, _minilm_relation, _hidden, options=RELATION
  ),
  'minilm_relation/one_head': _case(
    losses.minilm_relation, _minilm_relation, _hidden, options={'heads': 1}
  ),
  'minilm_relation/masked': _over_batch(
    losses.minilm_relation,
    _minilm_relation,
    _masked(_hidden),
    options=RELATION,
  ),
  'minilm_relation/nan_padding': _over_batch(
    losses.minilm_relation, _minilm_relation, _nan_padding, options=RELATION
  ),
  'minilm_relation/part_of_a_batch': _case(
    losses.minilm_relation,
    _minilm_relation,
    _masked(_widths),
    options=RELATION | COUNT,
    minimum=None,
  ),
  'patient_kd': _case(
    losses.patient_kd,
    _patient_kd,
    lambda rng: {'student': _normal(rng, B, D), 'teacher': _normal(rng, B, D)},
  ),
}
