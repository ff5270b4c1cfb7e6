"""Runs a teacher over every epoch of a training, and writes what it said.

Owns which process writes which file, resumption and replacement; the layout is
`teacher_cache`. A file is written whole or not at all, with its SHA-256 beside
it, so that a job that was killed goes on with the first file that is missing.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax.data import cache_form, pipeline, teacher_cache
from kd_jax.data.cache_form import Form
from kd_jax.data.examples import Split
from kd_jax.data.teacher_cache import CacheError
from kd_jax.sharding import hosts
from kd_jax.storage import mirror, workdir
from kd_jax.storage.files import as_json, seal, version
from kd_jax.types import Batch, StudentFn, Variables

SHARD_BYTES = 2**26
_DIGEST = '.sha256'
# In one of these two runs of the same job differ, but not what they write.
_OPEN = ('epochs', 'shards', 'sha256', 'made_with')
_PACKAGES = ('kd_jax', 'jax', 'flax')


def write_cache(
  directory: str | Path,
  forward: StudentFn,
  variables: Variables,
  examples: Split,
  preprocess: Callable[..., Batch],
  *,
  fingerprint: Mapping[str, Any],
  seed: int,
  epochs: int,
  form: Form = cache_form.DEFAULT,
  constant: bool = False,
  batch_size: int = 256,
  overwrite: bool = False,
  say: Callable[[str], None] = hosts.say,
  progress: Callable[[int, int, int], None] = lambda done, total, n: None,
) -> dict[str, Any]:
  """Writes a teacher's outputs for what students will see in training.

  Every process runs the teacher on its own devices and writes files of its
  own. What is there already is verified and kept; only `epochs` may grow.

  Args:
    directory: where to, also 'gs://...'; of several processes a directory that
      all can see.
    forward: the teacher, in evaluation mode, with the taps of `form`.
    variables: the teacher's.
    examples: what students are trained on.
    preprocess: from `make_preprocess`, with training's augmentation.
    fingerprint: from `make_fingerprint`.
    seed: of the order and of the crops of streamed images, that of
      `train_batches`.
    epochs: of the longest training.
    form: what to keep.
    constant: whether an example looks the same in every epoch; then one is
      written, which serves all.
    batch_size: examples on the devices of this process at once; rounded up to
      an even number for each device.
    overwrite: replaces a cache of something else, or another form.
    say: prints one line, the bytes among them, before anything is written.
    progress: called with the examples done and in all, of this process, and
      the bytes written.

  Returns:
    The manifest.

  Raises:
    CacheError: if the directory holds something else, there is no room, an
      output is not finite in the form's dtype, or another process's files are
      not to be seen.

  Example:
    >>> import tempfile
    >>> from kd_jax.data import ArrayData, TeacherCache, make_fingerprint
    >>> data = ArrayData(
    ...   {'x': np.array([0.0, 10.0, 20.0])}, id=np.arange(3, dtype=np.int32),
    ...   reads='x', num_classes=1)
    >>> from kd_jax.types import Forward
    >>> teacher = lambda variables, batch: Forward(
    ...   jnp.outer(batch['x'], variables['w']))
    >>> variables = {'w': jnp.array([1.0, -1.0])}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   manifest = write_cache(
    ...     directory, teacher, variables, data, lambda batch, *, train: batch,
    ...     fingerprint=make_fingerprint(
    ...       variables, data, network={}, augmentation={}),
    ...     seed=0, epochs=2, say=lambda line: None)
    ...   cache = TeacherCache(directory)
    ...   cache.read(1, np.array([2]))['teacher/output'].tolist()
    [[20.0, -20.0]]
  """
  directory = mirror.resolve(directory)
  if epochs < 1:
    raise CacheError(f'epochs is {epochs}; it must be positive.')
  mesh = Mesh(np.array(jax.local_devices()), ('data',))
  batch_size = -(-batch_size // (2 * mesh.size)) * 2 * mesh.size
  run = _Teacher(forward, preprocess, form, mesh)
  plan = _plan(run, variables, examples, fingerprint, constant)
  held = _held(directory, plan, overwrite)
  hosts.barrier()
  process, processes = _processes()
  if process == 0:
    _begin(directory, plan, overwrite)
  hosts.barrier()
  before = teacher_cache.read_manifest(directory)['epochs'] if held else 0
  plan['epochs'] = max(before, 1 if constant else epochs)
  files = _files(plan)
  if process == 0:
    _check_room(directory, plan, files, say)
  mine = files[process::processes]
  total = sum(f.size for f in mine)
  variables = jax.device_put(variables, NamedSharding(mesh, P()))
  done = written = 0
  for file in mine:
    if not _whole(directory / file.name, held.get(file.name)):
      batches = pipeline.epoch_batches(
        examples,
        batch_size=batch_size,
        seed=seed,
        epoch=file.epoch,
        start=file.start,
        stop=file.start + file.size,
      )
      arrays = run.outputs(variables, batches, batch_size)
      written += _write(directory / file.name, arrays, form)
    done += file.size
    progress(done, total, written)
  hosts.barrier()
  if process == 0:
    _seal(directory, plan, files, held)
  hosts.barrier()
  return teacher_cache.read_manifest(directory)


def _processes() -> tuple[int, int]:
  """Which process this is, and of how many."""
  return jax.process_index(), jax.process_count()


class _File(NamedTuple):
  """Which rows of which epoch's order a file has."""

  name: str
  epoch: int
  start: int
  size: int


