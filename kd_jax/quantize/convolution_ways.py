"""Ways to run a convolution: of real values, and three of codes.

Owns the ways and the choice among them; all ways of codes give the same
integers. Which layer it is, its padding, zero points and scales are in
`convolutions`. Kernels are `[..., I, O]` after the window's axes, inputs
`[B, ..., D]`, padded.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kd_jax import rules
from kd_jax.quantize.specs import per_channel

# Below this, sums of products of codes are exact in float32.
_EXACT = 2**24
_LARGEST_PRODUCT = 128 * 127


class Geometry(NamedTuple):
  """How the windows of a convolution lie.

  Attributes:
    strides: of each spatial axis.
    dilation: of the kernel.
    groups: of channels that do not see each other.
  """

  strides: tuple[int, ...]
  dilation: tuple[int, ...]
  groups: int


def convolve(
  x: jax.Array, w: jax.Array, geometry: Geometry, **options: Any
) -> jax.Array:
  """The convolution of an input that is already padded.

  Args:
    x: `[B, ..., D]`.
    w: `[..., D / groups, O]`.
    geometry: how the windows lie.
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
    geometry.strides,
    'VALID',
    rhs_dilation=geometry.dilation,
    dimension_numbers=numbers,
    feature_group_count=geometry.groups,
    **options,
  )


def _direct(x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
  return convolve(x, w, geometry, preferred_element_type=jnp.int32)


def _im2col(x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
  """One matrix product of all windows side by side, in which XLA:GPU is fast.

  Depthwise convolutions are sums of products instead: their matrices would
  have one column.
  """
  strides, dilation, groups = geometry
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


def _float32(x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
  """The float convolution of exact integers, where they stay exact."""
  if math.prod(w.shape[:-1]) * _LARGEST_PRODUCT >= _EXACT:
    return _im2col(x, w, geometry)
  y = convolve(
    x.astype(jnp.float32),
    w.astype(jnp.float32),
    geometry,
    precision=jax.lax.Precision.HIGHEST,
  )
  return y.astype(jnp.int32)


WAYS: dict[str, Callable[..., jax.Array]] = {
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
  rules.choose('convolution', name, {'auto': None, **WAYS})
