"""Convolutions of a linen Conv: its padding under a zero point, its product.

Owns the geometry of the layer and its product on codes. Reads no variables and
knows nothing of other layers; how XLA runs the product is in
`convolution_ways`. Kernels are `[..., I, O]` after the window's axes, inputs
`[B, ..., D]`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.quantize.convolution_ways import WAYS, Geometry, convolve, fastest
from kd_jax.quantize.products import Codes, finish
from kd_jax.quantize.specs import per_channel


def pad(module: Any, x: jax.Array, value: jax.Array) -> jax.Array:
  """The input with the padding and input dilation of a Conv.

  Args:
    module: a Conv layer.
    x: `[B, ..., D]`, real values or codes.
    value: of the padding, a scalar of that dtype: real 0.
  """
  rank = x.ndim - 2
  sizes = _window(module, rank)
  dilation = _sizes(module.input_dilation, rank)
  if module.padding in ('CIRCULAR', 'REFLECT'):
    edges = [((k - 1) // 2, k // 2) for k in sizes]
    mode = 'wrap' if module.padding == 'CIRCULAR' else 'reflect'
    x = jnp.pad(x, [(0, 0), *edges, (0, 0)], mode=mode)
    edges = [(0, 0)] * rank
  else:
    edges = _edges(module, x.shape[1:-1], sizes)
  padding = [
    (low, high, d - 1) for (low, high), d in zip(edges, dilation, strict=True)
  ]
  if set(padding) == {(0, 0, 0)}:
    return x
  return jax.lax.pad(x, value, [(0, 0, 0), *padding, (0, 0, 0)])


def _edges(
  module: Any, shape: Sequence[int], sizes: Sequence[int]
) -> list[tuple[int, int]]:
  """What a Conv pads with zeros on both sides of each spatial axis."""
  rank, padding = len(shape), module.padding
  if padding == 'CAUSAL':
    return [(sizes[0] - 1, 0)]
  if isinstance(padding, str):
    strides = _sizes(module.strides, rank)
    return list(jax.lax.padtype_to_pads(shape, sizes, strides, padding))
  sides = (padding,) * rank if isinstance(padding, int) else padding
  return [(p, p) if isinstance(p, int) else tuple(p) for p in sides]


def _sizes(value: Any, rank: int) -> tuple[int, ...]:
  value = 1 if value is None else value
  return (value,) * rank if isinstance(value, int) else tuple(value)


def _window(module: Any, rank: int) -> list[int]:
  dilation = _sizes(module.kernel_dilation, rank)
  sizes = _sizes(module.kernel_size, rank)
  return [(k - 1) * d + 1 for k, d in zip(sizes, dilation, strict=True)]


def check(module: Any) -> None:
  """Raises ValueError for a Conv that has no integer execution."""
  if module.mask is not None:
    raise ValueError(
      f'{"/".join(module.path)}: a convolution with a kernel mask has no '
      'integer execution; prune its kernel instead.'
    )


def one_batch(module: Any, x: jax.Array) -> tuple[tuple[int, ...], jax.Array]:
  """The batch axes of a Conv's input, and the input with a single one."""
  rank = len(_sizes(module.kernel_size, 1))
  batch = x.shape[: x.ndim - rank - 1]
  return batch, x if len(batch) == 1 else x.reshape(-1, *x.shape[-rank - 1 :])


def of_layer(module: Any, x: jax.Array, w: jax.Array) -> jax.Array:
  """A Conv's product of real values, its input padded.

  Where windows tile the input, as in the patches of a transformer, it is one
  matrix product, which onnxruntime runs on integers whatever follows it.
  """
  rank = x.ndim - 2
  strides = _sizes(module.strides, rank)
  if (
    strides == w.shape[:rank] == tuple(_window(module, rank))
    and module.feature_group_count == 1
    and math.prod(strides) > 1
    and not any(n % s for n, s in zip(x.shape[1:-1], strides, strict=True))
  ):
    return _tiled(x, w, strides)
  return convolve(x, w, _geometry(module, rank))


