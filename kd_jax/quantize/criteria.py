"""The range of values to represent, searched for in a histogram.

Owns the criteria: percentile, mean squared error, entropy, OCTAV. Each takes
a histogram and a quantizer and returns `(low, high)`: symmetric quantizers
look for one clipping value of |x|, affine ones for both ends. They serve
tensors of any rank through `observers`.

Everything is computed in units of the histogram's 2**e, so that no square
over- or underflows, and ends within the exact extremes of the values.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kd_jax.quantize import histograms
from kd_jax.quantize.specs import QuantSpec, scale_and_zero_point

Range = tuple[jax.Array, jax.Array]

# Of OCTAV's ends, on the way to their fixed point.
_UPDATES = 20


def _exact_ends(stats: histograms.Stats) -> Range:
  """The extremes with 0 between them, in units of the histogram."""
  low, high = (
    histograms.scaled(stats[k], stats['exponent']) for k in ('low', 'high')
  )
  return jnp.minimum(low, 0), jnp.maximum(high, 0)


def _result(stats: histograms.Stats, low: jax.Array, high: jax.Array) -> Range:
  lowest, highest = _exact_ends(stats)
  low, high = jnp.clip(low, lowest, 0), jnp.clip(high, 0, highest)
  low, high = (histograms.unscaled(v, stats['exponent']) for v in (low, high))
  # NaN and infinities stay visible: they are in no bin.
  clean = jnp.isfinite(stats['low']) & jnp.isfinite(stats['high'])
  return (
    jnp.where(clean, low, stats['low']),
    jnp.where(clean, high, stats['high']),
  )


def percentile(
  stats: histograms.Stats,
  spec: QuantSpec,
  *,
  percent: float = 99.99,
  ignore_zeros: bool = False,
) -> Range:
  """The range that holds all but a share of the values at each end.

  Symmetric: the value that `percent` of |x| do not exceed. Affine: the
  percentiles `100 - percent` and `percent` of x. Between the edges of a bin
  values count as evenly spread.

  Args:
    stats: a histogram.
    spec: the quantizer.
    percent: in (50, 100].
    ignore_zeros: whether zeros count as no values, as after pruning.
  """
  share = 1 - percent / 100
  if spec.symmetric:
    b = histograms.amplitudes(stats, ignore_zeros=ignore_zeros)
    high = histograms.upper_quantile(b, share * jnp.sum(b.counts))
    return _result(stats, -high, high)
  b = histograms.bins(stats, ignore_zeros=ignore_zeros)
  tail = share * jnp.sum(b.counts)
  low = histograms.lower_quantile(b, tail)
  return _result(stats, low, histograms.upper_quantile(b, tail))


def squared_error(
  b: histograms.Bins, low: jax.Array, high: jax.Array, spec: QuantSpec
) -> jax.Array:
  """The sum over values of (x - Q(x))^2, rounding and clipping.

  With t = x / scale, k its code (clipped) less the zero point, the integral
  of (t - k)^2 dt is k / 12 + (t - k)^3 / 3 for any t; its difference over a
  bin is exact for values spread evenly over the bin.

  Args:
    b: bins.
    low: smallest value of the range, in the units of the bins; a scalar.
    high: largest value.
    spec: the quantizer.

  Returns:
    float32 scalar, in squared units of the bins.
  """
  scale, zero_point = scale_and_zero_point(low, high, spec)
  first, last = spec.qmin - zero_point, spec.qmax - zero_point

  def error(t):
    return t - jnp.clip(jnp.round(t), first, last)

  def integral(t):
    rest = error(t)
    return (t - rest) / 12 + rest**3 / 3

  left, right = b.left / scale, b.right / scale
  width = right - left
  spread = (integral(right) - integral(left)) / jnp.where(width > 0, width, 1)
  mean = jnp.where(width > 0, spread, error(left) ** 2)
  return jnp.sum(b.counts * mean) * scale**2


def mean_squared_error(stats: histograms.Stats, spec: QuantSpec) -> Range:
  """The range with the least squared error of rounding and clipping.

  Shares of the extremes are tried, first 1/32 apart, then 1/256, then 1/2048;
  affine ranges move both ends together and then each of them. Zeros have no
  error, so that pruned weights need no other treatment.

  Args:
    stats: a histogram.
    spec: the quantizer, of which bits and symmetry matter.
  """
  b = histograms.bins(stats)
  low, high = _exact_ends(stats)
  if spec.symmetric:
    high = jnp.maximum(-low, high)
    low = -high
  # Which ends are moved, and whether from where they are, by steps of what.
  both, below, above = (True, True), (True, False), (False, True)
  stages = [(both, False, 1 / 32)]
  if spec.symmetric:
    stages += [(both, True, 1 / 256), (both, True, 1 / 2048)]
  else:
    stages += [(above, False, 1 / 32), (below, False, 1 / 32)]
    for step in (1 / 256, 1 / 256, 1 / 2048):
      stages += [(above, True, step), (below, True, step)]
  moved, near, steps = (
    jnp.array(column) for column in zip(*stages, strict=True)
  )

  def error(shares):
    return squared_error(b, shares[0] * low, shares[1] * high, spec)

  def search(shares, stage):
    moved, near, step = stage
    # In falling order: the first of equal errors wins, the widest range.
    centre = jnp.where(near, shares, 0.5)
    offsets = jnp.arange(16, -16, -1, dtype=jnp.float32)[:, None] * step
    tried = jnp.clip(centre[None] + offsets, 1 / 2048, 1)
    tried = jnp.where(moved[None], tried, shares[None])
    errors = jax.lax.map(error, tried, batch_size=8)
    return tried[jnp.argmin(errors)], None

  shares, _ = jax.lax.scan(search, jnp.ones(2), (moved, near, steps))
  return _result(stats, shares[0] * low, shares[1] * high)


def octav(
  stats: histograms.Stats,
  spec: QuantSpec,
  *,
  ignore_zeros: bool = False,
) -> Range:
  """Optimally clipped range, by the fixed point of its optimality condition.

  Rounding costs scale^2 / 12 for every value inside the range, clipping the
  squared distance from its end. For a symmetric range [-a, a] and B bits,

      a <- sum(|x| 1[|x| > a]) / (4^-B / 3 * n_inside + n_outside).

  For an affine range, with c = 4^-B / 12, n_above and s_above the number and
  the sum of the values above its upper end, and likewise below,

      high <- (s_above + c * n_inside * low) / (c * n_inside + n_above)
      low <- (s_below + c * n_inside * high) / (c * n_inside + n_below),

  which for values on one side of 0 is the first with 12 for 3.

  Args:
    stats: a histogram.
    spec: the quantizer, of which bits and symmetry matter.
    ignore_zeros: see `percentile`. Zeros are exact on every grid, but the
      formula counts a rounding error for them unless they are ignored.

  References:
    Sakr et al., "Optimal Clipping and Magnitude-aware Differentiation for
    Improved Quantization-aware Training", 2022, arXiv:2206.06501.
  """
  lowest, highest = _exact_ends(stats)
  c = 4.0**-spec.bits / 12
  if spec.symmetric:
    b = histograms.amplitudes(stats, ignore_zeros=ignore_zeros)
    total = jnp.sum(b.counts)

    def update(_, a):
      outside, sums = histograms.above(b, a)
      cost = 4 * c * (total - outside) + outside
      return sums / jnp.where(cost > 0, cost, 1)

    # From 0 the first update gives the mean of |x|.
    a = jax.lax.fori_loop(0, _UPDATES, update, jnp.zeros_like(highest))
    return _result(stats, -a, a)

  b = histograms.bins(stats, ignore_zeros=ignore_zeros)
  mirrored = histograms.Bins(-b.right, -b.left, b.counts)
  total = jnp.sum(b.counts)

  def update_both(_, ends):
    low, high = ends
    n_above, s_above = histograms.above(b, high)
    n_below, s_below = histograms.above(mirrored, -low)
    inside = c * jnp.maximum(total - n_above - n_below, 0)
    above, below = inside + n_above, inside + n_below
    new_high = (s_above + inside * low) / jnp.where(above > 0, above, 1)
    new_low = (inside * high - s_below) / jnp.where(below > 0, below, 1)
    return jnp.minimum(new_low, 0), jnp.maximum(new_high, 0)

  start = (jnp.zeros_like(lowest), jnp.zeros_like(highest))
  low, high = jax.lax.fori_loop(0, _UPDATES, update_both, start)
  return _result(stats, low, high)


def entropy(
  stats: histograms.Stats, spec: QuantSpec, *, stride: int = 8
) -> Range:
  """The clipping value that changes the distribution of |x| least.

  For i bins kept, P is the histogram of |x| up to bin i with all values above
  added to its last bin; Q is that of the values up to bin i, averaged over
  the nonempty bins of each of L levels. The i with the least KL(P || Q)
  wins, the largest of equal ones. L is 2**(bits - 1), and 2**bits for an affine
  quantizer of values on one side of 0. Zeros are left out.

  Args:
    stats: a histogram.
    spec: the quantizer, of which bits and symmetry matter.
    stride: difference of the numbers of bins tried, out of at most 2048.

  References:
    Migacz, "8-bit Inference with TensorRT", GPU Technology Conference 2017.
  """
  b = histograms.amplitudes(stats, ignore_zeros=True)
  counts = b.counts[1:]
  size = counts.shape[0]
  lowest, highest = _exact_ends(stats)
  largest = jnp.maximum(-lowest, highest)
  levels = jnp.int32(spec.qmax + 1)
  if not spec.symmetric:
    levels = jnp.where((lowest < 0) & (highest > 0), levels, 2 * levels)
  used = jnp.clip(jnp.ceil(largest * size).astype(jnp.int32), 1, size)

  # Sums from the top, where counts are small and float32 sums exact.
  def upward(values):
    return jnp.append(jnp.cumsum(values[::-1])[::-1], 0.0)

  filled = (counts > 0).astype(jnp.float32)
  values_from, filled_from = upward(counts), upward(filled)
  index = jnp.arange(size, dtype=jnp.int32)

  def divergence(kept):
    level = index * levels // kept
    first = jnp.minimum(-(-level * kept // levels), size)
    last = jnp.minimum(-(-(level + 1) * kept // levels), size)
    held = filled_from[first] - filled_from[last]
    mean = (values_from[first] - values_from[last]) / jnp.maximum(held, 1)
    inside = index < kept
    q = jnp.where(inside, filled * mean, 0)
    p = jnp.where(inside, counts, 0)
    p = p + jnp.where(index == kept - 1, values_from[kept], 0)
    q = q / jnp.maximum(jnp.sum(q), 1e-30)
    p = p / jnp.maximum(jnp.sum(p), 1e-30)
    ratio = jnp.where(p > 0, p, 1) / jnp.where(q > 0, q, 1)
    terms = jnp.where(p > 0, jnp.where(q > 0, p * jnp.log(ratio), jnp.inf), 0)
    return jnp.sum(terms)

  # From the largest, so that it wins among equal ones.
  tried = jnp.arange(size, spec.qmax, -stride, dtype=jnp.int32)
  tried = jnp.minimum(tried, used)
  # Fewer bins than levels would be kept as they are.
  tried = jnp.where(tried < levels, used, tried)
  divergences = jax.lax.map(divergence, tried, batch_size=16)
  kept = tried[jnp.argmin(divergences)]
  a = jnp.minimum(kept / size, largest)
  return _result(stats, -a, a)


Criterion = Callable[[histograms.Stats, QuantSpec], Range]
