"""Conversion of trained variables to integers.

Owns what is stored; `execution` runs it, and which networks are converted is
`deploy`'s. The integer contract, that of ONNX and LiteRT: weights int8
symmetric in [-127, 127] per output channel (or 4 bits in [-7, 7], two to a
byte); activations int8 affine in [-128, 127] per tensor; bias int32 with scale
input_scale * kernel_scale; accumulation int32. The converted layers live in the
collection `int8`, whose arrays are all that a deployed model needs.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from kd_jax import rules as rules_lib
from kd_jax.quantize import (
  activations,
  learned,
  observers,
  packing,
  specs,
)
from kd_jax.quantize.fake_quant import dequantize, quantize, weight_scale
from kd_jax.quantize.inputs import input_name
from kd_jax.quantize.specs import QuantSpec, scale_and_zero_point
from kd_jax.quantize.stored import CODED, COLLECTION, bias_scale
from kd_jax.types import Variables

# Leaves room for the products: 2**30 + 255 * 127 * 32768 < 2**31.
_BIAS_BITS = 30
_weight_scale = jax.jit(weight_scale, static_argnames=('spec', 'observer'))


def convert(
  variables: Variables,
  weight_rules: rules_lib.Rules[QuantSpec],
  activation_rules: rules_lib.Rules[QuantSpec],
  *,
  observer: observers.Observer | None = None,
  weight_observer: observers.Observer | None = None,
) -> dict[str, Any]:
  """Replaces the float kernels of quantized layers by integers.

  What becomes of a layer depends on the rules that match it:
  static, a kernel and observed inputs: codes, the inputs' grids and an int32
  bias; weight-only or dynamic, a kernel without observed inputs: codes, and the
  bias stays float (`execute_integers(dynamic=...)` tells the two apart);
  inputs without a kernel, as those of residual sums and attention: their
  grids. Parameters of other names than `kernel` and `embedding`, and affine
  weights alone, stay float, rounded to their grid. Fold BatchNorm first.

  Args:
    variables: `params`, `quant_stats` where activations were observed, and what
      else the model has. Steps that LSQ learned for weights, `quant_steps`
      among the parameters, are their scales; ranges that it learned for
      activations become `quant_stats` by `learned_ranges`.
    weight_rules: on parameter paths, as trained with; symmetric. Kernels have
      scales per output channel or tensor, and for groups of their last but one
      axis; those of a scanned stack of layers for each layer, `axis=(0, -1)`.
    activation_rules: on layer paths, as trained with; 8 bits, and per tensor
      over all codes where they are observed.
    observer: the observer trained with, for its ranges.
    weight_observer: as trained with, see `fake_quant_params`.

  Returns:
    Variables with an `int8` collection. For a converted kernel `[..., O]`:
    `kernel` int8, or uint8 with two 4-bit codes in a byte along the last axis;
    `kernel_scale` float32 with the kernel's rank, 1 along axes that share it,
    but O along the last, also where one scale is for the whole tensor;
    `bias` int32 with the bias's shape where inputs are observed and channels
    have one scale. The same for an `embedding`, whose scale is not widened. For
    every observed input `input<i>` with `scale` float32 and `zero_point` int8.
    In a scanned stack each has the leading axis of the stack.

  Raises:
    ValueError: for a spec that has no integer execution, for observers that
      have seen no batch or a value that is not finite, or if there is nothing
      to convert.

  Example:
    >>> from kd_jax.quantize import INT8_WEIGHTS
    >>> params = {'dense': {'kernel': jnp.array([[1.0, 3.0], [0.5, -3.0]])}}
    >>> int8 = convert({'params': params}, [('.*/kernel', INT8_WEIGHTS)], [])
    >>> int8['int8']['dense']['kernel'].tolist()
    [[127, 127], [64, -127]]

  References:
    Jacob et al., 2017, arXiv:1712.05877, section 2.
  """
  observer = observer or observers.ema_min_max()
  raw = dict(variables['params'])
  steps = traverse_util.flatten_dict(raw.pop(learned.STEPS, {}), sep='/')
  chosen = rules_lib.match(
    weight_rules, rules_lib.leaf_names(raw), kind='weight rule'
  )
  raw = traverse_util.flatten_dict(raw, sep='/')
  params = dict(raw)
  grids = _grids(variables, activation_rules, observer)
  converted = {
    _join(layer, name, part): value
    for layer, inputs in grids.items()
    for name, grid in inputs.items()
    for part, value in grid.items()
  }
  for path, spec in chosen.items():
    layer, _, name = path.rpartition('/')
    grid = grids.get(layer, {}).get(input_name(0))
    if name not in CODED or (grid is None and not spec.symmetric):
      params[path] = _rounded(path, raw[path], spec, steps, weight_observer)
      continue
    # As its own rule rounded it, which comes before the kernel's.
    bias = params.get(_join(layer, 'bias')) if name == 'kernel' else None
    scale = learned.step_of(steps, path)
    if scale is None:
      scale, _ = _scale(path, raw[path], spec, weight_observer)
    entry = _weight(path, raw[path], scale, bias, spec, grid)
    del params[path]
    if 'bias' in entry:
      del params[_join(layer, 'bias')]
    converted |= {_join(layer, k): v for k, v in entry.items()}
  if not converted:
    raise ValueError(
      'convert: there is nothing to convert; no rule matches a kernel and no '
      'layer has quantized inputs.'
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


def _scale(
  path: str, w: jax.Array, spec: QuantSpec, observer: observers.Observer | None
) -> tuple[jax.Array, jax.Array]:
  specs.check(spec, w.shape, path)
  return _weight_scale(w, spec, observer)


def _rounded(
  path: str,
  w: jax.Array,
  spec: QuantSpec,
  steps: Any,
  observer: observers.Observer | None,
) -> jax.Array:
  """A weight that stays float, on its grid."""
  scale, zero_point = learned.step_of(steps, path), jnp.float32(0)
  if scale is None:
    scale, zero_point = _scale(path, w, spec, observer)
  code = quantize(w, scale, zero_point, spec)
  return dequantize(code, scale, zero_point).astype(w.dtype)


def _join(*parts: str) -> str:
  """A path; the root's is empty."""
  return '/'.join(part for part in parts if part)


