"""`kd-jax shrink`: the plan, the files, the messages."""

import json
import pathlib
import shutil

import jax
import ml_collections
import pytest
from untrained_run import config_of, finish_distill

from kd_jax import cli
from kd_jax.recipe import artefact, load_artefact, shrunk, stages
from kd_jax.recipe.run import Run
from kd_jax.storage import lock, workdir

pytestmark = pytest.mark.once


@pytest.fixture
def directory(finished, tmp_path):
  """A copy of the work directory that a test may change."""
  return pathlib.Path(shutil.copytree(finished, tmp_path / 'run'))


@pytest.fixture(scope='module')
def finished(tmp_path_factory, data_dir):
  """A work directory in which 'distill' is finished, without training."""
  path = tmp_path_factory.mktemp('shrink') / 'run'
  return finish_distill(config_of(data_dir, (8, 6)), path)


def test_the_command_writes_a_smaller_student(directory, capsys):
  words = ['shrink', f'--workdir={directory}', '--sparsity=0.5']
  assert cli.main([*words, '--scope=layer', '--keep=conv2']) == 0
  printed = capsys.readouterr().out
  assert 'conv1' in printed and 'kept as asked' in printed
  assert 'before' in printed and 'after' in printed
  assert all(title in printed for title in ('FLOPs', 'parameters', 'size'))
  about = json.loads((directory / 'shrink' / 'shrink.json').read_text())
  assert about['kept'] == {'conv1': [4, 8]}
  assert about['format'] == artefact.SHRUNK and about['overrides'] == {}

  stored = workdir.Workdir(directory)
  run = Run(ml_collections.ConfigDict(stored.config), stored)
  model = run.model('student')
  forward, variables = load_artefact(directory / 'shrink', model)
  assert variables['params']['conv2']['kernel'].shape == (3, 3, 4, 6)
  assert forward(variables, run.example).output.shape == (1, 10)
  made = shrunk.shrink_student(
    run, sparsity=0.75, scope='layer', overwrite=True
  )
  # Both convolutions lose three quarters, the head three quarters of one side.
  assert made.after.flops < 0.3 * made.before.flops
  params = variables['params']
  assert made.after.parameters < sum(x.size for x in jax.tree.leaves(params))
  assert made.after.bytes == 4 * made.after.parameters


def test_the_curve_shows_the_share_of_weights_that_are_zero(data_dir, tmp_path):
  config = config_of(data_dir, (8, 6))
  config.compress.teacher = 'student'
  config.compress.prune.structure = 'neurons'
  config.compress.train.epochs = 3
  directory = finish_distill(config, tmp_path / 'run')
  run = Run(config, workdir.Workdir(directory, config.to_dict()))
  result = stages.compress(run)
  sizes, nonzero = (
    sum(row[key] for row in result['sparsity']) for key in ('size', 'nonzero')
  )
  share = 1 - nonzero / sizes
  assert result['history'][-1]['sparsity'] == pytest.approx(share, abs=1e-6)
  assert abs(share - config.compress.prune.sparsity) > 0.01


BAD = {
  'stage': ('--stage=distil', "Unknown stage 'distil'"),
  'unfinished': ('--stage=alone', "Stage 'alone' is not finished"),
  'sparsity': ('--sparsity=1', 'a share in [0, 1), not 1.0'),
  'scope': ('--scope=all', "Unknown scope 'all'"),
  'scope of weights': ('--scope=erk', 'scope erk needs units that are parts'),
  'keep': ('--keep=conv9', "'conv9' matches nothing"),
  'nothing': ('--keep=conv.*', 'Nothing can leave'),
}


@pytest.mark.parametrize('case', BAD)
def test_a_bad_flag_gets_one_sentence(case, directory, capsys):
  flag, expected = BAD[case]
  assert cli.main(['shrink', f'--workdir={directory}', flag]) == 2
  error = capsys.readouterr().err
  assert expected in error and error.count('\n') == 1
  assert not (directory / 'shrink').exists()


def test_nothing_is_replaced_unasked_and_no_two_write(directory, capsys):
  words = ['shrink', f'--workdir={directory}']
  assert cli.main(words) == 0
  path = directory / 'shrink' / 'weights.safetensors'
  before = path.read_bytes()
  again = [*words, '--sparsity=0.75']
  assert cli.main(again) == 2
  assert 'give --overwrite to replace it' in capsys.readouterr().err
  assert path.read_bytes() == before
  with lock.exclusive(directory):
    assert cli.main([*again, '--overwrite']) == 2
  assert 'is in use by process' in capsys.readouterr().err
  assert path.read_bytes() == before
  assert cli.main([*again, '--overwrite']) == 0
  assert len(path.read_bytes()) < len(before)


def test_foreign_files_are_refused(directory):
  cli.main(['shrink', f'--workdir={directory}'])
  path = directory / 'shrink' / 'shrink.json'
  path.write_text(json.dumps({'format': 'other'}))
  with pytest.raises(ValueError, match="holds 'other', not 'kd_jax.shrink.1'"):
    load_artefact(directory / 'shrink', None)
  shutil.rmtree(directory / 'shrink')
  with pytest.raises(ValueError, match='cannot be read: it has neither'):
    load_artefact(directory / 'shrink', None)
