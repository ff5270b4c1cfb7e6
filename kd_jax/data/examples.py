"""Examples of a split: what a task loads, and what batches are made of.

Owns the interface, and examples that lie in memory; those that are read from
disk are `streamed`. Where they come from is `sources`.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import numpy as np

from kd_jax import rules

_CHUNK = 1024


class Examples(Protocol):
  """What `pipeline` makes batches of: a `Split`, or the rows of `Resident`.

  Attributes:
    prefetch: how many batches to read ahead of the one in use.
  """

  prefetch: ClassVar[int]

  def __len__(self) -> int: ...

  def read(
    self,
    rows: Sequence[int] | np.ndarray,
    *,
    key: tuple[int, int] | None = None,
  ) -> dict[str, np.ndarray]:
    """Some examples; see `StreamedImages.read`."""


class Split(Examples, Protocol):
  """The examples of one split, as `tasks.Task.load` returns them."""

  @property
  def id(self) -> np.ndarray:
    """Int32 `[N]`, unique over the splits that training reads.

    Augmentation is keyed by it, and stored outputs of a teacher are found by
    it.
    """

  @property
  def class_names(self) -> tuple[str, ...]:
    """One name per output; empty where outputs have none."""

  @property
  def input(self) -> jax.ShapeDtypeStruct:
    """What networks see of one example, before pre-processing."""

  @property
  def num_classes(self) -> int:
    """Size of a network's output: classes, or values to predict."""

  @property
  def labelled(self) -> bool:
    """Whether `read` returns what is to be predicted."""


@runtime_checkable
class InMemory(Split, Protocol):
  """The examples of one split, all of them in memory.

  Example:
    >>> data = ArrayData(
    ...   {'x': np.ones((5, 3))}, id=np.arange(5, dtype=np.int32), reads='x',
    ...   num_classes=1)
    >>> isinstance(data, InMemory), data.arrays[data.reads].shape
    (True, (5, 3))
  """

  @property
  def arrays(self) -> Mapping[str, np.ndarray]:
    """name -> `[N, ...]`, the entries of a batch but for `id`."""

  @property
  def reads(self) -> str:
    """Which of the arrays networks read."""


