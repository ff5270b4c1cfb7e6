"""Dependency groups: what can leave any model, found by tracing its forward.

Owns the analysis from a forward to a `Plan`. Nothing is run: the forward is
traced to a jaxpr, tags walk through it, and every group is tried out, also
abstractly, before the plan offers it. What the plan is used for is in `shrink`
and `selection`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kd_jax import rules as rules_lib
from kd_jax.prune.plan import (
  Attribute,
  Group,
  Kept,
  Member,
  Plan,
  removed_units,
)
from kd_jax.prune.primitives import RULES
from kd_jax.prune.shrink import shrink, shrunk_forward
from kd_jax.prune.tags import Tags
from kd_jax.prune.trace import MARK, Step, Value, Walk
from kd_jax.types import Batch, Variables

# atom -> (path, axis) -> its positions
Places = dict[int, dict[tuple[str, int], list[int]]]


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
    >>> import jax.numpy as jnp
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
  analysis = _Analysis(forward, variables, batch)
  groups, frozen = analysis.groups()
  names = [g.name for g in groups] + analysis.names
  patterns = [(pattern, True) for pattern in keep]
  kept = rules_lib.match(patterns, names, kind='pattern of what to keep')
  candidates, refused = [], {}
  for group in groups:
    if kept.keys() & {group.name, *(m.path for m in group.members)}:
      refused[group.name] = 'kept as asked'
    else:
      candidates.append(group)
  accepted = analysis.sift([], candidates, refused)
  return Plan(
    tuple(accepted),
    _frozen(frozen, groups, accepted, refused),
    analysis.shapes,
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
    kept: what shall stay.
    forward: of the whole model, and so are `variables` and `batch`.

  Raises:
    ValueError: if the smaller model does not run, or computes something else.
  """
  analysis = _Analysis(forward, variables, batch)
  analysis.groups()
  reason = analysis.failure(plan, kept)
  if reason:
    raise ValueError(f'The shrunk model {reason}.')


def _frozen(
  fixed: Mapping[str, str],
  groups: Sequence[Group],
  accepted: list[Group],
  refused: dict[str, str],
) -> dict[str, str]:
  """Why each axis of a parameter stays, or a part of it."""
  offered = {_axis_name(m) for g in accepted for m in g.members}
  found = {
    name: f'some of it: {why}' if name in offered else why
    for name, why in fixed.items()
  }
  for group in groups:
    if group.name not in refused:
      continue
    axes = {_axis_name(m) for m in group.members} - offered
    found |= dict.fromkeys(axes - found.keys(), refused[group.name])
    if not axes:  # another kind of unit of the same axes is offered
      found[f'params/{group.name}'] = refused[group.name]
  return {n: found[n] for n in sorted(found) if n.startswith('params/')}


def _axis_name(member: Member) -> str:
  return f'{member.path}[{member.axis}]'


def _output(
  forward: Callable[..., Any], variables: Variables, batch: Batch
) -> Any:
  out = forward(variables, batch)
  return getattr(out, 'output', out)


def _recorder(modules: dict[str, dict[str, int]]) -> Callable[..., Any]:
  """An interceptor that notes integer attributes and marks name stacks."""

  def interceptor(next_fun, args, kwargs, context):
    module = context.module
    if module.scope is None or context.method_name == 'setup':
      return next_fun(*args, **kwargs)
    modules['/'.join(module.path)] = {
      name: value
      for name in module.__dataclass_fields__
      if type(value := getattr(module, name, None)) is int
    }
    with jax.named_scope(MARK + '|'.join(module.path)):
      return next_fun(*args, **kwargs)

  return interceptor


