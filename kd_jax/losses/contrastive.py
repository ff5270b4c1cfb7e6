"""Noise-contrastive estimation on scores against a memory bank.

Owns no bank, no embedding and no normalising constant: the term that does is
in `objectives`.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import numerics


def contrastive_nce(
  scores: ArrayLike, *, num_data: float, eps: float = 1e-7
) -> jax.Array:
  """Contrastive representation distillation (CRD): NCE on scores.

  With K negatives drawn from N examples and c = K / N, the loss is
    -log(P_0 / (P_0 + c + eps)) - sum over k of log(c / (P_k + c + eps)).

  Args:
    scores: `[B, 1 + K]` positive, any float dtype: exp(<e, m> / temperature)
      divided by the constant Z; the first is that of the example's own row,
      the others are negatives.
    num_data: N, the number of examples that negatives are drawn from.
    eps: added to the denominators.

  Returns:
    `[B]` float32, > 0: one direction. The published loss adds the other,
    where the roles of student and teacher are exchanged.

  Example:
    >>> loss = contrastive_nce(jnp.array([[1.0, 1.0]]), num_data=1)
    >>> round(loss.item(), 4)
    1.3863

  References:
    Tian, Krishnan, Isola, "Contrastive Representation Distillation", 2019,
    arXiv:1910.10699.
  """
  scores = numerics.float32(scores)
  positive, negatives = scores[:, 0], scores[:, 1:]
  noise = negatives.shape[1] / num_data
  is_own = jnp.log(positive) - jnp.log(positive + (noise + eps))
  is_noise = jnp.log(noise / (negatives + (noise + eps)))
  return -is_own - jnp.sum(is_noise, axis=1)