def _narrowed(name: str, array: np.ndarray, dtype: Any) -> np.ndarray:
  """An array of another dtype, which has to hold its integers."""
  if array.dtype == dtype:
    return array
  narrow = array.astype(dtype)
  if array.dtype.kind in 'iu' and np.any(narrow != array):
    raise ValueError(
      f'ArrayData: {name} are {np.dtype(dtype)}, but they go from '
      f'{array.min()} to {array.max()}.'
    )
  return narrow


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayData:
  """Examples of one split of any kind, in memory.

  Attributes:
    arrays: name -> `[N, ...]`, the entries of a batch; those of 64 bits are
      kept as 32, which JAX computes with.
    id: integers `[N]`, see `Split`; kept as int32.
    reads: which of the arrays networks read; the others are to be predicted.
    num_classes: size of a network's output.
    class_names: one name per output; empty where outputs have none.

  Raises:
    ValueError: if the arrays differ in length, `reads` names none of them, or
      the ids are not integers or not unique, or integers are beyond 32 bits.

  Example:
    >>> split = ArrayData(
    ...   {'x': np.ones((5, 3), 'f'), 'target': np.zeros((5, 1), 'f')},
    ...   id=np.arange(5, dtype=np.int32),
    ...   reads='x',
    ...   num_classes=1,
    ... )
    >>> split.input.shape, sorted(split.read([0, 4]))
    ((3,), ['id', 'target', 'x'])
  """

  arrays: Mapping[str, np.ndarray]
  id: np.ndarray
  reads: str
  num_classes: int
  class_names: tuple[str, ...] = ()

  prefetch: ClassVar[int] = 0

  def __post_init__(self) -> None:
    rules.choose('entry to read', self.reads, self.arrays)
    lengths = {name: len(array) for name, array in self.arrays.items()}
    if set(lengths.values()) != {len(self.id)}:
      raise ValueError(
        f'ArrayData: there are {len(self.id)} ids, but arrays of {lengths}.'
      )
    ids = np.asarray(self.id)
    if ids.dtype.kind not in 'iu' or len(np.unique(ids)) != len(ids):
      raise ValueError('ArrayData: ids are integers, another for each example.')
    # What caches and devices hold, whatever NumPy made by itself.
    object.__setattr__(self, 'id', _narrowed('ids', ids, np.int32))
    arrays = {
      name: _narrowed(name, array, jax.dtypes.canonicalize_dtype(array.dtype))
      for name, array in self.arrays.items()
    }
    object.__setattr__(self, 'arrays', arrays)

  def __len__(self) -> int:
    return len(self.id)

  @property
  def input(self) -> jax.ShapeDtypeStruct:
    """What networks see of one example."""
    array = self.arrays[self.reads]
    return jax.ShapeDtypeStruct(array.shape[1:], array.dtype)

  @property
  def labelled(self) -> bool:
    """Whether there is more than what networks read."""
    return len(self.arrays) > 1

  def read(
    self,
    rows: Sequence[int] | np.ndarray,
    *,
    key: tuple[int, int] | None = None,
  ) -> dict[str, np.ndarray]:
    """Some examples, as they are; see `ImageData.read`."""
    return _rows(self, rows)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageData:
  """Images of one split, in memory.

  Attributes:
    image: uint8 `[N, H, W, C]`.
    label: int32 `[N]`, class ids in `[0, num_classes)`; None for images
      without labels.
    id: int32 `[N]`, the position in the TFDS split; unique over train and
      validation, which come from the same one. Augmentation is keyed by it.
    class_names: one name per class; empty for images without labels.

  Raises:
    ValueError: if an array has another dtype or shape than these.

  Example:
    >>> data = ImageData(
    ...   image=np.zeros((5, 8, 8, 1), np.uint8),
    ...   label=np.arange(5, dtype=np.int32) % 2,
    ...   id=np.arange(5, dtype=np.int32),
    ...   class_names=('even', 'odd'),
    ... )
    >>> len(data), data.num_classes, data.image_shape
    (5, 2, (8, 8, 1))
  """

  image: np.ndarray
  label: np.ndarray | None
  id: np.ndarray
  class_names: tuple[str, ...]

  # How many batches to read ahead: threads would cost more than they hide.
  prefetch: ClassVar[int] = 0
  reads: ClassVar[str] = 'image'

  def __post_init__(self) -> None:
    n = len(self.id if self.label is None else self.label)
    _check_array('image', self.image, np.uint8, (n, -1, -1, -1))
    _check_array('id', self.id, np.int32, (n,))
    if self.label is not None:
      _check_array('label', self.label, np.int32, (n,))

  def __len__(self) -> int:
    return len(self.id)

  @property
  def arrays(self) -> dict[str, np.ndarray]:
    """The images, and the labels if there are any; see `ArrayData`."""
    found = {'image': self.image}
    return found if self.label is None else {**found, 'label': self.label}

  @property
  def labelled(self) -> bool:
    """Whether `read` returns labels."""
    return self.label is not None

  @property
  def num_classes(self) -> int:
    """Number of classes, those without an image in this split included."""
    return len(self.class_names)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Height, width and channels."""
    return self.image.shape[1:]

  @property
  def input(self) -> jax.ShapeDtypeStruct:
    """One image: uint8 `[H, W, C]`."""
    return jax.ShapeDtypeStruct(self.image_shape, np.uint8)

  @functools.cached_property
  def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel, of pixels in 0..1.

    Each has one float per channel, over all pixels; sums are exact, and the
    deviation is that of the population. Take those of the train split, not of
    what you evaluate on.
    """
    total = np.zeros(self.image.shape[-1], np.int64)
    squares = np.zeros_like(total)
    for start in range(0, len(self), _CHUNK):
      chunk = self.image[start : start + _CHUNK].astype(np.int64)
      total += chunk.sum((0, 1, 2))
      squares += (chunk**2).sum((0, 1, 2))
    pixels = self.image.size // self.image.shape[-1]
    mean = total / pixels
    std = np.sqrt(squares / pixels - mean**2)
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())

  def read(
    self,
    rows: Sequence[int] | np.ndarray,
    *,
    key: tuple[int, int] | None = None,
  ) -> dict[str, np.ndarray]:
    """Some examples, as they are.

    Args:
      rows: `[n]` positions in this split, in `[0, len(self))`.
      key: for `StreamedImages`; images in memory are augmented on the devices.

    Returns:
      `image` uint8 `[n, H, W, C]`, `id` int32 `[n]` and, if labelled, `label`
      int32 `[n]`.
    """
    return _rows(self, rows)


def _rows(
  split: ArrayData | ImageData, rows: Sequence[int] | np.ndarray
) -> dict[str, np.ndarray]:
  rows = np.asarray(rows)
  batch = {name: array[rows] for name, array in split.arrays.items()}
  return batch | {'id': split.id[rows]}


def _check_array(
  name: str, array: Any, dtype: Any, shape: tuple[int, ...]
) -> None:
  fits = len(array.shape) == len(shape) and all(
    want in (-1, got) for want, got in zip(shape, array.shape, strict=True)
  )
  if array.dtype != dtype or not fits:
    wanted = ', '.join('any' if n < 0 else str(n) for n in shape)
    raise ValueError(
      f'ImageData.{name} must be {np.dtype(dtype)} [{wanted}], not '
      f'{array.dtype} {list(array.shape)}.'
    )
