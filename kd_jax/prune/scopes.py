"""How many weights stay, in all and per layer.

Owns exact counts and the scopes that share them out: 'global', 'layer' and
Erdos-Renyi-Kernel. Which weights these are is the matter of `masks`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kd_jax import rules as rules_lib

LARGEST_SIZE = 2**31 - 1


class Erk(NamedTuple):
  """The scope that `erk` makes.

  Attributes:
    stacked: `re.fullmatch` pattern of the parameters that are stacks of
      layers, or None.
  """

  stacked: str | None = None


Scope = str | Erk
SCOPES: dict[str, Scope] = {'global': 'global', 'layer': 'layer', 'erk': Erk()}


def erk(*, stacked: str | None = None) -> Erk:
  """A scope with layer densities in proportion to sum(shape) / prod(shape).

  Small layers stay denser than large ones. See `erk_densities`.

  Args:
    stacked: `re.fullmatch` pattern of the paths of parameters whose first
      axis counts layers (`nn.scan`); that axis is left out of the shape.

  Returns:
    A scope for `prune`, `sparse_train`, `masks_from` and `magnitude_masks`.

  Example:
    >>> erk(stacked='blocks/.*').stacked
    'blocks/.*'

  References:
    Evci et al., "Rigging the Lottery", 2019, arXiv:1911.11134; the densities
    without kernel sizes are those of Mocanu et al., 2017, arXiv:1707.04780.
  """
  return Erk(stacked)


def resolve(scope: Scope) -> Scope:
  """The scope that a name stands for; a ValueError for an unknown name."""
  if isinstance(scope, Erk):
    return scope
  return rules_lib.choose('scope', scope, SCOPES)


def kept_count(size: int, sparsity: ArrayLike) -> jax.Array:
  """Number of weights that stay: size - round(sparsity * size), at least 1.

  The product is exact, in integers, and a half is rounded to even. Sparsity is
  a float32, also inside of a compiled step; one within rounding of a decimal
  of four digits counts as that decimal, so that 0.9 of 15 is 13.5.

  Args:
    size: number of weights, below 2**31.
    sparsity: share to prune, clipped to [0, 1]; may be traced. What is finer
      than 2**-30 in it is rounded off.

  Returns:
    int32 scalar; 0 only for `size` 0.

  Raises:
    ValueError: for 2**31 weights or more.

  Example:
    >>> [int(kept_count(size, 0.9)) for size in (15, 2, 100_000_001)]
    [1, 1, 10000000]
  """
  size = int(size)
  if size > LARGEST_SIZE:
    raise ValueError(
      f'{size} weights are too many for one threshold (at most '
      f"{LARGEST_SIZE}); use scope='layer'."
    )
  pruned = _rounded_product(size, jnp.asarray(sparsity, jnp.float32))
  return jnp.maximum(size - pruned.astype(jnp.int32), min(size, 1))


def _rounded_product(size: int, share: jax.Array) -> jax.Array:
  """round(share * size) as uint32, for a float32 share."""
  share = jnp.clip(share, 0.0, 1.0)
  decimal = share * 10_000
  digits = jnp.round(decimal)
  is_decimal = jnp.abs(decimal - digits) <= digits * 2.0**-23
  # share = digits / 10**4, in parts that fit 32 bits.
  digits = digits.astype(jnp.uint32)
  many, few = divmod(size, 10_000)
  rest = digits * few
  by_decimal = _round_half_even(
    digits * many + rest // 10_000, rest % 10_000, 5_000
  )
  # share = (high + low / 2**15) / 2**15, size = many * 2**15 + few.
  high = jnp.floor(share * 2**15)
  low = jnp.round((share * 2**15 - high) * 2**15).astype(jnp.uint32)
  high = high.astype(jnp.uint32)
  many, few = divmod(size, 2**15)
  a, b, bits = high * few, low * many, 2**15 - 1
  rest = ((a & bits) << 15) + ((b & bits) << 15) + low * few
  whole = high * many + (a >> 15) + (b >> 15) + (rest >> 30)
  by_bits = _round_half_even(whole, rest & (2**30 - 1), 2**29)
  return jnp.where(is_decimal, by_decimal, by_bits)


def _round_half_even(
  whole: jax.Array, rest: jax.Array, half: jax.Array | int
) -> jax.Array:
  odd = whole % 2 == 1
  return whole + ((rest > half) | ((rest == half) & odd)).astype(jnp.uint32)


def erk_densities(
  shapes: Mapping[str, Sequence[int]],
  sparsity: ArrayLike,
  *,
  stacked: str | None = None,
  sizes: Mapping[str, int] | None = None,
) -> dict[str, jax.Array]:
  """The share of weights that every layer keeps under Erdos-Renyi-Kernel.

  density = min(1, eps * sum(shape) / prod(shape)), with the one eps for which
  the total is right: layers that would be more than dense are made dense, and
  eps is solved again for the others.

  Args:
    shapes: parameter path -> shape.
    sparsity: share of all weights to prune; may be traced.
    stacked: see `erk`.
    sizes: number of units of each parameter if that is not its number of
      weights; the total is then in units.

  Returns:
    parameter path -> float32 scalar in [0, 1].

  Raises:
    ValueError: for 2**31 weights, or units, or more in all.

  Example:
    >>> densities = erk_densities({'small': (4, 4), 'large': (40, 40)}, 0.8)
    >>> [round(float(d), 3) for d in densities.values()]
    [1.0, 0.192]

  References:
    Evci et al., 2019, arXiv:1911.11134, section 3.
  """
  if sizes is None:
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
  keep = kept_count(sum(sizes.values()), sparsity)
  raw = np.array([_raw(n, s, stacked) for n, s in shapes.items()], np.float64)
  counts = np.array([sizes[name] for name in shapes], np.float64)
  densities = _erk(raw, counts, keep)
  return dict(zip(shapes, densities, strict=True))


def _raw(name: str, shape: Sequence[int], stacked: str | None) -> float:
  if stacked is not None and re.fullmatch(stacked, name):
    shape = shape[1:]
  return sum(shape) / max(math.prod(shape), 1)


def _erk(raw: np.ndarray, sizes: np.ndarray, keep: jax.Array) -> jax.Array:
  """`[L]` densities for raw densities and sizes per layer, and their total."""
  order = np.argsort(-raw, kind='stable')
  weighted = (raw * sizes)[order]
  # The j densest layers are dense: eps for the others, for j = 0, 1, ...
  dense = np.cumsum(sizes[order]) - sizes[order]
  rest = np.maximum(np.cumsum(weighted[::-1])[::-1], np.finfo('f').tiny)
  eps = (keep.astype(jnp.float32) - dense.astype('f')) / rest.astype('f')
  fits = (eps * raw[order].astype('f') <= 1) | (
    np.arange(len(raw)) == len(raw) - 1
  )
  return jnp.clip(eps[jnp.argmax(fits)] * raw.astype('f'), 0.0, 1.0)


def layer_counts(
  scope: Scope,
  sparsity: ArrayLike,
  sizes: Mapping[str, int],
  shapes: Mapping[str, Sequence[int]],
  alive: Mapping[str, jax.Array],
) -> dict[str, jax.Array] | None:
  """The number of units that every layer keeps.

  Args:
    scope: from `resolve`.
    sparsity: share to prune; may be traced.
    sizes: name -> number of units.
    shapes: name -> shape of the parameter; read by ERK only.
    alive: name -> number of units that were not pruned before. ERK gives no
      layer more, so that rounding takes nothing from the total.

  Returns:
    name -> int32 scalar, at least 1 and at most the size; None if there is one
    threshold for all. Under ERK the counts add up to `kept_count` of the sum
    (or one of every layer, if that is more).

  Raises:
    ValueError: if ERK lacks the shape of a parameter.
  """
  if scope == 'layer':
    return {name: kept_count(size, sparsity) for name, size in sizes.items()}
  if not isinstance(scope, Erk):
    return None
  missing = [name for name in sizes if name not in shapes]
  if missing:
    raise ValueError(
      'The scope erk needs units that are parts of one parameter; '
      f'{missing[0]!r} is no parameter.'
    )
  shapes = {name: shapes[name] for name in sizes}
  densities = erk_densities(
    shapes, sparsity, stacked=scope.stacked, sizes=sizes
  )
  largest = jnp.asarray(list(sizes.values()), jnp.int32)
  room = jnp.stack([jnp.asarray(alive[name], jnp.int32) for name in sizes])
  keep = kept_count(sum(sizes.values()), sparsity)
  keep = jnp.maximum(keep, sum(min(size, 1) for size in sizes.values()))
  room = jnp.where(jnp.sum(room) >= keep, room, largest)
  shared = _share_out(jnp.stack(list(densities.values())), largest, room, keep)
  return dict(zip(sizes, shared, strict=True))


def _share_out(
  densities: jax.Array, sizes: jax.Array, room: jax.Array, keep: jax.Array
) -> jax.Array:
  """`[L]` counts near densities * sizes, within [1, room], that sum to keep.

  The remainders go to the layers with the largest fractions, lower ones first.
  """
  ideal = densities * sizes.astype(jnp.float32)
  least = jnp.minimum(room, 1)
  counts = jnp.clip(jnp.floor(ideal).astype(jnp.int32), least, room)
  fraction = jnp.where(counts < room, ideal - jnp.floor(ideal), -1.0)
  index = np.arange(len(sizes))
  before = (fraction[:, None] < fraction[None]) | (
    (fraction[:, None] == fraction[None]) & (index[:, None] > index[None])
  )
  rank = jnp.sum(before, axis=1)
  missing = keep - jnp.sum(counts)
  counts += ((rank < missing) & (counts < room)).astype(jnp.int32)
  # What clipping still leaves over is filled up, or taken away, in order.
  missing = keep - jnp.sum(counts)
  counts += _fill(missing, room - counts)
  return counts - _fill(-missing, counts - least)


def _fill(amount: jax.Array, room: jax.Array) -> jax.Array:
  return jnp.clip(amount - (jnp.cumsum(room) - room), 0, room)
