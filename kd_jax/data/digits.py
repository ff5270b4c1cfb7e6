"""Scikit-learn's digits as a TFDS data set; the images ship in its wheel.

Owns the conversion only. Importing this module imports TFDS and scikit-learn,
so nothing but `sources` does, and only when the digits are asked for.
"""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import sklearn.datasets
import tensorflow_datasets as tfds

_HELD_OUT = 5


class Digits(tfds.core.GeneratorBasedBuilder):
  """1797 handwritten digits, 8x8 pixels, one channel.

  The 17 levels of the source, 0 to 16, are stretched to 0..255 in `uint8`.
  Every fifth image of every class, from the third on, is the test split: the
  same 359 images on every machine, as balanced as the source. The source does
  not name the writers, so the two splits share them.
  """

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First release.'}

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description='Optical recognition of handwritten digits, 8x8 pixels.',
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(
            shape=(8, 8, 1), dtype=np.uint8, encoding_format='png'
          ),
          'label': tfds.features.ClassLabel(num_classes=10),
        }
      ),
      supervised_keys=('image', 'label'),
      homepage='https://archive.ics.uci.edu/dataset/80',
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    del dl_manager
    digits = sklearn.datasets.load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)[..., None]
    labels = digits.target
    rank = np.zeros_like(labels)
    for label in range(10):
      members = labels == label
      rank[members] = np.arange(members.sum())
    test = rank % _HELD_OUT == _HELD_OUT // 2
    return {
      'train': self._generate_examples(images, labels, np.flatnonzero(~test)),
      'test': self._generate_examples(images, labels, np.flatnonzero(test)),
    }

  def _generate_examples(
    self, images: np.ndarray, labels: np.ndarray, positions: np.ndarray
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    for i in positions:
      # TFDS itself would encode an array with TensorFlow.
      png = io.BytesIO()
      PIL.Image.fromarray(images[i][..., 0]).save(png, format='png')
      png.seek(0)
      yield int(i), {'image': png, 'label': int(labels[i])}
