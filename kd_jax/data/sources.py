"""Data sets: from a TFDS name to the images of a split.

Owns finding and preparing, the validation split and the messages when a data
set cannot be read; knows nothing about batches. Images are decoded once and
live in memory, which suits sets up to a few gigabytes of pixels, or are
streamed, see `streamed`.
"""

import contextlib
import dataclasses
import importlib.util
import io
import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from kd_jax.data.prepared import Records, identify
from kd_jax.data.streamed import StreamedImages
from kd_jax.rules import near_misses
from kd_jax.storage.mirror import cached, is_remote

SPLITS = ('train', 'validation', 'test')
_CHUNK = 1024


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

  def __post_init__(self) -> None:
    n = len(self.id if self.label is None else self.label)
    _check_array('image', self.image, np.uint8, (n, -1, -1, -1))
    _check_array('id', self.id, np.int32, (n,))
    if self.label is not None:
      _check_array('label', self.label, np.int32, (n,))

  def __len__(self) -> int:
    return len(self.id)

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
    rows = np.asarray(rows)
    batch = {'image': self.image[rows], 'id': self.id[rows]}
    if self.label is not None:
      batch['label'] = self.label[rows]
    return batch


Images = ImageData | StreamedImages


class Examples(Protocol):
  """What `pipeline` makes batches of: `Images`, or `ResidentImages`.

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


def load_images(
  name: str,
  split: str,
  *,
  data_dir: str | os.PathLike[str] | None = None,
  validation: float = 0.1,
  max_examples: int | None = None,
  image_size: int | None = None,
  labelled: bool = True,
) -> Images:
  """The images of one split of a data set.

  Validation is carved from the TFDS train split by a permutation that depends
  on nothing but the split's size, so it is the same for all runs and seeds;
  'train' is the rest. 'test' is the TFDS test split or, for a set without one
  or whose test labels are secret (ImageNet), its validation split.

  Args:
    name: 'digits' (no download, prepared on first use), or any TFDS data set
      with the features `image` and `label`, such as 'fashion_mnist'.
    split: 'train', 'validation' or 'test'.
    data_dir: where TFDS keeps prepared data; its default directory when None.
      Of a URL such as 'gs://bucket/tfds' the data set is copied to this
      machine, into ~/.cache/kd_jax.
    validation: the share of the TFDS train split to hold out, in `[0, 1)`.
    max_examples: keep at most this many, chosen by the same permutation; all
      when None.
    image_size: None decodes all images into memory, as they are; they must be
      of one size. A number streams crops of so many pixels from disk, in RGB:
      see `StreamedImages`.
    labelled: False ignores labels, and takes a set that has none.

  Returns:
    The images in the order of the TFDS split.

  Raises:
    ValueError: for an unknown name or split, a share or number out of range,
      or a data set that does not consist of uint8 images, with labels if
      `labelled` and of one size if `image_size` is None.
    ImportError: for the few data sets that TFDS reads with TensorFlow only.
    FileNotFoundError: if the data set is not prepared in `data_dir` and
      TensorFlow, with which TFDS prepares public sets, is not installed.
  """
  if split not in SPLITS:
    raise ValueError(f'Unknown split {split!r}: {near_misses(split, SPLITS)}')
  if not 0 <= validation < 1:
    raise ValueError(f'validation is {validation}; it must be in [0, 1).')
  for argument, number in (
    ('max_examples', max_examples),
    ('image_size', image_size),
  ):
    if number is not None and number < 1:
      raise ValueError(f'{argument} is {number}; it must be positive.')
  if data_dir is not None and is_remote(data_dir):
    # Random access to records in a bucket takes a request for each.
    data_dir = cached(data_dir, re.split('[:/]', name)[0])
  builder = _prepared_builder(name, data_dir, labelled)
  tfds_split = _tfds_split(name, split, builder, labelled)
  size = builder.info.splits[tfds_split].num_examples
  positions = _positions(split, size, validation, max_examples)
  if not len(positions):
    raise ValueError(
      f'validation={validation} of {size} examples of {name!r} leaves none '
      f'for the {split} split.'
    )
  features = builder.info.features
  class_names = tuple(features['label'].names) if labelled else ()
  ids = positions.astype(np.int32)
  if image_size is not None:
    _check_dtype(name, features['image'].np_dtype)
    records = _records(builder, tfds_split, encoded=True)
    _permit_open_files(builder.info.splits[tfds_split].num_shards)
    return StreamedImages(records, ids, class_names, image_size)
  with _silence():
    image, label = _decode(
      _records(builder, tfds_split), positions, name, labelled
    )
  if label is not None and not (
    label.min() >= 0 and label.max() < len(class_names)
  ):
    raise ValueError(
      f'The {tfds_split} split of {name!r} has labels from {label.min()} to '
      f'{label.max()}, but there are {len(class_names)} classes.'
    )
  return ImageData(image, label, ids, class_names)


def identity(
  name: str, *, data_dir: str | os.PathLike[str] | None = None
) -> dict[str, str]:
  """What tells a prepared data set from another; see `prepared.identify`.

  Args:
    name: see `load_images`, as for `data_dir`.
    data_dir: likewise.

  Raises:
    ValueError: as `load_images`, for an unknown name.
    FileNotFoundError: likewise, if the data set is not prepared.
  """
  builder = _prepared_builder(name, data_dir, labelled=False)
  return identify(builder.data_path)


def _positions(
  split: str, size: int, validation: float, max_examples: int | None
) -> np.ndarray:
  """Which records of a TFDS split belong to a split of ours, ascending."""
  # The stream of RandomState is frozen; that of a numpy Generator may change
  # with a new numpy, and the validation split with it.
  order = np.random.RandomState(0).permutation(size)
  held_out = round(size * validation)
  if split == 'validation':
    order = order[:held_out]
  elif split == 'train':
    order = order[held_out:]
  return np.sort(order[:max_examples])


def _tfds_split(name: str, split: str, builder: Any, labelled: bool) -> str:
  splits = builder.info.splits
  wanted = ('test', 'validation') if split == 'test' else ('train',)
  found = [candidate for candidate in wanted if candidate in splits]
  if not found:
    raise ValueError(
      f'{name!r} has no split for {split!r}; it has {", ".join(splits)}.'
    )
  if len(found) == 1 or not labelled:
    return found[0]
  # TFDS gives the label -1 to the images of a benchmark's secret test.
  secret = _records(builder, found[0], encoded=True)[0]['label'] < 0
  return found[1] if secret else found[0]


def _records(
  builder: Any, tfds_split: str, *, encoded: bool = False
) -> Records:
  """The records of a TFDS split, with images decoded or as bytes."""
  import tensorflow_datasets as tfds  # noqa: PLC0415

  decoders = {'image': tfds.decode.SkipDecoding()} if encoded else None
  split = builder.info.splits[tfds_split]
  shards = list(
    zip(map(str, split.filepaths), split.shard_lengths, strict=True)
  )
  try:
    source = builder.as_data_source(tfds_split, decoders=decoders)
    return Records(source, shards)
  except NotImplementedError as e:
    raise ValueError(
      f'{builder.name!r} in {builder.data_path} is prepared in a format '
      "without random access; prepare it with file_format='array_record'."
    ) from e


def _permit_open_files(number: int) -> None:
  """Raises this process's limit of open files by a number, if it may."""
  # A reader keeps every shard open, and ImageNet has as many shards as many
  # systems allow files.
  import resource  # noqa: PLC0415

  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft == resource.RLIM_INFINITY:
    return
  wanted = soft + number
  if hard != resource.RLIM_INFINITY:
    wanted = min(wanted, hard)
  resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Described(NamedTuple):
  """What is known of a data set without reading an image.

  Attributes:
    image_shape: height, width and channels; None where images differ.
    class_names: one name per class.
    train_examples: of the TFDS train split; None unless it is prepared here.
  """

  image_shape: tuple[int | None, ...]
  class_names: tuple[str, ...]
  train_examples: int | None


