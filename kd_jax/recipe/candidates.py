"""Candidates of `kd-jax compress`: smaller forms of one trained network.

Owns how they are made and what each costs before any training, and which of
them are worth training. The walk is `search`; how a candidate is pruned and
quantized is `compression`.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections

from kd_jax import adapters, data, deploy, losses, prune, quantize
from kd_jax import rules as rules_lib
from kd_jax.recipe import evaluation
from kd_jax.recipe.compression import Compression, Converted
from kd_jax.recipe.network import Network
from kd_jax.recipe.run import Run
from kd_jax.recipe.words import (
  INTEGER_WEIGHTS,
  SPECS,
  Training,
  Uncompressed,
)
from kd_jax.report import measure
from kd_jax.storage.weights import save_weights

_BUDGET = re.compile(r'(\d+(?:\.\d+)?) ?([KMG]?)(B|FLOP|ms)')
_COSTS = {'B': 'bytes', 'FLOP': 'flops', 'ms': 'ms'}
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


class Candidate(NamedTuple):
  """A network that could be trained.

  Attributes:
    name: of its directory.
    neurons: share of the channels and heads that were removed.
    weights: name of the weights' format.
    overrides: for `prune.resized`.
    compression: its recipe.
    converted: its integers without training.
  """

  name: str
  neurons: float
  weights: str
  overrides: dict[str, dict[str, int]]
  compression: Compression
  converted: Converted


def price(
  run: Run, uncompressed: Network, budget: Budget
) -> tuple[dict[str, dict[str, Any]], dict[str, Candidate], list[Any]]:
  """Makes all candidates, and says what each costs and is without training.

  Args:
    run: of a search; `config.search` says which candidates there are.
    uncompressed: the network to make smaller.
    budget: the limit.

  Returns:
    name -> a row of the report; name -> candidate; and `[path, bits, loss]` for
    8 and 4 bits in one kernel of the uncompressed network at a time.

  Raises:
    ValueError: for an unknown format, or if no channel can leave the model.
  """
  model, batches = run.model('student'), calibration(run)
  formats = list(run.config.search.weights)
  if 'mixed' in formats and 'int8' not in formats[: formats.index('mixed')]:
    raise ValueError("search.weights: 'mixed' needs 'int8' before it.")
  shares = sorted({float(s) for s in run.config.search.neurons})
  rows: dict[str, dict[str, Any]] = {}
  candidates: dict[str, Candidate] = {}
  measured = _sensitivities(run, model, uncompressed.variables, batches, {})
  sensitivity = [[row.path, row.option.bits, row.loss] for row in measured]
  for share in shares:
    variables, overrides, gone = _smaller(
      run, model, uncompressed.variables, share
    )
    for weights in formats:
      name = f'{weights}-{100 * share:g}'
      if weights == 'mixed':
        whole = rows[f'int8-{100 * share:g}']['bytes']
        rules = _mixed(run, model, variables, batches, budget, overrides, whole)
      else:
        rules = _uniform(run, weights)
      if rules is None:
        continue
      compression, converted = _quantized(
        run, rules, variables, batches, overrides
      )
      made = Candidate(name, gone, weights, overrides, compression, converted)
      candidates[name] = made
      rows[name] = {'name': name, 'neurons': gone, 'weights': weights}
      rows[name] |= cost(run, network(made, converted, simulate=True), name)
      rows[name]['untrained'] = quality(run, made, made.converted)
      rows[name] |= {'trained': None, 'chosen': False}
  latency = _latencies(run, uncompressed, candidates)
  for name, row in rows.items():
    row['ms'] = latency[name]['median_ms']
    row['within'] = bool(row[budget.cost] <= budget.limit)
  return rows, candidates, sensitivity


def calibration(run: Run) -> list[Any]:
  """A few pre-processed batches of the train split, without augmentation."""
  train = run.splits['train']
  size = min(run.config.eval_batch_size, len(train))
  batches = data.train_batches(train, batch_size=size, seed=run.config.seed)
  count = run.config.search.calibration_batches
  return [run.preprocess(next(batches), train=False) for _ in range(count)]


def _sensitivities(
  run: Run,
  model: adapters.LinenModule,
  variables: Mapping[str, Any],
  batches: Sequence[Any],
  overrides: Mapping[str, Any],
) -> list[quantize.Sensitivity[quantize.QuantSpec]]:
  """The loss of 8 and of 4 bits, for one kernel at a time."""
  options = quantize.weight_options(INTEGER_WEIGHTS.values())
  interceptors = (prune.resized(overrides),)
  forward = deploy.evaluation(model, interceptors=interceptors)()
  return quantize.sensitivity(
    forward,
    variables,
    batches,
    _kernels(run),
    options,
    loss=None if run.task.classifies else losses.squared_error,
  )


def _kernels(run: Run) -> list[tuple[str, bool | None]]:
  """The weights that the recipe quantizes."""
  return [
    (pattern, None if name == 'float' else True)
    for pattern, name in run.config.compress.quantize.weights
  ]


def _smaller(
  run: Run,
  model: adapters.LinenModule,
  variables: Mapping[str, Any],
  share: float,
) -> tuple[Any, dict[str, dict[str, int]], float]:
  """The network without a share of its units, what runs it, and the share.

  The share that leaves is less where `multiple_of` rounds up what stays.
  """
  if not share:
    return variables, {}, 0.0
  forward = adapters.from_linen(model)
  plan = _plan(run, model, variables)
  scores = prune.magnitudes(variables['params'])
  kept = prune.choose_units(
    plan, scores, share, multiple_of=run.config.search.multiple_of
  )
  prune.check_shrunk(plan, kept, forward, variables, run.example)
  sizes = {group.name: group.size for group in plan.groups}
  gone = 1 - sum(map(len, kept.values())) / sum(sizes[n] for n in kept)
  return prune.shrink(plan, variables, kept), plan.overrides(kept), gone


def _plan(
  run: Run, model: adapters.LinenModule, variables: Mapping[str, Any]
) -> prune.Plan:
  forward = adapters.from_linen(model)
  keep = run.config.compress.prune.keep
  plan = prune.find_groups(forward, variables, run.example, keep=keep)
  if not plan.groups:
    raise ValueError(
      'No neuron can leave this model: search.neurons must be (0.0,).'
    )
  return plan


def _uniform(run: Run, weights: str) -> tuple[tuple[str, str], ...]:
  """The rules of one format for all quantized weights."""
  rules_lib.choose('search.weights', weights, SPECS['weights'])
  patterns = run.config.compress.quantize.weights
  return tuple((p, n if n == 'float' else weights) for p, n in patterns)


def _mixed(
  run: Run,
  model: adapters.LinenModule,
  variables: Mapping[str, Any],
  batches: Sequence[Any],
  budget: Budget,
  overrides: Mapping[str, Any],
  whole: int,
) -> Any:
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
  run: Run,
  rules: Any,
  variables: Mapping[str, Any],
  batches: Sequence[Any],
  overrides: Mapping[str, Any],
) -> tuple[Compression, Converted]:
  """A network's recipe, and its integers without training."""
  recipe = ml_collections.ConfigDict(run.config.compress.to_dict())
  recipe.quantize.weights = rules
  model, interceptors = run.model('student'), (prune.resized(overrides),)
  compression = Compression(
    recipe,
    Uncompressed(model, variables, batches[0], interceptors),
    Training.of(recipe.train, run.transfer),
  )
  integers = deploy.post_training_quantize(
    model,
    variables,
    batches,
    interceptors=interceptors,
    **compression.quantization.settings(),
  )
  return compression, Converted(integers, {}, {})


