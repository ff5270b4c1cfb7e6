"""Losses on transformers: hidden states, attention scores, token relations.

Owns formulas and the averaging over tokens; where in a transformer they read is
for `objectives`. Hidden states are `[B, L, D]` and attention scores
`[B, N, L, L]`, of N heads with queries before keys. `mask` is `[B, L]`, bool or
number: 1 for a token, 0 for padding; None where all are tokens. Padding has no
influence, whatever it holds, except where a docstring says so.

The published losses are means over all tokens of a batch, not means of the
examples' means. Each example's loss here is therefore its sum over tokens
divided by `mean_count`, the mean number of tokens in an example of the batch:
the mean over the batch is then the published value. A caller that sees a part
of a global batch passes the global batch's `mean_count`. Without any token the
loss is 0. The teacher is constant.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import numerics
from kd_jax.types import check_same_shape

# Excludes a key from a softmax: finite, so that a row without any key is too.
_EXCLUDED = -1e30


def _pair(
  what: str, advice: str, student: ArrayLike, teacher: ArrayLike
) -> tuple[jax.Array, jax.Array]:
  """Both as float32 of one shape, the teacher's as a constant."""
  return numerics.pair(
    f'{what} needs equal shapes, {advice}', student=student, teacher=teacher
  )


_WIDTH = 'to which the connector of a term adapts them'
_MASKED = -100.0
_HEADS = 'so choose layers with as many heads, or minilm_relation'


def _valid(mask: ArrayLike | None, batch: int, length: int) -> jax.Array:
  """Which tokens count, `[B, L]` bool."""
  if mask is None:
    return jnp.ones((batch, length), bool)
  mask = jnp.asarray(mask)
  if mask.shape != (batch, length):
    raise ValueError(
      f'mask has shape {mask.shape}, but {batch} examples of {length} tokens '
      f'need {(batch, length)}.'
    )
  return mask != 0


def _per_count(
  total: jax.Array, count: jax.Array, mean_count: ArrayLike | None
) -> jax.Array:
  """Each example's total over the mean count, 0 where that is 0."""
  if mean_count is None:
    mean_count = jnp.mean(numerics.float32(count))
  mean_count = numerics.constant(mean_count)
  return total / jnp.where(mean_count > 0, mean_count, 1.0)


def hidden_squared_error(
  student: ArrayLike,
  teacher: ArrayLike,
  mask: ArrayLike | None = None,
  *,
  mean_count: ArrayLike | None = None,
) -> jax.Array:
  """The mean squared error of hidden states, as in TinyBERT.

  Args:
    student: `[B, L, D]`, any float dtype.
    teacher: `[B, L, D]`, treated as constant.
    mask: `[B, L]`, 1 for a token; None where all are tokens.
    mean_count: mean number of tokens in an example of the global batch; None
      takes it from this one.

  Returns:
    `[B]` float32, whose mean over the batch is the mean over all tokens and
    features.

  Raises:
    ValueError: if the shapes do not fit.

  Example:
    >>> student, mask = jnp.ones((1, 2, 3)), jnp.array([[1, 0]])
    >>> hidden_squared_error(student, 0 * student, mask).tolist()
    [1.0]

  References:
    Jiao et al., "TinyBERT: Distilling BERT for Natural Language
    Understanding", 2019, arXiv:1909.10351.
  """
  student, teacher = _pair('hidden_squared_error', _WIDTH, student, teacher)
  valid = _valid(mask, *student.shape[:2])
  difference = jnp.where(valid[..., None], student - teacher, 0.0)
  error = jnp.mean(jnp.square(difference), axis=-1)
  return _per_count(jnp.sum(error, 1), jnp.sum(valid, 1), mean_count)


def hidden_cosine(
  student: ArrayLike,
  teacher: ArrayLike,
  mask: ArrayLike | None = None,
  *,
  mean_count: ArrayLike | None = None,
) -> jax.Array:
  """One minus the cosine similarity of hidden states, as in DistilBERT.

  Args:
    student: `[B, L, D]`, any float dtype.
    teacher: `[B, L, D]`, treated as constant.
    mask: `[B, L]`, 1 for a token; None where all are tokens.
    mean_count: mean number of tokens in an example of the global batch; None
      takes it from this one.

  Returns:
    `[B]` float32, whose mean over the batch is the mean over all tokens. A
    state of zeros has cosine 0 with any other.

  Raises:
    ValueError: if the shapes do not fit.

  Example:
    >>> student, teacher = jnp.eye(2)[None], jnp.ones((1, 2, 2))
    >>> round(hidden_cosine(student, teacher).item(), 4)
    0.2929

  References:
    Sanh et al., "DistilBERT, a distilled version of BERT", 2019,
    arXiv:1910.01108.
  """
  student, teacher = _pair('hidden_cosine', _WIDTH, student, teacher)
  valid = _valid(mask, *student.shape[:2])
  student, teacher = (
    numerics.unit(jnp.where(valid[..., None], x, 0.0))
    for x in (student, teacher)
  )
  distance = jnp.where(valid, 1 - jnp.sum(student * teacher, axis=-1), 0.0)
  return _per_count(jnp.sum(distance, 1), jnp.sum(valid, 1), mean_count)


