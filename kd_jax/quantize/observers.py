"""Observers: how a range is learned from batches.

Owns the observers, tuples of pure functions on a dict of float32 and int32
arrays, and how one observes a whole tensor or several blocks of it. A state
is a monoid: `merge` combines what two batches, devices or hosts have seen,
and `init` is its neutral element. The states of a model's activations live in
its collection `quant_stats`; see `activations`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kd_jax.quantize import criteria, histograms, specs
from kd_jax.quantize.specs import INT8_ACTIVATIONS, QuantSpec

Stats = dict[str, jax.Array]


class Observer(NamedTuple):
  """Functions over the statistics of one tensor, or of one block of it.

  Attributes:
    init: `() -> stats`, before any batch. Zeros only.
    update: `(stats, x, axis_name) -> stats`; with an `axis_name` the batch is
      spread over that mapped axis and the result is equal on all of it.
    merge: `(stats, stats) -> stats`, what both have seen; also on the host.
    range: `(stats, spec=INT8_ACTIVATIONS) -> (low, high)` float32 scalars:
      what the quantizer shall represent.

  Example:
    >>> halved = min_max()._replace(
    ...   range=lambda stats, spec=INT8_ACTIVATIONS: (
    ...     stats['low'] / 2, stats['high'] / 2))
    >>> stats = halved.update(halved.init(), jnp.array([-1.0, 3.0]), None)
    >>> [float(v) for v in halved.range(stats)]
    [-0.5, 1.5]
  """

  init: Callable[[], Stats]
  update: Callable[[Stats, jax.Array, str | None], Stats]
  merge: Callable[[Stats, Stats], Stats]
  range: Callable[..., tuple[jax.Array, jax.Array]]


def _no_extremes() -> Stats:
  return {name: jnp.float32(0) for name in ('low', 'high', 'count')}


def _stored(
  stats: Stats, spec: QuantSpec = INT8_ACTIVATIONS
) -> tuple[jax.Array, jax.Array]:
  return stats['low'], stats['high']


def min_max() -> Observer:
  """The smallest and largest value of all batches.

  Its state depends on the values alone, not on their order or grouping.

  Example:
    >>> observer = min_max()
    >>> stats = observer.update(observer.init(), jnp.array([0.0, 2.0]), None)
    >>> stats = observer.update(stats, jnp.array([-1.0, 1.0]), None)
    >>> [float(v) for v in observer.range(stats)]
    [-1.0, 2.0]
  """

  def update(stats: Stats, x: jax.Array, axis_name: Any) -> Stats:
    return histograms.merge_extremes(
      stats, histograms.extremes_of(x, axis_name)
    )

  return Observer(_no_extremes, update, histograms.merge_extremes, _stored)


def ema_min_max(*, decay: float = 0.99) -> Observer:
  """Exponential moving average of each batch's smallest and largest value.

  The first batch is taken whole; then low <- low + (1 - decay) * (min - low),
  and high likewise. An average over time has no order in which two can be
  joined: `merge` averages the ends of both, weighted by their numbers of
  batches.

  Args:
    decay: in [0, 1); 0.99 is that of PyTorch's observer.

  Raises:
    ValueError: for another decay.

  Example:
    >>> observer = ema_min_max(decay=0.5)
    >>> stats = observer.update(observer.init(), jnp.array([0.0, 2.0]), None)
    >>> stats = observer.update(stats, jnp.array([0.0, 4.0]), None)
    >>> [float(v) for v in observer.range(stats)]
    [0.0, 3.0]

  References:
    Jacob et al., 2017, arXiv:1712.05877, section 3.1.
  """
  if not 0 <= decay < 1:
    raise ValueError(f'The decay of an observer is in [0, 1), not {decay}.')

  def update(stats: Stats, x: jax.Array, axis_name: Any) -> Stats:
    batch = histograms.extremes_of(x, axis_name)
    rate = jnp.where(stats['count'] == 0, 1.0, 1 - decay)
    return {
      'low': stats['low'] + rate * (batch['low'] - stats['low']),
      'high': stats['high'] + rate * (batch['high'] - stats['high']),
      'count': stats['count'] + 1,
    }

  def merge(a: Stats, b: Stats) -> Stats:
    count = a['count'] + b['count']
    share = b['count'] / jnp.maximum(count, 1)
    return {
      'low': a['low'] + share * (b['low'] - a['low']),
      'high': a['high'] + share * (b['high'] - a['high']),
      'count': count,
    }

  return Observer(_no_extremes, update, merge, _stored)


def _of_histogram(criterion: criteria.Criterion) -> Observer:
  def update(stats: Stats, x: jax.Array, axis_name: Any) -> Stats:
    return histograms.merge(stats, histograms.of(x, axis_name))

  def find(stats: Stats, spec: QuantSpec = INT8_ACTIVATIONS) -> criteria.Range:
    return criterion(stats, spec)

  return Observer(histograms.empty, update, histograms.merge, find)


def percentile(
  percent: float = 99.99, *, ignore_zeros: bool = False
) -> Observer:
  """Cuts off a share of the values: see `criteria.percentile`.

  This observer, `mse`, `entropy` and `octav` have one state, a histogram of
  all batches (16 KiB a tensor), so that what one has seen the others can use.
  Their ranges are searched for at every use: observe with them a few batches
  to calibrate, and train with `ema_min_max`.

  Args:
    percent: in (50, 100]. 99.99 leaves one value in ten thousand out; 99.9
      costs 2 to 9 dB at 8 bits.
    ignore_zeros: whether zeros count as no values, as after pruning.

  Raises:
    ValueError: for another percentage.

  References:
    Wu et al., "Integer Quantization for Deep Learning Inference", 2020,
    arXiv:2004.09602.

  Example:
    >>> observer = percentile(90.0)
    >>> x = jnp.arange(1.0, 101.0)
    >>> stats = observer.update(observer.init(), x, None)
    >>> low, high = observer.range(stats)
    >>> float(low), float(high)
    (0.0, 91.0)
  """
  if not 50 < percent <= 100:
    raise ValueError(f'percentile: percent={percent} is not in (50, 100].')

  def criterion(stats, spec):
    return criteria.percentile(
      stats, spec, percent=percent, ignore_zeros=ignore_zeros
    )

  return _of_histogram(criterion)


def mse() -> Observer:
  """The least squared error: see `criteria.mean_squared_error`.

  Zeros have no error, so pruned weights need no other treatment.

  Example:
    >>> observer = mse()
    >>> x = jnp.append(jnp.linspace(0.0, 1.0, 1000), 3.0)
    >>> stats = observer.update(observer.init(), x, None)
    >>> low, high = observer.range(stats, QuantSpec(bits=4))
    >>> bool(high < 1.5)
    True
  """
  return _of_histogram(criteria.mean_squared_error)


def entropy(*, stride: int = 8) -> Observer:
  """The least Kullback-Leibler divergence: see `criteria.entropy`.

  Args:
    stride: bins between the thresholds tried; 1 tries them all.

  Raises:
    ValueError: if the stride is not positive.

  References:
    Migacz, "8-bit Inference with TensorRT", GPU Technology Conference 2017.

  Example:
    >>> observer = entropy()
    >>> x = jax.random.normal(jax.random.key(0), (10_000,))
    >>> stats = observer.update(observer.init(), x, None)
    >>> low, high = observer.range(stats)
    >>> bool(2 < high < 4)
    True
  """
  if stride < 1:
    raise ValueError(f'entropy: stride={stride} is not a positive number.')

  def criterion(stats, spec):
    return criteria.entropy(stats, spec, stride=stride)

  return _of_histogram(criterion)


def octav(*, ignore_zeros: bool = False) -> Observer:
  """Optimal clipping by a few cheap iterations: see `criteria.octav`.

  Args:
    ignore_zeros: whether zeros count as no values, as after pruning.

  References:
    Sakr et al., 2022, arXiv:2206.06501.

  Example:
    >>> observer = octav()
    >>> x = jax.random.normal(jax.random.key(0), (10_000,))
    >>> stats = observer.update(observer.init(), x, None)
    >>> low, high = observer.range(stats, QuantSpec(bits=4))
    >>> bool(2.3 < high < 2.8)
    True
  """

  def criterion(stats, spec):
    return criteria.octav(stats, spec, ignore_zeros=ignore_zeros)

  return _of_histogram(criterion)


def init_stats(observer: Observer, x: jax.Array, spec: QuantSpec) -> Stats:
  """The state before any batch, for the blocks of a tensor.

  Args:
    observer: which observer.
    x: the tensor, of which the shape matters.
    spec: the quantizer; with an `axis` or a `group_size` every leaf has a
      leading axis with an entry for each block.
  """
  stats = observer.init()
  if _is_whole(spec):
    return stats
  blocks = jax.eval_shape(lambda x: specs.rows(x, spec)[0], x).shape[0]
  return jax.tree.map(lambda v: jnp.broadcast_to(v, (blocks, *v.shape)), stats)


def observe(
  observer: Observer,
  stats: Stats,
  x: jax.Array,
  spec: QuantSpec,
  axis_name: str | None = None,
) -> Stats:
  """The state after one more batch of a tensor.

  Args:
    observer: which observer.
    stats: from `init_stats` or from here.
    x: the tensor.
    spec: the quantizer, see `init_stats`.
    axis_name: the mapped axis that the batch is spread over.
  """
  if _is_whole(spec):
    return observer.update(stats, x, axis_name)
  update = jax.vmap(lambda s, row: observer.update(s, row, axis_name))
  return update(stats, specs.rows(x, spec)[0])


def observed_range(
  observer: Observer, stats: Stats, x: jax.Array, spec: QuantSpec
) -> tuple[jax.Array, jax.Array]:
  """The range of a whole tensor, scalars, or of each block.

  Those of blocks are laid out as by `specs.extremes`.

  Args:
    observer: which observer.
    stats: what it has seen.
    x: the tensor, of which the shape matters.
    spec: the quantizer.
  """
  if _is_whole(spec):
    return observer.range(stats, spec)
  low, high = jax.vmap(lambda s: observer.range(s, spec))(stats)
  return _laid_out(low, x, spec), _laid_out(high, x, spec)


def _is_whole(spec: QuantSpec) -> bool:
  """Whether a tensor is one block."""
  return spec.axis is None and spec.group_size is None


def _laid_out(ends: jax.Array, x: jax.Array, spec: QuantSpec) -> jax.Array:
  """One end of each block's range, laid out as by `specs.extremes`."""
  shapes = jax.eval_shape(lambda x: specs.extremes(x, spec), x)
  return ends.reshape(shapes[0].shape)


