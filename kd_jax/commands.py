"""What the commands of `cli` do, once their flags are parsed.

Owns the order of calls and what is printed at the end; flags and messages of
wrong ones are `cli`'s, and the work is `recipe`'s, `plan`'s and `launch`'s.
"""

import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from kd_jax import launch as launch_lib
from kd_jax import metrics, models, tasks
from kd_jax import plan as plan_lib
from kd_jax import report as report_lib
from kd_jax.recipe import assess, distillation, origin, search, shrunk, stages
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
  """`kd-jax run`: runs the stages that are not finished, prints the report.

  Args:
    values: the flags of the command, from `cli.parsing.parse`: `workdir`,
      `stages` (all when empty), `overwrite`, `profile`, `compile_cache`, and
      `config`, without which the directory's own is used.

  Returns:
    0, the exit code.

  Raises:
    ValueError: before anything is trained, for a word of the configuration
      that means nothing; for a directory of another one; see
      `stages.run_stages`.
    Preempted: after a signal, once what could be saved was.

  Example:
    >>> from kd_jax.cli import parsing
    >>> words = ['--workdir=runs/none', '--config=configs/digits.py']
    >>> run(parsing.parse('run', [*words, '--stages=distil']))
    Traceback (most recent call last):
    ...
    ValueError: Unknown stage 'distil': did you mean distill? (valid: teacher, \
alone, distill, compress, convert, export, report)
  """
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
  """`kd-jax compare`: methods over seeds, as a table and a plot.

  Args:
    values: the flags of the command, from `cli.parsing.parse`: `config`,
      with `methods`, `seeds` and `scales`, `workdir` and `compile_cache`.

  Returns:
    0, the exit code.

  Raises:
    ValueError: see `compare.compare`.
    Preempted: after a signal, once what could be saved was.

  Example:
    >>> from kd_jax.cli import parsing
    >>> words = ['--workdir=runs/none', '--config=configs/compare_digits.py']
    >>> compare(parsing.parse('compare', [*words, "--config.methods=('kdd',)"]))
    Traceback (most recent call last):
    ...
    ValueError: Unknown entry of methods 'kdd': did you mean kd or rkd or nkd?
  """
  compile_cache.enable(values.compile_cache)
  _agree(values.config.to_dict())
  result = compare_lib.compare(values.config, values.workdir)
  if hosts.is_first():
    comparison.print_table(result)
    print(f'Table and plot: {values.workdir}/comparison.md, comparison.png')
  return 0