def attention_squared_error(
  student: ArrayLike,
  teacher: ArrayLike,
  mask: ArrayLike | None = None,
  *,
  mean_count: ArrayLike | None = None,
) -> jax.Array:
  """The mean squared error of attention scores, as in TinyBERT.

  The mean is over heads and over all pairs of a query and a key that are both
  tokens. Scores of -100 and less, -inf too, are taken for masked, such as those
  of later keys: as in the authors' code they add nothing.

  Args:
    student: `[B, N, L, L]` scores before the softmax, any float dtype.
    teacher: `[B, N, L, L]`, treated as constant.
    mask: `[B, L]`, 1 for a token; None where all are tokens.
    mean_count: the mean over the global batch of the squared number of tokens,
      the pairs of an example; None takes it from this batch.

  Returns:
    `[B]` float32, whose mean over the batch is the mean over all pairs.

  Raises:
    ValueError: if the shapes do not fit.

  Example:
    >>> student, mask = jnp.ones((1, 4, 2, 2)), jnp.array([[1, 0]])
    >>> attention_squared_error(student, 0 * student, mask).tolist()
    [1.0]

  References:
    Jiao et al., "TinyBERT: Distilling BERT for Natural Language
    Understanding", 2019, arXiv:1909.10351.
  """
  student, teacher = _pair('attention_squared_error', _HEADS, student, teacher)
  valid = _valid(mask, student.shape[0], student.shape[-1])
  pairs = valid[:, None, :, None] & valid[:, None, None, :]
  pairs &= jnp.minimum(student, teacher) > _MASKED
  difference = jnp.where(pairs, student - teacher, 0.0)
  error = jnp.sum(jnp.mean(jnp.square(difference), axis=1), axis=(1, 2))
  return _per_count(error, jnp.sum(valid, 1) ** 2, mean_count)


def attention_cross_entropy(
  student: ArrayLike,
  teacher: ArrayLike,
  mask: ArrayLike | None = None,
  *,
  mean_count: ArrayLike | None = None,
) -> jax.Array:
  """The cross-entropy of attention maps: -sum over keys of p_t log p_s.

  The softmaxes are over all keys, and terms of keys that are padding are left
  out of the sum, as in the published code. Scores of such keys therefore
  matter, unless they are as negative as attention masks make them. Where the
  teacher's probability is 0 the term is 0, also for a student's score of -inf.

  Args:
    student: `[B, N, L, L]` scores before the softmax, any float dtype.
    teacher: `[B, N, L, L]`, treated as constant.
    mask: `[B, L]`, 1 for a token; None where all are tokens.
    mean_count: mean number of tokens in an example of the global batch; None
      takes it from this one.

  Returns:
    `[B]` float32, whose mean over the batch is the mean over heads and all
    queries that are tokens. Without padding it is smallest, the teacher's
    entropy, where the attention maps agree.

  Raises:
    ValueError: if the shapes do not fit.

  Example:
    Every query has (1/4, 3/4) of the student and (2/3, 1/3) of the teacher:
    >>> student = jnp.broadcast_to(jnp.log(jnp.array([1.0, 3.0])), (1, 1, 2, 2))
    >>> teacher = jnp.broadcast_to(jnp.log(jnp.array([2.0, 1.0])), (1, 1, 2, 2))
    >>> round(attention_cross_entropy(student, teacher).item(), 4)
    1.0201

  References:
    Yang et al., "TextBrewer: An Open-Source Knowledge Distillation Toolkit
    for Natural Language Processing", 2020, arXiv:2002.12620.
  """
  student, teacher = _pair('attention_cross_entropy', _HEADS, student, teacher)
  valid = _valid(mask, student.shape[0], student.shape[-1])
  query, key = valid[:, None, :, None], valid[:, None, None, :]
  log_student = jax.nn.log_softmax(jnp.where(query, student, 0.0))
  target = jax.nn.softmax(jnp.where(query, teacher, 0.0))
  counted = query & key & (target > 0)
  log_student = jnp.where(counted, log_student, 0.0)
  entropy = -jnp.sum(target * log_student, axis=-1)
  total = jnp.sum(jnp.mean(entropy, axis=1), axis=1)
  return _per_count(total, jnp.sum(valid, 1), mean_count)


