"""What torchvision, timm and RepDistiller call the layers of our models.

Owns one table a family and origin, and which of them a model's weights may
follow. Reading the weights is for `pretrained`.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from flax import linen as nn

from kd_jax.models.convnext import ConvNeXt
from kd_jax.models.imagenet_resnet import ImageNetResNet
from kd_jax.models.mobilenet import MobileNetV1
from kd_jax.models.mobilenet_v2 import STAGES as V2_STAGES
from kd_jax.models.mobilenet_v2 import MobileNetV2
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

# RepDistiller's ResNet with bottlenecks, from another source than its others.
RESNET_REPDISTILLER: Naming = (
  *(
    (pattern, name.replace('downsample', 'shortcut'))
    for pattern, name, *_ in RESNET[:-1]
  ),
  (r'head', 'linear'),
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


def namings(model: nn.Module) -> dict[str, Naming]:
  """The namings in which a model's weights may come, by their origin.

  Args:
    model: of one of the families that `load_pretrained` can fill.

  Returns:
    'torchvision', 'timm' or 'RepDistiller' -> rows, see `place_of`.

  Raises:
    ValueError: for a model of another class.

  Example:
    >>> sorted(namings(VGG(num_classes=10, depth=8)))
    ['RepDistiller', 'torchvision']
  """
  families = {
    ImageNetResNet: {'torchvision': RESNET},
    CifarResNet: {'torchvision': RESNET},
    CifarBottleneckResNet: {
      'torchvision': RESNET,
      'RepDistiller': RESNET_REPDISTILLER,
    },
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
  for family, known in families.items():
    if isinstance(model, family):
      return known
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


class Place(NamedTuple):
  """Where the values of one of our arrays are: a third of theirs, or all.

  Attributes:
    name: of their array.
    third: 0, 1 or 2, or None for all of it.

  Example:
    >>> place_of([('query', 'attn.qkv', 0)], 'query/kernel')
    Place(name='attn.qkv.weight', third=0)
  """

  name: str
  third: int | None


def place_of(naming: Naming, path: str) -> Place:
  """Where one of our arrays is, by its path without the collection.

  Args:
    naming: rows `(pattern, name)` or `(pattern, name, third)`; the first that
      matches counts.
    path: '/'-joined, such as 'stage1_block2/conv1/kernel'.

  Raises:
    ValueError: if no row matches.

  Example:
    >>> rows = [(r'stage(?P<s>\\d+)/conv', 'layer{s}.{s0}.conv')]
    >>> place_of(rows, 'stage2/conv/kernel').name
    'layer2.1.conv.weight'
  """
  layer, leaf = path.rsplit('/', 1)
  for pattern, name, *third in naming:
    whole = re.fullmatch(pattern, path)
    match = whole or re.fullmatch(pattern, layer)
    if match:
      numbers = match.groupdict()
      numbers |= {f'{k}0': str(int(v) - 1) for k, v in numbers.items()}
      name = name.format(**numbers)
      suffix = '' if whole else f'.{_LEAVES[leaf]}'
      return Place(name + suffix, third[0] if third else None)
  raise ValueError(f'load_pretrained has no name for {path!r}.')
