"""Several processes as one run: started, compared, and kept in step.

Owns `jax.distributed`, and all that processes tell each other outside of
compiled steps: who writes, what failed, when to stop. With one process every
function here is its simplest case and nothing is started. The processes share
a file system; what they compute together is `sharding`.

A process that dies takes the others with it: JAX ends them when its heartbeats
stop. What is saved stays, and the same command on all hosts goes on from there.
"""

import collections
import contextlib
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from kd_jax.sharding import clusters, preemption
from kd_jax.sharding.preemption import REQUEUE, Preempted

PACKAGES = ('kd_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint')
# Seconds for which processes wait for one that works alone, such as on the
# report; dead ones are noticed by their heartbeats, long before.
LONGEST_WAIT = 2 * 3600
# Seconds in which the others fail too, if they do.
_FAILED_WITHIN = 30
GO_ON = 'Run the same command on every host to go on.'
_LOOPBACK = ('127.0.0.1', 'localhost', '::1')

T = TypeVar('T')
# Names of barriers and points of preemption count up in step on all processes,
# as long as the process lives: so does the service of JAX that they belong to.
_barriers, _polls = itertools.count(), itertools.count(1)


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
  if not is_first():
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


@contextlib.contextmanager
def as_one() -> Iterator[None]:
  """Around all that the processes do: none is left behind when one fails.

  At the end they wait for each other. After an error of all of them, that
  error is raised. After one of this process alone, or of a peer that died, it
  says so and ends the process, and thereby the others.
  """
  try:
    yield
    barrier()
  except (Exception, Preempted) as e:
    if jax.process_count() == 1:
      raise
    if lost := _lost(e):
      _end(f'another process ended, or does not answer ({lost}). ' + GO_ON)
    try:
      _meet('failed', _FAILED_WITHIN)
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


def uninterrupted() -> contextlib.AbstractContextManager[None]:
  """`preemption.uninterrupted`, but nothing with several processes.

  There the handler of SIGTERM is JAX's, which raises nothing.
  """
  if jax.process_count() > 1:
    return contextlib.nullcontext()
  return preemption.uninterrupted()


def is_first() -> bool:
  """Whether this is process 0, which writes and prints."""
  return jax.process_index() == 0


def say(line: str) -> None:
  """Prints a line, on process 0."""
  if is_first():
    print(line, flush=True)


def barrier() -> None:
  """Waits until every process is here, for at most `LONGEST_WAIT`."""
  if jax.process_count() > 1:
    _meet(str(next(_barriers)), LONGEST_WAIT)


def _meet(name: str, seconds: int) -> None:
  """A barrier of the coordination service, which needs no device."""
  from orbax.checkpoint import multihost  # noqa: PLC0415 (slow to import)

  multihost.sync_global_processes(
    f'kd_jax/{name}',
    timeout=seconds,
    processes=set(range(jax.process_count())),
  )


def exchange(text: str) -> list[str]:
  """What each process says, in the order of processes; all of them call it."""
  if jax.process_count() == 1:
    return [text]
  # Devices would wait without a bound, so they meet when all are here.
  barrier()
  data = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(data.size))
  # Sizes that are powers of two: few programs to compile.
  padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
  padded[: data.size] = data
  rows = multihost_utils.process_allgather(padded)
  return [
    row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)
  ]


def together(work: Callable[[], T], error: type[Exception] = ValueError) -> T:
  """Does something in every process, and fails in all if it fails in one.

  Args:
    work: what this process does.
    error: what those raise in which it did not fail.
  """
  if jax.process_count() == 1:
    return work()
  try:
    result = work()
  except Exception as e:  # whatever it is, the others must not wait
    exchange(str(e) or repr(e))
    raise
  for process, sentence in enumerate(exchange('')):
    if sentence:
      raise error(f'Process {process}: {sentence}')
  return result


def on_first(work: Callable[[], T]) -> T:
  """Does something on process 0 while the others wait; all of them call it.

  Args:
    work: returns a JSON value.

  Returns:
    What `work` returned, on every process.

  Raises:
    ValueError: on the others, if it failed; process 0 raises what it raised.
  """
  if jax.process_count() == 1:
    return work()
  barrier()
  result = together(lambda: work() if is_first() else None)
  return json.loads(exchange(json.dumps(result))[0])


def wait_for(path: Path, within: float = 120.0) -> None:
  """Waits until a file that process 0 has written is seen from here.

  Args:
    path: the file.
    within: seconds; network file systems remember for a minute that it was not
      there.

  Raises:
    ValueError: if it is not.
  """
  end = time.monotonic() + within
  while not path.exists():
    if time.monotonic() > end:
      raise ValueError(
        f'{path}, which process 0 wrote, is not seen by process '
        f'{jax.process_index()}: the work directory has to lie on a file '
        'system that all hosts share.'
      )
    time.sleep(0.2)


def fetch(tree: Any) -> Any:
  """A pytree as NumPy arrays, whole on every process; all of them call it."""

  def whole(x):
    if spread(x):
      return multihost_utils.process_allgather(x, tiled=True)
    return x

  return jax.device_get(jax.tree.map(whole, tree))


def place(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
  """`jax.device_put`, also of what every process has onto devices of all."""
  if sharding.is_fully_addressable or not getattr(
    x, 'is_fully_addressable', True
  ):
    return jax.device_put(x, sharding)
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    bits = place(jax.random.key_data(x), sharding)
    return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(x))
  whole = np.asarray(x)
  return jax.make_array_from_callback(
    whole.shape, sharding, lambda index: whole[index]
  )


def spread(x: Any) -> bool:
  """Whether no process has the whole of an array."""
  return isinstance(x, jax.Array) and not (
    x.is_fully_addressable or x.is_fully_replicated
  )


def versions() -> dict[str, str]:
  """The versions that have to be the same on all hosts, by package."""
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
  said = exchange(json.dumps({**packages, **settings}))
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


class StopRequested:
  """Whether the processes are to stop, the same on all at the same call.

  SIGTERM to any of them, which JAX notices by itself, stops all. Asking waits
  for no device.
  """

  def __init__(self):
    self._stop = False

  def is_set(self) -> bool:
    """Asks; once after each step, on every process."""
    if not self._stop:
      self._stop = multihost_utils.reached_preemption_sync_point(next(_polls))
    return self._stop

  def raised(self) -> contextlib.AbstractContextManager[None]:
    """Nothing is broken off: processes would stop at different places."""
    return contextlib.nullcontext()
