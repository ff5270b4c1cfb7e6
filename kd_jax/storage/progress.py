"""Progress of long work: a bar on a terminal, plain lines elsewhere.

Owns how it is shown, by the first process alone; what is shown is its caller's.
"""

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)

from kd_jax.sharding import hosts

PLAIN_SECONDS = 10.0


class ProgressBar:
  """A context manager that shows steps, numbers and examples per second.

  Args:
    title: what is running.
    total: number of steps.
    start: steps that an earlier run completed.
    console: where to print; standard error of process 0 when None.
  """

  def __init__(
    self,
    title: str,
    total: int,
    *,
    start: int = 0,
    console: Console | None = None,
  ):
    self.title, self.total = title, total
    quiet = not hosts.is_first()
    self.console = console or Console(file=sys.stderr, quiet=quiet)
    self.bar: Progress | None = None
    self.printed_at = time.monotonic()
    if self.console.is_terminal:
      self.bar = Progress(
        TextColumn('{task.description:<12}'),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn('{task.fields[numbers]}'),
        TimeRemainingColumn(compact=True),
        console=self.console,
      )
      self.bar.add_task(title, total=total, completed=start, numbers='')

  def __enter__(self) -> 'ProgressBar':
    if self.bar:
      self.bar.start()
    return self

  def __exit__(self, *error: Any) -> None:
    if self.bar:
      self.bar.stop()

  def update(
    self, step: int, numbers: Mapping[str, float], rate: float
  ) -> None:
    """Shows a step.

    Args:
      step: completed steps.
      numbers: name -> value, such as loss and accuracy.
      rate: examples per second.
    """
    text = ' '.join(f'{k} {v:.4g}' for k, v in numbers.items())
    text += f' {rate:,.0f} examples/s'
    if self.bar:
      [task] = self.bar.task_ids
      self.bar.update(task, completed=step, numbers=text)
      return
    now = time.monotonic()
    # A log file wants a line now and then, and the last one.
    if step == self.total or now - self.printed_at > PLAIN_SECONDS:
      self.printed_at = now
      line = f'{self.title}: step {step}/{self.total} {text}'
      self.console.print(line, markup=False, highlight=False, soft_wrap=True)

  def say(self, sentence: str) -> None:
    """Prints a sentence above the bar."""
    line = f'{self.title}: {sentence}'
    self.console.print(line, markup=False, highlight=False, soft_wrap=True)
