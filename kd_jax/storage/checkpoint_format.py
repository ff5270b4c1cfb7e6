"""The format of a checkpoint on disk: arrays, and a manifest of digests.

Owns reading and verifying a step directory; nothing here writes. Orbax alone
restores wrong numbers after one flipped byte, casts another dtype without a
word and takes an empty directory for the newest step; the manifest is what
rules these out.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from kd_jax import rules
from kd_jax.sharding import hosts
from kd_jax.storage.files import brief, differences, seal

FORMAT = 1
# Bytes of a device's slice of an array that is worth a program of its own.
_LEAST_SLICE = 2**24
PACKAGES = ('kd_jax', 'jax', 'flax', 'orbax-checkpoint')
log = logging.getLogger('kd_jax')


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


class Damaged(Exception):
  """Why a step cannot be used; a phrase."""


def restore(
  directory: epath.Path,
  like: Any,
  step: int | None,
  fingerprint: Mapping[str, Any] | None,
  damaged: dict[int, str],
  part: bool = False,
) -> Restored | None:
  """`Checkpoints.restore`; adds to `damaged` the steps that it passes over.

  Raises:
    CheckpointError: if no step can be restored, with the reasons.
  """
  reasons = []
  there = hosts.on_first(lambda: saved_steps(directory))
  for s in [s for s in reversed(there) if step in (None, s)]:
    try:
      return load(directory, s, like, fingerprint, part)
    except Damaged as e:
      damaged[s] = str(e)
      reasons.append(f'step {s} is damaged: {e}')
      if step is None:
        log.warning('Skipping a checkpoint in %s: %s.', directory, reasons[-1])
  if reasons or step is not None:
    raise nothing(directory, step, reasons)
  return None


def load(
  directory: epath.Path,
  step: int,
  like: Any,
  fingerprint: Mapping[str, Any] | None,
  part: bool,
) -> Restored:
  """Reads one step; see `Checkpoints.restore` for what it refuses.

  Raises:
    CheckpointError: for a checkpoint of another model or fingerprint.
  """
  manifest = hosts.together(lambda: step_manifest(directory, step), Damaged)
  saved, wanted = manifest['leaves'], flatten(like)
  where = f'Step {step} of {directory}'
  if fingerprint is not None:
    differ = differences(
      {key: json.dumps(x) for key, x in manifest['fingerprint'].items()},
      {key: json.dumps(x) for key, x in fingerprint.items()},
    )
    if differ:
      raise CheckpointError(
        f'{where} has another fingerprint: {"; ".join(differ)}. Use the same '
        'settings, or another directory.'
      )
  differ = differences(
    {k: text(x) for k, x in saved.items() if k in wanted or not part},
    {k: text(describe(x)) for k, x in wanted.items()},
  )
  if differ:
    shown = '; '.join(
      [*differ[:3], f'and {len(differ) - 3} more'][: len(differ)]
    )
    raise CheckpointError(f'{where} is a checkpoint of another model: {shown}.')
  arrays = read(directory, step, saved, wanted)
  leaves = [
    as_like(arrays[k], x, saved[k].get('impl')) for k, x in wanted.items()
  ]
  state = jax.tree.unflatten(jax.tree.structure(like), leaves)
  return Restored(step, state, manifest['data_state'], manifest['metrics'])


def read(
  directory: epath.Path,
  step: int,
  saved: Mapping[str, Any],
  wanted: Mapping[str, Any],
) -> dict[str, Any]:
  """The arrays of `wanted`, verified; numpy where it asks for no sharding.

  Raises:
    Damaged: if a file is not what was saved.
  """
  arrays, how = {}, {}
  for name, leaf in wanted.items():
    if 0 in saved[name]['shape']:
      arrays[name] = np.zeros(saved[name]['shape'], saved[name]['dtype'])
    elif (sharding := sharding_of(leaf)) is None:
      how[name] = ocp.RestoreArgs(restore_type=np.ndarray)
    else:
      how[name] = ocp.ArrayRestoreArgs(sharding=sharding)
  args = ocp.args.PyTreeRestore(
    item=dict.fromkeys(how, 0), restore_args=how, partial_restore=True
  )

  def restore() -> dict[str, Any]:
    # Not by a Checkpointer: it waits for processes that may have failed.
    with (
      hosts.uninterrupted(),
      quiet(),
      contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader,
    ):
      try:
        return reader.restore(directory / str(step) / 'state', args=args)
      except Exception as e:  # Orbax and TensorStore raise all kinds
        raise Damaged(f'its arrays cannot be read ({brief(e)})') from e

  if how:
    arrays |= hosts.together(restore, Damaged)
  for name, digest in digests(arrays).items():
    if saved[name]['sha256'] not in (None, digest):
      raise Damaged(f'{name} is not what was saved, by its SHA-256')
  return arrays


def damage(directory: epath.Path, step: int) -> str | None:
  """Why a step cannot be used, found by reading all of it; None if it can."""
  try:
    manifest = hosts.together(lambda: step_manifest(directory, step), Damaged)
    leaves = manifest['leaves']
    read(directory, step, leaves, dict.fromkeys(leaves))
  except Damaged as e:
    return str(e)
  return None


def step_manifest(directory: epath.Path, step: int) -> dict[str, Any]:
  """The manifest of a step, verified against its own digest.

  Raises:
    Damaged: without a manifest that is what was saved.
    CheckpointError: for another format.
  """
  path = directory / str(step) / 'manifest'
  if not path.exists():
    raise Damaged('it has no manifest')
  try:
    with hosts.uninterrupted():
      manifest = dict(ocp.JsonCheckpointHandler().restore(path))
  except (OSError, TypeError, ValueError) as e:
    raise Damaged(f'its manifest cannot be read ({brief(e)})') from e
  if seal(manifest) != manifest:
    raise Damaged('its manifest is not what was saved, by its SHA-256')
  if manifest['format'] > FORMAT:
    raise CheckpointError(
      f'Step {step} of {directory} has format {manifest["format"]}, written by '
      f'kd_jax {manifest["versions"]["kd_jax"]}; this one reads {FORMAT}.'
    )
  return manifest


def flatten(tree: Any) -> dict[str, Any]:
  """path -> leaf, in the order of `jax.tree.leaves`.

  Raises:
    CheckpointError: for a leaf that is no array, or two of one path.
  """
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


def describe(leaf: Any) -> dict[str, Any]:
  """A leaf's shape and dtype, and the implementation of a typed key."""
  described = {'shape': list(leaf.shape), 'dtype': str(leaf.dtype)}
  if is_key(leaf) and isinstance(leaf, jax.Array):
    described['impl'] = str(jax.random.key_impl(leaf))
  return described


