"""A teacher's outputs on disk, for every example of every epoch.

Owns the layout, its verification, and batches that carry what was stored;
`cache_writer` writes it, and `cache_form` says what is kept. A cache is found
to be that of a teacher, data and augmentation by its fingerprint, and read by
(epoch, example id), in any order.

manifest.json                    sealed: all of the below, with its SHA-256
epoch00003/shard0000.safetensors rows of some examples, in training's order
plan.json, *.sha256              while it is being written
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kd_jax.data import cache_form
from kd_jax.data.fingerprint import differences
from kd_jax.storage import files, mirror, workdir
from kd_jax.types import BatchStream

FORMAT = 1
MANIFEST, PLAN = 'manifest.json', 'plan.json'
ID = 'id'


class CacheError(ValueError):
  """A cache that cannot be read, or must not be used."""


class _Shard(NamedTuple):
  """A file: its bytes and its arrays, which are views of them."""

  path: Path
  data: np.ndarray
  arrays: dict[str, np.ndarray]


class _Epoch(NamedTuple):
  """Where the examples of an epoch are: `rows[i]` is the place of `ids[i]`."""

  shards: list[_Shard]
  ids: np.ndarray
  rows: np.ndarray


class TeacherCache(cache_form.Entries):
  """A finished cache, to train with.

  Files are mapped, not loaded, and those of a bucket are loaded an epoch at a
  time; each is compared with its SHA-256 before the first row of it is used.

  Args:
    directory: what `write_cache` wrote.

  Raises:
    CacheError: if it is missing, not finished, damaged or of another format.

  Example:
    >>> import tempfile
    >>> from kd_jax.data import ArrayData, make_fingerprint, write_cache
    >>> from kd_jax.types import Forward
    >>> data = ArrayData(
    ...   {'x': np.array([0.0, 10.0, 20.0])}, id=np.arange(3, dtype=np.int32),
    ...   reads='x', num_classes=1)
    >>> teacher = lambda variables, batch: Forward(batch['x'][:, None] + 0.5)
    >>> made = make_fingerprint({}, data, network={}, augmentation={})
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   _ = write_cache(
    ...     directory, teacher, {}, data, lambda batch, *, train: batch,
    ...     fingerprint=made, seed=0, epochs=1, say=lambda line: None)
    ...   cache = TeacherCache(directory)
    ...   cache.check(made)
    ...   cache.read(0, np.array([2, 0]))['teacher/output'].tolist()
    [[20.5], [0.5]]
  """

  def __init__(self, directory: str | Path):
    self.path = mirror.resolve(directory)
    self.manifest = read_manifest(self.path)
    form = self.manifest['form']
    super().__init__(
      cache_form.Form(**{**form, 'features': tuple(form['features'])}),
      {k: v for k, v in self.manifest['arrays'].items() if k != ID},
      self.manifest['classes'],
    )
    for name, (_, size) in self.manifest['shards'].items():
      path = self.path / name
      if not path.is_file() or mirror.size(path) != size:
        raise CacheError(
          f'{path} is missing or not whole: run kd-jax cache-teacher again, '
          'which makes what is missing.'
        )
    self._epochs: dict[int, _Epoch] = {}
    self._verified: set[str] = set()

  @property
  def digest(self) -> str:
    """The SHA-256 of the manifest, which has those of all files."""
    return self.manifest['sha256']

  @property
  def nbytes(self) -> int:
    """Bytes of all files."""
    return sum(size for _, size in self.manifest['shards'].values())

  def check(self, fingerprint: Mapping[str, Any]) -> None:
    """Raises CacheError naming where this is a cache of something else.

    Args:
      fingerprint: of what is trained with, from `make_fingerprint`.
    """
    differ = differences(self.manifest['fingerprint'], fingerprint)
    if differ:
      shown = '; '.join(differ[:3])
      more = f' and {len(differ) - 3} more' if len(differ) > 3 else ''
      raise CacheError(
        f'{self.path} is no cache for this training: {shown}{more}. Make one '
        'with kd-jax cache-teacher, or train with the live teacher.'
      )

  def check_epochs(self, epochs: int) -> None:
    """Raises CacheError if a training is longer than what is stored.

    Args:
      epochs: of the training.
    """
    stored = self.manifest['epochs']
    if not self.manifest['constant'] and stored < epochs:
      raise CacheError(
        f'{self.path} has {stored} epochs, but this training has {epochs}, '
        'each with crops of its own: add the others with kd-jax cache-teacher '
        f'--epochs={epochs}.'
      )

  def read(self, epoch: int, ids: np.ndarray) -> dict[str, np.ndarray]:
    """What is stored of some examples.

    Args:
      epoch: from 0 on.
      ids: int `[n]`, in any order.

    Returns:
      name -> `[n, ...]`, entries for a batch.

    Raises:
      CacheError: if an example or the epoch is not stored, or a file is
        damaged.
    """
    found = self._epoch(0 if self.manifest['constant'] else int(epoch))
    at = np.searchsorted(found.ids, ids)
    at = np.minimum(at, len(found.ids) - 1)
    unknown = found.ids[at] != ids
    if unknown.any():
      raise CacheError(
        f'{self.path} has no example {ids[unknown][0]} in epoch {epoch}.'
      )
    return self._gather(found, found.rows[at])

  def attach(self, batches: BatchStream) -> 'CachedBatches':
    """Batches that carry the teacher's stored outputs.

    Args:
      batches: of `train_batches`, with `id` and `epoch` int `[B]`; this
        process's part of them.
    """
    return CachedBatches(self, batches)

  def _epoch(self, epoch: int) -> _Epoch:
    if epoch not in self._epochs:
      if not 0 <= epoch < self.manifest['epochs']:
        raise CacheError(
          f'{self.path} has {self.manifest["epochs"]} epochs, and no epoch '
          f'{epoch}.'
        )
      names = shard_names(self.manifest, epoch)
      shards = [_map(self.path / n, self.manifest['arrays']) for n in names]
      ids = np.concatenate([shard.arrays[ID] for shard in shards])
      rows = np.argsort(ids)
      # Batches that are read ahead may be of the next epoch.
      for old in list(self._epochs)[:-1]:
        del self._epochs[old]
      self._epochs[epoch] = _Epoch(shards, ids[rows], rows)
    return self._epochs[epoch]

  def _gather(self, epoch: _Epoch, rows: np.ndarray) -> dict[str, np.ndarray]:
    number, row = np.divmod(rows, self.manifest['rows_per_shard'])
    out = {
      name: np.empty((len(rows), *x.shape[1:]), x.dtype)
      for name, x in epoch.shards[0].arrays.items()
      if name != ID
    }
    for n in np.unique(number):
      shard, mine = epoch.shards[n], number == n
      self._verify(shard)
      for name, array in out.items():
        array[mine] = shard.arrays[name][row[mine]]
    return out

  def _verify(self, shard: _Shard) -> None:
    name = shard.path.relative_to(self.path).as_posix()
    if name not in self._verified:
      digest, _ = self.manifest['shards'][name]
      if hashlib.sha256(shard.data.data).hexdigest() != digest:
        raise CacheError(
          f'{shard.path} is not what was written, by its SHA-256: run kd-jax '
          'cache-teacher again, which makes it anew.'
        )
      self._verified.add(name)


class CachedBatches:
  """An iterator of batches that adds a teacher's stored outputs to each.

  Args:
    cache: where they are.
    batches: of `train_batches`.
  """

  def __init__(self, cache: TeacherCache, batches: BatchStream):
    self.cache, self.batches = cache, batches

  def __iter__(self) -> 'CachedBatches':
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    batch = next(self.batches)
    epochs = np.unique(batch['epoch'])
    if len(epochs) > 1:
      raise CacheError(f'A batch is of one epoch, not of {epochs.tolist()}.')
    return {**batch, **self.cache.read(epochs[0], batch['id'])}

  def get_state(self) -> dict[str, Any]:
    """Where the batches stand."""
    return self.batches.get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to where batches stood."""
    self.batches.set_state(state)


