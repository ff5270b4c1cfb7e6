"""Values of an ONNX graph under construction, and their layouts.

Owns what a value is and may be asked; the nodes that compute it are in
`onnx_graph`. A value is one of
  Const     known at export: a numpy array;
  Codes     known at export: integers and their scale;
  Tensor    computed by the graph;
  Deferred  a Tensor whose node is not written yet, as its reader may know a
            better one: a convolution may take the bias that follows it.
Size-1 axes broadcast lazily: a Const or Tensor may have size 1 along an axis
where the traced value is larger. Batch sizes are symbolic.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Const:
  """An array that is known at export."""

  array: np.ndarray

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the array; size-1 axes broadcast."""
    return self.array.shape

  def view(self, change: Callable[[np.ndarray], np.ndarray]) -> 'Const':
    """The array, transposed or reshaped."""
    return Const(change(self.array))


@dataclasses.dataclass(frozen=True, eq=False)
class Codes:
  """Integers that are known at export, and the scale of each channel.

  Attributes:
    code: int8 or int32, symmetric.
    scale: float32 of the same rank, broadcastable to `code`.
  """

  code: np.ndarray
  scale: np.ndarray

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the codes."""
    return self.code.shape

  def view(self, change: Callable[[np.ndarray], np.ndarray]) -> 'Codes':
    """The codes, transposed or reshaped in a way that the scale can follow."""
    return Codes(change(self.code), change(self.scale))

  @property
  def array(self) -> np.ndarray:
    """The real values."""
    return self.code.astype(np.float32) * self.scale


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
  """An output of a node.

  Attributes:
    name: in the graph.
    shape: in the order of the traced function; size-1 axes broadcast.
    perm: axis i of the graph's tensor is axis perm[i] of the traced value.
    grid: None for real values; for activation codes their scale and the
      zero point of the uint8 that the graph holds. The traced codes are int8:
      128 less.
  """

  name: str
  shape: tuple[Any, ...]
  perm: tuple[int, ...]
  grid: tuple[float, int] | None = None

  def without(
    self, axes: Sequence[int]
  ) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Shape and layout that are left when the axes are gone."""
    kept = [i for i in range(len(self.shape)) if i not in axes]
    shape = tuple(self.shape[i] for i in kept)
    return shape, tuple(kept.index(p) for p in self.perm if p in kept)


@dataclasses.dataclass(frozen=True, eq=False)
class Deferred:
  """A tensor whose node is not written yet.

  Attributes:
    kind: 'linear', 'total' or 'padded'.
    emit: writes the node; without arguments as traced. `emit(bias)` of
      'linear' adds a Const or Codes `[O]`; `emit(True)` of 'total' takes the
      mean.
    shape: as Tensor's.
    detail: what a reader must know: the number of channels O of 'linear' and
      their axis, the number of summands of 'total', the unpadded value and
      its edges of 'padded'.
  """

  kind: str
  emit: Callable[..., Tensor]
  shape: tuple[Any, ...]
  detail: Any

  @functools.cached_property
  def tensor(self) -> Tensor:
    """As traced, written once."""
    return self.emit()


Value: TypeAlias = Const | Codes | Tensor | Deferred


def is_one(size: Any) -> bool:
  """Whether an axis has size 1; a symbolic one has not."""
  return isinstance(size, int) and size == 1


def identity(rank: int) -> tuple[int, ...]:
  """The layout of the traced function."""
  return tuple(range(rank))


def scalar(value: Value) -> Any:
  """The number that a constant holds everywhere, or None."""
  if isinstance(value, Const) and value.array.size == 1:
    return value.array.reshape(())[()]
  return None


def unsupported(eqn: Any, what: str) -> ValueError:
  """An error for an equation whose primitive is known, used in another way."""
  return ValueError(
    f'export_onnx: {eqn.primitive.name} with {what} has no ONNX form here.'
  )
