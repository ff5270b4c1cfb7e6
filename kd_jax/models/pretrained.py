"""Weights of PyTorch models, read from safetensors into linen variables.

Owns how an array of theirs becomes one of ours; what they call it is in
`layer_names`. Reading executes nothing, and every array of the file must have
its place. Weights that kd_jax wrote itself are read by
`kd_jax.storage.weights`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
from flax import linen as nn
from flax import traverse_util

from kd_jax import rules
from kd_jax.models.layer_names import Naming, Place, namings, place_of

_HEADS = ('head', 'head_dist')
# What a model without a head lacks.
_ENDS = (*_HEADS, 'head_norm')


def load_pretrained(
  path: str | PathLike[str],
  model: nn.Module,
  *,
  input_shape: Sequence[int] = (224, 224, 3),
  head: bool = True,
  key: jax.Array | None = None,
) -> dict[str, Any]:
  """Variables of a model from the weights of its PyTorch twin.

  Convolutions become HWIO, linear layers `[in, out]`, running statistics
  `batch_stats`, and fused projections of queries, keys and values three
  layers. Which naming a file has is told from its names:

  - `ImageNetResNet`, `CifarResNet`, `CifarBottleneckResNet`: torchvision's,
    which timm shares, and RepDistiller but for bottlenecks, whose own names
    are known too;
  - `VGG`: RepDistiller's, or torchvision's `features` with one linear layer
    `classifier` (with `head=False`, torchvision's own files);
  - `MobileNetV2`, `ConvNeXt`: torchvision's or timm's;
  - `MobileNetV1`: timm's, whose weights need the model's `relu6=True`;
  - `ViT`: timm's, which DeiT shares.

  Args:
    path: a safetensors file, such as `safetensors.torch.save_file` writes from
      a `state_dict`.
    model: the linen model.
    input_shape: `(H, W, C)` of the images; a ViT's positions depend on it.
    head: whether the linear classifier is in the file and fits. If not, the
      file's is left out and the model gets a fresh one.
    key: typed key from which a fresh head is drawn.

  Returns:
    `{'params': ..., 'batch_stats': ...}` (the latter where the model has
    BatchNorm): the tree and shapes of `model.init`, all float32.

  Raises:
    ValueError: if the file cannot be read; if an array is missing, unexpected
      (`num_batches_tracked` is not), of another shape or not float; if no
      naming is known for the model; or if a fresh head is wanted without key.

  Example:
    >>> import tempfile
    >>> from kd_jax.models import CifarResNet
    >>> path = tempfile.mkdtemp() + '/weights.safetensors'
    >>> safetensors.flax.save_file({'fc.bias': jnp.zeros(2)}, path)
    >>> model = CifarResNet(num_classes=2, depth=8)
    >>> load_pretrained(path, model)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: ... lacks 'bn1.bias' for CifarResNet by torchvision's names ...
  """
  known = namings(model)
  has_head = bool(getattr(model, 'num_classes', 0))
  fresh = not head and has_head
  if fresh and key is None:
    raise ValueError(
      'load_pretrained: head=False needs a key for a fresh head.'
    )
  arrays = _read(path)
  images = jnp.zeros((1, *input_shape))
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  ours = traverse_util.flatten_dict(shapes, sep='/')
  if not head:
    ours = {k: v for k, v in ours.items() if k.split('/')[1] not in _HEADS}
  origin, naming = _detect(known, ours, arrays)
  places = {k: place_of(naming, k.split('/', 1)[1]) for k in ours}
  if not head:
    arrays = _without_end(naming, arrays, places)
  reader = f"{type(model).__name__} by {origin}'s names"
  _check_names(path, reader, arrays, places)
  flat = {
    k: _convert(path, arrays[places[k].name], k, v.shape, places[k])
    for k, v in ours.items()
  }
  if fresh and key is not None:
    flat |= _fresh_head(model, key, images)
  return traverse_util.unflatten_dict(flat, sep='/')


def _read(path: str | os.PathLike) -> dict[str, jax.Array]:
  try:
    arrays = safetensors.flax.load_file(path)
  except (OSError, safetensors.SafetensorError) as e:
    raise ValueError(f'{path} cannot be read as safetensors: {e}') from e
  ignored = 'num_batches_tracked'
  return {k: v for k, v in arrays.items() if k.split('.')[-1] != ignored}


def _detect(
  known: Mapping[str, Naming],
  ours: Iterable[str],
  arrays: Mapping[str, jax.Array],
) -> tuple[str, Naming]:
  """The naming of which the file has most, and its origin."""

  def found(item):
    places = [place_of(item[1], path.split('/', 1)[1]) for path in ours]
    return sum(p.name in arrays for p in places)

  return max(known.items(), key=found)


def _without_end(
  naming: Naming, arrays: Mapping[str, jax.Array], places: Mapping[str, Place]
) -> dict[str, jax.Array]:
  """The file's arrays without those of its head."""
  prefixes = tuple(
    f'{name}.' for pattern, name, *_ in naming if pattern in _ENDS
  )
  wanted = {place.name for place in places.values()}
  return {
    k: v for k, v in arrays.items() if k in wanted or not k.startswith(prefixes)
  }


def _check_names(
  path: str | os.PathLike,
  reader: str,
  arrays: Mapping[str, jax.Array],
  places: Mapping[str, Place],
) -> None:
  expected = {place.name for place in places.values()}
  missing, unexpected = expected - set(arrays), set(arrays) - expected
  if missing:
    name, others = min(missing), ''
    if unexpected:
      others = f'; it has others: {rules.near_misses(name, sorted(unexpected))}'
    raise ValueError(
      f'{path} lacks {name!r} for {reader} ({len(missing)} of '
      f'{len(expected)} are missing){others}'
    )
  if unexpected:
    name = min(unexpected)
    raise ValueError(
      f'{path} has {name!r}, which has no place in {reader} '
      f'({len(unexpected)} have none): '
      f'{rules.near_misses(name, sorted(expected))}'
    )


def _fresh_head(
  model: nn.Module, key: jax.Array, images: jax.Array
) -> dict[str, jax.Array]:
  """What `model.init` draws for the heads, and nothing else."""

  def draw(key):
    flat = traverse_util.flatten_dict(model.init(key, images), sep='/')
    return {k: v for k, v in flat.items() if k.split('/')[1] in _HEADS}

  return jax.jit(draw)(key)


def _convert(
  path: str | os.PathLike,
  x: jax.Array,
  ours: str,
  shape: Sequence[int],
  place: Place,
) -> jax.Array:
  """One array in our layout, checked."""
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f'{path}: {place.name!r} is {x.dtype}, not a float.')
  theirs = _their_shape(ours, shape, place)
  if x.shape != theirs:
    hint = ''
    if ours.split('/')[1] in _HEADS:
      hint = ' Load with head=False to keep a fresh head.'
    raise ValueError(
      f'{path}: {place.name!r} has shape {x.shape}, but the model needs '
      f'{theirs} for {ours!r}.{hint}'
    )
  # On the host, where nothing is compiled for each shape.
  values = np.asarray(x, np.float32)
  if place.third is not None:
    values = np.split(values, 3)[place.third]
  if ours.endswith('/kernel'):
    values = values.transpose((2, 3, 1, 0) if values.ndim == 4 else (1, 0))
  return jnp.asarray(values.reshape(shape))


def _their_shape(
  ours: str, shape: Sequence[int], place: Place
) -> tuple[int, ...]:
  if ours.endswith('/kernel'):
    shape = (*shape[:-3:-1], *shape[:-2])
  if place.name.endswith('.layer_scale'):
    shape = (*shape, 1, 1)
  if place.third is not None:
    shape = (3 * shape[0], *shape[1:])
  return tuple(shape)
