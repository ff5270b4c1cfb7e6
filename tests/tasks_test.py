"""Tasks: token models and regression take the way of images with labels."""

import functools
import json
import types

import numpy as np
import pytest
from flax import linen as nn
from untrained_run import finish_distill

from kd_jax import (
  data,
  defaults,
  metrics,
  models,
  objectives,
  parity,
  tasks,
  terms,
)
from kd_jax.recipe import candidates, distillation, evaluation, search, stages
from kd_jax.recipe.run import Run
from kd_jax.report import measure, read_report, size_figure
from kd_jax.report.looks import looks_of
from kd_jax.storage.workdir import Workdir

VOCABULARY, LENGTH = 16, 12
OFFSETS = {'train': 0, 'validation': 1, 'test': 2}


def count(c, split):
  """Sequences that count in steps of one to three, and what comes next."""
  rows = 128 if split == 'train' else 32
  draw = np.random.RandomState(OFFSETS[split] + c.num_workers)
  start = draw.randint(VOCABULARY, size=(rows, 1))
  step = draw.randint(1, 4, size=(rows, 1))
  tokens = (start + step * np.arange(LENGTH + 1)) % VOCABULARY
  return data.ArrayData(
    {
      'tokens': tokens[:, :-1].astype(np.int32),
      'label': tokens[:, 1:].astype(np.int32),
    },
    id=np.arange(rows, dtype=np.int32) + 1000 * OFFSETS[split],
    reads='tokens',
    num_classes=VOCABULARY,
  )


class Counter(nn.Module):
  """A language model of two tokens: logits `[B, L, V]` of the next ones."""

  num_classes: int
  width: int = 32
  dtype: str = 'float32'
  reads: str = 'tokens'

  @property
  def taps(self):
    return models.Taps(('mix',), ('mix',), (), 'mix', 'head')

  @nn.compact
  def __call__(self, tokens, train=False):
    embed = nn.Embed(self.num_classes, self.width, name='embed')
    mix = nn.Conv(self.width, (2,), padding='CAUSAL', name='mix')
    x = nn.relu(mix(embed(tokens)))
    return nn.Dense(self.num_classes, name='head')(x)


def labels():
  return objectives.weighted_sum({'ce': (1.0, objectives.hard_labels())})


TASK = tasks.Task(
  reads='tokens',
  load=count,
  metrics={
    'token_accuracy': metrics.accuracy()._replace(title='token accuracy')
  },
  labels=labels,
)


def configuration():
  config = defaults.get_config(tiny=True)
  config.data.update({'name': 'counting', 'task': 'counting'})
  config.teacher.model = {'name': 'counter', 'width': 32}
  config.student.model = {'name': 'counter', 'width': 8}
  config.teacher.train.epochs = 40
  config.distill.scheme.cohort = 2
  for stage in defaults.TRAINED:
    config[stage].train.batch_size = 32
  return config


def opened(tmp_path, monkeypatch, config):
  monkeypatch.setitem(tasks.TASKS, 'counting', TASK)
  monkeypatch.setitem(models.MODELS, 'counter', Counter)
  return Run(config, Workdir(tmp_path / 'run', config.to_dict()))


@pytest.mark.slow
def test_a_cohort_of_token_models_goes_all_the_way(tmp_path, monkeypatch):
  latencies = functools.partial(measure.latencies, runs=2)
  monkeypatch.setattr(measure, 'latencies', latencies)
  run = opened(tmp_path, monkeypatch, configuration())
  stages.run_stages(run, say=lambda line: None)

  report = read_report(run.workdir.stage('report'))
  assert [look.title for look in looks_of(report)] == ['token accuracy']
  rows = {row['name']: row for row in report['models']}
  assert rows['teacher']['token_accuracy'] > 0.5
  assert rows['integer (JAX)']['bytes'] < 0.2 * rows['teacher']['bytes']
  parity = {row['name']: row['agreement'] for row in report['parity']}
  assert parity['integer (StableHLO)'] == parity['integer (ONNX)'] == 1.0
  exported = run.workdir.stage('export') / 'stablehlo' / 'manifest.json'
  manifest = json.loads(exported.read_text())
  assert manifest['input']['name'] == 'tokens'
  assert manifest['input']['shape'] == ['batch', LENGTH]
  assert manifest['output']['shape'] == ['batch', LENGTH, VOCABULARY]
  history = run.workdir.result('distill')['history']
  assert history[-1]['loss/mutual'] > 0
  assert 'eval/token_accuracy' in history[-1]


def test_a_run_goes_on_with_the_same_examples_alone(tmp_path, monkeypatch):
  config = configuration()
  first = opened(tmp_path, monkeypatch, config)
  stages.run_stages(first, ['teacher'], say=lambda line: None)
  again = opened(tmp_path, monkeypatch, config)
  stages.run_stages(again, ['alone'], say=lambda line: None)

  def others(c, split):
    changed = count(c, split)
    changed.arrays['tokens'][0, 0] += 1
    return changed

  monkeypatch.setitem(tasks.TASKS, 'counting', TASK._replace(load=others))
  other = Run(config, Workdir(tmp_path / 'run', config.to_dict()))
  with pytest.raises(ValueError, match="data set 'counting' is not the one"):
    stages.run_stages(other, ['distill'], say=lambda line: None)