def _files(plan: Mapping[str, Any]) -> list[_File]:
  rows, step = plan['rows'], plan['rows_per_shard']
  return [
    _File(name, epoch, i * step, min(step, rows - i * step))
    for epoch in range(plan['epochs'])
    for i, name in enumerate(teacher_cache.shard_names(plan, epoch))
  ]


class _Teacher:
  """The teacher on the devices of this process, as far as it is stored."""

  def __init__(
    self,
    forward: StudentFn,
    preprocess: Callable[..., Batch],
    form: Form,
    mesh: Mesh,
  ):
    def run(variables, batch):
      batch = preprocess(batch, train=True)
      return cache_form.pack(forward(variables, batch), form)

    split, everywhere = NamedSharding(mesh, P('data')), NamedSharding(mesh, P())
    self.stored, self.split, self.form = run, split, form
    self.forward, self.preprocess = forward, preprocess
    self.run = jax.jit(
      run, in_shardings=(everywhere, split), out_shardings=split
    )

  def classes(self, variables: Variables, batch: Any) -> int:
    """C of the outputs."""
    out = jax.eval_shape(
      lambda v, b: self.forward(v, self.preprocess(b, train=True)).output,
      variables,
      batch,
    )
    return out.shape[-1]

  def outputs(
    self, variables: Variables, batches: Iterator[Any], size: int
  ) -> dict[str, np.ndarray]:
    """All batches as one, with `id`; the last is padded for the devices."""
    ids, found = [], []
    for batch in batches:
      ids.append(batch[teacher_cache.ID])
      # Of one size, so that nothing is compiled twice.
      rows = np.arange(size) % len(ids[-1])
      whole = {name: x[rows] for name, x in batch.items()}
      found.append(self.run(variables, jax.device_put(whole, self.split)))
    parts = jax.device_get(found)
    return {
      teacher_cache.ID: np.concatenate(ids),
      **{
        name: np.concatenate(
          [p[name][: len(i)] for p, i in zip(parts, ids, strict=True)]
        )
        for name in parts[0]
      },
    }


