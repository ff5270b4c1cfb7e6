"""Observers: how the range of an activation is learned from batches.

An observer is a tuple of pure functions on a dict of float32 scalars; the
state lives in the `quant_stats` collection of the model. Ranges are per
tensor, over the whole global batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Stats = dict[str, jax.Array]


class Observer(NamedTuple):
  """Functions over one tensor's statistics.

  Attributes:
    init: `() -> stats`, before any batch.
    update: `(stats, x, axis_name) -> stats`; with an `axis_name` the batch is
      spread over that mapped axis and the result is equal on all of it.
    range: `(stats) -> (low, high)` float32 scalars.
  """

  init: Callable[[], Stats]
  update: Callable[[Stats, jax.Array, str | None], Stats]
  range: Callable[[Stats], tuple[jax.Array, jax.Array]]


def ema_min_max(*, decay: float = 0.99) -> Observer:
  """Exponential moving average of each batch's smallest and largest value.

  The first batch is taken whole; then low <- low + (1 - decay) * (min - low),
  and high likewise.

  Args:
    decay: in [0, 1); 0.99 is that of PyTorch's observer.

  Example:
    >>> observer = ema_min_max(decay=0.5)
    >>> stats = observer.update(observer.init(), jnp.array([0.0, 2.0]), None)
    >>> stats = observer.update(stats, jnp.array([0.0, 4.0]), None)
    >>> [float(v) for v in observer.range(stats)]
    [0.0, 3.0]

  References:
    Jacob et al., 2018, arXiv:1712.05877, section 3.1.
  """
  if not 0 <= decay < 1:
    raise ValueError(f'The decay of an observer is in [0, 1), not {decay}.')

  def init() -> Stats:
    return {name: jnp.float32(0) for name in ('low', 'high', 'count')}

  def update(stats: Stats, x: jax.Array, axis_name: Any) -> Stats:
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    low, high = jnp.min(x), jnp.max(x)
    if axis_name is not None:
      low = jax.lax.pmin(low, axis_name)
      high = jax.lax.pmax(high, axis_name)
    rate = jnp.where(stats['count'] == 0, 1.0, 1 - decay)
    return {
      'low': stats['low'] + rate * (low - stats['low']),
      'high': stats['high'] + rate * (high - stats['high']),
      'count': stats['count'] + 1,
    }

  return Observer(init, update, lambda stats: (stats['low'], stats['high']))
