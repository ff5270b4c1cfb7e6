"""The distillation of a run: its teachers, the links between, the student.

A link learns from the one before it: the teacher (or teachers), then the
assistants, then earlier generations of the student, then the student. Owns
who learns from whom and which objective that is; how one network is trained
is `fit`, and which schemes go together `schemes`.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
import numpy as np

from kd_jax import adapters, data, deploy, networks, objectives
from kd_jax import terms as terms_lib
from kd_jax.models import load_pretrained
from kd_jax.objectives import Objective
from kd_jax.recipe import cached_teacher, fit, schemes
from kd_jax.recipe.fit import Result, Student
from kd_jax.recipe.network import TEACHER, Network
from kd_jax.recipe.run import Run
from kd_jax.recipe.words import Training
from kd_jax.sharding import hosts
from kd_jax.storage import lock
from kd_jax.storage.weights import load_weights, save_weights
from kd_jax.types import Batch, Forward


def fit_teachers(run: Run) -> Result:
  """Trains the teacher, and the others of an ensemble, on the labels."""
  c = run.config.teacher
  for name, options in c.others.items():
    where = f'{TEACHER}/{name}'
    if not run.workdir.finished(where):
      result = _fit_teacher(run, where, options.to_dict())
      run.workdir.finish(where, result)
  return _fit_teacher(run, TEACHER, c.model.to_dict())


def _fit_teacher(run: Run, where: str, options: Mapping[str, Any]) -> Result:
  model, c = run.make_model(options), run.config.teacher
  if where == TEACHER and c.pretrained:
    shape = example_for_teacher(run)[run.task.reads].shape[1:]
    variables = load_pretrained(c.pretrained, model, input_shape=shape)
    path = run.workdir.stage(where) / 'weights.safetensors'
    hosts.on_first(lambda: save_weights(path, variables))
    result = {'history': [], 'train_seconds': 0.0, 'steps': 0}
  else:
    student = future_teacher(run, where, model)
    result = fit.fit(run, where, c.train, run.task.labels(), student)
  if c.precision == 'int8':
    hosts.on_first(lambda: _save_integers(run, where, model))
  return result


def future_teacher(run: Run, where: str, model: Any) -> Student:
  """A teacher as a network to train on the labels.

  Args:
    run: the run.
    where: 'teacher', or 'teacher/name' of an ensemble's other members.
    model: its linen module.
  """
  example = example_for_teacher(run)
  variables = adapters.init_linen(model, run.rng(where), example)
  make = functools.partial(adapters.from_linen, model)
  return Student(run.behind_teacher_input(make), variables)


def example_for_teacher(run: Run) -> Batch:
  """A batch of one example as the teacher's own network sees it."""
  return _seen_by_teacher(run, run.example)


def _seen_by_teacher(run: Run, batch: Batch) -> Batch:
  reads = run.task.reads

  def capture(variables, batch, rng=None, *, train=False):
    return Forward(batch[reads])

  return {**batch, reads: run.teacher_input(capture)({}, batch).output}


def _save_integers(run: Run, where: str, model: adapters.LinenModule) -> None:
  directory = run.workdir.stage(where)
  variables = load_weights(directory / 'weights.safetensors')
  batches = data.train_batches(
    run.splits['train'],
    batch_size=min(run.config.eval_batch_size, len(run.splits['train'])),
    seed=run.config.seed,
  )
  calibration: Iterator[Any] = (
    _seen_by_teacher(run, run.preprocess(next(batches), train=False))
    for _ in range(8)
  )
  integers = deploy.post_training_quantize(model, variables, calibration)
  save_weights(directory / 'weights.int8.safetensors', integers)


