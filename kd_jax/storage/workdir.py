"""The directory of one run: its configuration, and the results of its stages.

Owns names of files and digests; what a stage writes there is its own.

config.json              what the run was started with
origin.json              the data and the software that it was made from
<stage>/result.json      present when the stage is finished
<stage>/...              weights, checkpoints, exports

It may be in a bucket, 'gs://...': then stages are local files until they are
finished, see `mirror`.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_jax.sharding import hosts
from kd_jax.storage import files
from kd_jax.storage.mirror import (
  CHECKPOINTS,
  Mirror,
  is_remote,
  resolve,
  write_bytes,
)

# Where data and arrays lie does not change what is computed from them. A stage
# that trains with a teacher cache keeps the cache's own digest.
_NOT_IDENTITY = (
  'data.data_dir',
  'data.num_workers',
  'data.placement',
  'mesh.data',
  'mesh.fsdp',
  'mesh.tensor',
  'teacher.cache',
  'teacher.shard',
)
_RESULT = 'result.json'
# Of a stage, or of a part of it; no path to anywhere else.
_NAME = re.compile(r'\w[\w.+-]*')
# What a stage keeps beside its parts.
_RESERVED = (CHECKPOINTS,)


class Workdir:
  """A work directory, opened for one configuration.

  Args:
    path: the directory, local or a URL that `etils.epath` reads; made if
      missing.
    config: the configuration as nested dicts of JSON values; None opens what
      an earlier run stored.

  Attributes:
    place: the directory.
    path: where its files are on this machine: the same, or copies of those of
      a bucket.
    config: the configuration.

  Raises:
    ValueError: if the directory belongs to another configuration, holds
      files that are not ours, or has no configuration and none was given.
  """

  def __init__(
    self, path: str | os.PathLike, config: Mapping[str, Any] | None = None
  ):
    self.place = resolve(path)
    self._mirror = Mirror(self.place) if is_remote(path) else None
    self.path = self._mirror.local if self._mirror else self.place
    stored = self._stored()
    if config is None:
      if stored is None:
        raise ValueError(f'{self.place} is no work directory of kd-jax run.')
      config = stored
    config = json.loads(json.dumps(config))
    if stored is not None:
      _check_same_config(self.place, stored, config)
    self.config = config

  def _stored(self) -> dict[str, Any] | None:
    path = self.place / 'config.json'
    if not path.exists():
      if self.place.is_dir() and any(map(_foreign, self.place.iterdir())):
        raise ValueError(
          f'{self.place} holds files but no config.json of kd-jax run; choose '
          'an empty or new directory.'
        )
      return None
    return read_json(path)

  def write_config(self) -> None:
    """Stores the configuration, which claims the directory.

    Process 0 does, and the others see it: all of them call this.

    Raises:
      ValueError: if a process does not see what process 0 wrote.
    """
    path = self.place / 'config.json'

    def write():
      self.place.mkdir(parents=True, exist_ok=True)
      write_json(path, self.config)

    hosts.on_first(write)
    hosts.together(lambda: hosts.wait_for(path))

  @property
  def fingerprint(self) -> str:
    """A digest of all of the configuration that changes results."""
    flat = {
      k: v for k, v in flatten(self.config).items() if k not in _NOT_IDENTITY
    }
    text = json.dumps(flat, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

  def _within(self, name: str) -> Path:
    """Where a stage or a part of one lies, there or not.

    Args:
      name: such as 'teacher' or 'methods/kd/x1'.

    Raises:
      ValueError: for a name that is no path within the directory.
    """
    for part in name.split('/'):
      if not _NAME.fullmatch(part) or part in _RESERVED:
        raise ValueError(
          f'{part!r} cannot be the name of a directory: use letters, digits '
          f'and any of ._+- after the first, and not {_RESERVED[0]!r}.'
        )
    return self.path / name

  def stage(self, name: str) -> Path:
    """The directory of a stage on this machine; made if missing."""
    path = self._within(name)
    if self._mirror:
      self._mirror.fetch(name)
    path.mkdir(parents=True, exist_ok=True)
    return path

  def checkpoints(self, name: str) -> Path:
    """Where the checkpoints of a stage are: never copies, even in a bucket."""
    return self.place / name / CHECKPOINTS

  def done(self, name: str) -> bool:
    """Whether a stage is finished."""
    path = self._within(name) / _RESULT
    if self._mirror:
      self._mirror.fetch(name)
    return path.exists()

  def parts(self, name: str) -> list[str]:
    """The finished parts of a finished stage, such as 'teacher/other'."""
    self._need(name)
    results = sorted(self._within(name).glob(f'*/{_RESULT}'))
    return [f'{name}/{result.parent.name}' for result in results]

  def finished(self, name: str) -> bool:
    """What `done` says on process 0, for all: all processes call this.

    A file system may show a file to one of them later than to another, and
    they must not part over it.

    Raises:
      ValueError: if a process does not see what process 0 sees.
    """
    there = hosts.on_first(lambda: self.done(name))
    if there:
      self._seen(name)
    return there

  def _seen(self, name: str) -> None:
    hosts.together(lambda: hosts.wait_for(self.place / name / _RESULT))

  def result(self, name: str) -> dict[str, Any]:
    """What a finished stage returned, and the digests of its files.

    Raises:
      ValueError: if it is damaged.
    """
    self._need(name)
    path = self._within(name) / _RESULT
    result = read_json(path)
    if files.seal(result) != result:
      raise ValueError(self._damaged(name, path))
    return result

  def finish(self, name: str, result: Mapping[str, Any]) -> None:
    """Marks a stage as finished; the last thing that it does.

    Process 0 does, and the others see it: all of them call this.

    Args:
      name: of the stage; the digests of its files are kept with the result.
      result: JSON values.
    """
    directory = self.stage(name)

    def write():
      found = {
        path.relative_to(directory).as_posix(): files.describe(path)
        for path in _artefacts(directory)
      }
      write_json(directory / _RESULT, files.seal({**result, 'files': found}))
      self.send(name)

    hosts.on_first(write)
    self._seen(name)

  def send(self, name: str) -> None:
    """Copies the files of a stage to where they belong, if that is elsewhere.

    `finish` does it; needed for what is written without it.
    """
    if self._mirror:
      self._mirror.send(name)

  def verify(self, name: str) -> None:
    """Reads every file that a finished stage left.

    Raises:
      ValueError: if one is missing or is not what the stage wrote.
    """
    for file in self.result(name)['files']:
      self.file(name, file)

  def file(self, name: str, file: str) -> Path:
    """A file that a finished stage left, verified by its SHA-256.

    Raises:
      ValueError: as `verify`.
    """
    path = self._within(name) / file
    written = self.result(name)['files'].get(file)
    if written is None:
      raise ValueError(f'Stage {name!r} in {self.place} left no file {file!r}.')
    if not path.is_file() or files.describe(path) != written:
      raise ValueError(self._damaged(name, path))
    return path

  def weights(self, name: str, precision: str = 'float32') -> Path:
    """The weights that a finished stage saved, verified by their SHA-256.

    Args:
      name: of the stage.
      precision: of the weights; a teacher may have some besides 'float32'.

    Raises:
      ValueError: as `verify`.
    """
    kind = '' if precision == 'float32' else f'.{precision}'
    return self.file(name, f'weights{kind}.safetensors')

  def _need(self, name: str) -> None:
    if not self.done(name):
      stage = name.split('/')[0]
      raise ValueError(
        f'Stage {name!r} is not finished in {self.place}: run it first, with '
        f'--stages={stage}.'
      )

  def _damaged(self, name: str, path: Path) -> str:
    return (
      f'{path} is missing or is not what the stage wrote, by its SHA-256: '
      f'delete {self._within(name) / _RESULT} and run the same command again '
      'to make it anew.'
    )

  def clear(self, name: str) -> None:
    """Deletes the results of a stage; all processes call this."""
    path = self._within(name)
    if self._mirror:
      self._mirror.forget(name)

    def remove():
      shutil.rmtree(path, ignore_errors=True)
      if self._mirror:
        self._mirror.remove(name)

    hosts.on_first(remove)


def _foreign(path: Path) -> bool:
  """Whether a file is not of those that a start leaves which was killed."""
  return not path.name.startswith('.') and path.suffix != '.tmp'


def _artefacts(directory: Path) -> list[Path]:
  """The files of a stage, without checkpoints and parts with a result."""
  found = []
  for path in filter(_foreign, sorted(directory.iterdir())):
    if path.is_dir():
      if path.name not in _RESERVED and not (path / _RESULT).exists():
        found += _artefacts(path)
    elif path.name != _RESULT:
      found.append(path)
  return found


def read_json(path: Path) -> dict[str, Any]:
  """A JSON file, or a ValueError that names it.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   write_json(Path(directory, 'a.json'), {'sizes': (1, 2)})
    ...   read_json(Path(directory, 'a.json'))
    {'sizes': [1, 2]}
  """
  try:
    return json.loads(path.read_text())
  except (OSError, json.JSONDecodeError) as e:
    raise ValueError(f'{path} cannot be read: {e}') from e


def write_json(path: Path, value: Mapping[str, Any]) -> None:
  """Writes a JSON file, whole or not at all.

  Raises:
    TypeError: for what JSON does not have.
    ValueError: for NaN and infinities.

  Example:
    >>> try:
    ...   write_json(Path('loss.json'), {'loss': float('nan')})
    ... except ValueError as e:
    ...   Path('loss.json').exists()
    False
  """
  write_text(path, json.dumps(value, indent=1, allow_nan=False) + '\n')


def write_text(path: Path, text: str) -> None:
  """Writes a text file in UTF-8, whole or not at all."""
  write_bytes(path, text.encode())


def frozen(value: Any) -> Any:
  """JSON values with tuples for lists, as configurations have them.

  Example:
    >>> frozen({'boundaries': [0.5, 0.8]})
    {'boundaries': (0.5, 0.8)}
  """
  if isinstance(value, Mapping):
    return {key: frozen(x) for key, x in value.items()}
  return tuple(map(frozen, value)) if isinstance(value, list) else value


def flatten(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Nested dicts as one dict with dotted keys.

  Example:
    >>> flatten({'data': {'name': 'digits'}, 'seed': 0})
    {'data.name': 'digits', 'seed': 0}
  """
  flat: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def _check_same_config(
  path: Path, stored: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
  stored, config = flatten(stored), flatten(config)
  differ = [
    key
    for key in sorted(stored.keys() | config.keys())
    if stored.get(key) != config.get(key) and key not in _NOT_IDENTITY
  ]
  if differ:
    shown = '; '.join(
      f'{key} is {stored.get(key)!r} there and {config.get(key)!r} now'
      for key in differ[:3]
    )
    more = f' and {len(differ) - 3} more' if len(differ) > 3 else ''
    raise ValueError(
      f'{path} belongs to another configuration: {shown}{more}. Use another '
      '--workdir.'
    )
