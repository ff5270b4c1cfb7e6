"""The ImageNet networks by their published names.

Owns the names and the options they stand for; the networks are in the other
files. 'resnet50' is not 'ResNet50', which is the CIFAR network of `cifar`.
"""

from functools import partial

from kd_jax.models.convnext import ConvNeXt
from kd_jax.models.imagenet_resnet import ImageNetResNet
from kd_jax.models.mobilenet import MobileNetV1, MobileNetV2
from kd_jax.models.vit import ViT

# Widths and heads of the transformers called tiny, small and base.
_TI16 = {'patch_size': 16, 'width': 192, 'depth': 12, 'heads': 3}
_S16 = {'patch_size': 16, 'width': 384, 'depth': 12, 'heads': 6}
_B16 = {'patch_size': 16, 'width': 768, 'depth': 12, 'heads': 12}

IMAGENET_MODELS = {
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
  'vit_ti16': partial(ViT, **_TI16, distilled=False),
  'vit_s16': partial(ViT, **_S16, distilled=False),
  'vit_b16': partial(ViT, **_B16, distilled=False),
  # DeiT without its token is ViT with another training.
  'deit_ti16': partial(ViT, **_TI16, distilled=False),
  'deit_s16': partial(ViT, **_S16, distilled=False),
  'deit_b16': partial(ViT, **_B16, distilled=False),
  'deit_ti16_distilled': partial(ViT, **_TI16, distilled=True),
  'deit_s16_distilled': partial(ViT, **_S16, distilled=True),
  'deit_b16_distilled': partial(ViT, **_B16, distilled=True),
  'convnext_t': partial(
    ConvNeXt, blocks=(3, 3, 9, 3), widths=(96, 192, 384, 768)
  ),
}
