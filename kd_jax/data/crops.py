"""Encoded images to crops of one size, on the host.

Owns the geometry and the resampling of streamed images, with Pillow; knows
nothing about data sets or batches. The random crop is keyed by (seed, example
id, epoch) like the augmentation on the devices, which is `augment`.
"""

import io
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
  import PIL.Image

_SCALE = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)
_ATTEMPTS = 10
# The short side of an image before a central crop of 1.
_SHORT_SIDE = 256 / 224


def random_crop_box(
  width: int, height: int, *, seed: int, example: int, epoch: int
) -> tuple[int, int, int, int]:
  """A random window of an image: the "inception crop".

  Its area is 8 % to 100 % of the image's and its width 3/4 to 4/3 of its
  height, both drawn anew up to ten times until the window fits; then the
  largest central window of such a shape is taken.

  Args:
    width: of the image, in pixels.
    height: of the image, in pixels.
    seed: of the augmentation, in `[0, 2**32)`.
    example: the id of the image.
    epoch: the window of an image changes with it.

  Returns:
    `(left, top, right, bottom)` in pixels. The draws come from Philox, whose
    stream NumPy keeps, and depend on (seed, example, epoch) alone.

  References:
    Szegedy et al., "Going Deeper with Convolutions", 2014, arXiv:1409.4842.

  Example:
    >>> random_crop_box(500, 375, seed=0, example=7, epoch=0)
    (91, 64, 294, 299)
  """
  draws = np.random.Philox(
    key=np.array([seed, epoch], np.uint64),
    counter=np.array([0, example, 0, 0], np.uint64),
  ).random_raw(4 * _ATTEMPTS)
  uniform = (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53
  for area, ratio, x, y in uniform.reshape(_ATTEMPTS, 4).tolist():
    area = (_SCALE[0] + area * (_SCALE[1] - _SCALE[0])) * width * height
    low, high = map(math.log, _RATIO)
    ratio = math.exp(low + ratio * (high - low))
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
      return left, top, left + w, top + h
  w = min(width, max(1, round(height * _RATIO[1])))
  h = min(height, max(1, round(width / _RATIO[0])))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def decode_random_crop(
  encoded: bytes, size: int, *, seed: int, example: int, epoch: int
) -> np.ndarray:
  """Decodes an image, crops `random_crop_box` and resizes it to a square.

  Args:
    encoded: JPEG, PNG or whatever Pillow reads.
    size: of the result, in pixels.
    seed: see `random_crop_box`, as for `example` and `epoch`.
    example: likewise.
    epoch: likewise.

  Returns:
    uint8 `[size, size, 3]`, resampled bilinearly with antialiasing.

  Raises:
    OSError: if Pillow cannot decode the image.
  """
  image = _decode(encoded)
  box = random_crop_box(*image.size, seed=seed, example=example, epoch=epoch)
  return np.asarray(_resize(image.crop(box), (size, size)))


def decode_central_crop(encoded: bytes, size: int) -> np.ndarray:
  """Decodes an image, resizes its short side and crops the central square.

  Args:
    encoded: JPEG, PNG or whatever Pillow reads.
    size: of the result, in pixels. The short side becomes 256/224 of it, as
      evaluation on ImageNet has it.

  Returns:
    uint8 `[size, size, 3]`, resampled bilinearly with antialiasing.

  Raises:
    OSError: if Pillow cannot decode the image.
  """
  image = _decode(encoded)
  short, shortest = round(size * _SHORT_SIDE), min(image.size)
  width, height = (short * n // shortest for n in image.size)
  image = _resize(image, (width, height))
  left, top = ((n - size) // 2 for n in image.size)
  return np.asarray(image.crop((left, top, left + size, top + size)))


# Pillow is imported when an image is decoded, to keep `import kd_jax` light.
def _decode(encoded: bytes) -> 'PIL.Image.Image':
  import PIL.Image

  return PIL.Image.open(io.BytesIO(encoded)).convert('RGB')


def _resize(
  image: 'PIL.Image.Image', size: tuple[int, int]
) -> 'PIL.Image.Image':
  import PIL.Image

  return image.resize(size, PIL.Image.Resampling.BILINEAR)
