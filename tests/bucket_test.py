"""Work directories, data and configurations in a bucket."""

import contextlib
import json
import os
import pathlib
import runpy
import signal

import fake_bucket
import jax
import numpy as np
import pytest

from kd_jax import cli, data
from kd_jax.storage import mirror
from kd_jax.storage.checkpoint import Checkpoints
from kd_jax.storage.workdir import Workdir

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = {'seed': 0, 'data': {'name': 'digits', 'data_dir': ''}}


@pytest.fixture(scope='module')
def server():
  """The only bucket: gcsfs and TensorStore keep its address."""
  made = fake_bucket.Bucket()
  with pytest.MonkeyPatch.context() as patch:
    for name, value in made.environment.items():
      patch.setenv(name, value)
    yield made
  made.close()


@pytest.fixture
def bucket(server):
  """The bucket, empty."""
  with server.lock:
    server.objects.clear()
    server.generations.clear()
    server.written.clear()
  server.on_write = lambda name: None
  yield server
  server.on_write = lambda name: None


def _finish(workdir, stage, text='weights'):
  (workdir.stage(stage) / 'weights.safetensors').write_text(text)
  (workdir.stage(stage) / 'more').mkdir(exist_ok=True)
  (workdir.stage(stage) / 'more' / 'a.txt').write_text(text)
  workdir.finish(stage, {'steps': 3})


def test_another_machine_finds_what_is_finished(bucket):
  one = Workdir('gs://bucket/run', CONFIG)
  one.write_config()
  assert not one.done('teacher')
  (one.stage('teacher') / 'weights.safetensors').write_text('half')
  # Until the stage is finished nobody sees anything of it.
  assert bucket.written == ['run/config.json']
  two = Workdir('gs://bucket/run')
  assert two.config == CONFIG and not two.done('teacher')
  _finish(one, 'teacher')
  assert bucket.written[-1] == 'run/teacher/result.json'
  assert two.done('teacher') and two.result('teacher')['steps'] == 3
  assert two.weights('teacher').read_text() == 'weights'
  assert (two.stage('teacher') / 'more' / 'a.txt').read_text() == 'weights'
  assert str(two.place / 'x') == 'gs://bucket/run/x'
  _finish(one, 'distill/assistant')
  assert two.weights('distill/assistant').exists()
  two.clear('teacher')
  assert not two.done('teacher')
  assert not [n for n in bucket.objects if n.startswith('run/teacher')]
  assert not Workdir('gs://bucket/run').done('teacher')


def test_a_directory_of_another_run_is_refused(bucket):
  bucket.put('other/notes.txt', b'x')
  with pytest.raises(ValueError, match='gs://bucket/other holds files but no'):
    Workdir('gs://bucket/other', CONFIG)
  with pytest.raises(ValueError, match='gs://bucket/none is no work directory'):
    Workdir('gs://bucket/none')
  Workdir('gs://bucket/run', CONFIG).write_config()
  with pytest.raises(ValueError, match='seed is 0 there and 1 now'):
    Workdir('gs://bucket/run', CONFIG | {'seed': 1})


def test_names_in_a_bucket_do_not_lead_out_of_a_directory(bucket, tmp_path):
  here = tmp_path / 'a' / 'b'
  here.mkdir(parents=True)
  bucket.put('run/t/../../../escaped.txt', b'x')
  bucket.put('run/t/result.json', b'{}')
  with contextlib.suppress(ValueError, OSError):
    mirror.copy_tree(mirror.resolve('gs://bucket/run/t'), here)
  assert not [p for p in tmp_path.rglob('escaped.txt')]


