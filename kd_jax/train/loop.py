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

from kd_jax.guard import DROPPED, SPIKES, Failures
from kd_jax.sharding import hosts, preemption
from kd_jax.sharding.preemption import Preempted as Preempted
from kd_jax.storage.checkpoint import CheckpointError, Checkpoints
from kd_jax.storage.progress import ProgressBar
from kd_jax.train import profiling
from kd_jax.train.feed import Fed, Feed, Several, dispatches
from kd_jax.train.window import Window, means
from kd_jax.types import (
  Batch,
  BatchStream,
  HostBatch,
  Metrics,
  TrainState,
  TrainStep,
)


@dataclasses.dataclass(frozen=True)
class Trained:
  """What a training run ends with.

  Attributes:
    state: the state after the last step.
    history: rows of numbers; every row has `step`, and how many steps were
      `dropped` and how many losses were `spikes` since the row before; the
      others as they came.
    seconds: time spent in the loop, over all restarts.
    profile: of this start, see `profiling.Profile.close`; None without one.

  Example:
    >>> trained = Trained(None, [{'step': 20, 'loss/total': 0.5}], 1.5)
    >>> trained.history[-1]['loss/total'], trained.profile
    (0.5, None)
  """

  state: TrainState
  history: list[dict[str, float]]
  seconds: float
  profile: dict[str, Any] | None = None


