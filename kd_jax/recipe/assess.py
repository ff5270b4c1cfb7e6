"""Measures every network of a finished run and assembles the report.

Owns what is measured and under which name; how it looks is `report`.
"""

import datetime
import functools
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np

from kd_jax import guard, metrics
from kd_jax.export import exporters
from kd_jax.prune import layer_costs, sparsity_report
from kd_jax.quantize import dequantize_params
from kd_jax.recipe import evaluation, origin, protocol
from kd_jax.recipe.evaluation import Apply
from kd_jax.recipe.network import Network
from kd_jax.recipe.run import Run
from kd_jax.report import measure, names
from kd_jax.report.units import decimals
from kd_jax.rules import leaf_names, named_leaves
from kd_jax.storage import weights
from kd_jax.types import Batch

TRAINED = {
  'teacher': names.TEACHER,
  'alone': names.ALONE,
  'distill': names.DISTILLED,
  'compress': names.COMPRESSED,
}
BATCHES = (1, 32)


def networks(run: Run) -> dict[str, Network]:
  """The networks in JAX of the finished stages, by stage."""
  make: dict[str, Callable[[], Network]] = {
    'teacher': run.teacher,
    'alone': functools.partial(run.student, 'alone'),
    'distill': functools.partial(run.student, 'distill'),
    'compress': run.compressed,
    'convert': run.integer,
  }
  return {s: f() for s, f in make.items() if run.workdir.done(s)}


def applies(run: Run, made: Mapping[str, Network]) -> dict[str, Apply]:
  """Everything that the run made, by name.

  Args:
    run: the run.
    made: of `networks`; the exports are read.
  """
  found: dict[str, Apply] = {
    n.name: evaluation.apply(run, n) for n in made.values()
  }
  if run.workdir.done('export'):
    run.workdir.verify('export')
    found |= exporters.load(run.workdir.stage('export'))
  return found


def scores(
  run: Run, found: Mapping[str, Apply], split: str
) -> dict[str, dict[str, float]]:
  """name -> metrics of everything found, compared with the teacher.

  Raises:
    ValueError: without a finished teacher.
  """
  if names.TEACHER not in found:
    raise ValueError(
      f'{run.workdir.place} has no finished teacher: run kd-jax run first.'
    )
  return {
    name: evaluation.evaluate(run, apply, split, teacher=found[names.TEACHER])
    for name, apply in found.items()
  }


def provenance(run: Run) -> dict[str, Any]:
  """When, where and with what the numbers of a run are made."""
  splits = run.splits
  return {
    'kd_jax': metadata.version('kd_jax'),
    'created': datetime.datetime.now(datetime.UTC).isoformat('T', 'seconds'),
    'versions': {
      'python': platform.python_version(),
      **{p: metadata.version(p) for p in ('jax', 'flax', 'optax')},
    },
    'hardware': measure.hardware(),
    'dataset': {
      'name': run.config.data.name,
      **{f'{name}_examples': len(split) for name, split in splits.items()},
      'classes': list(splits['test'].class_names),
    },
  }


def assemble(run: Run) -> dict[str, Any]:
  """The report of a run as JSON values; see `report.write_report`."""
  made, simulated = networks(run), run.integer(simulate=True)
  rows = _models(run, made, simulated)
  return {
    'format': 1,
    **provenance(run),
    'command': shlex.join(['kd-jax', *sys.argv[1:]]),
    'metrics': metrics.describe(run.task.measured(with_teacher=True)),
    'compression': protocol.compression(run.config.compress),
    'protocol': protocol.sentences(run),
    'models': rows,
    'curves': _curves(run),
    'dropped': dropped(run),
    'resumed': origin.resumed(run),
    'sparsity': _sparsity(run),
    'layers': layers(run.example, made['distill'], simulated),
    'integers': _integers(run),
    'parity': _parity(run),
    'aims': aims(run, rows),
  }


