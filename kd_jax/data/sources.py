"""Data sets: from a TFDS name to the images of a split.

Owns the validation split, and how records become examples; knows nothing about
batches. Images are decoded once and live in memory, which suits sets up to a
few gigabytes of pixels, or are streamed, see `streamed`. Finding and preparing
a data set is `builders`.
"""

import os
import re
from typing import Any

import numpy as np

from kd_jax.data import builders
from kd_jax.data.examples import ImageData
from kd_jax.data.prepared import Records
from kd_jax.data.streamed import StreamedImages
from kd_jax.rules import near_misses
from kd_jax.storage.mirror import cached, is_remote

SPLITS = ('train', 'validation', 'test')
_CHUNK = 1024

Images = ImageData | StreamedImages


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

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as data_dir:
    ...   images = load_images('digits', 'test', data_dir=data_dir)
    >>> images.image.shape, images.num_classes
    ((359, 8, 8, 1), 10)
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
  builder = builders.prepared_builder(name, data_dir, labelled)
  tfds_split = builders.tfds_split(name, split, builder, labelled)
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
    records = builders.records(builder, tfds_split, encoded=True)
    _permit_open_files(builder.info.splits[tfds_split].num_shards)
    return StreamedImages(records, ids, class_names, image_size)
  with builders.silenced():
    image, label = _decode(
      builders.records(builder, tfds_split), positions, name, labelled
    )
  if label is not None and not (
    label.min() >= 0 and label.max() < len(class_names)
  ):
    raise ValueError(
      f'The {tfds_split} split of {name!r} has labels from {label.min()} to '
      f'{label.max()}, but there are {len(class_names)} classes.'
    )
  return ImageData(image, label, ids, class_names)


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


def _permit_open_files(number: int) -> None:
  """Raises this process's limit of open files by a number, if it may."""
  # A reader keeps every shard open, and ImageNet has as many shards as many
  # systems allow files.
  import resource

  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft == resource.RLIM_INFINITY:
    return
  wanted = soft + number
  if hard != resource.RLIM_INFINITY:
    wanted = min(wanted, hard)
  resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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
