"""One run at a time in a work directory: a lock that dies with its process.

Owns `.lock` of a directory. Only who writes takes it; readers never do.
"""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from kd_jax.sharding import hosts

NAME = '.lock'
_NO_LOCKS = '%s has no locks: see to it that no second run uses it.'
log = logging.getLogger('kd_jax')


@contextlib.contextmanager
def exclusive(directory: str | os.PathLike) -> Iterator[None]:
  """Refuses a second process in a directory.

  The operating system holds the lock and drops it when the process ends,
  however it ends. Of several processes of one run, all of which call this, the
  first takes it. Where there are no locks, in buckets and on some file systems,
  there is a warning and nothing is refused.

  Args:
    directory: made if missing; or a URL.

  Raises:
    ValueError: if another run has it, on all processes; says which process on
      which host.

  Example:
    >>> import tempfile
    >>> place = tempfile.mkdtemp()
    >>> with exclusive(place):
    ...   try:
    ...     exclusive(place).__enter__()
    ...   except ValueError as e:
    ...     print('in use by process' in str(e))
    True
  """
  with contextlib.ExitStack() as held:
    hosts.on_first(lambda: _take(directory, held))
    yield


@contextlib.contextmanager
def turns(directory: str | os.PathLike) -> Iterator[None]:
  """Waits until no other process of this machine is in a directory.

  Where there are no locks it does not wait.

  Args:
    directory: a local one; made if missing.
  """
  with _opened(directory) as descriptor:
    with contextlib.suppress(OSError):
      _lock(descriptor, wait=True)
    yield


def _take(directory: str | os.PathLike, held: contextlib.ExitStack) -> None:
  """Takes the lock of a run, which `held` gives back."""
  if '://' in os.fspath(directory):
    log.warning(_NO_LOCKS, directory)
    return
  descriptor = held.enter_context(_opened(directory))
  try:
    _lock(descriptor, wait=False)
  except BlockingIOError as e:
    owner = os.read(descriptor, 200).decode(errors='replace').strip()
    raise ValueError(
      f'{directory} is in use by {owner or "another process"}: wait until '
      'it has ended, or use another --workdir.'
    ) from e
  except OSError as e:
    log.warning(_NO_LOCKS, f'{directory} ({e.strerror})')
  os.ftruncate(descriptor, 0)
  owner = f'process {os.getpid()} on {socket.gethostname()}'
  os.pwrite(descriptor, owner.encode(), 0)


@contextlib.contextmanager
def _opened(directory: str | os.PathLike) -> Iterator[int]:
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  descriptor = os.open(directory / NAME, os.O_RDWR | os.O_CREAT, 0o644)
  try:
    yield descriptor
  finally:
    os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> None:
  # Not on every system, hence here.
  import fcntl

  fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