def _models(
  run: Run, made: Mapping[str, Network], simulated: Network
) -> list[dict[str, Any]]:
  found = applies(run, made)
  numbers = scores(run, found, 'test')
  stages = {network.name: stage for stage, network in made.items()}
  # Windows of integers may be summed without a product to be counted.
  counted = {
    **made,
    'teacher': run.teacher(simulate=True),
    'convert': simulated,
  }
  macs = {
    stage: evaluation.multiply_accumulates(run, network)
    for stage, network in counted.items()
  }
  exports = run.workdir.result('export')['exports']
  notes = {n: about['note'] for n, about in exports.items()}
  if run.compression.quantization.anything:
    notes[names.COMPRESSED] = 'simulates integers in float32: slower by design'
  latency = _latency(run, found)
  rows = []
  for name, apply_numbers in numbers.items():
    stage = stages.get(name)
    # An export has the operations and the weights of the integer network.
    same = stage or 'convert'
    parameters, nonzero = weights.count(made[same].variables)
    rows.append(
      {
        'name': name,
        **apply_numbers,
        'parameters': parameters,
        'nonzero_parameters': nonzero,
        'bytes': stored_bytes(run, stage) if stage else exports[name]['bytes'],
        'flops': 2 * macs[same],
        'latency': {size: latency[size][name] for size in latency},
        'train_seconds': train_seconds(run, stage),
        'note': notes.get(name, ''),
      }
    )
  return rows


def _latency(
  run: Run, found: Mapping[str, Apply]
) -> dict[str, dict[str, dict[str, float]]]:
  return {
    str(size): measure.latencies(found, evaluation.raw(run, 'test', size))
    for size in BATCHES
  }


def _parts(run: Run, stage: str) -> list[str]:
  """Where the networks of a row are: those of an ensemble are several."""
  others = run.config.teacher.others if stage == 'teacher' else ()
  return [stage, *(f'{stage}/{name}' for name in others)]


def stored_bytes(run: Run, stage: str) -> int:
  """Of the weights of a stage, those of all members of an ensemble."""
  return sum(
    run.workdir.weights(part).stat().st_size for part in _parts(run, stage)
  )


def train_seconds(run: Run, stage: str | None) -> float | None:
  """How long a stage trained, its ensemble whole; None if it does not train."""
  if stage not in TRAINED:
    return None
  results = map(run.workdir.result, _parts(run, stage))
  return sum(result['train_seconds'] for result in results)


def _curves(run: Run) -> dict[str, Any]:
  return {
    name: _curve(run.workdir.result(stage)['history'], run.task.quality)
    for stage, name in TRAINED.items()
    if run.workdir.done(stage)
  }


def _curve(
  history: Sequence[Mapping[str, float]], quality: str
) -> dict[str, list[float | None]]:
  evaluated = [row for row in history if f'eval/{quality}' in row]
  curve: dict[str, list[float | None]] = {
    'step': [row['step'] for row in history],
    # None where every step was dropped.
    'loss': [row.get('loss/total') for row in history],
    # Without a term on the labels it is not known while training.
    quality: [row.get(quality) for row in history],
    'eval_step': [row['step'] for row in evaluated],
    f'eval_{quality}': [row[f'eval/{quality}'] for row in evaluated],
  }
  if any('sparsity' in row for row in history):
    curve['sparsity'] = [row.get('sparsity') for row in history]
  return curve


def dropped(run: Run) -> list[dict[str, Any]]:
  """How many steps of every training were dropped, and losses jumped."""
  rows, workdir = [], run.workdir
  for stage in filter(workdir.done, TRAINED):
    for where in [*workdir.parts(stage), stage]:
      result, name = workdir.result(where), TRAINED[stage]
      part = where.removeprefix(stage).removeprefix('/')
      history = result['history']
      rows.append(
        {
          'name': f'{name} ({part})' if part else name,
          'steps': result['steps'],
          'dropped': sum(r.get(guard.DROPPED, 0) for r in history),
          'spikes': sum(r.get(guard.SPIKES, 0) for r in history),
        }
      )
  return rows


def _sparsity(run: Run) -> list[dict[str, Any]]:
  known = run.workdir.result('compress').get('sparsity')
  if known:
    return known
  params = weights.load_weights(run.workdir.weights('compress'))['params']
  chosen = run.config.compress.prune.rules
  return [row._asdict() for row in sparsity_report(params, chosen)]


