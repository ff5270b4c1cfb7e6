"""Primitives that move, spread, join or pick positions without computing.

Owns one rule for each: `(walk, equation, values) -> values`. Operations that
compute are in `primitives`, where the table of all rules is.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from kd_jax.prune.tags import ALWAYS
from kd_jax.prune.trace import Axis, Value, shape_of


def adaptable(walk: Any, eqn: Any, values: Sequence[Value]) -> list[Value]:
  """Random bits and the like: they are made for any shape."""
  return [Value((None,) * len(shape_of(v)), None) for v in eqn.outvars]


def iota(walk: Any, eqn: Any, values: Sequence[Value]) -> list[Value]:
  """Numbered positions: the numbered axis is fixed."""
  (out,) = eqn.outvars
  axes: list[Axis] = [None] * len(shape_of(out))
  axes[eqn.params['dimension']] = 'numbered positions'
  return [Value(tuple(axes), (False,) * len(axes))]


def broadcast(walk: Any, eqn: Any, values: Sequence[Value]) -> list[Value]:
  """New axes take any size."""
  (out,), value, atom = eqn.outvars, values[0], eqn.invars[0]
  rank = len(shape_of(out))
  axes: list[Axis] = [None] * rank
  zero = [False] * rank
  for i, to in enumerate(eqn.params['broadcast_dimensions']):
    if shape_of(atom)[i] == shape_of(out)[to]:
      axes[to] = value.axes[i]
      zero[to] = bool(value.zero and value.zero[i])
  return [
    Value(tuple(axes), None if value.zero is None else tuple(zero), value.const)
  ]


def transpose(walk: Any, eqn: Any, values: Sequence[Value]) -> list[Value]:
  """Axes in another order."""
  (value,), order = values, eqn.params['permutation']
  zero = value.zero and tuple(value.zero[i] for i in order)
  return [Value(tuple(value.axes[i] for i in order), zero, value.const)]


def squeeze(walk: Any, eqn: Any, values: Sequence[Value]) -> list[Value]:
  """Axes of size 1 go."""
  (value,) = values
  return [without(value, eqn.params['dimensions'])]


def without(value: Value, axes: Sequence[int]) -> Value:
  """What is known of an array after some of its axes are gone."""
  kept = [i for i in range(len(value.axes)) if i not in axes]
  zero = None if value.zero is None else tuple(value.zero[i] for i in kept)
  return Value(tuple(value.axes[i] for i in kept), zero, value.const)


def reshape(walk: Any, eqn: Any, values: Sequence[Value]) -> list[Value]:
  """Axes are joined and split, run by run."""
  value = values[0]
  old, new = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
  axes: list[Axis] = [None] * len(new)
  zero = [False] * len(new)
  for before, after in _blocks(old, new):
    if len(before) == len(after) == 1:
      axes[after[0]] = value.axes[before[0]]
      zero[after[0]] = bool(value.zero and value.zero[before[0]])
      continue
    merged = _merge(
      walk, [value.axes[i] for i in before], [old[i] for i in before]
    )
    parts = walk.split(merged, [new[i] for i in after], None)
    for i, part in zip(after, parts, strict=True):
      axes[i] = part
      zero[i] = bool(value.zero and all(value.zero[j] for j in before))
  if value.zero is None:
    return [Value(tuple(axes), None, value.const)]
  return [Value(tuple(axes), tuple(zero), value.const)]


def _blocks(
  old: Sequence[int], new: Sequence[int]
) -> Iterator[tuple[list[int], list[int]]]:
  """Axes that become each other: the smallest runs with equal products."""
  before = [i for i, n in enumerate(old) if n != 1]
  after = [i for i, n in enumerate(new) if n != 1]
  i = j = 0
  while i < len(before) and j < len(after):
    a, b = [before[i]], [after[j]]
    sizes = [old[before[i]], new[after[j]]]
    while sizes[0] != sizes[1]:
      if sizes[0] < sizes[1]:
        i += 1
        a.append(before[i])
        sizes[0] *= old[before[i]]
      else:
        j += 1
        b.append(after[j])
        sizes[1] *= new[after[j]]
    i, j = i + 1, j + 1
    yield a, b


def _merge(walk: Any, axes: Sequence[Axis], sizes: Sequence[int]) -> Axis:
  if len(axes) == 1:
    return axes[0]
  real = [a for a, n in zip(axes, sizes, strict=True) if n > 1]
  if all(a is None for a in real):
    return None
  if all(isinstance(a, str) for a in real):
    return real[0]
  # What takes any size will follow whatever it is joined with.
  made = [
    walk.tags.fresh(n) if a is None else None if isinstance(a, str) else a
    for a, n in zip(axes, sizes, strict=True)
  ]
  return walk.tags.merge(made, sizes)


def concatenate(walk: Any, eqn: Any, values: Sequence[Value]) -> list[Value]:
  """Positions side by side; the other axes are the same."""
  along, (out,) = eqn.params['dimension'], eqn.outvars
  axes: list[Axis] = []
  for i in range(len(shape_of(out))):
    parts = [v.axes[i] for v in values]
    if i != along:
      axes.append(walk.tie(parts, walk.at(eqn)))
    elif not any(isinstance(p, np.ndarray) for p in parts):
      axes.append(next((p for p in parts if isinstance(p, str)), None))
    else:
      sizes = [shape_of(atom)[i] for atom in eqn.invars]
      axes.append(
        np.concatenate(
          [_as_tags(p, n) for p, n in zip(parts, sizes, strict=True)]
        )
      )
  zeros = [v.zero for v in values if v.zero is not None]
  if len(zeros) < len(values):
    return [Value(tuple(axes), None)]
  zero = tuple(all(z[i] for z in zeros) for i in range(len(axes)))
  return [Value(tuple(axes), zero)]


def _as_tags(axis: Axis, size: int) -> np.ndarray:
  return axis if isinstance(axis, np.ndarray) else np.full(size, ALWAYS)


def pad(walk: Any, eqn: Any, values: Sequence[Value]) -> list[Value]:
  """Positions are added at the edges, and always kept."""
  value, axes = values[0], list(values[0].axes)
  for i, (low, high, inner) in enumerate(eqn.params['padding_config']):
    if (low, high, inner) == (0, 0, 0) or not isinstance(axes[i], np.ndarray):
      continue
    if inner or min(low, high) < 0:
      axes[i] = fix_axis(walk, eqn, axes[i])
      continue
    edges = [np.full(n, ALWAYS) for n in (low, high)]
    axes[i] = np.concatenate([edges[0], axes[i], edges[1]])
  return [Value(tuple(axes), value.zero and (False,) * len(axes))]


def fix_axis(walk: Any, eqn: Any, axis: Axis) -> Axis:
  """Fixes an axis of which an operation picks positions; its new self."""
  if not isinstance(axis, np.ndarray):
    return axis or f'written in the code ({walk.at(eqn)})'
  reason = f'{walk.at(eqn)} picks positions'
  walk.fix(axis, reason)
  return reason


def split(walk: Any, eqn: Any, values: Sequence[Value]) -> list[Value]:
  """Equal parts stay equal if the same places leave each of them."""
  (value,), sizes = values, eqn.params['sizes']
  along = eqn.params['axis']
  axis = value.axes[along]
  if len(set(sizes)) == 1 and sizes[0] > 1:
    grid = [len(sizes), sizes[0]]
    part = walk.split(axis, grid, None)[1] if len(sizes) > 1 else axis
  else:
    part = fix_axis(walk, eqn, axis)
  axes = tuple(part if i == along else a for i, a in enumerate(value.axes))
  return [Value(axes, value.zero)] * len(sizes)


def slice_(walk: Any, eqn: Any, values: Sequence[Value]) -> list[Value]:
  """Whole axes pass; of others, positions are picked."""
  value = values[0]
  old, new = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
  axes = tuple(
    a if m == n else fix_axis(walk, eqn, a)
    for a, m, n in zip(value.axes, old, new, strict=True)
  )
  return [Value(axes, value.zero if len(values) == 1 else None)]


def update_slice(walk: Any, eqn: Any, values: Sequence[Value]) -> list[Value]:
  """The operand, of which a part is replaced."""
  operand, update = values[:2]
  sizes = zip(shape_of(eqn.invars[0]), shape_of(eqn.invars[1]), strict=True)
  axes = []
  for a, b, (m, n) in zip(operand.axes, update.axes, sizes, strict=True):
    if m != n:
      a, b = fix_axis(walk, eqn, a), fix_axis(walk, eqn, b)
    axes.append(walk.tie([a, b] if m == n else [a], walk.at(eqn)))
  return [Value(tuple(axes), None)]


def gather(walk: Any, eqn: Any, values: Sequence[Value]) -> list[Value]:
  """Whole axes pass; what is indexed is fixed."""
  operand, numbers = values[0], eqn.params['dimension_numbers']
  shape, sizes = shape_of(eqn.invars[0]), eqn.params['slice_sizes']
  gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
  axes: list[Axis] = ['picked by index'] * len(shape_of(eqn.outvars[0]))
  kept = [i for i in range(len(shape)) if i not in gone]
  for i, axis in enumerate(operand.axes):
    if i in gone or sizes[i] != shape[i]:
      fix_axis(walk, eqn, axis)
  for to, i in zip(numbers.offset_dims, kept, strict=True):
    if sizes[i] == shape[i]:
      axes[to] = operand.axes[i]
  for axis in values[1].axes:
    walk.fix(axis, f'index of {walk.at(eqn)}')
  return [Value(tuple(axes), None)]
