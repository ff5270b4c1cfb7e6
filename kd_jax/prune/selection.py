"""Which units leave: scores of parameters pooled to units, and exact counts.

Owns the choice among what a `Plan` offers, in the step as masks (`neurons`) and
on the host as lists of units (`choose_units`). Scores of parameters come from
elsewhere; removing is in `shrink`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import rules as rules_lib
from kd_jax.placement import replicated
from kd_jax.prune import structures
from kd_jax.prune.masks import score_masks
from kd_jax.prune.plan import Group, Member, Plan

Scores = Mapping[str, jax.Array]
_PARAMS = 'params/'


def _mean_of(values: jax.Array) -> jax.Array:
  return values / _positive(jnp.mean(jnp.abs(values)))


def _max_of(values: jax.Array) -> jax.Array:
  return values / _positive(jnp.max(jnp.abs(values)))


def _positive(value: jax.Array) -> jax.Array:
  return jnp.where(value > 0, value, 1.0)


POOLS = {'sum': jnp.sum, 'mean': jnp.mean}
NORMS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'mean': _mean_of,
  'max': _max_of,
  'none': lambda values: values,
}


def unit_scores(
  plan: Plan, scores: Scores, *, pool: str = 'sum', norm: str = 'mean'
) -> dict[str, jax.Array]:
  """One score for each unit, comparable between groups.

  The score of a unit is the mean over its parameters of the pooled scores of
  its positions, divided by the mean of that in its group. A group of which no
  parameter has scores is left out.

  Args:
    plan: from `find_groups`.
    scores: parameter path, without the collection -> scores of its entries,
      >= 0, such as magnitudes; a parameter without scores counts as 0.
    pool: 'sum' or 'mean' over the entries of a unit in one parameter; a sum
      favours units in large kernels.
    norm: 'mean' or 'max' divides by that of the group's units, 'none' does
      not.

  Returns:
    group name -> `[size]` float32.

  Raises:
    ValueError: for an unknown pool or norm, scores of what is no parameter, or
      of another shape than it.

  Example:
    >>> members = (Member('params/w', 1, 2, ((0,), (1,))),)
    >>> plan = Plan((Group('w', 2, 1, members),), {}, {'params/w': (2, 2)})
    >>> scores = {'w': jnp.array([[1.0, 2.0], [0.0, 1.0]])}
    >>> unit_scores(plan, scores)['w'].tolist()
    [0.5, 1.5]

  References:
    Fang et al., "DepGraph: Towards Any Structural Pruning", 2023,
    arXiv:2301.12900.
  """
  pooled = rules_lib.choose('pool', pool, POOLS)
  normalised = rules_lib.choose('norm', norm, NORMS)
  _check_paths(plan, scores)
  made = {}
  for group in plan.groups:
    members = [m for m in group.members if m.path.startswith(_PARAMS)]
    found = [(m, scores.get(m.path.removeprefix(_PARAMS))) for m in members]
    if all(score is None for _, score in found):
      continue
    total = jnp.zeros(group.size, jnp.float32)
    for m, score in found:
      if score is not None:
        _check_shape(plan, m.path, score)
        total += _pool(m, score, pooled)
    made[group.name] = normalised(total / max(1, len(members)))
  return made


def _check_paths(plan: Plan, found: Mapping[str, Any]) -> None:
  params = {
    path.removeprefix(_PARAMS): path
    for path in plan.shapes
    if path.startswith(_PARAMS)
  }
  for path in found:
    rules_lib.choose('parameter', path, params)


def _check_shape(plan: Plan, path: str, score: jax.Array) -> None:
  if tuple(score.shape) != tuple(plan.shapes[path]):
    raise ValueError(
      f'The scores of {path.removeprefix(_PARAMS)!r} have shape {score.shape}, '
      f'but the parameter has {plan.shapes[path]}.'
    )


def _pool(
  member: Member, score: jax.Array, pooled: Callable[..., jax.Array]
) -> jax.Array:
  """`[units]` of one member."""
  others = tuple(i for i in range(score.ndim) if i != member.axis)
  # It is small: the same on every device.
  vector = replicated(pooled(score.astype(jnp.float32), axis=others))
  if member.positions == tuple((i,) for i in range(member.size)):
    return vector
  # Units may have different numbers of positions: pad with one that scores 0.
  longest = max(map(len, member.positions))
  index = np.full((len(member.positions), longest), member.size)
  for row, places in zip(index, member.positions, strict=True):
    row[: len(places)] = places
  values = jnp.append(vector, 0.0)[index].sum(axis=1)
  if pooled is jnp.mean:
    values /= np.array([len(p) for p in member.positions], np.float32)
  return values


def neurons(
  plan: Plan, *, pool: str = 'sum', norm: str = 'mean'
) -> structures.Structure:
  """The structure of pruning whole units, for `prune`.

  All entries of a unit are masked together, in every parameter that it is in,
  so that `shrink` can remove what training has put to zero. Counts are exact,
  equal scores go by order, and a group is never left empty.

  Args:
    plan: from `find_groups`.
    pool: 'sum' or 'mean' over the entries of a unit, see `unit_scores`.
    norm: 'mean', 'max' or 'none', likewise.

  Returns:
    `structure(scores, sparsity, scope) -> masks`, `sparsity` the share of
    units to prune, and `scope` 'global' for one ranking of all units or 'layer'
    for one in each group. Every parameter with scores or with units gets a
    mask.

  Raises:
    ValueError: when called, as `unit_scores`, and for an unknown scope.

  Example:
    >>> members = (Member('params/w', 1, 2, ((0,), (1,))),)
    >>> plan = Plan((Group('w', 2, 1, members),), {}, {'params/w': (1, 2)})
    >>> masks = neurons(plan)({'w': jnp.array([[3.0, 1.0]])}, 0.5, 'global')
    >>> masks['w'].tolist()
    [[True, False]]
  """

  return structures.units(
    lambda scores: unit_scores(plan, scores, pool=pool, norm=norm),
    lambda kept, scores: _spread(plan, scores, kept),
  )


def _spread(
  plan: Plan, scores: Mapping[str, jax.Array], units: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
  """Masks of parameters from those of units."""
  masks = {name: jnp.ones_like(s, jnp.bool_) for name, s in scores.items()}
  for group in plan.groups:
    if group.name not in units:
      continue
    for m in group.members:
      if not m.path.startswith(_PARAMS):
        continue
      name, shape = m.path.removeprefix(_PARAMS), plan.shapes[m.path]
      if name not in masks:
        masks[name] = jnp.ones(shape, jnp.bool_)
      along = _along(m, units[group.name])
      masks[name] &= jax.lax.broadcast_in_dim(along, shape, (m.axis,))
  return masks


def _along(member: Member, mask: jax.Array) -> jax.Array:
  """`[member.size]` bool: a position stays if all its units do."""
  if member.positions == tuple((i,) for i in range(member.size)):
    return mask
  holders: list[list[int]] = [[] for _ in range(member.size)]
  for unit, places in enumerate(member.positions):
    for place in places:
      holders[place].append(unit)
  # One more unit, which always stays, for positions in fewer than the most.
  padded = jnp.append(mask, True)
  kept = jnp.ones(member.size, jnp.bool_)
  for depth in range(max(map(len, holders))):
    index = [h[depth] if depth < len(h) else mask.size for h in holders]
    kept &= padded[np.array(index)]
  return kept


def choose_units(
  plan: Plan,
  scores: Scores,
  sparsity: float,
  *,
  scope: str = 'global',
  multiple_of: int = 1,
  pool: str = 'sum',
  norm: str = 'mean',
) -> dict[str, np.ndarray]:
  """The units that stay, chosen once, on the host.

  Args:
    plan: from `find_groups`.
    scores: as for `unit_scores`.
    sparsity: share of the units that leave, in [0, 1).
    scope: 'global' or 'layer', as for `neurons`.
    multiple_of: rounds the channels that a group keeps up to a multiple, for
      hardware that computes so many at once; a group never grows.
    pool: 'sum' or 'mean' over the entries of a unit, see `unit_scores`.
    norm: 'mean', 'max' or 'none', likewise.

  Returns:
    group name -> indices that stay, ascending; for `shrink`. Groups without
    any scores stay whole and are not named.

  Raises:
    ValueError: for a sparsity outside [0, 1), a multiple below 1 or an unknown
      scope; also as `unit_scores`.

  Example:
    >>> members = (Member('params/w', 0, 4, ((0,), (1,), (2,), (3,))),)
    >>> plan = Plan((Group('w', 4, 1, members),), {}, {'params/w': (4,)})
    >>> scores = {'w': jnp.array([3.0, 1.0, 4.0, 2.0])}
    >>> choose_units(plan, scores, 0.75)['w'].tolist()
    [2]
    >>> choose_units(plan, scores, 0.75, multiple_of=2)['w'].tolist()
    [0, 2]
  """
  if not 0 <= sparsity < 1:
    raise ValueError(f'A sparsity is a share in [0, 1), not {sparsity}.')
  if multiple_of < 1:
    raise ValueError(f'multiple_of={multiple_of} is not 1 or more.')
  scores = unit_scores(plan, scores, pool=pool, norm=norm)
  # No shapes: 'erk' reads those of parameters, and units have none.
  masks = (
    score_masks(scores, sparsity, scope=scope, shapes={}) if scores else {}
  )
  ranks = {
    n: np.argsort(-np.asarray(s), kind='stable') for n, s in scores.items()
  }
  return {
    group.name: np.sort(
      ranks[group.name][
        : _rounded(group, int(masks[group.name].sum()), multiple_of)
      ]
    )
    for group in plan.groups
    if group.name in ranks
  }


def _rounded(group: Group, count: int, multiple_of: int) -> int:
  step = multiple_of // math.gcd(multiple_of, group.width)
  return min(group.size, -(-count // step) * step)


def kept_from_masks(plan: Plan, masks: Mapping[str, Any]) -> dict[str, Any]:
  """The units of which something is kept, for `shrink` after training.

  A unit leaves if every mask that its parameters have is False at all its
  positions; a group keeps its first unit if all would leave.

  Args:
    plan: from `find_groups`.
    masks: parameter path, without the collection -> bool mask, such as
      `masks_of(opt_state)`; paths may be missing.

  Returns:
    group name -> indices that stay, ascending.

  Raises:
    ValueError: for a mask of what is no parameter.

  Example:
    >>> members = (Member('params/w', 1, 2, ((0,), (1,))),)
    >>> plan = Plan((Group('w', 2, 1, members),), {}, {'params/w': (2, 2)})
    >>> masks = {'w': np.array([[False, True], [False, False]])}
    >>> kept_from_masks(plan, masks)['w'].tolist()
    [1]
  """
  _check_paths(plan, masks)
  kept = {}
  for group in plan.groups:
    alive = np.zeros(group.size, bool)
    known = False
    for m in group.members:
      mask = masks.get(m.path.removeprefix(_PARAMS))
      if mask is None or not m.path.startswith(_PARAMS):
        continue
      known = True
      others = tuple(i for i in range(np.ndim(mask)) if i != m.axis)
      there = np.asarray(np.any(mask, axis=others))
      alive |= [bool(there[list(places)].any()) for places in m.positions]
    units = np.flatnonzero(alive) if known else np.arange(group.size)
    kept[group.name] = units if units.size else np.arange(1)
  return kept
