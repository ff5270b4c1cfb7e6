"""Steps that fail: a new state with NaN or infinity is dropped, and counted.

Owns the wrapper of a train step that does so on the device, and what the loop
on the host makes of the counts. `optax.apply_if_finite` guards the optimizer
alone, and applies what is not finite after a number of times.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.types import TrainStep

DROPPED = 'dropped'
SPIKES = 'spikes'
_WATCHED = ('loss/total', 'grad_norm', 'grad_norm/objective')


def drop_nonfinite(train_step: TrainStep) -> TrainStep:
  """A step that changes nothing where its loss or gradients are not finite.

  The whole new state is dropped: parameters, the optimizer's state and masks,
  BatchNorm, observers, and what the objective owns. The step alone is counted,
  so that the next batch has random numbers of its own.

  Args:
    train_step: from `make_train_step`; not compiled.

  Returns:
    The same with one more metric, `dropped`: 1 if the new state was dropped.

  Example:
    >>> import optax
    >>> from kd_jax import objectives, step
    >>> from kd_jax.types import Forward
    >>> student = lambda v, batch, rng, *, train: Forward(
    ...   v['params'] * batch['x'])
    >>> objective = objectives.term(lambda i: jnp.log(i.student.output))
    >>> tx, batch = optax.sgd(1.0), {'x': jnp.ones(2)}
    >>> run = drop_nonfinite(step.make_train_step(student, objective, tx))
    >>> state = step.init_state(
    ...   student, objective, tx, {'params': jnp.float32(1)}, batch)
    >>> state, metrics = run(state, {'x': -batch['x']}, jax.random.key(0))
    >>> float(state.params), int(state.step), float(metrics['dropped'])
    (1.0, 1, 1.0)
  """

  def guarded(state, batch, rng):
    new, metrics = train_step(state, batch, rng)
    finite = jnp.bool_(True)
    for name in _WATCHED:
      finite &= jnp.isfinite(metrics.get(name, 0.0))
    # The teacher is the same in both.
    old, made = state.replace(teacher=None), new.replace(teacher=None)
    kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), made, old)
    kept = kept.replace(step=new.step, teacher=new.teacher)
    return kept, metrics | {DROPPED: 1 - finite.astype(jnp.float32)}

  # What `sharding.compile_step` compares with its compiler.
  vars(guarded).update(getattr(train_step, '__dict__', {}))
  return guarded


class Failures:
  """Counts what `drop_nonfinite` dropped, and notices losses that jump.

  Args:
    limit: how many steps in a row may be dropped before training stops.
    spike: a loss is called a spike above this multiple of the loss so far, a
      moving average over about a hundred steps.

  Attributes:
    in_a_row: steps dropped since the last that was not.
    average: of the loss so far; None before the first step.
    spikes: how many there were.

  Example:
    >>> failures = Failures(limit=2)
    >>> rows = [{'loss/total': 1.0}, {'loss/total': 9.0}]
    >>> failures.add(rows, step=2)
    ['step 2: the loss of 9 is 9.0 times the average before']
    >>> failures.add([{'loss/total': float('nan'), 'dropped': 1}], step=3)
    ['step 3 was dropped: loss/total is nan']
    >>> failures.in_a_row, failures.spikes, round(failures.average, 2)
    (1, 1, 1.16)
  """

  def __init__(self, limit: int = 10, spike: float = 4.0):
    self.limit, self.spike = limit, spike
    self.in_a_row = 0
    self.average: float | None = None
    self.spikes = 0

  def get_state(self) -> dict[str, Any]:
    """What `set_state` takes; JSON values."""
    names = ('in_a_row', 'average', 'spikes')
    return {name: getattr(self, name) for name in names}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes on where another one was."""
    for name in self.get_state():
      setattr(self, name, state[name])

  def add(self, rows: Sequence[Mapping[str, Any]], step: int) -> list[str]:
    """Looks at the metrics of some steps.

    Args:
      rows: one dict of numbers a step, in order; spikes are looked for where
        there is a 'loss/total'.
      step: number of the last of them.

    Returns:
      A sentence for each spike and for each run of dropped steps.

    Raises:
      FloatingPointError: if `limit` steps in a row were dropped; names the last
        one and the terms that were not finite.
    """
    said: list[str] = []
    for at, row in enumerate(rows, start=step - len(rows) + 1):
      if row.get(DROPPED, 0):
        self.in_a_row += 1
        if self.in_a_row == 1:
          said.append(f'step {at} was dropped: {_not_finite(row)}')
        if self.in_a_row >= self.limit:
          raise FloatingPointError(
            f'{self.limit} steps in a row were dropped up to step {at}: '
            f'{_not_finite(row)}'
          )
        continue
      self.in_a_row = 0
      if 'loss/total' not in row:
        continue
      loss = float(row['loss/total'])
      if self.average is None:
        self.average = loss
      if self.average > 0 and loss > self.spike * self.average:
        self.spikes += 1
        said.append(
          f'step {at}: the loss of {loss:.4g} is {loss / self.average:.1f} '
          'times the average before'
        )
      self.average += 0.02 * (loss - self.average)
    return said


def _not_finite(row: Mapping[str, Any]) -> str:
  """Which numbers of a step are not finite, single terms first."""
  found = [n for n, value in row.items() if not np.isfinite(value)]
  found.sort(key=lambda name: name in _WATCHED)
  return ', '.join(f'{name} is {float(row[name])}' for name in found)