def test_checkpoints_in_a_bucket_survive_a_half_written_one(bucket):
  state = {'w': jax.numpy.arange(3.0), 'rng': jax.random.key(0)}
  like = jax.eval_shape(lambda: state)
  place = Workdir('gs://bucket/run', CONFIG).checkpoints('teacher')
  with Checkpoints(place, keep=2) as saved:
    assert saved.restore(like) is None
    for step in (1, 2, 3):
      saved.save(step, state | {'w': state['w'] + step})
  # The machine went away while step 3 was written.
  for name in list(bucket.objects):
    if '/3/' in name and ('commit' in name or '/d/' in name):
      del bucket.objects[name]
  with Checkpoints(place, keep=2) as saved:
    restored = saved.restore(like)
    assert restored.step == 2
    np.testing.assert_array_equal(restored.state['w'], [2.0, 3.0, 4.0])
    saved.save(3, state)
    assert saved.restore(like).step == 3


@pytest.mark.slow
def test_a_run_in_a_bucket_goes_on_elsewhere(
  bucket, tmp_path, data_dir, capsys, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  words = [
    '--config.teacher.train.epochs=3',
    '--config.teacher.train.evaluate_every_epochs=1',
    '--config.teacher.train.boundaries=(0.5,0.6)',
    '--stages=teacher',
  ]
  # A configuration that runs on a worker: JSON, in the bucket.
  config = _tiny(data_dir)
  bucket.put('run.json', json.dumps(config).encode())
  words.append('--config=gs://bucket/run.json')

  def preempt(name):
    if name.endswith('state/commit_success.txt'):
      bucket.on_write = lambda name: None
      os.kill(os.getpid(), signal.SIGTERM)

  bucket.on_write = preempt
  there = '--workdir=gs://bucket/run'
  assert cli.main(['run', *words, there]) == 75
  assert 'run/teacher/result.json' not in bucket.objects
  assert cli.main(['run', *words, there]) == 0
  assert 'gs://bucket' not in str(list(tmp_path.iterdir()))
  assert cli.main(['run', *words, '--workdir=local']) == 0
  name = 'teacher/weights.safetensors'
  local = (tmp_path / 'local' / name).read_bytes()
  assert bucket.objects[f'run/{name}'] == local
  assert cli.main(['run', *words, there]) == 0
  out = capsys.readouterr().out
  assert 'teacher: already done in gs://bucket/run/teacher' in out


def _tiny(data_dir):
  made = runpy.run_path(str(ROOT / 'configs' / 'digits.py'))
  config = made['get_config']('tiny')
  config.data.data_dir = str(data_dir)
  config.teacher.model = {'name': 'mlp', 'hidden': (8,)}
  return config.to_dict()


def test_data_in_a_bucket_is_copied_once(
  bucket, tmp_path, data_dir, monkeypatch
):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  for path in (data_dir / 'digits').rglob('*'):
    if path.is_file():
      name = path.relative_to(data_dir).as_posix()
      bucket.put(f'tfds/{name}', path.read_bytes())
  options = {'validation': 0.0, 'max_examples': 20}
  want = data.load_images('digits', 'test', data_dir=str(data_dir), **options)
  url = 'gs://bucket/tfds'
  for damage in (None, b'', b'not all'):
    if damage is not None:
      # A copy that was interrupted is completed.
      (file,) = tmp_path.rglob('*test*array_record*')
      file.write_bytes(damage)
    found = data.load_images('digits', 'test', data_dir=url, **options)
    np.testing.assert_array_equal(found.image, want.image)
    np.testing.assert_array_equal(found.label, want.label)
  with pytest.raises(FileNotFoundError, match='gs://bucket/tfds/mnist'):
    data.load_images('mnist', 'test', data_dir=url)


def test_files_written_here_are_there_in_the_end(bucket, tmp_path):
  for path in ('gs://bucket/out', str(tmp_path / 'out')):
    pathlib.Path(tmp_path / 'out').mkdir(exist_ok=True)
    with mirror.written(path) as directory:
      (directory / 'a.txt').write_text('x')
    assert (mirror.resolve(path) / 'a.txt').read_text() == 'x'


def test_a_scheme_without_its_package_gets_one_sentence(capsys):
  assert cli.main(['report', '--workdir=s3://bucket/run']) == 2
  error = capsys.readouterr().err
  assert 's3://bucket/run cannot be reached' in error
  assert error.startswith('kd-jax: ') and error.count('\n') == 1