def minilm_relation(
  student: ArrayLike,
  teacher: ArrayLike,
  mask: ArrayLike | None = None,
  *,
  heads: int,
  mean_count: ArrayLike | None = None,
) -> jax.Array:
  """MiniLM's self-attention relations: KL(teacher || student) of them.

  Queries, keys or values of all attention heads, side by side, are divided
  anew into `heads` relation heads of d features, in which the relation of
  tokens is softmax(x x^T / sqrt(d)) over the keys that are tokens. So student
  and teacher may differ in width and in attention heads. MiniLM transfers the
  relations of values beside the attention maps, MiniLMv2 those of queries,
  keys and values.

  Args:
    student: `[B, L, D]` queries, keys or values, any float dtype.
    teacher: `[B, L, E]` the teacher's, treated as constant.
    mask: `[B, L]`, 1 for a token; None where all are tokens.
    heads: relation heads; divides D and E.
    mean_count: mean number of tokens in an example of the global batch; None
      takes it from this one.

  Returns:
    `[B]` float32, whose mean over the batch is the mean over relation heads
    and all queries that are tokens; >= 0 up to rounding.

  Raises:
    ValueError: if the tokens differ or `heads` does not divide a width.

  Example:
    >>> student, teacher = jnp.eye(2)[None], 2 * jnp.eye(2, 8)[None]
    >>> round(minilm_relation(student, teacher, heads=2).item(), 4)
    0.1288

  References:
    Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic
    Compression of Pre-Trained Transformers", 2020, arXiv:2002.10957.
    Wang et al., "MiniLMv2: Multi-Head Self-Attention Relation Distillation
    for Compressing Pretrained Transformers", 2020, arXiv:2012.15828.
  """
  student, teacher = numerics.float32(student), numerics.constant(teacher)
  check_same_shape(
    'minilm_relation relates the same tokens',
    student=student[..., 0],
    teacher=teacher[..., 0],
  )
  valid = _valid(mask, *student.shape[:2])
  divergence = numerics.kl(
    _log_relation(teacher, valid, heads), _log_relation(student, valid, heads)
  )
  divergence = jnp.where(valid, jnp.mean(divergence, axis=1), 0.0)
  return _per_count(jnp.sum(divergence, 1), jnp.sum(valid, 1), mean_count)


def _log_relation(x: jax.Array, valid: jax.Array, heads: int) -> jax.Array:
  """`[B, L, D] -> [B, heads, L, L]` log-probabilities over the last axis."""
  width = x.shape[-1]
  if heads < 1 or width % heads:
    raise ValueError(
      f'minilm_relation: {heads} relation heads do not divide {width} features.'
    )
  x = jnp.where(valid[..., None], x, 0.0)
  x = x.reshape(*x.shape[:2], heads, width // heads)
  scores = jnp.einsum('bqhd,bkhd->bhqk', x, x, precision=numerics.HIGHEST)
  scores /= math.sqrt(width // heads)
  return jax.nn.log_softmax(
    jnp.where(valid[:, None, None, :], scores, _EXCLUDED)
  )


def patient_kd(student: ArrayLike, teacher: ArrayLike) -> jax.Array:
  """Patient KD: the squared distance of normalised hidden states.

  Args:
    student: `[..., D]` hidden states of one token, usually the class token of
      a layer, any float dtype.
    teacher: `[..., D]`, treated as constant.

  Returns:
    `[...]` float32 in [0, 4]: the squared Euclidean distance of the two unit
    vectors. A state of zeros stays zero.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> patient_kd(jnp.array([[3.0, 0.0]]), jnp.array([[0.0, 5.0]])).tolist()
    [2.0]

  References:
    Sun et al., "Patient Knowledge Distillation for BERT Model Compression",
    2019, arXiv:1908.09355.
  """
  student, teacher = _pair('patient_kd', _WIDTH, student, teacher)
  difference = numerics.unit(student) - numerics.unit(teacher)
  return jnp.sum(jnp.square(difference), axis=-1)
