"""Grids of a converted model's inputs: stored ones, and those of the batch.

Owns what makes codes of a layer's input, or rounds it. Which layers there are
is known to `execution`; how ranges become grids is in `activations`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kd_jax.quantize import inputs, products
from kd_jax.quantize.activations import dynamic_scale
from kd_jax.quantize.fake_quant import fake_quant, quantize
from kd_jax.quantize.products import Codes
from kd_jax.quantize.specs import QuantSpec
from kd_jax.quantize.stored import dequantize_linear, quantize_linear


class StoredGrid(NamedTuple):
  """The grid of an input, as `convert` stored it.

  Attributes:
    scale: float32.
    zero_point: int8.
  """

  scale: jax.Array
  zero_point: jax.Array

  def codes(self, x: jax.Array) -> Codes:
    """The codes of an input."""
    code = quantize_linear(x, self.scale, self.zero_point)
    return Codes(code, self.scale, self.zero_point.astype(jnp.int32))

  def round(self, x: jax.Array) -> jax.Array:
    """The values that its codes stand for, in its dtype."""
    code = quantize_linear(x, self.scale, self.zero_point)
    rounded = dequantize_linear(code, self.scale, self.zero_point)
    return rounded.astype(x.dtype)


class DynamicGrid(NamedTuple):
  """The grid of an input's own range.

  Attributes:
    spec: with which to find it in the batch at hand.
  """

  spec: QuantSpec

  def codes(self, x: jax.Array) -> Codes:
    """The codes of an input."""
    scale, zero_point = dynamic_scale(x, self.spec)
    code = quantize(x, scale, zero_point, self.spec)
    symmetric = self.spec.symmetric
    return Codes(code, scale, None if symmetric else zero_point.astype('int32'))

  def round(self, x: jax.Array) -> jax.Array:
    """The values that its codes stand for, in its dtype."""
    scale, zero_point = dynamic_scale(x, self.spec)
    return fake_quant(x, scale, zero_point, self.spec.qmin, self.spec.qmax)


Grid = StoredGrid | DynamicGrid


def grids_of(
  stored_as: Callable[[str], Any],
  values: Sequence[Any],
  spec: QuantSpec | None,
) -> dict[int, Grid]:
  """The grid of each input that is quantized, by position.

  Args:
    stored_as: name of an input -> what `convert` stored of it, or None.
    values: the inputs of a layer, of which arrays can be quantized.
    spec: for those without a stored grid, where it is dynamic.
  """
  spec = spec if spec is not None and spec.dynamic else None
  grids: dict[int, Grid] = {}
  for i, x in enumerate(values):
    stored = stored_as(inputs.input_name(i))
    if stored is not None:
      grids[i] = StoredGrid(stored['scale'], stored['zero_point'])
    elif spec is not None and products.is_input(x):
      grids[i] = DynamicGrid(spec)
  return grids
