"""Masks of a tree's weights, True where they stay, and what is done with them.

Owns masks made of scores, and how masks, or what mirrors their parameters, are
matched with the leaves of a tree. Scores come from `scores`, counts from
`scopes`, and the threshold between what stays and what goes from `thresholds`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax import rules as rules_lib
from kd_jax.prune import scopes
from kd_jax.prune.thresholds import largest, largest_each


def magnitude_masks(
  params: Any,
  sparsity: ArrayLike,
  rules: rules_lib.Rules[bool],
  *,
  scope: scopes.Scope = 'global',
  at_least_one: bool = False,
) -> dict[str, jax.Array]:
  """Masks that keep the weights of largest magnitude.

  Args:
    params: any pytree of arrays.
    sparsity: share of the chosen weights to prune, in [0, 1); may be traced.
    rules: `(pattern, True or None)` pairs that choose parameters by path.
    scope: 'global' for one threshold over all chosen parameters, 'layer' for
      one per parameter, 'erk' or `erk(...)` for one per parameter with the
      densities of Erdos-Renyi-Kernel.
    at_least_one: with 'global', keeps the largest weight of every parameter
      too, as training with `prune` does; False is the bare formula, which may
      empty a parameter. The other scopes keep one anyway.

  Returns:
    parameter path -> boolean mask, True where kept. Exactly
    `kept_count(size, sparsity)` weights are kept, of all chosen parameters
    together or (for 'layer') of each one.

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
  return score_masks(scores, sparsity, scope=scope, at_least_one=at_least_one)


def score_masks(
  scores: Mapping[str, jax.Array],
  sparsity: ArrayLike,
  *,
  scope: scopes.Scope,
  shapes: Mapping[str, Sequence[int]] | None = None,
  at_least_one: bool = True,
) -> dict[str, jax.Array]:
  """Masks that keep the largest scores; see `magnitude_masks`.

  Args:
    scores: name -> scores of weights, or of units. -inf marks what was pruned
      before.
    sparsity: share to prune; may be traced.
    scope: as for `magnitude_masks`.
    shapes: name -> shape of the parameter, if the scores are not of its
      weights.
    at_least_one: as for `magnitude_masks`; where it asks for more than the
      sparsity leaves, there is one of each.
  """
  scope = scopes.resolve(scope)
  sizes = {name: s.size for name, s in scores.items()}
  shapes = {n: s.shape for n, s in scores.items()} if shapes is None else shapes
  alive = {name: jnp.sum(s > -jnp.inf) for name, s in scores.items()}
  counts = scopes.layer_counts(scope, sparsity, sizes, shapes, alive)
  arrays = list(scores.values())
  if counts is None:
    keep = scopes.kept_count(sum(sizes.values()), sparsity)
    if at_least_one:
      keep = jnp.maximum(keep, sum(min(size, 1) for size in sizes.values()))
    return dict(
      zip(scores, largest(arrays, keep, each=at_least_one), strict=True)
    )
  return dict(
    zip(scores, largest_each(arrays, [counts[n] for n in scores]), strict=True)
  )


def choose_params(
  params: Any, rules: rules_lib.Rules[bool]
) -> dict[str, jax.Array]:
  """The parameters that pruning rules choose, by path.

  Raises:
    ValueError: if they choose none.
  """
  leaves = rules_lib.named_leaves(params)
  chosen = rules_lib.match(rules, list(leaves), kind='pruning rule')
  if not chosen:
    raise ValueError('The pruning rules choose no parameter.')
  return {name: leaf for name, leaf in leaves.items() if name in chosen}


def apply_masks(params: Any, masks: Mapping[str, jax.Array]) -> Any:
  """Sets the pruned weights of a pytree to zero.

  Args:
    params: any pytree of arrays.
    masks: parameter path -> mask, as `magnitude_masks` makes them.

  Returns:
    The same tree; parameters without a mask are unchanged.

  Example:
    >>> apply_masks({'w': jnp.ones(2)}, {'w': jnp.array([True, False])})
    {'w': Array([1., 0.], dtype=float32)}
  """
  return map_masked(
    lambda name, leaf: jnp.where(masks[name], leaf, 0), masks, params
  )


def map_masked(
  fn: Callable[..., jax.Array],
  masks: Mapping[str, jax.Array],
  tree: Any,
  *others: Any,
) -> Any:
  """`jax.tree.map` over the leaves that have a mask; the others stay.

  Args:
    fn: `(path, leaf, *leaves of the others) -> new leaf`.
    masks: by path, see `apply_masks`.
    tree: any pytree of arrays.
    *others: trees like it.

  Example:
    >>> double = lambda name, leaf: 2 * leaf
    >>> map_masked(double, {'a': None}, {'a': 1, 'b': 1})
    {'a': 2, 'b': 1}
  """
  leaves, structure = jax.tree.flatten(tree)
  rows = zip(leaves, *map(jax.tree.leaves, others), strict=True)
  new = [
    fn(name, *row) if name in masks else row[0]
    for name, row in zip(rules_lib.leaf_names(tree), rows, strict=True)
  ]
  return jax.tree.unflatten(structure, new)


def erase(updates: Any, params: Any, masks: Mapping[str, jax.Array]) -> Any:
  """Updates that set pruned weights to exactly zero.

  Args:
    updates: a tree like `params`.
    params: the parameters that they will be applied to.
    masks: parameter path -> mask.

  Returns:
    The updates, with -w at every pruned weight w.
  """
  return map_masked(
    lambda n, u, p: jnp.where(masks[n], u, -p), masks, updates, params
  )


def any_nan(arrays: Mapping[str, jax.Array]) -> jax.Array:
  """Whether any entry of any array is NaN, as a boolean scalar."""
  return jnp.any(jnp.stack([jnp.any(jnp.isnan(a)) for a in arrays.values()]))


def keep_if(
  condition: jax.Array,
  old: Mapping[str, jax.Array],
  new: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
  """The old masks if a condition holds, else the new ones.

  Args:
    condition: boolean scalar.
    old: by path.
    new: with at least the same paths.
  """
  return {n: jnp.where(condition, m, new[n]) for n, m in old.items()}


def mirrored(
  tree: Any,
  like: Mapping[str, Any],
  *,
  is_leaf: Callable[[Any], bool] | None = None,
) -> list[str | None]:
  """Which parameter every leaf of a tree mirrors, such as a momentum.

  Args:
    tree: any pytree, usually the state of an optimizer.
    like: parameter path -> array.
    is_leaf: as for `jax.tree.leaves`; what it stops at mirrors nothing.

  Returns:
    For every leaf, in the order of `jax.tree.leaves`, the longest of those
    paths that ends the leaf's own path and has the leaf's shape, or None.

  Example:
    >>> state = {'count': jnp.zeros(()), 'mu': {'a': {'w': jnp.zeros(2)}}}
    >>> mirrored(state, {'a/w': jnp.ones(2)})
    [None, 'a/w']
  """
  found = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
    shape = getattr(leaf, 'shape', None)
    alike = {other for other, array in like.items() if array.shape == shape}
    found.append(
      rules_lib.mirrored(rules_lib.path_name(path), alike.__contains__)
    )
  return found
