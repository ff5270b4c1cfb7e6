"""Trying groups out: whether a model without some units computes as planned.

Owns the comparison of a smaller model, traced, with the whole one, step by
step, and the search for the groups that fail it. A model's own code may look at
its widths and go another way, which no analysis of one trace can see.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from kd_jax.prune.analysis import Analysis, run, traced
from kd_jax.prune.plan import Attribute, Group, Kept, Plan, removed_units
from kd_jax.prune.primitives import RULES
from kd_jax.prune.shrink import shrink, shrunk_forward
from kd_jax.prune.tags import Tags
from kd_jax.prune.trace import Axis, Step, Value, Walk


def sift(
  analysis: Analysis, candidates: Sequence[Group]
) -> tuple[list[Group], dict[str, str]]:
  """Splits groups into those that can leave together, and the others.

  Args:
    analysis: of the whole model.
    candidates: some of its groups.

  Returns:
    The groups without a unit of which the model computes as planned, some
    followed by more attributes; and group name -> why it cannot leave.
  """
  accepted: list[Group] = []
  refused: dict[str, str] = {}
  waiting = [[*candidates]]
  while waiting:
    groups = waiting.pop()
    reason = _without_one(analysis, accepted + groups) if groups else None
    if reason is None:
      accepted += groups
    elif len(groups) > 1:
      half = len(groups) // 2
      waiting += [groups[half:], groups[:half]]
    else:
      [group] = groups
      fitting = (
        other
        for other in _followed(group, analysis.modules)
        if _without_one(analysis, [*accepted, other]) is None
      )
      if found := next(fitting, None):
        accepted.append(found)
      else:
        refused[group.name] = f'without it the model {reason}'
  return accepted, refused


def _without_one(analysis: Analysis, groups: Sequence[Group]) -> str | None:
  plan = Plan(tuple(groups), {}, analysis.shapes)
  kept = {g.name: np.arange(g.size - 1) for g in groups}
  return failure(analysis, plan, kept)


def _followed(group: Group, modules: dict[str, dict[str, int]]) -> list[Group]:
  """The group with attributes that may have to follow it.

  A block that was written for a width may compare its input with that.
  """
  near: dict[tuple[str, str], Attribute] = {}
  every: dict[tuple[str, str], Attribute] = {}
  for m in group.members:
    parts = m.path.split('/')[1:-1]
    for i in range(len(parts)):
      module = '/'.join(parts[:i])
      for name, value in modules.get(module, {}).items():
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


def failure(analysis: Analysis, plan: Plan, kept: Kept) -> str | None:
  """How a smaller model fails to compute what the plan says.

  Args:
    analysis: of the whole model.
    plan: with groups of the analysis.
    kept: group name -> indices of the units that stay.

  Returns:
    Words that go on 'The model ...', or None where it does not fail.
  """
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), analysis.variables
  )
  small = shrink(plan, abstract, kept)
  try:
    forward = shrunk_forward(analysis.forward, plan, kept)
    closed, _ = traced(forward, small, analysis.batch)
  except Exception as e:  # a model's own code may raise anything
    return f'does not run: {_sentence(e)}'
  walk = Walk(Tags(), {}, RULES)
  shapes = [tuple(x.shape) for x in jax.tree.leaves(small)]
  run(
    walk,
    closed,
    [Value(('a parameter',) * len(s), (False,) * len(s)) for s in shapes],
  )
  gone = {
    analysis.units[name][unit]
    for name in kept
    for unit in removed_units(plan.group(name), kept)
  }
  sizes = _sizes_without(analysis.tags, gone)
  return _difference(analysis.walk.trail, walk.trail, sizes)


def _sizes_without(tags: Tags, gone: set[int]) -> Callable[[np.ndarray], int]:
  """A function that counts the positions of an axis that stay."""
  # Steps share their axes, which are not hashable.
  known: dict[int, int] = {}

  def size(axis):
    if id(axis) not in known:
      known[id(axis)] = sum(gone.isdisjoint(tags.atoms(tag)) for tag in axis)
    return known[id(axis)]

  return size


def _difference(
  whole: Sequence[Step],
  small: Sequence[Step],
  size: Callable[[np.ndarray], int],
) -> str | None:
  """The first step of a smaller model that is not the whole one's, in words."""

  def expected(axis: Axis, before: int) -> int:
    return size(axis) if isinstance(axis, np.ndarray) else before

  # Lengths are compared last: the first step that differs says more.
  for old, new in zip(whole, small, strict=False):
    shape = tuple(map(expected, old.axes, old.shape))
    if (old.name, shape) != (new.name, new.shape):
      return (
        f'computes something else: {new.name} of {new.shape} in '
        f'{new.where or "the model"} in place of {old.name} of {shape}'
      )
  if len(small) != len(whole):
    return 'computes something else: it has other operations'
  return None


def _sentence(error: Exception) -> str:
  text = ' '.join(str(error).split()).split(' (https:')[0] or repr(error)
  return text if len(text) < 200 else text[:197] + '...'
