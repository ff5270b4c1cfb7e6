"""Primitives that move, spread or pick rescaled channels.

Owns one rule for each, see `channel_values.Rule`. Primitives that compute are
in `channel_rules`, where the table of all rules is.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kd_jax.quantize.channel_values import (
  Leaf,
  Result,
  Rule,
  Scaled,
  Value,
  Walk,
  along,
  axis_of,
  shape_of,
)


def _zero_or(rule: Callable[[Any, Leaf | Scaled], Result]) -> Rule:
  """A unary rule that maps zeros to zeros."""

  def whole(walk, eqn, values):
    [value] = values
    return rule(eqn, value) if isinstance(value, Leaf | Scaled) else value

  return whole


def _scaled_only(rule: Callable[[Any, Scaled], Result]) -> Rule:
  """A rule of its first operand, where that is scaled."""

  def whole(walk, eqn, values):
    value = values[0]
    return rule(eqn, value) if isinstance(value, Scaled) else NotImplemented

  return whole


@_zero_or
def broadcast(eqn: Any, value: Leaf | Scaled) -> Result:
  """New axes; that of the channels keeps its size."""
  [operand], [out] = eqn.invars, eqn.outvars
  axis = axis_of(value, shape_of(operand))
  if axis is None:
    return NotImplemented
  moved = eqn.params['broadcast_dimensions'][axis]
  if shape_of(operand)[axis] != shape_of(out)[moved]:
    return NotImplemented
  return value.at(moved)


def reshape(walk: Walk, eqn: Any, values: Sequence[Value]) -> Result:
  """Axes are joined and split; the channels vary along one of them."""
  value = values[0]
  before, after = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
  if not isinstance(value, Leaf | Scaled):
    return value
  axis = axis_of(value, before)
  if axis is None or any(v is not None for v in values[1:]):
    return NotImplemented
  index = value.index if isinstance(value, Scaled) else np.arange(before[axis])
  found = reshaped_index(before, after, axis, index)
  if found is None:
    return NotImplemented
  axis, index = found
  if isinstance(value, Scaled):
    return Scaled(value.source, axis, index)
  return value.at(axis) if len(index) == max(before) else NotImplemented


def reshaped_index(
  before: Sequence[int], after: Sequence[int], axis: int, index: np.ndarray
) -> tuple[int, np.ndarray] | None:
  """Where an axis went in a reshape.

  Args:
    before: the shape.
    after: the new shape.
    axis: an axis of `before`.
    index: int `[before[axis]]`.

  Returns:
    `(axis, index)` of the new shape, or None if the entries of `index` vary
    along several of its axes.

  Example:
    >>> axis, index = reshaped_index((5, 2, 3), (5, 6), 2, np.arange(3))
    >>> axis, index.tolist()
    (1, [0, 1, 2, 0, 1, 2])
  """
  for old, new in _blocks(before, after):
    if axis in old:
      array = along(index, old.index(axis), len(old))
      array = np.broadcast_to(array, [before[i] for i in old])
      array = array.reshape([after[i] for i in new])
      break
  varying = [
    i for i in range(len(new)) if (array != array.take([0], axis=i)).any()
  ]
  if len(varying) > 1:
    return None
  if not varying:
    # One channel: it is everywhere; any axis of the block will do.
    varying = [int(np.argmax(array.shape))]
  [where] = varying
  array = np.moveaxis(array, where, -1)
  return new[where], array.reshape(-1, array.shape[-1])[0]


def _blocks(
  before: Sequence[int], after: Sequence[int]
) -> Iterator[tuple[list[int], list[int]]]:
  """Splits two shapes into consecutive blocks of equal size."""
  i = j = 0
  while i < len(before) or j < len(after):
    old: list[int] = []
    new: list[int] = []
    a = b = 1
    while not (old and new and a == b):
      if i < len(before) and (a <= b or j == len(after)):
        a *= before[i]
        old.append(i)
        i += 1
      elif j < len(after):
        b *= after[j]
        new.append(j)
        j += 1
      else:
        break
    # Axes of size 1 at the end belong to the last block.
    while i < len(before) and all(n == 1 for n in before[i:]):
      old.append(i)
      i += 1
    while j < len(after) and all(n == 1 for n in after[j:]):
      new.append(j)
      j += 1
    yield old, new


@_zero_or
def transpose(eqn: Any, value: Leaf | Scaled) -> Result:
  """Axes in another order."""
  axis = axis_of(value, shape_of(eqn.invars[0]))
  if axis is None:
    return NotImplemented
  return value.at(eqn.params['permutation'].index(axis))


def _without(removed: str) -> Callable[[Any, Leaf | Scaled], Result]:
  """The rule of an operation that removes the axes `params[removed]`."""

  def rule(eqn, value):
    axes = eqn.params[removed]
    axis = axis_of(value, shape_of(eqn.invars[0]))
    if axis is None or axis in axes:
      return NotImplemented
    return value.at(axis - sum(a < axis for a in axes))

  return rule


squeeze = _zero_or(_without('dimensions'))
reduce = _scaled_only(_without('axes'))


@_scaled_only
def window(eqn: Any, value: Scaled) -> Result:
  """Pooling, but not over channels."""
  p = eqn.params
  same = (
    p['window_dimensions'][value.axis] == 1
    and p['window_strides'][value.axis] == 1
    and tuple(p['padding'][value.axis]) == (0, 0)
    and p['base_dilation'][value.axis] == 1
  )
  return value if same else NotImplemented


def pad(walk: Walk, eqn: Any, values: Sequence[Value]) -> Result:
  """Zeros at the edges, but not of the channels."""
  value, filling = values
  edges = eqn.params['padding_config']
  same = isinstance(value, Scaled) and tuple(edges[value.axis]) == (0, 0, 0)
  return value if same and filling == 0 else NotImplemented


@_scaled_only
def slice_(eqn: Any, value: Scaled) -> Result:
  """Some of the channels, or of the other axes."""
  p = eqn.params
  strides = p['strides'] or (1,) * len(p['start_indices'])
  chosen = slice(
    p['start_indices'][value.axis],
    p['limit_indices'][value.axis],
    strides[value.axis],
  )
  return Scaled(value.source, value.axis, value.index[chosen])


def dynamic_slice(walk: Walk, eqn: Any, values: Sequence[Value]) -> Result:
  """Some of the other axes."""
  value = values[0]
  if not isinstance(value, Scaled):
    return NotImplemented
  if any(isinstance(v, Leaf | Scaled) for v in values[1:]):
    return NotImplemented
  whole = eqn.params['slice_sizes'][value.axis] == len(value.index)
  return value if whole else NotImplemented
