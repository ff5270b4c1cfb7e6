"""Observers and their histograms, against NumPy on the values themselves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import quantize
from kd_jax.quantize import QuantSpec, criteria, histograms


def _rng():
  return np.random.default_rng(0)


def test_observer_takes_the_first_batch_then_averages():
  observer = quantize.ema_min_max(decay=0.9)
  rng = _rng()
  batches = [rng.normal(size=50).astype('f') * s for s in (1, 3, 2)]
  stats = observer.init()
  low, high = batches[0].min(), batches[0].max()
  for i, x in enumerate(batches):
    stats = observer.update(stats, jnp.asarray(x), None)
    if i:
      low, high = low + 0.1 * (x.min() - low), high + 0.1 * (x.max() - high)
    np.testing.assert_allclose(observer.range(stats), (low, high), rtol=1e-5)
  assert int(stats['count']) == 3
  with pytest.raises(ValueError, match=r'in \[0, 1\)'):
    quantize.ema_min_max(decay=1.0)


def test_observer_learns_no_gradient():
  observer = quantize.ema_min_max()

  def high(x):
    return observer.range(observer.update(observer.init(), x, None))[1]

  np.testing.assert_array_equal(jax.grad(high)(jnp.arange(3.0)), 0.0)


def test_min_max_is_over_all_batches():
  observer, rng = quantize.min_max(), _rng()
  stats, values = observer.init(), []
  for offset in (3.0, -1.0, 0.0):
    values.append(rng.normal(size=20).astype('f') + np.float32(offset))
    stats = observer.update(stats, jnp.asarray(values[-1]), None)
  low, high = observer.range(stats)
  assert (low, high) == (np.min(values), np.max(values))
  # The first batch counts whole: 0, where a state starts, is no value.
  first = observer.update(observer.init(), jnp.array([2.0, 3.0]), None)
  assert observer.range(first)[0] == 2


def test_averages_are_merged_by_their_numbers_of_batches():
  observer = quantize.ema_min_max(decay=0.5)
  a, b = observer.init(), observer.init()
  for high in (1.0, 2.0, 3.0):
    a = observer.update(a, jnp.array([0.0, high]), None)
  b = observer.update(b, jnp.array([-1.0, 8.0]), None)
  merged = observer.merge(a, b)
  want = (3 * a['high'] + b['high']) / 4
  np.testing.assert_allclose(merged['high'], want, rtol=1e-6)
  np.testing.assert_allclose(merged['low'], -0.25, rtol=1e-6)
  assert merged['count'] == 4


# --- histograms

HISTOGRAM = {
  'percentile': quantize.percentile(),
  'mse': quantize.mse(),
  'entropy': quantize.entropy(),
  'octav': quantize.octav(),
}
OBSERVERS = HISTOGRAM | {
  'min_max': quantize.min_max(),
  'ema': quantize.ema_min_max(),
}
ONE = jax.jit(lambda x: histograms.of(x))
MERGE = jax.jit(histograms.merge)
SYMMETRIC = QuantSpec()
AFFINE = quantize.INT8_ACTIVATIONS
SPECS = [
  SYMMETRIC,
  AFFINE,
  QuantSpec(bits=4),
  QuantSpec(bits=4, symmetric=False, narrow=False),
]


def _equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('factor', [1e-25, 1.0, 3.3, 1e30])
def test_a_histogram_counts_what_numpy_counts(factor):
  x = (_rng().normal(size=500) * factor).astype('f')
  x[:40] = 0
  stats = ONE(x)
  largest = np.abs(x).max()
  exponent = int(stats['exponent'])
  assert 2.0 ** (exponent - 1) <= largest < 2.0**exponent
  edges = np.arange(-2048, 2049) * 2.0 ** (exponent - 11)
  counts, _ = np.histogram(x[40:].astype(np.float64), edges)
  np.testing.assert_array_equal(stats['counts'], counts)
  assert stats['zeros'] == 40
  assert (stats['low'], stats['high']) == (x.min(), x.max())


def _parts():
  """Batches of very different sizes, one of zeros and one of none."""
  rng = _rng()
  factors = (1e-3, 5.0, 0.7, 900.0)
  x = [(rng.normal(size=100) * f).astype('f') for f in factors]
  return [*x, np.zeros(100, 'f')]


def test_merging_is_exact_associative_and_commutative():
  parts = _parts()
  whole = ONE(np.concatenate(parts))
  a, b, c, d, e = map(ONE, parts)
  left = MERGE(MERGE(MERGE(MERGE(a, b), c), d), e)
  right = MERGE(e, MERGE(MERGE(d, c), MERGE(b, a)))
  _equal(left, right)
  _equal(left | {'count': whole['count']}, whole)
  assert left['count'] == 5


@pytest.mark.parametrize('name', OBSERVERS)
def test_a_state_without_batches_is_neutral(name):
  observer = OBSERVERS[name]
  stats = observer.update(observer.init(), jnp.array([0.02, 0.3]), None)
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(observer.init()))
  _equal(observer.merge(stats, observer.init()), stats)
  _equal(observer.merge(observer.init(), stats), stats)
  empty = observer.merge(observer.init(), observer.init())
  _equal(empty, observer.init())


def test_histogram_observers_share_a_state():
  """Calibrate once, then compare criteria."""
  x = _rng().normal(size=1000).astype('f')
  states = [o.update(o.init(), x, None) for o in HISTOGRAM.values()]
  for state in states[1:]:
    _equal(state, states[0])


def test_counts_go_beyond_what_float32_can_count_one_by_one():
  stats = ONE(np.full(100, 0.3, 'f'))
  stats = stats | {'counts': stats['counts'] * 2.0**24}
  merged = MERGE(stats, stats)
  assert merged['counts'].max() == 100 * 2.0**25


# --- criteria


def _relu_t3(rng, size):
  return np.maximum(rng.standard_t(3, size=size), 0)


DATA = {
  'normal': lambda rng, size: rng.normal(size=size),
  'relu': _relu_t3,
  'shifted': lambda rng, size: rng.normal(size=size) + 1.0,
}


@functools.cache
def _find(name, spec, **options):
  """An observer's `stats -> range`, compiled once for all tests."""
  observer = getattr(quantize, name)(**options)
  return jax.jit(lambda stats: observer.range(stats, spec))


