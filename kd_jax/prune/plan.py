"""Plans: which positions of which parameters can leave a model together.

Owns the data that `groups.find_groups` returns and everything else in the
shrinking of models reads: plain numbers and strings, no arrays of parameters.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from kd_jax import rules as rules_lib

Kept: TypeAlias = Mapping[str, Sequence[int] | np.ndarray]


class Member(NamedTuple):
  """An axis of a parameter or of other state.

  Attributes:
    path: '/'-joined, beginning with the collection: 'params/conv/kernel'.
    axis: which one.
    size: its size before anything is removed.
    positions: for each unit, the positions that leave with it.

  Example:
    >>> heads = Member('params/query/kernel', 1, 4, ((0, 1), (2, 3)))
    >>> heads.positions[1]  # what leaves with the second of two heads
    (2, 3)
  """

  path: str
  axis: int
  size: int
  positions: tuple[tuple[int, ...], ...]


class Attribute(NamedTuple):
  """An integer attribute of a module that follows what is removed.

  Attributes:
    module: '/'-joined path of the module, '' for the model itself.
    name: of the attribute.
    size: its value before anything is removed.
    positions: for each unit, those of its `range(size)` that leave with it.
  """

  module: str
  name: str
  size: int
  positions: tuple[tuple[int, ...], ...]


class Group(NamedTuple):
  """Units that are alike: the channels of a residual stream, the heads of an
  attention.

  Attributes:
    name: of the layer that makes them; whole heads, convolution groups and
      normalisation groups have ':heads', ':groups' or ':num_groups' after it,
      and what leaves equally from each of those has ':within'; more groups of
      the same layer have '#2', '#3', ...
    size: number of units; all but one may leave.
    width: positions that one unit has in the first member.
    members: what leaves with them.
    attributes: what follows them.
    exact: whether a model without a unit computes what the whole model does
      with the unit's parameters at zero.
    reason: why not, where it is not exact.
  """

  name: str
  size: int
  width: int
  members: tuple[Member, ...]
  attributes: tuple[Attribute, ...] = ()
  exact: bool = True
  reason: str = ''


class Plan(NamedTuple):
  """What can leave a model, and what cannot and why.

  Plain data: `json.dumps(plan._asdict())` works.

  Attributes:
    groups: independent of each other; any units of any of them can leave.
    frozen: 'path[axis]' of a parameter -> why it stays, or some of it;
      'params/' and the name of a group that was refused where other units of
      the same axes can leave.
    shapes: path -> shape of every parameter and state of the model.

  Example:
    >>> units = ((0,), (1,), (2,))
    >>> members = (Member('params/conv/kernel', 3, 3, units),)
    >>> attributes = (Attribute('conv', 'features', 3, units),)
    >>> group = Group('conv', 3, 1, members, attributes)
    >>> plan = Plan((group,), {}, {'params/conv/kernel': (3, 3, 1, 3)})
    >>> plan.overrides({'conv': [0, 2]})
    {'conv': {'features': 2}}
  """

  groups: tuple[Group, ...]
  frozen: Mapping[str, str]
  shapes: Mapping[str, tuple[int, ...]]

  def __str__(self) -> str:
    return self.table()

  def group(self, name: str) -> Group:
    """The group of a name; ValueError for another."""
    named = {g.name: g for g in self.groups}
    return rules_lib.choose('group of units', name, named)

  def overrides(self, kept: Kept) -> dict[str, dict[str, int]]:
    """What `prune.resized` needs to run a linen model without the units.

    Args:
      kept: group name -> indices of the units that stay.

    Returns:
      module path -> attribute -> value, JSON values; empty if the model's
      shapes follow its parameters.
    """
    masks: dict[tuple[str, str], np.ndarray] = {}
    for group in chosen_groups(self, kept):
      gone = removed_units(group, kept)
      for a in group.attributes:
        mask = masks.setdefault((a.module, a.name), np.ones(a.size, bool))
        mask[positions_of(a, gone)] = False
    changed: dict[str, dict[str, int]] = {}
    for (module, name), mask in masks.items():
      if not mask.all():
        changed.setdefault(module, {})[name] = int(mask.sum())
    return changed

  def table(self) -> str:
    """The plan as text: a line a group, then what is frozen."""
    head = ('group', 'units', 'width', 'exact', 'leaves with it')
    rows = [head]
    for g in self.groups:
      exact = 'yes' if g.exact else 'no'
      rows.append((g.name, str(g.size), str(g.width), exact, _members(g)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
      '  '.join(
        [c.ljust(n) for c, n in zip(cells, widths, strict=True)] + [last]
      )
      for *cells, last in rows
    ]
    lines += [
      f'{g.name} is not exact: {g.reason}' for g in self.groups if not g.exact
    ]
    if self.frozen:
      lines += ['', 'frozen']
      for why in dict.fromkeys(self.frozen.values()):
        names = [n for n, w in self.frozen.items() if w == why]
        lines.append(f'  {_few([n.split("/", 1)[-1] for n in names])}: {why}')
    return '\n'.join(lines)


def axis_name(path: str, axis: int) -> str:
  """What plans call an axis of a parameter: 'path[axis]'."""
  return f'{path}[{axis}]'


def _members(group: Group) -> str:
  names = [
    axis_name(m.path.split('/', 1)[-1], m.axis)
    for m in group.members
    if m.path.startswith('params/')
  ]
  return _few(names)


def _few(names: Sequence[str]) -> str:
  more = f', {len(names) - 3} more' if len(names) > 3 else ''
  return ', '.join(names[:3]) + more


def chosen_groups(plan: Plan, kept: Kept) -> list[Group]:
  """The groups that `kept` names, checked.

  Raises:
    ValueError: for an unknown group, an index that is no unit's, or a group
      of which nothing is kept.
  """
  groups = []
  for name, units in kept.items():
    group = plan.group(name)
    units = np.asarray(units, dtype=np.int64)
    if not units.size:
      raise ValueError(f'Group {name!r}: at least one unit must stay.')
    if units.min() < 0 or units.max() >= group.size:
      raise ValueError(
        f'Group {name!r} has units 0 to {group.size - 1}, not '
        f'{units.min()} to {units.max()}.'
      )
    groups.append(group)
  return groups


def removed_units(group: Group, kept: Kept) -> np.ndarray:
  """Indices of the units of a group that leave."""
  return np.setdiff1d(np.arange(group.size), np.asarray(kept[group.name]))


def positions_of(member: Member | Attribute, units: np.ndarray) -> np.ndarray:
  """The positions of some units in one member, `[n]` int."""
  found = [p for unit in units for p in member.positions[unit]]
  return np.array(found, dtype=np.int64)


def axis_masks(plan: Plan, kept: Kept) -> dict[str, dict[int, np.ndarray]]:
  """path -> axis -> `[size]` bool, True where a position stays.

  Args:
    plan: of the model.
    kept: group name -> indices of the units that stay; groups that are not
      named stay whole.
  """
  masks: dict[str, dict[int, np.ndarray]] = {}
  for group in chosen_groups(plan, kept):
    gone = removed_units(group, kept)
    for m in group.members:
      axes = masks.setdefault(m.path, {})
      mask = axes.setdefault(m.axis, np.ones(m.size, bool))
      mask[positions_of(m, gone)] = False
  return masks