def text(described: Mapping[str, Any]) -> str:
  """A described leaf as 'float32[3,3]'."""
  return f'{described["dtype"]}[{",".join(map(str, described["shape"]))}]'


def is_key(leaf: Any) -> bool:
  """Whether a leaf is a typed key."""
  return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def stored(leaf: Any) -> Any:
  """The array that is written for a leaf: typed keys as their bits."""
  if is_key(leaf):
    leaf = jax.random.key_data(leaf)
  # Of an array that each process has for itself, Orbax writes process 0's.
  own = jax.process_count() > 1 and getattr(leaf, 'is_fully_addressable', True)
  return leaf if isinstance(leaf, jax.Array) and not own else np.asarray(leaf)


def array_handler() -> ocp.PyTreeCheckpointHandler:
  """What writes the arrays of a step.

  By default Orbax has each device write a slice of every replicated array, and
  compiles a program for each slice of each shape: most of a first save.
  """
  handlers = ocp.type_handlers
  arrays = handlers.ArrayHandler(
    min_slice_bytes_for_replica_parallel=_LEAST_SLICE
  )
  return ocp.PyTreeCheckpointHandler(
    type_handler_registry=handlers.create_type_handler_registry(
      (jax.Array, arrays), (np.ndarray, handlers.NumpyHandler())
    )
  )