def _data(name, size=20_000):
  return DATA[name](_rng(), size).astype('f')


def _error(x, low, high, spec):
  """The squared error on the values themselves, in float64."""
  low, high = min(float(low), 0.0), max(float(high), 0.0)
  if spec.symmetric:
    scale, zero = max(-low, high) / spec.qmax, 0
  else:
    scale = (high - low) / (spec.qmax - spec.qmin)
    zero = np.clip(np.rint(spec.qmin - low / scale), spec.qmin, spec.qmax)
  code = np.clip(np.rint(x / scale) + zero, spec.qmin, spec.qmax)
  return np.square(x - (code - zero) * scale).sum()


@pytest.mark.parametrize('percent', [99.0, 99.9, 100.0])
@pytest.mark.parametrize('name', DATA)
def test_percentiles_are_numpys_within_a_bin(name, percent):
  x = _data(name)
  stats = ONE(x)
  width = 2.0 ** (int(stats['exponent']) - 11)
  observer = quantize.percentile(percent)
  low, high = observer.range(stats, AFFINE)
  options = {'atol': width, 'rtol': 0}
  want = np.percentile(x, 100 - percent, method='lower')
  np.testing.assert_allclose(low, min(want, 0), **options)
  want = np.percentile(x, percent, method='higher')
  np.testing.assert_allclose(high, want, **options)
  low, high = observer.range(stats, SYMMETRIC)
  want = np.percentile(np.abs(x), percent, method='higher')
  np.testing.assert_allclose(max(-low, high), want, **options)


@pytest.mark.parametrize('spec', SPECS)
@pytest.mark.parametrize('name', DATA)
def test_the_error_of_a_histogram_is_that_of_the_values(name, spec):
  x = _data(name)
  stats = ONE(x)
  unit = 2.0 ** int(stats['exponent'])
  for share in (1.0, 0.4):
    low, high = share * min(x.min(), 0), share * x.max()
    got = criteria.squared_error(
      histograms.bins(stats), low / unit, high / unit, spec
    )
    np.testing.assert_allclose(
      got * unit**2, _error(x, low, high, spec), rtol=0.02
    )


@pytest.mark.parametrize('spec', SPECS)
@pytest.mark.parametrize('name', DATA)
def test_mse_finds_a_range_as_good_as_any(name, spec):
  x = _data(name)
  got = _error(x, *_find('mse', spec)(ONE(x)), spec)
  low, high = min(x.min(), 0), x.max()
  if spec.symmetric:
    low, high = -max(-low, high), max(-low, high)
  shares = np.linspace(0.03, 1, 40)
  pairs = ((a, a) for a in shares)
  if not spec.symmetric and low < 0:
    pairs = ((a, b) for a in shares for b in shares)
  best = min(_error(x, a * low, b * high, spec) for a, b in pairs)
  assert got < 1.02 * best


