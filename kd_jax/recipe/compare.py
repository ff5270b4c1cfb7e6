"""Methods side by side: the same teacher, student, data and seeds for all.

For every seed a teacher is trained once, and the student once with each method,
always from the same weights, batches and crops. What is reported is the last
step, never the best, on the test split. Owns the order of trainings and what
they share; what a method is stands in `methods`.
"""

import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from kd_jax import defaults, methods, metrics, rules, sharding
from kd_jax.data import train_batches
from kd_jax.recipe import (
  assess,
  distillation,
  evaluation,
  fields,
  fit,
  origin,
  schemes,
)
from kd_jax.recipe.network import TEACHER
from kd_jax.recipe.run import Run
from kd_jax.report import comparison, measure
from kd_jax.sharding import hosts
from kd_jax.storage import lock, mirror, weights
from kd_jax.storage.workdir import Workdir, flatten, read_json, write_json
from kd_jax.terms import describe

# Of the fields of `kd-jax run`.
_UNREAD = re.compile(r'seed$|(alone|compress|aims|distill\.terms)\.')


def compare(
  config: ml_collections.ConfigDict,
  path: str | os.PathLike,
  *,
  say: Callable[[str], None] = hosts.say,
) -> dict[str, Any]:
  """Trains every method with every seed, and writes the comparison.

  What is finished is kept: the same call goes on where it was stopped, and a
  configuration with more methods or seeds adds them.

  Args:
    config: see `configs/compare_digits.py`.
    path: the work directory; `seed<N>` of it belongs to one seed.
    say: prints one line.

  Returns:
    The comparison, as written to `comparison.json`; see `report.comparison`.

  Raises:
    ValueError: for an unknown method, several scales without a validation
      split, fields that a comparison does not read, schemes that do not go
      together, a directory of another configuration or other data, or if
      another process runs here.
  """
  _check(config)
  with lock.exclusive(path):
    return _compare(config, path, say)


def _check(config: ml_collections.ConfigDict) -> None:
  """Refuses what a comparison cannot do, and fields that it does not read."""
  fields.check(config)
  for name in config.methods:
    rules.choose('entry of methods', name, methods.METHODS)
  for name, options in config.method_options.items():
    method = rules.choose('entry of method_options', name, methods.METHODS)
    for label in options:
      rules.choose(f'term of method_options.{name}:', label, method.terms)
  if not config.scales:
    raise ValueError('scales=() leaves no factor: (1.0,) is the published one.')
  if len(config.scales) > 1 and not config.data.validation:
    raise ValueError(
      f'Of scales={tuple(config.scales)} the validation split chooses one, and '
      'data.validation=0 leaves none: give one scale.'
    )
  given, *defaulted = (
    flatten(c.to_dict())
    for c in (config, defaults.comparison(), defaults.comparison(tiny=True))
  )
  for field, value in given.items():
    own = [default.get(field) for default in defaulted]
    if _UNREAD.match(field) and value not in own:
      raise ValueError(
        f'kd-jax compare does not read {field}={value!r}: it has the seeds '
        'from 0 on, the terms of each method, and distill.train for the '
        'student alone too.'
      )


def _compare(
  config: ml_collections.ConfigDict,
  path: str | os.PathLike,
  say: Callable[[str], None],
) -> dict[str, Any]:
  rows: dict[str, list[dict[str, Any]]] = {}
  chosen: dict[str, float] = {TEACHER: 1.0}
  for seed in range(config.seeds):
    run = open_run(config, path, seed)
    for name in config.methods:
      scheme = with_method(run, name).config.distill.scheme
      schemes.check(scheme)
    origin.record(run, say=say)
    for name in (TEACHER, *config.methods):
      if name not in chosen:
        chosen[name] = _best_scale(run, name, config.scales)
      _ensure(run, name, chosen[name])
      test = functools.partial(_test_once, run, name, chosen[name], say)
      rows.setdefault(name, []).append(hosts.on_first(test))
  times = _times(config, path)
  run = open_run(config, path, 0)
  result = _assemble(run, rows, times, chosen, config.scales)

  def write():
    with mirror.written(path) as directory:
      comparison.write(result, directory)

  hosts.on_first(write)
  return result


