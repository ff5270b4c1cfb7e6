"""CIFAR-100: ResNet-32x4 teaches ResNet-8x4, column A of the published table.

  kd-jax run --config configs/cifar100_resnet32x4_resnet8x4.py \\
      --workdir runs/resnet32x4_resnet8x4 --stages=teacher,alone,distill
  kd-jax evaluate --workdir runs/resnet32x4_resnet8x4

`cifar100_resnet32x4_resnet8x4.py:crd` distils by CRD, `:tiny` runs every stage
in about a minute. Recipe, variants, data: `kd_jax.published`.

Expected top-1 accuracy of the test split in percent. Public benchmark of Tian
et al., last epoch:
teacher 79.42, alone 72.50, kd 73.33, fitnet 73.50, at 73.44, sp 72.94, cc
72.97, vid 73.09, rkd 71.90, pkt 73.64, ab 73.17, ft 72.86, fsp 72.62, nst
73.30, crd 75.51.
Other publications, some of the best epoch:
ofd 74.95, review 75.63, dkd 76.32, dist 76.31, logit_standardization 76.62,
kdpp 75.54, simkd 78.08.

  network       parameters    multiply-accumulates
  resnet32x4     7,433,860           1,083,040,768
  resnet8x4      1,233,540             177,071,104

Distilling costs 2 x (3 x student + teacher) FLOPs an image, in its
multiply-accumulates: 1.61e14 for an epoch of 49,984 images, 3.87e16 for 240.
The teacher's own training and the student's alone cost 2 x 3 x theirs.
"""

import ml_collections

from kd_jax import published


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The pair's recipe; see `kd_jax.published` for the variants."""
  return published.recipe(
    variant,
    teacher={'name': 'resnet32x4'},
    student={'name': 'resnet8x4'},
    tiny_teacher={'name': 'resnet', 'depth': 8, 'width': 8},
    tiny_student={'name': 'resnet', 'depth': 8, 'width': 4},
    accuracies=(79.42, 73.33),
    own_weights={
      'dkd': {'decoupled_kd': {'beta': 8.0}},
      'review': {'review': {'weight': {'end': 5.0}}},
      'cat': {'class_attention': {'weight': 15.0, 'normalize': False}},
    },
  )