def describe(
  name: str, *, data_dir: str | os.PathLike[str] | None = None
) -> Described:
  """What TFDS says of a labelled data set; prepares and downloads nothing.

  Args:
    name: as for `load_images`, and so is `data_dir`.

  Raises:
    ValueError: as `load_images`, and so ImportError.

  Example:
    >>> describe('cifar100').image_shape
    (32, 32, 3)
  """
  builder = _builder(name, data_dir, labelled=True)
  features, splits = builder.info.features, builder.info.splits
  known = builder.data_path.exists() and 'train' in splits
  return Described(
    tuple(features['image'].shape),
    tuple(features['label'].names),
    splits['train'].num_examples if known else None,
  )


def _builder(
  name: str, data_dir: str | os.PathLike[str] | None, labelled: bool
) -> Any:
  """The TFDS builder of a data set of images, prepared or not."""
  # TFDS costs seconds to import, hence only here and where it is needed.
  import tensorflow_datasets as tfds  # noqa: PLC0415

  def make():
    if name == 'digits':
      from kd_jax.data import digits  # noqa: PLC0415

      return digits.Digits(data_dir=data_dir)
    try:
      return tfds.builder(name, data_dir=data_dir)
    except ValueError:
      known = tfds.list_builders(with_community_datasets=False)
      if re.split('[:/]', name)[0] in known:
        raise
      raise ValueError(
        f'Unknown data set {name!r}: {near_misses(name, {*known, "digits"})}'
      ) from None
    except ImportError as e:
      raise ImportError(
        f'TFDS cannot read {name!r} here, `pip install kd_jax[tfds]` may '
        f'help: {e}'
      ) from e

  builder = make()
  features = builder.info.features
  kinds = {'image': tfds.features.Image}
  if labelled:
    kinds['label'] = tfds.features.ClassLabel
  for feature, kind in kinds.items():
    if not isinstance(dict(features).get(feature), kind):
      raise ValueError(
        f'{name!r} is no image {"classification " if labelled else ""}data '
        f'set: it has no feature {feature!r} of type {kind.__name__}; its '
        f'features are {", ".join(features)}.'
      )
  return builder


