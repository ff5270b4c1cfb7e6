"""Batches: which examples a step sees, as host arrays.

Owns order, resumption and the slices of processes. It neither reads data sets
nor changes a pixel: images in memory are augmented on the devices, see
`augment`, and streamed ones cropped as they are read, see `streamed`.
"""

import dataclasses
import os

import grain
import numpy as np

from kd_jax.data.examples import Examples
from kd_jax.data.streamed import StreamedImages
from kd_jax.data.workers import WorkerBatches
from kd_jax.types import BatchStream, HostBatch

# Of an iterator without end; more than anyone trains.
_EPOCHS = 2**30


def batches_per_epoch(data: Examples, batch_size: int) -> int:
  """Full batches in one epoch; the remainder is dropped.

  Args:
    data: the examples.
    batch_size: examples in a global batch.

  Returns:
    At least 1.

  Raises:
    ValueError: if `batch_size` is not positive or larger than the set.

  Example:
    >>> from kd_jax.data import ArrayData
    >>> data = ArrayData(
    ...   {'x': np.array([0.0, 10.0, 20.0])}, id=np.arange(3, dtype=np.int32),
    ...   reads='x', num_classes=1)
    >>> batches_per_epoch(data, 2)
    1
  """
  if not 1 <= batch_size <= len(data):
    raise ValueError(
      f'batch_size is {batch_size}; it must be between 1 and the '
      f'{len(data)} examples of the set.'
    )
  return len(data) // batch_size


