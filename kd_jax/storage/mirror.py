"""Directories in a bucket: local copies of what is read and written there.

Owns which files go up and down, and when. Checkpoints never pass through here:
Orbax writes them where they belong.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import fsspec.config
from etils import epath

from kd_jax.storage import files, lock

CHECKPOINTS = 'checkpoints'
_LAST = 'result.json'


def is_remote(path: str | os.PathLike) -> bool:
  """Whether a path is a URL such as 'gs://bucket/runs'.

  Example:
    >>> is_remote('gs://bucket/runs'), is_remote('runs')
    (True, False)
  """
  return '://' in os.fspath(path)


def resolve(path: str | os.PathLike) -> Path:
  """A path to read and write: of `pathlib`, or of `epath` for a URL.

  Raises:
    ImportError: if what reads the URL is not installed.
  """
  if not is_remote(path):
    return Path(path)
  # Listings of before would hide what other processes have written.
  fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False
  found = epath.Path(path)
  try:
    found.exists()
  except ImportError as e:
    raise ImportError(
      f'{os.fspath(path)} cannot be reached: pip install "kd_jax[gcs]" for '
      f'gs:// ({e}).'
    ) from e
  return found


class Mirror:
  """The local side of a work directory that is somewhere else.

  A stage is written to files here, as on a local disk, and sent when it is
  finished, with `result.json` last: who reads it there finds a stage whole or
  not at all. What is here goes away with the process.

  Args:
    remote: the directory there.

  Attributes:
    remote: the directory there.
    local: the directory here.
  """

  def __init__(self, remote: epath.Path):
    self.remote = remote
    self._folder = tempfile.TemporaryDirectory(prefix='kd_jax_')
    self.local = Path(self._folder.name)
    self._same: set[str] = set()

  def fetch(self, name: str) -> None:
    """Copies a stage here, if it is finished there."""
    there = self.remote / name
    if name in self._same or not (there / _LAST).exists():
      return
    copy_tree(there, self.local / name)
    self._same.add(name)

  def send(self, name: str) -> None:
    """Copies a stage there."""
    copy_tree(self.local / name, self.remote / name)
    self._same.add(name)

  def forget(self, name: str) -> None:
    """Fetches a stage again, when it is finished there again."""
    self._same = {
      n for n in self._same if n != name and not n.startswith(f'{name}/')
    }
    shutil.rmtree(self.local / name, ignore_errors=True)

  def remove(self, name: str) -> None:
    """Deletes a stage there, its checkpoints too."""
    if (self.remote / name).exists():
      remove_tree(self.remote / name)


def copy_tree(source: Path, target: Path, *, missing: bool = False) -> None:
  """Copies the files of a directory, without checkpoints; results last.

  Args:
    source: where from; local, or an `epath.Path`.
    target: where to, the same; made if missing. Each of its files is whole or
      not there.
    missing: leaves a file alone that has the same size; otherwise it is
      replaced.

  Raises:
    ValueError: for a file name that cannot be copied.
  """
  for file in sorted(_files(source, ''), key=lambda f: f.endswith(_LAST)):
    # A slash at the wrong place of a bucket's listing must not lead elsewhere.
    if '..' in file.split('/') or file.startswith('/'):
      raise ValueError(f'{source} holds a file of the name {file!r}.')
    path = target / file
    if missing and path.exists() and size(path) == size(source / file):
      continue
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, (source / file).read_bytes())


def write_bytes(path: Path, data: bytes) -> None:
  """Writes a file, whole or not at all; a path of `epath` too."""
  if is_remote(path):
    # A bucket shows a file when all of it is there.
    path.write_bytes(data)
    return
  files.write(path, data)


def remove_tree(path: Path) -> None:
  """Deletes a directory, local or an `epath.Path`."""
  if is_remote(path):
    epath.Path(path).rmtree()
  else:
    shutil.rmtree(path)


def size(path: Path) -> int:
  """The bytes of a file, local or an `epath.Path`.

  Raises:
    OSError: if it is not there.
  """
  found = path.stat()
  return getattr(found, 'st_size', 0) or getattr(found, 'length', 0)


def _files(directory: Path, prefix: str) -> Iterator[str]:
  for path in directory.iterdir():
    name = f'{prefix}{path.name}'
    if not path.is_dir():
      yield name
    elif path.name != CHECKPOINTS:
      yield from _files(path, f'{name}/')


def cached(url: str | os.PathLike, name: str) -> Path:
  """A local copy of a directory, which later runs on this machine find.

  Of several processes that want it one copies, and the others wait.

  Args:
    url: where from, such as 'gs://bucket/tfds'.
    name: of a directory in it, such as 'fashion_mnist'.

  Returns:
    The local directory that holds `name`.

  Raises:
    FileNotFoundError: if there is no such directory.
  """
  source = resolve(url) / name
  if not source.is_dir():
    raise FileNotFoundError(f'There is no {source}.')
  home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  place = re.sub(r'[^A-Za-z0-9.-]', '_', os.fspath(url))
  target = Path(home) / 'kd_jax' / place
  with lock.turns(target):
    copy_tree(source, target / name, missing=True)
  return target


@contextlib.contextmanager
def written(path: str | os.PathLike) -> Iterator[Path]:
  """A local directory to write files to, which are at `path` in the end.

  Args:
    path: the directory; itself if it is local.
  """
  if not is_remote(path):
    yield Path(path)
    return
  with tempfile.TemporaryDirectory() as folder:
    yield Path(folder)
    copy_tree(Path(folder), resolve(path))
