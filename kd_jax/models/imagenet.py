"""The ImageNet networks by their published names.

Owns the names and the options they stand for; the networks are in the other
files. 'resnet50' is not 'ResNet50', which is the CIFAR network of `cifar`.
"""

from collections.abc import Callable
from functools import partial

from flax import linen as nn

from kd_jax.models.convnext import ConvNeXt
from kd_jax.models.imagenet_resnet import ImageNetResNet
from kd_jax.models.mobilenet import MobileNetV1
from kd_jax.models.mobilenet_v2 import MobileNetV2
from kd_jax.models.vit import ViT


def _vit(width: int, heads: int, *, distilled: bool = False) -> partial[ViT]:
  """The transformers called tiny, small and base, on patches of 16 x 16."""
  return partial(
    ViT,
    patch_size=16,
    width=width,
    depth=12,
    heads=heads,
    distilled=distilled,
  )


IMAGENET_MODELS: dict[str, Callable[..., nn.Module]] = {
  'resnet18': partial(
    ImageNetResNet, blocks=(2, 2, 2, 2), bottleneck=False, width=64
  ),
  'resnet34': partial(
    ImageNetResNet, blocks=(3, 4, 6, 3), bottleneck=False, width=64
  ),
  'resnet50': partial(
    ImageNetResNet, blocks=(3, 4, 6, 3), bottleneck=True, width=64
  ),
  'mobilenet_v1': MobileNetV1,
  'mobilenet_v2': MobileNetV2,
  'vit_ti16': _vit(192, 3),
  'vit_s16': _vit(384, 6),
  'vit_b16': _vit(768, 12),
  # DeiT without its token is ViT with another training.
  'deit_ti16': _vit(192, 3),
  'deit_s16': _vit(384, 6),
  'deit_b16': _vit(768, 12),
  'deit_ti16_distilled': _vit(192, 3, distilled=True),
  'deit_s16_distilled': _vit(384, 6, distilled=True),
  'deit_b16_distilled': _vit(768, 12, distilled=True),
  'convnext_t': partial(
    ConvNeXt, blocks=(3, 3, 9, 3), widths=(96, 192, 384, 768)
  ),
}