def network(
  candidate: Candidate, converted: Converted, **options: Any
) -> Network:
  """A candidate on integers.

  Args:
    candidate: whose code it is.
    converted: whose integers: before or after training.
    **options: of `deploy.integer_forward`.
  """
  make = functools.partial(
    candidate.compression.integer_forward, converted.overrides, **options
  )
  return Network(candidate.name, make, converted.variables)


def quality(run: Run, candidate: Candidate, converted: Converted) -> float:
  """How good a candidate on integers is on the held-out examples."""
  made = network(candidate, converted)
  return evaluation.quality(run, made, 'validation')


def cost(run: Run, network: Network, name: str) -> dict[str, Any]:
  """Bytes of the weights' file, and FLOPs where products are not integers."""
  file = f'untrained{jax.process_index()}.safetensors'
  path = run.workdir.stage(f'candidates/{name}') / file
  save_weights(path, network.variables)
  macs = evaluation.multiply_accumulates(run, network)
  size = path.stat().st_size
  path.unlink()
  return {'bytes': size, 'flops': 2 * macs}


def _latencies(
  run: Run, uncompressed: Network, candidates: Mapping[str, Candidate]
) -> dict[str, dict[str, float]]:
  """name -> times of a batch, of all candidates in turns."""
  applies = {
    name: evaluation.apply(run, network(made, made.converted))
    for name, made in candidates.items()
  }
  applies[uncompressed.name] = evaluation.apply(run, uncompressed)
  return measure.latencies(
    applies, evaluation.raw(run, 'train', run.config.search.latency_batch)
  )


def finalists(
  rows: Mapping[str, Mapping[str, Any]],
  fitting: Sequence[str],
  budget: Budget,
  count: int,
  *,
  worth: Callable[[float], float] = float,
) -> list[str]:
  """The candidates to train.

  Those that remove least come first: of each format of weights the costliest,
  in the order of how good they are without training; then the next ones.

  Args:
    rows: of `price`.
    fitting: names of those within the budget.
    budget: the limit.
    count: how many to train, at least 1.
    worth: of a row's 'untrained': more is better.

  Raises:
    ValueError: for another count.

  Example:
    >>> rows = {
    ...   name: {'weights': name[:4], 'bytes': size, 'untrained': 0.5}
    ...   for name, size in (('int8-0', 9), ('int8-50', 5), ('int4-0', 6))
    ... }
    >>> finalists(rows, list(rows), Budget('bytes', 10), 2)
    ['int8-0', 'int4-0']
  """
  if count < 1:
    raise ValueError(f'search.finalists={count} is not 1 or more.')
  formats: dict[str, list[str]] = {}
  for name in sorted(fitting, key=lambda n: rows[n][budget.cost], reverse=True):
    formats.setdefault(rows[name]['weights'], []).append(name)
  order = []
  for rank in range(max(map(len, formats.values()))):
    ranked = [names[rank] for names in formats.values() if rank < len(names)]
    order += sorted(
      ranked, key=lambda n: worth(rows[n]['untrained']), reverse=True
    )
  return order[:count]
