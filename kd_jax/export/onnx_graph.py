"""An ONNX graph under construction: nodes and constants, written in order.

Owns the nodes that several primitives need, such as those that change a
layout; what one primitive becomes is in `onnx_primitives`, and the walk over a
traced function in `onnx_trace`.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from kd_jax.export.onnx_values import (
  Codes,
  Const,
  Deferred,
  Tensor,
  Value,
  identity,
  is_one,
)


class Graph:
  """Nodes and initializers, written in order.

  Attributes:
    nodes: in topological order.
    initializers: by name.
    batch: the symbolic batch size, or None.
    input: name of the graph's input.
  """

  def __init__(self, input_name: str, batch: Any):
    self.nodes: list[onnx.NodeProto] = []
    self.initializers: dict[str, onnx.TensorProto] = {}
    self.input = input_name
    self.batch = batch
    self._constants: dict[tuple[Any, ...], str] = {}
    self._grids: dict[tuple[Any, ...], list[tuple[float, Tensor]]] = {}
    self._numbers = itertools.count()

  def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
    """Appends a node with one output; returns the output's name."""
    output = f'{operator.lower()}_{next(self._numbers)}'
    self.nodes.append(
      helper.make_node(operator, inputs, [output], **attributes)
    )
    return output

  def constant(self, array: Any) -> str:
    """The name of an initializer; equal arrays share one."""
    array = np.asarray(array)
    key = (array.dtype.str, array.dtype.name, array.shape, array.tobytes())
    if key not in self._constants:
      self._constants[key] = self._initializer(array)
    return self._constants[key]

  def _initializer(self, array: np.ndarray) -> str:
    name = f'constant_{len(self.initializers)}'
    # ascontiguousarray would make a vector of a scalar.
    tensor = numpy_helper.from_array(array.copy(order='C'), name)
    self.initializers[name] = tensor
    return name

  def name(self, value: Const | Codes) -> str:
    """A constant in the graph; codes are dequantized there."""
    if isinstance(value, Const):
      return self.constant(value.array)
    axes = [i for i, size in enumerate(value.scale.shape) if size > 1]
    if len(axes) > 1:
      return self._of_groups(value)
    scale = value.scale.reshape(-1 if axes else ())
    names = [self.constant(value.code), self.constant(scale)]
    if value.code.dtype == np.int8:
      # Each weight has its own zero point: onnxruntime fails to rewrite int8
      # weights as uint8, for x86 without VNNI, when two share one.
      names.append(self._initializer(np.zeros(scale.shape, np.int8)))
    attributes = {'axis': axes[0]} if axes else {}
    return self.node('DequantizeLinear', *names, **attributes)

  def _of_groups(self, value: Codes) -> str:
    """Codes with scales along several axes, which opset 20 has no node for.

    The file holds the codes, and one scale for each run of equal ones.
    """
    code, scale = value.code, value.scale
    for axis, size in enumerate(scale.shape):
      step = next(
        step
        for step in range(size, 0, -1)
        if size % step == 0
        and (np.repeat(_every(scale, step, axis), step, axis) == scale).all()
      )
      if 1 < step < size:
        split = (size // step, step)
        code, scale = (
          a.reshape(*a.shape[:axis], *own, *a.shape[axis + 1 :])
          for a, own in ((code, split), (_every(scale, step, axis), (-1, 1)))
        )
        break
    to = helper.np_dtype_to_tensor_dtype(np.dtype(np.float32))
    name = self.node('Cast', self.constant(code), to=to)
    name = self.node('Mul', name, self.constant(scale))
    if code.shape == value.shape:
      return name
    return self.node('Reshape', name, self.shape(value.shape))

  def tensor(self, value: Value) -> Tensor:
    """Any value as a tensor of the graph."""
    if isinstance(value, Deferred):
      return value.tensor
    if isinstance(value, (Const, Codes)):
      rank = len(value.shape)
      return Tensor(self.name(value), value.shape, identity(rank))
    return value

  def real(self, value: Value) -> Tensor:
    """A tensor of real values.

    Raises:
      ValueError: for codes, on which only layers run with `simulate=True`
        have ONNX operators.
    """
    tensor = self.tensor(value)
    if tensor.grid is not None:
      raise ValueError(
        'export_onnx: arithmetic on int8 codes; run the model with '
        'execute_integers(simulate=True).'
      )
    return tensor

  def align(self, x: Tensor, perm: Sequence[int]) -> Tensor:
    """The same tensor in another layout."""
    perm = tuple(perm)
    if x.perm == perm:
      return x
    moved = [p for p in perm if not is_one(x.shape[p])]
    if moved == [p for p in x.perm if not is_one(x.shape[p])]:
      # Only axes of size 1 move: a new shape, no copy.
      shape = self.shape([x.shape[p] for p in perm])
      name = self.node('Reshape', x.name, shape)
    else:
      order = [x.perm.index(p) for p in perm]
      name = self.node('Transpose', x.name, perm=order)
    return dataclasses.replace(x, name=name, perm=perm)

  def shape(self, sizes: Sequence[Any]) -> str:
    """A constant for Reshape; one size may be symbolic."""
    static = [size if isinstance(size, int) else -1 for size in sizes]
    if static.count(-1) > 1:
      raise ValueError(
        f'export_onnx: a reshape to {tuple(sizes)} has more than one axis '
        'that depends on the batch size.'
      )
    return self.constant(np.array(static, np.int64))

  def reshape(self, x: Tensor, shape: Sequence[Any]) -> Tensor:
    """The elements of a full tensor in row-major order of the traced axes."""
    shape = tuple(shape)
    order = [p for p in x.perm if not is_one(x.shape[p])]
    if order != sorted(order):
      x = self.align(x, identity(len(x.shape)))
    if shape == x.shape and x.perm == identity(len(shape)):
      return x
    name = self.node('Reshape', x.name, self.shape(shape))
    return Tensor(name, shape, identity(len(shape)), x.grid)

  def full(self, x: Tensor, shape: Sequence[Any]) -> Tensor:
    """Broadcasts the axes that were left at size 1."""
    shape = tuple(shape)
    missing = [
      i for i, size in enumerate(shape) if is_one(x.shape[i]) > is_one(size)
    ]
    if not missing:
      return x
    sizes = [shape[p] if p in missing else 1 for p in x.perm]
    name = self.node('Expand', x.name, self._target(sizes))
    return dataclasses.replace(x, name=name, shape=shape)

  def _target(self, sizes: Sequence[Any]) -> str:
    """The shape for Expand; computed from the input if it has a batch."""
    if all(isinstance(size, int) for size in sizes):
      return self.constant(np.array(sizes, np.int64))
    if any(not isinstance(size, int) and size != self.batch for size in sizes):
      raise ValueError(
        f'export_onnx: a broadcast to {tuple(sizes)} has a size that is '
        'neither fixed nor the batch size.'
      )
    batch = self.node('Shape', self.input, start=0, end=1)
    parts = [
      self.constant(np.array([size], np.int64))
      if isinstance(size, int)
      else batch
      for size in sizes
    ]
    return self.node('Concat', *parts, axis=0)

  def quantize(self, x: Tensor, scale: float, zero_point: int) -> Tensor:
    """uint8 codes; the same codes are computed once."""
    grid = (scale, zero_point)
    return self._on_grid('QuantizeLinear', x, scale, zero_point, grid)

  def dequantize(self, x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Real values of codes; the same values are computed once."""
    # A runtime fuses a quantizer and a dequantizer of equal scales only.
    if x.grid is not None and _same_scale(x.grid[0], scale):
      scale = x.grid[0]
    return self._on_grid('DequantizeLinear', x, scale, zero_point, None)

  def _on_grid(
    self,
    operator: str,
    x: Tensor,
    scale: float,
    zero_point: int,
    grid: tuple[float, int] | None,
  ) -> Tensor:
    # Two observers of one tensor may disagree by the rounding of two
    # differently compiled sums; a second quantizer would cost the layer
    # before it its integer kernel.
    known = self._grids.setdefault((operator, x.name, zero_point), [])
    for other, tensor in known:
      if _same_scale(other, scale):
        return tensor
    constants = np.float32(scale), np.uint8(zero_point)
    name = self.node(operator, x.name, *map(self.constant, constants))
    made = dataclasses.replace(x, name=name, grid=grid)
    known.append((scale, made))
    return made


def _every(array: np.ndarray, step: int, axis: int) -> np.ndarray:
  """The first of every `step` elements along an axis."""
  return array.take(range(0, array.shape[axis], step), axis)


def _same_scale(one: float, other: float) -> bool:
  return bool(np.isclose(one, other, rtol=1e-6, atol=0))
