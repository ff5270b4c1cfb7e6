"""Convolutions on integers: padding under a zero point, and three ways to run.

Owns the geometry of a linen Conv and its product on codes. Reads no variables
and knows nothing of other layers. Kernels are `[..., I, O]` after the window's
axes, inputs `[B, ..., D]`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax import rules
from kd_jax.quantize.fake_quant import per_channel
from kd_jax.quantize.products import Codes

# Below this, sums of products of codes are exact in float32.
_EXACT = 2**24
_LARGEST_PRODUCT = 128 * 127


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
  return convolve(
    x,
    w,
    strides=strides,
    dilation=_sizes(module.kernel_dilation, rank),
    groups=module.feature_group_count,
  )


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


def convolve(
  x: jax.Array,
  w: jax.Array,
  *,
  strides: Sequence[int],
  dilation: Sequence[int],
  groups: int,
  **options: Any,
) -> jax.Array:
  """The convolution of an input that is already padded.

  Args:
    x: `[B, ..., D]`.
    w: `[..., D / groups, O]`.
    strides: of each spatial axis.
    dilation: of the kernel.
    groups: of channels that do not see each other.
    **options: of `jax.lax.conv_general_dilated`.
  """
  rank = x.ndim - 2
  spatial = range(1, rank + 1)
  numbers = jax.lax.ConvDimensionNumbers(
    (0, rank + 1, *spatial),
    (rank + 1, rank, *range(rank)),
    (0, rank + 1, *spatial),
  )
  return jax.lax.conv_general_dilated(
    x,
    w,
    strides,
    'VALID',
    rhs_dilation=dilation,
    dimension_numbers=numbers,
    feature_group_count=groups,
    **options,
  )


def _direct(x: jax.Array, w: jax.Array, **geometry: Any) -> jax.Array:
  return convolve(x, w, preferred_element_type=jnp.int32, **geometry)


def _im2col(
  x: jax.Array,
  w: jax.Array,
  *,
  strides: Sequence[int],
  dilation: Sequence[int],
  groups: int,
) -> jax.Array:
  """One matrix product of all windows side by side, in which XLA:GPU is fast.

  Depthwise convolutions are sums of products instead: their matrices would
  have one column.
  """
  rank = x.ndim - 2
  sizes = [
    (n - (k - 1) * d - 1) // s + 1
    for n, k, d, s in zip(
      x.shape[1:-1], w.shape[:rank], dilation, strides, strict=True
    )
  ]
  windows = []
  for offset in itertools.product(*(range(k) for k in w.shape[:rank])):
    start = [o * d for o, d in zip(offset, dilation, strict=True)]
    index = tuple(
      slice(a, a + (n - 1) * s + 1, s)
      for a, n, s in zip(start, sizes, strides, strict=True)
    )
    windows.append(x[:, *index])
  channels, features = w.shape[-2:]
  if channels == 1:
    wide = [v.astype(jnp.int32) for v in windows]
    taps = w.reshape(-1, features).astype(jnp.int32)
    each = features // groups
    wide = [jnp.repeat(v, each, axis=-1) for v in wide]
    products = [v * per_channel(taps[i], v) for i, v in enumerate(wide)]
    return sum(products[1:], start=products[0])
  kernel = w.reshape(-1, groups, features // groups)
  split = [v.reshape(*v.shape[:-1], groups, channels) for v in windows]
  columns = jnp.concatenate(split, axis=-1)
  equation = '...gk,kgo->...go'
  if groups == 1:
    columns, kernel = columns[..., 0, :], kernel[:, 0]
    equation = '...k,ko->...o'
  out = jnp.einsum(equation, columns, kernel, preferred_element_type=jnp.int32)
  return out.reshape(*out.shape[: rank + 1], features)


def _float32(x: jax.Array, w: jax.Array, **geometry: Any) -> jax.Array:
  """The float convolution of exact integers, where they stay exact."""
  if math.prod(w.shape[:-1]) * _LARGEST_PRODUCT >= _EXACT:
    return _im2col(x, w, **geometry)
  y = convolve(
    x.astype(jnp.float32),
    w.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
    **geometry,
  )
  return y.astype(jnp.int32)


_WAYS: dict[str, Callable[..., jax.Array]] = {
  'direct': _direct,
  'im2col': _im2col,
  'float32': _float32,
}


def fastest(w: jax.Array, groups: int) -> str:
  """The way that 'auto' stands for: the fastest on the default backend.

  Milliseconds on two cores of an AMD EPYC with VNNI, the best of 80 runs in
  turns (`benchmarks/int8.py` prints them for your machine):

  | input -> channels, 3x3     | jax  | direct | im2col | float32 convolution |
  | ---                        | ---: | ---:   | ---:   | ---:                |
  | 16x34x34x64 -> 64          | 0.12 | 2.20   | 8.92   | 19.21               |
  | 16x18x18x128 -> 256, by 2  | 0.12 | 1.17   | 1.55   | 3.56                |
  | 16x16x16x128 -> 128, 1x1   | 0.12 | 0.47   | 0.38   | 1.45                |
  | 16x34x34x64, depthwise     | 0.12 | 361    | 0.45   | 32.8                |
  | 16x34x34x64 -> 64          | 0.10 | 14.8   | 12.1   | 63.8                |
  | 8x16x16x256 -> 256         | 0.10 | 44.0   | 20.8   | 88.5                |

  Small kernels of 0.12, 3x3 on 16x34x34, direct against im2col: 16 -> 16
  channels 6.35 and 0.96 ms, 3 -> 64 0.96 and 0.43, 8 -> 16 3.37 and 0.53; but
  16 -> 20 0.71 and 1.54, 12 -> 32 0.65 and 1.42, 64 -> 8 0.86 and 3.67. XLA
  has a fast direct one from more than 256 pairs of channels on.

  So on CPUs it is direct from JAX 0.12 on, but for groups of channels, windows
  of one and up to 256 pairs of channels, and im2col before. XLA has no int8
  convolution for GPUs, where it is im2col; on TPUs it is direct.

  Args:
    w: the kernel, `[..., I, O]`.
    groups: of channels.

  Example:
    >>> fastest(jnp.ones((3, 3, 1, 8), jnp.int8), groups=8)
    'im2col'
  """
  backend = jax.default_backend()
  if backend == 'cpu':
    pairs = w.shape[-2] * w.shape[-1]
    plain = groups == 1 and pairs > 256 and math.prod(w.shape[:-2]) > 1
    return 'direct' if plain and jax.__version_info__ >= (0, 12) else 'im2col'
  return 'im2col' if backend == 'gpu' else 'direct'


def check_way(name: str) -> None:
  """Raises ValueError for a way of running convolutions that is none."""
  rules.choose('convolution', name, {'auto': None, **_WAYS})


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
  """
  rank = x.code.ndim - 2
  features = w.code.shape[-1]
  groups, parts = module.feature_group_count, w.scale.shape[-2]
  kernel, scale = _split_groups(w, groups)
  if way == 'auto':
    way = fastest(kernel, groups * parts)
  total = _WAYS[way](
    x.code,
    kernel,
    strides=_sizes(module.strides, rank),
    dilation=_sizes(module.kernel_dilation, rank),
    groups=groups * parts,
  )
  if x.zero_point is not None:
    # XLA sums the rows of a matrix three times faster than many axes.
    rows = kernel.reshape(-1, kernel.shape[-1])
    sums = jnp.sum(rows, axis=0, dtype=jnp.int32)
    total -= x.zero_point * per_channel(sums, total)
  scale = x.scale * per_channel(scale, total)
  bias = bias if bias is None else per_channel(bias, total)
  if bias is not None and bias.dtype == jnp.int32:
    return (total + bias).astype(jnp.float32) * scale
  y = total.astype(jnp.float32) * scale
  if parts > 1:
    y = y.reshape(*y.shape[:-1], groups, parts, features // groups)
    y = jnp.sum(y, axis=-2).reshape(*y.shape[:-3], features)
  return y if bias is None else y + bias


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
