"""Pre-processing on the devices: normalisation, and keyed augmentation.

Owns pure functions of a batch; crops of streamed images are `crops`'. What
happens to an image depends on (seed, example id, epoch) and on nothing else, so
that teacher and student, a resumed run, any sharding and cached teacher outputs
all see the same crop. Mixup depends on the keys of both images of a pair.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.types import Batch

# Beyond every id, so that mixup's keys are none of a crop's.
_MIXUP = 2**31


def make_preprocess(
  *,
  mean: Sequence[float],
  std: Sequence[float],
  crop_padding: int = 0,
  flip: bool = False,
  mixup: float = 0.0,
  seed: int = 0,
) -> Callable[..., dict[str, jax.Array]]:
  """Makes the function between a batch of `pipeline` and a network.

  Args:
    mean: per channel, of pixels in 0..1, see `ImageData.statistics`.
    std: per channel, likewise; positive.
    crop_padding: in training, pads with this many black pixels on every side
      and crops to the old size at a random place; 0 does neither.
    flip: in training, mirrors half of the images left to right.
    mixup: in training, mixes every image with its neighbour in the batch, 0
      with 1, 2 with 3 and so on, when positive. One share is drawn for a pair
      from Beta(mixup, mixup): 1 is uniform, as in consistent teaching, where
      the teacher sees the mixed images too. Batches are shuffled, so
      neighbours are random.
    seed: of the augmentation.

  Returns:
    `preprocess(batch, *, train) -> batch`, whose `image`, uint8
    `[B, H, W, C]`, becomes float32 `(image / 255 - mean) / std`; the other
    fields pass through. Augmentation, which only `train=True` applies, needs
    the int32 `[B]` fields `id` and `epoch`. It may be transformed by jit and
    vmap, and run inside shard_map and pmap. It raises ValueError for images of
    another dtype or shape, for augmentation without `id` and `epoch`, and for
    mixup of an odd number of images; inside shard_map and pmap a device's
    number counts, so that no pair is split over two.

    Mixup adds `mix_weight` float32 `[B]`, the share w of an image's own pixels
    and label in `w * own + (1 - w) * neighbour`, the same for both of a pair,
    and, if there is `label`, `mix_label`, the neighbour's. A loss of labels is
    `w * loss(label) + (1 - w) * loss(mix_label)`.

  Raises:
    ValueError: if `mean` and `std` do not fit together, `std` is not positive,
      or `crop_padding` or `mixup` is negative.

  References:
    Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2017,
    arXiv:1710.09412; Beyer et al., "Knowledge distillation: A good teacher is
    patient and consistent", 2021, arXiv:2106.05237.

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
  if mixup < 0:
    raise ValueError(f'mixup is {mixup}; it must not be negative.')

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
    image = image.astype(jnp.float32)
    mixed: dict[str, jax.Array] = {}
    if train and mixup:
      _check_keys(batch)
      image, mixed = _mix(image, batch, alpha=mixup, seed=seed)
    per_channel = (1, 1, 1, len(mean))
    center = jnp.asarray(mean, jnp.float32).reshape(per_channel)
    scale = jnp.asarray(std, jnp.float32).reshape(per_channel)
    image = (image / 255 - center) / scale
    return {**batch, **mixed, 'image': image}

  return preprocess


