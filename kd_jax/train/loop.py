"""The training loop: one compiled step, batches, evaluation, checkpoints.

Owns what happens on the host between steps and nothing about models or
losses. A run that was killed continues from its last checkpoint and ends with
the same bits as one that was not.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kd_jax.guard import SKIPPED, SPIKES, Failures
from kd_jax.sharding import hosts, preemption
from kd_jax.sharding.preemption import Preempted as Preempted
from kd_jax.storage.checkpoint import CheckpointError, Checkpoints
from kd_jax.storage.progress import ProgressBar
from kd_jax.train import profiling
from kd_jax.train.feed import Fed, Feed, Several, dispatches
from kd_jax.types import Batch, BatchStream, HostBatch, Metrics, TrainState


@dataclasses.dataclass(frozen=True)
class Trained:
  """What a training run ends with.

  Attributes:
    state: the state after the last step.
    history: rows of numbers; every row has `step`, and how many steps were
      `skipped` and how many losses were `spikes` since the row before; the
      others as they came.
    seconds: time spent in the loop, over all restarts.
    profile: of this start, see `profiling.Profile.close`; None without one.
  """

  state: TrainState
  history: list[dict[str, float]]
  seconds: float
  profile: dict[str, Any] | None = None


def train(
  train_step: Callable[
    [TrainState, Batch, jax.Array], tuple[TrainState, Metrics]
  ],
  state: TrainState,
  batches: BatchStream,
  *,
  rng: jax.Array,
  total_steps: int,
  put: Callable[[HostBatch], Batch],
  checkpoints: Checkpoints,
  evaluate: Callable[[TrainState], dict[str, float]] = lambda state: {},
  evaluate_every: int = 100,
  log_every: int = 20,
  title: str = 'train',
  several: Several | None = None,
  profile: profiling.Profile | None = None,
) -> Trained:
  """Trains up to a step, from the last checkpoint if there is one.

  Args:
    train_step: compiled, see `sharding.compile_step`.
    state: the initial state; its teacher, which checkpoints do not hold, is
      used after a restart as well.
    batches: endless.
    rng: the run's key; it is saved, and restored with the state.
    total_steps: where to end.
    put: moves a host batch to the devices, such as `sharding.shard_batch`.
    checkpoints: where to save at every evaluation and at the end.
    evaluate: numbers to add to the history, such as `{'eval/accuracy': ...}`.
    evaluate_every: steps between two evaluations.
    log_every: steps between two rows of the history, each a mean over them.
    title: what the progress bar says.
    several: makes several steps in one dispatch. None of these steps over an
      evaluation or the end; rows of the history come with the first dispatch
      that reaches them. None makes single steps.
    profile: measures where the time goes.

  Returns:
    The last state and the history.

  Raises:
    FloatingPointError: if too many steps in a row were dropped, see
      `guard.Failures`; the checkpoint before stays.
    CheckpointError: if a save failed; at the next step, not at the next save.
      Also if the last checkpoint does not say where the batches stand.
    Preempted: after SIGTERM or SIGINT, once the state is saved. An evaluation
      is broken off, and made when training goes on.
  """
  teacher = state.teacher
  like = {'state': state.replace(teacher=None), 'rng': rng}
  restored = checkpoints.restore(like)
  history: list[dict[str, float]] = []
  window, failures = _Window(profile), Failures()
  seconds, step, owed = 0.0, 0, False
  if restored is not None:
    step = restored.step
    state = restored.state['state'].replace(teacher=teacher)
    rng = restored.state['rng']
    saved = restored.data_state
    if saved is None:
      raise CheckpointError(
        f'The checkpoint of step {step} does not say where the batches stand: '
        'it was not saved by a training. Use another directory.'
      )
    batches.set_state(saved['batches'])
    history = saved['history']
    seconds = saved['seconds']
    window.restore(saved['window'])
    failures.set_state(saved['failures'])
    owed = saved['owed']
  started = time.perf_counter()

  def elapsed() -> float:
    return seconds + time.perf_counter() - started

  def save(numbers: dict[str, float] | None) -> None:
    checkpoints.save(
      step,
      {'state': state.replace(teacher=None), 'rng': rng},
      data_state={
        'batches': feed.get_state(),
        'history': history,
        'seconds': elapsed(),
        'window': window.numbers(),
        'failures': failures.get_state(),
        # The evaluation of this step, which a signal broke off.
        'owed': numbers is None,
      },
      metrics=numbers,
    )

  with (
    ProgressBar(title, total_steps, start=step) as bar,
    _stop_requested() as stop,
  ):
    if owed:
      with stop.raised():
        history[-1] |= evaluate(state)
    at_once = 1 if several is None else several.steps
    counts = dispatches(step, total_steps, evaluate_every, at_once)
    feed = Feed(batches, put, counts, several, profile)
    while step < total_steps:
      checkpoints.check()
      batch = feed.take()
      run = train_step
      if several is not None and batch.steps > 1:
        run = several.step
      window.start()
      state, metrics = run(state, batch.arrays, rng)
      feed.fetch(metrics)
      step += batch.steps
      window.add(metrics, batch)
      due = step % evaluate_every == 0 or step == total_steps
      if due or step % log_every < batch.steps:
        rows, rate = window.close()
        spikes = failures.spikes
        for sentence in (
          *_looked_at(failures, rows, step, title, checkpoints),
          *_compiled_again(run, batch, step),
        ):
          bar.say(sentence)
        spikes = failures.spikes - spikes
        history.append({'step': step} | _means(rows) | {SPIKES: spikes})
        bar.update(step, _brief(history[-1]), rate)
      stopping = stop.is_set()
      if due or stopping:
        numbers: dict[str, float] | None = None if due else {}
        if due:
          with contextlib.suppress(Preempted), stop.raised():
            numbers = evaluate(state)
          history[-1] |= numbers or {}
        stopping |= numbers is None
        save(numbers)
      if stopping:
        checkpoints.wait()
        raise Preempted(f'{title}: stopped by a signal; saved at step {step}.')
    times = None if profile is None else profile.close()
    if times:
      bar.say(profiling.sentence(times))
  checkpoints.wait()
  return Trained(state, history, elapsed() if total_steps else 0.0, times)


class _Window:
  """Metrics since the last row; kept on the device until the row is due."""

  def __init__(self, profile: profiling.Profile | None):
    self.profile = profile
    self._clear([])

  def _clear(self, rows: list[Metrics]) -> None:
    self.rows = rows
    self.metrics: list[tuple[int, Metrics]] = []
    self.steps = self.examples = 0
    self.started = 0.0

  def restore(self, rows: list[Metrics]) -> None:
    """Goes on with the metrics of the steps of a window that was saved."""
    self._clear(rows)

  def start(self) -> None:
    """Before every dispatch; the first one starts the clock."""
    self.started = self.started or time.perf_counter()

  def add(self, metrics: Metrics, batch: Fed) -> None:
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


def _compiled_again(
  run: Callable[..., Any], batch: Fed, step: int
) -> Iterator[str]:
  """A sentence if a step was compiled more often than once."""
  traces = getattr(run, 'traces', [])
  if len(traces) > 1:
    shapes = {name: x.shape for name, x in batch.arrays.items()}
    traces[:] = traces[-1:]
    yield f'compiled again before step {step}, for a batch of {shapes}'


def _looked_at(
  failures: Failures,
  rows: Sequence[Metrics],
  step: int,
  title: str,
  checkpoints: Checkpoints,
) -> list[str]:
  try:
    return failures.add(rows, step)
  except FloatingPointError as e:
    last = checkpoints.latest_step()
    saved = (
      'There is no checkpoint' if last is None else f'Step {last} is saved'
    )
    raise FloatingPointError(
      f'{title}: {e}; lower the learning rate or clip the gradients. {saved}.'
    ) from e


def _means(rows: list[Metrics]) -> dict[str, float]:
  """The mean of every metric over the steps that were not dropped.

  Without such a step there are no means: JSON has no NaN.
  """
  kept = [row for row in rows if not row.get(SKIPPED, 0)]
  numbers = {
    name: float(np.mean([row[name] for row in kept], dtype=np.float64))
    for name in (rows[0] if kept else ())
  }
  return numbers | {SKIPPED: len(rows) - len(kept)}


def _brief(row: Mapping[str, float]) -> dict[str, float]:
  brief = {'loss': row['loss/total']} if 'loss/total' in row else {}
  return brief | {
    name: value
    for name, value in row.items()
    if name == 'accuracy' or (name == SKIPPED and value)
  }


@contextlib.contextmanager
def _stop_requested() -> Iterator[hosts.StopRequested | preemption.Deferred]:
  """What SIGTERM and SIGINT set; one answer for all processes."""
  if jax.process_count() > 1:
    yield hosts.StopRequested()
    return
  with preemption.deferred() as stop:
    yield stop
