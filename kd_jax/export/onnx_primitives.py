"""What each JAX primitive becomes in ONNX.

`PRIMITIVES` maps a primitive's name to `handler(graph, eqn, *inputs) ->
value`, or a list of values where the primitive has several results;
`FUNCTIONS` does so for jitted functions that are known by name. A handler may
assume that an input is not a constant.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from onnx import helper

from kd_jax.export import onnx_layers
from kd_jax.export.onnx_graph import (
  Codes,
  Const,
  Deferred,
  Graph,
  Tensor,
  Value,
  identity,
  is_one,
  scalar,
  unsupported,
)

# --- Elementwise ------------------------------------------------------------


def _operands(
  graph: Graph, values: Sequence[Value]
) -> tuple[list[str], tuple[Any, ...], tuple[int, ...]]:
  """Node inputs in one layout, and the shape and layout of the result."""
  operands = [
    v if isinstance(v, (Const, Codes)) else graph.real(v) for v in values
  ]
  # The largest operand keeps its layout.
  known = [t for t in operands if isinstance(t, Tensor)]
  first = max(
    known, key=lambda t: (len(t.shape), sum(not is_one(s) for s in t.shape))
  )
  rank = len(first.shape)
  shape = list(first.shape)
  names = []
  for operand in operands:
    sizes = operand.shape
    if isinstance(operand, Tensor):
      aligned = graph.align(operand, first.perm) if sizes else operand
      names.append(aligned.name)
    else:
      array = operand.array
      if array.size == 1:
        array = array.reshape(())
      elif array.ndim == rank:
        array = array.transpose(first.perm)
      names.append(graph.constant(array))
    if sizes:
      shape = [b if is_one(a) else a for a, b in zip(shape, sizes, strict=True)]
  return names, tuple(shape), first.perm


def _pointwise(*operators: str) -> Callable[..., Tensor]:
  """A primitive that is one node, or several in a row."""

  def handler(graph, eqn, *values):
    names, shape, perm = _operands(graph, values)
    for operator in operators:
      names = [graph.node(operator, *names)]
    return Tensor(names[0], shape, perm)

  return handler


def _bias(linear: Deferred, value: Value) -> Const | Codes | None:
  """A constant `[O]` that a layer can add to its channels, or None."""
  if linear.kind != 'linear':
    return None
  if not isinstance(value, (Const, Codes)):
    return None
  channels, axes = linear.detail
  if value.shape and len(value.shape) != len(linear.shape):
    return None
  sizes = [s for i, s in enumerate(value.shape) if i not in axes]
  if any(size != 1 for size in sizes):
    return None
  own = [linear.shape[axis] for axis in axes]
  if isinstance(value, Const):
    last = value.array.reshape([value.shape[a] for a in axes if value.shape])
    return Const(np.broadcast_to(last, own).reshape(channels))
  if value.code.size != channels:
    return None
  scale = value.scale.reshape([value.scale.shape[a] for a in axes])
  scale = scale if scale.size == 1 else np.broadcast_to(scale, own)
  return Codes(value.code.reshape(-1), scale.reshape(-1))


def _add(graph: Graph, eqn: Any, x: Value, y: Value) -> Value:
  for layer, other in ((x, y), (y, x)):
    if isinstance(layer, Deferred):
      bias = _bias(layer, other)
      if bias is not None:
        return layer.emit(bias)
  return _pointwise('Add')(graph, eqn, x, y)


def _sub(graph: Graph, eqn: Any, x: Value, y: Value) -> Value:
  if isinstance(x, Deferred):
    bias = _bias(x, y)
    if bias is not None:
      return x.emit(Const(-bias.array))
  return _pointwise('Sub')(graph, eqn, x, y)


def _mul(graph: Graph, eqn: Any, x: Value, y: Value) -> Value:
  for total, other in ((x, y), (y, x)):
    factor = scalar(other)
    if not isinstance(total, Deferred) or total.kind != 'total':
      continue
    if factor is not None and factor == np.float32(1 / total.detail):
      return total.emit(True)
  return _pointwise('Mul')(graph, eqn, x, y)


def _div(graph: Graph, eqn: Any, x: Value, y: Value) -> Value:
  if isinstance(x, Deferred) and x.kind == 'total' and scalar(y) == x.detail:
    return x.emit(True)
  return _pointwise('Div')(graph, eqn, x, y)


def _max(graph: Graph, eqn: Any, x: Value, y: Value) -> Value:
  for value, other in ((x, y), (y, x)):
    low = scalar(other)
    if low is not None and np.isneginf(low):
      return value
    if low is not None and low == 0 and isinstance(low, np.floating):
      return _pointwise('Relu')(graph, eqn, value)
    if low is not None:
      return _clip(graph, value, low, None)
  return _pointwise('Max')(graph, eqn, x, y)


def _min(graph: Graph, eqn: Any, x: Value, y: Value) -> Value:
  for value, other in ((x, y), (y, x)):
    high = scalar(other)
    if high is not None:
      return _clip(graph, value, None, high)
  return _pointwise('Min')(graph, eqn, x, y)


def _clip(graph: Graph, value: Value, low: Any, high: Any) -> Value:
  """A value within two numbers, each of which may be None."""
  (name,), shape, perm = _operands(graph, [value])
  limits = ['' if v is None else graph.constant(v) for v in (low, high)]
  return Tensor(graph.node('Clip', name, *limits), shape, perm)


def _clamp(graph: Graph, eqn: Any, low: Value, x: Value, high: Value) -> Value:
  limits = [scalar(low), scalar(high)]
  if None in limits or isinstance(x, (Const, Codes)):
    raise unsupported(eqn, 'limits that are computed')
  return _clip(graph, x, *limits)


def _select(graph: Graph, eqn: Any, which: Value, *cases: Value) -> Value:
  if eqn.invars[0].aval.dtype != np.bool_ or len(cases) != 2:
    raise unsupported(eqn, 'an integer selector')
  return _pointwise('Where')(graph, eqn, which, cases[1], cases[0])


def _integer_pow(graph: Graph, eqn: Any, x: Value) -> Value:
  exponent = Const(np.asarray(eqn.params['y'], eqn.invars[0].aval.dtype))
  return _pointwise('Pow')(graph, eqn, x, exponent)


def _square(graph: Graph, eqn: Any, x: Value) -> Value:
  return _pointwise('Mul')(graph, eqn, x, x)


def _erfc(graph: Graph, eqn: Any, x: Value) -> Value:
  (name,), shape, perm = _operands(graph, [x])
  one = graph.constant(np.ones((), eqn.invars[0].aval.dtype))
  return Tensor(graph.node('Sub', one, graph.node('Erf', name)), shape, perm)


def _round(graph: Graph, eqn: Any, x: Value) -> Value:
  if eqn.params['rounding_method'] != jax.lax.RoundingMethod.TO_NEAREST_EVEN:
    raise unsupported(eqn, 'rounding away from zero')
  return _pointwise('Round')(graph, eqn, x)


def _convert(graph: Graph, eqn: Any, x: Value) -> Value:
  new = np.dtype(eqn.params['new_dtype'])
  if new == eqn.invars[0].aval.dtype:
    return x
  (name,), shape, perm = _operands(graph, [x])
  to = helper.np_dtype_to_tensor_dtype(new)
  return Tensor(graph.node('Cast', name, to=to), shape, perm)


def _same(graph: Graph, eqn: Any, x: Value) -> Value:
  return x


# --- Views ------------------------------------------------------------------


def _reshape(graph: Graph, eqn: Any, x: Value) -> Value:
  if eqn.params.get('dimensions') is not None:
    raise unsupported(eqn, 'a dimension order')
  old, new = eqn.invars[0].aval.shape, eqn.params['new_sizes']
  if isinstance(x, Codes):
    scale = np.broadcast_to(x.scale, x.shape).reshape(new)
    for axis in range(scale.ndim):
      first = scale.take([0], axis)
      scale = first if (first == scale).all() else scale
    return Codes(x.code.reshape(new), scale)
  if isinstance(x, Const):
    if all(isinstance(size, int) for size in (*old, *new)):
      return Const(np.broadcast_to(x.array, old).reshape(new))
    if x.array.size == 1:
      return Const(x.array.reshape((1,) * len(new)))
  return graph.reshape(graph.full(graph.tensor(x), old), new)


def _squeeze(graph: Graph, eqn: Any, value: Value) -> Value:
  axes = tuple(eqn.params['dimensions'])
  if isinstance(value, (Const, Codes)):
    return value.view(lambda a: a.squeeze(axes))
  x = graph.tensor(value)
  places = sorted(x.perm.index(a) for a in axes)
  name = graph.node('Squeeze', x.name, graph.constant(np.array(places)))
  return Tensor(name, *x.without(axes), x.grid)


def _transpose(graph: Graph, eqn: Any, value: Value) -> Value:
  order = tuple(eqn.params['permutation'])
  if isinstance(value, (Const, Codes)):
    return value.view(lambda a: a.transpose(order))
  x = graph.tensor(value)
  shape = tuple(x.shape[p] for p in order)
  return Tensor(x.name, shape, tuple(order.index(p) for p in x.perm), x.grid)


def _broadcast(graph: Graph, eqn: Any, x: Value) -> Value:
  axes = tuple(eqn.params['broadcast_dimensions'])
  rank = len(eqn.params['shape'])
  new = [i for i in range(rank) if i not in axes]
  if isinstance(x, (Const, Codes)):
    return x.view(lambda a: np.expand_dims(a, tuple(new)))
  x = graph.tensor(x)
  if not new:
    return x
  shape = [1] * rank
  for axis, size in zip(axes, x.shape, strict=True):
    shape[axis] = size
  if x.perm == identity(len(x.perm)):
    places, perm = new, identity(rank)
  else:
    places = list(range(len(axes), rank))
    perm = (*(axes[p] for p in x.perm), *new)
  name = graph.node('Unsqueeze', x.name, graph.constant(np.array(places)))
  return Tensor(name, tuple(shape), perm, x.grid)


def _concatenate(graph: Graph, eqn: Any, *values: Value) -> Value:
  axis = eqn.params['dimension']
  parts = [
    graph.full(graph.real(v), atom.aval.shape)
    for v, atom in zip(values, eqn.invars, strict=True)
  ]
  # Constants come in the traced order; a computed part decides the layout.
  perm = next(
    part.perm
    for part, v in zip(parts, values, strict=True)
    if not isinstance(v, (Const, Codes))
  )
  names = [graph.align(part, perm).name for part in parts]
  name = graph.node('Concat', *names, axis=perm.index(axis))
  return Tensor(name, tuple(eqn.outvars[0].aval.shape), perm)


def _split(graph: Graph, eqn: Any, x: Value) -> list[Value]:
  """A slice for each part, of which those that nobody reads are dropped."""
  sizes, axis = eqn.params['sizes'], eqn.params['axis']
  if not all(isinstance(size, (int, np.integer)) for size in sizes):
    raise unsupported(eqn, 'sizes that depend on the batch size')
  x = graph.full(graph.tensor(x), eqn.invars[0].aval.shape)
  parts: list[Value] = []
  start = 0
  for size in map(int, sizes):
    where = (start, start + size, x.perm.index(axis))
    limits = (graph.constant(np.array([v])) for v in where)
    name = graph.node('Slice', x.name, *limits)
    shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
    parts.append(dataclasses.replace(x, name=name, shape=shape))
    start += size
  return parts


def _gather(graph: Graph, eqn: Any, x: Value, index: Value) -> Value:
  """Entries along one axis; an index out of range is the runtime's error."""
  numbers = eqn.params['dimension_numbers']
  shape, places = (tuple(v.aval.shape) for v in eqn.invars)
  axes, rank = tuple(numbers.start_index_map), len(places) - 1
  sizes = tuple(1 if i in axes else size for i, size in enumerate(shape))
  kept = range(len(shape) - 1)
  if (
    len(axes) != 1
    or places[-1] != 1
    or tuple(numbers.collapsed_slice_dims) != axes
    or tuple(eqn.params['slice_sizes']) != sizes
    or tuple(numbers.offset_dims)
    != tuple(i if i < axes[0] else i + rank for i in kept)
  ):
    raise unsupported(eqn, f'dimension_numbers={numbers}')
  names = []
  for value, full in ((x, shape), (index, places)):
    tensor = graph.full(graph.tensor(value), full)
    names.append(graph.align(tensor, identity(len(full))).name)
  last = graph.constant(np.array([rank]))
  names[1] = graph.node('Squeeze', names[1], last)
  name = graph.node('Gather', *names, axis=axes[0])
  out = tuple(eqn.outvars[0].aval.shape)
  return Tensor(name, out, identity(len(out)))