def make_objective(
  run: Run,
  terms: ml_collections.ConfigDict,
  *,
  student: Any,
  teacher: Any,
  steps: int,
  kept: terms_lib.Kept | None = None,
) -> Objective:
  """The objective that a configuration's terms name.

  Args:
    run: the run.
    terms: see `terms.make_objective`.
    student: the student's taps.
    teacher: the teacher's; of an ensemble, name -> taps.
    steps: of the training.
    kept: what a cache holds of the teacher; None for a live one.

  Raises:
    ValueError: for unknown words, or a term that asks the teacher for what the
      cache does not hold.
  """
  train = run.splits['train']
  labels = None
  # Ids of other examples are not those of the labels.
  if isinstance(train, data.InMemory) and run.transfer is train:
    labels = _classes(train)
  c = run.config.teacher
  facts = terms_lib.Facts(
    student=student,
    teacher=teacher,
    num_classes=train.num_classes,
    total_steps=steps,
    labels=labels,
    teacher_weights=c.weights.to_dict() or None,
    kept=kept,
  )
  if isinstance(teacher, Mapping) and c.space != 'losses':
    # The ensemble is one teacher, of which only the output is common.
    facts = facts._replace(teacher=None)
  return terms_lib.make_objective(terms.to_dict(), facts)


def _classes(examples: data.InMemory) -> np.ndarray | None:
  """The class of each example by its id, where each has one."""
  own = examples.arrays.get('label')
  if own is None or own.ndim != 1:
    return None
  labels = np.full(int(examples.id.max()) + 1, -1, np.int32)
  labels[examples.id] = own
  return labels


def distill(run: Run, where: str = 'distill') -> Result:
  """Trains the links of the chain in order; the last one is the student.

  Args:
    run: the run.
    where: the directory of the student; the links before it lie within.
  """
  c, teacher = run.config.distill, cached_teacher.open_teacher(run)
  before = {
    name: run.make_model(options.to_dict())
    for name, options in c.scheme.assistants.items()
  }
  model = run.model('student')
  for generation in range(1, c.scheme.generations):
    before[f'generation{generation}'] = model
  for name, other in before.items():
    path = f'{where}/{name}'
    if not run.workdir.finished(path):
      result = _fit_link(run, path, f'distill/{name}', other, teacher)
      run.workdir.finish(path, result)
    variables = load_weights(run.workdir.weights(path))
    teacher = run.network(name, other, variables)
  return _fit_link(run, where, 'distill', model, teacher)


def _fit_link(
  run: Run, where: str, key: str, model: adapters.LinenModule, before: Network
) -> Result:
  objective, student, teacher = link(run, model, before, key)
  c = run.config.distill.train
  return fit.fit(run, where, c, objective, student, teacher=teacher, key=key)


def link(
  run: Run, model: Any, teacher: Network, key: str
) -> tuple[Objective, Student, Network | None]:
  """What one link is trained with, as `fit.make_step` takes it.

  Args:
    run: the run, whose `config.distill` says how.
    model: the linen module of the link.
    teacher: the link before.
    key: names the random key of its weights.

  Raises:
    ValueError: as `schemes.check`, for `ema` with a cache, or the head of an
      ensemble.
  """
  c = run.config.distill
  schemes.check(c.scheme)
  examples = fit.examples_for(run, None if c.scheme.ema else teacher)
  objective = functools.partial(
    make_objective,
    run,
    c.terms,
    student=model.taps,
    steps=Training.of(c.train, examples).steps,
  )
  variables = adapters.init_linen(model, run.rng(key), run.example)
  make = functools.partial(adapters.from_linen, model)
  student = Student(make, variables)
  if c.scheme.reuse_head:
    variables['params']['head'] = _head(run, teacher)
    student = Student(make, variables, frozen='head/.*')
  if c.scheme.ema:
    if teacher.cache is not None:
      raise ValueError(
        'distill.scheme.ema teaches by the average of the student, which '
        "changes with every step: it needs teacher.cache=''."
      )
    own = objective(teacher=model.taps)
    return objectives.ema_teacher(own, decay=c.scheme.ema), student, None
  learned = objective(teacher=teacher.taps, kept=_kept(teacher))
  if c.scheme.cohort > 1:
    student, learned = _cohort(run, key, model, learned)
  return learned, student, teacher


def _head(run: Run, teacher: Network) -> Any:
  """The classifier of the link before, in float32."""
  if teacher.name != TEACHER:
    return teacher.variables['params']['head']
  if run.config.teacher.others:
    raise ValueError(
      'distill.scheme.reuse_head takes the head of one teacher: it needs '
      'teacher.others={}.'
    )
  # What teaches may be rounded by `teacher.precision`.
  return run.trained(TEACHER, run.model('teacher'))['params']['head']


