"""Models by name; every submodule's path is a tap of `adapters.from_linen`.

Owns the names and options of a configuration's models. Each family has a file
of its own, and ensembles of networks are in `kd_jax.networks`.
"""

import functools
import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn

from kd_jax import rules
from kd_jax.models.cifar import CIFAR_MODELS as CIFAR_MODELS
from kd_jax.models.cnn import CNN as CNN
from kd_jax.models.convnext import ConvNeXt as ConvNeXt
from kd_jax.models.imagenet import IMAGENET_MODELS as IMAGENET_MODELS
from kd_jax.models.imagenet_resnet import ImageNetResNet as ImageNetResNet
from kd_jax.models.layers import Taps as Taps
from kd_jax.models.mlp import MLP as MLP
from kd_jax.models.mobilenet import MobileNetV1 as MobileNetV1
from kd_jax.models.mobilenet_v2 import CifarMobileNetV2 as CifarMobileNetV2
from kd_jax.models.mobilenet_v2 import MobileNetV2 as MobileNetV2
from kd_jax.models.pretrained import load_pretrained as load_pretrained
from kd_jax.models.resnet import CifarBottleneckResNet as CifarBottleneckResNet
from kd_jax.models.resnet import CifarResNet as CifarResNet
from kd_jax.models.reused_head import ReusedHead as ReusedHead
from kd_jax.models.shufflenet import ShuffleNetV1 as ShuffleNetV1
from kd_jax.models.shufflenet import ShuffleNetV2 as ShuffleNetV2
from kd_jax.models.vgg import VGG as VGG
from kd_jax.models.vit import ViT as ViT
from kd_jax.models.wide_resnet import WideResNet as WideResNet

# Paths of the submodules that repeat, for `adapters.from_linen(remat=BLOCKS)`:
# most memory of training is inside of them.
BLOCKS = r'(.*/)?(stage\d+(_block\d+)?|block\d+|projector)'
# Classes, whose options are all open, and networks by their published names,
# some of whose options are what the name says.
MODELS: dict[str, Callable[..., nn.Module]] = {
  'mlp': MLP,
  'cnn': CNN,
  'resnet': CifarResNet,
  'resnet50_cifar': CifarBottleneckResNet,
  'wrn': WideResNet,
  'vgg': VGG,
  'mobilenet_v2_cifar': CifarMobileNetV2,
  'shufflenet_v1_cifar': ShuffleNetV1,
  'shufflenet_v2_cifar': ShuffleNetV2,
  'resnet_imagenet': ImageNetResNet,
  'vit': ViT,
  'convnext': ConvNeXt,
  **CIFAR_MODELS,
  **IMAGENET_MODELS,
}


def make_model(name: str, *, num_classes: int, **options: Any) -> nn.Module:
  """A model by name.

  Args:
    name: one of `MODELS`.
    num_classes: size of the output; 0 returns a convolutional model's last
      feature map.
    **options: the model's other attributes, but for those that a published
      name such as 'resnet56' stands for.

  Raises:
    ValueError: for an unknown name or option, or a value that is unlike the
      option's default.

  Example:
    >>> make_model('resnet', num_classes=10, depth=8).depth
    8
    >>> make_model('resnet56', num_classes=100, dtype='bfloat16').depth
    56
  """
  constructor = rules.choose('model', name, MODELS)
  fixed: Mapping[str, Any] = {}
  if isinstance(constructor, functools.partial):
    fixed = constructor.keywords
  known = {
    option: parameter.default
    for option, parameter in inspect.signature(constructor).parameters.items()
    if option not in {'parent', 'name', *fixed}
  }
  for option, value in options.items():
    default = rules.choose(f'option of model {name!r}:', option, known)
    if not _is_like(value, default):
      raise ValueError(
        f'option of model {name!r}: {option}={value!r} is not of the kind of '
        f'its default, {default!r}.'
      )
  return constructor(num_classes=num_classes, **options)


def _is_like(value: Any, default: Any) -> bool:
  """Whether a value may take a default's place, as far as that one tells."""
  if isinstance(default, bool):
    return isinstance(value, bool)
  if isinstance(default, tuple):
    return isinstance(value, list | tuple)
  if isinstance(default, int | float):
    kind = numbers.Integral if isinstance(default, int) else numbers.Real
    return isinstance(value, kind) and not isinstance(value, bool)
  return True
