"""The train step of a stage in shapes, for a compiler to read.

Owns which networks, objective and batch a stage puts together, from a run that
is only rehearsed. What the compiled step costs is `program`'s; nothing is
trained.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from kd_jax import data, rules, sharding
from kd_jax.data import cache_form
from kd_jax.objectives import Objective
from kd_jax.plan.rehearsal import Rehearsal
from kd_jax.recipe import cached_teacher, distillation, fit, stages
from kd_jax.recipe.network import TEACHER, Network
from kd_jax.recipe.run import Run
from kd_jax.recipe.words import Training
from kd_jax.types import TrainState

STAGES = ('teacher', 'alone', 'distill', 'compress')


class _Unwritten(cache_form.Entries):
  """A cache that no file is of: the shapes alone of what it would hold."""

  def __init__(
    self, run: Rehearsal, teacher: Network, reads: Sequence[str]
  ) -> None:
    form = cached_teacher.make_form(run, features=reads)
    output = teacher.make(taps=reads)
    packed = jax.eval_shape(
      lambda v: cache_form.pack(output(v, run.example), form),
      teacher.variables,
    )
    classes = run.splits['train'].num_classes
    super().__init__(form, cache_form.describe(packed), classes)

  def check_epochs(self, epochs: int) -> None:
    """It has as many as are asked for."""


class Step(NamedTuple):
  """The train step of a stage, and what it is called with.

  Attributes:
    run: whose mesh it is for.
    step: `(state, raw batch, rng) -> (state, metrics)`, not compiled.
    state: of `jax.ShapeDtypeStruct`s.
    batch: likewise, the global batch.
    total_steps: of the stage.
    start: makes a state of values; may be compiled.
    networks: student, and teacher or None: (forward, shapes of variables).
    reads: what the objective reads of the teacher besides its output.
  """

  run: Rehearsal
  step: Callable[..., Any]
  state: TrainState
  batch: Mapping[str, jax.ShapeDtypeStruct]
  total_steps: int
  start: Callable[[], TrainState]
  networks: tuple[Any, Any]
  reads: tuple[str, ...]

  @property
  def rng(self) -> Any:
    """The shape of the run's key."""
    return jax.eval_shape(lambda: jax.random.key(0))


def check(
  run: Run, stages: Sequence[str] = (), *, overwrite: bool = False
) -> None:
  """Makes the train steps of a run in shapes, before any of them trains.

  A wrong word of a late stage is found in seconds, not after hours of training.
  All steps but the first, which is compiled next, are traced too: what cannot
  be compared shows there.

  Args:
    run: whose configuration, examples and devices.
    stages: to check, all when empty; those that train nothing are left out.
    overwrite: also checks those that are finished.

  Raises:
    ValueError: what the stage would have raised.

  Example:
    >>> import tempfile
    >>> from kd_jax import defaults
    >>> from kd_jax.storage.workdir import Workdir
    >>> config = defaults.get_config(tiny=True)
    >>> config.student.model = {'name': 'mlp', 'hidden': (4,)}
    >>> config.data.crop_padding = 0
    >>> workdir = Workdir(tempfile.mkdtemp(), config.to_dict())
    >>> run = Run(config, workdir, like=Rehearsal(config, examples=256))
    >>> check(run, ['alone'])
    >>> config.alone.train.optimizer.name = 'sdg'
    >>> try:
    ...   check(run, ['alone'])
    ... except ValueError as e:
    ...   print(str(e).partition('?')[0])
    Unknown optimizer 'sdg': did you mean sgd
  """
  due = [
    stage
    for stage in STAGES
    if (not stages or stage in stages)
    and (overwrite or not run.workdir.finished(stage))
  ]
  _check_files(run, due)
  for stage in due:
    devices = list(run.mesh.devices.flat)
    step = rehearse(Rehearsal(run.config, devices, source=run), stage)
    if stage != due[0]:
      compiled = sharding.compile_step(
        step.step, run.mesh, run.config.compiler, layout=run.layout
      )
      jax.eval_shape(compiled, step.state, dict(step.batch), step.rng)


def _check_files(run: Run, due: Sequence[str]) -> None:
  """Refuses a run that would end at a file that is not there."""
  c = run.config.teacher
  if 'teacher' in due and c.pretrained and not os.path.isfile(c.pretrained):
    raise ValueError(f'teacher.pretrained={c.pretrained} is no file.')
  if c.cache and not {'distill', 'compress'}.isdisjoint(due):
    data.TeacherCache(c.cache)