def _cohort(
  run: Run, key: str, model: adapters.LinenModule, objective: Objective
) -> tuple[Student, Objective]:
  """Students that learn from each other too, and the objective of them all."""
  scheme = run.config.distill.scheme
  names = [f'student{i}' for i in range(scheme.cohort)]
  starts = {
    name: adapters.init_linen(
      model, run.rng(key if i == 0 else f'{key}/{name}'), run.example
    )
    for i, name in enumerate(names)
  }

  def make(taps=(), axis_name=None, **options):
    members = {
      name: adapters.from_linen(
        model,
        taps=networks.taps_of(taps, name),
        axis_name=axis_name,
        **options,
      )
      for name in names
    }
    return networks.combine(members, space='first')

  # Times the cohort's size: each student keeps the loss that it has alone.
  size = float(scheme.cohort)
  own = objectives.each_student(dict.fromkeys(names, objective))
  peers = objectives.mutual(names, temperature=scheme.mutual_temperature)
  objective = objectives.weighted_sum(
    {'own': (size, own), 'mutual': (size * scheme.mutual_weight, peers)}
  )
  student = Student(
    make,
    networks.combine_variables(starts),
    served=lambda variables: networks.variables_of(variables, names[0]),
    served_make=functools.partial(adapters.from_linen, model),
  )
  return student, objective


def compress_objective(run: Run, teacher: Network) -> Objective:
  """The objective of the stage that prunes and quantizes."""
  c = run.config.compress
  return make_objective(
    run,
    c.terms,
    student=run.model('student').taps,
    teacher=teacher.taps,
    steps=Training.of(c.train, run.transfer).steps,
    kept=_kept(teacher),
  )


def _kept(teacher: Network) -> terms_lib.Kept | None:
  if teacher.cache is None:
    return None
  return cached_teacher.kept(teacher.cache.form)


def learners(
  run: Run, teacher: Network, kept: terms_lib.Kept | None = None
) -> list[tuple[Objective, int]]:
  """What learns from the teacher: each objective, and for how many epochs.

  These are the first link of distillation, and compression where the teacher
  teaches it too.

  Args:
    run: the run.
    teacher: of the run.
    kept: as for `make_objective`.

  Raises:
    ValueError: if the student's own average teaches, or a term asks for what is
      not kept.
  """
  distill, compress = run.config.distill, run.config.compress
  if distill.scheme.ema:
    raise ValueError(
      'distill.scheme.ema teaches by the average of the student: there is no '
      'teacher whose outputs could be kept.'
    )
  student = first = run.model('student')
  for options in list(distill.scheme.assistants.values())[:1]:
    first = run.make_model(options.to_dict())
  make = functools.partial(
    make_objective, run, teacher=teacher.taps, steps=1, kept=kept
  )
  found = [(make(distill.terms, student=first.taps), distill.train.epochs)]
  if compress.teacher == TEACHER:
    own = make(compress.terms, student=student.taps)
    found.append((own, compress.train.epochs))
  return found


def cache_teacher(
  run: Run,
  directory: str,
  *,
  dtype: str = 'float16',
  top_k: int = 0,
  features: bool = False,
  epochs: int = 0,
  overwrite: bool = False,
) -> dict[str, Any]:
  """Writes what the run's students will ask of its teacher.

  Args:
    run: whose teacher is trained.
    directory: where to; then the `config.teacher.cache` of trainings.
    dtype: float16, bfloat16 or float32.
    top_k: how many of the largest outputs are kept; 0 for all.
    features: whether the features that students read are kept too.
    epochs: how many; 0 for those of the longest training.
    overwrite: replaces another cache.

  Returns:
    The manifest of the cache.

  Raises:
    ValueError: if a term asks for what is not kept, or another process runs in
      the work directory; see `data.write_cache`.
  """
  teacher = run.teacher()
  found = learners(run, teacher)
  taps = [t for objective, _ in found for t in objective.taps.teacher]
  form = cached_teacher.make_form(
    run,
    dtype=dtype,
    top_k=top_k,
    features=tuple(dict.fromkeys(taps)) if features else (),
  )
  learners(run, teacher, cached_teacher.kept(form))
  with lock.exclusive(run.workdir.place):
    return cached_teacher.write(
      run,
      teacher,
      directory,
      form,
      epochs=epochs or max(count for _, count in found),
      overwrite=overwrite,
    )
