"""CIFAR-100: ResNet-32x4 teaches ResNet-8x4, column A of the published table.

  kd-jax run --config configs/cifar100_resnet32x4_resnet8x4.py \\
      --workdir runs/cifar100_resnet32x4_resnet8x4 \\
      --stages=teacher,alone,distill

"""
import pathlib
import runpy

import ml_collections

_SHARED = pathlib.Path(__file__).with_name('cifar100.py')


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The pair's recipe; see `cifar100.py` for the variants."""
  return runpy.run_path(str(_SHARED))['recipe'](
    variant,
    teacher={'name': 'resnet32x4'},
    student={'name': 'resnet8x4'},
    tiny_teacher={'name': 'resnet', 'depth': 8, 'width': 8, 'stem_width': 4},
    tiny_student={'name': 'resnet', 'depth': 8, 'width': 4, 'stem_width': 2},
    accuracies=(79.42, 73.33),
    own_weights={
      'dkd': {'decoupled_kd': {'beta': 8.0}},
      'review': {'review': {'weight': {'end': 5.0}}},
      'cat': {'class_attention': {'weight': 15.0, 'normalize': False}},
    },
  )