def _grids(
  variables: Variables,
  rules: rules_lib.Rules[QuantSpec],
  observer: observers.Observer,
) -> dict[str, dict[str, dict[str, jax.Array]]]:
  """layer -> input -> its scale and zero point, of observed inputs."""
  stats = traverse_util.flatten_dict(
    variables.get(activations.COLLECTION, {}), sep='/'
  )
  static = [s for _, s in rules if s is not None and not s.dynamic]
  if static and not stats:
    raise ValueError(
      'convert: no layer has quantized inputs, though rules ask for them; was '
      'the model trained or calibrated with quantize_activations?'
    )
  layers: dict[str, Any] = {}
  for path, value in stats.items():
    *layer, name, statistic = path.rsplit('/', 2)
    layer = _join(*layer)
    layers.setdefault(layer, {}).setdefault(name, {})[statistic] = value
  found = {}
  for layer, inputs in layers.items():
    spec = rules_lib.first(rules, layer)
    if spec is not None and not spec.dynamic:
      found[layer] = {
        name: _input(_join(layer, name), seen, observer, spec)
        for name, seen in inputs.items()
      }
  return found


def _input(
  path: str,
  stats: Mapping[str, jax.Array],
  observer: observers.Observer,
  spec: QuantSpec,
) -> dict[str, jax.Array]:
  if spec.bits != 8 or spec.axis is not None or spec.narrow:
    raise ValueError(
      f'{path}: integers are executed with 8-bit activations per tensor over '
      'all codes only (bits=8, axis=None, narrow=False).'
    )
  if not jnp.all(stats['count'] > 0):
    raise ValueError(f'{path}: its observer has seen no batch; calibrate it.')
  # A scanned stack has one observer for each of its layers.
  ranges = functools.partial(observer.range, spec=spec)
  for _ in range(stats['count'].ndim):
    ranges = jax.vmap(ranges)
  low, high = ranges(stats)
  if not jnp.all(jnp.isfinite(high - low)):
    raise ValueError(f'{path}: its observer saw a range of {low} to {high}.')
  scale, zero_point = scale_and_zero_point(low, high, spec)
  return {'scale': scale, 'zero_point': zero_point.astype(jnp.int8)}


