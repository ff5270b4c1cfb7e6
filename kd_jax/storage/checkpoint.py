"""Checkpoints that survive a kill, notice damage and refuse another run's.

Owns when a step is whole, kept or refused. A step is an Orbax directory that
holds `state`, the arrays by path, and `manifest`, which says what they are and
the SHA-256 of each; how these are read is in `checkpoint_format`. Owns neither
when to save nor what a state means.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import orbax.checkpoint as ocp
from etils import epath

from kd_jax.sharding import hosts
from kd_jax.storage import checkpoint_format as form
from kd_jax.storage import files
from kd_jax.storage.checkpoint_format import CheckpointError as CheckpointError
from kd_jax.storage.checkpoint_format import Restored as Restored

JSON = Any


class Checkpoints:
  """The checkpoints of one run: its only writer, and a careful reader.

  A context manager: leaving it waits for the save under way. Reading never
  deletes, and nothing is created or cleaned up before the first save.

  Args:
    directory: where the steps lie; made by the first save. Local, or what else
      `etils.epath` reads, such as 'gs://...'.
    fingerprint: JSON values that must be the same when the run resumes, such
      as the config and the order of the data.
    best: the metric whose best value is kept beside the last steps; None
      keeps only those. A step saved without it, or with NaN, is never best.
    higher: whether its highest value is the best, or its lowest.
    keep: how many of the last steps are kept, > 0.

  Raises:
    CheckpointError: if the directory holds something that is not ours.

  Example:
    >>> import tempfile
    >>> import jax
    >>> state = {'w': jax.numpy.arange(3.0), 'rng': jax.random.key(0)}
    >>> with Checkpoints(tempfile.mkdtemp(), fingerprint={'seed': 0}) as saved:
    ...   saved.save(10, state, metrics={'eval/accuracy': 0.5})
    ...   restored = saved.restore(jax.eval_shape(lambda: state))
    >>> restored.step, restored.state['w'].tolist(), restored.metrics
    (10, [0.0, 1.0, 2.0], {'eval/accuracy': 0.5})
  """

  def __init__(
    self,
    directory: epath.PathLike,
    *,
    fingerprint: Mapping[str, JSON] = {},
    best: str | None = None,
    higher: bool = True,
    keep: int = 1,
  ):
    if keep < 1:
      raise CheckpointError(f'keep must be at least 1 but is {keep}.')
    self._directory = form.absolute(directory)
    form.check_ours(self._directory)
    self._fingerprint = files.as_json(
      dict(fingerprint), 'The fingerprint', error=CheckpointError
    )
    self._best = best
    self._policy = _Preserve(keep, 1 if higher else -1, {}, {})
    self._manager: ocp.CheckpointManager | None = None
    self._due: int | None = None
    self._resources = contextlib.ExitStack()

  def save(
    self,
    step: int,
    state: Any,
    *,
    data_state: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
  ) -> None:
    """Saves in the background; the state may be donated once this returns.

    Blocks until the save before it has ended and the arrays are digested.

    Args:
      step: must be after every step there is, damaged ones apart: one that is
        damaged is replaced.
      state: a tree of jax and numpy arrays of any dtype, typed keys included.
      data_state: where the input pipeline stands; JSON values.
      metrics: metric name -> scalar.

    Raises:
      CheckpointError: if the step is not new, the state holds something that
        is no array, or this save or the one before it failed.
    """
    step, named = int(step), form.flatten(state)
    arrays = {name: form.stored(leaf) for name, leaf in named.items()}
    digests = form.digests(arrays)
    metrics = {name: float(value) for name, value in (metrics or {}).items()}
    manifest = files.seal(
      {
        'format': form.FORMAT,
        'versions': {name: files.version(name) for name in form.PACKAGES},
        'fingerprint': self._fingerprint,
        'data_state': files.as_json(
          data_state, 'data_state', error=CheckpointError
        ),
        'metrics': metrics,
        'leaves': {
          name: {**form.describe(leaf), 'sha256': digests[name]}
          for name, leaf in named.items()
        },
      }
    )
    # TensorStore refuses arrays of size zero; the manifest has all of them.
    arrays = {name: x for name, x in arrays.items() if x.size}
    if not arrays:
      raise CheckpointError(f'Cannot save step {step}: the state has no array.')
    self.wait()
    self._check_new(step)
    with hosts.uninterrupted():
      self._begin(step, arrays, manifest)

  def _begin(self, step: int, arrays: Any, manifest: Mapping[str, Any]) -> None:
    """Starts a save in the background."""
    try:
      manager = self._writer()
      self._policy.damaged.pop(step, None)
      metric = manifest['metrics'].get(self._best, math.nan)
      self._policy.metric[step] = metric
      if step in manager.all_steps():
        manager.delete(step)
      # Every process calls this; Orbax lets process 0 write the manifest.
      done = manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(arrays),
          manifest=ocp.args.JsonSave(manifest),
        ),
        force=True,  # or else a damaged later step makes Orbax skip this one
      )
    except Exception as e:
      raise self._failed(e) from e
    if not done:
      raise CheckpointError(f'Orbax skipped step {step} of {self._directory}.')
    self._due = step

  def restore(self, like: Any, *, step: int | None = None) -> Restored | None:
    """Reads the newest step that is whole, or the step asked for.

    A damaged step is passed over with a warning on the logger 'kd_jax'. One
    of another run or model is not: that is an error, never a reason to take
    an older step.

    Args:
      like: the tree to restore: `jax.ShapeDtypeStruct`s or arrays. A leaf
        with a sharding comes back with that sharding, a numpy leaf as numpy,
        any other on the default device.
      step: the only step to try; None tries them from the newest on.

    Returns:
      What was read, bitwise as it was saved; None if there is no checkpoint.

    Raises:
      CheckpointError: if every step is damaged (or the one asked for is, or
        is not there), the fingerprint differs, or a path, shape or dtype of
        `like` does.
    """
    self.wait()
    damaged = self._policy.damaged
    return form.restore(self._directory, like, step, self._fingerprint, damaged)

  def latest_step(self) -> int | None:
    """The newest step not known to be damaged, after waiting for its save."""
    return max(self._good_steps(), default=None)

  def best_step(self) -> int | None:
    """The step with the best `best` metric, the newest of equals."""
    return self._policy.best(self._good_steps())

  def check(self) -> None:
    """Raises CheckpointError if the save under way failed already.

    Does not wait for it; meant for every step of a training loop.
    """
    # Orbax keeps an error until somebody waits, here for nothing.
    if self._due is None or self._manager is None:
      return
    if not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Waits for the save under way; raises CheckpointError if it failed."""
    if self._manager is not None:
      due, self._due = self._due, None
      try:
        with hosts.uninterrupted():
          self._manager.wait_until_finished()
          self._manager.check_for_errors()
      except Exception as e:
        raise self._failed(e) from e
      if due is not None and due not in form.saved_steps(self._directory):
        raise CheckpointError(
          f'Step {due} was saved to {self._directory} but is not there.'
        )

  def close(self) -> None:
    """Waits, then ends the background threads; may be called twice.

    Raises:
      CheckpointError: if a save failed.
    """
    self._manager = None
    try:
      with hosts.uninterrupted():
        self._resources.close()
    except Exception as e:
      raise self._failed(e) from e

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exc: object) -> None:
    self.close()

  def _check_new(self, step: int) -> None:
    steps = hosts.on_first(lambda: form.saved_steps(self._directory))
    for there in [s for s in steps if s >= step]:
      reason = self._policy.damaged.get(there) or form.damage(
        self._directory, there
      )
      if not reason:
        raise CheckpointError(
          f'Cannot save step {step}: {self._directory} already has step '
          f'{there}. Resume from it, or use another directory.'
        )
      self._policy.damaged[there] = reason

  def _good_steps(self) -> list[int]:
    """Also learns the metrics of steps that an earlier run saved."""
    self.wait()
    good = []
    for step in form.saved_steps(self._directory):
      with contextlib.suppress(form.Damaged):
        if step not in self._policy.damaged:
          metrics = form.step_manifest(self._directory, step)['metrics']
          self._policy.metric[step] = metrics.get(self._best, math.nan)
          good.append(step)
    return good

  def _writer(self) -> ocp.CheckpointManager:
    if self._manager is None:
      self._good_steps()
      self._resources.enter_context(form.quiet())
      options = ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True, preservation_policy=self._policy
      )
      self._manager = ocp.CheckpointManager(
        self._directory,
        options=options,
        item_handlers={
          'state': form.array_handler(),
          'manifest': ocp.JsonCheckpointHandler(),
        },
      )
      self._resources.callback(self._manager.close)
    return self._manager

  def _failed(self, e: Exception) -> CheckpointError:
    return CheckpointError(
      f'Saving to {self._directory} failed: {files.brief(e)}.'
    )


