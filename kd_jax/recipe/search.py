"""The best network under a budget: `kd-jax compress`.

Owns the walk over the `candidates` made from one trained network, the training
of the few that are worth it, and the artefact. A candidate learns from the
network that it was made from, so no teacher is needed.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import ml_collections

from kd_jax import metrics
from kd_jax import rules as rules_lib
from kd_jax.models import load_pretrained
from kd_jax.recipe import artefact, assess, distillation, evaluation, origin
from kd_jax.recipe import candidates as candidates_lib
from kd_jax.recipe.compression import Converted
from kd_jax.recipe.fit import fit
from kd_jax.recipe.network import Network
from kd_jax.recipe.run import Run
from kd_jax.recipe.stages import export_files, student_of
from kd_jax.sharding import hosts
from kd_jax.storage import lock, mirror
from kd_jax.storage.weights import is_ours, load_weights
from kd_jax.storage.workdir import Workdir

_STAGES = dict.fromkeys(('distill', 'alone'))
# What a work directory brings with its network.
_STORED = ('data', 'student', 'seed')
_REPLACED = (*_STORED, 'teacher.model', 'distill.scheme.reuse_head')
_UNREAD = re.compile(
  r'(aims|alone)\.|teacher\.(?!model\b)|distill\.(?!scheme\.reuse_head$)'
  r'|compress\.teacher$|search\.(model|stage|budget)$'
)


def open_run(
  config: ml_collections.ConfigDict,
  path: str,
  stage: str,
  workdir: str,
  *,
  changed: Iterable[str] = (),
) -> Run:
  """The run of a search, in a directory of its own.

  Args:
    config: of `configs/compress.py`.
    path: the trained model: a work directory of `kd-jax run`, also 'gs://...',
      whose data, student and teacher's model replace those of the
      configuration, or a local safetensors file.
    stage: whose student of a work directory: 'distill' or 'alone'.
    workdir: where everything is written.
    changed: keys of the configuration that were asked for by name, of which
      none may be replaced.

  Raises:
    ValueError: if the model or its stage is missing, the directory belongs to
      another search, or a key of `changed` would be replaced or not be read.
  """
  for key in changed:
    if _UNREAD.match(key):
      raise ValueError(
        f'kd-jax compress does not read --recipe.{key}: it trains by compress, '
        'taught by the uncompressed network, and has --model, --stage and '
        '--budget.'
      )
  config = ml_collections.ConfigDict(config.to_dict())
  place = mirror.resolve(path)
  local = not mirror.is_remote(path)
  config.search.model = str(place.resolve() if local else path)
  if place.is_dir():
    stored = Workdir(path)
    for key in changed:
      if any(f'{key}.'.startswith(f'{whole}.') for whole in _REPLACED):
        raise ValueError(
          f'--recipe.{key} cannot be changed: it is that of the work directory '
          f'--model={path}.'
        )
    rules_lib.choose('stage', stage, _STAGES)
    stored.weights(stage)
    config.search.stage = stage
    with config.unlocked():
      for key in _STORED:
        value = stored.config[key]
        value = ml_collections.ConfigDict(value) if key != 'seed' else value
        config[key] = value
      reused = stored.config['distill']['scheme']['reuse_head']
      config.distill.scheme.reuse_head = reused and stage == 'distill'
      # A head that was reused is as wide as the teacher that it came from.
      teacher = stored.config['teacher']['model']
      config.teacher.model = ml_collections.ConfigDict(teacher)
  elif not local or not place.is_file():
    raise ValueError(
      f'--model={path} is neither a work directory of kd-jax run nor a '
      'safetensors file of this machine.'
    )
  candidates_lib.parse_budget(config.search.budget)
  opened = Run(config, Workdir(workdir, config.to_dict()))
  if 'validation' not in opened.splits:
    raise ValueError(
      'The search chooses on held-out examples: data.validation must not be 0.'
    )
  return opened


def uncompressed_network(run: Run) -> Network:
  """The network that a search is to compress."""
  c, model = run.config.search, run.model('student')
  path = mirror.resolve(c.model)
  if path.is_dir():
    variables = load_weights(Workdir(path).weights(c.stage))
  elif is_ours(path):
    variables = load_weights(path)
  else:
    shape = run.example[run.task.reads].shape[1:]
    variables = load_pretrained(path, model, input_shape=shape)
  return run.network('uncompressed', model, variables)


def compress(
  run: Run, *, say: Callable[[str], None] = hosts.say
) -> dict[str, Any]:
  """Walks the candidates and trains the best of those that fit the budget.

  Neurons leave by magnitude, in the shares of `search.neurons`, and weights
  are stored in the formats of `search.weights`; 'mixed' gives each kernel 8 or
  4 bits by its sensitivity, as the size budget allows. All are quantized after
  training first, which gives their cost and a first quality. Of those within
  the budget `search.finalists` are trained as `config.compress` says, with the
  uncompressed network as teacher: first the costliest of each format. The best
  of them on the validation split is the result. A walk that was stopped goes
  on where it was.

  Args:
    run: from `open_run`.
    say: prints one line.

  Returns:
    What `report.tradeoff.write` shows; the artefact is in `artefact/`.

  Raises:
    ValueError: if no candidate fits the budget, or another process runs here.
  """
  if run.workdir.finished('search'):
    return run.workdir.result('search')
  with lock.exclusive(run.workdir.place):
    origin.record(run, say=say)
    return _walk(run, say)


def _walk(run: Run, say: Callable[[str], None]) -> dict[str, Any]:
  budget = candidates_lib.parse_budget(run.config.search.budget)
  uncompressed = uncompressed_network(run)
  rows, candidates, sensitivity = candidates_lib.price(
    run, uncompressed, budget
  )
  # Each process makes the candidates; their times are those of the first.
  priced = rows
  rows = hosts.on_first(lambda: priced)
  fitting = [n for n, row in rows.items() if row['within']]
  if not fitting:
    least = min(rows.values(), key=lambda row: row[budget.cost])
    raise ValueError(
      f'No candidate fits {run.config.search.budget}: the cheapest, '
      f'{least["name"]}, needs {least[budget.cost]:g} {budget.cost}.'
    )
  count = run.config.search.finalists
  worth = run.task.worth
  finalists = candidates_lib.finalists(
    rows, fitting, budget, count, worth=worth
  )
  for name in finalists:
    say(f'{name}: {rows[name][budget.cost]:g} {budget.cost}, training')
    rows[name] |= _train(run, uncompressed, candidates[name])
    found = run.quality.written(rows[name]['trained'], 2)
    say(f'{name}: {run.quality.title} {found} on the validation split')
  best = max(finalists, key=lambda name: worth(rows[name]['trained']))
  rows[best]['chosen'] = True
  result = {
    'metrics': metrics.describe(run.task.metrics),
    'budget': budget._asdict(),
    'uncompressed': hosts.on_first(
      lambda: _uncompressed_row(run, uncompressed)
    ),
    'candidates': list(rows.values()),
    'sensitivity': sensitivity,
    'sensitivity_of': 'KL' if run.task.classifies else 'squared error',
    **hosts.on_first(lambda: _publish(run, uncompressed, candidates[best])),
  }
  run.workdir.finish('search', result)
  return result


def _uncompressed_row(run: Run, uncompressed: Network) -> dict[str, Any]:
  return {
    'name': uncompressed.name,
    'quality': evaluation.quality(run, uncompressed, 'validation'),
    **candidates_lib.cost(run, uncompressed, uncompressed.name),
  }


def _train(
  run: Run, uncompressed: Network, candidate: candidates_lib.Candidate
) -> dict[str, Any]:
  """Trains a candidate, unless that was done, and converts it."""
  where = f'candidates/{candidate.name}'
  compression = candidate.compression
  if not run.workdir.finished(where):
    student = student_of(compression)
    objective = distillation.compress_objective(run, uncompressed)
    result = fit(
      run,
      where,
      run.config.compress.train,
      objective,
      student,
      teacher=uncompressed,
      key=f'compress/{candidate.name}',
    )
    run.workdir.finish(where, result)
  return hosts.on_first(lambda: _trained(run, candidate))


def _trained(run: Run, candidate: candidates_lib.Candidate) -> dict[str, Any]:
  converted = _converted(run, candidate)
  quality = candidates_lib.quality(run, candidate, converted)
  network = candidates_lib.network(candidate, converted, simulate=True)
  return {
    'trained': quality,
    **candidates_lib.cost(run, network, candidate.name),
  }


def _converted(run: Run, candidate: candidates_lib.Candidate) -> Converted:
  weights = run.workdir.weights(f'candidates/{candidate.name}')
  return candidate.compression.convert(load_weights(weights))


def _publish(
  run: Run, uncompressed: Network, candidate: candidates_lib.Candidate
) -> dict[str, Any]:
  """Writes the artefact, and measures it on the test split."""
  converted = _converted(run, candidate)
  directory = run.workdir.stage('artefact')
  quantized = candidate.compression.recipe.quantize
  about = {
    'model': run.config.student.model.to_dict(),
    'classes': list(run.splits['test'].class_names),
    'overrides': [candidate.overrides, converted.overrides],
    'weights': [list(rule) for rule in quantized.weights],
    'activations': [list(rule) for rule in quantized.activations],
  }
  artefact.save(directory, converted.variables, about, artefact.COMPRESSED)
  made = candidates_lib.network(candidate, converted)
  simulated = candidates_lib.network(candidate, converted, simulate=True)
  export_files(run, made, simulated, directory)
  run.workdir.send('artefact')
  test = {
    'name': candidate.name,
    'uncompressed': evaluation.quality(run, uncompressed, 'test'),
    'quality': evaluation.quality(run, made, 'test'),
    'examples': len(run.splits['test']),
  }
  return {
    'test': test,
    'layers': assess.layers(run.example, uncompressed, simulated),
    'integers': candidate.compression.parity(
      converted, candidates_lib.calibration(run)[0]
    ),
  }
