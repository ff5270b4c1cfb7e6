"""Images that lie on the devices: of a batch only row numbers are sent.

Owns the decision which images do, and how a batch is gathered from them. What
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
from kd_jax.data.examples import Examples, ImageData, Split
from kd_jax.types import Batch

# Of each device's memory; the rest is for parameters and activations.
SHARE = 1 / 8
WHERE = ('auto', 'device', 'host')


class Input(NamedTuple):
  """Where a training run's batches come from.

  Attributes:
    examples: what `pipeline.train_batches` makes batches of.
    put: `(batch, stacked=False) -> batch` on the devices, as
      `sharding.shard_batch`; the images are among its arrays.
  """

  examples: Examples
  put: Callable[..., Batch]


def make_input(examples: Split, mesh: Mesh, where: str = 'auto') -> Input:
  """Puts images on the devices if they are to lie there.

  Args:
    examples: of a split.
    mesh: see `sharding.make_mesh`.
    where: 'device' puts a copy of all images on every device, once; 'host'
      sends the images of every batch. 'auto' is 'device' for images in memory
      that take up to `SHARE` of the memory of each device, and 'host' for
      others and on CPUs, whose memory is the host's.

  Raises:
    ValueError: for another word, or 'device' with streamed images.
  """
  rules.choose('data.placement', where, dict.fromkeys(WHERE))
  if where == 'auto':
    limit = SHARE * min(map(_memory, mesh.local_devices))
    fits = isinstance(examples, ImageData) and examples.image.nbytes <= limit
    where = 'device' if fits else 'host'
  if where == 'device':
    if not isinstance(examples, ImageData):
      raise ValueError(
        "data.placement='device' is for images in memory; other examples, such "
        "as those streamed with a data.image_size, need 'host' or 'auto'."
      )
    resident = ResidentImages(examples, mesh)
    return Input(resident, resident.put)

  def put(batch, *, stacked=False):
    return sharding.shard_batch(batch, mesh, stacked=stacked)

  return Input(examples, put)


def _memory(device: jax.Device) -> int:
  """Bytes of a device's memory; 0 where it does not say, as CPUs."""
  return (device.memory_stats() or {}).get('bytes_limit', 0)


class ResidentImages:
  """Images of one split, a copy on every device, read as row numbers.

  Has what `pipeline.train_batches` needs of `ImageData`; its batches have
  `row` in place of `image`, and `put` makes the one of the other.

  Args:
    images: of the split.
    mesh: see `sharding.make_mesh`.

  Example:
    >>> images = ImageData(
    ...   image=np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1),
    ...   label=np.zeros(3, np.int32),
    ...   id=np.arange(3, dtype=np.int32),
    ...   class_names=('zero',),
    ... )
    >>> resident = ResidentImages(images, sharding.make_mesh(jax.devices()[:1]))
    >>> resident.put(resident.read([2, 0]))['image'].ravel().tolist()
    [2, 0]
  """

  prefetch: ClassVar[int] = 0

  def __init__(self, images: ImageData, mesh: Mesh):
    self._images, self._mesh = images, mesh
    self._pixels = jax.make_array_from_process_local_data(
      NamedSharding(mesh, P()), images.image
    )
    self._gather = {
      stacked: jax.jit(
        lambda pixels, rows: jnp.take(pixels, rows, axis=0, mode='clip'),
        out_shardings=NamedSharding(mesh, sharding.batch_spec(stacked)),
      )
      for stacked in (False, True)
    }

  def __len__(self) -> int:
    return len(self._images)

  def read(
    self,
    rows: Sequence[int] | np.ndarray,
    *,
    key: tuple[int, int] | None = None,
  ) -> dict[str, np.ndarray]:
    """What `ImageData.read` returns, with `row` int32 `[n]` for `image`."""
    del key
    rows = np.asarray(rows, np.int32)
    batch = {'row': rows, 'id': self._images.id[rows]}
    if self._images.label is not None:
      batch['label'] = self._images.label[rows]
    return batch

  def put(
    self, batch: Mapping[str, np.ndarray], *, stacked: bool = False
  ) -> Batch:
    """Moves a batch to the devices, and gathers its images there.

    Args:
      batch: with `row` int32 `[B]`, of this process.
      stacked: whether arrays are `[N, B, ...]`.

    Returns:
      The batch with `image` uint8 `[B, H, W, C]`, or `[N, B, H, W, C]`, in
      place of `row`.
    """
    placed = dict(sharding.shard_batch(batch, self._mesh, stacked=stacked))
    rows = placed.pop('row')
    return placed | {'image': self._gather[stacked](self._pixels, rows)}
