"""`kd-jax compress`: the walk, the artefact, the messages."""

import functools
import json
import re
import runpy

import jax
import ml_collections
import numpy as np
import pytest
from untrained_run import CONFIGS, config_of, finish_distill

from kd_jax import cli
from kd_jax.recipe import artefact, evaluation, load_artefact, search
from kd_jax.recipe.network import Network
from kd_jax.recipe.run import Run
from kd_jax.report import measure, tradeoff
from kd_jax.storage import workdir
from kd_jax.storage.weights import load_weights

RECIPE = f'{CONFIGS / "compress.py"}:tiny'
MODEL = {'name': 'cnn', 'widths': (8, 6)}
BUDGET = '2.1 KB'


@pytest.fixture(scope='module')
def trained(tmp_path_factory, data_dir):
  """A work directory in which 'distill' is finished, without training."""
  path = tmp_path_factory.mktemp('compress') / 'run'
  return finish_distill(config_of(data_dir, MODEL['widths']), path)


def _words(trained, directory, *more, budget=BUDGET):
  return [
    'compress',
    f'--model={trained}',
    f'--recipe={RECIPE}',
    f'--budget={budget}',
    f'--workdir={directory}',
    *more,
  ]


@pytest.fixture(scope='module')
def finished(trained, tmp_path_factory):
  directory = tmp_path_factory.mktemp('compressed') / 'small'
  assert cli.main(_words(trained, directory)) == 0
  return directory


def _result(directory):
  return json.loads((directory / 'search' / 'result.json').read_text())


def test_the_walk_is_within_the_budget_where_it_says_so(finished):
  result = _result(finished)
  rows = {row['name']: row for row in result['candidates']}
  assert set(rows) == {'int8-0', 'mixed-0', 'int4-0', 'int8-50', 'int4-50'}
  for row in rows.values():
    assert row['within'] == (row['bytes'] <= 2100)
    assert 0 <= row['untrained'] <= 1 and row['ms'] > 0
  assert not rows['int8-0']['within'] and rows['mixed-0']['within']
  order = [rows[n]['bytes'] for n in ('int4-0', 'mixed-0', 'int8-0')]
  assert order == sorted(order)
  assert rows['int8-0']['flops'] == result['uncompressed']['flops']
  assert rows['int8-50']['flops'] < 0.6 * rows['int8-0']['flops']
  # One is trained, and it is chosen; it keeps to the budget.
  (best,) = [row for row in rows.values() if row['trained'] is not None]
  assert (
    best['chosen'] and best['within'] and best['name'] == result['test']['name']
  )
  assert result['uncompressed']['bytes'] > best['bytes']
  layers = {row['layer']: row for row in result['layers']}
  for row in (layers[name] for name in ('conv1', 'conv2', 'head')):
    assert 0 < row['flops'][1] <= row['flops'][0]
  assert set(layers) >= {'conv1', 'conv2', 'head'}
  assert layers['conv2']['bytes'][1] < layers['conv2']['bytes'][0]
  assert {row['layer'] for row in result['integers']} >= {'conv1', 'head'}
  assert {bits for _, bits, _ in result['sensitivity']} == {8, 4}


def test_the_artefact_runs_in_jax_and_as_files(finished, trained):
  result, directory = _result(finished), finished / 'artefact'
  stored = workdir.Workdir(finished)
  run = Run(ml_collections.ConfigDict(stored.config), stored)
  forward, variables = load_artefact(directory, run.model('student'))
  batch = run.preprocess(run.splits['test'].read(np.arange(64)), train=False)
  logits = forward(variables, batch).output
  assert logits.shape == (64, 10) and 'int8' in variables
  assert (directory / 'stablehlo').is_dir()
  assert (directory / 'student.onnx').is_file()
  small = Network('small', lambda **_: forward, variables)
  found = evaluation.quality(run, small, 'test')
  assert found == result['test']['quality']
  about = json.loads((directory / 'compressed.json').read_text())
  about['format'] = 'other'
  foreign = finished.parent / 'foreign'
  foreign.mkdir()
  (foreign / 'compressed.json').write_text(json.dumps(about))
  with pytest.raises(ValueError, match="holds 'other'"):
    load_artefact(foreign, run.model('student'))


