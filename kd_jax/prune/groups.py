"""Dependency groups: what can leave any model, found by tracing its forward.

Owns the two questions that one asks about a model, and puts their parts
together: `analysis` traces the forward and reads groups off it, `trials` tries
every group out before the plan offers it. What a plan is used for is in
`selection` and `shrink`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kd_jax import rules as rules_lib
from kd_jax.prune.analysis import Analysis
from kd_jax.prune.plan import Group, Kept, Plan, axis_name
from kd_jax.prune.trials import failure, sift
from kd_jax.types import Batch, Variables


def find_groups(
  forward: Callable[..., Any],
  variables: Variables,
  batch: Batch,
  *,
  keep: Sequence[str] = (),
) -> Plan:
  """Finds what can leave a model without changing what is left.

  Two positions are in one unit if one cannot leave without the other: an
  output channel of a convolution, its bias, its BatchNorm and the input
  channels of all that read it, whatever residual sum, concatenation, pooling,
  reshape or call lies between. Units that are alike are a group. Operations
  that are not understood, inputs and outputs are frozen, and the plan says why.

  Heads of attention, groups of a convolution and of GroupNorm can leave whole,
  or equally many places can leave within each: those are two groups with the
  same parameters, and `keep=['.*:within']` leaves the whole ones alone.

  Before a group is offered it is tried out: one unit is taken away and the
  smaller model traced, and all that it computes has to have the expected
  shapes. A model whose code says otherwise keeps that group.

  Args:
    forward: from `adapters`, or any `(variables, batch) -> Forward or array`;
      evaluation mode. A linen model must come from `adapters.from_linen`,
      because it has to be run with other widths than it was written with.
    variables: the model's variables, `{'params': ..., **collections}`, or
      their shapes.
    batch: one batch, or its shapes, such as two examples. Sizes that are equal
      by accident, such as the batch's and a layer's, do no harm.
    keep: patterns of groups or of paths, such as '.*:within' or
      'params/head/.*'; what they match does not leave.

  Returns:
    The plan, plain data.

  Raises:
    ValueError: if a pattern of `keep` matches nothing.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from kd_jax import adapters
    >>> forward = adapters.from_apply(
    ...   lambda params, x: jax.nn.relu(x @ params['w']) @ params['v']
    ... )
    >>> params = {'w': jnp.ones((5, 8)), 'v': jnp.ones((8, 3))}
    >>> batch = {'image': jnp.ones((2, 5))}
    >>> print(find_groups(forward, {'params': params}, batch))
    group  units  width  exact  leaves with it
    w      8      1      yes    v[0], w[1]
    <BLANKLINE>
    frozen
      v[1]: the output
      w[0]: the input (dot_general)

  References:
    Fang et al., "DepGraph: Towards Any Structural Pruning", 2023,
    arXiv:2301.12900, for the idea of dependency groups.
  """
  analysis = Analysis(forward, variables, batch)
  names = [group.name for group in analysis.groups] + analysis.names
  patterns = [(pattern, True) for pattern in keep]
  asked = rules_lib.match(patterns, names, kind='pattern of what to keep')
  kept = {
    group.name
    for group in analysis.groups
    if asked.keys() & {group.name, *(m.path for m in group.members)}
  }
  accepted, refused = sift(
    analysis, [group for group in analysis.groups if group.name not in kept]
  )
  refused |= dict.fromkeys(kept, 'kept as asked')
  return Plan(
    tuple(accepted), _frozen(analysis, accepted, refused), analysis.shapes
  )


def check_shrunk(
  plan: Plan,
  kept: Kept,
  forward: Callable[..., Any],
  variables: Variables,
  batch: Batch,
) -> None:
  """Traces the smaller model, and compares all that it computes with the plan.

  `find_groups` has tried one unit of each group. This tries the very units
  that shall leave: code that asks whether two widths are equal may go another
  way when they become equal by accident.

  Args:
    plan: from `find_groups`.
    kept: group name -> indices of the units that shall stay.
    forward: of the whole model, as for `find_groups`.
    variables: those of the whole model, or their shapes.
    batch: one batch, or its shapes.

  Raises:
    ValueError: if the smaller model does not run, or computes something else.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from kd_jax import adapters
    >>> def net(params, x):
    ...   h = jax.nn.relu(x @ params['w'])
    ...   return (h + x if h.shape == x.shape else h) @ params['v']
    >>> model = (
    ...   adapters.from_apply(net),
    ...   {'params': {'w': jnp.ones((2, 4)), 'v': jnp.ones((4, 1))}},
    ...   {'image': jnp.ones((3, 2))},
    ... )
    >>> plan = find_groups(*model)
    >>> check_shrunk(plan, {'w': [0, 1, 2]}, *model)
    >>> try:
    ...   check_shrunk(plan, {'w': [0, 1]}, *model)
    ... except ValueError as e:
    ...   print(str(e).partition(':')[0])
    The shrunk model computes something else
  """
  reason = failure(Analysis(forward, variables, batch), plan, kept)
  if reason:
    raise ValueError(f'The shrunk model {reason}.')


def _frozen(
  analysis: Analysis, accepted: Sequence[Group], refused: Mapping[str, str]
) -> dict[str, str]:
  """Why each axis of a parameter stays, or a part of it."""
  offered = set().union(*map(_axes, accepted))
  found = {
    name: f'some of it: {why}' if name in offered else why
    for name, why in analysis.fixed.items()
  }
  for group in analysis.groups:
    if group.name not in refused:
      continue
    axes = _axes(group) - offered
    found |= dict.fromkeys(axes - found.keys(), refused[group.name])
    if not axes:  # another kind of unit of the same axes is offered
      found[f'params/{group.name}'] = refused[group.name]
  return {n: found[n] for n in sorted(found) if n.startswith('params/')}


def _axes(group: Group) -> set[str]:
  return {axis_name(m.path, m.axis) for m in group.members}
