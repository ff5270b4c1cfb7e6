"""CIFAR-100: ResNet-50 teaches MobileNetV2, column G of the published table.

  kd-jax run --config configs/cifar100_resnet50_mobilenet_v2.py \\
      --workdir runs/resnet50_mobilenet_v2 --stages=teacher,alone,distill
  kd-jax evaluate --workdir runs/resnet50_mobilenet_v2

`cifar100_resnet50_mobilenet_v2.py:crd` distils by CRD, `:tiny` runs every stage
in about a minute. Recipe, variants, data: `kd_jax.published`.

Expected top-1 accuracy of the test split in percent. Public benchmark of Tian
et al., last epoch:
teacher 79.34, alone 64.60, kd 67.35, fitnet 63.16, at 58.58, sp 68.08, cc
65.43, vid 67.57, rkd 64.43, pkt 66.52, ab 67.20, ft 60.99, nst 64.96, crd
69.11.
Other publications, some of the best epoch:
review 69.89, dkd 70.35, dist 68.66, logit_standardization 69.02, kdpp 70.10.

  network       parameters    multiply-accumulates
  ResNet50      23,705,252           1,298,014,208
  MobileNetV2      812,836               6,523,648

Distilling costs 2 x (3 x student + teacher) FLOPs an image, in its
multiply-accumulates: 1.32e14 for an epoch of 49,984 images, 3.16e16 for 240.
The teacher's own training and the student's alone cost 2 x 3 x theirs.
"""

import ml_collections

from kd_jax import published


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The pair's recipe; see `kd_jax.published` for the variants."""
  return published.recipe(
    variant,
    teacher={'name': 'ResNet50'},
    student={'name': 'MobileNetV2'},
    tiny_teacher={'name': 'resnet50_cifar', 'blocks': (1, 1, 1, 1), 'width': 4},
    tiny_student={'name': 'mobilenet_v2_cifar', 'width': 0.125},
    accuracies=(79.34, 67.35),
    rate=0.01,
    own_weights={
      'dkd': {'decoupled_kd': {'beta': 8.0}},
      'cat': {'class_attention': {'weight': 40.0}},
    },
  )
