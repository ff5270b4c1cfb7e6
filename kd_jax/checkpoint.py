"""Checkpoints that survive a kill, notice damage and refuse another run's.

Owns the format on disk: an Orbax step directory holding `state`, the arrays by
path, and `manifest`, which says what they are and the SHA-256 of each. Orbax
alone restores wrong numbers after one flipped byte, casts another dtype
without a word and takes an empty directory for the newest step; the manifest
is what rules these out. Owns neither when to save nor what a state means.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from kd_jax import rules

JSON = Any
_FORMAT = 1
_PACKAGES = ('kd_jax', 'jax', 'flax', 'orbax-checkpoint')
_log = logging.getLogger('kd_jax')


class CheckpointError(ValueError):
  """A checkpoint that cannot be written, or must not be read."""


class Restored(NamedTuple):
  """What `restore` found.

  Attributes:
    step: the step that was read.
    state: the arrays, in the tree of `like`.
    data_state: what `save` was given, as JSON gives it back, or None.
    metrics: metric name -> float; empty if `save` was given none.
  """

  step: int
  state: Any
  data_state: dict[str, Any] | None
  metrics: dict[str, float]


class Checkpoints:
  """The checkpoints of one run: its only writer, and a careful reader.

  A context manager: leaving it waits for the save under way. Reading never
  deletes, and nothing is created or cleaned up before the first save.

  Args:
    directory: where the steps lie; made by the first save. Local, or what else
      `etils.epath` reads, such as 'gs://...'.
    fingerprint: JSON values that must be the same when the run resumes, such
      as the config and the order of the data.
    best: the metric whose highest value is kept beside the last steps; None
      keeps only those. A step saved without it, or with NaN, is never best.
    keep: how many of the last steps are kept, > 0.

  Raises:
    CheckpointError: if the directory holds something that is not ours.

  Example:
    >>> import tempfile
    >>> state = {'w': jnp.arange(3.0), 'rng': jax.random.key(0)}
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
    keep: int = 1,
  ):
    if keep < 1:
      raise CheckpointError(f'keep must be at least 1 but is {keep}.')
    self._directory = _absolute(directory)
    _check_ours(self._directory)
    self._fingerprint = _as_json(dict(fingerprint), 'The fingerprint')
    self._best = best
    self._policy = _Preserve(keep, {}, {})
    self._manager: ocp.CheckpointManager | None = None
    self._resources = contextlib.ExitStack()

  def save(
    self,
    step: int,
    state: Any,
    *,
    data_state: Mapping[str, JSON] | None = None,
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
    step, named = int(step), _flatten(state)
    arrays = {name: _stored(leaf) for name, leaf in named.items()}
    digests = _digests(arrays)
    metrics = {name: float(value) for name, value in (metrics or {}).items()}
    manifest = _seal(
      {
        'format': _FORMAT,
        'versions': {name: _version(name) for name in _PACKAGES},
        'fingerprint': self._fingerprint,
        'data_state': _as_json(data_state, 'data_state'),
        'metrics': metrics,
        'leaves': {
          name: {**_describe(leaf), 'sha256': digests[name]}
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
    try:
      manager = self._writer()
      self._policy.damaged.pop(step, None)
      self._policy.metric[step] = metrics.get(self._best, math.nan)
      if step in manager.all_steps():
        manager.delete(step)
      # Every process calls this; Orbax lets process 0 write the manifest.
      done = manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(arrays),
          manifest=ocp.args.JsonSave(manifest),
        ),
        force=True,  # or else a damaged later step makes Orbax skip this one
      )
    except Exception as e:
      raise self._failed(e) from e
    if not done:
      raise CheckpointError(f'Orbax skipped step {step} of {self._directory}.')

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
    return _restore(self._directory, like, step, self._fingerprint, damaged)

  def latest_step(self) -> int | None:
    """The newest step not known to be damaged, after waiting for its save."""
    return max(self._good_steps(), default=None)

  def best_step(self) -> int | None:
    """The step with the highest `best` metric, the newest of equals."""
    return self._policy.best(self._good_steps())

  def wait(self) -> None:
    """Waits for the save under way; raises CheckpointError if it failed."""
    if self._manager is not None:
      try:
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
      except Exception as e:
        raise self._failed(e) from e

  def close(self) -> None:
    """Waits, then ends the background threads; may be called twice."""
    self._manager = None
    try:
      self._resources.close()
    except Exception as e:
      raise self._failed(e) from e

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exc: object) -> None:
    self.close()

  def _check_new(self, step: int) -> None:
    for there in [s for s in _steps(self._directory) if s >= step]:
      reason = self._policy.damaged.get(there) or _damage(
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
    for step in _steps(self._directory):
      with contextlib.suppress(_Damaged):
        if step not in self._policy.damaged:
          metrics = _manifest(self._directory, step)['metrics']
          self._policy.metric[step] = metrics.get(self._best, math.nan)
          good.append(step)
    return good

  def _writer(self) -> ocp.CheckpointManager:
    if self._manager is None:
      self._good_steps()
      self._resources.enter_context(_quiet())
      options = ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True, preservation_policy=self._policy
      )
      self._manager = ocp.CheckpointManager(self._directory, options=options)
      self._resources.callback(self._manager.close)
    return self._manager

  def _failed(self, e: Exception) -> CheckpointError:
    return CheckpointError(f'Saving to {self._directory} failed: {_brief(e)}.')


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
  directory = _absolute(directory)
  steps = _steps(directory)
  why = 'it is not there' if step is not None else 'no checkpoint'
  for s in [s for s in reversed(steps) if step in (None, s)]:
    try:
      return _manifest(directory, s)
    except _Damaged as e:
      why = f'step {s} is damaged: {e}'
  raise _nothing(directory, step, [why])


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
  directory = _absolute(directory)
  restored = _restore(directory, like, step, None, {}, part=True)
  if restored is None:
    raise _nothing(directory, step, [])
  return restored


class _Damaged(Exception):
  """Why a step cannot be used; a phrase."""


class _Preserve(NamedTuple):
  """Orbax's preservation policy: damaged steps take no good one's place."""

  keep: int
  metric: dict[int, float]  # step -> value, NaN if it has none
  damaged: dict[int, str]  # step -> why

  def best(self, steps: Iterable[int]) -> int | None:
    scored = [(self.metric[s], s) for s in steps if s in self.metric]
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


def _restore(
  directory: epath.Path,
  like: Any,
  step: int | None,
  fingerprint: Mapping[str, JSON] | None,
  damaged: dict[int, str],
  part: bool = False,
) -> Restored | None:
  """`Checkpoints.restore`; adds to `damaged` the steps that it passes over."""
  reasons = []
  for s in [s for s in reversed(_steps(directory)) if step in (None, s)]:
    try:
      return _load(directory, s, like, fingerprint, part)
    except _Damaged as e:
      damaged[s] = str(e)
      reasons.append(f'step {s} is damaged: {e}')
      if step is None:
        _log.warning('Skipping a checkpoint in %s: %s.', directory, reasons[-1])
  if reasons or step is not None:
    raise _nothing(directory, step, reasons)
  return None


def _load(
  directory: epath.Path,
  step: int,
  like: Any,
  fingerprint: Mapping[str, JSON] | None,
  part: bool,
) -> Restored:
  manifest = _manifest(directory, step)
  saved, wanted = manifest['leaves'], _flatten(like)
  where = f'Step {step} of {directory}'
  if fingerprint is not None:
    differ = _differ(
      {key: json.dumps(x) for key, x in manifest['fingerprint'].items()},
      {key: json.dumps(x) for key, x in fingerprint.items()},
    )
    if differ:
      raise CheckpointError(
        f'{where} has another fingerprint: {"; ".join(differ)}. Use the same '
        'settings, or another directory.'
      )
  differ = _differ(
    {k: _text(x) for k, x in saved.items() if k in wanted or not part},
    {k: _text(_describe(x)) for k, x in wanted.items()},
  )
  if differ:
    shown = '; '.join(
      [*differ[:3], f'and {len(differ) - 3} more'][: len(differ)]
    )
    raise CheckpointError(f'{where} is a checkpoint of another model: {shown}.')
  arrays = _read(directory, step, saved, wanted)
  leaves = [
    _like(arrays[k], x, saved[k].get('impl')) for k, x in wanted.items()
  ]
  state = jax.tree.unflatten(jax.tree.structure(like), leaves)
  return Restored(step, state, manifest['data_state'], manifest['metrics'])


def _read(
  directory: epath.Path,
  step: int,
  saved: Mapping[str, Any],
  wanted: Mapping[str, Any],
) -> dict[str, Any]:
  """The arrays of `wanted`, verified; numpy where it asks for no sharding."""
  arrays, how = {}, {}
  for name, leaf in wanted.items():
    if 0 in saved[name]['shape']:
      arrays[name] = np.zeros(saved[name]['shape'], saved[name]['dtype'])
    elif (sharding := _sharding(leaf)) is None:
      how[name] = ocp.RestoreArgs(restore_type=np.ndarray)
    else:
      how[name] = ocp.ArrayRestoreArgs(sharding=sharding)
  args = ocp.args.PyTreeRestore(
    item=dict.fromkeys(how, 0), restore_args=how, partial_restore=True
  )
  try:
    with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      if how:
        arrays |= reader.restore(directory / str(step) / 'state', args=args)
  except Exception as e:  # Orbax and TensorStore raise all kinds
    raise _Damaged(f'its arrays cannot be read ({_brief(e)})') from e
  for name, digest in _digests(arrays).items():
    if digest is not None and saved[name]['sha256'] not in (None, digest):
      raise _Damaged(f'{name} is not what was saved, by its SHA-256')
  return arrays


def _damage(directory: epath.Path, step: int) -> str | None:
  """Why a step cannot be used, found by reading all of it; None if it can."""
  try:
    leaves = _manifest(directory, step)['leaves']
    _read(directory, step, leaves, dict.fromkeys(leaves))
  except _Damaged as e:
    return str(e)
  return None


def _manifest(directory: epath.Path, step: int) -> dict[str, Any]:
  path = directory / str(step) / 'manifest'
  if not path.exists():
    raise _Damaged('it has no manifest')
  try:
    manifest = dict(ocp.JsonCheckpointHandler().restore(path))
  except (OSError, TypeError, ValueError) as e:
    raise _Damaged(f'its manifest cannot be read ({_brief(e)})') from e
  if _seal(manifest) != manifest:
    raise _Damaged('its manifest is not what was saved, by its SHA-256')
  if manifest['format'] > _FORMAT:
    raise CheckpointError(
      f'Step {step} of {directory} has format {manifest["format"]}, written by '
      f'kd_jax {manifest["versions"]["kd_jax"]}; this one reads {_FORMAT}.'
    )
  return manifest


def _seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
  body = {key: x for key, x in manifest.items() if key != 'sha256'}
  text = json.dumps(body, sort_keys=True)
  return {**body, 'sha256': hashlib.sha256(text.encode()).hexdigest()}


def _flatten(tree: Any) -> dict[str, Any]:
  """path -> leaf, in the order of `jax.tree.leaves`."""
  named = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = rules.path_name(path)
    if name in named:
      raise CheckpointError(f'Two leaves of the state have the path {name!r}.')
    if not hasattr(leaf, 'shape') or not hasattr(leaf, 'dtype'):
      raise CheckpointError(
        f'A state holds arrays only, but {name} is a {type(leaf).__name__}.'
      )
    named[name] = leaf
  return named


def _describe(leaf: Any) -> dict[str, Any]:
  described = {'shape': list(leaf.shape), 'dtype': str(leaf.dtype)}
  if _is_key(leaf) and isinstance(leaf, jax.Array):
    described['impl'] = str(jax.random.key_impl(leaf))
  return described


def _text(described: Mapping[str, Any]) -> str:
  return f'{described["dtype"]}[{",".join(map(str, described["shape"]))}]'


def _differ(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
  return [
    f'{k} is {there.get(k, "absent")} there and {here.get(k, "absent")} here'
    for k in {**there, **here}
    if there.get(k) != here.get(k)
  ]


def _is_key(leaf: Any) -> bool:
  return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _stored(leaf: Any) -> Any:
  if _is_key(leaf):
    return jax.random.key_data(leaf)
  return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _digests(arrays: Mapping[str, Any]) -> dict[str, str | None]:
  def digest(x: Any) -> str | None:
    # No process has the whole of an array that is sharded over hosts: digests
    # by shard come with multi-host support.
    if isinstance(x, jax.Array) and not (
      x.is_fully_addressable or x.is_fully_replicated
    ):
      return None
    data = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return hashlib.sha256(data).hexdigest()

  with futures.ThreadPoolExecutor() as pool:  # hashlib releases the GIL
    return dict(zip(arrays, pool.map(digest, arrays.values()), strict=True))


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
  """The sharding that a leaf of `like` asks for, if it does."""
  sharding = getattr(leaf, 'sharding', None)
  if isinstance(leaf, jax.Array) and not leaf.committed:
    return sharding if len(sharding.device_set) > 1 else None
  return sharding


def _like(x: Any, leaf: Any, impl: str | None) -> Any:
  """What was read, as the kind of array that `leaf` is."""
  if impl is not None:
    x = jax.random.wrap_key_data(jnp.asarray(x), impl=impl)
  elif not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
    return x
  elif jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
    return x  # as jax, its 64 bits would become 32 without a word
  sharding = _sharding(leaf)
  if sharding is not None:
    return jax.device_put(x, sharding)
  return x if impl is not None else jnp.array(x)


def _steps(directory: epath.Path) -> list[int]:
  """The steps that Orbax finished, damaged or not, in order."""
  if not directory.exists():
    return []
  names = ocp.path.step.standard_name_format()
  return sorted(found.step for found in names.find_all(directory))


def _check_ours(directory: epath.Path) -> None:
  if not directory.exists():
    return
  if not directory.is_dir():
    raise CheckpointError(f'{directory} is a file, not a directory.')
  steps = [str(step) for step in _steps(directory)]
  foreign = [
    path.name
    for path in sorted(directory.iterdir())
    if path.name not in steps
    and ocp.utils.TMP_DIR_SUFFIX not in path.name
    and not path.name.startswith('.')
  ]
  filled = [s for s in steps if any((directory / s).iterdir())]
  if not any((directory / s / 'manifest').exists() for s in filled):
    foreign += filled
  if foreign:
    raise CheckpointError(
      f'{directory} holds what is no checkpoint of kd_jax '
      f'({", ".join(foreign[:3])}); name a new or an empty directory.'
    )


def _nothing(
  directory: epath.Path, step: int | None, reasons: Sequence[str]
) -> CheckpointError:
  what = 'checkpoint' if step is None else f'step {step}'
  steps = ', '.join(map(str, _steps(directory)))
  why = '; '.join(reasons) or f'there is {f"step {steps}" if steps else "none"}'
  return CheckpointError(f'No {what} to read in {directory}: {why}.')


def _absolute(directory: epath.PathLike) -> epath.Path:
  name = os.path.expanduser(os.fspath(directory))
  return epath.Path(name if '://' in name else os.path.abspath(name))


def _as_json(value: Any, what: str) -> Any:
  """The value as it will be read back: tuples as lists, keys as strings."""
  try:
    return json.loads(json.dumps(value))
  except (TypeError, ValueError) as e:
    raise CheckpointError(f'{what} is not JSON: {e}.') from e


def _version(name: str) -> str | None:
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    return importlib.metadata.version(name)
  return None


def _brief(e: BaseException) -> str:
  """The first line of an error; those of TensorStore run to sixty."""
  text = f'{type(e).__name__}: {str(e).strip()}'.splitlines()[0]
  return text if len(text) <= 160 else text[:157] + '...'


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Drops what Orbax logs meanwhile: our errors say it in one sentence."""
  absl, orbax = logging.getLogger('absl'), os.path.dirname(ocp.__file__)

  def keep(record: logging.LogRecord) -> bool:
    return not record.pathname.startswith(orbax)

  absl.addFilter(keep)
  try:
    yield
  finally:
    absl.removeFilter(keep)
