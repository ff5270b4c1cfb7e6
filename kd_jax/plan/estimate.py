"""What a configuration would cost on devices that need not be there.

Owns which train steps are compiled for a plan, and what is put together of
them: memory, FLOPs and whose they are, collectives, a roofline, `alternatives`,
and the measured step (`timing`) where there are devices. Data and weights are
not needed.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections

from kd_jax import rules
from kd_jax.plan import chips
from kd_jax.plan.alternatives import ALTERNATIVES, change, estimated
from kd_jax.plan.program import Program, compile_program, len_of, mesh_of
from kd_jax.plan.rehearsal import Rehearsal
from kd_jax.plan.steps import Step, rehearse
from kd_jax.plan.timing import measure_step
from kd_jax.recipe import fields
from kd_jax.report import measure


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
    config: see `kd_jax.defaults`; it is not changed.
    topology: such as 'v5e:16x16'; '' for the devices of this process.
    stage: of `steps.STAGES`.
    alternatives: of `ALTERNATIVES`, each compiled too.
    estimate: whether alternatives are estimated from the step instead, which
      takes no time.
    measured: whether the step is run, on random examples: only on devices that
      are there.
    examples: of the train split, if it is not prepared and not well known.
    say: is told what is compiled.

  Returns:
    The numbers, of one device unless `Plan` says otherwise.

  Raises:
    ValueError: for an unknown word, a configuration that does not go together,
      or `measured` with a topology.
    ImportError: for a topology without libtpu.

  Example:
    >>> from kd_jax import defaults
    >>> config = defaults.get_config(tiny=True)
    >>> config.data.update({'name': 'mnist', 'crop_padding': 0})
    >>> config.student.model = {'name': 'mlp', 'hidden': (4,)}
    >>> config.alone.train.batch_size = 32
    >>> made = plan(config, stage='alone', alternatives=(), examples=256)
    >>> macs = 28 * 28 * 4 + 4 * 10
    >>> made.own_flops * made.devices == 2 * 3 * macs * 32
    True
    >>> made.program.how, made.teacher_share
    ('compiled', 0.0)
  """
  for name in alternatives:
    rules.choose('--what_if', name, ALTERNATIVES)
  if measured and topology:
    raise ValueError(
      'Only devices that are here can be measured: leave out the topology.'
    )
  fields.check(config)
  target = chips.topology(topology) if topology else chips.present()
  made = _Planner(config, target, stage, examples, say)
  step = made.step()
  program = made.compiled('the step', step)
  own, teacher, student = _flops(step)

  def alternative(name):
    changed = made.step(name)
    if not estimate:
      return made.compiled(ALTERNATIVES[name], changed)
    return estimated(
      name,
      program,
      step,
      changed,
      target,
      dtype=made.dtype,
      teacher_flops=teacher,
      student_flops=student,
    )

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
    alternatives={n: _if_possible(alternative, n) for n in alternatives},
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
    trained = config.teacher if stage == 'teacher' else config.student
    own = trained.model.get('dtype', 'float32')
    self.dtype = own if config.precision == 'float32' else config.precision

  def step(self, alternative: str = '') -> Step:
    """The step in shapes, as it is or in an alternative."""
    config = self.config.copy_and_resolve_references()
    if alternative:
      change(alternative, config, self.stage)
    run = Rehearsal(config, self.target.devices, examples=self.examples)
    return rehearse(run, self.stage, cached=alternative == 'cached_teacher')

  def compiled(self, what: str, step: Step) -> Program:
    """The step in numbers."""
    self.say(f'compiling {what} for {self.target.name} ...')
    started = time.perf_counter()
    made = compile_program(step, self.target, dtype=self.dtype)
    self.say(f'  {time.perf_counter() - started:.0f} s')
    return made


def _if_possible(make: Callable[[str], Program], name: str) -> Program:
  """An alternative, or what is in its way."""
  try:
    return make(name)
  except ValueError as e:
    return Program('impossible', why=' '.join(str(e).split()))


def _flops(step: Step) -> tuple[float, float, float]:
  """The models' own count; the teacher's and student's passes by XLA's."""
  share = len_of(step.batch) / step.run.mesh.devices.size
  image = jax.eval_shape(lambda: step.run.example)

  def counted(network):
    if network is None:
      return 0, 0.0
    forward, variables = network

    def output(variables, batch):
      return forward(variables, batch, None, train=False).output

    macs = measure.multiply_accumulates(output, variables, image)
    cost = jax.jit(output).lower(variables, image).cost_analysis() or {}
    return macs, share * float(cost.get('flops', 0))

  student, teacher = map(counted, step.networks)
  return 2 * share * (3 * student[0] + teacher[0]), teacher[1], student[1]


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