@pytest.mark.parametrize('ignore_zeros', [True, False])
@pytest.mark.parametrize('spec', SPECS)
@pytest.mark.parametrize('name', DATA)
def test_octav_is_the_fixed_point_on_the_values(name, spec, ignore_zeros):
  x = _data(name).astype(np.float64)
  stats = ONE(x.astype('f'))
  options = {'ignore_zeros': True} if ignore_zeros else {}
  got = _find('octav', spec, **options)(stats)
  counted = x[x != 0] if ignore_zeros else x
  c = 4.0**-spec.bits / 12
  if spec.symmetric:
    a = 0.0
    for _ in range(50):
      out = np.abs(counted) > a
      inside = len(counted) - out.sum()
      a = np.abs(counted)[out].sum() / (4 * c * inside + out.sum())
    np.testing.assert_allclose(max(-got[0], got[1]), a, rtol=5e-3)
    return
  low, high = 0.0, 1e-9
  for _ in range(50):
    above, below = counted[counted > high], counted[counted < low]
    inside = c * (len(counted) - len(above) - len(below))
    low, high = (
      min((below.sum() + inside * high) / (inside + len(below) or 1), 0),
      max((above.sum() + inside * low) / (inside + len(above)), 0),
    )
  np.testing.assert_allclose(got[0], max(low, x.min()), rtol=5e-3)
  np.testing.assert_allclose(got[1], high, rtol=5e-3)


def _divergence(counts, kept, levels):
  """TensorRT's, in loops."""
  p = counts[:kept].copy()
  p[-1] += counts[kept:].sum()
  level = np.arange(kept) * levels // kept
  q = np.zeros(kept)
  for i in range(levels):
    chosen = (level == i) & (counts[:kept] > 0)
    if chosen.any():
      q[chosen] = counts[:kept][chosen].mean()
  p, q = p / p.sum(), q / q.sum()
  some = p > 0
  with np.errstate(divide='ignore'):
    return np.sum(p[some] * np.log(p[some] / q[some]))


@pytest.mark.parametrize('name', DATA)
@pytest.mark.parametrize('spec', SPECS)
def test_entropy_has_the_least_divergence(name, spec):
  x = _data(name)
  stats = ONE(x)
  size = np.abs(x[x != 0]).astype(np.float64)
  width = 2.0 ** (int(stats['exponent']) - 11)
  counts, _ = np.histogram(size, np.arange(2049) * width)
  counts = counts.astype(float)
  levels = spec.qmax + 1
  if not spec.symmetric and x.min() >= 0:
    levels *= 2
  used = int(np.ceil(size.max() / width))
  low, high = _find('entropy', spec)(stats)
  tried = [k for k in range(2048, spec.qmax, -8) if levels <= k < used]
  divergences = {k: _divergence(counts, k, levels) for k in [used, *tried]}
  a = float(max(-low, high))
  kept = int(np.ceil(a / width))
  assert kept in divergences
  least = min(divergences.values())
  np.testing.assert_allclose(divergences[kept], least, rtol=1e-3, atol=1e-6)


def _decibels(x, spec, low, high):
  return 10 * np.log10(np.square(x).sum() / _error(x, low, high, spec))


@pytest.mark.parametrize('name', ['normal', 'relu'])
def test_criteria_are_in_the_order_that_is_known_of_them(name):
  """8 bits: mse and octav, then the extremes, then a low percentile."""
  x, got = _data(name, 200_000), {}
  stats = ONE(x)
  for criterion in ('mse', 'octav'):
    low, high = _find(criterion, SYMMETRIC)(stats)
    got[criterion] = _decibels(x, SYMMETRIC, low, high)
  low, high = quantize.percentile(99.9).range(stats, SYMMETRIC)
  got['99.9'] = _decibels(x, SYMMETRIC, low, high)
  got['extremes'] = _decibels(x, SYMMETRIC, x.min(), x.max())
  assert got['mse'] >= got['octav'] - 0.01
  assert got['octav'] > got['mse'] - 0.5
  assert got['octav'] > got['extremes'] > got['99.9'] + 1
  # 4 bits: clipping is worth several decibels.
  four = QuantSpec(bits=4)
  extremes = _decibels(x, four, x.min(), x.max())
  for criterion in ('mse', 'octav'):
    clipped = _decibels(x, four, *_find(criterion, four)(stats))
    assert clipped > extremes + 4


