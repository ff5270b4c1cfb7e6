"""Several processes as one run, from their start to their end.

Owns `jax.distributed`: that they find each other, are to do the same, and that
none is left behind when one fails. With one process nothing is started. What
they tell each other meanwhile is in `hosts`; which cluster they are in, in
`clusters`.

A process that dies takes the others with it: JAX ends them when its heartbeats
stop. What is saved stays, and the same command on all hosts goes on from there.
"""

import collections
import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from kd_jax.sharding import clusters, hosts
from kd_jax.sharding.preemption import REQUEUE, Preempted

PACKAGES = ('kd_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint')
GO_ON = 'Run the same command on every host to go on.'
# Seconds in which the others fail too, if they do.
_FAILED_WITHIN = 30
_LOOPBACK = ('127.0.0.1', 'localhost', '::1')


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  initialization_timeout: int = 300,
  heartbeat_timeout: int = 100,
) -> None:
  """Joins the processes of a cluster; call it before any use of a backend.

  On Cloud TPU pods and under SLURM or Open MPI no argument is needed; nor is
  one anywhere for a process alone, which joins nothing. Other processes than
  the first are silent afterwards.

  Args:
    coordinator: 'HOST:PORT' of process 0, which listens there; without a host,
      ':PORT', it is 127.0.0.1. The port is not authenticated: keep it in a
      private network.
    num_processes: how many there are.
    process_id: which one this is, from 0.
    initialization_timeout: seconds to wait for all of them. After that this
      process says so and ends with code 75.
    heartbeat_timeout: seconds until a process that died ends the others.

  Raises:
    ValueError: if some of the three arguments are missing or out of range, the
      cluster cannot be joined, or JAX runs on the CPU beside an accelerator.
  """
  explicit = _explicit(coordinator, num_processes, process_id)
  platforms = jax.config.values['jax_platforms']
  cluster = None if explicit else clusters.detect(platforms=platforms)
  if (explicit or cluster) and not jax.distributed.is_initialized():
    if cluster == 'mpi4py':
      explicit = {'cluster_detection_method': cluster}
    with _ends_after(initialization_timeout, num_processes):
      try:
        jax.distributed.initialize(
          **explicit,
          # Ours is the one that ends with a sentence; JAX's aborts the process.
          initialization_timeout=initialization_timeout + 60,
          heartbeat_timeout_seconds=heartbeat_timeout,
          shutdown_timeout_seconds=heartbeat_timeout,
        )
      except (ValueError, RuntimeError) as e:
        where = cluster or coordinator
        raise ValueError(f'Cannot join the processes of {where}: {e}.') from e
  clusters.check_accelerator(jax.default_backend(), platforms)
  if not hosts.is_first():
    logging.getLogger('kd_jax').setLevel(logging.ERROR)


