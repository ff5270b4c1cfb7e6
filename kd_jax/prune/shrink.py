"""Smaller arrays: removing units from anything that mirrors the parameters.

Owns arrays only: what can leave is a `Plan`, what shall leave is chosen in
`selection`, and how the smaller model runs is in `resize`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kd_jax import rules as rules_lib
from kd_jax.prune import plan as plan_lib
from kd_jax.prune.plan import Kept, Plan
from kd_jax.prune.resize import resized
from kd_jax.types import TrainState


def shrink(plan: Plan, tree: Any, kept: Kept) -> Any:
  """Removes units from a tree of arrays.

  A leaf mirrors a parameter or state if its path ends with that one's, with or
  without the collection: `params`, variables, moments and accumulators of an
  optimizer, pruning masks. Of a `TrainState` the parameters, the model's state
  and the optimizer's are shrunk; the teacher and the objective are not.

  Args:
    plan: from `find_groups`.
    tree: any pytree of arrays or `jax.ShapeDtypeStruct`s.
    kept: group name -> indices of the units that stay, as `choose_units`
      returns it; groups that it does not name stay whole.

  Returns:
    The same tree; leaves that mirror nothing are unchanged.

  Raises:
    ValueError: for an unknown group or unit, a group of which nothing would
      stay, or a leaf that mirrors a parameter in another shape.

  Example:
    >>> from kd_jax.prune.plan import Group, Member, Plan
    >>> units = ((0,), (1,), (2,))
    >>> members = tuple(
    ...   Member(path, axis, 3, units)
    ...   for path, axis in (('params/w', 1), ('params/v', 0))
    ... )
    >>> shapes = {'params/w': (2, 3), 'params/v': (3, 1)}
    >>> plan = Plan((Group('w', 3, 1, members),), {}, shapes)
    >>> params = {'w': jnp.arange(6.0).reshape(2, 3), 'v': jnp.ones((3, 1))}
    >>> shrink(plan, params, {'w': [0, 2]})['w'].tolist()
    [[0.0, 2.0], [3.0, 5.0]]
  """
  masks = plan_lib.axis_masks(plan, kept)
  if isinstance(tree, TrainState):
    return tree.replace(
      params=_shrink(plan, tree.params, masks),
      model_state=_shrink(plan, tree.model_state, masks),
      opt_state=_shrink(plan, tree.opt_state, masks),
    )
  return _shrink(plan, tree, masks)


def _shrink(
  plan: Plan, tree: Any, masks: Mapping[str, Mapping[int, np.ndarray]]
) -> Any:
  mirrored = mirrored_paths(plan.shapes)

  def one(path, leaf):
    name = rules_lib.path_name(path)
    end = rules_lib.mirrored(name, mirrored.__contains__)
    if end is None or not hasattr(leaf, 'shape'):
      return leaf
    whose = mirrored[end]
    axes, shape = masks.get(whose, {}), plan.shapes[whose]
    if not axes:
      return leaf
    if leaf.shape != shape:
      if leaf.size <= 1:
        return leaf
      raise ValueError(
        f'shrink: {name!r} has shape {leaf.shape}, but what it mirrors has '
        f'{shape} in the plan.'
      )
    return _take(leaf, {i: np.flatnonzero(m) for i, m in axes.items()})

  return jax.tree_util.tree_map_with_path(one, tree)


def mirrored_paths(paths: Iterable[str]) -> dict[str, str]:
  """What the path of a leaf may end with, to mirror one of a model's arrays.

  Args:
    paths: of the model's arrays, beginning with their collections.

  Returns:
    path -> itself, and the path without its collection -> the path.
  """
  paths = list(paths)
  found = {path.split('/', 1)[1]: path for path in paths if '/' in path}
  # Parameters win over state of the same name.
  found |= {
    path.removeprefix('params/'): path
    for path in paths
    if path.startswith('params/')
  }
  return found | {path: path for path in paths}


def _take(leaf: Any, indices: Mapping[int, np.ndarray]) -> Any:
  if isinstance(leaf, jax.ShapeDtypeStruct):
    shape = [len(indices.get(i, range(n))) for i, n in enumerate(leaf.shape)]
    return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)
  sharding = None
  take: Callable[..., Any]
  if isinstance(leaf, np.ndarray):
    take = np.take
  elif _is_local(leaf):
    # On the host: on a device every new shape is another program to compile.
    sharding = leaf.sharding
    leaf, take = np.asarray(leaf), np.take
  else:
    take = jnp.take
  for axis, index in indices.items():
    leaf = take(leaf, index, axis=axis)
  return leaf if sharding is None else _put(leaf, sharding)


def _is_local(leaf: Any) -> bool:
  """Whether an array has values, and all of them in this process."""
  try:
    return leaf.is_fully_addressable
  except jax.errors.ConcretizationTypeError:
    return False


def _put(leaf: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
  """With its old sharding, or replicated if its devices do not divide it."""
  if not isinstance(sharding, NamedSharding):
    return jnp.asarray(leaf)
  try:
    sharding.shard_shape(leaf.shape)
  except ValueError:
    sharding = NamedSharding(sharding.mesh, PartitionSpec())
  return jax.device_put(leaf, sharding)


def shrunk_forward(
  forward: Callable[..., Any], plan: Plan, kept: Kept
) -> Callable[..., Any]:
  """The forward that runs with what `shrink` returns.

  Args:
    forward: from `adapters`, or a function whose shapes follow its parameters.
    plan: from `find_groups`.
    kept: as for `shrink`.

  Returns:
    For a linen model, the same forward with `resized` before its interceptors;
    else the forward itself.

  Raises:
    ValueError: if attributes would have to change and the forward is not
      from `adapters.from_linen`.

  Example:
    >>> from kd_jax import adapters, models
    >>> from kd_jax.prune import find_groups
    >>> model = models.make_model('mlp', num_classes=1, hidden=(3,))
    >>> forward = adapters.from_linen(model)
    >>> variables = {'params': {
    ...   'dense1': {'kernel': jnp.ones((1, 3)), 'bias': jnp.zeros(3)},
    ...   'head': {
    ...     'kernel': jnp.array([[1.0], [2], [4]]), 'bias': jnp.zeros(1)},
    ... }}
    >>> batch, kept = {'image': jnp.array([[3.0]])}, {'dense1': [0, 2]}
    >>> plan = find_groups(forward, variables, batch)
    >>> small = shrunk_forward(forward, plan, kept)
    >>> small(shrink(plan, variables, kept), batch).output.tolist()
    [[15.0]]
  """
  overrides = plan.overrides(kept)
  intercepted = getattr(forward, 'intercepted', None)
  if intercepted is not None:
    return intercepted(resized(overrides))
  if overrides:
    raise ValueError(
      'shrunk_forward: attributes of modules have to change, but the forward '
      'is not from adapters.from_linen.'
    )
  return forward