def train(
  train_step: TrainStep,
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
      is broken off, and made when training goes on; the checkpoint of its step
      has no metrics and is never the best.
    ValueError: for intervals below 1.

  Example:
    >>> import tempfile
    >>> from kd_jax import types
    >>> class Ones(Iterator):
    ...   __next__ = lambda self: {'x': jax.numpy.ones(2)}
    ...   get_state = lambda self: {}
    ...   set_state = lambda self, state: None
    >>> def step(state, batch, rng):
    ...   params = state.params + batch['x'].sum()
    ...   new = state.replace(step=state.step + 1, params=params)
    ...   return new, {'loss/total': params}
    >>> zero = jax.numpy.zeros(())
    >>> state = TrainState(
    ...   step=jax.numpy.int32(0), params=zero, model_state={}, opt_state=(),
    ...   objective=types.ObjectiveState({}, {}, ()))
    >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
    ...   trained = train(
    ...     step, state, Ones(), rng=jax.random.key(0), total_steps=4,
    ...     put=lambda batch: batch, checkpoints=checkpoints, log_every=2)
    >>> float(trained.state.params)
    8.0
    >>> [(row['step'], row['loss/total']) for row in trained.history]
    [(2, 3.0), (4, 7.0)]
  """
  if evaluate_every < 1 or log_every < 1:
    raise ValueError(
      f'evaluate_every={evaluate_every} and log_every={log_every} are numbers '
      'of steps, from 1 on: one beyond total_steps is never.'
    )
  training = _Training(state, rng, batches, checkpoints, Window(profile))
  del state, rng  # Both change with the first step.
  training.restore()
  with (
    ProgressBar(title, total_steps, start=training.step) as bar,
    _stop_requested() as stop,
  ):
    if training.owed:
      with stop.raised():
        training.history[-1] |= evaluate(training.state)
    at_once = 1 if several is None else several.steps
    counts = dispatches(training.step, total_steps, evaluate_every, at_once)
    feed = Feed(batches, put, counts, several, profile)
    while training.step < total_steps:
      checkpoints.check()
      batch = feed.take()
      run = train_step
      if several is not None and batch.steps > 1:
        run = several.step
      feed.fetch(training.make(run, batch))
      step = training.step
      due = step % evaluate_every == 0 or step == total_steps
      if due or step % log_every < batch.steps:
        sentences, rate = training.close_row(title)
        for sentence in (*sentences, *_compiled_again(run, batch, step)):
          bar.say(sentence)
        bar.update(step, _brief(training.history[-1]), rate)
      stopping = stop.is_set()
      if due or stopping:
        numbers: dict[str, float] | None = None if due else {}
        if due:
          with contextlib.suppress(Preempted), stop.raised():
            numbers = evaluate(training.state)
          training.history[-1] |= numbers or {}
        stopping |= numbers is None
        training.save(feed.get_state(), numbers)
      if stopping:
        checkpoints.wait()
        raise Preempted(f'{title}: stopped by a signal; saved at step {step}.')
    times = None if profile is None else profile.close()
    if times:
      bar.say(profiling.sentence(times))
  checkpoints.wait()
  seconds = training.elapsed() if total_steps else 0.0
  return Trained(training.state, training.history, seconds, times)


@dataclasses.dataclass
class _Training:
  """Where a training stands: all that a checkpoint of it holds.

  Attributes:
    seconds: in the loop, before this start.
    owed: whether a signal broke off the evaluation of this step.
  """

  state: TrainState
  rng: jax.Array
  batches: BatchStream
  checkpoints: Checkpoints
  window: Window
  step: int = 0
  history: list[dict[str, float]] = dataclasses.field(default_factory=list)
  failures: Failures = dataclasses.field(default_factory=Failures)
  seconds: float = 0.0
  owed: bool = False
  started: float = dataclasses.field(default_factory=time.perf_counter)

  def restore(self) -> None:
    """Goes to the last checkpoint, if there is one."""
    restored = self.checkpoints.restore(self._arrays())
    if restored is None:
      return
    saved = restored.data_state
    if saved is None:
      raise CheckpointError(
        f'The checkpoint of step {restored.step} does not say where the '
        'batches stand: it was not saved by a training. Use another directory.'
      )
    self.step, self.rng = restored.step, restored.state['rng']
    teacher = self.state.teacher
    self.state = restored.state['state'].replace(teacher=teacher)
    self.batches.set_state(saved['batches'])
    self.history, self.seconds = saved['history'], saved['seconds']
    self.window.restore(saved['window'])
    self.failures.set_state(saved['failures'])
    self.owed = saved['owed']
    self.started = time.perf_counter()

  def save(
    self, batches: dict[str, Any], numbers: dict[str, float] | None
  ) -> None:
    """Starts to write a checkpoint.

    Args:
      batches: where they stand.
      numbers: of the evaluation; None if it is owed.
    """
    self.checkpoints.save(
      self.step,
      self._arrays(),
      data_state={
        'batches': batches,
        'history': self.history,
        'seconds': self.elapsed(),
        'window': self.window.numbers(),
        'failures': self.failures.get_state(),
        'owed': numbers is None,
      },
      metrics=numbers,
    )

  def _arrays(self) -> dict[str, Any]:
    return {'state': self.state.replace(teacher=None), 'rng': self.rng}

  def elapsed(self) -> float:
    """Seconds in the loop, over all starts."""
    return self.seconds + time.perf_counter() - self.started

  def make(self, run: Callable[..., Any], batch: Fed) -> Metrics:
    """One dispatch; its metrics, still on the devices."""
    self.window.start()
    self.state, metrics = run(self.state, batch.arrays, self.rng)
    self.step += batch.steps
    self.window.add(metrics, batch)
    return metrics

  def close_row(self, title: str) -> tuple[list[str], float]:
    """Ends a row of the history; what is to be said, and examples a second."""
    rows, rate = self.window.close()
    spikes = self.failures.spikes
    sentences = _looked_at(
      self.failures, rows, self.step, title, self.checkpoints
    )
    spikes = self.failures.spikes - spikes
    self.history.append({'step': self.step} | means(rows) | {SPIKES: spikes})
    return sentences, rate


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


def _brief(row: Mapping[str, float]) -> dict[str, float]:
  brief = {'loss': row['loss/total']} if 'loss/total' in row else {}
  return brief | {
    name: value
    for name, value in row.items()
    if name == 'accuracy' or (name == DROPPED and value)
  }


@contextlib.contextmanager
def _stop_requested() -> Iterator[hosts.StopRequested | preemption.Deferred]:
  """What SIGTERM and SIGINT set; one answer for all processes."""
  if jax.process_count() > 1:
    yield hosts.StopRequested()
    return
  with preemption.deferred() as stop:
    yield stop