def _explicit(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> dict[str, Any]:
  """The arguments of `jax.distributed.initialize`; empty for none or one."""
  if coordinator is None or num_processes is None or process_id is None:
    given = {
      'coordinator': coordinator,
      'num_processes': num_processes,
      'process_id': process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
      return {}
    raise ValueError(
      f'--{" and --".join(missing)} missing: --coordinator=HOST:PORT, '
      '--num_processes=N and --process_id=I come together.'
    )
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f'--process_id={process_id} is not one of --num_processes='
      f'{num_processes}, which are counted from 0.'
    )
  if num_processes == 1:
    return {}
  host, port = _address(coordinator)
  return {
    'coordinator_address': f'{host}:{port}',
    'num_processes': num_processes,
    'process_id': process_id,
    'coordinator_bind_address': f'{_bound(host)}:{port}',
  }


def _address(coordinator: str) -> tuple[str, str]:
  host, _, port = coordinator.rpartition(':')
  if not port.isdecimal() or not 0 < int(port) < 2**16:
    raise ValueError(
      f'--coordinator={coordinator} has no port: write HOST:PORT, or :PORT for '
      'processes of this machine.'
    )
  return host or _LOOPBACK[0], port


def _bound(host: str) -> str:
  """The address to listen on: all of them where `host` is an outer name."""
  if host in _LOOPBACK:
    return host
  with contextlib.suppress(OSError), socket.create_server((host, 0)):
    return host
  return '[::]'


@contextlib.contextmanager
def _ends_after(seconds: int, processes: int | None) -> Iterator[None]:
  """Ends the process with a sentence if the others do not come."""
  them = f'all {processes} processes' if processes else 'all processes'
  sentence = (
    f'{them} did not come together within {seconds} s: start the same command '
    'on every host.'
  )
  # JAX waits in C++, where no exception can reach it.
  timer = threading.Timer(seconds, _end, [sentence])
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def versions() -> dict[str, str]:
  """The versions that have to be the same on all hosts, by package.

  Returns:
    package -> version, of those in `PACKAGES` that are installed, and 'python'.

  Example:
    >>> versions()['jax'] == jax.__version__
    True
  """
  found = {'python': platform.python_version()}
  for name in PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def check_agreement(
  settings: Mapping[str, Any], *, packages: Mapping[str, str] | None = None
) -> None:
  """Raises on every process unless all of them are to do the same.

  Compared are the number and kind of their devices, versions and settings.
  With one process nothing is.

  Args:
    settings: name -> JSON value, such as a flat configuration.
    packages: package -> version; those of `versions()` when None.

  Raises:
    ValueError: names the first process that differs from process 0, and in
      what.
  """
  if jax.process_count() == 1:
    return
  kinds = [
    [d.device_kind for d in jax.devices() if d.process_index == process]
    for process in range(jax.process_count())
  ]
  # Known without a word; and processes exchange words by equal devices alone.
  _compare([{'devices': _counted(k)} for k in kinds])
  packages = versions() if packages is None else packages
  said = hosts.exchange(json.dumps({**packages, **settings}))
  _compare([json.loads(text) for text in said])


def _counted(kinds: list[str]) -> str:
  return ', '.join(f'{n} x {k}' for k, n in collections.Counter(kinds).items())


def _compare(facts: list[Mapping[str, Any]]) -> None:
  first = facts[0]
  for process, other in enumerate(facts):
    differ = [
      f'{name} is {other.get(name)!r}, not {first.get(name)!r}'
      for name in sorted({*first, *other})
      if other.get(name) != first.get(name)
    ]
    if differ:
      shown = '; '.join(differ[:3])
      more = f' and {len(differ) - 3} more' if len(differ) > 3 else ''
      raise ValueError(
        f'Process {process} differs from process 0: {shown}{more}. Start the '
        'same command, with the same packages, on every host.'
      )


@contextlib.contextmanager
def as_one() -> Iterator[None]:
  """Around all that the processes do: none is left behind when one fails.

  At the end they wait for each other. After an error of all of them, that
  error is raised. After one of this process alone, or of a peer that died, it
  says so and ends the process, and thereby the others.
  """
  try:
    yield
    hosts.barrier()
  except (Exception, Preempted) as e:
    if jax.process_count() == 1:
      raise
    if lost := _lost(e):
      _end(f'another process ended, or does not answer ({lost}). ' + GO_ON)
    try:
      hosts.meet('failed', _FAILED_WITHIN)
    except jax.errors.JaxRuntimeError:
      alone = f'process {jax.process_index()}'
      if isinstance(e, Preempted):
        _end(f'{alone}: {e} {GO_ON}')
      traceback.print_exception(e)
      _end(f'{alone} failed alone: {e}', code=2)
    raise


def _lost(error: BaseException | None) -> str:
  """What JAX says of a peer that cannot be reached; '' for other errors."""
  while error is not None:
    text = str(error)
    if isinstance(error, jax.errors.JaxRuntimeError) and any(
      word in text for word in ('Gloo', 'UNAVAILABLE', 'DEADLINE', 'ABORTED')
    ):
      return text.splitlines()[0][:200]
    error = error.__cause__ or error.__context__
  return ''


def _end(sentence: str, code: int = REQUEUE) -> None:
  """Ends the process at once: exit handlers of JAX would wait for peers."""
  sys.stdout.flush()
  print(f'kd-jax: {sentence}', file=sys.stderr, flush=True)
  os._exit(code)
