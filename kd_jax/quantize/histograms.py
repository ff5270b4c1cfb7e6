"""Histograms that merge exactly: how often which values occurred.

Owns a signed histogram of fixed size whose range grows by doubling, and what
can be read from it. It knows no quantizer: the searches for a range are in
`criteria`.

The bins cover [-2**e, 2**e) with the smallest e that holds every value. A
range twice as wide merges neighbouring bins in pairs, so that bins are nested
and a histogram depends on the values alone: neither on their order nor on how
they were split over batches, devices or hosts. Zeros are counted apart; they
are exact on every grid, and there are many after a ReLU or after pruning.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

BINS = 4096
_HALF = BINS // 2
# The exponents: smaller magnitudes share the innermost bins.
_LEAST, _MOST = -100, 128

Stats = dict[str, jax.Array]


class Bins(NamedTuple):
  """Bins of a histogram in units of its 2**e, clipped to the extremes.

  Attributes:
    left: float32 `[N]`, in increasing order, within [-1, 1].
    right: float32 `[N]`; equal to `left` for zeros, and for a bin in which
      all values are the same.
    counts: float32 `[N]`.
  """

  left: jax.Array
  right: jax.Array
  counts: jax.Array


def _power(exponent: jax.Array) -> jax.Array:
  """2**exponent, exactly, for exponents in [-126, 127]."""
  bits = (jnp.asarray(exponent, jnp.int32) + 127) << 23
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def scaled(x: jax.Array, exponent: jax.Array) -> jax.Array:
  """x / 2**e, exactly, for the exponents of a histogram."""
  return x * _power(11 - exponent) / 2**11


def unscaled(x: jax.Array, exponent: jax.Array) -> jax.Array:
  """x * 2**e, exactly, for the exponents of a histogram."""
  return x * 2**11 * _power(exponent - 11)


def empty() -> Stats:
  """The histogram of no values."""
  return {
    'low': jnp.float32(0),
    'high': jnp.float32(0),
    'count': jnp.float32(0),
    'zeros': jnp.float32(0),
    'counts': jnp.zeros(BINS, jnp.float32),
    'exponent': jnp.int32(0),
  }


def extremes_of(x: jax.Array, axis_name: str | None = None) -> Stats:
  """The smallest and largest value of one batch; no gradient.

  Args:
    x: float array.
    axis_name: the mapped axis that the batch is spread over.

  Returns:
    `low`, `high` and a `count` of 1, float32 scalars.
  """
  x = jax.lax.stop_gradient(x).astype(jnp.float32)
  low, high = jnp.min(x), jnp.max(x)
  if axis_name is not None:
    low = jax.lax.pmin(low, axis_name)
    high = jax.lax.pmax(high, axis_name)
  return {'low': low, 'high': high, 'count': jnp.float32(1)}


def merge_extremes(a: Stats, b: Stats) -> Stats:
  """The extremes of two parts; the number of batches adds."""
  # A part without a batch holds zeros, which are no values.
  low = jnp.minimum(
    jnp.where(a['count'] > 0, a['low'], b['low']),
    jnp.where(b['count'] > 0, b['low'], a['low']),
  )
  high = jnp.maximum(
    jnp.where(a['count'] > 0, a['high'], b['high']),
    jnp.where(b['count'] > 0, b['high'], a['high']),
  )
  return {'low': low, 'high': high, 'count': a['count'] + b['count']}


def of(x: jax.Array, axis_name: str | None = None) -> Stats:
  """The histogram of one batch; no gradient.

  Args:
    x: float array. NaN and infinities are in no bin, and visible in `low` or
      `high`.
    axis_name: the mapped axis that the batch is spread over.

  Returns:
    `low` and `high`, the exact extremes; `count`, 1 batch; `zeros`, the
    number of zeros; `counts` `[BINS]`, the numbers of other values, all
    float32; and `exponent`, int32. A count is exact up to 2**24.

  Example:
    >>> stats = of(jnp.array([0.0, 0.25, -0.75]))
    >>> int(stats['exponent']), float(stats['zeros'])
    (0, 1.0)
    >>> jnp.flatnonzero(stats['counts']).tolist()
    [512, 2560]
  """
  stats = extremes_of(x, axis_name)
  x = jax.lax.stop_gradient(x).astype(jnp.float32)
  finite = jnp.isfinite(x)
  x = jnp.where(finite, x, 0)
  largest = jnp.max(jnp.abs(x))
  if axis_name is not None:
    largest = jax.lax.pmax(largest, axis_name)
  # frexp gives the e with largest in [2**(e - 1), 2**e).
  exponent = jnp.where(largest > 0, jnp.frexp(largest)[1], _LEAST)
  exponent = jnp.clip(exponent, _LEAST, _MOST).astype(jnp.int32)
  index = jnp.floor(x * _power(11 - exponent)).astype(jnp.int32) + _HALF
  index = jnp.clip(index, 0, BINS - 1)
  # In integers: a float32 sum of ones stops at 2**24.
  counted = finite & (x != 0)
  counts = _count(index, counted.astype(jnp.int32))
  zeros = jnp.sum(finite & (x == 0), dtype=jnp.int32)
  if axis_name is not None:
    counts, zeros = jax.lax.psum((counts, zeros), axis_name)
  return stats | {
    'zeros': zeros.astype(jnp.float32),
    'counts': counts.astype(jnp.float32),
    'exponent': exponent,
  }


def _count(index: jax.Array, ones: jax.Array) -> jax.Array:
  sharded = any(part is not None for part in jax.typeof(index).sharding.spec)
  # On a mesh with explicit axes the sum is on every device.
  out = PartitionSpec() if sharded else None
  return jnp.zeros(BINS, ones.dtype).at[index].add(ones, out_sharding=out)


def merge(a: Stats, b: Stats) -> Stats:
  """The histogram of the values of both; associative and commutative."""
  used = [jnp.where(s['count'] > 0, s['exponent'], _LEAST) for s in (a, b)]
  exponent = jnp.maximum(*used)
  counts = [
    _coarsen(s['counts'], exponent - e)
    for s, e in zip((a, b), used, strict=True)
  ]
  merged = merge_extremes(a, b)
  return merged | {
    'zeros': a['zeros'] + b['zeros'],
    'counts': counts[0] + counts[1],
    'exponent': jnp.where(merged['count'] > 0, exponent, 0),
  }


def _coarsen(counts: jax.Array, doublings: jax.Array) -> jax.Array:
  """The counts in bins that are 2**doublings times as wide."""
  shift = jnp.minimum(doublings, 31)
  index = ((jnp.arange(BINS, dtype=jnp.int32) - _HALF) >> shift) + _HALF
  return jnp.zeros_like(counts).at[index].add(counts)


def bins(stats: Stats, *, ignore_zeros: bool = False) -> Bins:
  """The `BINS + 1` bins of a histogram; the zeros are a bin without width.

  Args:
    stats: the histogram.
    ignore_zeros: whether the zeros count as none.
  """
  low, high = (scaled(stats[k], stats['exponent']) for k in ('low', 'high'))
  edges = jnp.arange(-_HALF, _HALF + 1, dtype=jnp.float32) / _HALF
  edges = jnp.clip(edges, jnp.minimum(low, 0), jnp.maximum(high, 0))
  left, right = edges[:-1], edges[1:]
  # All values of the first bin are at least `low`, even if all are positive.
  left, right = jnp.maximum(left, low), jnp.minimum(right, high)
  zeros = 0.0 if ignore_zeros else stats['zeros']
  return Bins(
    _insert(jnp.minimum(left, right), 0.0),
    _insert(jnp.maximum(left, right), 0.0),
    _insert(stats['counts'], zeros),
  )


def _insert(values: jax.Array, middle: float | jax.Array) -> jax.Array:
  one = jnp.full(1, middle, jnp.float32)
  return jnp.concatenate([values[:_HALF], one, values[_HALF:]])


def amplitudes(stats: Stats, *, ignore_zeros: bool = False) -> Bins:
  """The bins of |x|: zeros, then `BINS / 2` bins of equal width.

  Args:
    stats: the histogram.
    ignore_zeros: whether the zeros count as none.
  """
  largest = jnp.maximum(-stats['low'], stats['high'])
  largest = scaled(largest, stats['exponent'])
  edges = jnp.arange(_HALF + 1, dtype=jnp.float32) / _HALF
  edges = jnp.minimum(edges, largest)
  counts = stats['counts'][_HALF:] + stats['counts'][:_HALF][::-1]
  zeros = 0.0 if ignore_zeros else stats['zeros']
  return Bins(
    jnp.concatenate([jnp.zeros(1), edges[:-1]]),
    jnp.concatenate([jnp.zeros(1), edges[1:]]),
    jnp.concatenate([jnp.full(1, zeros), counts]),
  )


def above(b: Bins, threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
  """How many values lie above a threshold, and their sum.

  Within a bin values count as evenly spread.

  Args:
    b: bins.
    threshold: scalar in the units of the bins, not negative.
  """
  width = b.right - b.left
  inside = jnp.clip(b.right - threshold, 0, width) / jnp.where(
    width > 0, width, 1
  )
  # Values that are all the same are above it if they reach it; zeros never.
  same = (b.left >= threshold) & (b.left > 0)
  part = jnp.where(width > 0, inside, same)
  counts = b.counts * part
  middle = (jnp.maximum(b.left, threshold) + b.right) / 2
  middle = jnp.where(width > 0, middle, b.left)
  return jnp.sum(counts), jnp.sum(counts * middle)


def upper_quantile(b: Bins, tail: jax.Array) -> jax.Array:
  """The value above which `tail` values lie, counted from the largest.

  Args:
    b: bins.
    tail: a number of values, not necessarily whole.

  Returns:
    float32 scalar in the units of the bins; within a bin values count as
    evenly spread.
  """
  # From the top, where counts are small and float32 sums exact.
  reached = jnp.cumsum(b.counts[::-1])[::-1]
  index = jnp.maximum(jnp.sum(reached >= tail) - 1, 0)
  count = b.counts[index]
  part = (tail - (reached[index] - count)) / jnp.maximum(count, 1)
  part = jnp.clip(part, 0, 1)
  return b.right[index] - part * (b.right[index] - b.left[index])


def lower_quantile(b: Bins, tail: jax.Array) -> jax.Array:
  """The value below which `tail` values lie, counted from the smallest."""
  mirrored = Bins(-b.right[::-1], -b.left[::-1], b.counts[::-1])
  return -upper_quantile(mirrored, tail)
