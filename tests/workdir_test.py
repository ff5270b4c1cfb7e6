"""Work directories: one run at a time, digests, names, and what it is of."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import untrained_run
from damage import flip

from kd_jax import cli, data
from kd_jax.recipe import origin, stages
from kd_jax.recipe.run import Run
from kd_jax.storage import files, lock, weights
from kd_jax.storage.workdir import Workdir

pytestmark = pytest.mark.once

TINY = f'{untrained_run.CONFIGS / "digits.py"}:tiny'


HOLDS = """
import sys, time
from kd_jax.storage import lock
with lock.exclusive(sys.argv[1]):
  print('has it', flush=True)
  time.sleep(600)
"""


def test_a_second_run_is_refused_until_the_first_ends(
  tmp_path, data_dir, capsys
):
  config = untrained_run.config_of(data_dir, (4,))
  workdir = untrained_run.finish_distill(config, tmp_path / 'run')
  before = sorted(workdir.rglob('*'))
  with subprocess.Popen(
    [sys.executable, '-c', HOLDS, workdir], stdout=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout.readline() == 'has it\n'
    assert cli.main(['run', f'--workdir={workdir}']) == 2
    said = capsys.readouterr().err
    assert f'in use by process {process.pid} on ' in said
    assert said.count('\n') == 1
    # Who only reads is not refused.
    assert cli.main(['evaluate', f'--workdir={workdir}']) == 2
    assert 'no finished teacher' in capsys.readouterr().err
    process.send_signal(signal.SIGKILL)
  with lock.exclusive(workdir):
    pass
  assert set(workdir.rglob('*')) == {*before, workdir / lock.NAME}


def test_local_terms_do_not_go_on_with_other_parts_of_the_batch(
  tmp_path, data_dir
):
  config = untrained_run.config_of(data_dir, (4,))
  config.compress.teacher = 'student'
  config.compress.terms.rkd = {
    'name': 'relational',
    'weight': 1.0,
    'scope': 'local',
  }
  path = untrained_run.finish_distill(config, tmp_path / 'run')

  def compress(tensor):
    config.mesh.tensor = tensor
    run = Run(config, Workdir(path, config.to_dict()))
    stages.run_stages(run, ['compress'])

  compress(tensor=1)
  (path / 'compress' / 'result.json').unlink()
  with pytest.raises(ValueError, match='batch_parts'):
    compress(tensor=2)
  compress(tensor=1)


def test_a_start_that_was_killed_early_goes_on(tmp_path):
  (tmp_path / 'config.json.tmp').write_text('{"se')
  (tmp_path / lock.NAME).touch()
  Workdir(tmp_path, {'seed': 0}).write_config()
  assert Workdir(tmp_path).config == {'seed': 0}


def test_a_bucket_has_no_lock_but_a_warning(caplog):
  with lock.exclusive('gs://bucket/run'), lock.exclusive('gs://bucket/run'):
    pass
  assert 'gs://bucket/run has no locks: see to it' in caplog.text


def _finished(path):
  folder = Workdir(path, {'seed': 0})
  folder.write_config()
  variables = {'params': {'w': np.arange(4000.0, dtype=np.float32)}}
  inner = folder.stage('export') / 'inner'
  inner.mkdir()
  (inner / 'file').write_text('content')
  weights.save_weights(folder.path / 'export/weights.safetensors', variables)
  folder.finish('export', {'steps': 3})
  return folder


SPOILT = {
  'flipped': lambda d: flip(d / 'weights.safetensors'),
  'cut': lambda d: os.truncate(d / 'weights.safetensors', 900),
  'deleted': lambda d: (d / 'weights.safetensors').unlink(),
  'result': lambda d: flip(d / 'result.json', 0.9),
}


@pytest.mark.parametrize('how', SPOILT)
def test_what_a_stage_left_is_verified_before_use(tmp_path, how):
  folder = _finished(tmp_path)
  folder.verify('export')
  weights.load_weights(folder.weights('export'))
  SPOILT[how](folder.path / 'export')
  with pytest.raises(ValueError) as e:
    folder.weights('export')
  if how != 'result':
    assert 'weights.safetensors is missing or is not' in str(e.value)
    assert 'run the same command again' in str(e.value)


def test_every_file_of_a_stage_is_verified(tmp_path):
  folder = _finished(tmp_path)
  (tmp_path / 'export/inner/file').write_text('contenu')
  folder.weights('export')
  with pytest.raises(ValueError, match='inner/file is missing or is not'):
    folder.verify('export')


def test_weights_carry_their_own_digest(tmp_path):
  path = tmp_path / 'weights.safetensors'
  weights.save_weights(path, {'params': {'w': np.arange(4000.0)}})
  flip(path)
  with pytest.raises(ValueError, match='is damaged: its arrays are not'):
    weights.load_weights(path)


@pytest.mark.parametrize(
  'name', ['../x', 'a/../../x', '/x', '', '.x', 'a//b', 'checkpoints', 'a\nb']
)
def test_a_name_is_no_path_to_elsewhere(tmp_path, name):
  folder = Workdir(tmp_path / 'run', {})
  for use in (folder.stage, folder.clear, folder.done):
    with pytest.raises(ValueError, match='cannot be the name of a directory'):
      use(name)
  assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize('name', ['../../evil', '/evil', 'checkpoints'])
def test_a_hostile_configuration_writes_nothing_outside(
  tmp_path, data_dir, capsys, name
):
  config = untrained_run.config_of(data_dir, (4,)).to_dict()
  config['teacher']['others'] = {name: {'name': 'cnn', 'widths': (4,)}}
  Workdir(tmp_path / 'run', config).write_config()
  assert cli.main(['run', f'--workdir={tmp_path / "run"}']) == 2
  assert capsys.readouterr().err.count('\n') == 1
  assert os.listdir(tmp_path) == ['run']
  assert not (tmp_path / 'run' / 'teacher').exists()


def test_digests_are_of_bytes(tmp_path):
  files.write(tmp_path / 'a', b'abc')
  digest = 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'
  assert files.describe(tmp_path / 'a') == {'sha256': digest, 'bytes': 3}


@pytest.fixture
def own_data(tmp_path, data_dir):
  """A copy of the prepared digits, to damage."""
  return shutil.copytree(data_dir, tmp_path / 'data')


def _shard(folder):
  return next(folder.rglob('digits-train.array_record*'))


SHARDS = {
  'flipped': flip,
  'truncated': lambda path: os.truncate(path, path.stat().st_size // 2),
  'emptied': lambda path: path.write_bytes(b''),
  'deleted': lambda path: path.unlink(),
}


@pytest.mark.parametrize('how', SHARDS)
def test_a_damaged_shard_is_named(own_data, how):
  SHARDS[how](_shard(own_data))
  load = functools.partial(
    data.load_images, 'digits', 'train', data_dir=own_data
  )
  said = r'digits-train\.array_record\S* is damaged: example \d+ of its split'
  with pytest.raises(ValueError, match=said):
    load()
  with pytest.raises(ValueError, match=said):
    streamed = load(image_size=8)
    streamed.read(np.arange(len(streamed)))


def test_a_damaged_shard_stops_a_run_in_one_sentence(
  own_data, tmp_path, capsys
):
  flip(_shard(own_data))
  words = [f'--config={TINY}', f'--workdir={tmp_path / "run"}']
  assert cli.main(['run', *words, f'--config.data.data_dir={own_data}']) == 2
  said = capsys.readouterr().err
  assert 'is damaged: example' in said and said.count('\n') == 1


@pytest.mark.parametrize('error', [RuntimeError, SystemExit])
def test_a_reader_that_dies_is_noticed(error):
  class Record(dict):
    def __getitem__(self, key):
      raise error('gone')

  images = data.StreamedImages(
    [Record()] * 8, np.arange(8, dtype=np.int32), ('a', 'b'), image_size=8
  )
  batches = data.train_batches(images, batch_size=4, seed=0)
  raised = []

  def draw():
    try:
      next(batches)
    except BaseException as e:
      raised.append(str(e))

  thread = threading.Thread(target=draw, daemon=True)
  thread.start()
  thread.join(30)
  assert raised and 'gone' in raised[0]


def _opened(folder, data_dir):
  config = untrained_run.config_of(data_dir, (4,))
  return Run(config, Workdir(folder, config.to_dict()))


def test_other_data_is_refused(tmp_path, own_data):
  run = _opened(tmp_path / 'run', own_data)
  origin.record(run)
  origin.record(run)
  info = next(own_data.rglob('dataset_info.json'))
  info.write_text(json.dumps(json.loads(info.read_text()) | {'citation': 'x'}))
  with pytest.raises(ValueError, match='dataset_info.json differs'):
    origin.check(run)
  shutil.copy(info, info.with_name('another'))
  with pytest.raises(ValueError, match='differs. Use the same data'):
    origin.record(run)


def test_other_software_is_declared(tmp_path, data_dir, monkeypatch):
  run, said = _opened(tmp_path / 'run', data_dir), []
  origin.record(run, say=said.append)
  origin.record(run, say=said.append)
  assert said == [] and origin.resumed(run) == []
  now = origin.software()
  monkeypatch.setattr(origin, 'software', lambda: now | {'jax': '9.9'})
  for _ in range(2):
    origin.record(run, say=said.append)
  (sentence,) = said
  assert f'jax {jax.__version__} and goes on with jax 9.9' in sentence
  assert origin.resumed(run) == [
    f'jax {jax.__version__} and goes on with jax 9.9'
  ]
