"""Small fake data sets under the names of public ones, as TFDS prepares them.

Owns random images and labels on disk, written by the builder that TFDS has
for the name, so that version, features and file names are the real ones.
Needs neither a network nor TensorFlow.
"""

import io
import os

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

NAMES = ('cifar100', 'imagenet2012')


def prepare(
  name: str,
  directory: str | os.PathLike[str],
  *,
  examples: int = 64,
  secret_test: bool = False,
) -> None:
  """Writes a fake data set; `tfds.builder(name, data_dir=directory)` reads it.

  Args:
    name: 'cifar100' (PNG, 32x32x3; train and test) or 'imagenet2012' (JPEG of
      40 to 100 pixels a side, every eighth without colour; train and
      validation).
    directory: the `data_dir` to write to.
    examples: of every split.
    secret_test: adds the test split of 'imagenet2012', whose labels are -1.
  """
  if name not in NAMES:
    raise ValueError(f'There is no fake {name!r}: use {" or ".join(NAMES)}.')
  builder = tfds.builder(name, data_dir=directory)
  generate = {'cifar100': _cifar100, 'imagenet2012': _imagenet2012}[name]
  splits = ['train', 'test' if name == 'cifar100' else 'validation']
  if secret_test:
    splits.append('test')
  if name == 'cifar100':
    # The downloaded files hold the names of its classes.
    for label, number in (('label', 100), ('coarse_label', 20)):
      names = [f'{label} {i}' for i in range(number)]
      builder.info.features[label].names = names

  # The builder's own would look for the downloaded files.
  def split_generators(dl_manager):
    del dl_manager
    return {
      split: generate(split, examples, secret=secret_test and split == 'test')
      for split in splits
    }

  builder._split_generators = split_generators
  builder.download_and_prepare(file_format='array_record')


def _cifar100(split: str, examples: int, *, secret: bool):
  del secret
  rng = np.random.default_rng(len(split))
  for i in range(examples):
    yield (
      i,
      {
        'id': f'{split}_{i:05d}',
        'image': _encode(rng.integers(0, 256, (32, 32, 3), np.uint8), 'png'),
        'label': i % 100,
        'coarse_label': i % 20,
      },
    )


def _imagenet2012(split: str, examples: int, *, secret: bool):
  rng = np.random.default_rng(len(split))
  for i in range(examples):
    height, width = rng.integers(40, 101, 2)
    shape = (height, width) if i % 8 == 7 else (height, width, 3)
    file_name = f'{split}_{i:05d}.JPEG'
    yield (
      file_name,
      {
        'image': _encode(rng.integers(0, 256, shape, np.uint8), 'jpeg'),
        'label': -1 if secret else 37 * i % 1000,
        'file_name': file_name,
      },
    )


def _encode(image: np.ndarray, encoding: str) -> io.BytesIO:
  # TFDS itself would encode an array with TensorFlow.
  encoded = io.BytesIO()
  PIL.Image.fromarray(image).save(encoded, format=encoding)
  encoded.seek(0)
  return encoded
