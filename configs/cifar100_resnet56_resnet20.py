"""CIFAR-100: ResNet-56 teaches ResNet-20, column D of the published table.

  kd-jax run --config configs/cifar100_resnet56_resnet20.py \\
      --workdir runs/resnet56_resnet20 --stages=teacher,alone,distill
  kd-jax evaluate --workdir runs/resnet56_resnet20

`cifar100_resnet56_resnet20.py:crd` distils by CRD, `:tiny` runs every stage in
about a minute. Recipe, variants, data: `kd_jax.published`.

Expected top-1 accuracy of the test split in percent. Public benchmark of Tian
et al., last epoch:
teacher 72.34, alone 69.06, kd 70.66, fitnet 69.21, at 70.55, sp 69.67, cc
69.63, vid 70.38, rkd 69.61, pkt 70.34, ab 69.47, ft 69.84, fsp 69.95, nst
69.60, crd 71.16.
Other publications, some of the best epoch:
review 71.89, dkd 71.97, dist 71.75, logit_standardization 71.43, kdpp 72.53.

  network       parameters    multiply-accumulates
  resnet56         861,620             125,753,600
  resnet20         278,324              40,818,944

Distilling costs 2 x (3 x student + teacher) FLOPs an image, in its
multiply-accumulates: 2.48e13 for an epoch of 49,984 images, 5.96e15 for 240.
The teacher's own training and the student's alone cost 2 x 3 x theirs.
"""

import ml_collections

from kd_jax import published


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The pair's recipe; see `kd_jax.published` for the variants."""
  return published.recipe(
    variant,
    teacher={'name': 'resnet56'},
    student={'name': 'resnet20'},
    tiny_teacher={'name': 'resnet', 'depth': 8, 'width': 8},
    tiny_student={'name': 'resnet', 'depth': 8, 'width': 4},
    accuracies=(72.34, 70.66),
    own_weights={
      'dkd': {'decoupled_kd': {'beta': 2.0}},
      'review': {'review': {'weight': {'end': 0.6}}},
      'cat': {'class_attention': {'weight': 0.7, 'normalize': False}},
    },
  )