def place(name: str, scale: float = 1.0) -> str:
  """The stage directory of a method with scaled weights, or of the teacher."""
  return name if name == TEACHER else f'methods/{name}/x{scale:g}'


def _ensure(run: Run, name: str, scale: float) -> None:
  """Trains what is not there yet."""
  where = place(name, scale)
  if run.workdir.finished(where):
    return
  if name == TEACHER:
    result = distillation.fit_teachers(run)
  else:
    result = distillation.distill(with_method(run, name, scale), where)
  run.workdir.finish(where, result)


def _best_scale(run: Run, name: str, scales: Sequence[float]) -> float:
  """The scale that is best on the validation split; the first of equals."""
  one, two = (_terms(run.config, name, scale) for scale in (1.0, 2.0))
  if len(scales) == 1 or one == two:
    return scales[0]
  worth = {}
  for scale in scales:
    _ensure(run, name, scale)
    history = run.workdir.result(place(name, scale))['history']
    worth[scale] = run.task.worth(history[-1][f'eval/{run.task.quality}'])
  return max(scales, key=worth.__getitem__)


def scaled_terms(
  terms: Mapping[str, Mapping[str, Any]], scale: float
) -> dict[str, dict[str, Any]]:
  """Terms, the weights of all but the labels' times a factor."""
  scaled = {}
  for label, term in terms.items():
    if term['name'] != 'hard_labels':
      term = {**term, 'weight': _times_scale(term['weight'], scale)}
    scaled[label] = dict(term)
  return scaled


def _times_scale(weight: Any, scale: float) -> Any:
  if not isinstance(weight, dict):
    return weight * scale
  ends = {k: weight[k] * scale for k in ('start', 'end') if k in weight}
  return weight | ends


def open_run(
  config: ml_collections.ConfigDict, path: str | os.PathLike, seed: int
) -> Run:
  """The run of one seed.

  Which methods and how many seeds are compared is not part of its identity:
  more of them may be added.
  """
  config = ml_collections.ConfigDict(config.to_dict())
  config.seed = seed
  for key in ('methods', 'seeds', 'scales', 'timing'):
    del config[key]
  return Run(
    config, Workdir(mirror.resolve(path) / f'seed{seed}', config.to_dict())
  )


def with_method(run: Run, name: str, scale: float = 1.0) -> Run:
  """The same run, its student taught by a method of `methods.METHODS`.

  Args:
    run: of a comparison.
    name: the method.
    scale: factor of the weights, but for those of the labels.
  """
  config = ml_collections.ConfigDict(run.config.to_dict())
  config.distill.terms = _terms(config, name, scale)
  config.distill.scheme.update(methods.METHODS[name].scheme)
  return run.with_config(config)


def _terms(
  config: ml_collections.ConfigDict, name: str, scale: float
) -> dict[str, dict[str, Any]]:
  """The scaled terms of a method, with the configuration's own options."""
  terms = dict(methods.METHODS[name].terms)
  for label, options in config.method_options.get(name, {}).items():
    terms[label] = {**terms[label], **options}
  return scaled_terms(terms, scale)


def _test_once(
  run: Run, name: str, scale: float, say: Callable[[str], None]
) -> dict[str, Any]:
  tested = run.workdir.path / place(name, scale) / 'test.json'
  if not tested.exists():
    numbers = _test(run, name, scale)
    write_json(tested, numbers)
    run.workdir.send(place(name, scale))
    look = run.quality
    found = look.written(numbers[look.name], 2)
    say(
      f'seed {run.config.seed}, {name}: {look.title} {found} on the test split'
    )
  return read_json(tested)


