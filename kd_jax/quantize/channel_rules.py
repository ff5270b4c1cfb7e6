"""How primitives carry rescaled channels; the tables of `channels`.

Owns one rule for each primitive: `(walk, eqn, values) -> value`, with the
operands' abstract values, or NotImplemented where scales do not pass. A value
is a `Leaf` (a parameter), `Scaled` (all entries of a channel are multiplied by
its scale), 0 (a zero of any shape) or None (does not depend on the scales).
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import NotImplementedType
from typing import Any, Protocol

import numpy as np


@dataclasses.dataclass
class Source:
  """Channels that may be rescaled; `channels.FreeScale` while it is sought."""

  kind: str
  size: int
  stacked: int
  multiplied: dict[str, np.ndarray]
  divided: dict[str, tuple] = dataclasses.field(default_factory=dict)
  free: bool = True


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A parameter.

  Attributes:
    name: its path.
    stacked: leading axes that scans removed.
    axis: where its only axis is, for a vector that was broadcast; None for a
      parameter as it is stored.
  """

  name: str
  stacked: int = 0
  axis: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Scaled:
  """A value whose channels are multiplied by a source's scales.

  Attributes:
    source: whose.
    axis: along which.
    index: int `[size of the axis]`, the channel at each index.
  """

  source: Source
  axis: int
  index: np.ndarray

  def same(self, other: Any) -> bool:
    """Whether another value is scaled in just the same way."""
    return (
      isinstance(other, Scaled)
      and self.source is other.source
      and self.axis == other.axis
      and np.array_equal(self.index, other.index)
    )


Value = Leaf | Scaled | int | None
Result = Value | NotImplementedType


class Walk(Protocol):
  """What rules tell of the values that they read; `channels` walks."""

  def stop(self, values: Iterable[Value]) -> None:
    """Something reads these values that does not commute with scales."""

  def use(self, leaf: Leaf) -> None:
    """A parameter is read."""

  def add_source(
    self, kind: str, size: int, leaf: Leaf, channels: np.ndarray
  ) -> Source:
    """Channels that may be rescaled begin."""


Rule = Callable[[Walk, Any, Sequence[Value]], Result]


def _shape(atom: Any) -> tuple[int, ...]:
  return atom.aval.shape


def _along(index: np.ndarray, axis: int, rank: int) -> np.ndarray:
  """An index vector as an array that broadcasts along one axis."""
  return np.asarray(index).reshape(
    [-1 if i == axis else 1 for i in range(rank)]
  )


def _moved(value: Leaf | Scaled, axis: int) -> Leaf | Scaled:
  if isinstance(value, Leaf):
    return dataclasses.replace(value, axis=axis)
  return dataclasses.replace(value, axis=axis)


def _keep(walk: Walk, eqn: Any, values: Sequence[Value]) -> Result:
  return values[0]


def _keep_scaled(walk: Walk, eqn: Any, values: Sequence[Value]) -> Result:
  return values[0] if isinstance(values[0], Scaled) else NotImplemented


def _broadcast(walk: Walk, eqn: Any, values: Sequence[Value]) -> Result:
  [value] = values
  if not isinstance(value, Leaf | Scaled):
    return value
  [operand], [out] = eqn.invars, eqn.outvars
  axis = _axis(value, _shape(operand))
  if axis is None:
    return NotImplemented
  moved = eqn.params['broadcast_dimensions'][axis]
  if _shape(operand)[axis] != _shape(out)[moved]:
    return NotImplemented
  return _moved(value, moved)


def _axis(value: Leaf | Scaled, shape: Sequence[int]) -> int | None:
  """The axis of the channels, or None for a parameter that is no vector."""
  if value.axis is None and len(shape) == 1:
    return 0
  return value.axis


def _reshape(walk: Walk, eqn: Any, values: Sequence[Value]) -> Result:
  value, before, after = (
    values[0],
    _shape(eqn.invars[0]),
    _shape(eqn.outvars[0]),
  )
  if not isinstance(value, Leaf | Scaled):
    return value
  axis = _axis(value, before)
  if axis is None or any(v is not None for v in values[1:]):
    return NotImplemented
  index = value.index if isinstance(value, Scaled) else np.arange(before[axis])
  found = reshaped_index(before, after, axis, index)
  if found is None:
    return NotImplemented
  axis, index = found
  if isinstance(value, Scaled):
    return Scaled(value.source, axis, index)
  return _moved(value, axis) if len(index) == max(before) else NotImplemented


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
      array = _along(index, old.index(axis), len(old))
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


def _transpose(eqn: Any, value: Leaf | Scaled) -> Result:
  axis = _axis(value, _shape(eqn.invars[0]))
  if axis is None:
    return NotImplemented
  return _moved(value, eqn.params['permutation'].index(axis))


