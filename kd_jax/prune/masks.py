"""Masks of the largest scores, with exact counts and without a sort.

The threshold is found by bisection on the bits of the scores, which order as
the floats do: 32 counts give the exact k-th largest score over any number of
arrays. Counts are sums, which under sharding become all-reduces; a sort would
gather the parameters. Scores come from `scores`, counts from `scopes`.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from kd_jax import rules as rules_lib
from kd_jax.prune import scopes
from kd_jax.prune.scopes import kept_count as kept_count


def ordered_bits(scores: jax.Array) -> jax.Array:
  """uint32 that order as float32 scores do; NaN is below -inf, -0 equals 0.

  Example:
    >>> bits = ordered_bits(jnp.array([jnp.nan, -jnp.inf, -1.0, 0.0, 2.0]))
    >>> bool((bits[1:] > bits[:-1]).all()), int(bits[0])
    (True, 0)
  """
  bits = jax.lax.bitcast_convert_type(
    jnp.asarray(scores, jnp.float32), jnp.uint32
  )
  sign, infinity = jnp.uint32(2**31), jnp.uint32(0x7F800000)
  magnitude = bits & ~sign
  negative = (bits >= sign) & (magnitude > 0)
  ordered = jnp.where(negative, ~bits, magnitude | sign)
  return jnp.where(magnitude > infinity, jnp.uint32(0), ordered)


def largest(
  scores: Sequence[jax.Array], keep: ArrayLike, *, each: bool = False
) -> list[jax.Array]:
  """Masks of the `keep` largest entries over several arrays together.

  Args:
    scores: arrays of any shapes, converted to float32. Infinities order as
      numbers do; NaN is smaller than all of them.
    keep: int32 scalar, between 0 and the total number of entries.
    each: keeps the largest entry of every array whatever the others are;
      `keep` must not be below the number of arrays then.

  Returns:
    Boolean arrays of the same shapes with exactly `keep` True in all. Among
    equal scores those of earlier arrays and lower flat indices are kept.

  Example:
    >>> masks = largest([jnp.array([3.0, 1.0]), jnp.array([1.0, 2.0])], 3)
    >>> [mask.tolist() for mask in masks]
    [[True, True], [False, True]]
    >>> masks = largest([jnp.array([3.0, 2.0]), jnp.array([1.0])], 2, each=True)
    >>> [mask.tolist() for mask in masks]
    [[True, False], [True]]
  """
  return _largest([list(scores)], jnp.reshape(jnp.int32(keep), (1,)), each)[0]


def largest_each(
  scores: Sequence[jax.Array], keeps: Sequence[ArrayLike]
) -> list[jax.Array]:
  """Masks of the largest entries of every array by itself.

  Args:
    scores: arrays of any shapes, as for `largest`.
    keeps: how many entries each array keeps, int32 scalars.

  Example:
    >>> masks = largest_each([jnp.array([3.0, 1.0]), jnp.array([1.0])], [1, 0])
    >>> [mask.tolist() for mask in masks]
    [[True, False], [False]]
  """
  keep = jnp.stack([jnp.int32(k) for k in keeps])
  return [m for [m] in _largest([[s] for s in scores], keep, False)]


# Compiled, so that calls outside of jit are compiled once per shapes.
@functools.partial(jax.jit, static_argnames='each')
def _largest(
  groups: list[list[jax.Array]], keep: jax.Array, each: bool
) -> list[list[jax.Array]]:
  """Masks of the keep[g] largest entries of every group g of arrays."""
  bits = [[ordered_bits(s) for s in group] for group in groups]
  index = [_flat_indices(group) for group in groups]
  if each:
    bits = [[_first_on_top(b) for b in group] for group in bits]

  def count(holds, limits):
    """How many entries of each group satisfy a comparison with its limit."""
    counts = [
      sum(
        jnp.sum(holds(g, i, limits[g]), dtype=jnp.int32)
        for i in range(len(group))
      )
      for g, group in enumerate(groups)
    ]
    return jnp.stack([jnp.int32(c) for c in counts])

  # The largest t with at least `keep` scores >= t is the k-th largest score.
  threshold = _bisect(
    lambda t: count(lambda g, i, t: bits[g][i] >= t, t) >= keep, len(groups), 32
  )
  above = count(lambda g, i, t: bits[g][i] > t, threshold)
  # The largest i such that the ties before i are not more than are missing.
  last = _bisect(
    lambda n: (
      count(lambda g, i, n: (bits[g][i] == threshold[g]) & (index[g][i] < n), n)
      <= keep - above
    ),
    len(groups),
    max(sum(s.size for s in group) for group in groups).bit_length(),
  )
  return [
    [
      (b > threshold[g]) | ((b == threshold[g]) & (i < last[g]))
      for b, i in zip(bits[g], index[g], strict=True)
    ]
    for g in range(len(groups))
  ]


def _bisect(
  holds: Callable[[jax.Array], jax.Array], size: int, bits: int
) -> jax.Array:
  """The `[size]` largest uint32 below 2**bits for which falling tests hold."""

  def body(i, value):
    candidate = value + (jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32))
    return jnp.where(holds(candidate), candidate, value)

  zeros = jnp.zeros(size, jnp.uint32)
  # Under shard_map the start must vary over the axes that the scores vary over.
  start = jnp.where(holds(zeros), zeros, zeros)
  return jax.lax.fori_loop(0, bits, body, start)


def _flat_indices(arrays: list[jax.Array]) -> list[jax.Array]:
  """The position of every entry in the concatenation of flat arrays."""
  indices, offset = [], 0
  for array in arrays:
    index = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
      index = index * size + jax.lax.broadcasted_iota(
        jnp.uint32, array.shape, axis
      )
    indices.append(index + offset)
    offset += array.size
  return indices


def _first_on_top(bits: jax.Array) -> jax.Array:
  """Makes the first of the largest entries larger than any score."""
  if not bits.size:
    return bits
  [index] = _flat_indices([bits])
  top = bits == jnp.max(bits)
  first = jnp.min(jnp.where(top, index, jnp.uint32(bits.size)))
  return jnp.where(index == first, jnp.uint32(2**32 - 1), bits)


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
    keep = kept_count(sum(sizes.values()), sparsity)
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
  """The parameters that pruning rules choose, by path."""
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
  leaves, structure = jax.tree.flatten(params)
  masked = (
    jnp.where(masks[name], leaf, 0) if name in masks else leaf
    for name, leaf in zip(rules_lib.leaf_names(params), leaves, strict=True)
  )
  return jax.tree.unflatten(structure, masked)


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
    name, shape = f'/{rules_lib.path_name(path)}', getattr(leaf, 'shape', None)
    matches = [
      other
      for other, array in like.items()
      if name.endswith(f'/{other}' if other else '') and shape == array.shape
    ]
    found.append(max(matches, key=len, default=None))
  return found


def gathered(x: jax.Array, axis: int, *, parts: int | None = None) -> jax.Array:
  """Takes an axis of a mesh with explicit axes off an array's own axis.

  Reshapes, sorts and paddings of an explicitly sharded axis are errors. Under
  automatic sharding the compiler gathers where it must, and this does nothing.

  Args:
    x: any array.
    axis: its axis, >= 0.
    parts: equal parts into which the axis will be split; it stays sharded if
      every device has whole parts.

  Returns:
    The same values.

  Example:
    >>> gathered(jnp.ones((2, 3)), 0).shape
    (2, 3)
  """
  sharding = jax.typeof(x).sharding
  spec = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
  names = spec[axis] if isinstance(spec[axis], tuple) else (spec[axis],)
  names = [name for name in names if name is not None]
  devices = math.prod(sharding.mesh.shape[name] for name in names)
  if not names or (parts is not None and parts % devices == 0):
    return x
  spec[axis] = None
  sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
  return jax.sharding.reshard(x, sharding)


def placed_like(x: jax.Array, like: jax.Array) -> jax.Array:
  """Gives an array the explicit sharding of another of its shape.

  Example:
    >>> placed_like(jnp.ones(2), jnp.zeros(2)).shape
    (2,)
  """
  sharding = jax.typeof(like).sharding
  if all(name is None for name in sharding.spec):
    return x
  return jax.sharding.reshard(x, sharding)
