"""What the commands of `cli` do, once their flags are parsed.

Owns the order of calls and what is printed at the end; flags and messages of
wrong ones are `cli`'s, and the work is `recipe`'s, `plan`'s and `launch`'s.
"""

import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from kd_jax import launch as launch_lib
from kd_jax import metrics, models, optim, tasks, terms
from kd_jax import plan as plan_lib
from kd_jax import report as report_lib
from kd_jax.export import exporters
from kd_jax.recipe import (
  assess,
  distillation,
  fields,
  origin,
  search,
  shrunk,
  stages,
  words,
)
from kd_jax.recipe import compare as compare_lib
from kd_jax.recipe.run import Run
from kd_jax.report import comparison, tradeoff
from kd_jax.report.looks import looks_of
from kd_jax.report.plan import print_plan
from kd_jax.report.units import count, size
from kd_jax.sharding import hosts, processes
from kd_jax.storage import mirror
from kd_jax.storage.workdir import Workdir, flatten, frozen, write_json
from kd_jax.train import compile_cache


def run(values: Any) -> int:
  """`kd-jax run`."""
  compile_cache.enable(values.compile_cache)
  if 'config' in values:
    config = values.config.to_dict()
    workdir = hosts.together(lambda: Workdir(values.workdir, config))
    made = Run(values.config, workdir, profile=values.profile)
  else:
    made = hosts.together(
      lambda: _stored(values.workdir, profile=values.profile)
    )
    workdir = made.workdir
  _agree(workdir.config, stages=values.stages, overwrite=values.overwrite)
  plan_lib.check(made, values.stages, overwrite=values.overwrite)
  stages.run_stages(made, values.stages, overwrite=values.overwrite)
  if hosts.is_first() and workdir.done('report'):
    _print_report(workdir)
  return 0


def compare(values: Any) -> int:
  """`kd-jax compare`."""
  compile_cache.enable(values.compile_cache)
  _agree(values.config.to_dict())
  result = compare_lib.compare(values.config, values.workdir)
  if hosts.is_first():
    comparison.print_table(result)
    print(f'Table and plot: {values.workdir}/comparison.md, comparison.png')
  return 0


def compress(values: Any) -> int:
  """`kd-jax compress`."""
  compile_cache.enable(values.compile_cache)
  config = values.recipe
  config.search.budget = values.budget
  _agree(config.to_dict(), model=values.model, stage=values.stage)
  changed = config_flags.get_override_values(values['recipe'])
  opened = hosts.together(
    lambda: search.open_run(
      config, values.model, values.stage, values.workdir, changed=changed
    )
  )
  plan_lib.check(opened, ['compress'])
  result = search.compress(opened)
  if hosts.is_first():
    tradeoff.print_table(result)
    with mirror.written(values.workdir) as directory:
      names = [p.name for p in tradeoff.write(result, directory).values()]
    place = opened.workdir.place
    print(f'Artefact: {place / "artefact"}')
    print(f'Tables and plots: {", ".join(str(place / n) for n in names)}')
  return 0


def cache_teacher(values: Any) -> int:
  """`kd-jax cache-teacher`."""
  compile_cache.enable(values.compile_cache)
  config = values.config.to_dict()
  options = ('out', 'dtype', 'top_k', 'features', 'epochs', 'overwrite')
  _agree(config, **{name: values[name].value for name in options})
  workdir = hosts.together(lambda: Workdir(values.workdir, config))
  out = values.out or str(workdir.place / 'teacher_cache')
  manifest = distillation.cache_teacher(
    Run(values.config, workdir),
    out,
    dtype=values.dtype,
    top_k=values.top_k,
    features=values.features,
    epochs=values.epochs,
    overwrite=values.overwrite,
  )
  stored = sum(n for _, n in manifest['shards'].values())
  hosts.say(
    f'Teacher cache: {out}, {size(stored)} in {len(manifest["shards"])} '
    f'files. Train with it: --config.teacher.cache={out}'
  )
  return 0


def evaluate(values: Any) -> int:
  """`kd-jax evaluate`."""
  stored = _stored(values.workdir)
  splits = ('train', 'validation', 'test')
  if values.split not in splits:
    raise ValueError(f'--split={values.split}: use one of {", ".join(splits)}.')
  origin.check(stored)
  found = assess.applies(stored, assess.networks(stored))
  scores = assess.scores(stored, found, values.split)
  examples = len(stored.splits[values.split])
  table = Table(title=f'{values.split} split, {examples} examples, last step')
  looks = looks_of(
    {'metrics': metrics.describe(stored.task.measured(with_teacher=True))}
  )
  table.add_column('model')
  for look in looks:
    table.add_column(look.title, justify='right')
  for name, numbers in scores.items():
    table.add_row(name, *(look.written(look.of(numbers), 2) for look in looks))
  Console().print(table)
  return 0


