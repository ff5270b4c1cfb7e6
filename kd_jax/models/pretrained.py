"""Weights of PyTorch models, read from safetensors into linen variables.

Owns how torchvision and timm name the layers of our models, and how an array
of theirs becomes one of ours. Reading executes nothing, and every array of the
file must have its place. Weights that kd_jax wrote itself are read by
`kd_jax.storage.weights`.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
from flax import linen as nn
from flax import traverse_util

from kd_jax import rules
from kd_jax.models.convnext import ConvNeXt
from kd_jax.models.imagenet_resnet import ImageNetResNet
from kd_jax.models.mobilenet import V2_STAGES, MobileNetV1, MobileNetV2
from kd_jax.models.resnet import CifarBottleneckResNet, CifarResNet
from kd_jax.models.vgg import STAGES as VGG_STAGES
from kd_jax.models.vgg import VGG
from kd_jax.models.vit import ViT

# A naming is a sequence of rows `(pattern, name)` or `(pattern, name, third)`.
# The pattern matches the whole path of one of our layers, or of one parameter
# that is named unlike its layer; the first row that matches counts. The name
# is theirs, with `{group}` for a number of the pattern as it is, and
# `{group0}` for the same number counted from 0. `third` is the third of an
# array in which queries, keys and values lie one after the other.
Naming = Sequence[tuple[str, str] | tuple[str, str, int]]

_BLOCK = r'stage(?P<s>\d+)_block(?P<b>\d+)'

RESNET: Naming = (
  (r'stem', 'conv1'),
  (r'stem_norm', 'bn1'),
  (rf'{_BLOCK}/conv(?P<n>\d)', 'layer{s}.{b0}.conv{n}'),
  (rf'{_BLOCK}/norm(?P<n>\d)', 'layer{s}.{b0}.bn{n}'),
  (rf'{_BLOCK}/conv_shortcut', 'layer{s}.{b0}.downsample.0'),
  (rf'{_BLOCK}/norm_shortcut', 'layer{s}.{b0}.downsample.1'),
  (r'head', 'fc'),
)

# Each stage is a sequence of convolution, norm and ReLU.
VGG_BLOCKS: Naming = (
  *(
    row
    for i in range(4)
    for row in (
      (rf'stage(?P<s>\d)/conv{i + 1}', f'block{{s0}}.{3 * i}'),
      (rf'stage(?P<s>\d)/norm{i + 1}', f'block{{s0}}.{3 * i + 1}'),
    )
  ),
  (r'head', 'classifier'),
)

MOBILENET_V1_TIMM: Naming = (
  (r'stem', 'conv_stem'),
  (r'stem_norm', 'bn1'),
  (rf'{_BLOCK}/conv1', 'blocks.{s0}.{b0}.conv_dw'),
  (rf'{_BLOCK}/conv2', 'blocks.{s0}.{b0}.conv_pw'),
  (rf'{_BLOCK}/norm(?P<n>\d)', 'blocks.{s0}.{b0}.bn{n}'),
  (r'head', 'classifier'),
)

# The first block has no expansion, which the numbers do not skip.
MOBILENET_V2_TIMM: Naming = (
  (r'stem', 'conv_stem'),
  (r'stem_norm', 'bn1'),
  (r'stage1_block1/conv2', 'blocks.0.0.conv_dw'),
  (r'stage1_block1/norm2', 'blocks.0.0.bn1'),
  (r'stage1_block1/conv3', 'blocks.0.0.conv_pw'),
  (r'stage1_block1/norm3', 'blocks.0.0.bn2'),
  (rf'{_BLOCK}/conv1', 'blocks.{s0}.{b0}.conv_pw'),
  (rf'{_BLOCK}/conv2', 'blocks.{s0}.{b0}.conv_dw'),
  (rf'{_BLOCK}/conv3', 'blocks.{s0}.{b0}.conv_pwl'),
  (rf'{_BLOCK}/norm(?P<n>\d)', 'blocks.{s0}.{b0}.bn{n}'),
  (r'last', 'conv_head'),
  (r'last_norm', 'bn2'),
  (r'head', 'classifier'),
)

_V2_BLOCKS = [
  f'stage{s}_block{b}'
  for s, (_, _, blocks, _) in enumerate(V2_STAGES, start=1)
  for b in range(1, blocks + 1)
]
# Blocks of all stages are counted through, after the stem.
MOBILENET_V2_TORCHVISION: Naming = (
  (r'stem', 'features.0.0'),
  (r'stem_norm', 'features.0.1'),
  (r'stage1_block1/conv2', 'features.1.conv.0.0'),
  (r'stage1_block1/norm2', 'features.1.conv.0.1'),
  (r'stage1_block1/conv3', 'features.1.conv.1'),
  (r'stage1_block1/norm3', 'features.1.conv.2'),
  *(
    row
    for i, block in enumerate(_V2_BLOCKS[1:], start=2)
    for row in (
      (rf'{block}/conv1', f'features.{i}.conv.0.0'),
      (rf'{block}/norm1', f'features.{i}.conv.0.1'),
      (rf'{block}/conv2', f'features.{i}.conv.1.0'),
      (rf'{block}/norm2', f'features.{i}.conv.1.1'),
      (rf'{block}/conv3', f'features.{i}.conv.2'),
      (rf'{block}/norm3', f'features.{i}.conv.3'),
    )
  ),
  (r'last', f'features.{len(_V2_BLOCKS) + 1}.0'),
  (r'last_norm', f'features.{len(_V2_BLOCKS) + 1}.1'),
  (r'head', 'classifier.1'),
)

VIT_TIMM: Naming = (
  (r'patch', 'patch_embed.proj'),
  (r'tokens/cls_token', 'cls_token'),
  (r'tokens/dist_token', 'dist_token'),
  (r'tokens/pos_embed', 'pos_embed'),
  (r'block(?P<b>\d+)/norm(?P<n>\d)', 'blocks.{b0}.norm{n}'),
  (r'block(?P<b>\d+)/attention/query', 'blocks.{b0}.attn.qkv', 0),
  (r'block(?P<b>\d+)/attention/key', 'blocks.{b0}.attn.qkv', 1),
  (r'block(?P<b>\d+)/attention/value', 'blocks.{b0}.attn.qkv', 2),
  (r'block(?P<b>\d+)/attention/out', 'blocks.{b0}.attn.proj'),
  (r'block(?P<b>\d+)/mlp/dense(?P<n>\d)', 'blocks.{b0}.mlp.fc{n}'),
  (r'norm', 'norm'),
  (r'head', 'head'),
  (r'head_dist', 'head_dist'),
)

CONVNEXT_TIMM: Naming = (
  (r'stem', 'stem.0'),
  (r'stem_norm', 'stem.1'),
  (r'downsample(?P<s>\d+)_norm', 'stages.{s0}.downsample.0'),
  (r'downsample(?P<s>\d+)', 'stages.{s0}.downsample.1'),
  (rf'{_BLOCK}/conv', 'stages.{s0}.blocks.{b0}.conv_dw'),
  (rf'{_BLOCK}/norm', 'stages.{s0}.blocks.{b0}.norm'),
  (rf'{_BLOCK}/dense(?P<n>\d)', 'stages.{s0}.blocks.{b0}.mlp.fc{n}'),
  (rf'{_BLOCK}/scale/gamma', 'stages.{s0}.blocks.{b0}.gamma'),
  (r'head_norm', 'head.norm'),
  (r'head', 'head.fc'),
)

# Stem, stages and what lies between are counted through: 0, 1, ..., 7.
CONVNEXT_TORCHVISION: Naming = (
  (r'stem', 'features.0.0'),
  (r'stem_norm', 'features.0.1'),
  *(
    row
    for s in (1, 2, 3, 4)
    for row in (
      (rf'downsample{s}_norm', f'features.{2 * s - 2}.0'),
      (rf'downsample{s}', f'features.{2 * s - 2}.1'),
      (
        rf'stage{s}_block(?P<b>\d+)/scale/gamma',
        f'features.{2 * s - 1}.{{b0}}.layer_scale',
      ),
      *(
        (
          rf'stage{s}_block(?P<b>\d+)/{layer}',
          f'features.{2 * s - 1}.{{b0}}.block.{i}',
        )
        for layer, i in {'conv': 0, 'norm': 2, 'dense1': 3, 'dense2': 5}.items()
      ),
    )
  ),
  (r'head_norm', 'classifier.0'),
  (r'head', 'classifier.2'),
)


def _vgg_features(depth: int) -> Naming:
  """Convolutions, norms, ReLUs and poolings of all stages counted through."""
  naming, i = [], 0
  for stage, convolutions in enumerate(VGG_STAGES[depth], start=1):
    for n in range(1, convolutions + 1):
      naming.append((f'stage{stage}/conv{n}', f'features.{i}'))
      naming.append((f'stage{stage}/norm{n}', f'features.{i + 1}'))
      i += 3
    i += 1
  return (*naming, ('head', 'classifier'))


def _namings(model: nn.Module) -> dict[str, Naming]:
  """The namings in which a model's weights may come, by their origin."""
  families = {
    ImageNetResNet: {'torchvision': RESNET},
    CifarResNet: {'torchvision': RESNET},
    CifarBottleneckResNet: {'torchvision': RESNET},
    MobileNetV1: {'timm': MOBILENET_V1_TIMM},
    MobileNetV2: {
      'torchvision': MOBILENET_V2_TORCHVISION,
      'timm': MOBILENET_V2_TIMM,
    },
    ViT: {'timm': VIT_TIMM},
    ConvNeXt: {'torchvision': CONVNEXT_TORCHVISION, 'timm': CONVNEXT_TIMM},
  }
  if isinstance(model, VGG):
    return {
      'RepDistiller': VGG_BLOCKS,
      'torchvision': _vgg_features(model.depth),
    }
  for family, namings in families.items():
    if isinstance(model, family):
      return namings
  valid = ', '.join(sorted(c.__name__ for c in (*families, VGG)))
  raise ValueError(
    f'load_pretrained knows no names for {type(model).__name__}; valid: '
    f'{valid}.'
  )


