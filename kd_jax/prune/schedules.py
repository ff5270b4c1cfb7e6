"""Sparsity schedules: functions from the step to the share of zeros.

Owns when and how much; `transform` calls them once a step, and prunes where
the share changes. Lottery tickets are `steps` with `state.rewind`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

SparsitySchedule = Callable[[ArrayLike], jax.Array]


def constant(sparsity: float, *, begin: int = 0) -> SparsitySchedule:
  """`sparsity` from step `begin` on, 0 before: one-shot pruning.

  Args:
    sparsity: share of zeros, in [0, 1).
    begin: first step at which weights are pruned.

  Raises:
    ValueError: for a sparsity outside [0, 1).

  Example:
    >>> schedule = constant(0.5, begin=10)
    >>> [float(schedule(step)) for step in (9, 10)]
    [0.0, 0.5]
  """
  _check_sparsity(sparsity)
  return lambda step: jnp.where(jnp.asarray(step) >= begin, sparsity, 0.0)


def cubic(
  final: float,
  *,
  begin: int,
  end: int,
  every: int = 1,
  initial: float = 0.0,
  power: float = 3.0,
) -> SparsitySchedule:
  """Gradual pruning: fast at first, slow near the end.

  s(t) = final + (initial - final) * (1 - (t - begin) / (end - begin))**power
  for t = begin, begin + every, begin + 2 every, ... up to `end`, held in
  between and after; 0 before `begin`.

  Args:
    final: share of zeros from `end` on, in [0, 1).
    begin: first step at which weights are pruned.
    end: step at which `final` is reached, > begin.
    every: steps between two prunings.
    initial: share of zeros at `begin`.
    power: 3 is the paper's cubic.

  Raises:
    ValueError: for a sparsity outside [0, 1), or an empty interval.

  Example:
    >>> schedule = cubic(0.8, begin=2, end=12)
    >>> [round(float(schedule(step)), 3) for step in (1, 2, 3, 6, 12, 99)]
    [0.0, 0.0, 0.217, 0.627, 0.8, 0.8]

  References:
    Zhu, Gupta, "To prune, or not to prune", 2017, arXiv:1710.01878.
  """
  _check_sparsity(final)
  _check_sparsity(initial)
  if not 0 <= begin < end or every < 1:
    raise ValueError(
      f'cubic: needs 0 <= begin < end and every >= 1, not begin={begin}, '
      f'end={end}, every={every}.'
    )

  def schedule(step):
    step = jnp.asarray(step)
    # Held at the last multiple of `every`; `end` itself is always reached.
    held = begin + (step - begin) // every * every
    held = jnp.where(step >= end, end, held)
    left = 1.0 - (held - begin) / (end - begin)
    sparsity = final + (initial - final) * jnp.clip(left, 0.0, 1.0) ** power
    return jnp.where(step < begin, 0.0, sparsity)

  return schedule


def linear(
  final: float,
  *,
  begin: int,
  end: int,
  every: int = 1,
  initial: float = 0.0,
) -> SparsitySchedule:
  """Gradual pruning by the same share each time: `cubic` with power 1.

  Args:
    final: share of zeros from `end` on, in [0, 1).
    begin: first step at which weights are pruned.
    end: step at which `final` is reached, > begin.
    every: steps between two prunings.
    initial: share of zeros at `begin`.

  Raises:
    ValueError: for a sparsity outside [0, 1), or an empty interval.

  Example:
    >>> schedule = linear(0.8, begin=2, end=12, every=5)
    >>> [round(float(schedule(step)), 3) for step in (1, 2, 7, 11, 12)]
    [0.0, 0.0, 0.4, 0.4, 0.8]
  """
  return cubic(
    final, begin=begin, end=end, every=every, initial=initial, power=1.0
  )


def steps(
  share: float, *, every: int, times: int, begin: int = 0
) -> SparsitySchedule:
  """Iterative pruning: each time the same share of what is left.

  s(t) = 1 - (1 - share)**k, where k counts the prunings up to step t: the
  first at `begin`, then one every `every` steps, `times` in all.

  Args:
    share: share of the remaining weights that go, in [0, 1).
    every: steps between two prunings, >= 1.
    times: number of prunings, >= 1.
    begin: step of the first.

  Raises:
    ValueError: for a share outside [0, 1), or counts below 1.

  Example:
    >>> schedule = steps(0.2, every=100, times=3, begin=100)
    >>> [round(float(schedule(step)), 3) for step in (99, 100, 200, 300, 400)]
    [0.0, 0.2, 0.36, 0.488, 0.488]

  References:
    Frankle, Carbin, "The Lottery Ticket Hypothesis", 2018, arXiv:1803.03635.
  """
  _check_sparsity(share)
  if every < 1 or times < 1 or begin < 0:
    raise ValueError(
      f'steps: needs every >= 1, times >= 1 and begin >= 0, not every={every}, '
      f'times={times}, begin={begin}.'
    )
  sparsities = np.array(
    [1 - (1 - share) ** k for k in range(times + 1)], np.float32
  )

  def schedule(step):
    count = (jnp.asarray(step) - begin) // every + 1
    return jnp.asarray(sparsities)[jnp.clip(count, 0, times)]

  return schedule


def _check_sparsity(sparsity: float) -> None:
  if not 0 <= sparsity < 1:
    raise ValueError(f'A sparsity is a share in [0, 1), not {sparsity}.')
