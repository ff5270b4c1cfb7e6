"""What is known of rescaled channels while a forward is walked through.

Owns the abstract values of `channels` and what its rules may tell the walk. A
value is a `Leaf` (a parameter), `Scaled` (all entries of a channel are
multiplied by its scale), 0 (a zero of any shape) or None (does not depend on
the scales). What primitives do with them is in `channel_rules` and
`channel_views`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
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

  def at(self, axis: int) -> 'Leaf':
    """The same with its only axis elsewhere."""
    return dataclasses.replace(self, axis=axis)


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

  def at(self, axis: int) -> 'Scaled':
    """The same with the channels along another axis."""
    return dataclasses.replace(self, axis=axis)

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


# (walk, equation, values) -> value, or NotImplemented if scales do not pass
Rule = Callable[[Walk, Any, Sequence[Value]], Result]


def shape_of(atom: Any) -> tuple[int, ...]:
  """The shape of a variable or literal of a jaxpr."""
  return atom.aval.shape


def axis_of(value: Leaf | Scaled, shape: Sequence[int]) -> int | None:
  """The axis of the channels, or None for a parameter that is no vector."""
  if value.axis is None and len(shape) == 1:
    return 0
  return value.axis


def along(index: np.ndarray, axis: int, rank: int) -> np.ndarray:
  """An index vector as an array that broadcasts along one axis."""
  return np.asarray(index).reshape(
    [-1 if i == axis else 1 for i in range(rank)]
  )
