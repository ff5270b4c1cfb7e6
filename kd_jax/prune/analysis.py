"""One traced forward: tags on its variables, and the groups read off them.

Owns the way from a forward to the groups that might leave it, and the reasons
for what is fixed. Nothing is run: the forward is traced to a jaxpr, and
`trace.Walk` moves tags through it. Whether a group really can leave is tried
out in `trials`; `groups` makes a plan of those that do.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from kd_jax import rules as rules_lib
from kd_jax.prune.plan import Attribute, Group, Member, axis_name
from kd_jax.prune.primitives import RULES
from kd_jax.prune.tags import Tags
from kd_jax.prune.trace import MARK, Value, Walk, output_of
from kd_jax.types import Batch, Variables

# atom -> (path, axis) -> its positions
Places = dict[int, dict[tuple[str, int], list[int]]]
# module path -> its integer attributes
Modules = dict[str, dict[str, int]]


class Analysis:
  """One traced forward, its tags, and the groups found in them.

  Attributes:
    forward: what was analysed, and so are `variables` and `batch`.
    names: the path of every variable.
    shapes: path -> shape.
    modules: module path -> its integer attributes.
    tags: of all axes.
    walk: with the trail of what was computed.
    groups: of units that are alike, in the order of the computation.
    fixed: 'path[axis]' -> why some positions can never leave.
    units: group name -> the atom of each unit.
  """

  def __init__(
    self, forward: Callable[..., Any], variables: Variables, batch: Batch
  ) -> None:
    self.forward = forward
    self.variables = dict(variables)
    self.batch = dict(batch)
    leaves = jax.tree.leaves(self.variables)
    self.names = rules_lib.leaf_names(self.variables)
    self.shapes = {
      n: tuple(x.shape) for n, x in zip(self.names, leaves, strict=True)
    }
    self.tags = Tags()
    self._axes = {
      name: tuple(self.tags.fresh(n) for n in shape)
      for name, shape in self.shapes.items()
    }
    closed, self.modules = traced(forward, self.variables, self.batch)
    self._order = _reading_order(closed.jaxpr, self.names)
    self.walk = Walk(self.tags, self.modules, RULES)
    values = [
      Value(self._axes[name], (name.startswith('params/'),) * len(shape))
      for name, shape in self.shapes.items()
    ]
    for output in run(self.walk, closed, values):
      for axis in output.axes:
        self.walk.fix(axis, 'the output')
    self.fixed: dict[str, str] = {}
    self.units: dict[str, list[int]] = {}
    self.groups = self._find_groups()

  def _find_groups(self) -> list[Group]:
    places: Places = {}
    for path, axes in self._axes.items():
      for i, axis in enumerate(axes):
        why = self._place(path, i, axis, places)
        if why and len(axis) > 1:
          self.fixed[axis_name(path, i)] = why
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
          whole = 'all of it would leave together'
          self.fixed.setdefault(axis_name(m.path, m.axis), whole)
    return sorted(
      found.values(), key=lambda g: self._first([m.path for m in g.members])
    )

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
    return min((self._order.get(p, len(self._order)), p) for p in matrices)

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


def traced(
  forward: Callable[..., Any], variables: Variables, batch: Batch
) -> tuple[Any, Modules]:
  """The jaxpr of a forward's output, and the attributes of its modules.

  Args:
    forward: of a linen model, for its modules to be known; or any other.
    variables: arrays or their shapes.
    batch: likewise.

  Returns:
    `(closed jaxpr, modules)`; the name stacks in the jaxpr say in which module
    an equation stands.
  """
  modules: Modules = {}
  intercepted = getattr(forward, 'intercepted', None)
  marked = intercepted(_recorder(modules)) if intercepted else forward
  closed = jax.make_jaxpr(lambda v, b: output_of(marked, v, b))(
    dict(variables), dict(batch)
  )
  return closed, modules


def _recorder(modules: Modules) -> Callable[..., Any]:
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


def run(walk: Walk, closed: Any, values: Sequence[Value]) -> list[Value]:
  """The outputs of a walk over what `traced` made.

  Args:
    walk: it keeps the trail.
    closed: the jaxpr.
    values: what is known of the variables.
  """
  inputs = [
    Value(('the input',) * len(v.aval.shape), None)
    for v in closed.jaxpr.invars[len(values) :]
  ]
  return walk.run(closed.jaxpr, closed.consts, [*values, *inputs])


def _reading_order(jaxpr: Any, names: Sequence[str]) -> dict[str, int]:
  """path -> a number that tells which variables are read before others."""
  # The arrays of the batch come after those of the variables.
  variables = dict(zip(jaxpr.invars[: len(names)], names, strict=True))
  order: dict[str, int] = {}
  for eqn in jaxpr.eqns:
    for atom in eqn.invars:
      name = None if hasattr(atom, 'val') else variables.get(atom)
      if name is not None:
        order.setdefault(name, len(order))
  return order


def _unused(name: str, taken: Mapping[str, Any]) -> str:
  if name not in taken:
    return name
  number = 2
  while f'{name}#{number}' in taken:
    number += 1
  return f'{name}#{number}'
