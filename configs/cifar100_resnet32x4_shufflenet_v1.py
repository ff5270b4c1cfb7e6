"""CIFAR-100: ResNet-32x4 teaches ShuffleNetV1, column H of the published table.

  kd-jax run --config configs/cifar100_resnet32x4_shufflenet_v1.py \\
      --workdir runs/resnet32x4_shufflenet_v1 --stages=teacher,alone,distill
  kd-jax evaluate --workdir runs/resnet32x4_shufflenet_v1

`cifar100_resnet32x4_shufflenet_v1.py:crd` distils by CRD, `:tiny` runs every
stage in about a minute. Recipe, variants, data: `kd_jax.published`.

Expected top-1 accuracy of the test split in percent. Public benchmark of Tian
et al., last epoch:
teacher 79.42, alone 70.50, kd 74.07, fitnet 73.59, at 71.73, sp 73.48, cc
71.14, vid 73.38, rkd 72.28, pkt 74.10, ab 73.55, ft 71.75, nst 74.12, crd
75.11.
Other publications, some of the best epoch:
review 77.45, dkd 76.45, dist 76.34, kdpp 75.45.

  network       parameters    multiply-accumulates
  resnet32x4     7,433,860           1,083,040,768
  ShuffleV1        949,258              38,691,456

Distilling costs 2 x (3 x student + teacher) FLOPs an image, in its
multiply-accumulates: 1.20e14 for an epoch of 49,984 images, 2.88e16 for 240.
The teacher's own training and the student's alone cost 2 x 3 x theirs.
"""

import ml_collections

from kd_jax import published


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The pair's recipe; see `kd_jax.published` for the variants."""
  return published.recipe(
    variant,
    teacher={'name': 'resnet32x4'},
    student={'name': 'ShuffleV1'},
    tiny_teacher={'name': 'resnet', 'depth': 8, 'width': 8},
    tiny_student={
      'name': 'shufflenet_v1_cifar',
      'widths': (48, 96, 192),
      'blocks': (2, 2, 2),
      'groups': 3,
    },
    accuracies=(79.42, 74.07),
    rate=0.01,
    own_weights={
      'dkd': {'decoupled_kd': {'beta': 8.0}},
      'review': {'review': {'weight': {'end': 5.0}}},
      'cat': {'class_attention': {'weight': 600.0, 'size': 4}},
    },
  )
