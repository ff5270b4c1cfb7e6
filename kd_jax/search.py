"""The best network under a budget: `kd-jax compress`.

Owns the walk: candidates made from one trained network, what each costs before
any training, and the training of the few that are worth it. How a candidate is
pruned and quantized is `compression`; it learns from the network that it was
made from, so no teacher is needed.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from kd_jax import (
  adapters,
  assess,
  data,
  deploy,
  distillation,
  prune,
  quantize,
)
from kd_jax import rules as rules_lib
from kd_jax.compression import SPECS, Compression, Converted
from kd_jax.fit import Student, fit
from kd_jax.models import load_pretrained
from kd_jax.recipe import export_files
from kd_jax.report import measure
from kd_jax.run import Network, Run
from kd_jax.types import Variables
from kd_jax.weights import load_weights, save_weights
from kd_jax.workdir import Workdir, read_json, write_json

FORMAT = 'kd_jax.compressed.1'
_BUDGET = re.compile(r'(\d+(?:\.\d+)?) ?([KMG]?)(B|FLOP|ms)')
_COSTS = {'B': 'bytes', 'FLOP': 'flops', 'ms': 'ms'}
_STAGES = dict.fromkeys(('distill', 'alone'))
_PREFIX = {'': 1, 'K': 1e3, 'M': 1e6, 'G': 1e9}


class Budget(NamedTuple):
  """A limit.

  Attributes:
    cost: 'bytes' of the weights' file, 'flops' of one example, or 'ms' of one
      batch.
    limit: the largest cost allowed.
  """

  cost: str
  limit: float


def parse_budget(text: str) -> Budget:
  """A budget from a number and a unit.

  Args:
    text: such as '20 KB', '1.5 MFLOP' or '0.4 ms'; 1 KB is 1000 bytes.

  Raises:
    ValueError: for another text.

  Example:
    >>> parse_budget('20 KB'), parse_budget('0.4ms')
    (Budget(cost='bytes', limit=20000.0), Budget(cost='ms', limit=0.4))
  """
  match = _BUDGET.fullmatch(text.strip())
  if match is None or (match[3] == 'ms' and match[2]):
    raise ValueError(
      f"{text!r} is no budget: use a size such as '20 KB', FLOPs such as "
      "'1.5 MFLOP', or a latency such as '0.4 ms'."
    )
  return Budget(_COSTS[match[3]], float(match[1]) * _PREFIX[match[2]])


class _Candidate(NamedTuple):
  """A network that could be trained.

  Attributes:
    name: of its directory.
    channels: share of the units that were removed.
    weights: name of the weights' format.
    overrides: for `prune.resized`.
    compression: its recipe.
    converted: its integers without training.
  """

  name: str
  channels: float
  weights: str
  overrides: dict[str, dict[str, int]]
  compression: Compression
  converted: Converted


def open_run(
  config: ml_collections.ConfigDict, path: str, stage: str, workdir: str
) -> Run:
  """The run of a search, in a directory of its own.

  Args:
    config: of `configs/compress.py`.
    path: the trained model: a work directory of `kd-jax run`, whose data and
      student replace those of the configuration, or a safetensors file.
    stage: whose student of a work directory: 'distill' or 'alone'.
    workdir: where everything is written.

  Raises:
    ValueError: if the model or its stage is missing, or the directory belongs
      to another search.
  """
  config = ml_collections.ConfigDict(config.to_dict())
  config.search.model = str(Path(path).resolve())
  if Path(path).is_dir():
    stored = Workdir(path)
    rules_lib.choose('stage with a student', stage, _STAGES)
    stored.weights(stage)
    config.search.stage = stage
    with config.unlocked():
      for key in ('data', 'student', 'seed'):
        value = stored.config[key]
        value = ml_collections.ConfigDict(value) if key != 'seed' else value
        config[key] = value
      reused = stored.config['distill']['scheme']['reuse_head']
      config.distill.scheme.reuse_head = reused and stage == 'distill'
  elif not Path(path).is_file():
    raise ValueError(
      f'--model={path} is neither a work directory of kd-jax run nor a '
      'safetensors file.'
    )
  parse_budget(config.search.budget)
  opened = Run(config, Workdir(workdir, config.to_dict()))
  if 'validation' not in opened.splits:
    raise ValueError(
      'The search chooses on held-out images: data.validation must not be 0.'
    )
  return opened


def _dense(run: Run) -> Network:
  """The network to compress."""
  c, model = run.config.search, run.model('student')
  path = Path(c.model)
  if path.is_dir():
    variables = load_weights(Workdir(path).weights(c.stage))
  else:
    try:
      variables = load_weights(path)
    except ValueError:
      shape = run.example['image'].shape[1:]
      variables = load_pretrained(path, model, input_shape=shape)
  return run.network('dense', model, variables)


def compress(run: Run, *, say: Any = print) -> dict[str, Any]:
  """Walks the candidates and trains the best of those that fit the budget.

  Channels leave by magnitude, in the shares of `search.channels`, and weights
  are stored in the formats of `search.weights`; 'mixed' gives each kernel 8 or
  4 bits by its sensitivity, as the size budget allows. All are quantized after
  training first, which gives their cost and a first accuracy. Of those within
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
    ValueError: if no candidate fits the budget.
  """
  if run.workdir.done('search'):
    return run.workdir.result('search')
  run.workdir.write_config()
  budget = parse_budget(run.config.search.budget)
  dense = _dense(run)
  rows, candidates, sensitivity = _untrained(run, dense, budget)
  fitting = [n for n, row in rows.items() if row['within']]
  if not fitting:
    least = min(rows.values(), key=lambda row: row[budget.cost])
    raise ValueError(
      f'No candidate fits {run.config.search.budget}: the cheapest, '
      f'{least["name"]}, needs {least[budget.cost]:g} {budget.cost}.'
    )
  finalists = _finalists(rows, fitting, budget, run.config.search.finalists)
  for name in finalists:
    say(f'{name}: {rows[name][budget.cost]:g} {budget.cost}, training')
    rows[name] |= _train(run, dense, candidates[name])
    say(f'{name}: validation accuracy {rows[name]["trained"]:.2%}')
  best = max(finalists, key=lambda name: rows[name]['trained'])
  rows[best]['chosen'] = True
  result = {
    'budget': budget._asdict(),
    'dense': _dense_row(run, dense),
    'candidates': list(rows.values()),
    'sensitivity': sensitivity,
    **_publish(run, dense, candidates[best]),
  }
  run.workdir.finish('search', result)
  return result


def _untrained(run, dense, budget):
  """What each candidate costs, and how good it is without training."""
  model, batches = run.model('student'), _calibration(run)
  formats = list(run.config.search.weights)
  if 'mixed' in formats and 'int8' not in formats[: formats.index('mixed')]:
    raise ValueError("search.weights: 'mixed' needs 'int8' before it.")
  shares = sorted({float(s) for s in run.config.search.channels})
  rows, candidates = {}, {}
  measured = _sensitivities(run, model, dense.variables, batches, {})
  sensitivity = [[row.path, row.option.bits, row.loss] for row in measured]
  for share in shares:
    variables, overrides = _smaller(run, model, dense.variables, share)
    for weights in formats:
      name = f'{weights}-{round(100 * share)}'
      if weights == 'mixed':
        whole = rows[f'int8-{round(100 * share)}']['bytes']
        rules = _mixed(run, model, variables, batches, budget, overrides, whole)
      else:
        rules = _uniform(run, weights)
      if rules is None:
        continue
      compression, converted = _quantized(
        run, rules, variables, batches, overrides
      )
      made = _Candidate(name, share, weights, overrides, compression, converted)
      candidates[name] = made
      rows[name] = {'name': name, 'channels': share, 'weights': weights}
      rows[name] |= _cost(run, _network(made, converted), name)
      rows[name]['untrained'] = _accuracy(run, made, made.converted)
      rows[name] |= {'trained': None, 'chosen': False}
  latency = _latencies(run, dense, candidates)
  for name, row in rows.items():
    row['ms'] = latency[name]['median_ms']
    row['within'] = bool(row[budget.cost] <= budget.limit)
  return rows, candidates, sensitivity


def _calibration(run: Run) -> list[Any]:
  """A few pre-processed batches of the train split, without augmentation."""
  train = run.splits['train']
  size = min(run.config.eval_batch_size, len(train))
  batches = data.train_batches(train, batch_size=size, seed=run.config.seed)
  count = run.config.search.calibration_batches
  return [run.preprocess(next(batches), train=False) for _ in range(count)]


def _sensitivities(run, model, variables, batches, overrides):
  """The loss of 8 and of 4 bits, for one kernel at a time."""
  specs = [SPECS['weights'][name] for name in ('int8', 'int4')]
  interceptors = (prune.resized(overrides),)
  forward = deploy.evaluation(model, interceptors=interceptors)(_unchanged)
  return quantize.sensitivity(
    forward, variables, batches, _kernels(run), quantize.weight_options(specs)
  )


def _unchanged(next_fun, args, kwargs, context):
  return next_fun(*args, **kwargs)


def _kernels(run: Run) -> list[tuple[str, bool | None]]:
  """The weights that the recipe quantizes."""
  return [
    (pattern, None if name == 'float' else True)
    for pattern, name in run.config.compress.quantize.weights
  ]


def _smaller(run, model, variables, share):
  """The network without a share of its units, and what runs it."""
  if not share:
    return variables, {}
  forward = adapters.from_linen(model)
  plan = _plan(run, model, variables)
  scores = prune.magnitudes(variables['params'])
  kept = prune.choose_units(
    plan, scores, share, multiple_of=run.config.search.multiple_of
  )
  prune.check_shrunk(plan, kept, forward, variables, run.example)
  return prune.shrink(plan, variables, kept), plan.overrides(kept)


def _plan(run, model, variables) -> prune.Plan:
  forward = adapters.from_linen(model)
  keep = run.config.compress.prune.keep
  plan = prune.find_groups(forward, variables, run.example, keep=keep)
  if not plan.groups:
    raise ValueError(
      'No channel can leave this model: search.channels must be (0.0,).'
    )
  return plan


def _uniform(run, weights):
  """The rules of one format for all quantized weights."""
  rules_lib.choose('format of search.weights', weights, SPECS['weights'])
  patterns = run.config.compress.quantize.weights
  return tuple((p, n if n == 'float' else weights) for p, n in patterns)


def _mixed(run, model, variables, batches, budget, overrides, whole):
  """8 or 4 bits for each kernel, or None if that is no choice.

  Args:
    whole: bytes of the same network with 8 bits everywhere.
  """
  if budget.cost != 'bytes':
    return None
  rows = _sensitivities(run, model, variables, batches, overrides)
  costs = quantize.size_costs(variables['params'], rows)
  # What is no kernel is stored whatever the bits are.
  eight = sum(c for (_, spec), c in costs.items() if spec.bits == 8)
  try:
    found = quantize.allocate(rows, costs, budget.limit - (whole - eight))
  except ValueError:
    return None
  bits = {spec.bits for _, spec in found.rules}
  if len(bits) == 1:
    return None
  return tuple((pattern, f'int{spec.bits}') for pattern, spec in found.rules)


def _quantized(
  run, rules, variables, batches, overrides
) -> tuple[Compression, Converted]:
  """A network's recipe, and its integers without training."""
  recipe = ml_collections.ConfigDict(run.config.compress.to_dict())
  recipe.quantize.weights = rules
  epoch_steps = data.batches_per_epoch(run.transfer, recipe.train.batch_size)
  interceptors = (prune.resized(overrides),)
  compression = Compression(
    recipe,
    run.model('student'),
    variables,
    batches[0],
    steps=recipe.train.epochs * epoch_steps,
    epoch_steps=epoch_steps,
    interceptors=interceptors,
  )
  integers = deploy.post_training_quantize(
    run.model('student'),
    variables,
    batches,
    weight_rules=compression.rules('weights'),
    activation_rules=compression.rules('activations'),
    observer=compression.observer(),
    weight_observer=compression.weight_observer(),
    interceptors=interceptors,
  )
  return compression, Converted(integers, {}, {})