def test_the_readme_reads_the_artefact(finished):
  readme = (CONFIGS.parent / 'README.md').read_text()
  (block,) = re.findall(r'```python\n("""What `kd-jax .*?)```', readme, re.S)
  block = block.replace('runs/digits_12kb', str(finished))
  found = {}
  exec(block.replace('(16, 32, 64)', str(MODEL['widths'])), found)
  batch = {'image': np.zeros((2, 8, 8, 1), np.float32)}
  assert found['forward'](found['variables'], batch).output.shape == (2, 10)


def test_tables_and_plots_are_written(finished, capsys):
  for name in tradeoff.NAMES:
    assert (finished / name).stat().st_size > 500
  text = (finished / 'compress.md').read_text()
  assert ' is the best that was found within 2100 bytes' in text
  assert ' * |' in text and '| conv2 |' in text
  tradeoff.print_table(_result(finished))
  printed = capsys.readouterr().out
  assert 'int4-50' in printed and 'test examples' in printed


def test_the_same_command_trains_nothing_again(finished, trained, capsys):
  weights = next(finished.glob('candidates/*/weights.safetensors'))
  before = weights.stat().st_mtime_ns, _result(finished)
  (finished / 'compress.md').unlink()
  assert cli.main(_words(trained, finished)) == 0
  assert (weights.stat().st_mtime_ns, _result(finished)) == before
  assert 'training' not in capsys.readouterr().out.split('Validation')[0]
  assert (finished / 'compress.md').exists()


def test_a_trained_candidate_is_not_trained_again(finished, trained, tmp_path):
  """A walk that stopped after a training goes on from there."""
  search_dir = finished / 'search' / 'result.json'
  whole = search_dir.read_text()
  weights = next(finished.glob('candidates/*/weights.safetensors'))
  before = weights.stat().st_mtime_ns
  search_dir.unlink()
  try:
    assert cli.main(_words(trained, finished)) == 0
    assert weights.stat().st_mtime_ns == before
    assert _result(finished)['test'] == json.loads(whole)['test']
  finally:
    search_dir.write_text(whole)


def test_a_safetensors_file_is_the_model_that_the_recipe_names(
  trained, data_dir, tmp_path
):
  path = trained / 'distill' / 'weights.safetensors'
  recipe = runpy.run_path(str(CONFIGS / 'compress.py'))['get_config']('tiny')
  recipe.student.model = MODEL
  recipe.data.data_dir = str(data_dir)
  recipe.search.budget = '3 KB'
  run = search.open_run(recipe, str(path), 'distill', str(tmp_path / 'w'))
  found = search.uncompressed_network(run)
  want = load_weights(path)
  jax.tree.map(np.testing.assert_array_equal, found.variables, want)
  assert run.config.student.model.widths == (8, 6)
  damaged = tmp_path / 'damaged.safetensors'
  damaged.write_bytes(path.read_bytes()[:-1] + b'\x07')
  run = search.open_run(recipe, str(damaged), 'distill', str(tmp_path / 'v'))
  with pytest.raises(ValueError, match='is damaged'):
    search.uncompressed_network(run)


def test_an_artefact_in_float_takes_options_too(trained, tmp_path):
  stored = workdir.Workdir(trained)
  run = Run(ml_collections.ConfigDict(stored.config), stored)
  network = run.student('distill')
  about = {'overrides': [], 'activations': []}
  artefact.save(tmp_path, network.variables, about, artefact.COMPRESSED)
  load = functools.partial(load_artefact, tmp_path, run.model('student'))
  forward, variables = load(taps=('relu1',), simulate=True)
  out = forward(variables, run.example)
  assert list(out.features) == ['relu1']
  want = network.forward(network.variables, run.example).output
  np.testing.assert_array_equal(out.output, want)
  with pytest.raises(TypeError, match='tap'):
    load(tap=('relu1',))


def test_a_student_with_the_head_of_its_teacher_is_searched(data_dir, tmp_path):
  config = config_of(data_dir, MODEL['widths'])
  config.teacher.model = {'name': 'cnn', 'widths': (4, 7)}
  config.distill.scheme.reuse_head = True
  trained = finish_distill(config, tmp_path / 'run')
  recipe = runpy.run_path(str(CONFIGS / 'compress.py'))['get_config']('tiny')
  recipe.search.budget = '3 KB'
  run = search.open_run(recipe, str(trained), 'distill', str(tmp_path / 'w'))
  dense = search.uncompressed_network(run)
  assert dense.variables['params']['head']['kernel'].shape[0] == 7
  assert dense.forward(dense.variables, run.example).output.shape == (1, 10)