def shard_names(layout: Mapping[str, Any], epoch: int) -> list[str]:
  """The files of an epoch, relative to the directory.

  Args:
    layout: with `rows` and `rows_per_shard`, such as a manifest.
    epoch: which.
  """
  count = -(-layout['rows'] // layout['rows_per_shard'])
  return [f'epoch{epoch:05}/shard{i:04}.safetensors' for i in range(count)]


def read_manifest(directory: Path) -> dict[str, Any]:
  """The manifest of a finished cache, verified against its own digest.

  Raises:
    CacheError: if there is none, or it is damaged or of another format.
  """
  path = directory / MANIFEST
  if not path.is_file():
    why = 'is no teacher cache'
    if (directory / PLAN).is_file():
      why = 'is not finished: run kd-jax cache-teacher again, which goes on'
    raise CacheError(f'{directory} {why}.')
  try:
    manifest = workdir.read_json(path)
  except ValueError as e:
    raise CacheError(str(e)) from e
  if files.seal(manifest) != manifest:
    raise CacheError(
      f'{path} is not what was written, by its SHA-256: make the cache again, '
      'with --overwrite.'
    )
  if manifest['format'] != FORMAT:
    raise CacheError(
      f'{path} has format {manifest["format"]}; this kd_jax reads {FORMAT}.'
    )
  return manifest


def _map(path: Path, arrays: Mapping[str, Any]) -> _Shard:
  """Maps a safetensors file whose arrays are known; reads it from a bucket."""
  try:
    if mirror.is_remote(path):
      data = np.frombuffer(path.read_bytes(), np.uint8)
    else:
      data = np.memmap(path, np.uint8, mode='r')
    begin = 8 + int.from_bytes(data[:8].tobytes(), 'little')
    header = json.loads(data[8:begin].tobytes())
    found = {}
    for name, about in arrays.items():
      low, high = header[name]['data_offsets']
      flat = data[begin + low : begin + high].view(jnp.dtype(about['dtype']))
      found[name] = flat.reshape(-1, *about['shape'])
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise CacheError(f'{path} cannot be read: {e}') from e
  return _Shard(path, data, found)
