"""Layers that mark where a quantized model holds integers.

They compute what their names say. As modules they are places at which
`quantize_activations` can round: a runtime adds and pools in integers only
when both sides of the operation are quantized.
"""

from typing import NamedTuple

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


class Taps(NamedTuple):
  """Where a model's features are, as paths for `adapters.from_linen`.

  Attributes:
    stages: the output of each stage, after its last activation where it has
      one, shallow to deep; `[B, H, W, D]`, or `[B, L, D]` of a transformer.
    preactivations: the same places before that activation; equal to `stages`
      where nothing follows.
    norms: for each of `preactivations`, the BatchNorm whose scale and bias
      give its distribution (the last one on its main branch); empty in models
      without BatchNorm.
    embedding: the pooled feature `[B, D]` that the head reads.
    head: the linear classifier.
  """

  stages: tuple[str, ...]
  preactivations: tuple[str, ...]
  norms: tuple[str, ...]
  embedding: str
  head: str