@pytest.mark.parametrize(
  ('budget', 'cost', 'fitting', 'multiple_of', 'gone'),
  [
    ('9 KFLOP', 'flops', {'int8-50'}, 1, 7 / 14),
    # Of 8 and 6 channels 4 each stay, not 7 in all.
    ('9999 ms', 'ms', {'int8-0', 'int8-50'}, 4, 6 / 14),
  ],
)
def test_a_budget_in_operations_or_milliseconds(
  trained,
  tmp_path,
  capsys,
  monkeypatch,
  budget,
  cost,
  fitting,
  multiple_of,
  gone,
):
  timed, latencies = [], measure.latencies

  def of(applies, images, **options):
    timed.append(len(images))
    return latencies(applies, images, **options)

  monkeypatch.setattr(measure, 'latencies', of)
  words = [
    "--recipe.search.weights=('int8', 'mixed')",
    '--recipe.search.latency_batch=3',
    f'--recipe.search.multiple_of={multiple_of}',
  ]
  assert cli.main(_words(trained, tmp_path, *words, budget=budget)) == 0
  assert set(timed) == {3}
  result = _result(tmp_path)
  rows = {row['name']: row for row in result['candidates']}
  assert rows['int8-50']['neurons'] == pytest.approx(gone)
  # To mix bits is a choice under a budget of bytes alone.
  assert set(rows) == {'int8-0', 'int8-50'}
  assert {n for n, row in rows.items() if row['within']} == fitting
  # The costliest of those within is trained.
  best = max(fitting, key=lambda name: rows[name][cost])
  assert rows[best]['chosen'] and rows[best]['trained'] is not None
  assert f'within {result["budget"]["limit"]:g} {cost}' in (
    (tmp_path / 'compress.md').read_text()
  )
  assert f'{rows[best][cost]:g} {cost}, training' in capsys.readouterr().out


CASES = {
  'budget': (['--budget=20 kB'], "'20 kB' is no budget"),
  'nothing fits': (['--budget=10 B'], 'No candidate fits 10 B: the cheapest'),
  'model': (['--model=/nowhere'], 'neither a work directory'),
  'stage': (['--stage=alone'], "'alone' is not finished"),
  'stage word': (
    ['--stage=teacher'],
    "Unknown stage 'teacher': valid: distill, alone",
  ),
  'key': (['--recipe.search.finalist=2'], 'search.finalists'),
  'no model': (['--model='], 'needs --model=PATH'),
  'no recipe': (['--recipe='], 'no configuration file'),
}


@pytest.mark.parametrize('case', CASES)
def test_bad_input_gets_one_sentence(case, trained, tmp_path, capsys):
  more, message = CASES[case]
  words = _words(trained, tmp_path / 'new')
  flags = {w.split('=')[0] for w in more}
  words = [w for w in words if w.split('=')[0] not in flags]
  assert cli.main([*words, *more]) == 2
  assert message in capsys.readouterr().err


@pytest.mark.parametrize(
  'change',
  ['aims.drop=0.5', 'compress.teacher=teacher', 'search.budget=1 KB'],
)
def test_what_no_search_reads_is_refused(change, trained, tmp_path, capsys):
  place = tmp_path / 'small'
  assert cli.main(_words(trained, place, f'--recipe.{change}')) == 2
  key = change.partition('=')[0]
  error = capsys.readouterr().err
  assert f'kd-jax compress does not read --recipe.{key}' in error
  assert not place.exists()


@pytest.mark.parametrize(
  'change',
  [
    'seed=1',
    'data.validation=0.2',
    'student.model.name=mlp',
    'teacher.model.depth=14',
    'distill.scheme.reuse_head=True',
  ],
)
def test_what_a_work_directory_brings_cannot_be_changed(
  change, trained, tmp_path, capsys
):
  place = tmp_path / 'small'
  assert cli.main(_words(trained, place, f'--recipe.{change}')) == 2
  key = change.partition('=')[0]
  error = capsys.readouterr().err
  assert f'--recipe.{key} cannot be changed: it is that of' in error
  assert not place.exists()
