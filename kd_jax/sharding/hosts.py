"""What processes tell each other outside of compiled steps.

Owns who writes, what one of them says to all, arrays that no process has the
whole of, and when all stop. With one process every function here is its
simplest case. The processes share a file system; how they begin and end
together is in `processes`.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from kd_jax.sharding import preemption

# Seconds for which processes wait for one that works alone, such as on the
# report; dead ones are noticed by their heartbeats, long before.
LONGEST_WAIT = 2 * 3600

T = TypeVar('T')
# Names of barriers and points of preemption count up in step on all processes,
# as long as the process lives: so does the service of JAX that they belong to.
_barriers, _polls = itertools.count(), itertools.count(1)


def is_first() -> bool:
  """Whether this is process 0, which writes and prints.

  Example:
    >>> is_first()  # always with one process
    True
  """
  return jax.process_index() == 0


def say(line: str) -> None:
  """Prints a line, on process 0, and flushes.

  Args:
    line: without its end.

  Example:
    >>> say('step 10')
    step 10
  """
  if is_first():
    print(line, flush=True)


def barrier() -> None:
  """Waits until every process is here, for at most `LONGEST_WAIT`.

  With one process it does nothing.

  Raises:
    jax.errors.JaxRuntimeError: if not all processes came.
  """
  if jax.process_count() > 1:
    meet(str(next(_barriers)), LONGEST_WAIT)


def meet(name: str, seconds: int) -> None:
  """A barrier of the coordination service, which needs no device.

  Args:
    name: of the barrier, which is used once.
    seconds: to wait at most.

  Raises:
    jax.errors.JaxRuntimeError: if not all processes came.
  """
  from orbax.checkpoint import multihost  # slow to import

  multihost.sync_global_processes(
    f'kd_jax/{name}',
    timeout=seconds,
    processes=set(range(jax.process_count())),
  )


def exchange(text: str) -> list[str]:
  """What each process says, in the order of processes; all of them call it.

  Args:
    text: of this process; of any length, also empty.

  Returns:
    One text per process, the same list on all of them.

  Example:
    >>> exchange('ready')
    ['ready']
  """
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

  Returns:
    What `work` returned in this process; what it raised, this process raises.

  Example:
    >>> together(lambda: 6 * 7)
    42
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

  Example:
    >>> on_first(lambda: {'accuracy': 0.5})
    {'accuracy': 0.5}
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
      there. The file is looked for five times a second.

  Raises:
    ValueError: if it is not.

  Example:
    >>> wait_for(Path(__file__))
    >>> wait_for(Path('nowhere'), within=0)
    Traceback (most recent call last):
    ...
    ValueError: nowhere, which process 0 wrote, is not seen by process 0: ...
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
  """A pytree as NumPy arrays, whole on every process; all of them call it.

  Args:
    tree: of arrays; of those that are spread over processes each gets the
      parts of the others, and the memory of a host has to hold them.

  Returns:
    The same tree of NumPy arrays.

  Example:
    >>> mesh = jax.make_mesh((8,), ('data',))
    >>> split = jax.sharding.NamedSharding(mesh, jax.P('data'))
    >>> x = fetch({'x': jax.device_put(np.arange(8), split)})['x']
    >>> type(x).__name__, x.tolist()
    ('ndarray', [0, 1, 2, 3, 4, 5, 6, 7])
  """

  def whole(x):
    if spread(x):
      return multihost_utils.process_allgather(x, tiled=True)
    return x

  return jax.device_get(jax.tree.map(whole, tree))


def place(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
  """`jax.device_put`, also of what every process has onto devices of all.

  Args:
    x: an array of NumPy's or JAX's, or typed keys; where the devices are those
      of several processes, each gives the whole of it.
    sharding: where to.

  Returns:
    A `jax.Array` of the same shape with that sharding.

  Example:
    >>> mesh = jax.make_mesh((8,), ('data',))
    >>> split = jax.sharding.NamedSharding(mesh, jax.P('data'))
    >>> x = place(np.arange(16), split)
    >>> x.shape, x.addressable_shards[1].data.tolist()
    ((16,), [2, 3])
  """
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
  """Whether no process has the whole of an array.

  Args:
    x: anything; only a `jax.Array` can be spread.

  Returns:
    Always False with one process, which has every part.

  Example:
    >>> mesh = jax.make_mesh((8,), ('data',))
    >>> split = jax.sharding.NamedSharding(mesh, jax.P('data'))
    >>> spread(jax.device_put(np.arange(8), split)), spread('text')
    (False, False)
  """
  return isinstance(x, jax.Array) and not (
    x.is_fully_addressable or x.is_fully_replicated
  )


def uninterrupted() -> contextlib.AbstractContextManager[None]:
  """`preemption.uninterrupted`, but nothing with several processes.

  There the handler of SIGTERM is JAX's, which raises nothing.

  Example:
    >>> with uninterrupted():
    ...   print('written whole')
    written whole
  """
  if jax.process_count() > 1:
    return contextlib.nullcontext()
  return preemption.uninterrupted()


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
