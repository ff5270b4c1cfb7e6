"""Inputs that lie on the devices: of a batch only row numbers are sent.

Owns the decision which inputs do, and how a batch is gathered from them. What
a step sees is the same in either case, to the bit.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax import rules, sharding
from kd_jax.data.examples import Examples, InMemory, Split
from kd_jax.types import Batch

# Of each device's memory; the rest is for parameters and activations.
SHARE = 1 / 8
PLACEMENTS = ('auto', 'device', 'host')


class Input(NamedTuple):
  """Where a training run's batches come from.

  Attributes:
    examples: what `pipeline.train_batches` makes batches of.
    put: `(batch, stacked=False) -> batch` on the devices, as
      `sharding.shard_batch`; the inputs are among its arrays.
  """

  examples: Examples
  put: Callable[..., Batch]


def make_input(examples: Split, mesh: Mesh, placement: str = 'auto') -> Input:
  """Puts what networks read on the devices if it is to lie there.

  Args:
    examples: of a split.
    mesh: see `sharding.make_mesh`.
    placement: 'device' puts a copy of all inputs on every device, once; 'host'
      sends those of every batch. 'auto' is 'device' for inputs in memory that
      take up to `SHARE` of the memory of each device, and 'host' for others
      and on CPUs, whose memory is the host's.

  Returns:
    What to make batches of, and how to place them.

  Raises:
    ValueError: for another word, or 'device' with examples that are not in
      memory, such as streamed images.

  Example:
    >>> from kd_jax.data import ArrayData
    >>> data = ArrayData(
    ...   {'x': np.array([0.0, 10.0, 20.0])}, id=np.arange(3, dtype=np.int32),
    ...   reads='x', num_classes=1)
    >>> mesh = sharding.make_mesh(jax.devices()[:1])
    >>> made = make_input(data, mesh, 'device')
    >>> batch = made.examples.read([2, 0])
    >>> batch['row'].tolist(), made.put(batch)['x'].tolist()
    ([2, 0], [20.0, 0.0])
  """
  rules.choose('placement', placement, dict.fromkeys(PLACEMENTS))
  if placement == 'auto':
    limit = SHARE * min(map(_memory, mesh.local_devices))
    fits = isinstance(examples, InMemory) and _input(examples).nbytes <= limit
    placement = 'device' if fits else 'host'
  if placement == 'device':
    if not isinstance(examples, InMemory):
      raise ValueError(
        "placement='device' is for examples in memory; others, such as "
        "images streamed with a data.image_size, need 'host' or 'auto'."
      )
    resident = Resident(examples, mesh)
    return Input(resident, resident.put)

  def put(batch, *, stacked=False):
    return sharding.shard_batch(batch, mesh, stacked=stacked)

  return Input(examples, put)


def _input(examples: InMemory) -> np.ndarray:
  return examples.arrays[examples.reads]


def _memory(device: jax.Device) -> int:
  """Bytes of a device's memory; 0 where it does not say, as CPUs."""
  return (device.memory_stats() or {}).get('bytes_limit', 0)


class Resident:
  """Inputs of one split, a copy on every device, read as row numbers.

  Has what `pipeline.train_batches` needs of a split; its batches have `row` in
  place of what networks read, and `put` makes the one of the other.

  Args:
    examples: of the split.
    mesh: see `sharding.make_mesh`.

  Example:
    >>> from kd_jax.data import ImageData
    >>> images = ImageData(
    ...   image=np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1),
    ...   label=np.zeros(3, np.int32),
    ...   id=np.arange(3, dtype=np.int32),
    ...   class_names=('zero',),
    ... )
    >>> resident = Resident(images, sharding.make_mesh(jax.devices()[:1]))
    >>> resident.put(resident.read([2, 0]))['image'].ravel().tolist()
    [2, 0]
  """

  prefetch: ClassVar[int] = 0

  def __init__(self, examples: InMemory, mesh: Mesh):
    self._examples, self._mesh = examples, mesh
    self._inputs = jax.make_array_from_process_local_data(
      NamedSharding(mesh, P()), _input(examples)
    )
    self._gather = {
      stacked: jax.jit(
        lambda inputs, rows: jnp.take(inputs, rows, axis=0, mode='clip'),
        out_shardings=NamedSharding(mesh, sharding.batch_spec(stacked)),
      )
      for stacked in (False, True)
    }

  def __len__(self) -> int:
    return len(self._examples)

  def read(
    self,
    rows: Sequence[int] | np.ndarray,
    *,
    key: tuple[int, int] | None = None,
  ) -> dict[str, np.ndarray]:
    """What the split's `read` returns, with `row` int32 `[n]` for inputs."""
    del key
    rows = np.asarray(rows, np.int32)
    others = {
      name: array[rows]
      for name, array in self._examples.arrays.items()
      if name != self._examples.reads
    }
    return {'row': rows, 'id': self._examples.id[rows], **others}

  def put(
    self, batch: Mapping[str, np.ndarray], *, stacked: bool = False
  ) -> Batch:
    """Moves a batch to the devices, and gathers its inputs there.

    Args:
      batch: with `row` int32 `[B]`, of this process.
      stacked: whether arrays are `[N, B, ...]`.

    Returns:
      The batch with the inputs `[B, ...]`, or `[N, B, ...]`, in place of
      `row`.
    """
    placed = dict(sharding.shard_batch(batch, self._mesh, stacked=stacked))
    rows = placed.pop('row')
    inputs = self._gather[stacked](self._inputs, rows)
    return placed | {self._examples.reads: inputs}