def digests(arrays: Mapping[str, Any]) -> dict[str, str]:
  """The SHA-256 of every array, the same however it is split.

  Arrays that are spread over hosts are gathered, one at a time; each process
  hashes its share of all, and tells the others. All processes call this.
  """

  def digest(x: Any) -> str:
    data = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return hashlib.sha256(data.data).hexdigest()

  process, processes = jax.process_index(), jax.process_count()
  with futures.ThreadPoolExecutor() as pool:  # hashlib releases the GIL
    found = {}
    for i, (name, x) in enumerate(arrays.items()):
      x = hosts.fetch(x) if hosts.spread(x) else x
      if i % processes == process:
        found[name] = pool.submit(digest, x)
    mine = {name: future.result() for name, future in found.items()}
  said = [json.loads(text) for text in hosts.exchange(json.dumps(mine))]
  return {name: said[i % processes][name] for i, name in enumerate(arrays)}


def sharding_of(leaf: Any) -> jax.sharding.Sharding | None:
  """The sharding that a leaf of `like` asks for, if it does."""
  if isinstance(leaf, jax.Array) and not leaf.committed:
    return leaf.sharding if len(leaf.sharding.device_set) > 1 else None
  return getattr(leaf, 'sharding', None)


def as_like(x: Any, leaf: Any, impl: str | None) -> Any:
  """What was read, as the kind of array that `leaf` is."""
  if impl is not None:
    x = jax.random.wrap_key_data(jnp.asarray(x), impl=impl)
    if not x.is_fully_addressable:
      return x  # read as it was asked for
  elif not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
    return x
  elif jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
    return x  # as jax, its 64 bits would become 32 without a word
  sharding = sharding_of(leaf)
  if sharding is not None:
    return hosts.place(x, sharding)
  return x if impl is not None else jnp.array(x)


def saved_steps(directory: epath.Path) -> list[int]:
  """The steps that Orbax finished, damaged or not, in order."""
  if not directory.exists():
    return []
  names = ocp.path.step.standard_name_format()
  return sorted(found.step for found in names.find_all(directory))


def check_ours(directory: epath.Path) -> None:
  """Raises CheckpointError if a directory holds foreign files."""
  if not directory.exists():
    return
  if not directory.is_dir():
    raise CheckpointError(f'{directory} is a file, not a directory.')
  steps = [str(step) for step in saved_steps(directory)]
  foreign = [
    path.name
    for path in sorted(directory.iterdir())
    if path.name not in steps
    and ocp.utils.TMP_DIR_SUFFIX not in path.name
    and not path.name.startswith('.')
    and not _unfinished(path)
  ]
  filled = [s for s in steps if any((directory / s).iterdir())]
  if not any((directory / s / 'manifest').exists() for s in filled):
    foreign += filled
  if foreign:
    raise CheckpointError(
      f'{directory} holds what is no checkpoint of kd_jax '
      f'({", ".join(foreign[:3])}); name a new or an empty directory.'
    )


def _unfinished(path: epath.Path) -> bool:
  """Whether a save to a bucket ended early: there it has no name of its own."""
  if '://' not in os.fspath(path) or not path.name.isdigit():
    return False
  ours = {'state', 'manifest', '_CHECKPOINT_METADATA'}
  return {found.name for found in path.iterdir()} <= ours


def nothing(
  directory: epath.Path, step: int | None, reasons: Sequence[str]
) -> CheckpointError:
  """The error for a directory in which nothing can be read."""
  what = 'checkpoint' if step is None else f'step {step}'
  steps = ', '.join(map(str, saved_steps(directory)))
  why = '; '.join(reasons) or f'there is {f"step {steps}" if steps else "none"}'
  return CheckpointError(f'No {what} to read in {directory}: {why}.')


def absolute(directory: epath.PathLike) -> epath.Path:
  """An absolute path, which Orbax requires."""
  name = os.path.expanduser(os.fspath(directory))
  return epath.Path(name if '://' in name else os.path.abspath(name))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Drops what Orbax logs meanwhile: our errors say it in one sentence."""
  absl, orbax = logging.getLogger('absl'), os.path.dirname(ocp.__file__)

  def keep(record: logging.LogRecord) -> bool:
    return not record.pathname.startswith(orbax)

  absl.addFilter(keep)
  try:
    yield
  finally:
    absl.removeFilter(keep)