def layers(
  example: Batch, before: Network, after: Network
) -> list[dict[str, Any]]:
  """What each layer costs in a float network and in its integer form.

  Args:
    example: a pre-processed batch of one.
    before: the float network.
    after: its integer form with products in float, `simulate=True`, whose
      layers have the same paths.

  Returns:
    A row for each layer with parameters: `layer`, and `flops` of one example,
    `parameters` and stored `bytes` as pairs, before and after.
  """
  paths = leaf_names(before.variables['params'])
  kinds = ('flops', 'parameters', 'bytes')
  rows = {
    path.rpartition('/')[0]: {kind: [0, 0] for kind in kinds} for path in paths
  }

  def row(path):
    parts = path.split('/')[1:]
    prefixes = ('/'.join(parts[:i]) for i in range(len(parts), -1, -1))
    return rows.get(next((p for p in prefixes if p in rows), ''))

  for i, network in enumerate((before, after)):
    variables = network.variables
    for cost in layer_costs(network.forward, variables, example):
      if found := row(cost.path):
        found['flops'][i] += 2 * cost.macs
    real = {'params': dequantize_params(variables)['params']}
    for tree, kind in ((real, 'parameters'), (variables, 'bytes')):
      for path, leaf in named_leaves(tree).items():
        if found := row(path):
          found[kind][i] += leaf.size if kind == 'parameters' else leaf.nbytes
  return [{'layer': path, **row} for path, row in rows.items()]


def _integers(run: Run) -> list[dict[str, Any]]:
  trained = weights.load_weights(run.workdir.weights('compress'))
  compression = run.compression
  train = run.splits['train']
  raw = train.read(np.arange(min(run.config.eval_batch_size, len(train))))
  batch = run.preprocess(raw, train=False)
  return compression.parity(compression.convert(trained), batch)


def _parity(run: Run) -> list[dict[str, Any]]:
  export = run.workdir.result('export')
  return [
    {
      'name': p['name'],
      'against': p['against'],
      'agreement': p['agreement'],
      'max_abs_error': p['max_abs_error'],
      'examples': p['examples'],
      'note': export['exports'].get(p['name'], {}).get('note', ''),
    }
    for p in export['parity']
  ]


def aims(run: Run, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """What the configuration aims at, with the value and whether it is met."""
  c = run.config.aims
  by_name = {row['name']: row for row in rows}
  teacher, integer = by_name[names.TEACHER], by_name[names.INTEGER]
  student = by_name[names.ALONE]
  parities = {p['name']: p for p in run.workdir.result('export')['parity']}
  share = student['parameters'] / teacher['parameters']
  look = run.quality
  reached, kept = teacher[look.name], integer[look.name]
  drop = run.task.worth(reached) - run.task.worth(kept)
  worse = 'below' if reached >= kept else 'above'
  found = [
    _aim(
      f'teacher {look.title} at {"least" if look.higher else "most"} '
      f'{look.written(c.teacher, look.digits(c.teacher))}',
      look.written(reached, 2),
      run.task.worth(reached) >= run.task.worth(c.teacher),
    ),
    _aim(
      f'student has at most {_share(c.parameter_share)} of the parameters',
      f'{share:.1%}',
      share <= c.parameter_share,
    ),
    _aim(
      f'integer student within {look.distance(c.drop, look.digits(c.drop))} '
      'of the teacher',
      f'{look.distance(drop, 2)} {worse}',
      drop <= c.drop,
    ),
  ]
  for name in exporters.EXPORTERS:
    if name in by_name:
      agreement = parities[name]['agreement']
      size = by_name[name]['bytes'] / teacher['bytes']
      found += [
        _aim(
          f'{name} agrees with the integer model on at least '
          f'{_share(c.export_agreement)}',
          f'{agreement:.2%}',
          agreement >= c.export_agreement,
        ),
        _aim(
          f'{name} at most {_share(c.size_share)} of the teacher in bytes',
          f'{size:.2%}',
          size <= c.size_share,
        ),
      ]
  return found


def _share(bound: float) -> str:
  return f'{bound:.{decimals(100 * bound)}%}'


def _aim(text: str, value: str, met: bool) -> dict[str, Any]:
  return {'text': text, 'value': value, 'met': bool(met)}