def _plan(
  run: _Teacher,
  variables: Variables,
  examples: Split,
  fingerprint: Mapping[str, Any],
  constant: bool,
) -> dict[str, Any]:
  """The manifest as far as it is known before anything is run."""
  batch = examples.read(np.arange(2) % len(examples), key=(0, 0))
  batch = {**batch, 'epoch': np.zeros(2, np.int32)}
  shapes = jax.eval_shape(run.stored, variables, batch)
  arrays = {teacher_cache.ID: jax.ShapeDtypeStruct((2,), np.int32), **shapes}
  each = cache_form.row_bytes(arrays)
  # Mixed pairs are neighbours in the order; the last one may have none.
  rows = len(examples)
  if fingerprint['order']:
    rows -= rows % 2
  return {
    'format': teacher_cache.FORMAT,
    'fingerprint': dict(fingerprint),
    'form': as_json(vars(run.form), 'The form'),
    'arrays': cache_form.describe(arrays),
    'classes': run.classes(variables, batch),
    'constant': constant,
    'rows': rows,
    'row_bytes': each,
    # Of the rows alone, so that other devices go on with the same files.
    'rows_per_shard': 2 ** max(1, (SHARD_BYTES // each).bit_length() - 1),
  }


def _held(
  directory: Path, plan: dict[str, Any], overwrite: bool
) -> dict[str, Any]:
  """The files of a finished cache that is the same but for its epochs."""
  path = directory / teacher_cache.MANIFEST
  if not path.is_file():
    path = directory / teacher_cache.PLAN
  if not path.is_file():
    if directory.exists() and any(directory.iterdir()):
      raise CacheError(
        f'{directory} holds files that are no teacher cache; name a new or an '
        'empty directory.'
      )
    return {}
  if overwrite:
    return {}
  if path.name == teacher_cache.MANIFEST:
    there = teacher_cache.read_manifest(directory)
  else:
    there = workdir.read_json(path)
  held = there.get('shards', {})
  same = {k: v for k, v in there.items() if k not in _OPEN}
  differ = teacher_cache.differences(same, plan)
  if differ:
    raise CacheError(
      f'{directory} is another cache: {"; ".join(differ[:3])}. Give another '
      'directory, or --overwrite.'
    )
  return held


def _begin(directory: Path, plan: Mapping[str, Any], overwrite: bool) -> None:
  directory.mkdir(parents=True, exist_ok=True)
  if overwrite:
    for name in (teacher_cache.MANIFEST, teacher_cache.PLAN):
      (directory / name).unlink(missing_ok=True)
    for path in directory.glob('epoch[0-9]*'):
      mirror.remove_tree(path)
  workdir.write_json(directory / teacher_cache.PLAN, plan)


def _check_room(
  directory: Path,
  plan: Mapping[str, Any],
  files: Sequence[Any],
  say: Callable[[str], None],
) -> None:
  sizes = {f.name: f.size * plan['row_bytes'] for f in files}
  kept = ', '.join(
    f'{name} {about["dtype"]}{about["shape"]}'
    for name, about in plan['arrays'].items()
  )
  say(
    f'{plan["rows"]:,} examples x {plan["epochs"]} epochs x '
    f'{plan["row_bytes"]:,} bytes = {sum(sizes.values()) / 1e6:,.1f} MB in '
    f'{directory} ({kept})'
  )
  if mirror.is_remote(directory):
    return
  needed = sum(
    size for name, size in sizes.items() if not (directory / name).exists()
  )
  free = shutil.disk_usage(directory).free
  if needed > free:
    raise CacheError(
      f'{directory} has room for {free / 1e6:,.1f} MB, but '
      f'{needed / 1e6:,.1f} MB are still to be written: keep fewer epochs, or '
      'only --top_k outputs.'
    )


def _whole(path: Path, held: Any) -> bool:
  """Whether a file is there and is what was written."""
  digest = _recorded(path, held)
  if digest is None or not path.is_file():
    return False
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest() == digest


def _recorded(path: Path, held: Any) -> str | None:
  """The digest of a file: that of a repair goes before the manifest's."""
  beside = path.with_name(path.name + _DIGEST)
  if beside.is_file():
    return beside.read_text().strip()
  return held[0] if held else None


def _write(path: Path, arrays: Mapping[str, np.ndarray], form: Form) -> int:
  """Writes a file and its digest; the number of its bytes."""
  for name, x in arrays.items():
    floating = jnp.issubdtype(x.dtype, jnp.inexact)
    bad = ~np.isfinite(x) if floating else np.zeros(len(x), bool)
    if bad.any():
      row = np.flatnonzero(bad.reshape(len(x), -1).any(axis=1))[0]
      raise CacheError(
        f'{name} of example {arrays[teacher_cache.ID][row]} is not finite as '
        f'{form.dtype}, whose largest number is '
        f'{float(jnp.finfo(form.dtype).max):.3g}: another --dtype may hold it.'
      )
  data = safetensors.numpy.save(dict(arrays))
  path.parent.mkdir(parents=True, exist_ok=True)
  mirror.write_bytes(path, data)
  digest = hashlib.sha256(data).hexdigest()
  beside = path.with_name(path.name + _DIGEST)
  mirror.write_bytes(beside, f'{digest}\n'.encode())
  return len(data)


def _seal(
  directory: Path,
  plan: Mapping[str, Any],
  files: Sequence[Any],
  held: Mapping[str, Any],
) -> None:
  """Writes the manifest, once every file is there."""
  shards = {}
  for file in files:
    path = directory / file.name
    digest = _recorded(path, held.get(file.name))
    if digest is None or not path.is_file():
      raise CacheError(
        f'{path}, which another process wrote, cannot be seen here: all '
        'processes need the same directory.'
      )
    shards[file.name] = [digest, mirror.size(path)]
  if shards != held:
    _write_manifest(directory, plan, shards)
  (directory / teacher_cache.PLAN).unlink()
  for file in files:
    beside = directory / (file.name + _DIGEST)
    beside.unlink(missing_ok=True)


def _write_manifest(
  directory: Path, plan: Mapping[str, Any], shards: Mapping[str, Any]
) -> None:
  versions = {name: version(name) for name in _PACKAGES}
  made_with = {**versions, 'device': jax.devices()[0].device_kind}
  manifest = {**plan, 'shards': shards, 'made_with': made_with}
  workdir.write_json(directory / teacher_cache.MANIFEST, seal(manifest))
