"""Sparsity schedules: functions from the step to the share of zeros."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

SparsitySchedule = Callable[[ArrayLike], jax.Array]


def constant(sparsity: float, *, begin: int = 0) -> SparsitySchedule:
  """`sparsity` from step `begin` on, 0 before: one-shot pruning.

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


def _check_sparsity(sparsity: float) -> None:
  if not 0 <= sparsity < 1:
    raise ValueError(f'A sparsity is a share in [0, 1), not {sparsity}.')