def train_batches(
  data: Examples,
  *,
  batch_size: int,
  seed: int,
  epochs: int | None = None,
  part: int = 0,
  parts: int = 1,
  num_workers: int = 0,
) -> BatchStream:
  """Shuffled batches of the training set, resumable at any batch.

  Every epoch is a new permutation of the set that depends on `seed` and the
  epoch alone, and the remainder is dropped. Global batches are the same for
  any number of parts, each of which is a contiguous slice, so a run may be
  resumed on another number of hosts.

  Args:
    data: the examples.
    batch_size: examples in a global batch.
    seed: of the order and the crops of streamed images, in `[0, 2**32)`.
    epochs: how many; endless when None.
    part: which slice of each global batch to read, see `sharding.readers`.
    parts: how many slices there are.
    num_workers: processes of this one that read streamed images; 0 reads them
      on threads. The batches are the same, and a run may be resumed with
      another number.

  Returns:
    An iterator of batches with `image` uint8 `[B, H, W, C]` and `label`, `id`,
    `epoch` int32 `[B]`, where B is `batch_size / parts`; without
    `label` if the images have none. Streamed images are random crops, keyed by
    (seed, id, epoch), and the next batches are read meanwhile. Its
    `get_state()` is a dict that JSON can hold and `set_state()` takes.

  Raises:
    ValueError: if `batch_size` exceeds the set or `parts` does not
      divide it, or an argument is out of range.

  Example:
    >>> from kd_jax.data import ImageData
    >>> data = ImageData(
    ...   image=np.zeros((5, 8, 8, 1), np.uint8),
    ...   label=np.zeros(5, np.int32),
    ...   id=np.arange(5, dtype=np.int32),
    ...   class_names=('zero',),
    ... )
    >>> batches = train_batches(data, batch_size=2, seed=0)
    >>> first, state = next(batches), batches.get_state()
    >>> second = next(batches)
    >>> batches.set_state(state)
    >>> bool((next(batches)['id'] == second['id']).all())
    True
  """
  per_epoch = batches_per_epoch(data, batch_size)
  if epochs is not None and epochs < 1:
    raise ValueError(f'epochs is {epochs}; it must be positive, or None.')
  if not 0 <= seed < 2**32:
    raise ValueError(f'seed is {seed}; it must be in [0, 2**32).')
  _local_size(batch_size, part, parts)
  if num_workers < 0:
    raise ValueError(f'num_workers is {num_workers}; it must not be negative.')
  workers = 0
  if isinstance(data, StreamedImages):
    workers = num_workers
    if workers and data.num_threads is None:
      each = max(1, (os.cpu_count() or 1) // workers)
      data = dataclasses.replace(data, num_threads=each)
  reader = _Reader(data, batch_size, seed, part, parts)
  batches = grain.MapDataset.range(per_epoch * (epochs or _EPOCHS)).map(reader)
  if workers:
    return WorkerBatches(batches, workers, data.prefetch)
  return _iterate(batches, data)


class _Reader:
  """`(number of a batch) -> batch`; worker processes get copies of it."""

  def __init__(
    self,
    data: Examples,
    batch_size: int,
    seed: int,
    part: int,
    parts: int,
  ):
    self.data, self.batch_size, self.seed = data, batch_size, seed
    self.local_size = batch_size // parts
    self.offset = part * self.local_size
    self.orders: dict[int, np.ndarray] = {}

  def order(self, epoch: int) -> np.ndarray:
    known = self.orders
    if epoch not in known:
      order = epoch_order(len(self.data), seed=self.seed, epoch=epoch)
      # Batches that are read ahead are of this epoch or the one before.
      kept = {e: o for e, o in known.items() if e == epoch - 1}
      self.orders = known = kept | {epoch: order}
    return known[epoch]

  def __call__(self, step: int) -> HostBatch:
    epoch, batch = divmod(step, len(self.data) // self.batch_size)
    start = batch * self.batch_size + self.offset
    rows = self.order(epoch)[start : start + self.local_size]
    examples = self.data.read(rows, key=(self.seed, epoch))
    return {**examples, 'epoch': np.full(self.local_size, epoch, np.int32)}


def epoch_order(size: int, *, seed: int, epoch: int) -> np.ndarray:
  """The order in which an epoch of `train_batches` goes through a set.

  Args:
    size: N, examples of the set.
    seed: of the order.
    epoch: which, from 0 on.

  Returns:
    int64 `[N]`, a permutation of the positions in the set.
  """
  # One permutation an epoch: grain's own shuffle, which draws every index in
  # Python, makes a batch cost milliseconds instead of microseconds. As for
  # the validation split, the stream of RandomState is frozen.
  return np.random.RandomState([seed, epoch]).permutation(size)


def epoch_batches(
  data: Examples,
  *,
  batch_size: int,
  seed: int,
  epoch: int,
  start: int = 0,
  stop: int | None = None,
) -> grain.DatasetIterator[HostBatch]:
  """A part of one epoch of `train_batches`, without dropping a remainder.

  Args:
    data: the examples.
    batch_size: examples in a batch.
    seed: as for `train_batches`.
    epoch: which, from 0 on.
    start: position in the epoch's order to begin at.
    stop: position to end before; the end of the epoch when None.

  Returns:
    An iterator of the batches of `train_batches`; the last may be smaller.
  """
  order = epoch_order(len(data), seed=seed, epoch=epoch)[start:stop]

  def gather(batch: int) -> HostBatch:
    rows = order[batch * batch_size : (batch + 1) * batch_size]
    examples = data.read(rows, key=(seed, epoch))
    return {**examples, 'epoch': np.full(len(rows), epoch, np.int32)}

  batches = grain.MapDataset.range(-(-len(order) // batch_size))
  return _iterate(batches.map(gather), data)


def eval_batches(
  data: Examples,
  *,
  batch_size: int,
  part: int = 0,
  parts: int = 1,
) -> grain.DatasetIterator[HostBatch]:
  """All examples once, in order, in batches of one shape.

  Args:
    data: the examples.
    batch_size: examples in a global batch; may exceed the set.
    part: which slice of each global batch to read, see `sharding.readers`.
    parts: how many slices there are.

  Returns:
    An iterator of the batches of `train_batches`, of epoch 0, with `mask`
    float32 `[B]` besides: 1 for an example and 0 for padding, which has black
    pixels, label 0 and id -1. Sums weighted by `mask` are exact. Streamed
    images are central crops.

  Raises:
    ValueError: if `batch_size` is not positive or `parts` does not
      divide it, or `part` is out of range.

  Example:
    >>> from kd_jax.data import ArrayData
    >>> data = ArrayData(
    ...   {'x': np.array([0.0, 10.0, 20.0])}, id=np.arange(3, dtype=np.int32),
    ...   reads='x', num_classes=1)
    >>> for batch in eval_batches(data, batch_size=2):
    ...   print(*(batch[name].tolist() for name in ('x', 'id', 'mask')))
    [0.0, 10.0] [0, 1] [1.0, 1.0]
    [20.0, 0.0] [2, -1] [1.0, 0.0]
  """
  if batch_size < 1:
    raise ValueError(f'batch_size is {batch_size}; it must be positive.')
  local_size = _local_size(batch_size, part, parts)

  def gather(batch: int) -> HostBatch:
    start = batch * batch_size + part * local_size
    real = min(local_size, max(0, len(data) - start))
    examples = data.read(np.arange(start, start + real))
    examples['epoch'] = np.zeros(real, np.int32)
    examples['mask'] = np.ones(real, np.float32)

    def padded(name: str, array: np.ndarray) -> np.ndarray:
      shape = (local_size - real, *array.shape[1:])
      fill = -1 if name == 'id' else 0
      return np.concatenate([array, np.full(shape, fill, array.dtype)])

    return {name: padded(name, array) for name, array in examples.items()}

  batches = grain.MapDataset.range(-(-len(data) // batch_size))
  return _iterate(batches.map(gather), data)


def _local_size(batch_size: int, part: int, parts: int) -> int:
  if not 0 <= part < parts:
    raise ValueError(f'part is {part}, but there are {parts} parts.')
  if batch_size % parts:
    raise ValueError(
      f'batch_size {batch_size} is not divisible by the {parts} parts.'
    )
  return batch_size // parts


def _iterate(
  batches: grain.MapDataset[HostBatch], data: Examples
) -> grain.DatasetIterator[HostBatch]:
  options = grain.ReadOptions(
    num_threads=data.prefetch, prefetch_buffer_size=data.prefetch
  )
  return iter(batches.to_iter_dataset(options))
