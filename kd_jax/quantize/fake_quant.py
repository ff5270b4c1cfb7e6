"""Uniform quantization: specs, scales, codes, and the straight-through map.

real = scale * (code - zero_point), codes integers in [qmin, qmax]. Rounding
is half to even, as in XLA and ONNX. Scales and codes are computed in float32
whatever the tensor's dtype. Weights are quantized here, as a map from pytree
to pytree; activations in `activations`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax import rules as rules_lib


@dataclasses.dataclass(frozen=True)
class QuantSpec:
  """How one tensor is quantized.

  Attributes:
    bits: 8 or 4.
    symmetric: zero_point 0 and a scale of max|x| / qmax; otherwise affine,
      with a range widened to contain 0 so that 0 is exact.
    narrow: leaves the most negative code unused: [-127, 127] for 8 bits, so
      that the codes are symmetric as well.
    axis: the axis with a scale of its own per index (the output channels of a
      kernel are -1), several such axes, or None for one scale per tensor.
    group_size: a scale for each so many values along the reduction axis -2 as
      well, or None for one along all of it.
    dynamic: of activations: the range is that of the batch at hand, and there
      is no observer.
  """

  bits: int = 8
  symmetric: bool = True
  narrow: bool = True
  axis: int | tuple[int, ...] | None = None
  group_size: int | None = None
  dynamic: bool = False

  def __post_init__(self):
    if self.bits not in (4, 8):
      raise ValueError(f'QuantSpec: bits={self.bits} is not 4 or 8.')

  def kept_axes(self, ndim: int) -> tuple[int, ...]:
    """The axes with a scale per index, of an array of `ndim` axes, sorted."""
    if self.axis is None:
      return ()
    axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
    return tuple(sorted(axis % ndim for axis in axes))

  @property
  def qmin(self) -> int:
    """The smallest code."""
    return -(2 ** (self.bits - 1)) + int(self.narrow)

  @property
  def qmax(self) -> int:
    """The largest code."""
    return 2 ** (self.bits - 1) - 1


INT8_WEIGHTS = QuantSpec(bits=8, symmetric=True, narrow=True, axis=-1)
INT8_ACTIVATIONS = QuantSpec(bits=8, symmetric=False, narrow=False)


def scale_and_zero_point(
  low: ArrayLike, high: ArrayLike, spec: QuantSpec
) -> tuple[jax.Array, jax.Array]:
  """The scale and zero point that cover a range of values.

  symmetric: scale = max(-low, high) / qmax, zero_point = 0.
  affine: scale = (high - low) / (qmax - qmin) after widening the range to
  contain 0, zero_point = clip(round(qmin - low / scale), qmin, qmax).
  An empty range gets scale 1: zeros stay zeros.

  Args:
    low: smallest value, any shape.
    high: largest value, same shape.
    spec: the quantizer.

  Returns:
    `(scale, zero_point)`, float32 of that shape; the zero point is integral.

  References:
    Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018, arXiv:1712.05877.

  Example:
    >>> scale, zero_point = scale_and_zero_point(0.0, 2.55, INT8_ACTIVATIONS)
    >>> round(float(scale), 4), int(zero_point)
    (0.01, -128)
  """
  low = jnp.minimum(jnp.asarray(low, jnp.float32), 0.0)
  high = jnp.maximum(jnp.asarray(high, jnp.float32), 0.0)
  if spec.symmetric:
    scale = jnp.maximum(-low, high) / spec.qmax
  else:
    scale = (high - low) / (spec.qmax - spec.qmin)
  scale = jnp.where(scale > 0, scale, 1.0)
  if spec.symmetric:
    return scale, jnp.zeros_like(scale)
  zero_point = jnp.round(spec.qmin - low / scale)
  return scale, jnp.clip(zero_point, spec.qmin, spec.qmax)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def fake_quant(
  x: jax.Array,
  scale: jax.Array,
  zero_point: jax.Array,
  qmin: int,
  qmax: int,
) -> jax.Array:
  """Rounds to the grid of a quantizer; the gradient passes straight through.

  Forward: scale * (clip(round(x / scale) + zero_point, qmin, qmax) -
  zero_point). Backward: the gradient where the rounded code lies inside
  [qmin, qmax], 0 where it saturates, and 0 to scale and zero point. The mask
  includes both end codes: `jnp.clip` would halve the gradient of the very
  elements that set an absolute-maximum scale.

  Args:
    x: float array.
    scale: float32, broadcastable to `x`.
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


