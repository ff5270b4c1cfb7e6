"""Structures: which weights are pruned together.

Owns which weights go together; how good they are is `scores`', and over how
many of them they compete is `scopes`'. A structure is a function `(scores,
sparsity, scope) -> masks` over dicts of parameter path -> array. It is pure and
traceable, and adds no memory. -inf as a score marks a weight that was pruned
before: units of such weights come last.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kd_jax import rules as rules_lib
from kd_jax.placement import gathered
from kd_jax.prune import scopes
from kd_jax.prune.masks import score_masks
from kd_jax.prune.thresholds import ordered_bits
from kd_jax.types import Arrays

Structure = Callable[[Arrays, ArrayLike, scopes.Scope], Arrays]


def unstructured() -> Structure:
  """Every weight is a unit.

  Example:
    >>> scores = {'w': jnp.array([3.0, 1.0, 2.0, 4.0])}
    >>> unstructured()(scores, 0.5, 'global')['w'].tolist()
    [True, False, False, True]
  """

  def structure(scores, sparsity, scope):
    return score_masks(scores, sparsity, scope=scope)

  return structure


def units(
  pool: Callable[[Arrays], Arrays], expand: Callable[[Arrays, Arrays], Arrays]
) -> Structure:
  """A structure of units, from their scores and what they consist of.

  `sparsity` is the share of units that go; exactly `kept_count` of them stay
  in the scope, ties keep the lower index.

  Args:
    pool: scores of weights, path -> array, to scores of units, name -> array
      with one entry per unit. It must give 0 for a unit whose scores are all
      0, and more if one is positive.
    expand: `(masks of units, scores) -> masks of weights`; the scores are
      those that were pooled, for their shapes.

  Returns:
    A structure. The names of the units need not be paths, except under 'erk'.

  Example:
    >>> rows = units(
    ...   lambda scores: {n: s.sum(-1) for n, s in scores.items()},
    ...   lambda kept, scores: {
    ...     n: jnp.broadcast_to(kept[n][:, None], s.shape)
    ...     for n, s in scores.items()
    ...   },
    ... )
    >>> scores = {'w': jnp.array([[1.0, 2.0], [5.0, 0.0]])}
    >>> rows(scores, 0.5, 'layer')['w'].tolist()
    [[False, False], [True, True]]
  """

  def structure(scores, sparsity, scope):
    alive = {n: s != -jnp.inf for n, s in scores.items()}
    pooled = pool({n: jnp.where(alive[n], s, 0) for n, s in scores.items()})
    rest = pool({n: a.astype(jnp.float32) for n, a in alive.items()})
    ranked = {n: jnp.where(rest[n] > 0, s, -jnp.inf) for n, s in pooled.items()}
    shapes = {n: s.shape for n, s in scores.items()}
    kept = score_masks(ranked, sparsity, scope=scope, shapes=shapes)
    masks = expand(kept, scores)
    # What was pruned stays so within a kept unit; masks lie where scores do.
    return {n: m & alive[n] if n in alive else m for n, m in masks.items()}

  return structure


def _per_parameter(
  pool: Callable[[str, jax.Array], jax.Array],
  expand: Callable[[jax.Array, jax.Array], jax.Array],
) -> Structure:
  """`units` from functions of one parameter: its path and an array."""
  return units(
    lambda scores: {n: pool(n, s) for n, s in scores.items()},
    lambda kept, scores: {n: expand(kept[n], s) for n, s in scores.items()},
  )


class _Pool(NamedTuple):
  """How the scores of a unit's weights become one: each, sum, then the sum."""

  each: Callable[[jax.Array], jax.Array]
  total: Callable[[jax.Array, Any], jax.Array]


POOLS: dict[str, _Pool] = {
  'l1': _Pool(lambda x: x, lambda total, count: total),
  'l2': _Pool(jnp.square, lambda total, count: jnp.sqrt(total)),
  'mean': _Pool(lambda x: x, lambda total, count: total / count),
}


def channels(axis: int = -1, *, pool: str = 'l1') -> Structure:
  """Whole neurons, filters or channels: the indices of one axis.

  Each parameter by itself: layers that share channels, as those of a residual
  stream do, are not pruned together.

  Args:
    axis: the axis of the channels; -1 is the output of Dense `[in, out]` and
      Conv HWIO kernels, -2 the input.
    pool: 'l1' sums the scores (for `magnitude()`, the L1 norm), 'l2' is the
      root of the sum of squares (for scores that are not signed), 'mean' is
      per weight, for one threshold over layers of different sizes.

  Raises:
    ValueError: for an unknown pool; when called, for a parameter without that
      axis.

  Example:
    >>> scores = {'w': jnp.array([[1.0, 2.0], [1.0, 2.0]])}
    >>> channels()(scores, 0.5, 'layer')['w'].tolist()
    [[False, True], [False, True]]

  References:
    Li et al., "Pruning Filters for Efficient ConvNets", 2016, arXiv:1608.08710.
  """
  return _slices('channels', None, axis, pool)