def _network(candidate: _Candidate, converted: Converted, **options) -> Network:
  make = functools.partial(
    candidate.compression.integer_forward, converted.overrides, **options
  )
  return Network(candidate.name, make, converted.variables)


def _accuracy(run, candidate, converted, split='validation') -> float:
  network = _network(candidate, converted)
  return run.evaluate(run.apply(network), split)['accuracy']


def _dense_row(run: Run, dense: Network) -> dict[str, Any]:
  accuracy = run.evaluate(run.apply(dense), 'validation')['accuracy']
  return {
    'name': dense.name,
    'accuracy': accuracy,
    **_cost(run, dense, 'dense'),
  }


def _cost(run: Run, network: Network, name: str) -> dict[str, Any]:
  """Bytes of the weights' file, and FLOPs."""
  path = run.workdir.stage(f'candidates/{name}') / 'untrained.safetensors'
  save_weights(path, network.variables)
  image = np.zeros((1, *run.splits['train'].image_shape), np.uint8)
  macs = measure.multiply_accumulates(
    deploy.from_images(network.forward, run.preprocess),
    network.variables,
    image,
  )
  size = path.stat().st_size
  path.unlink()
  return {'bytes': size, 'flops': 2 * macs}


def _latencies(run: Run, dense: Network, candidates: Mapping[str, _Candidate]):
  """name -> times of a batch, of all candidates in turns."""
  size = run.config.search.latency_batch
  train = run.splits['train']
  images = train.read(np.arange(min(size, len(train))))['image']
  applies = {
    name: run.apply(_network(made, made.converted))
    for name, made in candidates.items()
  }
  applies['dense'] = run.apply(dense)
  return measure.latencies(
    {n: lambda x, f=f: f({'image': x}) for n, f in applies.items()},
    np.resize(images, (size, *images.shape[1:])),
  )


