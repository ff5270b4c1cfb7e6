"""CIFAR-100: WRN-40-2 teaches WRN-40-1, column C of the published table.

  kd-jax run --config configs/cifar100_wrn_40_2_wrn_40_1.py \\
      --workdir runs/wrn_40_2_wrn_40_1 --stages=teacher,alone,distill
  kd-jax evaluate --workdir runs/wrn_40_2_wrn_40_1

`cifar100_wrn_40_2_wrn_40_1.py:crd` distils by CRD, `:tiny` runs every stage in
about a minute. Recipe, variants, data: `kd_jax.published`.

Expected top-1 accuracy of the test split in percent. Public benchmark of Tian
et al., last epoch:
teacher 75.61, alone 71.98, kd 73.54, fitnet 72.24, at 72.77, sp 72.43, cc
72.21, vid 73.30, rkd 72.22, pkt 73.45, ab 72.38, ft 71.59, nst 72.24, crd
74.14.
Other publications, some of the best epoch:
review 75.09, dkd 74.81, dist 74.43, logit_standardization 74.37, kdpp 74.59.

  network       parameters    multiply-accumulates
  wrn_40_2       2,255,156             327,610,880
  wrn_40_1         569,780              83,286,272

Distilling costs 2 x (3 x student + teacher) FLOPs an image, in its
multiply-accumulates: 5.77e13 for an epoch of 49,984 images, 1.39e16 for 240.
The teacher's own training and the student's alone cost 2 x 3 x theirs.
"""

import ml_collections

from kd_jax import published


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The pair's recipe; see `kd_jax.published` for the variants."""
  return published.recipe(
    variant,
    teacher={'name': 'wrn_40_2'},
    student={'name': 'wrn_40_1'},
    tiny_teacher={'name': 'wrn', 'depth': 10, 'widen_factor': 1},
    tiny_student={'name': 'wrn', 'depth': 10, 'widen_factor': 1},
    accuracies=(75.61, 73.54),
    own_weights={
      'dkd': {'decoupled_kd': {'beta': 6.0}},
      'review': {'review': {'weight': {'end': 5.0}}},
      'cat': {'class_attention': {'weight': 1.5, 'normalize': False}},
    },
  )
