"""What elementwise primitives become in ONNX.

Owns those whose operands have one shape, or none: arithmetic, comparisons,
limits, casts. `ELEMENTWISE` is their part of `onnx_primitives.PRIMITIVES`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from onnx import helper

from kd_jax.export.onnx_graph import Graph
from kd_jax.export.onnx_values import (
  Codes,
  Const,
  Deferred,
  Tensor,
  Value,
  is_one,
  scalar,
  unsupported,
)


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

ELEMENTWISE: dict[str, Callable[..., Value]] = {
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
