"""Where the time of a training run goes: `kd-jax run --profile`.

Owns the measurement of how long the devices wait for data, and a trace of a
few dispatches. Without it the loop measures nothing.
"""

import os
from pathlib import Path
from typing import Any

import jax

# Dispatches before the trace, which compile, and in it.
_BEFORE, _TRACED = 2, 20


class Profile:
  """Measures one training run.

  The devices are said to wait while the host reads a batch and moves it, if
  nothing that was dispatched is left to be computed when it is done. What was
  computed until somewhere in between counts as waited too, so the share is not
  below the true one. The first rows of the history, in which programs are
  compiled, evaluations, checkpoints and traced dispatches are left out.

  Args:
    directory: where the trace goes, for TensorBoard (`plugins/profile`) and
      for ui.perfetto.dev (its `.trace.json.gz`).

  Example:
    >>> profile = Profile('unused')
    >>> profile.window(10, 9.0)  # compiles; left out
    >>> profile.fetched(0.5, idle=True)
    >>> profile.fetched(0.5, idle=False)
    >>> profile.window(10, 2.0)
    >>> profile.close()
    {'steps_per_second': 5.0, 'waiting': 0.25, 'trace': None}
  """

  def __init__(self, directory: str | os.PathLike[str]):
    self.directory = Path(directory)
    self.waited = self.seconds = 0.0
    self.steps = 0
    self._in_window = 0.0
    self._measured = False
    self._dispatched, self._tracing = 0, False

  def fetched(self, seconds: float, *, idle: bool) -> None:
    """A batch was read and moved.

    Args:
      seconds: that it took.
      idle: whether the devices had nothing left to compute at its end.
    """
    self._in_window += seconds * idle

  def dispatched(self, results: Any) -> None:
    """A dispatch was made; begins and ends the trace.

    Args:
      results: arrays that it makes.
    """
    self._dispatched += 1
    if self._dispatched == _BEFORE:
      jax.block_until_ready(results)
      # Without a Python trace, which would slow the host down.
      jax.profiler.start_trace(self.directory, profiler_options=_options())
      self._tracing, self._measured = True, False
    elif self._dispatched == _BEFORE + _TRACED:
      jax.block_until_ready(results)
      self._stop()

  def _stop(self) -> None:
    if self._tracing:
      jax.profiler.stop_trace()
      self._tracing = self._measured = False

  def window(self, steps: int, seconds: float) -> None:
    """Some steps were computed to their end.

    Args:
      steps: how many.
      seconds: from before the first dispatch to the end of the last step.
    """
    if self._measured:
      self.steps += steps
      self.seconds += seconds
      self.waited += self._in_window
    self._in_window = 0.0
    self._measured = not self._tracing

  def close(self) -> dict[str, Any]:
    """Ends the measurement.

    Returns:
      `steps_per_second` and `waiting`, the share of the time in [0, 1], both
      None if the run was too short to be measured, and `trace`, the directory,
      or None.
    """
    self._stop()
    measured = self.seconds > 0
    traced = self._dispatched >= _BEFORE
    return {
      'steps_per_second': self.steps / self.seconds if measured else None,
      'waiting': min(self.waited / self.seconds, 1.0) if measured else None,
      'trace': str(self.directory) if traced else None,
    }


def _options() -> jax.profiler.ProfileOptions:
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  return options


def sentence(numbers: dict[str, Any]) -> str:
  """The numbers of `Profile.close` in words.

  Args:
    numbers: what it returned.

  Example:
    >>> sentence({'steps_per_second': 50.0, 'waiting': 0.012, 'trace': 'here'})
    '50.0 steps/s, the devices waited for data 1.2 % of the time; trace in here'
  """
  if numbers['waiting'] is None:
    said = 'the run is too short to measure its speed'
  else:
    said = (
      f'{numbers["steps_per_second"]:.1f} steps/s, the devices waited for data '
      f'{100 * numbers["waiting"]:.1f} % of the time'
    )
  trace = numbers['trace']
  return f'{said}; trace in {trace}' if trace else said
