"""What `convert` stores, and the real values that it stands for.

Owns the collection `int8`: reading its codes and scales back, for those who run
converted models (`execution`) and for those who want floats. `conversion`
fills it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.quantize import packing
from kd_jax.quantize.fake_quant import dequantize, quantize
from kd_jax.quantize.products import Codes
from kd_jax.quantize.specs import QuantSpec, per_channel
from kd_jax.types import Variables

COLLECTION = 'int8'
_CODES = QuantSpec(symmetric=False, narrow=False)
# Parameters that convert stores as codes.
CODED = ('kernel', 'embedding')


@jax.jit
def quantize_linear(
  x: jax.Array, scale: jax.Array, zero_point: jax.Array
) -> jax.Array:
  """int8 codes of an activation. Exporters know it by its name."""
  return quantize(x, scale, zero_point.astype(jnp.float32), _CODES)


@jax.jit
def dequantize_linear(
  code: jax.Array, scale: jax.Array, zero_point: jax.Array
) -> jax.Array:
  """float32 values of codes. Exporters know it by its name."""
  zero_point = zero_point.astype(jnp.float32)
  return dequantize(code, per_channel(scale, code), zero_point)


def weight_codes(stored: jax.Array, scale: jax.Array) -> Codes:
  """A stored weight as int8 codes.

  Args:
    stored: int8 codes, or uint8 with two 4-bit codes in a byte.
    scale: with the rank of the weight, or of its last axes; where its last
      axis is 1, packed codes are even in number.
  """
  if stored.dtype == jnp.uint8:
    size = scale.shape[-1]
    size = size if size > 1 else 2 * stored.shape[-1]
    stored = packing.unpack_int4(stored, size)
  return Codes(stored, per_channel(scale, stored))


def weight_values(codes: Codes) -> jax.Array:
  """The real values of a weight, float32."""
  code, scale = codes.code, codes.scale
  if code.ndim < 2 or scale.shape[-2] in (1, code.shape[-2]):
    return dequantize_linear(code, scale, jnp.int8(0))
  # One scale for each group of neighbours along axis -2.
  groups = scale.shape[-2]
  split = code.reshape(*code.shape[:-2], groups, -1, code.shape[-1])
  values = dequantize_linear(split, jnp.expand_dims(scale, -2), jnp.int8(0))
  return values.reshape(code.shape)


def dequantize_params(variables: Variables) -> dict[str, Any]:
  """The variables of a converted model without integers: codes become floats.

  What a model of any framework runs with on the weights that `convert` rounded.
  Grids of activations are dropped.

  Args:
    variables: from `convert`.

  Returns:
    `params` float32 and whatever else there was, but for `int8`.

  Example:
    >>> from kd_jax.quantize import INT8_WEIGHTS, convert
    >>> params = {'dense': {'kernel': jnp.array([[1.0], [0.301]])}}
    >>> int8 = convert({'params': params}, [('.*/kernel', INT8_WEIGHTS)], [])
    >>> kernel = dequantize_params(int8)['params']['dense']['kernel']
    >>> [round(v, 4) for v in kernel[:, 0].tolist()]
    [1.0, 0.2992]
  """

  def merged(params, integers):
    params = dict(params)
    for name, value in integers.items():
      if isinstance(value, dict) and not name.startswith('input'):
        inner = merged(params.get(name, {}), value)
        # A layer without parameters has stored inputs only.
        params |= {name: inner} if inner else {}
      elif name in CODED:
        codes = weight_codes(value, integers[f'{name}_scale'])
        params[name] = weight_values(codes)
    if 'kernel' in integers and 'bias' in integers:
      bias, grid = integers['bias'], integers['input0']
      codes = weight_codes(integers['kernel'], integers['kernel_scale'])
      params['bias'] = bias * bias_scale(grid['scale'], codes.scale, bias)
    return params

  rest = {k: v for k, v in variables.items() if k != COLLECTION}
  params = merged(rest.get('params', {}), variables.get(COLLECTION, {}))
  return rest | {'params': params}


def bias_scale(
  input_scale: jax.Array, kernel_scale: jax.Array, bias: jax.Array
) -> jax.Array:
  """The step of an int32 bias: input scale * kernel scale.

  Args:
    input_scale: `[]`, or `[L]` in a stack of L layers.
    kernel_scale: with the rank of the kernel; its last axes are the bias's.
    bias: anything of the bias's shape.
  """
  lead = input_scale.ndim
  own = bias.ndim - lead
  last = kernel_scale.shape[kernel_scale.ndim - own :]
  kernel_scale = kernel_scale.reshape(*kernel_scale.shape[:lead], *last)
  return input_scale.reshape(*input_scale.shape, *(1,) * own) * kernel_scale