def _code(x, scale, zero_point):
  return jnp.round(x.astype(jnp.float32) / scale) + zero_point


def _fake_quant_fwd(x, scale, zero_point, qmin, qmax):
  code = _code(x, scale, zero_point)
  inside = (code >= qmin) & (code <= qmax)
  return fake_quant(x, scale, zero_point, qmin, qmax), (
    inside,
    scale,
    zero_point,
  )


def _fake_quant_bwd(qmin, qmax, residuals, g):
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
    scale: broadcastable to `x`.
    zero_point: broadcastable to `x`.
    spec: the quantizer; 4-bit codes are stored in int8 too.

  Returns:
    int8 with the shape of `x`.
  """
  code = jnp.clip(_code(x, scale, zero_point), spec.qmin, spec.qmax)
  return code.astype(jnp.int8)


def dequantize(
  code: jax.Array, scale: jax.Array, zero_point: ArrayLike = 0.0
) -> jax.Array:
  """float32 values of integer codes: scale * (code - zero_point)."""
  return (code.astype(jnp.float32) - zero_point) * scale


def per_channel(values: jax.Array, like: jax.Array) -> jax.Array:
  """`[D]` values with leading axes of size 1, to combine with `[..., D]`."""
  return jnp.expand_dims(values, tuple(range(like.ndim - values.ndim)))


def weight_scale(w: jax.Array, spec: QuantSpec) -> tuple[jax.Array, jax.Array]:
  """Scale and zero point of a weight, from its extremes, with kept axes.

  Args:
    w: the weight.
    spec: the quantizer; its `axis` keep their sizes, the other axes become 1.
      With `group_size`, axis -2 keeps its size and equals within each group.

  Raises:
    ValueError: if `group_size` does not divide axis -2.
  """
  w = jax.lax.stop_gradient(w)
  kept = spec.kept_axes(w.ndim)
  if spec.group_size is None:
    return _range_scale(w, kept, spec)
  size, groups = w.shape[-2], w.shape[-2] // spec.group_size
  if groups * spec.group_size != size:
    raise ValueError(
      f'QuantSpec: group_size={spec.group_size} does not divide axis -2 of a '
      f'weight of shape {w.shape}.'
    )
  split = w.reshape(*w.shape[:-2], groups, spec.group_size, w.shape[-1])
  kept = tuple(a + (a >= w.ndim - 1) for a in kept) + (w.ndim - 2,)
  return tuple(
    jnp.repeat(jnp.squeeze(v, -2), spec.group_size, axis=-2)
    for v in _range_scale(split, kept, spec)
  )


def dynamic_scale(x: jax.Array, spec: QuantSpec) -> tuple[jax.Array, jax.Array]:
  """Scale and zero point of an activation, from its own extremes.

  Args:
    x: the activation.
    spec: the quantizer; its `axis` keep their sizes, the other axes become 1.

  Returns:
    `(scale, zero_point)`, float32 with the rank of `x`; no gradient passes.

  Example:
    >>> spec = QuantSpec(symmetric=False, narrow=False, axis=0, dynamic=True)
    >>> x = jnp.array([[0.0, 2.55], [0.0, 5.1]])
    >>> [round(s, 3) for s in dynamic_scale(x, spec)[0][:, 0].tolist()]
    [0.01, 0.02]
  """
  return _range_scale(jax.lax.stop_gradient(x), spec.kept_axes(x.ndim), spec)


def _range_scale(x, kept, spec):
  others = tuple(i for i in range(x.ndim) if i not in kept)
  low, high = (f(x, axis=others, keepdims=True) for f in (jnp.min, jnp.max))
  return scale_and_zero_point(low, high, spec)


def fake_quant_params(params: Any, rules: rules_lib.Rules[QuantSpec]) -> Any:
  """Fake-quantizes the parameters that rules choose: pytree in, pytree out.

  Args:
    params: any pytree of arrays.
    rules: `(pattern, QuantSpec or None)` pairs on '/'-joined parameter paths.

  Returns:
    The same tree with the chosen leaves rounded to their grid; differentiable
    with the straight-through gradient.

  Raises:
    ValueError: if a rule matches nothing.

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
    return fake_quant(w, *weight_scale(w, spec), spec.qmin, spec.qmax)

  leaves, structure = jax.tree.flatten(params)
  return structure.unflatten(map(one, names, leaves))
