"""The main job as stages, from teacher to report.

Owns their order (teacher, alone, distill, compress, convert, export, report)
and what each reads and writes; the parts are other modules'. A stage reads the
results of the stages before it from the work directory and writes its own; a
finished stage is skipped, a killed one continues. What a stage does is calls of
library functions: read this file to learn how they fit together.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from kd_jax import adapters, parity, rules
from kd_jax.export import exporters
from kd_jax.recipe import (
  assess,
  cached_teacher,
  distillation,
  evaluation,
  origin,
  schemes,
)
from kd_jax.recipe.compression import Compression
from kd_jax.recipe.fit import Result, Student, fit
from kd_jax.recipe.network import Network
from kd_jax.recipe.run import Run
from kd_jax.report import names, write_report
from kd_jax.sharding import hosts, preemption
from kd_jax.storage import lock
from kd_jax.storage.weights import load_weights, save_weights


def train_alone(run: Run) -> Result:
  """Trains the student on the labels, without the teacher."""
  c, student = run.config.alone.train, untaught(run)
  return fit(run, 'alone', c, run.task.labels(), student)


def untaught(run: Run) -> Student:
  """The student that learns without a teacher, to train."""
  model = run.model('alone')
  variables = adapters.init_linen(model, run.rng('alone'), run.example)
  return Student(functools.partial(adapters.from_linen, model), variables)


def compress(run: Run) -> Result:
  """Prunes and fake-quantizes the distilled student while distilling on."""
  c, compression = run.config.compress, run.compression
  teacher = compress_teacher(run)
  student = student_of(compression)
  objective = distillation.compress_objective(run, teacher)
  result = fit(run, 'compress', c.train, objective, student, teacher=teacher)
  phases = [phase._asdict() for phase in compression.phases()]
  words = [f'{p["name"]} {p["begin"]}-{p["end"]}' for p in phases]
  return result | {'phases': phases, 'note': f' ({", ".join(words)})'}


def compress_teacher(run: Run) -> Network:
  """Who teaches while the student is compressed."""
  teachers: dict[str, Callable[[Run], Network]] = {
    'teacher': cached_teacher.open_teacher,
    'student': lambda run: run.student('distill'),
  }
  name = run.config.compress.teacher
  return rules.choose('compress.teacher', name, teachers)(run)


def student_of(compression: Compression) -> Student:
  """The network of a recipe of compression, to train."""
  return Student(
    compression.make,
    compression.start(),
    params_fn=compression.params_fn,
    wrap=compression.wrap,
    finish=compression.finish,
  )


def convert(run: Run) -> Result:
  """Removes pruned units, folds BatchNorm and makes integers."""
  variables = load_weights(run.workdir.weights('compress'))
  converted = run.compression.convert(variables)
  directory = run.workdir.stage('convert')
  save_weights(directory / 'weights.safetensors', converted.variables)
  return {'overrides': converted.overrides}


def export(run: Run) -> Result:
  """Writes the integer student for servers, and compares each file with it."""
  directory, integer = run.workdir.stage('export'), run.integer()
  simulated = run.integer(simulate=True)
  return {
    'exports': export_files(run, integer, simulated, directory),
    'parity': _parities(run, integer, directory),
    'note': exporters.left_out(),
  }


def export_files(
  run: Run, integer: Network, simulated: Network, directory: Path
) -> dict[str, Any]:
  """Writes an integer network in the formats of `exporters`.

  Args:
    run: whose input it is for.
    integer: the network.
    simulated: the same with products in float, `simulate=True`.
    directory: where to.

  Returns:
    What `exporters.write` says of each.
  """
  test = run.splits['test']
  model = exporters.Model(
    integer=evaluation.from_raw(run, integer),
    simulated=evaluation.from_raw(run, simulated),
    variables=integer.variables,
    input=jax.ShapeDtypeStruct((1, *test.input.shape), test.input.dtype),
    golden=evaluation.raw(run, 'test', min(8, len(test))),
    class_names=test.class_names,
    reads=run.task.reads,
    metadata={
      'config': run.workdir.fingerprint,
      'dataset': run.config.data.name,
    },
  )
  return exporters.write(model, directory)


def _parities(
  run: Run, network: Network, directory: Path
) -> list[dict[str, Any]]:
  """Each form of the integer student against the form it came from."""
  integer, compressed = evaluation.apply(run, network), run.compressed()
  pairs: list[tuple[str, evaluation.Apply, str, evaluation.Apply]] = [
    (
      names.INTEGER,
      integer,
      compressed.name,
      evaluation.apply(run, compressed),
    )
  ]
  for name, apply in exporters.load(directory).items():
    pairs.append((name, apply, names.INTEGER, integer))
  found = []
  for name, apply, against, reference in pairs:
    compared = parity.compare(
      apply,
      reference,
      (
        {**batch, **run.known(batch)}
        for batch in evaluation.batches(run, 'test')
      ),
      agree=run.task.agree,
      reads=run.task.reads,
    )
    if against == names.INTEGER:
      parity.require(
        compared, name=name, agreement=run.config.aims.export_agreement
      )
    numbers = compared._asdict()
    if math.isinf(compared.sqnr_db):  # equal outputs; JSON has no infinity
      numbers['sqnr_db'] = None
    found.append({'name': name, 'against': against} | numbers)
  return found


def report(run: Run) -> Result:
  """Measures every network on the test split and writes the report."""
  assembled = assess.assemble(run)
  write_report(assembled, run.workdir.stage('report'))
  return {'models': assembled['models'], 'aims': assembled['aims']}


STAGES: dict[str, Callable[[Run], Result]] = {
  'teacher': distillation.fit_teachers,
  'alone': train_alone,
  'distill': distillation.distill,
  'compress': compress,
  'convert': convert,
  'export': export,
  'report': report,
}
# Nothing is trained here: process 0 works on its own devices, others wait.
ALONE = ('convert', 'export', 'report')


def run_stages(
  run: Run,
  stages: Sequence[str] = (),
  *,
  overwrite: bool = False,
  say: Callable[[str], None] = hosts.say,
) -> None:
  """Runs the stages that are not finished, in order.

  Args:
    run: the configuration and its work directory.
    stages: names of `STAGES`; all when empty.
    overwrite: run the stages again, finished or not; the results of the
      stages that come after them are deleted, because they are stale.
    say: prints one line.

  Raises:
    ValueError: for an unknown stage, one whose predecessors are missing or
      damaged, schemes that do not go together, other data than before, or if
      another process runs here.
    Preempted: after SIGTERM or SIGINT, see `preemption`.
  """
  order = list(STAGES)
  for name in stages:
    rules.choose('stage', name, STAGES)
  chosen = [name for name in order if name in (stages or order)]
  with lock.exclusive(run.workdir.place):
    if overwrite:
      for name in order[order.index(chosen[0]) :]:
        run.workdir.clear(name)
    if not all(map(run.workdir.finished, chosen)):
      schemes.check(run.config.distill.scheme)
      origin.record(run, say=say)
    for name in chosen:
      preemption.poll()
      if run.workdir.finished(name):
        hosts.together(functools.partial(run.workdir.verify, name))
        say(f'{name}: already done in {run.workdir.place / name}')
        continue
      stage = functools.partial(STAGES[name], run)
      result = hosts.on_first(stage) if name in ALONE else stage()
      run.workdir.finish(name, result)
      say(f'{name}: done{_spent(result)}{result.get("note", "")}')


def _spent(result: Mapping[str, Any]) -> str:
  if 'train_seconds' not in result:
    return ''
  return f', {result["steps"]} steps in {result["train_seconds"]:.0f} s'