def test_metrics_see_what_pre_processing_makes(tmp_path, monkeypatch):
  run = opened(tmp_path, monkeypatch, configuration())

  def read(batch):
    return np.eye(VOCABULARY, dtype='f')[np.asarray(batch)]

  assert evaluation.evaluate(run, read, 'test')['token_accuracy'] < 0.1

  def preprocess(config, statistics):
    # What is read is to be said again, but for the first half, which pads.
    mask = np.repeat([0, 1], LENGTH // 2).astype(np.int32)
    return lambda batch, *, train: {
      'tokens': batch['tokens'],
      'label': batch['tokens'],
      'attention_mask': mask[None] + 0 * batch['tokens'],
    }

  task = TASK._replace(preprocess=preprocess)
  monkeypatch.setitem(tasks.TASKS, 'counting', task)
  run = Run(run.config, run.workdir)
  assert evaluation.evaluate(run, read, 'test') == {'token_accuracy': 1.0}

  def late(batch):
    return read(np.where(np.arange(LENGTH) < LENGTH // 2, 0, batch))

  assert evaluation.evaluate(run, late, 'test') == {'token_accuracy': 1.0}


def test_a_search_measures_values_by_their_squares(tmp_path, monkeypatch):
  def load(c, split):
    draw = np.random.RandomState(OFFSETS[split])
    x = draw.normal(size=(64, 3))
    # As NumPy makes them, in 64 bits.
    return data.ArrayData(
      {'x': x, 'target': x @ np.ones((3, 1))},
      id=np.arange(64) + 100 * OFFSETS[split],
      reads='x',
      num_classes=1,
    )

  task = tasks.Task(
    'x',
    load,
    {'mse': metrics.mean_squared_error()},
    labels,
    agree=parity.within(0.1),
  )
  monkeypatch.setitem(tasks.TASKS, 'sums', task)
  config = defaults.get_config(tiny=True)
  config.data.update({'name': 'sums', 'task': 'sums'})
  config.student.model = {'name': 'mlp', 'hidden': (4,), 'reads': 'x'}
  config.compress.quantize.activations = (('.*', 'float'),)
  trained = finish_distill(config, tmp_path / 'run')
  recipe = defaults.search()
  recipe.compress = config.compress
  recipe.search.update({'budget': '3 KB', 'neurons': (0.0, 0.004, 0.5)})
  run = search.open_run(recipe, str(trained), 'distill', str(tmp_path / 'w'))
  network = search.uncompressed_network(run)
  rows, _, sensitivity = candidates.price(
    run, network, candidates.Budget('bytes', 3000)
  )
  loss = {(path, bits): value for path, bits, value in sensitivity}
  for path in ('dense1/kernel', 'head/kernel'):
    assert 0 < 10 * loss[path, 8] < loss[path, 4]
  assert {'int8-0', 'int8-0.4', 'int8-50'} <= set(rows)


def test_the_first_metric_decides_and_may_be_an_error():
  task = TASK._replace(
    metrics={'mse': metrics.mean_squared_error(), **TASK.metrics}
  )
  assert task.quality == 'mse' and task.worth(0.25) == -0.25
  assert list(task.measured(with_teacher=True)) == ['mse', 'token_accuracy']
  rows = {
    name: {'weights': 'int8', 'bytes': 1, 'untrained': error}
    for name, error in (('worse', 0.5), ('better', 0.1))
  }
  rows['better']['weights'] = 'int4'
  budget = candidates.Budget('bytes', 10)
  chosen = candidates.finalists(rows, list(rows), budget, 1, worth=task.worth)
  assert chosen == ['better']


@pytest.mark.parametrize('rank', [1, 2])
def test_classes_are_found_by_id_where_an_example_has_one(monkeypatch, rank):
  split = data.ArrayData(
    {
      'x': np.zeros((3, 2), np.float32),
      'label': np.array([5, 7, 6]).reshape((3, 1)[:rank]),
    },
    id=np.array([4, 0, 1], np.int32),
    reads='x',
    num_classes=8,
  )
  run = types.SimpleNamespace(
    splits={'train': split}, transfer=split, config=defaults.get_config()
  )
  monkeypatch.setattr(terms, 'make_objective', lambda words, facts: facts)
  facts = distillation.make_objective(
    run, run.config.distill.terms, student=None, teacher=None, steps=1
  )
  if rank == 1:
    np.testing.assert_array_equal(facts.labels, [7, 6, -1, -1, 5])
  else:
    assert facts.labels is None


def test_arrays_that_do_not_fit_are_named():
  id = np.arange(3, dtype=np.int32)
  with pytest.raises(ValueError, match="entry to read 'x'.*tokens"):
    data.ArrayData({'tokens': np.zeros((3, 2))}, id, 'x', 4)
  with pytest.raises(ValueError, match="3 ids, but arrays of {'x': 2}"):
    data.ArrayData({'x': np.zeros((2, 2))}, id, 'x', 4)
  with pytest.raises(ValueError, match='x are int32, but they go from 0 to'):
    data.ArrayData({'x': np.array([0, 1, 2**40])}, id, 'x', 4)
  kept = data.ArrayData({'x': np.ones((3, 2)), 'y': np.arange(3)}, id, 'x', 4)
  dtypes = {name: x.dtype.name for name, x in kept.read([0]).items()}
  assert dtypes == {'x': 'float32', 'y': 'int32', 'id': 'int32'}
  assert kept.input.dtype == np.float32


def test_an_error_is_drawn_with_a_name_at_every_point():
  report = {
    'metrics': metrics.describe({'mse': metrics.mean_squared_error()}),
    'models': [
      {'name': 'teacher', 'mse': 0.5, 'bytes': 20_000},
      {'name': 'int8', 'mse': 0.6, 'bytes': 1_000},
    ],
  }
  figure = size_figure(report)
  figure.draw_without_rendering()
  [axes] = figure.axes
  names = {text.get_text(): text.xy for text in axes.texts}
  assert names == {'teacher': (20_000, 0.5), 'int8': (1_000, 0.6)}
  low, high = axes.get_ylim()
  assert low < 0.5 and high > 0.6 and axes.get_ylabel() == 'MSE'