def _without(removed: str) -> Callable[[Any, Leaf | Scaled], Result]:
  """The rule of an operation that removes the axes `params[removed]`."""

  def rule(eqn, value):
    axes = eqn.params[removed]
    axis = _axis(value, _shape(eqn.invars[0]))
    if axis is None or axis in axes:
      return NotImplemented
    return _moved(value, axis - sum(a < axis for a in axes))

  return rule


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


def _window(eqn: Any, value: Scaled) -> Result:
  p = eqn.params
  same = (
    p['window_dimensions'][value.axis] == 1
    and p['window_strides'][value.axis] == 1
    and tuple(p['padding'][value.axis]) == (0, 0)
    and p['base_dilation'][value.axis] == 1
  )
  return value if same else NotImplemented


def _pad(walk: Walk, eqn: Any, values: Sequence[Value]) -> Result:
  value, filling = values
  edges = eqn.params['padding_config']
  same = isinstance(value, Scaled) and tuple(edges[value.axis]) == (0, 0, 0)
  return value if same and filling == 0 else NotImplemented


def _slice(eqn: Any, value: Scaled) -> Result:
  p = eqn.params
  strides = p['strides'] or (1,) * len(p['start_indices'])
  chosen = slice(
    p['start_indices'][value.axis],
    p['limit_indices'][value.axis],
    strides[value.axis],
  )
  return Scaled(value.source, value.axis, value.index[chosen])


def _dynamic_slice(walk: Walk, eqn: Any, values: Sequence[Value]) -> Result:
  value = values[0]
  if not isinstance(value, Scaled):
    return NotImplemented
  if any(isinstance(v, Leaf | Scaled) for v in values[1:]):
    return NotImplemented
  whole = eqn.params['slice_sizes'][value.axis] == len(value.index)
  return value if whole else NotImplemented


def _compare(walk: Walk, eqn: Any, values: Sequence[Value]) -> Result:
  """The sign of a value does not depend on positive scales."""
  scaled = [v for v in values if isinstance(v, Scaled)]
  zeros = [v for v in values if isinstance(v, int)]
  return None if len(scaled) == 1 and len(zeros) == 1 else NotImplemented


def _maximum(walk: Walk, eqn: Any, values: Sequence[Value]) -> Result:
  x, y = values
  if isinstance(y, Scaled):
    x, y = y, x
  if isinstance(x, Scaled) and (isinstance(y, int) or x.same(y)):
    return x if _fills(x, eqn) else NotImplemented
  return NotImplemented


def _select(walk: Walk, eqn: Any, values: Sequence[Value]) -> Result:
  which, *cases = values
  scaled = [v for v in cases if isinstance(v, Scaled)]
  if which is not None or not scaled:
    return NotImplemented
  first = scaled[0]
  passes = all(isinstance(v, int) or first.same(v) for v in cases)
  return first if passes else NotImplemented


def _fills(value: Scaled, eqn: Any) -> bool:
  """Whether the axis of a value is not stretched by the operation."""
  shape = _shape(eqn.outvars[0])
  return value.axis < len(shape) and shape[value.axis] == len(value.index)


def _add(walk: Walk, eqn: Any, values: Sequence[Value]) -> Result:
  x, y = values
  if isinstance(y, Scaled) and not isinstance(x, Scaled):
    x, y = y, x
  if not isinstance(x, Scaled) or not _fills(x, eqn):
    return NotImplemented
  if isinstance(y, int) or x.same(y):
    return x
  if isinstance(y, Leaf):
    # A bias: it is scaled with the channels that it is added to.
    source, leaf = x.source, eqn.invars[values.index(y)]
    shape = _shape(leaf)
    axis = y.axis if y.axis is not None else len(shape) - 1
    vector = axis >= 0 and max(shape) == shape[axis] == np.prod(shape)
    behind = len(_shape(eqn.outvars[0])) - len(shape)
    if (
      vector
      and axis + behind == x.axis
      and shape[axis] == len(x.index)
      and y.stacked == source.stacked
      and y.name not in source.multiplied
    ):
      walk.use(y)
      source.multiplied[y.name] = x.index
      return x
  return NotImplemented


def _multiply(walk: Walk, eqn: Any, values: Sequence[Value]) -> Result:
  x, y = values
  if isinstance(y, Scaled) and not isinstance(x, Scaled):
    x, y = y, x
  if isinstance(x, Scaled) and isinstance(y, Scaled):
    # A norm after a layer: its own scale is the later place to rescale.
    kinds = {v.source.kind: v for v in (x, y)}
    if set(kinds) != {'layer', 'norm'}:
      return NotImplemented
    walk.stop([kinds['layer']])
    x, y = kinds['norm'], None
  if isinstance(x, Scaled):
    if not _fills(x, eqn):
      return NotImplemented
    if isinstance(y, Leaf):
      walk.use(y)
    return 0 if isinstance(y, int) else x
  if isinstance(x, Leaf):
    x, y = y, x
  if x is None and isinstance(y, Leaf):
    return _gain(walk, eqn, y, eqn.invars[values.index(y)])
  return NotImplemented


