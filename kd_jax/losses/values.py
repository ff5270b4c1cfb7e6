"""Losses on values as they are: regression targets, or logits without softmax.

Pure, float32 and unreduced, `[..., D] -> [...]`. Owns the distances of one
prediction and one target; those of feature maps are in `features`.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import numerics


def squared_error(prediction: ArrayLike, target: ArrayLike) -> jax.Array:
  """Mean over the last axis of the squared difference.

  On regression values the ordinary mean squared error; on logits the
  distillation of Ba and Caruana. Averaged over a batch it is the mean over
  all elements.

  Args:
    prediction: `[..., D]`, any float dtype.
    target: `[..., D]`; gradients do not flow into it.

  Returns:
    `[...]` float32.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> squared_error(jnp.array([[1.0, 3.0]]), jnp.zeros((1, 2))).tolist()
    [5.0]

  References:
    Ba, Caruana, "Do Deep Nets Really Need to be Deep?", 2013,
    arXiv:1312.6184.
  """
  prediction, target = numerics.pair(
    'squared_error', prediction=prediction, target=target
  )
  return jnp.mean(jnp.square(prediction - target), axis=-1)


def huber(
  prediction: ArrayLike, target: ArrayLike, *, delta: float = 1.0
) -> jax.Array:
  """Mean over the last axis of Huber's function of the difference.

  For a difference r it is r**2 / 2 where |r| <= delta, and from there on the
  straight line delta * (|r| - delta / 2). With delta = 1 it is also known as
  smooth L1.

  Args:
    prediction: `[..., D]`, any float dtype.
    target: `[..., D]`; gradients do not flow into it.
    delta: where the parabola ends, > 0, in the units of the prediction.

  Returns:
    `[...]` float32.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> huber(jnp.array([[1.0, 3.0]]), jnp.zeros((1, 2))).tolist()
    [1.5]

  References:
    Huber, "Robust Estimation of a Location Parameter", Annals of Mathematical
    Statistics 35, 1964.
  """
  prediction, target = numerics.pair(
    'huber', prediction=prediction, target=target
  )
  residual = prediction - target
  size = jnp.abs(residual)
  inside = jnp.minimum(size, delta)
  return jnp.mean(inside * (size - 0.5 * inside), axis=-1)
