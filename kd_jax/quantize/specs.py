"""Quantizers as data: bits, codes, and which values share a scale.

Owns `QuantSpec`, the scale and zero point of a range, and the extremes of
every block of values with a scale of its own. How values are rounded is in
`fake_quant`, how ranges are learned over batches in `observers`.

real = scale * (code - zero_point), codes integers in [qmin, qmax]. Scales are
float32 whatever the tensor's dtype.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.placement import gathered, replicated


@dataclasses.dataclass(frozen=True)
class QuantSpec:
  """How one tensor is quantized.

  Attributes:
    bits: 8 or 4.
    symmetric: zero_point 0 and a scale of max|x| / qmax; otherwise affine,
      with a range widened to contain 0 so that 0 is exact.
    narrow: leaves the most negative code unused: [-127, 127] for 8 bits, so
      that the codes are symmetric as well.
    axis: the axes with a scale of its own per index, None for one scale per
      tensor. The output channels of a kernel are -1; of the kernels of a
      scanned stack (0, -1), as the stack's axis is 0; of a projection by head,
      `[D, H, d]`, (-2, -1). A tuple of one axis is that axis.
    group_size: None, or how many values along the reduction axis -2 share a
      scale; it must divide that axis, which `axis` must not name. Weights
      only.
    dynamic: activations only: the range is that of the batch at hand, per
      tensor or per `axis` (0 for a range per example), and there is no
      observer.

  Raises:
    ValueError: for other bits, or a group size that is not positive.

  Example:
    >>> QuantSpec(bits=4, axis=-1, group_size=32).qmax
    7
  """

  bits: int = 8
  symmetric: bool = True
  narrow: bool = True
  axis: int | tuple[int, ...] | None = None
  group_size: int | None = None
  dynamic: bool = False

  def __post_init__(self) -> None:
    if self.bits not in (4, 8):
      raise ValueError(f'QuantSpec: bits={self.bits} is not 4 or 8.')
    if self.group_size is not None and self.group_size < 1:
      raise ValueError(
        f'QuantSpec: group_size={self.group_size} is not a positive number.'
      )
    if isinstance(self.axis, (tuple, list)):
      axes = tuple(self.axis)
      axis = axes if len(axes) > 1 else axes[0] if axes else None
      object.__setattr__(self, 'axis', axis)

  def kept_axes(self, ndim: int) -> tuple[int, ...]:
    """The axes with a scale per index, of an array of `ndim` axes, sorted."""
    return tuple(sorted(axis % ndim for axis in self._axes))

  @property
  def _axes(self) -> tuple[int, ...]:
    if self.axis is None:
      return ()
    return self.axis if isinstance(self.axis, tuple) else (self.axis,)

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
  An empty range gets scale 1, so that zeros stay zeros; and so does one whose
  scale is subnormal and has no finite reciprocal.

  Args:
    low: smallest value, any shape.
    high: largest value, same shape.
    spec: the quantizer.

  Returns:
    `(scale, zero_point)`, float32 of that shape; the zero point is integral.

  References:
    Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2017, arXiv:1712.05877.

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
  scale = jnp.where(scale >= jnp.finfo(jnp.float32).tiny, scale, 1.0)
  if spec.symmetric:
    return scale, jnp.zeros_like(scale)
  zero_point = jnp.round(spec.qmin - low / scale)
  return scale, jnp.clip(zero_point, spec.qmin, spec.qmax)


def check(spec: QuantSpec, shape: tuple[int, ...], name: str) -> None:
  """Raises a ValueError if a tensor has no such axes or groups.

  Args:
    spec: the quantizer.
    shape: of the tensor.
    name: of the tensor, to begin the message.

  Example:
    >>> check(QuantSpec(group_size=3), (8, 2), 'w')
    Traceback (most recent call last):
    ...
    ValueError: w: group_size=3 does not divide axis -2 of shape (8, 2).
  """
  ndim = len(shape)
  for axis in spec._axes:
    if not -ndim <= axis < ndim:
      raise ValueError(f'{name}: axis={axis} is not an axis of shape {shape}.')
  if spec.group_size is None:
    return
  if ndim < 2 or shape[-2] % spec.group_size:
    raise ValueError(
      f'{name}: group_size={spec.group_size} does not divide axis -2 of shape '
      f'{shape}.'
    )
  if ndim - 2 in spec.kept_axes(ndim):
    raise ValueError(
      f'{name}: axis={spec.axis} has a scale for each index of axis -2, which '
      f'group_size={spec.group_size} divides into groups.'
    )


def _blocks(
  x: jax.Array, spec: QuantSpec
) -> tuple[jax.Array, set[int], tuple[int, ...]]:
  """`x` with axis -2 split into groups, its kept axes, and the new axis."""
  kept = {*spec.kept_axes(x.ndim)}
  if spec.group_size is None:
    return x, kept, ()
  at = x.ndim - 2
  groups = x.shape[at] // spec.group_size
  # On a mesh with explicit axes: no group lies on several devices.
  x = gathered(x, at, parts=groups)
  x = x.reshape(*x.shape[:at], groups, spec.group_size, x.shape[-1])
  return x, {i + (i > at) for i in kept} | {at}, (at + 1,)


def extremes(
  x: jax.Array, spec: QuantSpec, name: str = 'tensor'
) -> tuple[jax.Array, jax.Array]:
  """The smallest and largest value of every block that has its own scale.

  Args:
    x: float array.
    spec: the quantizer.
    name: of the tensor, for errors.

  Returns:
    `(low, high)` with the dtype and the number of axes of `x`: kept axes have
    their size, axis -2 the number of groups, all others size 1.

  Raises:
    ValueError: see `check`.

  Example:
    >>> spec = QuantSpec(axis=-1, group_size=2)
    >>> extremes(jnp.arange(8.0).reshape(4, 2), spec)[1].tolist()
    [[2.0, 3.0], [6.0, 7.0]]
  """
  check(spec, x.shape, name)
  x, kept, new = _blocks(x, spec)
  others = tuple(i for i in range(x.ndim) if i not in kept)
  low, high = (f(x, axis=others, keepdims=True) for f in (jnp.min, jnp.max))
  return jnp.squeeze(low, new), jnp.squeeze(high, new)


def rows(
  x: jax.Array, spec: QuantSpec, name: str = 'tensor'
) -> tuple[jax.Array, tuple[int, ...]]:
  """The values of every block that has its own scale, one row a block.

  Args:
    x: float array.
    spec: the quantizer.
    name: of the tensor, for errors.

  Returns:
    `([blocks, values of a block], shape)`; one number for each block,
    reshaped to `shape`, is laid out as the results of `extremes` are.

  Raises:
    ValueError: see `check`.
  """
  check(spec, x.shape, name)
  # Blocks are reordered, which explicit axes of a mesh would not survive.
  x, kept, new = _blocks(replicated(x), spec)
  others = [i for i in range(x.ndim) if i not in kept]
  sizes = [x.shape[i] if i in kept else 1 for i in range(x.ndim)]
  shape = tuple(n for i, n in enumerate(sizes) if i not in new)
  ordered = x.transpose(*sorted(kept), *others)
  return ordered.reshape(math.prod(shape), -1), shape


def per_channel(values: jax.Array, like: jax.Array) -> jax.Array:
  """Values per channel, shaped to combine with an array that ends in channels.

  `[D]` goes with `[..., D]`, and `[L, D]` with the `[L, ..., D]` of a scanned
  stack: axes of size 1 are put before the last one.
  """
  missing = range(max(values.ndim - 1, 0), like.ndim - min(values.ndim, 1))
  return jnp.expand_dims(values, tuple(missing))


def per_group(values: jax.Array, like: Any) -> jax.Array:
  """Values per group, repeated along axis -2 to combine with the whole array.

  Args:
    values: `[..., groups, D]`, such as a scale from `weight_scale`. Others,
      per tensor or per channel, are returned as they are.
    like: the array, `[..., groups * group_size, D]`.

  Example:
    >>> per_group(jnp.array([[1.0], [2.0]]), jnp.zeros((4, 1)))[:, 0].tolist()
    [1.0, 1.0, 2.0, 2.0]
  """
  if values.ndim != like.ndim or values.ndim < 2:
    return values
  groups, size = values.shape[-2], like.shape[-2]
  if groups in (1, size):
    return values
  # Unlike jnp.repeat, this keeps the explicit axes of a mesh.
  *outer, width = values.shape
  shape = (*outer, size // groups, width)
  repeated = jnp.broadcast_to(values[..., None, :], shape)
  return repeated.reshape(*values.shape[:-2], size, width)
