"""Times what takes no arguments in turns, and keeps what every round took."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from kd_jax.report import measure


def in_turns(
  calls: Mapping[str, Callable[[], Any]],
  *,
  runs: int,
  clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
  """Times of each function, as `measure.latencies` takes them.

  Args:
    calls: by name.
    runs: counted rounds, after those that warm up.
    clock: seconds, read before and after each call.

  Returns:
    What `measure.latencies` returns; and name -> seconds by the clock
    `[runs]`, to compare functions round by round.
  """
  spent = {name: [] for name in calls}

  def recorded(name, call):
    def once(_):
      before = clock()
      out = jax.block_until_ready(call())
      spent[name].append(clock() - before)
      return out

    return once

  times = measure.latencies(
    {name: recorded(name, call) for name, call in calls.items()},
    np.zeros(0),
    runs=runs,
  )
  return times, {name: np.array(s[-runs:]) for name, s in spent.items()}