def shrink(values: Any) -> int:
  """`kd-jax shrink`."""
  stored = _stored(values.workdir)
  made = shrunk.shrink_student(
    stored,
    values.stage,
    sparsity=values.sparsity,
    structure=values.structure,
    scope=values.scope,
    keep=values.keep,
    multiple_of=values.multiple_of,
    overwrite=values.overwrite,
  )
  print(made.plan)
  left, units = map(sum, zip(*made.kept.values(), strict=True))
  kind = values.structure.replace('_', ' ')
  table = Table(title=f'{values.stage}, {units - left} of {units} {kind} gone')
  table.add_column('')
  for column in ('FLOPs', 'parameters', 'size'):
    table.add_column(column, justify='right')
  for name, cost in (('before', made.before), ('after', made.after)):
    numbers = count(cost.flops), count(cost.parameters), size(cost.bytes)
    table.add_row(name, *numbers)
  Console().print(table)
  print(f'Weights and overrides: {made.directory}')
  return 0


def report(values: Any) -> int:
  """`kd-jax report`."""
  stored = _stored(values.workdir)
  if not stored.workdir.done('report'):
    stages.run_stages(stored, ['report'])
  _print_report(stored.workdir)
  return 0


def _agree(config: Mapping[str, Any], **options: Any) -> None:
  """Refuses processes that were not started alike, before anything is made."""
  settings = {
    key: value
    for key, value in flatten(config).items()
    if key != 'data.data_dir'  # hosts may keep their data where they like
  }
  processes.check_agreement(settings | options)


def launch(values: Any) -> int:
  """`kd-jax launch`."""
  fields.check(values.config)
  return launch_lib.launch(values.place, values, values.config.to_dict())


def plan(values: Any) -> int:
  """`kd-jax plan`."""
  path = pathlib.Path(values.json) if values.json else None
  if path and path.exists() and not values.overwrite:
    raise ValueError(f'{path} exists: give --overwrite to replace it.')
  if values.topology:
    # The compiler alone is used, and no chip that may be there.
    jax.config.update('jax_platforms', 'cpu')
  words = {'all': list(plan_lib.ALTERNATIVES), 'none': []}
  made = plan_lib.plan(
    values.config,
    values.topology,
    stage=values.stage,
    alternatives=words.get(','.join(values.what_if), values.what_if),
    estimate=values.estimate,
    measured=values.measure,
    examples=values.examples,
    say=lambda line: print(line, file=sys.stderr),
  ).as_dict()
  if path:
    write_json(path, made)
  print_plan(made)
  return 0


def _named(
  config: ml_collections.ConfigDict, workdir: Workdir
) -> Iterator[tuple[str, Mapping[str, Any]]]:
  """What a run names and a configuration file may register."""
  teacher, distill, compress = config.teacher, config.distill, config.compress
  yield config.data.task, tasks.TASKS
  networks = [teacher.model, config.student.model, *teacher.others.values()]
  for model in (*networks, *distill.scheme.assistants.values()):
    yield model.name, models.MODELS
  for part in (distill, compress):
    for term in part.terms.values():
      yield term.name, terms.TERMS
  for part in (teacher, config.alone, distill, compress):
    yield part.train.optimizer.name, optim.OPTIMIZERS
    yield part.train.schedule, optim.SCHEDULES
  yield compress.prune.score, words.SCORES
  yield compress.quantize.observer, words.OBSERVERS
  yield compress.quantize.weight_observer, words.WEIGHT_OBSERVERS
  if workdir.done('export'):
    for name in workdir.result('export')['exports']:
      yield name, exporters.EXPORTERS


def _stored(path: str, **options: Any) -> Run:
  workdir = Workdir(path)
  config = ml_collections.ConfigDict(frozen(workdir.config))
  fields.check(config)
  for name, known in _named(config, workdir):
    if name not in known:
      raise ValueError(
        f'{path} is of a configuration file that registers {name!r}: give that '
        'file too, --config=FILE.'
      )
  return Run(config, workdir, **options)


def _print_report(workdir: Workdir) -> None:
  directory = workdir.stage('report')
  report_lib.print_table(report_lib.read_report(directory))
  place = workdir.place / 'report' / 'report.html'
  print(f'The whole report: {place}')
