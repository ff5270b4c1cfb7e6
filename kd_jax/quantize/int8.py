"""Integer execution: int8 x int8 -> int32 in place of Conv and Dense.

The integer contract, that of ONNX and LiteRT: weights int8 symmetric in
[-127, 127] per output channel; activations int8 affine in [-128, 127] per
tensor; bias int32 with scale input_scale * kernel_scale; accumulation int32.
The converted layers live in the collection `int8`, whose arrays are all that
a deployed model needs.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from kd_jax import rules as rules_lib
from kd_jax.quantize import activations, observers
from kd_jax.quantize.fake_quant import (
  QuantSpec,
  dequantize,
  fake_quant_params,
  per_channel,
  quantize,
  scale_and_zero_point,
  weight_scale,
)
from kd_jax.types import Variables

COLLECTION = 'int8'
_CODES = QuantSpec(symmetric=False, narrow=False)
# Leaves room for the products: 2**30 + 255 * 127 * 32768 < 2**31.
_BIAS_BITS = 30


def convert(
  variables: Variables,
  weight_rules: rules_lib.Rules[QuantSpec],
  activation_rules: rules_lib.Rules[QuantSpec],
  *,
  observer: observers.Observer | None = None,
) -> dict[str, Any]:
  """Replaces the float kernels of quantized layers by integers.

  A layer is converted when rules quantize both its kernel and its inputs;
  a kernel alone stays float, rounded to its grid. Fold BatchNorm first.

  Args:
    variables: `params` and `quant_stats` (and what else the model has).
    weight_rules: on parameter paths, as trained with. Converted kernels must
      be symmetric and per output channel (`axis=-1`) or per tensor.
    activation_rules: on layer paths, as trained with; 8 bits, not narrow.
    observer: the observer trained with, for its ranges.

  Returns:
    Variables with an `int8` collection: for every converted layer `kernel`
    int8, `kernel_scale` float32 `[O]`, `bias` int32 `[O]`, and for every
    quantized input `input<i>` with `scale` float32 and `zero_point` int8.

  Raises:
    ValueError: for a spec that has no integer execution, or observers that
      have seen no batch or a value that is not finite.
  """
  observer = observer or observers.ema_min_max()
  names = rules_lib.leaf_names(variables['params'])
  specs = rules_lib.match(weight_rules, names, kind='weight rule')
  rounded = fake_quant_params(variables['params'], weight_rules)
  params = dict(traverse_util.flatten_dict(rounded, sep='/'))
  stats = traverse_util.flatten_dict(
    variables.get(activations.COLLECTION, {}), sep='/'
  )
  converted: dict[str, Any] = {}
  for layer, inputs in _by_layer(stats).items():
    spec = rules_lib.first(activation_rules, layer)
    if spec is None:
      continue
    for name, layer_stats in inputs.items():
      entry = _input(f'{layer}/{name}', layer_stats, observer, spec)
      converted |= {f'{layer}/{name}/{k}': v for k, v in entry.items()}
    kernel = f'{layer}/kernel'
    if kernel in params and kernel in specs:
      scale = converted[f'{layer}/input0/scale']
      bias = params.pop(f'{layer}/bias', None)
      entry = _layer(kernel, params.pop(kernel), bias, specs[kernel], scale)
      converted |= {f'{layer}/{k}': v for k, v in entry.items()}
  if not converted:
    raise ValueError(
      'convert: no layer has quantized inputs; was the model '
      'trained with quantize_activations?'
    )
  rest = {
    k: v
    for k, v in variables.items()
    if k not in ('params', activations.COLLECTION)
  }
  return rest | {
    'params': traverse_util.unflatten_dict(params, sep='/'),
    COLLECTION: traverse_util.unflatten_dict(converted, sep='/'),
  }


def _by_layer(stats: Mapping[str, jax.Array]) -> dict[str, Any]:
  layers: dict[str, Any] = {}
  for path, value in stats.items():
    if path.count('/') < 2:
      raise ValueError(
        'convert: the model is a single layer; wrap it in a module.'
      )
    layer, name, statistic = path.rsplit('/', 2)
    layers.setdefault(layer, {}).setdefault(name, {})[statistic] = value
  return layers


def _input(path, stats, observer, spec):
  if spec.bits != 8 or spec.axis is not None or spec.narrow:
    raise ValueError(
      f'{path}: integers are executed with 8-bit activations per tensor over '
      'all codes only (bits=8, axis=None, narrow=False).'
    )
  if float(stats['count']) == 0:
    raise ValueError(f'{path}: its observer has seen no batch; calibrate it.')
  low, high = observer.range(stats, spec)
  if not jnp.isfinite(high - low):
    raise ValueError(f'{path}: its observer saw a range of {low} to {high}.')
  scale, zero_point = scale_and_zero_point(low, high, spec)
  return {'scale': scale, 'zero_point': zero_point.astype(jnp.int8)}


def _layer(path, w, bias, spec, input_scale):
  per_channel_or_tensor = spec.axis in (None, -1, w.ndim - 1)
  if not (spec.symmetric and per_channel_or_tensor) or spec.group_size:
    raise ValueError(
      f'{path}: integers are executed with symmetric weights, per output '
      'channel (axis=-1) or per tensor.'
    )
  scale, zero_point = weight_scale(w, spec)
  scale = jnp.broadcast_to(scale.reshape(-1), w.shape[-1:])
  bias = jnp.zeros_like(scale) if bias is None else bias
  # A channel of tiny weights gets a scale at which its bias fits into int32;
  # one that was pruned away gets the scale that its bias is exact at.
  least = jnp.abs(bias) / (input_scale * 2.0**_BIAS_BITS)
  empty = jnp.all(w == 0, axis=tuple(range(w.ndim - 1)))
  scale = jnp.where(empty & (least > 0), least, jnp.maximum(scale, least))
  code = quantize(w, per_channel(scale, w), zero_point, spec)
  steps = jnp.round(bias / (input_scale * scale))
  return {
    'kernel': code,
    'kernel_scale': scale,
    'bias': steps.astype(jnp.int32),
  }


@jax.jit
def quantize_linear(x: jax.Array, scale: jax.Array, zero_point: jax.Array):
  """int8 codes of an activation. Exporters know it by its name."""
  return quantize(x, scale, zero_point.astype(jnp.float32), _CODES)


@jax.jit
def dequantize_linear(code: jax.Array, scale: jax.Array, zero_point: jax.Array):
  """float32 values of codes. Exporters know it by its name."""
  zero_point = zero_point.astype(jnp.float32)
  return dequantize(code, per_channel(scale, code), zero_point)


def execute_integers(*, simulate: bool = False) -> Callable[..., Any]:
  """An interceptor that runs converted layers on their integers.

  Args:
    simulate: False multiplies int8 by int8 into int32; True runs the same
      quantized values in float32, quantize -> dequantize -> layer, which is
      the form that ONNX runtimes read.

  Returns:
    An interceptor for `flax.linen.intercept_methods`; the variables are those
    of `convert`.
  """

  def interceptor(next_fun, args, kwargs, context):
    module = context.module
    if context.method_name != '__call__':
      return next_fun(*args, **kwargs)
    if not activations.is_quantizable(module):
      return next_fun(*args, **kwargs)
    scope = module.scope
    codes = []
    for i, x in enumerate(args):
      name = activations.input_name(i)
      if not scope.has_variable(COLLECTION, name):
        return next_fun(*args, **kwargs)
      grid = scope.get_variable(COLLECTION, name)
      code = quantize_linear(x, grid['scale'], grid['zero_point'])
      codes.append((code, grid['scale'], grid['zero_point']))
    if not scope.has_variable(COLLECTION, 'kernel'):
      return next_fun(*(dequantize_linear(*c) for c in codes), **kwargs)
    layer = {
      name: scope.get_variable(COLLECTION, name)
      for name in ('kernel', 'kernel_scale', 'bias')
    }
    bases = {base.__name__ for base in type(module).__mro__}
    if not bases & {'Conv', 'Dense'}:
      raise ValueError(
        f'{"/".join(module.path)}: a {type(module).__name__} has no integer '
        'execution.'
      )
    run = _simulated if simulate else _integer
    return run(module, *codes[0], **layer)

  return interceptor


def _linear(module, x, w, pad_value, **options):
  """The bare Conv or Dense of a module: padding, product, no bias."""
  if w.ndim == 2:
    return jax.lax.dot_general(
      x, w, (((x.ndim - 1,), (0,)), ((), ())), **options
    )
  rank = w.ndim - 2
  if x.ndim != w.ndim or module.mask is not None:
    raise ValueError(
      f'{"/".join(module.path)}: convolutions with a kernel mask, or with '
      f'other than one batch axis (input {x.shape}), have no integer execution.'
    )

  def sizes(value):
    value = 1 if value is None else value
    return (value,) * rank if isinstance(value, int) else tuple(value)

  strides = sizes(module.strides)
  input_dilation = sizes(module.input_dilation)
  kernel_dilation = sizes(module.kernel_dilation)
  if set(input_dilation) != {1}:
    raise ValueError(
      f'{"/".join(module.path)}: transposed (input-dilated) '
      'convolutions have no integer execution.'
    )
  window = [(k - 1) * d + 1 for k, d in zip(w.shape, kernel_dilation)]
  spatial = range(1, x.ndim - 1)
  padding = _padding(module, [x.shape[i] for i in spatial], window, strides)
  edges = [(0, 0, 0), *((a, b, 0) for a, b in padding), (0, 0, 0)]
  # The padding is real 0, whose code is the zero point.
  x = jax.lax.pad(x, pad_value, edges)
  numbers = jax.lax.ConvDimensionNumbers(
    (0, x.ndim - 1, *spatial),
    (w.ndim - 1, w.ndim - 2, *range(rank)),
    (0, x.ndim - 1, *spatial),
  )
  return jax.lax.conv_general_dilated(
    x,
    w,
    strides,
    'VALID',
    rhs_dilation=kernel_dilation,
    dimension_numbers=numbers,
    feature_group_count=module.feature_group_count,
    **options,
  )


def _padding(module, shape, window, strides):
  padding = module.padding
  if isinstance(padding, int):
    padding = [padding] * len(shape)
  if not isinstance(padding, str):
    return [(p, p) if isinstance(p, int) else tuple(p) for p in padding]
  if padding not in ('SAME', 'SAME_LOWER', 'VALID'):
    raise ValueError(
      f'{"/".join(module.path)}: padding {padding!r} has no integer execution.'
    )
  return jax.lax.padtype_to_pads(shape, window, strides, padding)


def _integer(module, code, scale, zero_point, *, kernel, kernel_scale, bias):
  accumulator = _linear(
    module, code, kernel, zero_point, preferred_element_type=jnp.int32
  )
  # sum (q_x - z) q_w = sum q_x q_w - z sum q_w
  reduced = tuple(range(kernel.ndim - 1))
  offset = jnp.sum(kernel, axis=reduced, dtype=jnp.int32)
  offset = bias - zero_point.astype(jnp.int32) * offset
  accumulator += per_channel(offset, accumulator)
  scale = per_channel(scale * kernel_scale, accumulator)
  return accumulator.astype(jnp.float32) * scale


def _simulated(module, code, scale, zero_point, *, kernel, kernel_scale, bias):
  none = jnp.int8(0)
  x = dequantize_linear(code, scale, zero_point)
  w = dequantize_linear(kernel, kernel_scale, none)
  b = dequantize_linear(bias, scale * kernel_scale, none)
  y = _linear(module, x, w, jnp.float32(0))
  return y + per_channel(b, y)