def _finalists(rows, fitting, budget, count) -> list[str]:
  """The candidates to train: of each format the costliest comes first."""
  if count < 1:
    raise ValueError(f'search.finalists={count} is not 1 or more.')
  formats: dict[str, list[str]] = {}
  for name in sorted(fitting, key=lambda n: rows[n][budget.cost], reverse=True):
    formats.setdefault(rows[name]['weights'], []).append(name)
  order = []
  for rank in range(max(map(len, formats.values()))):
    ranked = [names[rank] for names in formats.values() if rank < len(names)]
    order += sorted(ranked, key=lambda n: rows[n]['untrained'], reverse=True)
  return order[:count]


def _train(run: Run, dense: Network, candidate: _Candidate) -> dict[str, Any]:
  """Trains a candidate, unless that was done, and converts it."""
  where = f'candidates/{candidate.name}'
  compression = candidate.compression
  if not run.workdir.done(where):
    student = Student(
      compression.make,
      compression.start(),
      params_fn=compression.params_fn,
      wrap=compression.wrap,
      finish=compression.finish,
    )
    objective = distillation.compress_objective(run, dense)
    result = fit(
      run,
      where,
      run.config.compress.train,
      objective,
      student,
      teacher=dense,
      key=f'compress/{candidate.name}',
    )
    run.workdir.finish(where, result)
  converted = _converted(run, candidate)
  accuracy = _accuracy(run, candidate, converted)
  network = _network(candidate, converted)
  return {'trained': accuracy, **_cost(run, network, candidate.name)}


