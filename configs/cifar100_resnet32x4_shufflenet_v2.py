"""CIFAR-100: ResNet-32x4 teaches ShuffleNetV2, column I of the published table.

  kd-jax run --config configs/cifar100_resnet32x4_shufflenet_v2.py \\
      --workdir runs/resnet32x4_shufflenet_v2 --stages=teacher,alone,distill
  kd-jax evaluate --workdir runs/resnet32x4_shufflenet_v2

`cifar100_resnet32x4_shufflenet_v2.py:crd` distils by CRD, `:tiny` runs every
stage in about a minute. Recipe, variants, data: `kd_jax.published`.

Expected top-1 accuracy of the test split in percent. Public benchmark of Tian
et al., last epoch:
teacher 79.42, alone 71.82, kd 74.45, fitnet 73.54, at 72.73, sp 74.56, cc
71.29, vid 73.40, rkd 73.21, pkt 74.69, ab 74.31, ft 72.50, nst 74.68, crd
75.65.
Other publications, some of the best epoch:
review 77.78, dkd 77.07, dist 77.35, logit_standardization 75.56, kdpp 76.42.

  network       parameters    multiply-accumulates
  resnet32x4     7,433,860           1,083,040,768
  ShuffleV2      1,355,528              44,504,448

Distilling costs 2 x (3 x student + teacher) FLOPs an image, in its
multiply-accumulates: 1.22e14 for an epoch of 49,984 images, 2.92e16 for 240.
The teacher's own training and the student's alone cost 2 x 3 x theirs.
"""

import ml_collections

from kd_jax import published


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The pair's recipe; see `kd_jax.published` for the variants."""
  return published.recipe(
    variant,
    teacher={'name': 'resnet32x4'},
    student={'name': 'ShuffleV2'},
    tiny_teacher={'name': 'resnet', 'depth': 8, 'width': 8},
    tiny_student={
      'name': 'shufflenet_v2_cifar',
      'widths': (8, 16, 32),
      'blocks': (2, 2, 2),
      'last_width': 32,
    },
    accuracies=(79.42, 74.45),
    rate=0.01,
    own_weights={
      'dkd': {'decoupled_kd': {'beta': 8.0}},
      'review': {'review': {'weight': {'end': 8.0}}},
      'cat': {'class_attention': {'weight': 600.0, 'size': 4}},
    },
  )