class _Analysis:
  """One traced forward, its tags, and the groups found in them."""

  def __init__(
    self, forward: Callable[..., Any], variables: Variables, batch: Batch
  ) -> None:
    self.forward = forward
    self.variables = dict(variables)
    self.batch = dict(batch)
    self.modules: dict[str, dict[str, int]] = {}
    self.tags = Tags()
    leaves = jax.tree.leaves(self.variables)
    self.names = rules_lib.leaf_names(self.variables)
    self.shapes = {
      n: tuple(x.shape) for n, x in zip(self.names, leaves, strict=True)
    }
    self.axes = {
      name: tuple(self.tags.fresh(n) for n in shape)
      for name, shape in self.shapes.items()
    }
    intercepted = getattr(forward, 'intercepted', None)
    marked = intercepted(_recorder(self.modules)) if intercepted else forward
    closed = _traced(marked, self.variables, self.batch)
    self.order = self._order(closed)
    values = [
      Value(self.axes[name], (name.startswith('params/'),) * len(shape))
      for name, shape in self.shapes.items()
    ]
    self.walk = Walk(self.tags, self.modules, RULES)
    for output in _run(self.walk, closed, values):
      for axis in output.axes:
        self.walk.fix(axis, 'the output')
    self.units: dict[str, list[int]] = {}

  def _order(self, closed: Any) -> dict[str, int]:
    """path -> which equation reads it first."""
    # The arrays of the batch come after those of the variables.
    invars = closed.jaxpr.invars[: len(self.names)]
    variables = dict(zip(invars, self.names, strict=True))
    order: dict[str, int] = {}
    for eqn in closed.jaxpr.eqns:
      for atom in eqn.invars:
        name = None if hasattr(atom, 'val') else variables.get(atom)
        if name is not None:
          order.setdefault(name, len(order))
    return order

  def groups(self) -> tuple[list[Group], dict[str, str]]:
    """The groups, and 'path[axis]' -> why of what is fixed."""
    places: Places = {}
    frozen: dict[str, str] = {}
    for path, axes in self.axes.items():
      for i, axis in enumerate(axes):
        why = self._place(path, i, axis, places)
        if why and len(axis) > 1:
          frozen[f'{path}[{i}]'] = why
    alike: dict[Any, list[int]] = {}
    for atom, members in places.items():
      kind = self.tags.kind.get(atom, '')
      alike.setdefault((tuple(members), kind), []).append(atom)
    found: dict[str, Group] = {}
    for (members, kind), atoms in alike.items():
      name = _unused(self._name(members) + (f':{kind}' if kind else ''), found)
      found[name] = self._group(name, members, atoms, places)
      self.units[name] = atoms
    for name in [n for n, g in found.items() if g.size == 1]:
      for m in found.pop(name).members:
        if m.size > 1:
          frozen.setdefault(_axis_name(m), 'all of it would leave together')
    ordered = sorted(
      found.values(), key=lambda g: self._first([m.path for m in g.members])
    )
    return ordered, frozen

  def _place(
    self, path: str, i: int, axis: Iterable[int], places: Places
  ) -> str | None:
    """Notes where an axis's atoms are; a reason if positions are fixed."""
    reason = None
    for position, tag in enumerate(axis):
      free = self.tags.free_atoms(tag)
      for atom in free:
        places.setdefault(atom, {}).setdefault((path, i), []).append(position)
      if not free and reason is None:
        reason = next(self.tags.fixed[a] for a in self.tags.atoms(tag))
    return reason

  def _first(self, paths: Sequence[str]) -> tuple[int, str]:
    """Where the matrices among parameters are read first, or all of them."""
    matrices = [p for p in paths if len(self.shapes[p]) > 1] or paths
    return min((self.order.get(p, len(self.order)), p) for p in matrices)

  def _name(self, members: Sequence[tuple[str, int]]) -> str:
    path = self._first([path for path, _ in members])[1].split('/')[1:]
    return '/'.join(path[:-1] or path)

  def _group(
    self,
    name: str,
    members: Sequence[tuple[str, int]],
    atoms: Sequence[int],
    places: Places,
  ) -> Group:
    made = tuple(
      Member(
        path,
        axis,
        self.shapes[path][axis],
        tuple(tuple(places[atom][path, axis]) for atom in atoms),
      )
      for path, axis in members
    )
    reason = next(
      (self.tags.inexact[a] for a in atoms if a in self.tags.inexact), ''
    )
    first = min(made, key=lambda m: self._first([m.path]))
    return Group(
      name,
      len(atoms),
      len(first.positions[0]),
      made,
      self._attributes(atoms),
      not reason,
      reason,
    )

  def _attributes(self, atoms: Sequence[int]) -> tuple[Attribute, ...]:
    made = []
    for count in self.walk.counts.values():
      held = [self.tags.free_atoms(tag) for tag in count.tags]
      positions = tuple(
        tuple(i for i, free in enumerate(held) if atom in free)
        for atom in atoms
      )
      if any(positions):
        made.append(Attribute(count.module, count.name, len(held), positions))
    return tuple(made)

  def sift(
    self,
    accepted: list[Group],
    candidates: list[Group],
    refused: dict[str, str],
  ) -> list[Group]:
    """The candidates without which the model runs; the others are refused."""
    if not candidates:
      return accepted
    reason = self._without_one(accepted + candidates)
    if reason is None:
      return accepted + candidates
    if len(candidates) == 1:
      for group in self._followed(candidates[0]):
        if self._without_one([*accepted, group]) is None:
          return [*accepted, group]
      refused[candidates[0].name] = f'without it the model {reason}'
      return accepted
    half = len(candidates) // 2
    accepted = self.sift(accepted, candidates[:half], refused)
    return self.sift(accepted, candidates[half:], refused)

  def _followed(self, group: Group) -> list[Group]:
    """The group with attributes that may have to follow it.

    A block that was written for a width may compare its input with that.
    """
    near: dict[tuple[str, str], Attribute] = {}
    every: dict[tuple[str, str], Attribute] = {}
    for m in group.members:
      parts = m.path.split('/')[1:-1]
      for i in range(len(parts)):
        module = '/'.join(parts[:i])
        for name, value in self.modules.get(module, {}).items():
          if value == m.size:
            follows = Attribute(module, name, value, m.positions)
            every[module, name] = follows
            if i == len(parts) - 1:
              near[module, name] = follows
    choices = [near, every] if near != every else [near]
    return [
      group._replace(attributes=(*group.attributes, *choice.values()))
      for choice in choices
      if choice
    ]

  def _without_one(self, groups: Sequence[Group]) -> str | None:
    plan = Plan(tuple(groups), {}, self.shapes)
    kept = {g.name: np.arange(g.size - 1) for g in groups}
    return self.failure(plan, kept)

  def failure(self, plan: Plan, kept: Kept) -> str | None:
    """How the smaller model fails to compute what the plan says, or None."""
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.variables
    )
    small = shrink(plan, abstract, kept)
    modules: dict[str, dict[str, int]] = {}
    try:
      forward = shrunk_forward(self.forward, plan, kept)
      intercepted = getattr(forward, 'intercepted', None)
      marked = intercepted(_recorder(modules)) if intercepted else forward
      closed = _traced(marked, small, self.batch)
    except Exception as e:  # a model's own code may raise anything
      return f'does not run: {_sentence(e)}'
    walk = Walk(Tags(), {}, RULES)
    shapes = [tuple(x.shape) for x in jax.tree.leaves(small)]
    _run(
      walk,
      closed,
      [Value(('a parameter',) * len(s), (False,) * len(s)) for s in shapes],
    )
    gone = {
      self.units[name][unit]
      for name in kept
      for unit in removed_units(plan.group(name), kept)
    }
    return self._difference(walk.trail, gone)

  def _difference(self, trail: Sequence[Step], gone: set[int]) -> str | None:
    sizes: dict[int, int] = {}

    def size(axis):
      if id(axis) not in sizes:
        sizes[id(axis)] = sum(
          gone.isdisjoint(self.tags.atoms(tag)) for tag in axis
        )
      return sizes[id(axis)]

    # Lengths are compared last: the first step that differs says more.
    for whole, small in zip(self.walk.trail, trail, strict=False):
      expected = tuple(
        size(axis) if isinstance(axis, np.ndarray) else n
        for axis, n in zip(whole.axes, whole.shape, strict=True)
      )
      if (whole.name, expected) != (small.name, small.shape):
        return (
          f'computes something else: {small.name} of {small.shape} in '
          f'{small.where or "the model"} in place of {whole.name} of {expected}'
        )
    if len(trail) != len(self.walk.trail):
      return 'computes something else: it has other operations'
    return None


def _traced(
  forward: Callable[..., Any], variables: dict[str, Any], batch: dict[str, Any]
) -> Any:
  return jax.make_jaxpr(lambda v, b: _output(forward, v, b))(variables, batch)


def _run(walk: Walk, closed: Any, values: list[Value]) -> list[Value]:
  inputs = [
    Value(('the input',) * len(v.aval.shape), None)
    for v in closed.jaxpr.invars[len(values) :]
  ]
  return walk.run(closed.jaxpr, closed.consts, values + inputs)


def _sentence(error: Exception) -> str:
  text = ' '.join(str(error).split()).split(' (https:')[0] or repr(error)
  return text if len(text) < 200 else text[:197] + '...'


def _unused(name: str, taken: Mapping[str, Any]) -> str:
  if name not in taken:
    return name
  number = 2
  while f'{name}#{number}' in taken:
    number += 1
  return f'{name}#{number}'
