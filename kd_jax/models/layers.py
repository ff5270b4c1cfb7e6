"""Layers that mark where a quantized model holds integers.

They compute what their names say. As modules they are places at which
`quantize_activations` can round: a runtime adds and pools in integers only
when both sides of the operation are quantized.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn


class Add(nn.Module):
  """The sum of two arrays of one shape: a residual connection."""

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    return x + y


class GlobalAveragePool(nn.Module):
  """The mean over all positions: `[B, H, W, D] -> [B, D]`."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=(1, 2))
