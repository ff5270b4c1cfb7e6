"""The metrics of the steps since the last row of the history.

Owns when they leave the devices and how they become a row; what is done with a
row is the `loop`'s.
"""

import time

import jax
import numpy as np

from kd_jax.guard import DROPPED
from kd_jax.train import profiling
from kd_jax.train.feed import Fed
from kd_jax.types import Metrics


class Window:
  """Metrics since the last row; kept on the device until the row is due.

  Args:
    profile: told of every dispatch and window; None without one.

  Example:
    >>> window = Window(None)
    >>> window.start()
    >>> window.add({'loss': np.float32(3)}, Fed({}, 1, 32, None))
    >>> window.add({'loss': np.array([2.0, 1.0])}, Fed({}, 2, 64, None))
    >>> window.numbers(), window.steps, window.examples
    ([{'loss': 3.0}, {'loss': 2.0}, {'loss': 1.0}], 3, 96)
  """

  def __init__(self, profile: profiling.Profile | None):
    self.profile = profile
    self._clear([])

  def _clear(self, rows: list[Metrics]) -> None:
    self.rows = rows
    self.metrics: list[tuple[int, Metrics]] = []
    self.steps = self.examples = 0
    self.started = 0.0

  def restore(self, rows: list[Metrics]) -> None:
    """Goes on with the metrics of the steps of a window that was saved.

    Args:
      rows: of `numbers`, one per step. They count for the means of the row,
        not for its speed.
    """
    self._clear(rows)

  def start(self) -> None:
    """Before every dispatch; the first one starts the clock."""
    self.started = self.started or time.perf_counter()

  def add(self, metrics: Metrics, batch: Fed) -> None:
    """Takes what a dispatch returned.

    Args:
      metrics: scalars, or `[N]` of a dispatch of N steps; they stay where they
        are.
      batch: what the dispatch was given.
    """
    self.metrics.append((batch.steps, metrics))
    self.steps += batch.steps
    self.examples += batch.examples
    if self.profile is not None:
      self.profile.dispatched(metrics)

  def numbers(self) -> list[dict[str, float]]:
    """The metrics of every step as JSON values."""
    return [{name: float(x) for name, x in row.items()} for row in self._all()]

  def _all(self) -> list[Metrics]:
    rows = list(self.rows)
    for steps, got in jax.device_get(self.metrics):
      if steps == 1:
        rows.append(got)
      else:
        rows += [{k: v[i] for k, v in got.items()} for i in range(steps)]
    return rows

  def close(self) -> tuple[list[Metrics], float]:
    """The metrics of every step, and examples per second; starts anew."""
    rows = self._all()
    seconds = time.perf_counter() - self.started
    if self.profile is not None:
      self.profile.window(self.steps, seconds)
    rate = self.examples / seconds
    self._clear([])
    return rows, rate


def means(rows: list[Metrics]) -> dict[str, float]:
  """The mean of every metric over the steps that were not dropped.

  Without such a step there are no means: JSON has no NaN.

  Args:
    rows: metrics of one step each, all of the same names.

  Returns:
    name -> mean, added in float64; and `dropped`, how many steps were.

  Example:
    >>> means([{'loss': 1.0}, {'loss': 3.0}, {'loss': np.nan, 'dropped': 1}])
    {'loss': 2.0, 'dropped': 1}
  """
  kept = [row for row in rows if not row.get(DROPPED, 0)]
  numbers = {
    name: float(np.mean([row[name] for row in kept], dtype=np.float64))
    for name in (rows[0] if kept else ())
  }
  return numbers | {DROPPED: len(rows) - len(kept)}
