"""What each JAX primitive becomes in ONNX: the table of all of them.

`PRIMITIVES` maps a primitive's name to `handler(graph, eqn, *inputs) ->
value`, or a list of values where the primitive has several results;
`FUNCTIONS` does so for jitted functions that are known by name, whose handlers
are here. A handler of a primitive may assume that an input is not a constant.
"""

from collections.abc import Callable
from typing import Any

from kd_jax.export import onnx_layers, onnx_views
from kd_jax.export.onnx_elementwise import ELEMENTWISE
from kd_jax.export.onnx_graph import Graph
from kd_jax.export.onnx_values import Codes, Const, Value, scalar
from kd_jax.export.onnx_views import VIEWS


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


PRIMITIVES: dict[str, Callable[..., Value | list[Value]]] = {
  **ELEMENTWISE,
  **VIEWS,
  'concatenate': onnx_views.concatenate,
  'conv_general_dilated': onnx_layers.conv,
  'dot_general': onnx_layers.dot,
  'gather': onnx_views.gather,
  'pad': onnx_layers.pad,
  'reduce_max': onnx_layers.reduce('ReduceMax'),
  'reduce_min': onnx_layers.reduce('ReduceMin'),
  'reduce_sum': onnx_layers.reduce_sum,
  'reduce_window_max': onnx_layers.max_pool,
  'reduce_window_sum': onnx_layers.sum_pool,
  'slice': onnx_views.cut,
  'split': onnx_views.split,
}

FUNCTIONS: dict[str, Callable[..., Value | None]] = {
  'dequantize_linear': _dequantize,
  'quantize_linear': _quantize,
}