# What they call the parameters of a layer.
_LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}
_HEADS = ('head', 'head_dist')
# What a model without a head lacks.
_ENDS = (*_HEADS, 'head_norm')


class _Place(NamedTuple):
  """Where the values of one of our arrays are: a third of theirs, or all."""

  name: str
  third: int | None


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
    which timm and RepDistiller share;
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
    >>> path = tempfile.mkdtemp() + '/weights.safetensors'
    >>> safetensors.flax.save_file({'fc.bias': jnp.zeros(2)}, path)
    >>> model = CifarResNet(num_classes=2, depth=8)
    >>> load_pretrained(path, model)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: ... lacks 'bn1.bias' for CifarResNet by torchvision's names ...
  """
  namings = _namings(model)
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
  origin, naming = _detect(namings, ours, arrays)
  places = {k: _place(naming, k.split('/', 1)[1]) for k in ours}
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
  namings: Mapping[str, Naming],
  ours: Iterable[str],
  arrays: Mapping[str, jax.Array],
) -> tuple[str, Naming]:
  """The naming of which the file has most, and its origin."""

  def known(item):
    places = [_place(item[1], path.split('/', 1)[1]) for path in ours]
    return sum(place.name in arrays for place in places)

  return max(namings.items(), key=known)


def _place(naming: Naming, path: str) -> _Place:
  """Where one of our arrays is, by its path without the collection."""
  layer, leaf = path.rsplit('/', 1)
  for pattern, name, *third in naming:
    whole = re.fullmatch(pattern, path)
    match = whole or re.fullmatch(pattern, layer)
    if match:
      numbers = match.groupdict()
      numbers |= {f'{k}0': str(int(v) - 1) for k, v in numbers.items()}
      name = name.format(**numbers)
      suffix = '' if whole else f'.{_LEAVES[leaf]}'
      return _Place(name + suffix, third[0] if third else None)
  raise ValueError(f'load_pretrained has no name for {path!r}.')


def _without_end(
  naming: Naming, arrays: Mapping[str, jax.Array], places: Mapping[str, _Place]
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
  places: Mapping[str, _Place],
) -> None:
  expected = {place.name for place in places.values()}
  missing, unexpected = expected - set(arrays), set(arrays) - expected
  if missing:
    name, others = min(missing), ''
    if unexpected:
      others = f'; it has others: {rules.near_misses(name, unexpected)}'
    raise ValueError(
      f'{path} lacks {name!r} for {reader} ({len(missing)} of '
      f'{len(expected)} are missing){others}'
    )
  if unexpected:
    name = min(unexpected)
    raise ValueError(
      f'{path} has {name!r}, which has no place in {reader} '
      f'({len(unexpected)} have none): {rules.near_misses(name, expected)}'
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
  place: _Place,
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
  ours: str, shape: Sequence[int], place: _Place
) -> tuple[int, ...]:
  if ours.endswith('/kernel'):
    shape = (*shape[:-3:-1], *shape[:-2])
  if place.name.endswith('.layer_scale'):
    shape = (*shape, 1, 1)
  if place.third is not None:
    shape = (3 * shape[0], *shape[1:])
  return tuple(shape)