# --- Quantization -----------------------------------------------------------


def _quantize(
  graph: Graph, eqn: Any, x: Value, scale: Value, zero_point: Value
) -> Value | None:
  grid = scalar(scale), scalar(zero_point)
  if None in grid or isinstance(x, (Const, Codes)):
    return None
  # x86 multiplies uint8 by int8; the same codes, 128 higher.
  return graph.quantize(graph.real(x), float(grid[0]), int(grid[1]) + 128)


def _dequantize(
  graph: Graph, eqn: Any, code: Value, scale: Value, zero_point: Value
) -> Value | None:
  if isinstance(code, Const):
    if not isinstance(scale, Const) or scalar(zero_point) != 0:
      return None
    missing = code.array.ndim - scale.array.ndim
    steps = scale.array.reshape((1,) * missing + scale.shape)
    return Codes(code.array, steps)
  grid = scalar(scale), scalar(zero_point)
  code = graph.tensor(code)
  if None in grid or code.grid is None:
    return None
  return graph.dequantize(code, float(grid[0]), int(grid[1]) + 128)


# --- Tables -----------------------------------------------------------------

_POINTWISE = {
  'abs': ('Abs',),
  'and': ('And',),
  'ceil': ('Ceil',),
  'cos': ('Cos',),
  'eq': ('Equal',),
  'erf': ('Erf',),
  'exp': ('Exp',),
  'floor': ('Floor',),
  'ge': ('GreaterOrEqual',),
  'gt': ('Greater',),
  'le': ('LessOrEqual',),
  'log': ('Log',),
  'logistic': ('Sigmoid',),
  'lt': ('Less',),
  'ne': ('Equal', 'Not'),
  'neg': ('Neg',),
  'not': ('Not',),
  'or': ('Or',),
  'pow': ('Pow',),
  'rsqrt': ('Sqrt', 'Reciprocal'),
  'sign': ('Sign',),
  'sin': ('Sin',),
  'sqrt': ('Sqrt',),
  'tanh': ('Tanh',),
}

