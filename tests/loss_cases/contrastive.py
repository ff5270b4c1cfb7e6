"""Cases of `losses.contrastive`: scores against a memory bank."""

import functools

import numpy as np

from kd_jax import losses
from loss_cases.case import Case

B, NEGATIVES = 8, 4


def _nce(student, num_data, eps):
  loss = np.zeros(B)
  for i, (positive, *negatives) in enumerate(student):
    noise = NEGATIVES / num_data
    loss[i] = -np.log(positive / (positive + noise + eps))
    for score in negatives:
      loss[i] -= np.log(noise / (score + noise + eps))
  return loss


def _scores(rng):
  """exp(<e, m> / 0.7) of unit vectors, over their mean."""
  scores = np.exp(rng.uniform(-1, 1, (B, 1 + NEGATIVES)) / 0.7)
  return {'student': (scores / scores.mean()).astype(np.float32)}


def _case(**options):
  return Case(
    lambda student: losses.contrastive_nce(student, **options),
    functools.partial(_nce, **{'eps': 1e-7, **options}),
    _scores,
    per_example=True,
    minimum=None,
    zero_ok=False,
  )


CASES: dict[str, Case] = {
  'contrastive_nce': _case(num_data=1000),
  'contrastive_nce/few': _case(num_data=10),
  'contrastive_nce/eps': _case(num_data=10, eps=0.1),
}