def _prepared_builder(
  name: str, data_dir: str | os.PathLike[str] | None, labelled: bool
) -> Any:
  """The same, ready to be read."""
  builder = _builder(name, data_dir, labelled)
  if not builder.data_path.exists():
    # Those that are defined elsewhere need not download nor decode.
    published = type(builder).__module__.startswith('tensorflow_datasets.')
    if published and importlib.util.find_spec('tensorflow') is None:
      raise FileNotFoundError(
        f'Data set {name!r} is not prepared, there is no '
        f'{builder.data_path}: give the data_dir that holds it, or `pip '
        'install kd_jax[tfds]` to let TFDS download and prepare it.'
      )
    _prepare(builder, quiet=not published)
    builder = _builder(name, data_dir, labelled)
  return builder


def _prepare(builder: Any, *, quiet: bool) -> None:
  with _silence() if quiet else contextlib.nullcontext():
    try:
      builder.download_and_prepare(file_format='array_record')
    except OSError:
      # TFDS writes beside the data and renames at the end, which fails when
      # another process was faster; what that one wrote is as good.
      if not builder.data_path.exists():
        raise


@contextlib.contextmanager
def _silence() -> Iterator[None]:
  """Drops what TFDS prints and warns about work of a few seconds."""
  logger = logging.getLogger('absl')
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    with (
      contextlib.redirect_stdout(io.StringIO()),
      contextlib.redirect_stderr(io.StringIO()),
    ):
      yield
  finally:
    logger.setLevel(level)


def _decode(
  records: Records, positions: np.ndarray, name: str, labelled: bool
) -> tuple[np.ndarray, np.ndarray | None]:
  """Images and labels of some records; chunks, as single reads are slow."""
  [first] = records.__getitems__(positions[:1].tolist())
  shape = first['image'].shape
  images = np.empty((len(positions), *shape), np.uint8)
  labels = np.empty(len(positions), np.int32)
  for start in range(0, len(positions), _CHUNK):
    chunk = positions[start : start + _CHUNK].tolist()
    for i, record in enumerate(records.__getitems__(chunk), start):
      image = record['image']
      _check_dtype(name, image.dtype)
      if image.shape != shape:
        raise ValueError(
          f'The images of {name!r} differ in shape, {shape} and {image.shape}; '
          'give image_size to stream crops of one size.'
        )
      images[i] = image
      if labelled:
        labels[i] = record['label']
  return images, labels if labelled else None


def _check_dtype(name: str, dtype: Any) -> None:
  if dtype != np.uint8:
    raise ValueError(
      f'The images of {name!r} are {np.dtype(dtype)}, not uint8.'
    )


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