def heads(count: int, axis: int, *, pool: str = 'l1') -> Structure:
  """Whole attention heads: equal parts of one axis.

  Each parameter by itself, as for `channels`.

  Args:
    count: number of heads; the axis is `[count]`, or `[count * head size]`
      with the heads one after another.
    axis: the axis of the heads: for flax's attention -2 of the query, key and
      value kernels `[in, heads, size]`, -3 of the output `[heads, size, out]`.
    pool: as for `channels`.

  Raises:
    ValueError: for an unknown pool or a count below 1; when called, for a
      parameter whose axis does not divide.

  Example:
    >>> scores = {'w': jnp.array([[1.0, 1.0, 2.0, 2.0]])}
    >>> heads(2, axis=-1)(scores, 0.5, 'layer')['w'].tolist()
    [[False, False, True, True]]

  References:
    Michel, Levy, Neubig, "Are Sixteen Heads Really Better than One?", 2019,
    arXiv:1905.10650.
  """
  if count < 1:
    raise ValueError(f'heads: count must be at least 1, not {count}.')
  return _slices('heads', count, axis, pool)


def _slices(kind: str, count: int | None, axis: int, pool: str) -> Structure:
  pooling = rules_lib.choose('pool', pool, POOLS)

  def score(name, x):
    at = _axis(kind, name, x, axis)
    size = x.shape[at]
    number = size if count is None else count
    if size % number:
      raise ValueError(
        f'{kind}: axis {axis} of {name!r} with shape {x.shape} does not '
        f'divide into {number} parts.'
      )
    each = pooling.each(x.astype(jnp.float32))
    total = jnp.sum(each, [i for i in range(x.ndim) if i != at])
    total = jnp.sum(_split(total, 0, number), 1)
    return pooling.total(total, x.size // number)

  def expand(kept, like):
    at = axis % like.ndim
    kept = jnp.repeat(kept, like.shape[at] // kept.size)
    others = [i for i in range(like.ndim) if i != at]
    return jnp.broadcast_to(jnp.expand_dims(kept, others), like.shape)

  return _per_parameter(score, expand)


def block(rows: int, columns: int, *, pool: str = 'mean') -> Structure:
  """Blocks over the last two axes; leading axes have blocks of their own.

  8 rows by 128 columns are one tile of a TPU's float32 memory. The rest at
  the border, where a size does not divide, is a block too.

  Args:
    rows: of a block, along axis -2 (the input of Dense and Conv HWIO).
    columns: of a block, along axis -1.
    pool: as for `channels`; 'mean' treats small blocks at the border as it
      treats the others.

  Raises:
    ValueError: for an unknown pool or an empty block; when called, for a
      parameter with one axis.

  Example:
    >>> scores = {'w': jnp.array([[1.0, 1.0, 5.0], [1.0, 1.0, 0.0]])}
    >>> block(2, 2)(scores, 0.5, 'layer')['w'].tolist()
    [[False, False, True], [False, False, True]]

  References:
    Gray, Radford, Kingma, "GPU Kernels for Block-Sparse Weights", 2017.
  """
  if rows < 1 or columns < 1:
    raise ValueError(f'block: {rows}x{columns} is empty.')
  pooling = rules_lib.choose('pool', pool, POOLS)

  def score(name, x):
    _axis('block', name, x, -2)
    each = pooling.each(x.astype(jnp.float32))
    total = jnp.sum(_blocks(each, rows, columns), (-3, -1))
    count = np.outer(
      _lengths(x.shape[-2], rows), _lengths(x.shape[-1], columns)
    )
    return pooling.total(total, np.broadcast_to(count, total.shape))

  def expand(kept, like):
    kept = jnp.repeat(jnp.repeat(kept, rows, axis=-2), columns, axis=-1)
    return kept[..., : like.shape[-2], : like.shape[-1]]

  return _per_parameter(score, expand)


def _lengths(size: int, part: int) -> np.ndarray:
  """The lengths of the parts of an axis; the last may be shorter."""
  return np.minimum(part, size - np.arange(0, size, part)).astype(np.float32)


def _blocks(x: jax.Array, rows: int, columns: int) -> jax.Array:
  """`[..., R, C]` to `[..., R / rows, rows, C / columns, columns]`, padded."""
  for axis, part in ((x.ndim - 1, columns), (x.ndim - 2, rows)):
    number = -(-x.shape[axis] // part)
    if after := number * part - x.shape[axis]:
      x = gathered(x, axis)
      x = jnp.pad(x, [(0, after if i == axis else 0) for i in range(x.ndim)])
    x = _split(x, axis, number)
  return x


def n_m(n: int, m: int, axis: int = -2) -> Structure:
  """The n largest of every m neighbours along an axis stay: N:M sparsity.

  Sparsity rises with the schedule in steps of 1 / m, up to (m - n) / m; every
  group of m is its own scope, whatever `scope` says. 2:4 along the axis that
  the product sums over is what sparse tensor cores run.

  Args:
    n: how many of a group stay at last, 1 <= n <= m.
    m: size of a group.
    axis: -2 is the axis that Dense `[in, out]` and Conv HWIO sum over.

  Raises:
    ValueError: for an n outside of 1..m; when called, for a parameter whose
      axis does not divide by m.

  Example:
    >>> scores = {'w': jnp.array([[1.0], [4.0], [3.0], [2.0]])}
    >>> n_m(2, 4)(scores, 0.5, 'layer')['w'][:, 0].tolist()
    [False, True, True, False]

  References:
    Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021,
    arXiv:2104.08378.
  """
  if not 1 <= n <= m:
    raise ValueError(f'n_m: needs 1 <= n <= m, not n={n}, m={m}.')

  def structure(scores, sparsity, scope):
    scopes.resolve(scope)
    keep = jnp.maximum(n, scopes.kept_count(m, sparsity))
    return {name: mask(name, s, keep) for name, s in scores.items()}

  def mask(name, x, keep):
    at = _axis('n_m', name, x, axis)
    groups, rest = divmod(x.shape[at], m)
    if rest:
      raise ValueError(
        f'n_m: axis {axis} of {name!r} with shape {x.shape} does not divide '
        f'into groups of {m}.'
      )
    bits = ordered_bits(_split(x, at, groups))
    mine, other = jnp.expand_dims(bits, at + 2), jnp.expand_dims(bits, at + 1)
    shape = jnp.broadcast_shapes(mine.shape, other.shape)
    i, j = (jax.lax.broadcasted_iota(jnp.int32, shape, at + k) for k in (1, 2))
    # Those that come before an entry in its group: larger, or equal and first.
    before = (other > mine) | ((other == mine) & (j < i))
    rank = jnp.sum(before, axis=at + 2)
    return (rank < keep).reshape(x.shape)

  return structure


def _axis(kind: str, name: str, x: jax.Array, axis: int) -> int:
  if not -x.ndim <= axis < x.ndim:
    raise ValueError(
      f'{kind}: {name!r} with shape {x.shape} has no axis {axis}.'
    )
  return axis % x.ndim


def _split(x: jax.Array, axis: int, number: int) -> jax.Array:
  """An axis of size number * d as two, `[number, d]`."""
  return gathered(x, axis, parts=number).reshape(
    *x.shape[:axis], number, x.shape[axis] // number, *x.shape[axis + 1 :]
  )


def masks_from(
  scores: Mapping[str, jax.Array],
  sparsity: ArrayLike,
  *,
  scope: scopes.Scope = 'global',
  structure: Structure | None = None,
) -> Arrays:
  """Masks of the largest scores: one-shot pruning with any score.

  Args:
    scores: parameter path -> scores, as `accumulate` or `Score.value` gives
      them; only these parameters get masks. Infinities order as numbers do.
    sparsity: share to prune, in [0, 1); may be traced.
    scope: see `magnitude_masks`.
    structure: which weights go together; `unstructured()` when None.

  Returns:
    parameter path -> boolean mask, True where kept; for `apply_masks`.

  Raises:
    ValueError: if a score is NaN and this is not being compiled; compiled, NaN
      counts as the smallest score; likewise for a sparsity outside of [0, 1).
      Also for an unknown scope, and what the structure raises.

  Example:
    >>> masks = masks_from({'w': jnp.array([3.0, 1.0])}, 0.5)
    >>> masks['w'].tolist()
    [True, False]
  """
  scores = dict(scores)
  for name, score in scores.items():
    if _is_true(jnp.any(jnp.isnan(score))):
      raise ValueError(f'masks_from: the scores of {name!r} contain NaN.')
  share = jnp.asarray(sparsity)
  if _is_true(jnp.any((share < 0) | (share >= 1))):
    raise ValueError(f'A sparsity is a share in [0, 1), not {sparsity}.')
  structure = unstructured() if structure is None else structure
  return structure(scores, sparsity, scope)


def _is_true(condition: jax.Array) -> bool:
  """The condition's value; False while tracing."""
  try:
    return bool(condition)
  except jax.errors.TracerBoolConversionError:
    return False
