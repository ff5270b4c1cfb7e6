"""CIFAR-100: VGG-13 teaches VGG-8, column F of the published table.

  kd-jax run --config configs/cifar100_vgg13_vgg8.py \\
      --workdir runs/vgg13_vgg8 --stages=teacher,alone,distill
  kd-jax evaluate --workdir runs/vgg13_vgg8

`cifar100_vgg13_vgg8.py:crd` distils by CRD, `:tiny` runs every stage in about a
minute. Recipe, variants, data: `kd_jax.published`.

Expected top-1 accuracy of the test split in percent. Public benchmark of Tian
et al., last epoch:
teacher 74.64, alone 70.36, kd 72.98, fitnet 71.02, at 71.43, sp 72.68, cc
70.71, vid 71.23, rkd 71.48, pkt 72.88, ab 70.94, ft 70.58, fsp 70.23, nst
71.53, crd 73.94.
Other publications, some of the best epoch:
dkd 74.68, logit_standardization 74.36.

  network       parameters    multiply-accumulates
  vgg13          9,462,180             284,936,192
  vgg8           3,965,028              96,192,512

Distilling costs 2 x (3 x student + teacher) FLOPs an image, in its
multiply-accumulates: 5.73e13 for an epoch of 49,984 images, 1.38e16 for 240.
The teacher's own training and the student's alone cost 2 x 3 x theirs.
"""

import ml_collections

from kd_jax import published


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The pair's recipe; see `kd_jax.published` for the variants."""
  return published.recipe(
    variant,
    teacher={'name': 'vgg13'},
    student={'name': 'vgg8'},
    tiny_teacher={'name': 'vgg', 'depth': 8, 'width': 8},
    tiny_student={'name': 'vgg', 'depth': 8, 'width': 4},
    accuracies=(74.64, 72.98),
    own_weights={
      'dkd': {'decoupled_kd': {'beta': 6.0}},
      'cat': {'class_attention': {'weight': 4.5, 'normalize': False}},
    },
  )
