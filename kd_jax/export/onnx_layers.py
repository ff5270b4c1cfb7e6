"""What reductions, pooling, padding and layers become in ONNX.

Owns the primitives that compute an entry from many, and pads for them. Every
public function is a handler of `onnx_primitives.PRIMITIVES`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kd_jax.export.onnx_graph import Graph
from kd_jax.export.onnx_values import (
  Codes,
  Const,
  Deferred,
  Tensor,
  Value,
  identity,
  scalar,
  unsupported,
)


def reduce(operator: str) -> Callable[..., Tensor]:
  """A reduction over axes that is one node."""

  def handler(graph, eqn, x):
    axes = tuple(eqn.params['axes'])
    x = graph.full(graph.real(x), eqn.invars[0].aval.shape)
    return _reduced(graph, operator, x, axes)

  return handler


def _reduced(
  graph: Graph, operator: str, x: Tensor, axes: tuple[int, ...]
) -> Tensor:
  if not axes:
    return x
  places = sorted(x.perm.index(a) for a in axes)
  constant = graph.constant(np.array(places, np.int64))
  name = graph.node(operator, x.name, constant, keepdims=0)
  return Tensor(name, *x.without(axes))


def reduce_sum(graph: Graph, eqn: Any, x: Value) -> Tensor | Deferred:
  """A sum, or the mean if a division by the number of summands follows."""
  axes = tuple(eqn.params['axes'])
  sizes = [eqn.invars[0].aval.shape[a] for a in axes]

  def emit(mean=False):
    full = graph.full(graph.real(x), eqn.invars[0].aval.shape)
    if not mean:
      return _reduced(graph, 'ReduceSum', full, axes)
    if len(full.perm) < 3 or set(full.perm[2:]) != set(axes):
      return _reduced(graph, 'ReduceMean', full, axes)
    name = graph.node('GlobalAveragePool', full.name)
    places = graph.constant(np.arange(2, len(full.perm)))
    name = graph.node('Squeeze', name, places)
    return Tensor(name, *full.without(axes))

  if not all(isinstance(size, int) for size in sizes):
    return emit()
  shape = tuple(eqn.outvars[0].aval.shape)
  return Deferred('total', emit, shape, math.prod(sizes))


def _window(graph: Graph, eqn: Any, x: Value) -> tuple[Tensor, dict[str, Any]]:
  """Input and attributes of a pooling over windows of the spatial axes."""
  p = eqn.params
  x = graph.full(graph.real(x), eqn.invars[0].aval.shape)
  window = p['window_dimensions']

  def pools(axis):
    edges = (window[axis], p['window_strides'][axis], *p['padding'][axis])
    return edges != (1, 1, 0, 0)

  perm = x.perm
  if any(pools(axis) for axis in perm[:2]):
    # The first and the last axis that are not pooled: batch and channels.
    still = [axis for axis in range(len(perm)) if not pools(axis)]
    first = (*still[:1], *still[1:][-1:])
    perm = (*first, *(i for i in range(len(perm)) if i not in first))
  if len(perm) < 3 or any(pools(axis) for axis in perm[:2]):
    raise unsupported(eqn, f'window_dimensions={window}')
  if any(d != 1 for d in p['base_dilation']):
    raise unsupported(eqn, f'base_dilation={p["base_dilation"]}')
  spatial = perm[2:]
  return graph.align(x, perm), {
    'kernel_shape': [window[i] for i in spatial],
    'strides': [p['window_strides'][i] for i in spatial],
    'dilations': [p['window_dilation'][i] for i in spatial],
    'pads': [p['padding'][i][side] for side in (0, 1) for i in spatial],
  }


def max_pool(graph: Graph, eqn: Any, x: Value) -> Tensor:
  """The maximum over windows."""
  x, attributes = _window(graph, eqn, x)
  name = graph.node('MaxPool', x.name, **attributes)
  return Tensor(name, tuple(eqn.outvars[0].aval.shape), x.perm)


def sum_pool(graph: Graph, eqn: Any, x: Value) -> Deferred:
  """The sum over windows, or the mean as in `reduce_sum`."""
  shape = tuple(eqn.outvars[0].aval.shape)
  count = math.prod(eqn.params['window_dimensions'])
  dtype = eqn.outvars[0].aval.dtype

  def emit(mean=False):
    full, attributes = _window(graph, eqn, x)
    attributes['count_include_pad'] = 1
    name = graph.node('AveragePool', full.name, **attributes)
    if not mean:
      name = graph.node('Mul', name, graph.constant(np.asarray(count, dtype)))
    return Tensor(name, shape, full.perm)

  return Deferred('total', emit, shape, count)


def pad(graph: Graph, eqn: Any, x: Value, value: Value) -> Tensor | Deferred:
  """Padding; with zeros it may become that of a convolution."""
  edges = eqn.params['padding_config']
  shape = tuple(eqn.outvars[0].aval.shape)
  if any(low < 0 or high < 0 or inner for low, high, inner in edges):
    raise unsupported(eqn, f'padding_config={edges}')

  def emit():
    padded = graph.full(graph.real(x), eqn.invars[0].aval.shape)
    ends = [edges[p][side] for side in (0, 1) for p in padded.perm]
    fill = graph.real(value).name
    pads = graph.constant(np.array(ends, np.int64))
    name = graph.node('Pad', padded.name, pads, fill)
    return Tensor(name, shape, padded.perm)

  if scalar(value) != 0:
    return emit()
  detail = (x, eqn.invars[0].aval.shape, [edge[:2] for edge in edges])
  return Deferred('padded', emit, shape, detail)


def conv(graph: Graph, eqn: Any, x: Value, w: Value) -> Deferred:
  """A convolution of any rank and grouping, with a bias that follows it."""
  p = eqn.params
  numbers = p['dimension_numbers']
  full = eqn.invars[0].aval.shape
  if set(p['lhs_dilation']) != {1} or p['batch_group_count'] != 1:
    raise unsupported(eqn, 'lhs_dilation or batch_group_count')
  padding = np.array(p['padding'])
  if isinstance(x, Deferred) and x.kind == 'padded':
    inner, inner_shape, edges = x.detail
    if all(edges[i] == (0, 0) for i in numbers.lhs_spec[:2]):
      padding = padding + [edges[i] for i in numbers.lhs_spec[2:]]
      x, full = inner, inner_shape
  if (padding < 0).any():
    raise unsupported(eqn, f'negative padding {padding.tolist()}')
  attributes = {
    'strides': list(p['window_strides']),
    'pads': [int(v) for v in padding.T.reshape(-1)],
    'dilations': list(p['rhs_dilation']),
    'group': p['feature_group_count'],
  }
  kernel = eqn.invars[1].aval.shape
  attributes['kernel_shape'] = [kernel[i] for i in numbers.rhs_spec[2:]]
  shape = tuple(eqn.outvars[0].aval.shape)

  def emit(bias=None):
    image = graph.full(graph.real(x), full)
    names = [
      graph.align(image, numbers.lhs_spec).name,
      _matrix(graph, w, kernel, [[i] for i in numbers.rhs_spec]),
    ]
    if bias is not None:
      names.append(graph.name(bias))
    name = graph.node('Conv', *names, **attributes)
    return Tensor(name, shape, tuple(numbers.out_spec))

  detail = (kernel[numbers.rhs_spec[0]], (numbers.out_spec[1],))
  return Deferred('linear', emit, shape, detail)


def dot(graph: Graph, eqn: Any, x: Value, w: Value) -> Tensor | Deferred:
  """A product: Gemm with a bias that follows it, MatMul with batch axes."""
  (sum_x, sum_w), (batch_x, batch_w) = eqn.params['dimension_numbers']
  shapes = [tuple(v.aval.shape) for v in eqn.invars]
  free_x, free_w = (
    [i for i in range(len(shape)) if i not in (*summed, *batch)]
    for shape, summed, batch in zip(
      shapes, (sum_x, sum_w), (batch_x, batch_w), strict=True
    )
  )
  shape = tuple(eqn.outvars[0].aval.shape)
  rows = [[i] for i in batch_x] + [free_x, list(sum_x)]
  columns = [[i] for i in batch_w] + [list(sum_w), free_w]
  sizes = [math.prod(shapes[0][i] for i in axes) for axes in rows[:-1]]
  sizes.append(math.prod(shapes[1][i] for i in free_w))

  def emit(bias=None):
    names = [
      _matrix(graph, x, shapes[0], rows),
      _matrix(graph, w, shapes[1], columns),
    ]
    if bias is not None:
      names.append(graph.name(bias))
    name = graph.node('MatMul' if batch_x else 'Gemm', *names)
    product = Tensor(name, tuple(sizes), identity(len(sizes)))
    return graph.reshape(product, shape)

  if batch_x or not free_w or not isinstance(sizes[-1], int):
    return emit()
  last = tuple(range(len(shape) - len(free_w), len(shape)))
  return Deferred('linear', emit, shape, (sizes[-1], last))


def _matrix(
  graph: Graph,
  value: Value,
  shape: Sequence[Any],
  groups: Sequence[Sequence[int]],
) -> str:
  """An operand whose axes are groups of axes of the traced value, in order.

  Constants are arranged here, at export: a Transpose behind a dequantized
  weight would keep a runtime from its integer kernel.
  """
  order = [i for group in groups for i in group]
  plain = all(len(group) == 1 for group in groups)
  sizes = [math.prod(shape[i] for i in group) for group in groups]
  if isinstance(value, Codes):
    return graph.name(_grouped(value, order, groups))
  if isinstance(value, Const):
    array = np.broadcast_to(value.array, shape)
    return graph.constant(array.transpose(order).reshape(sizes))
  x = graph.full(graph.real(value), shape)
  if plain:
    return graph.align(x, order).name
  moved = tuple(order.index(p) for p in x.perm)
  x = Tensor(x.name, tuple(shape[i] for i in order), moved)
  return graph.reshape(x, sizes).name


def _grouped(
  codes: Codes, order: Sequence[int], groups: Sequence[Sequence[int]]
) -> Codes:
  """Codes whose axes are transposed and then joined in groups."""
  code, scale = codes.code.transpose(order), codes.scale.transpose(order)
  sizes, steps, start = [], [], 0
  wide = list(scale.shape)
  for group in groups:
    end = start + len(group)
    if any(size > 1 for size in wide[start:end]):
      wide[start:end] = code.shape[start:end]
    sizes.append(math.prod(code.shape[start:end]))
    steps.append(math.prod(wide[start:end]))
    start = end
  scale = np.broadcast_to(scale, wide).reshape(steps)
  return Codes(code.reshape(sizes), scale)
