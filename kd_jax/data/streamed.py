"""Images that do not fit in memory: records read and decoded as needed.

Owns the reading, decoding and cropping of chosen examples on threads; which
examples a step sees is `pipeline`, and what is drawn how is `crops`.
"""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from kd_jax.data import crops
from kd_jax.data.prepared import ByPosition


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedImages:
  """Images of one split that stay on disk, seen through crops of one size.

  Has the members of `ImageData` but `image` and `label`, which would need a
  pass over all records: `read` gives both for the rows that a batch needs.

  Attributes:
    records: position in the TFDS split -> a mapping with `image`, the encoded
      bytes (JPEG, PNG), and `label` if there are class names. Must allow
      reads from several threads.
    id: int32 `[N]`, the positions of this split's examples in `records`.
    class_names: one name per class; empty for images without labels.
    image_size: S, the height and width of what `read` returns.
    num_threads: that read and decode; one for every processor when None.

  Raises:
    ValueError: if `image_size` or `num_threads` is not positive, or `id` is
      not int32 `[N]`.

  Example:
    >>> import io, PIL.Image
    >>> jpeg = io.BytesIO()
    >>> PIL.Image.new('RGB', (500, 375)).save(jpeg, format='jpeg')
    >>> data = StreamedImages(
    ...   records=[{'image': jpeg.getvalue(), 'label': 1}] * 5,
    ...   id=np.arange(5, dtype=np.int32),
    ...   class_names=('even', 'odd'),
    ...   image_size=32,
    ... )
    >>> len(data), data.num_classes, data.image_shape
    (5, 2, (32, 32, 3))
    >>> data.read([0, 3])['image'].shape
    (2, 32, 32, 3)
  """

  records: ByPosition
  id: np.ndarray
  class_names: tuple[str, ...]
  image_size: int
  num_threads: int | None = None

  # How many batches to read ahead of the one in use.
  prefetch: ClassVar[int] = 2

  def __post_init__(self) -> None:
    if self.image_size < 1:
      raise ValueError(f'image_size is {self.image_size}; it must be positive.')
    if self.num_threads is not None and self.num_threads < 1:
      raise ValueError(
        f'num_threads is {self.num_threads}; it must be positive, or None.'
      )
    if self.id.dtype != np.int32 or self.id.ndim != 1:
      raise ValueError(
        'StreamedImages.id must be int32 [any], not '
        f'{self.id.dtype} {list(self.id.shape)}.'
      )

  def __len__(self) -> int:
    return len(self.id)

  @property
  def labelled(self) -> bool:
    """Whether `read` returns labels."""
    return bool(self.class_names)

  @property
  def num_classes(self) -> int:
    """Number of classes, those without an image in this split included."""
    return len(self.class_names)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Height, width and channels of what `read` returns."""
    return self.image_size, self.image_size, 3

  @property
  def input(self) -> jax.ShapeDtypeStruct:
    """One image: uint8 `[S, S, 3]`."""
    return jax.ShapeDtypeStruct(self.image_shape, np.uint8)

  @property
  def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Those of `ImageData` would take a pass over all records: a ValueError."""
    raise ValueError(
      'The images are streamed, and the statistics of their channels would '
      'take a pass over all: give data.mean and data.std as published.'
    )

  def read(
    self,
    rows: Sequence[int] | np.ndarray,
    *,
    key: tuple[int, int] | None = None,
  ) -> dict[str, np.ndarray]:
    """Reads, decodes and crops some examples.

    Args:
      rows: `[n]` positions in this split, in `[0, len(self))`.
      key: `(seed, epoch)` of a random crop for training; None for the central
        crop of evaluation.

    Returns:
      `image` uint8 `[n, S, S, 3]`, `id` int32 `[n]` and, if labelled, `label`
      int32 `[n]`. The crop of an example depends on the key and its id alone.

    Raises:
      ValueError: if an image cannot be decoded or a label is out of range.
    """
    ids = self.id[np.asarray(rows)]
    read = functools.partial(self._read, key=key)
    examples = list(self._threads.map(read, ids.tolist()))
    image = np.empty((len(ids), *self.image_shape), np.uint8)
    for i, (pixels, _) in enumerate(examples):
      image[i] = pixels
    batch = {'image': image, 'id': ids}
    if self.labelled:
      batch['label'] = np.array([label for _, label in examples], np.int32)
    return batch

  def __getstate__(self) -> dict[str, Any]:
    # Worker processes start threads of their own.
    return {k: v for k, v in self.__dict__.items() if k != '_threads'}

  @functools.cached_property
  def _threads(self) -> concurrent.futures.ThreadPoolExecutor:
    # Threads suffice: Pillow lets go of the interpreter while it decodes.
    return concurrent.futures.ThreadPoolExecutor(
      self.num_threads or os.cpu_count(), thread_name_prefix='kd-jax-read'
    )

  def _read(
    self, example: int, key: tuple[int, int] | None
  ) -> tuple[np.ndarray, int | None]:
    record = self.records[example]
    label = None
    if self.labelled:
      label = int(record['label'])
      if not 0 <= label < self.num_classes:
        raise ValueError(
          f'Example {example} has label {label}, but there are '
          f'{self.num_classes} classes.'
        )
    try:
      if key is None:
        image = crops.decode_central_crop(record['image'], self.image_size)
      else:
        seed, epoch = key
        image = crops.decode_random_crop(
          record['image'],
          self.image_size,
          seed=seed,
          example=example,
          epoch=epoch,
        )
    except Exception as e:  # Pillow raises all kinds for damaged images
      raise ValueError(
        f'The image of example {example} cannot be decoded: {e}'
      ) from e
    return image, label
