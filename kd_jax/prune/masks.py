"""Magnitude masks with an exact number of kept weights, without a sort.

The threshold is found by bisection on the bits of the scores: non-negative
floats order like their bit patterns, so 31 counts give the exact k-th largest
score over any number of arrays. Counts are sums, which under sharding become
all-reduces; a sort would gather the parameters.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax import rules as rules_lib


def kept_count(size: int, sparsity: jax.Array | float) -> jax.Array:
  """Number of weights that stay: size - round(sparsity * size), at least 1."""
  pruned = jnp.round(jnp.float32(sparsity) * size).astype(jnp.int32)
  return jnp.maximum(size - pruned, 1)


def largest(scores: list[jax.Array], keep: jax.Array) -> list[jax.Array]:
  """Masks of the `keep` largest entries over several arrays together.

  Args:
    scores: arrays of any shapes, values >= 0, converted to float32.
    keep: int32 scalar, between 1 and the total number of entries.

  Returns:
    Boolean arrays of the same shapes with exactly `keep` True in all. Among
    equal scores those of earlier arrays and lower flat indices are kept.

  Example:
    >>> masks = largest([jnp.array([3.0, 1.0]), jnp.array([1.0, 2.0])], 3)
    >>> [mask.tolist() for mask in masks]
    [[True, True], [False, True]]
  """
  bits = [
    jax.lax.bitcast_convert_type(s.astype(jnp.float32), jnp.int32)
    for s in scores
  ]

  def count(masks):
    return sum(jnp.count_nonzero(mask) for mask in masks).astype(jnp.int32)

  # The largest t with at least `keep` scores >= t is the k-th largest score.
  threshold = _bisect(lambda t: count([b >= t for b in bits]) >= keep)
  above = [b > threshold for b in bits]
  equal = [b == threshold for b in bits]
  missing = keep - count(above)
  index, offset = [], 0
  for score in scores:
    index.append(_flat_index(score.shape) + offset)
    offset += score.size
  # The largest i such that the ties before i are not more than needed.
  last = _bisect(
    lambda i: count([e & (n < i) for e, n in zip(equal, index)]) <= missing
  )
  return [a | (e & (n < last)) for a, e, n in zip(above, equal, index)]


def _bisect(holds) -> jax.Array:
  """The largest non-negative int32 for which a falling predicate holds."""

  def body(i, value):
    candidate = value + (jnp.int32(1) << (30 - i))
    return jnp.where(holds(candidate), candidate, value)

  return jax.lax.fori_loop(0, 31, body, jnp.int32(0))


def _flat_index(shape: tuple[int, ...]) -> jax.Array:
  index = jnp.zeros(shape, jnp.int32)
  for axis, size in enumerate(shape):
    index = index * size + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
  return index


def magnitude_masks(
  params: Any,
  sparsity: jax.Array | float,
  rules: rules_lib.Rules[bool],
  *,
  scope: str = 'global',
) -> dict[str, jax.Array]:
  """Masks that keep the weights of largest magnitude.

  Args:
    params: any pytree of arrays.
    sparsity: share of the chosen weights to prune, in [0, 1); may be traced.
    rules: `(pattern, True or None)` pairs that choose parameters by path.
    scope: 'global' for one threshold over all chosen parameters, 'layer' for
      one per parameter.

  Returns:
    parameter path -> boolean mask, True where kept. Exactly
    `kept_count(size, sparsity)` weights are kept, of all chosen parameters
    together or of each one.

  Raises:
    ValueError: if a rule matches nothing, nothing is chosen, or the scope is
      unknown.

  Example:
    >>> params = {'kernel': jnp.array([[0.1, -3.0], [2.0, 0.5]])}
    >>> magnitude_masks(params, 0.5, [('kernel', True)])['kernel'].tolist()
    [[False, True], [True, False]]
  """
  weights = choose_params(params, rules)
  scores = {name: jnp.abs(w) for name, w in weights.items()}
  return score_masks(scores, sparsity, scope=scope)


def score_masks(
  scores: Mapping[str, jax.Array],
  sparsity: jax.Array | float,
  *,
  scope: str,
) -> dict[str, jax.Array]:
  """Masks that keep the largest scores; see `magnitude_masks`."""
  groups = {
    'global': [list(scores)],
    'layer': [[name] for name in scores],
  }
  masks = {}
  for names in rules_lib.choose('pruning scope', scope, groups):
    size = sum(scores[name].size for name in names)
    kept = largest([scores[n] for n in names], kept_count(size, sparsity))
    masks |= dict(zip(names, kept))
  return masks


def choose_params(
  params: Any, rules: rules_lib.Rules[bool]
) -> dict[str, jax.Array]:
  """The parameters that pruning rules choose, by path."""
  names = rules_lib.leaf_names(params)
  chosen = rules_lib.match(rules, names, kind='pruning rule')
  if not chosen:
    raise ValueError('The pruning rules choose no parameter.')
  return {
    name: leaf
    for name, leaf in zip(names, jax.tree.leaves(params))
    if name in chosen
  }


def apply_masks(params: Any, masks: Mapping[str, jax.Array]) -> Any:
  """Sets the pruned weights of a pytree to zero.

  Args:
    params: any pytree of arrays.
    masks: parameter path -> mask, as `magnitude_masks` makes them.

  Returns:
    The same tree; parameters without a mask are unchanged.
  """
  leaves, structure = jax.tree.flatten(params)
  return structure.unflatten(
    jnp.where(masks[name], leaf, 0) if name in masks else leaf
    for name, leaf in zip(rules_lib.leaf_names(params), leaves)
  )