def _converted(run: Run, candidate: _Candidate) -> Converted:
  weights = run.workdir.weights(f'candidates/{candidate.name}')
  return candidate.compression.convert(load_weights(weights))


def _publish(run, dense, candidate) -> dict[str, Any]:
  """Writes the artefact, and measures it on the test split."""
  converted = _converted(run, candidate)
  directory = run.workdir.stage('artefact')
  save_weights(directory / 'weights.safetensors', converted.variables)
  quantized = candidate.compression.recipe.quantize
  about = {
    'format': FORMAT,
    'model': run.config.student.model.to_dict(),
    'classes': list(run.splits['test'].class_names),
    'overrides': [candidate.overrides, converted.overrides],
    'weights': [list(rule) for rule in quantized.weights],
    'activations': [list(rule) for rule in quantized.activations],
  }
  write_json(directory / 'compressed.json', about)
  made = functools.partial(_network, candidate, converted)
  export_files(run, made, directory)
  test = {
    'name': candidate.name,
    'dense': run.evaluate(run.apply(dense), 'test')['accuracy'],
    'accuracy': run.evaluate(run.apply(made()), 'test')['accuracy'],
    'examples': len(run.splits['test']),
  }
  return {
    'test': test,
    'layers': assess.layers(run.example, dense, made()),
    'integers': candidate.compression.parity(converted, _calibration(run)[0]),
  }


def load_compressed(
  directory: str, model: adapters.LinenModule, **options: Any
) -> tuple[Any, Variables]:
  """The integer network of an `artefact/`, to run in JAX.

  Args:
    directory: what `kd-jax compress` wrote.
    model: the module that was compressed, as it is written.
    **options: others of `deploy.integer_forward`.

  Returns:
    `(forward, variables)`.

  Raises:
    ValueError: if the files are missing or were not written by kd_jax.
  """
  path = Path(directory)
  about = read_json(path / 'compressed.json')
  if about.get('format') != FORMAT:
    raise ValueError(
      f'{path / "compressed.json"} holds {about.get("format")!r}, not '
      f'{FORMAT!r}.'
    )
  rules = [
    (p, rules_lib.choose('activations format', name, SPECS['activations']))
    for p, name in about['activations']
  ]
  interceptors = [prune.resized(overrides) for overrides in about['overrides']]
  forward = deploy.integer_forward(
    model, interceptors=interceptors, dynamic=rules, **options
  )
  return forward, load_weights(path / 'weights.safetensors')
