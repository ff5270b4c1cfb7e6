"""What a configuration would cost on devices that need not be there.

Owns which train steps are compiled for a plan, and what is said of them:
memory, FLOPs and whose they are, collectives, a roofline, alternatives, and
the measured step where there are devices. Data and weights are not needed.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from kd_jax import rules, sharding
from kd_jax.plan import chips
from kd_jax.plan.program import (
  Program,
  bounds,
  compile_program,
  fits,
  held,
  len_of,
  mesh_of,
)
from kd_jax.plan.rehearsal import Rehearsal, Step, rehearse
from kd_jax.report import measure
from kd_jax.sharding import layout

# What a plan looks at besides the configuration as it is.
ALTERNATIVES = {
  'cached_teacher': 'teacher outputs from a cache',
  'fsdp': 'parameters and moments split over all devices',
  'remat': "activations of the student's blocks computed twice",
  'double_batch': 'twice the batch, half the steps',
}
_RUNS = 20


@dataclasses.dataclass(frozen=True)
class Plan:
  """A train step in numbers, all of them of one device unless said otherwise.

  Attributes:
    stage: what would be trained.
    topology: as it was asked for, or the kind of device that is there.
    chip: `chips.Chip` as a dict, or None.
    devices: how many.
    devices_per_chip: JAX's devices on one chip.
    mesh: axis -> devices along it.
    program: the configuration's own step.
    own_flops: 2 x (3 x student + teacher) multiply-accumulates of the models:
      what a step should cost.
    teacher_flops: of the teacher's forward pass, as XLA counts before it
      optimises; 0 without a teacher.
    alternatives: name of `ALTERNATIVES` -> the step if that were changed.
    measured: median, quartiles and more of real steps, or None.
    notes: what the reader should know of these numbers.
  """

  stage: str
  topology: str
  chip: Mapping[str, Any] | None
  devices: int
  devices_per_chip: int
  mesh: Mapping[str, int]
  program: Program
  own_flops: float
  teacher_flops: float
  alternatives: Mapping[str, Program]
  measured: Mapping[str, float] | None
  notes: Sequence[str]

  @property
  def teacher_share(self) -> float | None:
    """The teacher's share of the step's FLOPs."""
    flops = self.program.flops
    return self.teacher_flops / flops if flops else None

  def as_dict(self) -> dict[str, Any]:
    """All of it, as JSON values."""
    plain = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
    }
    plain['program'] = self.program.as_dict()
    plain['alternatives'] = {
      name: program.as_dict() for name, program in self.alternatives.items()
    }
    plain['notes'] = list(self.notes)
    return plain | {'teacher_share': self.teacher_share}


def plan(
  config: ml_collections.ConfigDict,
  topology: str = '',
  *,
  stage: str = 'distill',
  alternatives: Sequence[str] = tuple(ALTERNATIVES),
  estimate: bool = False,
  measured: bool = False,
  examples: int = 0,
  say: Callable[[str], None] = lambda line: None,
) -> Plan:
  """Compiles the train step of a configuration and reads what it costs.

  Args:
    config: see `kd_jax.defaults`.
    topology: such as 'v5e:16x16'; '' for the devices of this process.
    stage: of `rehearsal.STAGES`.
    alternatives: of `ALTERNATIVES`, each compiled too.
    estimate: whether alternatives are estimated from the step instead, which
      takes no time.
    measured: whether the step is run, on random examples: only on devices that
      are there.
    examples: of the train split, if it is not prepared and not well known.
    say: is told what is compiled.

  Raises:
    ValueError: for an unknown word, or a configuration that does not go
      together.
    ImportError: for a topology without libtpu.
  """
  for name in alternatives:
    rules.choose('alternative of a plan', name, ALTERNATIVES)
  if measured and topology:
    raise ValueError(
      'Only devices that are here can be measured: leave out the topology.'
    )
  target = chips.topology(topology) if topology else chips.present()
  made = _Planner(config, target, stage, examples, say)
  step = made.rehearse()
  program = made.compiled('the step', step)
  own, teacher, student = _flops(step)
  others = {}
  for name in alternatives:
    if estimate:
      others[name] = made.estimated(name, program, step, teacher, student)
    else:
      others[name] = made.alternative(name)
  timing = measure_step(step, program, target, say) if measured else None
  return Plan(
    stage=stage,
    topology=target.name,
    chip=target.chip._asdict() if target.chip else None,
    devices=len(target.devices),
    devices_per_chip=target.devices_per_chip,
    mesh=mesh_of(step.run.mesh),
    program=program,
    own_flops=own,
    teacher_flops=teacher,
    alternatives=others,
    measured=timing,
    notes=_notes(program, own, target, step),
  )


class _Planner:
  """One configuration and what it is compiled for."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    target: chips.Topology,
    stage: str,
    examples: int,
    say: Callable[[str], None],
  ) -> None:
    self.config, self.target, self.stage = config, target, stage
    self.examples, self.say = examples, say

  def rehearse(
    self,
    change: Callable[[ml_collections.ConfigDict], None] | None = None,
    *,
    cached: bool = False,
  ) -> Step:
    config = self.config.copy_and_resolve_references()
    if change is not None:
      change(config)
    run = Rehearsal(config, self.target.devices, examples=self.examples)
    return rehearse(run, self.stage, cached=cached)

  @property
  def dtype(self) -> str:
    part = (
      self.config.teacher if self.stage == 'teacher' else self.config.student
    )
    return part.model.get('dtype', 'float32')

  def compiled(self, what: str, step: Step) -> Program:
    self.say(f'compiling {what} for {self.target.name} ...')
    started = time.perf_counter()
    made = compile_program(step, self.target, dtype=self.dtype)
    self.say(f'  {time.perf_counter() - started:.0f} s')
    return made

  def alternative(self, name: str) -> Program:
    try:
      return self.compiled(ALTERNATIVES[name], self._changed(name))
    except ValueError as e:
      return Program('impossible', why=' '.join(str(e).split()))

  def _changed(self, name: str) -> Step:
    if name == 'cached_teacher':
      return self.rehearse(cached=True)
    return self.rehearse(getattr(self, f'_{name}'))

  def _fsdp(self, config: ml_collections.ConfigDict) -> None:
    if config.compiler != 'jit':
      raise ValueError("only compiler='jit' splits parameters")
    if config.mesh.fsdp != 1:
      raise ValueError('the configuration splits them already')
    config.mesh.data, config.mesh.fsdp = 1, -1

  def _remat(self, config: ml_collections.ConfigDict) -> None:
    if config[self.stage].train.remat != 'none':
      raise ValueError('the configuration does so already')
    config[self.stage].train.remat = 'blocks'

  def _double_batch(self, config: ml_collections.ConfigDict) -> None:
    config[self.stage].train.batch_size *= 2

  def estimated(
    self, name: str, base: Program, step: Step, teacher: float, student: float
  ) -> Program:
    """An alternative from the step that was compiled, by arithmetic."""
    try:
      changed = self._changed(name)
    except ValueError as e:
      return Program('impossible', why=' '.join(str(e).split()))
    flops, hbm, ici = base.flops, base.hbm_bytes, base.ici_bytes
    if flops is None or hbm is None or ici is None:
      return Program('impossible', why='the step itself does not fit')
    memory = dict(base.memory) | held(changed, self.config.compiler)
    if name == 'cached_teacher':
      hbm *= 1 - (teacher / flops if flops else 0.0)
      flops -= teacher
      why = 'memory traffic less by the share of FLOPs'
    elif name == 'remat':
      flops += student
      why = 'temporaries as before, which is the most they can be'
    elif name == 'double_batch':
      memory['temporaries'] *= 2
      flops *= 2
      hbm *= 2
      why = 'twice the work and temporaries, the same collectives'
    else:
      n = layout.batch_parts(changed.run.mesh)
      whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(step.state.params))
      ici += whole * (n - 1) / n
      why = 'parameters gathered twice, gradients scattered once'
    total = sum(memory.values())
    return Program(
      'estimated',
      why,
      memory=memory,
      bytes=total,
      fits=fits(total, self.target),
      flops=flops,
      hbm_bytes=hbm,
      ici_bytes=ici,
      bounds=bounds(
        self.target,
        flops=flops,
        hbm_bytes=hbm,
        ici_bytes=ici,
        dtype=self.dtype,
      ),
      batch_size=len_of(changed.batch),
      total_steps=changed.total_steps,
    )