def rehearse(run: Rehearsal, stage: str, *, cached: bool = False) -> Step:
  """The train step of a stage, with shapes for values.

  Args:
    run: whose configuration says how.
    stage: of `STAGES`; of a chain of distillations, the last link.
    cached: whether what the teacher says comes with the batch although the
      configuration has no cache.

  Raises:
    ValueError: for another stage, or `cached` where no teacher is, it cannot be
      cached, or it is.
  """
  rules.choose('stage', stage, dict.fromkeys(STAGES, True))
  if cached and run.cached:
    raise ValueError('the configuration has a cache')
  c = run.config[stage].train
  made: dict[str, Any] = {}

  def start():
    # A run keeps what it made, and tracers must not outlive their trace.
    own = run.again()
    objective, student, teacher = _parts(own, stage)
    made['reads'] = tuple(objective.taps.teacher) if teacher else ()
    made['entries'] = {}
    if cached or (run.cached and _is_cached(teacher)):
      cache = _Unwritten(own, _cached(teacher), made['reads'])
      objective, student, teacher = _parts(own, stage, cache)
      made['entries'] = cache.placeholder()
    examples = fit.examples_for(own, teacher)
    made['steps'] = Training.of(c, examples).steps
    made['example'] = {**examples.read([0]), 'epoch': np.zeros(1, np.int32)}
    made['networks'] = _networks(student, teacher)
    prepared = fit.make_step(own, stage, c, objective, student, teacher)
    made['step'] = prepared.step
    return prepared.state

  state = jax.eval_shape(start)
  batch = {
    name: jax.ShapeDtypeStruct((c.batch_size, *row.shape[1:]), row.dtype)
    for name, row in (made['example'] | made['entries']).items()
  }
  return Step(
    run=run,
    step=made['step'],
    state=state,
    batch=batch,
    total_steps=made['steps'],
    start=start,
    networks=made['networks'],
    reads=made['reads'],
  )


def _is_cached(teacher: Network | None) -> bool:
  return teacher is not None and teacher.name == TEACHER


def _cached(teacher: Network | None) -> Network:
  """What a cache may hold, or a ValueError that says why it may not."""
  if teacher is None:
    raise ValueError('there is no teacher')
  if not _is_cached(teacher):
    raise ValueError(f'what teaches is {teacher.name}, not the teacher')
  return teacher


def _parts(
  run: Rehearsal, stage: str, cache: Any = None
) -> tuple[Objective, fit.Student, Network | None]:
  """What `fit.make_step` takes for a stage, with a cache for its teacher."""
  c = run.config
  if stage == 'teacher':
    model = run.make_model(c.teacher.model.to_dict())
    student = distillation.future_teacher(run, stage, model)
    return run.task.labels(), student, None
  if stage == 'alone':
    return run.task.labels(), stages.untaught(run), None
  if stage == 'compress':
    teacher = stages.compress_teacher(run)
    teacher = dataclasses.replace(teacher, cache=cache)
    objective = distillation.compress_objective(run, teacher)
    return objective, _compressed(run), teacher
  scheme, model = c.distill.scheme, run.model('student')
  before = [run.make_model(o.to_dict()) for o in scheme.assistants.values()]
  before += [model] * (scheme.generations - 1)
  if before:
    variables = run.trained('distill', before[-1])
    teacher = run.network('the link before', before[-1], variables)
  else:
    teacher = dataclasses.replace(run.teacher(), cache=cache)
  return distillation.link(run, model, teacher, stage)


def _compressed(run: Rehearsal) -> fit.Student:
  """The student of 'compress'; of values, where its recipe looks at them."""
  try:
    return stages.student_of(run.compression)
  except (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
  ):
    with jax.ensure_compile_time_eval():
      return stages.student_of(run.again().compression)


def _networks(student: fit.Student, teacher: Network | None) -> tuple[Any, Any]:
  """Forwards without taps, in evaluation mode, and their variables' shapes."""

  def shapes(variables):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(variables)
    )

  found = None
  if teacher is not None and teacher.cache is None:
    found = teacher.make(), shapes(teacher.variables)
  return (student.make(), shapes(student.variables)), found