def renormalize(
  image: jax.Array,
  *,
  mean: Sequence[float],
  std: Sequence[float],
  to_mean: Sequence[float],
  to_std: Sequence[float],
) -> jax.Array:
  """Images normalised for one network, as another network wants them.

  Args:
    image: float `[..., C]`, `(pixel - mean) / std`.
    mean: per channel, what was subtracted; C numbers.
    std: per channel, what was divided by; C positive numbers.
    to_mean: per channel, what shall be subtracted instead.
    to_std: per channel, what shall be divided by instead; positive.

  Returns:
    `(pixel - to_mean) / to_std`, of the shape and dtype of `image`.

  Raises:
    ValueError: if `image` is not float, an argument has not one number for
      every channel, or a deviation is not positive.

  Example:
    >>> image = (jnp.full((1, 4, 4, 1), 0.75) - 0.5) / 0.25
    >>> image = renormalize(
    ...   image, mean=(0.5,), std=(0.25,), to_mean=(0.0,), to_std=(1.0,)
    ... )
    >>> float(image[0, 0, 0, 0])
    0.75
  """
  if not jnp.issubdtype(image.dtype, jnp.floating):
    raise ValueError(f'renormalize: image must be float, not {image.dtype}.')
  arguments = {'mean': mean, 'std': std, 'to_mean': to_mean, 'to_std': to_std}
  for name, numbers in arguments.items():
    if len(numbers) != image.shape[-1]:
      raise ValueError(
        f'renormalize: {name} has {len(numbers)} channels but the image has '
        f'{image.shape[-1]}.'
      )
    if name.endswith('std') and not min(numbers) > 0:
      raise ValueError(
        f'renormalize: {name} is {tuple(numbers)}; it must be positive.'
      )
  scale = np.divide(std, to_std)
  shift = np.subtract(mean, to_mean) / np.asarray(to_std)
  scale, shift = (
    jnp.asarray(x, image.dtype).reshape((1,) * (image.ndim - 1) + (-1,))
    for x in (scale, shift)
  )
  return image * scale + shift


def resize(image: jax.Array, size: int) -> jax.Array:
  """Images at the resolution of another network.

  Args:
    image: float `[B, H, W, C]`.
    size: height and width of the result, in pixels; an image that is not
      square is stretched.

  Returns:
    `[B, size, size, C]` of the same dtype, resampled bilinearly; a smaller
    image is antialiased.

  Raises:
    ValueError: if `image` is not float `[B, H, W, C]` or `size` not positive.

  Example:
    >>> resize(jnp.ones((2, 32, 32, 3)), 224).shape
    (2, 224, 224, 3)
  """
  if image.ndim != 4 or not jnp.issubdtype(image.dtype, jnp.floating):
    raise ValueError(
      'resize: image must be float [B, H, W, C], but it is '
      f'{image.dtype} {list(image.shape)}.'
    )
  if size < 1:
    raise ValueError(f'resize: size is {size}; it must be positive.')
  shape = (image.shape[0], size, size, image.shape[-1])
  return jax.image.resize(image, shape, 'bilinear', antialias=True)


def _mix(
  image: jax.Array, batch: Batch, *, alpha: float, seed: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Every image mixed with its neighbour, and the fields that say how."""
  if image.shape[0] % 2:
    raise ValueError(
      'preprocess: mixup mixes pairs of images, but the batch of this device '
      f'has {image.shape[0]}: choose an even number.'
    )

  def pairs(array: jax.Array) -> jax.Array:
    return jnp.reshape(array, (-1, 2, *array.shape[1:]))

  def of_neighbour(array: jax.Array) -> jax.Array:
    return jnp.reshape(pairs(array)[:, ::-1], array.shape)

  def draw(examples: jax.Array, epochs: jax.Array) -> jax.Array:
    key = jax.random.key(seed, impl='threefry2x32')
    for number in (np.uint32(_MIXUP), *examples, epochs[0]):
      key = jax.random.fold_in(key, number)
    # Beta(1, 1), for which the general draw would compile for seconds.
    if alpha == 1:
      return jax.random.uniform(key)
    return jax.random.beta(key, alpha, alpha)

  share = jax.vmap(draw)(pairs(batch['id']), pairs(batch['epoch']))
  mixed = {'mix_weight': jnp.repeat(share, 2)}
  if 'label' in batch:
    mixed['mix_label'] = of_neighbour(batch['label'])
  own = jnp.reshape(mixed['mix_weight'], (-1, 1, 1, 1))
  return own * image + (1 - own) * of_neighbour(image), mixed


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