def tensor_range(
  observer: Observer, x: jax.Array, spec: QuantSpec, name: str = 'tensor'
) -> tuple[jax.Array, jax.Array]:
  """The range of each block of a single tensor, such as a weight.

  Args:
    observer: which observer.
    x: the tensor.
    spec: the quantizer.
    name: of the tensor, for errors.

  Returns:
    `(low, high)`, laid out as by `specs.extremes`.

  Raises:
    ValueError: if the axes or groups of the spec do not fit the tensor.
  """
  specs.check(spec, x.shape, name)
  stats = observe(observer, init_stats(observer, x, spec), x, spec)
  low, high = observed_range(observer, stats, x, spec)
  if _is_whole(spec):
    return _laid_out(low, x, spec), _laid_out(high, x, spec)
  return low, high


def merge_stats(observer: Observer, a: Any, b: Any) -> Any:
  """What two collections `quant_stats` have seen together.

  Args:
    observer: the observer of both.
    a: a nested dict of states, such as one host's `quant_stats`; states of a
      scanned stack or of several blocks have leading axes.
    b: likewise, with the same structure.

  Example:
    >>> observer = min_max()
    >>> x = jnp.array([1.0, 2.0])
    >>> a = {'dense': observer.update(observer.init(), x, None)}
    >>> b = {'dense': observer.update(observer.init(), -x, None)}
    >>> merged = merge_stats(observer, a, b)['dense']
    >>> float(merged['low']), float(merged['high'])
    (-2.0, 2.0)
  """

  def one(a, b):
    merge = observer.merge
    for _ in range(jnp.ndim(a['count'])):
      merge = jax.vmap(merge)
    return merge(a, b)

  def is_state(node):
    return isinstance(node, dict) and 'count' in node

  return jax.tree.map(one, a, b, is_leaf=is_state)