def _flops(step: Step) -> tuple[float, float, float]:
  """The models' own count; the teacher's and student's passes by XLA's."""
  devices = step.run.mesh.devices.size
  share = len_of(step.batch) / devices
  student, teacher = step.networks
  image = jax.eval_shape(lambda: step.run.example)
  macs = [0, 0]
  counts = [0.0, 0.0]
  for i, network in enumerate((student, teacher)):
    if network is None:
      continue
    forward, variables = network

    def output(variables, batch, forward=forward):
      return forward(variables, batch, None, train=False).output

    macs[i] = measure.multiply_accumulates(output, variables, image)
    cost = jax.jit(output).lower(variables, image).cost_analysis() or {}
    counts[i] = share * float(cost.get('flops', 0))
  return 2 * share * (3 * macs[0] + macs[1]), counts[1], counts[0]


def _notes(
  program: Program, own: float, target: chips.Topology, step: Step
) -> list[str]:
  notes = []
  if target.chip is None:
    notes.append(
      f'No published figures of {target.name} are known: no bounds, and '
      'whether it fits is not said.'
    )
  if program.flops and own > 1.3 * program.flops:
    notes.append(
      "XLA counts the body of a loop once, and the models' own count is "
      f'{own / program.flops:.1f} times its: take bounds as too low.'
    )
  if step.reads and step.networks[1]:
    notes.append(
      f'The objective reads features of the teacher ({", ".join(step.reads)}), '
      'which kd-jax cache-teacher keeps with --features.'
    )
  return notes


def measure_step(
  step: Step,
  program: Program,
  target: chips.Topology,
  say: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
  """Times real steps on random examples, from the weights that start a run.

  Args:
    step: from `rehearsal.rehearse`, of a run on this process's devices.
    program: the same, compiled.
    target: its devices.
    say: is told what happens.

  Returns:
    `seconds` (median), `low` and `high` (quartiles), `runs`,
    `examples_per_second`, `flops_per_second` of a device, `utilization` of its
    published peak and `peak_bytes` of its memory, both where they are known.
  """
  if program.flops is None:
    raise ValueError('measure_step: the program has to be compiled before.')
  say('measuring the step ...')
  run, how = step.run, step.run.config.compiler
  state = jax.jit(step.start)()
  state = sharding.place_state(state, run.mesh, how, layout=run.layout)
  call = sharding.compile_step(step.step, run.mesh, how, layout=run.layout)
  rng, random = jax.random.key(0), np.random.default_rng(0)
  classes = run.splits['train'].num_classes
  host = {}
  for name, leaf in step.batch.items():
    end = 256 if leaf.dtype == np.uint8 else classes
    host[name] = random.integers(0, end, leaf.shape).astype(leaf.dtype)
  batch = sharding.shard_batch(host, run.mesh)
  times = []
  for i in range(_RUNS + 3):
    started = time.perf_counter()
    state, metrics = call(state, batch, rng)
    jax.block_until_ready((state, metrics))
    if i >= 3:
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
