"""What the loop gives to the devices: batches, one ahead, and how many at once.

Owns the order of reading, copying and dispatching, so that the devices have
their next batch before the host waits for anything. It neither reads images,
which is `data`, nor knows what a step does.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from kd_jax.train.profiling import Profile
from kd_jax.types import Batch, BatchStream, HostBatch


class Several(NamedTuple):
  """Several steps in one dispatch.

  Attributes:
    steps: N.
    step: compiled for batches `[N, B, ...]`, see `sharding.compile_step`.
    put: moves a stack of host batches `[N, B, ...]` to the devices.

  Example:
    >>> from kd_jax import loops
    >>> add = lambda state, batch, rng: (state + batch['x'].sum(), {})
    >>> several = Several(2, loops.several(add), put=jax.device_put)
    >>> stack = several.put({'x': np.ones((2, 3), 'float32')})
    >>> float(several.step(np.float32(0), stack, None)[0])
    6.0
  """

  steps: int
  step: Callable[..., Any]
  put: Callable[[HostBatch], Batch]


class Fed(NamedTuple):
  """A batch on the devices.

  Attributes:
    arrays: `[B, ...]`, or `[N, B, ...]` for several steps.
    steps: how many.
    examples: in all of them, of the global batch.
    state: where the batches stand after it.
  """

  arrays: Batch
  steps: int
  examples: int
  state: Any


def dispatches(step: int, total: int, every: int, steps: int) -> Iterator[int]:
  """How many steps to dispatch at once, from a step to the end.

  Groups begin at every multiple of `every`, and what does not fill one before
  the next is single steps. So a run that goes on from any border
  between dispatches has the same ones as a run that was not stopped.

  Args:
    step: completed steps.
    total: where to end.
    every: steps between two evaluations, which no dispatch steps over.
    steps: the size of a group.

  Example:
    >>> list(dispatches(0, 13, 8, 3))
    [3, 3, 1, 1, 3, 1, 1]
    >>> list(dispatches(6, 13, 8, 3))
    [1, 1, 3, 1, 1]
  """
  steps = min(steps, every)
  while step < total:
    end = min((step // every + 1) * every, total)
    count = steps if step + steps <= end else 1
    yield count
    step += count


class Feed:
  """Reads the batch after the one in use, and moves it to the devices.

  Args:
    batches: endless.
    put: moves one host batch to the devices, without waiting for it.
    counts: how many steps each dispatch has, see `dispatches`.
    several: needed where a count is more than 1.
    profile: measures how long the devices wait; None does not.

  Example:
    >>> class Count(Iterator):
    ...   at = 0
    ...   def __next__(self):
    ...     self.at += 1
    ...     return {'x': np.array([self.at])}
    ...   def get_state(self):
    ...     return self.at
    >>> feed = Feed(Count(), lambda batch: batch, iter([1, 1]))
    >>> feed.fetch()  # read ahead, not taken
    >>> feed.get_state(), feed.take().arrays['x'].tolist(), feed.get_state()
    (0, [1], 1)
  """

  def __init__(
    self,
    batches: BatchStream,
    put: Callable[[HostBatch], Batch],
    counts: Iterator[int],
    several: Several | None = None,
    profile: Profile | None = None,
  ):
    self._batches, self._put = batches, put
    self._counts, self._several = counts, several
    self._profile = profile
    self._state = batches.get_state()
    self._next: Fed | None = None

  def fetch(self, running: Any = ()) -> None:
    """Reads the next batch, if there is one; called while a step runs.

    Args:
      running: arrays that the step will make.

    Raises:
      ValueError: if a dispatch has more than one step and `several` is None.
    """
    begun = time.perf_counter()
    count = next(self._counts, 0)
    if not count:
      return
    read = [next(self._batches) for _ in range(count)]
    state = self._batches.get_state()
    if count == 1:
      arrays = self._put(read[0])
    elif self._several is None:
      raise ValueError(
        f'A dispatch of {count} steps needs `several`, which makes them.'
      )
    else:
      stack = {k: np.stack([batch[k] for batch in read]) for k in read[0]}
      arrays = self._several.put(stack)
    # Of the global batch: processes may have read the same part of it.
    examples = count * next(iter(arrays.values())).shape[int(count > 1)]
    self._next = Fed(arrays, count, examples, state)
    if self._profile is not None:
      idle = all(x.is_ready() for x in jax.tree.leaves(running))
      self._profile.fetched(time.perf_counter() - begun, idle=idle)

  def take(self) -> Fed:
    """The next batch; reads it now if that was not done before.

    Raises:
      ValueError: if all dispatches were taken.
    """
    if self._next is None:
      self.fetch()
    fed, self._next = self._next, None
    if fed is None:
      raise ValueError('There is no batch to take: all dispatches were.')
    self._state = fed.state
    return fed

  def get_state(self) -> Any:
    """Where the batches stand after the last one taken."""
    return self._state
