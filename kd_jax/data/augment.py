"""Pre-processing on the devices: normalisation, and keyed augmentation.

Pure functions of a batch. What happens to an image depends on (seed, example
id, epoch) and on nothing else, so that teacher and student, a resumed run, any
sharding and cached teacher outputs all see the same crop.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.data.sources import ImageData
from kd_jax.types import Batch

_CHUNK = 1024


def make_preprocess(
  *,
  mean: Sequence[float],
  std: Sequence[float],
  crop_padding: int = 0,
  flip: bool = False,
  seed: int = 0,
) -> Callable[..., dict[str, jax.Array]]:
  """Makes the function between a batch of `pipeline` and a network.

  Args:
    mean: per channel, of pixels in 0..1, see `channel_statistics`.
    std: per channel, likewise; positive.
    crop_padding: in training, pads with this many black pixels on every side
      and crops to the old size at a random place; 0 does neither.
    flip: in training, mirrors half of the images left to right.
    seed: of the augmentation.

  Returns:
    `preprocess(batch, *, train) -> batch`, whose `image`, uint8
    `[B, H, W, C]`, becomes float32 `(image / 255 - mean) / std`; the other
    fields pass through. Augmentation, which only `train=True` applies, needs
    the int32 `[B]` fields `id` and `epoch`. It may be transformed by jit and
    vmap, and run inside shard_map and pmap. It raises ValueError for images of
    another dtype or shape, and for augmentation without `id` and `epoch`.

  Raises:
    ValueError: if `mean` and `std` do not fit together, `std` is not positive
      or `crop_padding` is negative.

  Example:
    >>> preprocess = make_preprocess(mean=(0.5,), std=(0.25,))
    >>> batch = preprocess(
    ...   {'image': np.full((2, 8, 8, 1), 255, np.uint8)}, train=False
    ... )
    >>> batch['image'].dtype, float(batch['image'].max())
    (dtype('float32'), 2.0)
  """
  if len(mean) != len(std):
    raise ValueError(f'mean has {len(mean)} channels but std has {len(std)}.')
  if not min(std) > 0:
    raise ValueError(f'std is {tuple(std)}; it must be positive.')
  if crop_padding < 0:
    raise ValueError(
      f'crop_padding is {crop_padding}; it must not be negative.'
    )

  def augment(
    image: jax.Array, example: jax.Array, epoch: jax.Array
  ) -> jax.Array:
    # Not the default generator, which may be rbg: its draws under vmap depend
    # on the whole batch.
    key = jax.random.key(seed, impl='threefry2x32')
    key = jax.random.fold_in(jax.random.fold_in(key, example), epoch)
    # One draw for all, as every further one makes compilation longer.
    top, left, mirror = jax.random.uniform(key, (3,))
    if crop_padding:
      p = crop_padding
      padded = jnp.pad(image, ((p, p), (p, p), (0, 0)))
      start = [(x * (2 * p + 1)).astype(jnp.int32) for x in (top, left)]
      start.append(jnp.zeros_like(start[0]))
      image = jax.lax.dynamic_slice(padded, start, image.shape)
    if flip:
      image = jnp.where(mirror < 0.5, image[:, ::-1], image)
    return image

  def preprocess(batch: Batch, *, train: bool) -> dict[str, jax.Array]:
    image = _checked_image(batch, len(mean))
    if train and (crop_padding or flip):
      _check_keys(batch)
      image = jax.vmap(augment)(image, batch['id'], batch['epoch'])
    per_channel = (1, 1, 1, len(mean))
    center = jnp.asarray(mean, jnp.float32).reshape(per_channel)
    scale = jnp.asarray(std, jnp.float32).reshape(per_channel)
    image = (image.astype(jnp.float32) / 255 - center) / scale
    return {**batch, 'image': image}

  return preprocess


def channel_statistics(
  data: ImageData,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and standard deviation of every channel, of pixels in 0..1.

  Args:
    data: the images; pass the train split, not what you evaluate on.

  Returns:
    `(mean, std)`, each with one float per channel, over all pixels; sums are
    exact, and the deviation is that of the population.
  """
  total = np.zeros(data.image.shape[-1], np.int64)
  squares = np.zeros_like(total)
  for start in range(0, len(data), _CHUNK):
    chunk = data.image[start : start + _CHUNK].astype(np.int64)
    total += chunk.sum((0, 1, 2))
    squares += (chunk**2).sum((0, 1, 2))
  pixels = data.image.size // data.image.shape[-1]
  mean = total / pixels
  std = np.sqrt(squares / pixels - mean**2)
  return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


def _checked_image(batch: Mapping[str, jax.Array], channels: int) -> jax.Array:
  image = jnp.asarray(batch['image'])
  if image.dtype != jnp.uint8 or image.ndim != 4 or image.shape[-1] != channels:
    raise ValueError(
      f'preprocess: image must be uint8 [B, H, W, {channels}], as mean has '
      f'{channels} channels, but it is {image.dtype} {list(image.shape)}.'
    )
  return image


def _check_keys(batch: Mapping[str, jax.Array]) -> None:
  missing = [name for name in ('id', 'epoch') if name not in batch]
  if missing:
    raise ValueError(
      'preprocess: augmentation is keyed by (seed, id, epoch), but the batch '
      f'has no {" and no ".join(repr(name) for name in missing)}.'
    )