def _weight(
  path: str,
  w: jax.Array,
  scale: jax.Array,
  bias: jax.Array | None,
  spec: QuantSpec,
  grid: Mapping[str, jax.Array] | None,
) -> dict[str, jax.Array]:
  """The entries of one weight, and of its bias where that becomes integers."""
  name = path.rpartition('/')[2]
  if not spec.symmetric:
    raise ValueError(
      f'{path}: integers are executed with symmetric weights only.'
    )
  if name == 'embedding' and spec.group_size is not None:
    raise ValueError(f'{path}: an embedding has no groups; use axis=0.')
  if grid is not None and _varies_along_input(w, spec, grid['scale'].ndim):
    raise ValueError(
      f'{path}: integers are executed with symmetric weights per output '
      'channel (axis=-1), per tensor (axis=None) or per group (group_size).'
    )
  step = None if grid is None else grid['scale']
  code, scale, steps = _codes(w, scale, bias, step, spec, name == 'kernel')
  entry = {name: code, f'{name}_scale': scale}
  # A bias of several axes has no scale that could be widened for it.
  if steps is not None and jnp.all(jnp.abs(steps) <= 2.0**_BIAS_BITS):
    entry['bias'] = steps.astype(jnp.int32)
  return entry


def _varies_along_input(w: jax.Array, spec: QuantSpec, lead: int) -> bool:
  """Of matrices; the scales of others show when they are multiplied."""
  own = [axis - lead for axis in spec.kept_axes(w.ndim) if axis >= lead]
  return w.ndim - lead == 2 and 0 in own


@functools.partial(jax.jit, static_argnames=('spec', 'is_kernel'))
def _codes(
  w: jax.Array,
  scale: jax.Array,
  bias: jax.Array | None,
  input_scale: jax.Array | None,
  spec: QuantSpec,
  is_kernel: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Codes, scale and the steps of the bias, or None where it stays float."""
  lead = 0 if input_scale is None else input_scale.ndim
  if lead:
    scale = jnp.broadcast_to(scale, w.shape[:lead] + scale.shape[lead:])
  if is_kernel:
    scale = jnp.broadcast_to(scale, (*scale.shape[:-1], w.shape[-1]))
  steps = None
  if bias is not None and input_scale is not None:
    own = bias.ndim - lead
    middle = scale.shape[lead : w.ndim - own]
    if bias.shape[lead:] == w.shape[w.ndim - own :] and set(middle) <= {1}:
      if own == 1:
        scale = _wide_enough(w, scale, bias, input_scale)
      steps = jnp.round(bias / bias_scale(input_scale, scale, bias))
  code = quantize(w, scale, jnp.float32(0), spec)
  if spec.bits == 4 and (scale.shape[-1] > 1 or w.shape[-1] % 2 == 0):
    code = packing.pack_int4(code)
  return code, scale, steps


def _wide_enough(
  w: jax.Array, scale: jax.Array, bias: jax.Array, input_scale: jax.Array
) -> jax.Array:
  """Scales per channel at which the bias fits into int32.

  A channel of tiny weights gets a scale at which its bias fits; one that was
  pruned away gets the scale that its bias is exact at.
  """
  lead = input_scale.ndim
  wide = (*bias.shape[:lead], *(1,) * (w.ndim - lead - 1), bias.shape[-1])
  input_scale = input_scale.reshape(*bias.shape[:lead], *(1,) * (w.ndim - lead))
  least = jnp.abs(bias).reshape(wide) / (input_scale * 2.0**_BIAS_BITS)
  summed = tuple(range(lead, w.ndim - 1))
  empty = jnp.all(w == 0, axis=summed, keepdims=True)
  return jnp.where(empty & (least > 0), least, jnp.maximum(scale, least))