def _test(run: Run, name: str, scale: float) -> dict[str, Any]:
  network = teacher = run.teacher()
  if name != TEACHER:
    own = with_method(run, name)
    stored = weights.load_weights(run.workdir.weights(place(name, scale)))
    network = own.network(name, own.model('student'), stored)
  apply, reference = (evaluation.apply(run, n) for n in (network, teacher))
  numbers = evaluation.evaluate(run, apply, 'test', teacher=reference)
  return numbers | {'parameters': weights.count(network.variables)[0]}


def train_step(run: Run, name: str) -> tuple[Callable, Any, Any]:
  """A method's compiled train step, its state, and a batch.

  Args:
    run: of a seed whose teacher is trained.
    name: the method.

  Returns:
    `(step, state, batch)`; `step(state, batch, rng)` is compiled and keeps
    the state that it is given.
  """
  own = with_method(run, name)
  c = own.config.distill
  link = distillation.link(own, own.model('student'), own.teacher(), 'distill')
  made = fit.make_step(own, 'distill', c.train, *link)
  step = sharding.compile_step(
    made.step,
    own.mesh,
    own.config.compiler,
    donate=False,
    layout=own.layout,
  )
  state = sharding.place_state(
    made.state, own.mesh, own.config.compiler, layout=own.layout
  )
  sharding.connect(own.mesh)
  part, parts = sharding.readers(own.mesh)
  batches = train_batches(
    own.transfer,
    batch_size=c.train.batch_size,
    seed=own.config.seed,
    part=part,
    parts=parts,
  )
  return step, state, sharding.shard_batch(next(batches), own.mesh)


def _times(
  config: ml_collections.ConfigDict, path: str | os.PathLike
) -> dict[str, dict[str, float]]:
  """Seconds of a step of every method, measured in turns after the training."""
  run, steps = open_run(config, path, 0), {}
  names = tuple(dict.fromkeys(('kd', *config.methods)))
  stored = mirror.resolve(path) / 'times.json'
  known = hosts.on_first(lambda: read_json(stored) if stored.exists() else {})
  if set(names) <= set(known):
    return known
  rng = jax.random.key(0)
  for name in names:
    step, state, batch = train_step(run, name)
    steps[name] = lambda _, s=step, x=state, b=batch: s(x, b, rng)
  times = measure.latencies(steps, np.zeros(0), runs=config.timing.runs)

  def kept():
    write_json(stored, times)
    return times

  return hosts.on_first(kept)


def _assemble(
  run: Run,
  rows: Mapping[str, Sequence[Mapping[str, Any]]],
  times: Mapping[str, Mapping[str, float]],
  chosen: Mapping[str, float],
  scales: Sequence[float],
) -> dict[str, Any]:
  c = run.config
  kd = times['kd']['median_ms']
  measured = run.task.measured(with_teacher=True)
  table = []
  for name, results in rows.items():
    method = methods.METHODS.get(name)
    terms = _terms(c, name, chosen[name]) if method else {}
    row = {
      'name': name,
      'title': method.title if method else 'teacher',
      'paper': method.paper if method else '',
      'terms': describe(terms) if method else 'cross-entropy',
      'scheme': dict(method.scheme) if method else {},
      'weights': method.weights if method else '',
      'scale': chosen[name],
      'parameters': results[0]['parameters'],
    }
    for metric in measured:
      row[metric] = [r[metric] for r in results]
    if name in times:
      row['step_ms'] = times[name]
      row['relative_step'] = times[name]['median_ms'] / kd
    table.append(row)
  return {
    'format': comparison.FORMAT,
    **assess.provenance(run),
    'teacher': c.teacher.model.to_dict(),
    'student': c.student.model.to_dict(),
    'train': json.loads(json.dumps(c.distill.train.to_dict())),
    'scales': list(scales),
    'seeds': len(next(iter(rows.values()))),
    'metrics': metrics.describe(measured),
    'rows': table,
  }
