"""CIFAR-100: WRN-40-2 teaches WRN-16-2, column B of the published table.

  kd-jax run --config configs/cifar100_wrn_40_2_wrn_16_2.py \\
      --workdir runs/wrn_40_2_wrn_16_2 --stages=teacher,alone,distill
  kd-jax evaluate --workdir runs/wrn_40_2_wrn_16_2

`cifar100_wrn_40_2_wrn_16_2.py:crd` distils by CRD, `:tiny` runs every stage in
about a minute. Recipe, variants, data: `kd_jax.published`.

Expected top-1 accuracy of the test split in percent. Public benchmark of Tian
et al., last epoch:
teacher 75.61, alone 73.26, kd 74.92, fitnet 73.58, at 74.08, sp 73.83, cc
73.56, vid 74.11, rkd 73.35, pkt 74.54, ab 72.50, ft 73.25, fsp 72.91, nst
73.68, crd 75.48.
Other publications, some of the best epoch:
dkd 76.23, logit_standardization 76.11.

  network       parameters    multiply-accumulates
  wrn_40_2       2,255,156             327,610,880
  wrn_16_2         703,284             101,118,464

Distilling costs 2 x (3 x student + teacher) FLOPs an image, in its
multiply-accumulates: 6.31e13 for an epoch of 49,984 images, 1.51e16 for 240.
The teacher's own training and the student's alone cost 2 x 3 x theirs.
"""

import ml_collections

from kd_jax import published


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The pair's recipe; see `kd_jax.published` for the variants."""
  return published.recipe(
    variant,
    teacher={'name': 'wrn_40_2'},
    student={'name': 'wrn_16_2'},
    tiny_teacher={'name': 'wrn', 'depth': 10, 'widen_factor': 1},
    tiny_student={'name': 'wrn', 'depth': 10, 'widen_factor': 1},
    accuracies=(75.61, 74.92),
    own_weights={
      'dkd': {'decoupled_kd': {'beta': 6.0}},
      'review': {'review': {'weight': {'end': 5.0}}},
      'cat': {'class_attention': {'weight': 12.0, 'normalize': False}},
    },
  )