def compress(values: Any) -> int:
  """`kd-jax compress`: the best smaller network within a budget.

  Args:
    values: the flags of the command, from `cli.parsing.parse`:
      `recipe`, `model` (a work directory or safetensors file), `stage`,
      `budget`, such as '20 KB', `workdir` and `compile_cache`.

  Returns:
    0, the exit code.

  Raises:
    ValueError: for a missing model or stage, and if nothing fits the budget;
      see `search.open_run` and `search.compress`.
    Preempted: after a signal, once what could be saved was.

  Example:
    >>> from kd_jax.cli import parsing
    >>> words = ['--recipe=configs/compress.py', '--workdir=runs/small']
    >>> words += ['--model=none.safetensors', '--budget=20 KB']
    >>> compress(parsing.parse('compress', words))
    Traceback (most recent call last):
    ...
    ValueError: --model=none.safetensors is neither a work directory of kd-jax \
run nor a safetensors file of this machine.
  """
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
  """`kd-jax cache-teacher`: writes what the teacher says of every example.

  Args:
    values: the flags of the command, from `cli.parsing.parse`:
      `config`, `workdir` with a trained teacher, `dtype`, `top_k`, `features`,
      `epochs`, `overwrite`, `compile_cache`, and `out`, where to: by default
      `teacher_cache` in the work directory.

  Returns:
    0, the exit code.

  Raises:
    ValueError: without a trained teacher, and otherwise as
      `distillation.cache_teacher` says.

  Example:
    >>> from kd_jax.cli import parsing
    >>> words = ['--config=configs/digits.py', '--workdir=kd_jax']
    >>> cache_teacher(parsing.parse('cache-teacher', words))
    Traceback (most recent call last):
    ...
    ValueError: kd_jax holds files but no config.json of kd-jax run; choose an \
empty or new directory.
  """
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
  """`kd-jax evaluate`: prints every metric of every trained network.

  Args:
    values: the flags of the command, from `cli.parsing.parse`:
      `workdir`, and `split`: 'train', 'validation' or 'test'.

  Returns:
    0, the exit code.

  Raises:
    ValueError: for another split, a directory that is no work directory, or
      other data than it was started with.

  Example:
    >>> from kd_jax.cli import parsing
    >>> evaluate(parsing.parse('evaluate', ['--workdir=runs/none']))
    Traceback (most recent call last):
    ...
    ValueError: runs/none is no work directory of kd-jax run.
  """
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
  """`kd-jax shrink`: a trained student with fewer channels or blocks.

  Args:
    values: the flags of the command, from `cli.parsing.parse`:
      `workdir`, `stage`, `sparsity` (the share that leaves, in [0, 1)),
      `structure`, `scope`, `keep`, `multiple_of` and `overwrite`.

  Returns:
    0, the exit code.

  Raises:
    ValueError: for a directory that is no work directory; see
      `shrunk.shrink_student`.

  Example:
    >>> from kd_jax.cli import parsing
    >>> shrink(parsing.parse('shrink', ['--workdir=runs/none']))
    Traceback (most recent call last):
    ...
    ValueError: runs/none is no work directory of kd-jax run.
  """
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
  """`kd-jax report`: prints the report of a run; makes it if it is not there.

  Args:
    values: the flags of the command, from `cli.parsing.parse`,
      of which it reads `workdir`.

  Returns:
    0, the exit code.

  Raises:
    ValueError: for a directory that is no work directory, or whose stages
      before the report are not finished.

  Example:
    >>> from kd_jax.cli import parsing
    >>> report(parsing.parse('report', ['--workdir=runs/none']))
    Traceback (most recent call last):
    ...
    ValueError: runs/none is no work directory of kd-jax run.
  """
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
  """`kd-jax launch`: prints or runs what starts a run on Cloud TPU.

  Args:
    values: the flags of the command, from `cli.parsing.parse`:
      `place`, `config`, and those of `launch.launch`'s options.

  Returns:
    The exit code, see `launch.launch`.

  Raises:
    ValueError: for options that cannot be.
    LaunchError: if a command of the launch fails.

  Example:
    >>> from kd_jax.cli import parsing
    >>> words = ['gke', '--config=configs/digits.py', '--workdir=runs/digits']
    >>> words += ['--name=a', '--accelerator=v6e-8', '--image=i', '--dry_run']
    >>> launch(parsing.parse('launch', words))
    Traceback (most recent call last):
    ...
    ValueError: --workdir=runs/digits would be lost with the machine: use a \
bucket, such as gs://BUCKET/runs/digits.
  """
  return launch_lib.launch(values.place, values, values.config.to_dict())


def plan(values: Any) -> int:
  """`kd-jax plan`: prints what a train step costs, here or on a topology.

  Args:
    values: the flags of the command, from `cli.parsing.parse`:
      `config`, `topology` (this process's devices when empty), `stage`,
      `what_if` (alternatives, 'all' or 'none'), `estimate`, `measure`,
      `examples`, and `json`, a file to write too, which `overwrite` replaces.

  Returns:
    0, the exit code.

  Raises:
    ValueError: if the file is there without `overwrite`; see `plan.plan`.
    ImportError: for a topology without libtpu.

  Example:
    >>> from kd_jax.cli import parsing
    >>> words = ['--config=configs/digits.py', '--json=README.md']
    >>> plan(parsing.parse('plan', words))
    Traceback (most recent call last):
    ...
    ValueError: README.md exists: give --overwrite to replace it.
  """
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


def _stored(path: str, **options: Any) -> Run:
  workdir = Workdir(path)
  config = ml_collections.ConfigDict(frozen(workdir.config))
  for name, known in (
    (config.data.task, tasks.TASKS),
    (config.teacher.model.name, models.MODELS),
    (config.student.model.name, models.MODELS),
  ):
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
