"""What primitives that move entries, and compute none, become in ONNX.

Owns views of all entries, `VIEWS`, and what joins, cuts or picks them. Every
function is a handler of `onnx_primitives.PRIMITIVES`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from kd_jax.export.onnx_graph import Graph
from kd_jax.export.onnx_values import (
  Codes,
  Const,
  Tensor,
  Value,
  identity,
  unsupported,
)


def _same(graph: Graph, eqn: Any, x: Value) -> Value:
  return x


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


def concatenate(graph: Graph, eqn: Any, *values: Value) -> Value:
  """Values one after the other along an axis."""
  axis = eqn.params['dimension']
  parts = [
    graph.full(graph.real(v), atom.aval.shape)
    for v, atom in zip(values, eqn.invars, strict=True)
  ]
  # Constants come in the traced order; a computed part decides the layout.
  computed = (
    part.perm
    for part, v in zip(parts, values, strict=True)
    if not isinstance(v, (Const, Codes))
  )
  perm = next(computed, parts[0].perm)
  names = [graph.align(part, perm).name for part in parts]
  name = graph.node('Concat', *names, axis=perm.index(axis))
  return Tensor(name, tuple(eqn.outvars[0].aval.shape), perm)


def split(graph: Graph, eqn: Any, x: Value) -> list[Value]:
  """A slice for each part, of which those that nobody reads are dropped."""
  sizes, axis = eqn.params['sizes'], eqn.params['axis']
  if not all(isinstance(size, (int, np.integer)) for size in sizes):
    raise unsupported(eqn, 'sizes that depend on the batch size')
  x = graph.full(graph.tensor(x), eqn.invars[0].aval.shape)
  parts: list[Value] = []
  start = 0
  for size in map(int, sizes):
    parts.append(_cut(graph, x, axis, range(start, start + size)))
    start += size
  return parts


def _cut(graph: Graph, x: Tensor, axis: int, kept: range) -> Tensor:
  """The entries of an axis at regular places, in a tensor that is full."""
  where = (kept.start, kept.stop, x.perm.index(axis), kept.step)
  limits = (graph.constant(np.array([v])) for v in where)
  name = graph.node('Slice', x.name, *limits)
  shape = (*x.shape[:axis], len(kept), *x.shape[axis + 1 :])
  return dataclasses.replace(x, name=name, shape=shape)


def cut(graph: Graph, eqn: Any, x: Value) -> Value:
  """The primitive slice: from a start to a limit on every axis."""
  shape = tuple(eqn.invars[0].aval.shape)
  starts, limits = eqn.params['start_indices'], eqn.params['limit_indices']
  steps = eqn.params['strides'] or (1,) * len(shape)
  x = graph.full(graph.tensor(x), shape)
  for axis, (start, limit, step) in enumerate(
    zip(starts, limits, steps, strict=True)
  ):
    if (start, limit, step) == (0, shape[axis], 1):
      continue
    if not all(isinstance(n, (int, np.integer)) for n in (start, limit, step)):
      raise unsupported(eqn, 'limits that depend on the batch size')
    x = _cut(graph, x, axis, range(start, limit, step))
  return x


def _window(eqn: Any, index: Value) -> list[tuple[int, range]] | None:
  """The axes and the places that a gather of one slice takes, if it is one."""
  numbers, sizes = eqn.params['dimension_numbers'], eqn.params['slice_sizes']
  shape = tuple(eqn.invars[0].aval.shape)
  axes, kept = numbers.start_index_map, tuple(range(len(shape)))
  if not isinstance(index, Const) or index.array.shape != (len(axes),):
    return None
  if numbers.offset_dims != kept or not all(
    isinstance(shape[i], int) if i in axes else sizes[i] == shape[i]
    for i in kept
  ):
    return None
  found = []
  for axis, start in zip(axes, index.array.tolist(), strict=True):
    if not 0 <= start <= shape[axis] - sizes[axis]:
      return None
    found.append((axis, range(start, start + sizes[axis])))
  return found


def gather(graph: Graph, eqn: Any, x: Value, index: Value) -> Value:
  """Entries along one axis; an index out of range is the runtime's error."""
  if window := _window(eqn, index):
    cropped = graph.full(graph.tensor(x), eqn.invars[0].aval.shape)
    for axis, places_kept in window:
      cropped = _cut(graph, cropped, axis, places_kept)
    return cropped
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


# Handlers of constants too, of which they make views.
VIEWS: dict[str, Callable[..., Value]] = {
  'broadcast_in_dim': _broadcast,
  'copy': _same,
  'name': _same,
  'reshape': _reshape,
  'squeeze': _squeeze,
  'stop_gradient': _same,
  'transpose': _transpose,
}
