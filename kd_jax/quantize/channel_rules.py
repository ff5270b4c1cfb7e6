"""How primitives that compute carry rescaled channels, and the table of all.

Owns one rule for each, see `channel_values.Rule`; those that move positions are
in `channel_views`. `channels` walks through a forward with them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kd_jax.quantize import channel_views as views
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


def _keep(walk: Walk, eqn: Any, values: Sequence[Value]) -> Result:
  return values[0]


def _keep_scaled(walk: Walk, eqn: Any, values: Sequence[Value]) -> Result:
  return values[0] if isinstance(values[0], Scaled) else NotImplemented


def _compare(walk: Walk, eqn: Any, values: Sequence[Value]) -> Result:
  """The sign of a value does not depend on positive scales."""
  scaled = [v for v in values if isinstance(v, Scaled)]
  zeros = [v for v in values if isinstance(v, int)]
  return None if len(scaled) == 1 and len(zeros) == 1 else NotImplemented


def _scaled_first(values: Sequence[Value]) -> Sequence[Value]:
  """The two operands of a commutative operation."""
  x, y = values
  return (x, y) if isinstance(x, Scaled) else (y, x)


def _maximum(walk: Walk, eqn: Any, values: Sequence[Value]) -> Result:
  x, y = _scaled_first(values)
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
  shape = shape_of(eqn.outvars[0])
  return value.axis < len(shape) and shape[value.axis] == len(value.index)


def _add(walk: Walk, eqn: Any, values: Sequence[Value]) -> Result:
  x, y = _scaled_first(values)
  if not isinstance(x, Scaled) or not _fills(x, eqn):
    return NotImplemented
  if isinstance(y, int) or x.same(y):
    return x
  if isinstance(y, Leaf) and _is_bias(y, x, eqn, values.index(y)):
    # It is scaled with the channels that it is added to.
    walk.use(y)
    x.source.multiplied[y.name] = x.index
    return x
  return NotImplemented


def _is_bias(leaf: Leaf, to: Scaled, eqn: Any, operand: int) -> bool:
  """Whether a parameter is a vector that has a number for each channel."""
  shape = shape_of(eqn.invars[operand])
  axis = leaf.axis if leaf.axis is not None else len(shape) - 1
  behind = len(shape_of(eqn.outvars[0])) - len(shape)
  return bool(
    axis >= 0
    and max(shape) == shape[axis] == np.prod(shape)
    and axis + behind == to.axis
    and shape[axis] == len(to.index)
    and leaf.stacked == to.source.stacked
    and leaf.name not in to.source.multiplied
  )


def _multiply(walk: Walk, eqn: Any, values: Sequence[Value]) -> Result:
  x, y = _scaled_first(values)
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
  shape = shape_of(atom)
  axis = axis_of(leaf, shape)
  if axis is None or len(shape) != len(shape_of(eqn.outvars[0])):
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
  shape = shape_of(eqn.invars[1])
  width, rank = shape[out], len(shape)
  if isinstance(x, Scaled) and x.axis == numbers.lhs_spec[1]:
    channels = along(x.index, into, rank)
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
  channels = along(np.arange(width), out, rank)
  source = walk.add_source('layer', width, kernel, channels)
  walk.use(kernel)
  return Scaled(source, numbers.out_spec[1], np.arange(width))


def _dot(walk: Walk, eqn: Any, values: Sequence[Value]) -> Result:
  x, kernel = values[0], _kernel(values[1])
  (x_axes, kernel_axes), batch_axes = eqn.params['dimension_numbers']
  if kernel is None or any(batch_axes):
    return NotImplemented
  shape = shape_of(eqn.invars[1])
  rank, x_rank = len(shape), len(shape_of(eqn.invars[0]))
  if isinstance(x, Scaled) and x.axis in x_axes:
    into = kernel_axes[x_axes.index(x.axis)]
    channels = along(x.index, into, rank)
    _read(walk, x, kernel, channels, x.axis - x_rank)
  else:
    walk.stop([x])
  walk.use(kernel)
  free = [i for i in range(rank) if i not in kernel_axes]
  if len(free) != 1:
    return None
  width = shape[free[0]]
  channels = along(np.arange(width), free[0], rank)
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
  | dict.fromkeys(('reduce_sum', 'reduce_max', 'reduce_min'), views.reduce)
  | dict.fromkeys(
    ('reduce_window_max', 'reduce_window_min', 'reduce_window_sum'),
    views.window,
  )
  | {
    'broadcast_in_dim': views.broadcast,
    'conv_general_dilated': _convolution,
    'div': _divide,
    'dot_general': _dot,
    'dynamic_slice': views.dynamic_slice,
    'mul': _multiply,
    'pad': views.pad,
    'reshape': views.reshape,
    'select_n': _select,
    'slice': views.slice_,
    'squeeze': views.squeeze,
    'transpose': views.transpose,
  }
)