@pytest.mark.parametrize('spec', SPECS)
@pytest.mark.parametrize('name', ['percentile', 'octav', 'mse', 'entropy'])
def test_zeros_of_pruned_weights_can_be_ignored(name, spec):
  options = {'ignore_zeros': True} if name in ('percentile', 'octav') else {}
  find = _find(name, spec, **options)
  x = _data('normal', 3000)
  pruned = np.concatenate([x, np.zeros(27_000, 'f')])
  np.testing.assert_allclose(
    find(ONE(pruned)), find(ONE(x)), rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize('spec', [SYMMETRIC, AFFINE])
@pytest.mark.parametrize('name', HISTOGRAM)
@pytest.mark.parametrize(
  'values',
  [
    [0.0, 0.0],
    [3.7, 3.7],
    [-3.7, -3.7],
    [0.0, 5.0],
    [1e-30, 2e-30],
    [3e38, -3e38],
    [1e-42, 0.0],
  ],
)
def test_degenerate_values_give_finite_ranges(values, name, spec):
  x = np.array(values * 50, 'f')
  low, high = _find(name, spec)(ONE(x))
  assert np.isfinite(low) and np.isfinite(high)
  assert min(x.min(), 0) <= low <= 0 <= high <= max(x.max(), 0)
  if len(set(values)) == 1:
    # One value for all: it is the range, to a bin.
    np.testing.assert_allclose(low + high, values[0], rtol=1e-3)


@pytest.mark.parametrize('name', HISTOGRAM)
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_not_finite_stays_visible(name, bad):
  x = np.array([0.5, bad, -1.0], 'f')
  stats = ONE(x)
  assert stats['counts'].sum() == 2
  low, high = _find(name, AFFINE)(stats)
  assert not np.isfinite(high - low)


def test_bad_arguments_are_named():
  for percent in (50, 100.1):
    with pytest.raises(ValueError, match=f'percent={percent} is not in'):
      quantize.percentile(percent)
  with pytest.raises(ValueError, match='stride=0'):
    quantize.entropy(stride=0)


# --- many devices


@pytest.mark.parametrize('name', OBSERVERS)
def test_eight_devices_see_what_one_sees(name):
  observer = OBSERVERS[name]
  x = jnp.asarray(_relu_t3(_rng(), (16, 40)), jnp.float32)
  batches = jnp.stack([x, -3 * x])

  def see(axis_name, batches):
    stats = observer.init()
    for batch in batches:
      stats = observer.update(stats, batch, axis_name)
    return stats

  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  split = jax.P(None, 'data')
  want = jax.jit(functools.partial(see, None))(batches)
  placed = jax.device_put(batches, jax.NamedSharding(mesh, split))
  _equal(jax.jit(functools.partial(see, None))(placed), want)
  mapped = jax.shard_map(
    functools.partial(see, 'data'), mesh=mesh, in_specs=split, out_specs=jax.P()
  )
  _equal(jax.jit(mapped)(placed), want)
  if name == 'ema':
    return
  # Hosts that each saw a part, in any order.
  alone = jax.jit(functools.partial(see, None))
  parts = [alone(part) for part in jnp.split(batches, 4, axis=1)]
  merged = functools.reduce(observer.merge, parts[::-1])
  _equal(merged | {'count': want['count']}, want)


@pytest.mark.parametrize('name', OBSERVERS)
def test_observers_work_on_explicitly_sharded_batches(name):
  observer = OBSERVERS[name]
  explicit = (jax.sharding.AxisType.Explicit,)
  mesh = jax.make_mesh((8,), ('data',), axis_types=explicit)
  x = jnp.asarray(_rng().normal(size=(16, 5)), jnp.float32)

  def see(x):
    return observer.update(observer.init(), x, None)

  want = jax.jit(see)(x)
  with jax.set_mesh(mesh):
    placed = jax.device_put(x, jax.NamedSharding(mesh, jax.P('data')))
    _equal(jax.device_get(jax.jit(see)(placed)), jax.device_get(want))


@pytest.mark.parametrize('name', ['min_max', 'octav'])
def test_collections_of_stacks_and_blocks_are_merged(name):
  """States with leading axes, of a scanned stack and of a range per axis."""
  observer, rng = OBSERVERS[name], _rng()
  x = jnp.asarray(rng.normal(size=(2, 3, 50)), jnp.float32)

  def see(x):
    return observer.update(observer.init(), x, None)

  stack = jax.jit(jax.vmap(see))
  a, b = (
    {'dense': {'input0': see(v[0])}, 'stack': {'input0': stack(v)}} for v in x
  )
  merged = jax.jit(lambda a, b: quantize.merge_stats(observer, a, b))(a, b)
  _equal(
    merged['dense']['input0'],
    observer.merge(a['dense']['input0'], b['dense']['input0']),
  )
  for i in range(3):
    states = [t['stack']['input0'] for t in (merged, a, b)]
    got, *both = (jax.tree.map(lambda v, i=i: v[i], s) for s in states)
    _equal(got, observer.merge(*both))
