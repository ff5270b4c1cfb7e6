"""CIFAR-100: ResNet-110 teaches ResNet-32, column E of the published table.

  kd-jax run --config configs/cifar100_resnet110_resnet32.py \\
      --workdir runs/resnet110_resnet32 --stages=teacher,alone,distill
  kd-jax evaluate --workdir runs/resnet110_resnet32

`cifar100_resnet110_resnet32.py:crd` distils by CRD, `:tiny` runs every stage in
about a minute. Recipe, variants, data: `kd_jax.published`.

Expected top-1 accuracy of the test split in percent. Public benchmark of Tian
et al., last epoch:
teacher 74.31, alone 71.14, kd 73.08, fitnet 71.06, at 72.31, sp 72.69, cc
71.48, vid 72.61, rkd 71.82, pkt 72.61, ab 70.98, ft 72.37, fsp 71.89, nst
71.96, crd 73.48.
Other publications, some of the best epoch:
dkd 74.11, logit_standardization 74.17.

  network       parameters    multiply-accumulates
  resnet110      1,736,564             253,155,584
  resnet32         472,756              69,130,496

Distilling costs 2 x (3 x student + teacher) FLOPs an image, in its
multiply-accumulates: 4.60e13 for an epoch of 49,984 images, 1.10e16 for 240.
The teacher's own training and the student's alone cost 2 x 3 x theirs.
"""

import ml_collections

from kd_jax import published


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The pair's recipe; see `kd_jax.published` for the variants."""
  return published.recipe(
    variant,
    teacher={'name': 'resnet110'},
    student={'name': 'resnet32'},
    tiny_teacher={'name': 'resnet', 'depth': 8, 'width': 8},
    tiny_student={'name': 'resnet', 'depth': 8, 'width': 4},
    accuracies=(74.31, 73.08),
    own_weights={
      'dkd': {'decoupled_kd': {'beta': 2.0}},
      'review': {'review': {'weight': {'end': 1.0}}},
      'cat': {'class_attention': {'weight': 1.8, 'normalize': False}},
    },
  )