def _gain(walk: Walk, eqn: Any, leaf: Leaf, atom: Any) -> Result:
  """Multiplied by a vector of parameters: the scale of a norm."""
  shape = _shape(atom)
  axis = _axis(leaf, shape)
  if axis is None or len(shape) != len(_shape(eqn.outvars[0])):
    return NotImplemented
  index = np.arange(shape[axis])
  source = walk.add_source('norm', len(index), leaf, index)
  walk.use(leaf)
  return Scaled(source, axis, index)


def _divide(walk: Walk, eqn: Any, values: Sequence[Value]) -> Result:
  x, y = values
  if isinstance(x, Scaled) and y is None and _fills(x, eqn):
    return x
  return NotImplemented


def _convolution(walk: Walk, eqn: Any, values: Sequence[Value]) -> Result:
  x, kernel = values[0], _kernel(values[1])
  p = eqn.params
  numbers, groups = p['dimension_numbers'], p['feature_group_count']
  if kernel is None or p['batch_group_count'] != 1:
    return NotImplemented
  out, into = numbers.rhs_spec[:2]
  shape = _shape(eqn.invars[1])
  width, rank = shape[out], len(shape)
  if isinstance(x, Scaled) and x.axis == numbers.lhs_spec[1]:
    channels = _along(x.index, into, rank)
    if groups > 1:
      by_group = x.index.reshape(groups, shape[into])
      by_group = np.repeat(by_group, width // groups, axis=0)
      order = by_group.T if into < out else by_group
      channels = order.reshape(
        [n if i in (into, out) else 1 for i, n in enumerate(shape)]
      )
    _read(walk, x, kernel, channels, x.axis - rank)
  else:
    walk.stop([x])
  channels = _along(np.arange(width), out, rank)
  source = walk.add_source('layer', width, kernel, channels)
  walk.use(kernel)
  return Scaled(source, numbers.out_spec[1], np.arange(width))


def _dot(walk: Walk, eqn: Any, values: Sequence[Value]) -> Result:
  x, kernel = values[0], _kernel(values[1])
  (x_axes, kernel_axes), batch_axes = eqn.params['dimension_numbers']
  if kernel is None or any(batch_axes):
    return NotImplemented
  shape = _shape(eqn.invars[1])
  rank, x_rank = len(shape), len(_shape(eqn.invars[0]))
  if isinstance(x, Scaled) and x.axis in x_axes:
    into = kernel_axes[x_axes.index(x.axis)]
    channels = _along(x.index, into, rank)
    _read(walk, x, kernel, channels, x.axis - x_rank)
  else:
    walk.stop([x])
  walk.use(kernel)
  free = [i for i in range(rank) if i not in kernel_axes]
  if len(free) != 1:
    return None
  width = shape[free[0]]
  channels = _along(np.arange(width), free[0], rank)
  source = walk.add_source('layer', width, kernel, channels)
  return Scaled(source, x_rank - len(x_axes), np.arange(width))


def _kernel(value: Value) -> Leaf | None:
  """A parameter as it is stored."""
  return value if isinstance(value, Leaf) and value.axis is None else None


def _read(
  walk: Walk, x: Scaled, kernel: Leaf, channels: np.ndarray, axis: int
) -> None:
  if kernel.stacked != x.source.stacked:
    walk.stop([x])
  else:
    x.source.divided[kernel.name] = (channels, x.index, axis)


RULES: dict[str, Rule] = (
  dict.fromkeys(
    (
      'convert_element_type',
      'copy',
      'mesh_cast',
      'reduce_precision',
      'reshard',
      'sharding_constraint',
    ),
    _keep,
  )
  | dict.fromkeys(('abs', 'neg', 'stop_gradient', 'name'), _keep_scaled)
  | dict.fromkeys(('gt', 'ge', 'lt', 'le'), _compare)
  | dict.fromkeys(('max', 'min'), _maximum)
  | dict.fromkeys(('add', 'sub', 'add_any'), _add)
  | dict.fromkeys(
    ('reduce_sum', 'reduce_max', 'reduce_min'),
    _scaled_only(_without('axes')),
  )
  | dict.fromkeys(
    ('reduce_window_max', 'reduce_window_min', 'reduce_window_sum'),
    _scaled_only(_window),
  )
  | {
    'broadcast_in_dim': _broadcast,
    'conv_general_dilated': _convolution,
    'div': _divide,
    'dot_general': _dot,
    'dynamic_slice': _dynamic_slice,
    'mul': _multiply,
    'pad': _pad,
    'reshape': _reshape,
    'select_n': _select,
    'slice': _scaled_only(_slice),
    'squeeze': _zero_or(_without('dimensions')),
    'transpose': _zero_or(_transpose),
  }
)
