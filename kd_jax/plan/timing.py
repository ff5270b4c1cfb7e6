"""The measured step beside its prediction, on devices that are there.

Owns the clock and the random examples; knows no figures of chips.
"""

import time
from collections.abc import Callable

import jax
import numpy as np

from kd_jax import sharding
from kd_jax.plan import chips
from kd_jax.plan.program import Program, len_of
from kd_jax.plan.steps import Step

_WARM_UP, _RUNS = 3, 20


def measure_step(
  step: Step,
  program: Program,
  target: chips.Topology,
  say: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
  """Times real steps on random examples, from the weights that start a run.

  Args:
    step: from `steps.rehearse`, of a run on this process's devices.
    program: the same, compiled.
    target: its devices.
    say: is told what happens.

  Returns:
    `seconds` (median), `low` and `high` (quartiles), `runs`,
    `examples_per_second`, `flops_per_second` of a device, `utilization` of its
    published peak and `peak_bytes` of its memory, both where they are known.

  Raises:
    ValueError: for a program without FLOPs, which was not compiled.

  Example:
    >>> import jax.numpy as jnp
    >>> from kd_jax import defaults
    >>> from kd_jax.plan.rehearsal import Rehearsal
    >>> from kd_jax.types import TrainState
    >>> def train(state, batch, rng):
    ...   return state, {'sum': batch['id'].sum()}
    >>> step = Step(
    ...   run=Rehearsal(defaults.get_config(tiny=True), examples=256),
    ...   step=train,
    ...   state=None,
    ...   batch={'id': jax.ShapeDtypeStruct((8,), np.int32)},
    ...   total_steps=1,
    ...   start=lambda: TrainState(jnp.int32(0), {}, {}, (), {}, None),
    ...   networks=(None, None),
    ...   reads=(),
    ... )
    >>> program = Program('compiled', flops=16.0)
    >>> found = measure_step(step, program, chips.present())
    >>> found['runs'], found['low'] <= found['seconds'] <= found['high']
    (20, True)
    >>> found['examples_per_second'] == 8 / found['seconds']
    True
    >>> found['flops_per_second'] == 16.0 / found['seconds']
    True
  """
  if program.flops is None:
    raise ValueError('measure_step: the program has to be compiled before.')
  say('measuring the step ...')
  run, compiler = step.run, step.run.config.compiler
  state = jax.jit(step.start)()
  state = sharding.place_state(state, run.mesh, compiler, layout=run.layout)
  call = sharding.compile_step(step.step, run.mesh, compiler, layout=run.layout)
  rng, random = jax.random.key(0), np.random.default_rng(0)
  classes = run.splits['train'].num_classes
  host = {}
  for name, leaf in step.batch.items():
    end = 256 if leaf.dtype == np.uint8 else classes
    host[name] = random.integers(0, end, leaf.shape).astype(leaf.dtype)
  batch = sharding.shard_batch(host, run.mesh)
  times = []
  for i in range(_WARM_UP + _RUNS):
    started = time.perf_counter()
    state, metrics = call(state, batch, rng)
    jax.block_until_ready((state, metrics))
    if i >= _WARM_UP:
      times.append(time.perf_counter() - started)
  low, median, high = (float(x) for x in np.percentile(times, [25, 50, 75]))
  found: dict[str, float] = {
    'seconds': median,
    'low': low,
    'high': high,
    'runs': len(times),
    'examples_per_second': len_of(step.batch) / median,
    'flops_per_second': program.flops / median,
  }
  if 'compute' in program.bounds:
    found['utilization'] = program.bounds['compute'] / median
  stats = target.devices[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    found['peak_bytes'] = stats['peak_bytes_in_use']
  return found