def read_manifest(
  directory: epath.PathLike, step: int | None = None
) -> dict[str, Any]:
  """What a step says about itself, without reading its arrays.

  Args:
    directory: that of the `Checkpoints` that wrote it.
    step: the step; None takes the newest whose manifest can be read.

  Returns:
    `format`, `versions`, `fingerprint`, `data_state`, `metrics`, and `leaves`:
    path -> `shape`, `dtype`, `sha256`, and for a typed key its `impl`.

  Raises:
    CheckpointError: if there is none, or it cannot be read.
  """
  directory = form.absolute(directory)
  steps = form.saved_steps(directory)
  why = 'it is not there' if step is not None else 'no checkpoint'
  for s in [s for s in reversed(steps) if step in (None, s)]:
    try:
      return form.step_manifest(directory, s)
    except form.Damaged as e:
      why = f'step {s} is damaged: {e}'
  raise form.nothing(directory, step, [why])


def load_state(
  directory: epath.PathLike, like: Any, *, step: int | None = None
) -> Restored:
  """Reads a state, or a part of one, that any run saved; changes nothing.

  As `Checkpoints.restore`, but whatever the fingerprint; and `like` may be a
  part of the tree: `{'params': ..., 'model_state': ...}` reads these two of a
  train state, and not what its optimizer needs.

  Args:
    directory: that of the `Checkpoints` that wrote it.
    like: as in `Checkpoints.restore`; its leaves are found by path.
    step: the only step to try; None tries them from the newest on.

  Returns:
    What was read, `state` in the tree of `like`.

  Raises:
    CheckpointError: as `Checkpoints.restore`, and if there is no checkpoint.
  """
  directory = form.absolute(directory)
  restored = form.restore(directory, like, step, None, {}, part=True)
  if restored is None:
    raise form.nothing(directory, step, [])
  return restored


class _Preserve(NamedTuple):
  """Orbax's preservation policy: damaged steps take no good one's place."""

  keep: int
  sign: int  # of a metric of which more is better; else -1
  metric: dict[int, float]  # step -> value, NaN if it has none
  damaged: dict[int, str]  # step -> why

  def best(self, steps: Iterable[int]) -> int | None:
    scored = [
      (self.sign * self.metric[s], s) for s in steps if s in self.metric
    ]
    return max((x for x in scored if x[0] == x[0]), default=(0, None))[1]

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> list[bool]:
    del context
    steps = [c.step for c in checkpoints]
    good = sorted(s for s in steps if s not in self.damaged)
    kept = {*good[-self.keep :], self.best(good)}
    # A damaged step goes when a good one after it is there, not earlier.
    return [s in kept or s > max(good, default=-1) for s in steps]