_ELEMENTWISE: dict[str, Callable[..., Value]] = {
  **{name: _pointwise(*nodes) for name, nodes in _POINTWISE.items()},
  'add': _add,
  'clamp': _clamp,
  'convert_element_type': _convert,
  'div': _div,
  'erfc': _erfc,
  'integer_pow': _integer_pow,
  'max': _max,
  'min': _min,
  'mul': _mul,
  'round': _round,
  'select_n': _select,
  'square': _square,
  'sub': _sub,
}

_VIEWS: dict[str, Callable[..., Value]] = {
  'broadcast_in_dim': _broadcast,
  'copy': _same,
  'name': _same,
  'reshape': _reshape,
  'squeeze': _squeeze,
  'stop_gradient': _same,
  'transpose': _transpose,
}

ELEMENTWISE = frozenset(_ELEMENTWISE)
VIEWS = frozenset(_VIEWS)
PRIMITIVES: dict[str, Callable[..., Value | list[Value]]] = {
  **_ELEMENTWISE,
  **_VIEWS,
  'concatenate': _concatenate,
  'conv_general_dilated': onnx_layers.conv,
  'dot_general': onnx_layers.dot,
  'gather': _gather,
  'pad': onnx_layers.pad,
  'reduce_max': onnx_layers.reduce('ReduceMax'),
  'reduce_min': onnx_layers.reduce('ReduceMin'),
  'reduce_sum': onnx_layers.reduce_sum,
  'reduce_window_max': onnx_layers.max_pool,
  'reduce_window_sum': onnx_layers.sum_pool,
  'split': _split,
}

FUNCTIONS: dict[str, Callable[..., Value | None]] = {
  'dequantize_linear': _dequantize,
  'quantize_linear': _quantize,
}
