"""Measurements for the report: multiply-accumulates, latency, hardware.

Owns how time and work are counted, of functions that it is given; knows no
report and no network.
"""

import os
import platform
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def multiply_accumulates(fn: Callable[..., Any], *args: Any) -> int:
  """Multiply-accumulates of the convolutions and matrix products of a function.

  Nothing is run. FLOPs are twice this number. Zeros are counted like other
  weights: a dense kernel multiplies them.

  Args:
    fn: any JAX function.
    *args: its arguments; only shapes and dtypes matter.

  Example:
    >>> x, w = np.zeros((2, 3), 'f'), np.zeros((3, 5), 'f')
    >>> multiply_accumulates(lambda x, w: x @ w, x, w)
    30
  """
  return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
  """Of one run of a jaxpr; the steps of a scan multiply."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      shape = eqn.invars[0].aval.shape
      summed = int(np.prod([shape[i] for i in contracted]))
      total += summed * eqn.outvars[0].aval.size
    elif eqn.primitive.name == 'conv_general_dilated':
      kernel = eqn.invars[1].aval
      out_axis = eqn.params['dimension_numbers'].rhs_spec[0]
      per_output = kernel.size // kernel.shape[out_axis]
      total += per_output * eqn.outvars[0].aval.size
    for value in eqn.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          total += _count(inner) * eqn.params.get('length', 1)
  return total


def latencies(
  applies: Mapping[str, Callable[[np.ndarray], Any]],
  inputs: np.ndarray,
  *,
  runs: int = 30,
) -> dict[str, dict[str, float]]:
  """Wall time of each function on one batch, measured in turns.

  One round calls every function once, so that a change of the machine's
  speed meets all of them; the first rounds warm up and are not counted. Each
  round draws its order: a call's time depends on what ran before it, and the
  same program timed in two fixed places differed by a quarter.

  Args:
    applies: name -> `(inputs) -> output`.
    inputs: the batch.
    runs: counted rounds.

  Returns:
    name -> `median_ms`, `low_ms` and `high_ms` (the quartiles), `runs`.

  Example:
    >>> calls = []
    >>> timed = latencies({'copy': calls.append}, np.ones(3), runs=5)
    >>> timed['copy']['runs'], len(calls)  # three rounds warm up
    (5, 8)
  """
  times: dict[str, list[float]] = {name: [] for name in applies}
  order, rng = list(applies), random.Random(0)
  for i in range(runs + 3):
    rng.shuffle(order)
    for name in order:
      started = time.perf_counter()
      jax.block_until_ready(applies[name](inputs))
      if i >= 3:
        times[name].append(1e3 * (time.perf_counter() - started))
  return {name: _spread(values) for name, values in times.items()}


def _spread(values: list[float]) -> dict[str, float]:
  low, median, high = np.percentile(values, [25, 50, 75])
  return {
    'median_ms': float(median),
    'low_ms': float(low),
    'high_ms': float(high),
    'runs': len(values),
  }


def hardware() -> str:
  """The devices, processes if there are several, and processor, in words."""
  devices, processes = jax.devices(), jax.process_count()
  kind = devices[0].device_kind
  of = f' of {processes} processes' if processes > 1 else ''
  return (
    f'{len(devices)} x {kind} ({devices[0].platform}){of}, host '
    f'{_processor()}, {os.cpu_count()} cores'
  )


def _processor() -> str:
  try:
    with open('/proc/cpuinfo') as file:
      names = [line for line in file if line.startswith('model name')]
    return names[0].split(':', 1)[1].strip()
  except (OSError, IndexError):
    return platform.processor() or platform.machine()
