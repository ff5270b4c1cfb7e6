"""The CIFAR networks that published distillation results are about, by name.

Owns the names and the options they stand for; the networks are in the other
files. Names are those of the tables of Tian et al., "Contrastive
Representation Distillation", 2019, arXiv:1910.10699, where the widths,
strides and poolings come from as well.
"""

from collections.abc import Callable
from functools import partial

from flax import linen as nn

from kd_jax.models.mobilenet_v2 import CifarMobileNetV2
from kd_jax.models.resnet import CifarBottleneckResNet, CifarResNet
from kd_jax.models.shufflenet import ShuffleNetV1, ShuffleNetV2
from kd_jax.models.vgg import VGG
from kd_jax.models.wide_resnet import WideResNet

CIFAR_MODELS: dict[str, Callable[..., nn.Module]] = {
  'resnet8': partial(CifarResNet, depth=8, width=16),
  'resnet14': partial(CifarResNet, depth=14, width=16),
  'resnet20': partial(CifarResNet, depth=20, width=16),
  'resnet32': partial(CifarResNet, depth=32, width=16),
  'resnet44': partial(CifarResNet, depth=44, width=16),
  'resnet56': partial(CifarResNet, depth=56, width=16),
  'resnet110': partial(CifarResNet, depth=110, width=16),
  'resnet8x4': partial(CifarResNet, depth=8, width=64, stem_width=32),
  'resnet32x4': partial(CifarResNet, depth=32, width=64, stem_width=32),
  'ResNet50': partial(CifarBottleneckResNet, blocks=(3, 4, 6, 3), width=64),
  'wrn_16_1': partial(WideResNet, depth=16, widen_factor=1),
  'wrn_16_2': partial(WideResNet, depth=16, widen_factor=2),
  'wrn_40_1': partial(WideResNet, depth=40, widen_factor=1),
  'wrn_40_2': partial(WideResNet, depth=40, widen_factor=2),
  'vgg8': partial(VGG, depth=8, width=64),
  'vgg11': partial(VGG, depth=11, width=64),
  'vgg13': partial(VGG, depth=13, width=64),
  'vgg16': partial(VGG, depth=16, width=64),
  'vgg19': partial(VGG, depth=19, width=64),
  'MobileNetV2': partial(CifarMobileNetV2, width=0.5, expansion=6),
  'ShuffleV1': partial(
    ShuffleNetV1, widths=(240, 480, 960), blocks=(4, 8, 4), groups=3
  ),
  'ShuffleV2': partial(
    ShuffleNetV2, widths=(116, 232, 464), blocks=(4, 8, 4), last_width=1024
  ),
}
