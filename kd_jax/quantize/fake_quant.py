"""Uniform quantization: codes, the straight-through map, and weights.

Owns rounding to the grid of a scale and zero point, and the quantization of
weights as a map from pytree to pytree. What a quantizer is stands in `specs`;
activations are quantized in `activations`, learned steps in `learned`.

Rounding is half to even, as in XLA and ONNX. Codes are computed in float32
whatever the tensor's dtype.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax import rules as rules_lib
from kd_jax.quantize import observers, specs
from kd_jax.quantize.specs import QuantSpec, per_group, scale_and_zero_point


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def fake_quant(
  x: jax.Array,
  scale: jax.Array,
  zero_point: jax.Array,
  qmin: int,
  qmax: int,
) -> jax.Array:
  """Rounds to the grid of a quantizer; the gradient passes straight through.

  Forward: scale * (clip(round(x * (1 / scale)) + zero_point, qmin, qmax) -
  zero_point), with a product as in PyTorch: XLA fuses it where it would keep
  the quotients. Backward: the gradient where the rounded code lies inside
  [qmin, qmax], 0 where it saturates, and 0 to scale and zero point. The mask
  includes both end codes: `jnp.clip` would halve the gradient of the very
  elements that set an absolute-maximum scale.

  Args:
    x: float array.
    scale: float32 with a finite reciprocal, broadcastable to `x`.
    zero_point: float32 integral, broadcastable to `x`.
    qmin: smallest code.
    qmax: largest code.

  Returns:
    Values on the grid, with the shape and dtype of `x`.

  Example:
    >>> x = jnp.array([0.26, 9.0])
    >>> fake_quant(x, jnp.float32(0.5), jnp.float32(0), -8, 7).tolist()
    [0.5, 3.5]
    >>> f = lambda x: fake_quant(x, jnp.float32(0.5), jnp.float32(0), -8, 7)
    >>> jax.grad(lambda x: f(x).sum())(x).tolist()
    [1.0, 0.0]

  References:
    Bengio, Leonard, Courville, 2013, arXiv:1308.3432 (straight-through).
  """
  code = _code(x, scale, zero_point)
  code = jnp.clip(code, qmin, qmax)
  return ((code - zero_point) * scale).astype(x.dtype)


def _code(x: jax.Array, scale: jax.Array, zero_point: jax.Array) -> jax.Array:
  return jnp.round(x.astype(jnp.float32) * (1 / scale)) + zero_point


def _fake_quant_fwd(
  x: jax.Array, scale: jax.Array, zero_point: jax.Array, qmin: int, qmax: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  code = _code(x, scale, zero_point)
  inside = (code >= qmin) & (code <= qmax)
  rounded = fake_quant(x, scale, zero_point, qmin, qmax)
  return rounded, (inside, scale, zero_point)


def _fake_quant_bwd(
  qmin: int, qmax: int, residuals: tuple[jax.Array, ...], g: jax.Array
) -> tuple[jax.Array, ...]:
  inside, scale, zero_point = residuals
  return (
    jnp.where(inside, g, 0).astype(g.dtype),
    jnp.zeros_like(scale),
    jnp.zeros_like(zero_point),
  )


fake_quant.defvjp(_fake_quant_fwd, _fake_quant_bwd)


def quantize(
  x: jax.Array, scale: jax.Array, zero_point: jax.Array, spec: QuantSpec
) -> jax.Array:
  """int8 codes of a float array; the codes that `fake_quant` rounds to.

  Args:
    x: float array.
    scale: broadcastable to `x`, or per group as from `weight_scale`.
    zero_point: likewise.
    spec: the quantizer; 4-bit codes are stored in int8 too.

  Returns:
    int8 with the shape of `x`.

  Example:
    >>> grid = jnp.float32(0.5), jnp.float32(10)
    >>> quantize(jnp.array([-4.6, 0.5, 99.0]), *grid, QuantSpec(8)).tolist()
    [1, 11, 127]
  """
  scale, zero_point = per_group(scale, x), per_group(zero_point, x)
  code = jnp.clip(_code(x, scale, zero_point), spec.qmin, spec.qmax)
  return code.astype(jnp.int8)


def dequantize(
  code: jax.Array, scale: jax.Array, zero_point: ArrayLike = 0.0
) -> jax.Array:
  """float32 values of integer codes: scale * (code - zero_point).

  Args:
    code: integers.
    scale: broadcastable to `code`, or per group as from `weight_scale`.
    zero_point: likewise.

  Example:
    >>> w = jnp.array([[1.0], [0.6], [40.0], [-20.0]])
    >>> spec = QuantSpec(bits=4, axis=-1, group_size=2)
    >>> scale, zero_point = weight_scale(w, spec)
    >>> codes = quantize(w, scale, zero_point, spec)
    >>> codes[:, 0].tolist()
    [7, 4, 7, -4]
    >>> [round(v, 2) for v in dequantize(codes, scale)[:, 0].tolist()]
    [1.0, 0.57, 40.0, -22.86]
  """
  scale = per_group(jnp.asarray(scale), code)
  zero_point = per_group(jnp.asarray(zero_point, jnp.float32), code)
  return (code.astype(jnp.float32) - zero_point) * scale


def weight_scale(
  w: jax.Array,
  spec: QuantSpec,
  observer: observers.Observer | None = None,
  *,
  name: str = 'weight',
) -> tuple[jax.Array, jax.Array]:
  """Scale and zero point of a weight, with kept axes; no gradient.

  Args:
    w: the weight.
    spec: the quantizer.
    observer: chooses the range of every block of values with one scale, such
      as `observers.octav(ignore_zeros=True)`; None takes the extremes.
    name: of the weight, for errors.

  Returns:
    `(scale, zero_point)`, float32 with the number of axes of `w`: axes that
    `spec.axis` names keep their size, axis -2 has the number of groups if
    there are groups, and all others have size 1. `per_group` makes them
    broadcastable to `w`.

  Raises:
    ValueError: if the axes or groups do not fit the weight's shape.

  Example:
    >>> spec = QuantSpec(axis=(0, -1))
    >>> weight_scale(jnp.ones((3, 8, 5)), spec)[0].shape
    (3, 1, 5)
  """
  w = jax.lax.stop_gradient(w)
  if observer is None:
    low, high = specs.extremes(w, spec, name)
  else:
    low, high = observers.tensor_range(observer, w, spec, name)
  return scale_and_zero_point(low, high, spec)


def fake_quant_params(
  params: Any,
  rules: rules_lib.Rules[QuantSpec],
  *,
  observer: observers.Observer | None = None,
) -> Any:
  """Fake-quantizes the parameters that rules choose: pytree in, pytree out.

  Args:
    params: any pytree of arrays.
    rules: `(pattern, QuantSpec or None)` pairs on '/'-joined parameter paths.
    observer: chooses the range of a weight, see `weight_scale`; None takes
      its extremes.

  Returns:
    The same tree with the chosen leaves rounded to their grid; differentiable
    with the straight-through gradient.

  Raises:
    ValueError: if a rule matches nothing, or the axes or groups of a spec do
      not fit a parameter that it is for.

  Example:
    >>> params = {'dense': {'kernel': jnp.array([[1.0], [0.3]])}}
    >>> rules = [('.*/kernel', QuantSpec(bits=4, axis=-1))]
    >>> kernel = fake_quant_params(params, rules)['dense']['kernel']
    >>> [round(v, 4) for v in kernel[:, 0].tolist()]
    [1.0, 0.2857]
  """
  names = rules_lib.leaf_names(params)
  chosen = rules_lib.match(rules, names, kind='weight rule')

  def one(name, w):
    spec = chosen.get(name)
    if spec is None:
      return w
    scale, zero_point = weight_scale(w, spec, observer, name=name)
    scale, zero_point = per_group(scale, w), per_group(zero_point, w)
    return fake_quant(w, scale, zero_point, spec.qmin, spec.qmax)

  leaves, structure = jax.tree.flatten(params)
  return jax.tree.unflatten(structure, map(one, names, leaves))