def _tiled(x: jax.Array, w: jax.Array, strides: Sequence[int]) -> jax.Array:
  counts = [
    size // stride for size, stride in zip(x.shape[1:-1], strides, strict=True)
  ]
  both = [n for pair in zip(counts, strides, strict=True) for n in pair]
  x = x.reshape(x.shape[0], *both, x.shape[-1])
  rank = len(counts)
  outer, inner = range(1, 2 * rank, 2), range(2, 2 * rank + 1, 2)
  x = jnp.transpose(x, (0, *outer, *inner, 2 * rank + 1))
  rows = w.reshape(-1, w.shape[-1])
  x = x.reshape(x.shape[0], *counts, rows.shape[0])
  return jax.lax.dot_general(x, rows, (((rank + 1,), (0,)), ((), ())))


def _geometry(module: Any, rank: int) -> Geometry:
  return Geometry(
    _sizes(module.strides, rank),
    _sizes(module.kernel_dilation, rank),
    module.feature_group_count,
  )


def product(
  module: Any,
  x: Codes,
  w: Codes,
  bias: jax.Array | None,
  *,
  way: str,
) -> jax.Array:
  """The convolution of codes: int8 by int8 into int32, then both scales.

  Args:
    module: a Conv layer.
    x: the padded input, `[B, ..., D]`; its scale and zero point are `[]` or
      `[B, 1, ..., 1]`.
    w: the kernel; a scale of size G along axis -2 is of groups of that axis.
    bias: `[O]`; int32 in steps of both scales, or float32.
    way: 'direct', 'im2col' or 'float32', which give the same integers, or
      'auto' for that of the default backend.

  Returns:
    float32 `[B, ..., O]`.

  Raises:
    ValueError: for a scale of the input that varies along a summed axis.
  """
  features = w.code.shape[-1]
  geometry = _geometry(module, x.code.ndim - 2)
  # Where each channel is convolved alone, channels are not summed.
  alone = geometry.groups == x.code.shape[-1] == features
  summed = jnp.shape(x.scale)[1:-1] if alone else jnp.shape(x.scale)[1:]
  if any(size != 1 for size in summed):
    raise ValueError(
      f'{"/".join(module.path)}: a scale of shape {jnp.shape(x.scale)} varies '
      'along an axis that is summed.'
    )
  groups, parts = geometry.groups, w.scale.shape[-2]
  geometry = geometry._replace(groups=groups * parts)
  kernel, scale = _split_groups(w, groups)
  if way == 'auto':
    way = fastest(kernel, geometry.groups)
  total = WAYS[way](x.code, kernel, geometry)
  if x.zero_point is not None:
    # XLA sums the rows of a matrix three times faster than many axes.
    rows = kernel.reshape(-1, kernel.shape[-1])
    sums = jnp.sum(rows, axis=0, dtype=jnp.int32)
    total -= x.zero_point * per_channel(sums, total)
  scale = x.scale * per_channel(scale, total)
  bias = bias if bias is None else per_channel(bias, total)

  def sum_groups(y):
    y = y.reshape(*y.shape[:-1], groups, parts, features // groups)
    return jnp.sum(y, axis=-2).reshape(*y.shape[:-3], features)

  return finish(total, scale, bias, sum_groups if parts > 1 else None)


def _split_groups(w: Codes, groups: int) -> tuple[jax.Array, jax.Array]:
  """The kernel of a convolution that sums each group of a kernel alone.

  Returns:
    `[..., I / G, groups * G * O / groups]` and the scale of its last axis.
  """
  features, parts = w.code.shape[-1], w.scale.shape[-2]
  if parts == 1:
    return w.code, w.scale.reshape(-1)
  code = w.code.reshape(
    *w.code.shape[:-2], parts, -1, groups, features // groups
  )
  code = jnp.moveaxis(code, -4, -2)
  code = code.reshape(*code.shape[:-3], -1)
  scale = jnp.broadcast_to(w.scale, (*w.scale.shape[:-1], features))
  scale = scale.reshape(parts, groups, features // groups)
  return code, jnp.swapaxes(scale, 0, 1).reshape(-1)
