"""`kd-jax cache-teacher`, and runs whose students learn from what it wrote."""

import shutil

import jax
import ml_collections
import numpy as np
import pytest
from untrained_run import config_of

from kd_jax import cli, data
from kd_jax.recipe import cached_teacher, distillation, stages
from kd_jax.recipe.run import Run
from kd_jax.storage import checkpoint, lock, weights
from kd_jax.storage.workdir import Workdir, read_json

pytestmark = pytest.mark.once


def _config(data_dir):
  config = config_of(data_dir, (4,))
  config.data.max_examples = 48
  config.teacher.model = {'name': 'mlp', 'hidden': (12,)}
  config.student.model = {'name': 'mlp', 'hidden': (6,)}
  for stage in ('teacher', 'distill', 'compress'):
    config[stage].train.update({'epochs': 2, 'batch_size': 16})
  return config


@pytest.fixture(scope='module')
def taught(tmp_path_factory, data_dir):
  """A run whose teacher is trained."""
  path = tmp_path_factory.mktemp('taught') / 'run'
  config = _config(data_dir)
  run = Run(config, Workdir(path, config.to_dict()))
  stages.run_stages(run, ['teacher'], say=lambda line: None)
  return run


@pytest.fixture(scope='module')
def exact(taught):
  """A float32 cache of that teacher."""
  path = taught.workdir.path.parent / 'exact'
  distillation.cache_teacher(taught, path, dtype='float32')
  return path


def _like(taught, path, change=lambda config: None, cache=''):
  """A run with the same teacher in a directory of its own."""
  config = ml_collections.ConfigDict(taught.config.to_dict())
  config.teacher.cache = str(cache)
  with config.unlocked():
    change(config)
  run = Run(config, Workdir(path, config.to_dict()))
  run.workdir.write_config()
  if not run.workdir.done('teacher'):
    shutil.copytree(taught.workdir.path / 'teacher', path / 'teacher')
  return run


def _train(run, *names):
  stages.run_stages(run, names, say=lambda line: None)
  return [run.workdir.result(name)['history'] for name in names]


def _close(got, want, tolerance):
  for row, wanted in zip(got, want, strict=True):
    assert row.keys() == wanted.keys()
    for name in wanted:
      np.testing.assert_allclose(
        row[name], wanted[name], rtol=tolerance, atol=tolerance, err_msg=name
      )


def _cached(run, where):
  """The cache that a stage was trained with, by its digest."""
  found = checkpoint.read_manifest(run.workdir.stage(where) / 'checkpoints')
  return found['fingerprint'].get('teacher_cache')


@pytest.mark.slow
def test_stages_learn_from_the_cache_as_from_the_teacher(
  taught, exact, tmp_path
):
  live = _like(taught, tmp_path / 'live')
  cached = _like(taught, tmp_path / 'cached', cache=exact)
  want, got = (_train(r, 'distill', 'compress') for r in (live, cached))
  _close(got[0], want[0], 5e-6)
  # Where values are rounded to int8 a sum in another order moves a code.
  _close(got[1][:1], want[1][:1], 2e-2)
  digest = data.TeacherCache(exact).digest
  for stage in ('distill', 'compress'):
    assert (_cached(live, stage), _cached(cached, stage)) == (None, digest)
  # A stage goes on with what it began with, or says so.
  (tmp_path / 'cached' / 'distill' / 'result.json').unlink()
  changed = _like(taught, tmp_path / 'cached')
  with pytest.raises(ValueError, match='teacher_cache is .* there and absent'):
    _train(changed, 'distill')


def test_only_the_link_after_the_teacher_reads_its_cache(
  taught, exact, tmp_path
):
  run = _like(
    taught,
    tmp_path / 'run',
    lambda c: c.distill.scheme.update({'generations': 2}),
    cache=exact,
  )
  _train(run, 'distill')
  assert _cached(run, 'distill/generation1') == data.TeacherCache(exact).digest
  assert _cached(run, 'distill') is None


def _rkd(config):
  config.distill.terms.rkd = {'name': 'relational', 'weight': 0.5}


def test_features_are_kept_if_asked_for(taught, exact, tmp_path):
  live = _like(taught, tmp_path / 'live', _rkd)
  path = tmp_path / 'cache'
  with pytest.raises(ValueError, match=r"'rkd' \(relational\).*--features"):
    distillation.cache_teacher(live, path)
  assert not path.exists()
  with pytest.raises(ValueError, match=r"'rkd' \(relational\).*--features"):
    _train(_like(taught, tmp_path / 'bare', _rkd, exact), 'distill')
  made = distillation.cache_teacher(live, path, dtype='float32', features=True)
  assert len(made['form']['features']) == 1
  assert made['row_bytes'] == 4 + 4 * 10 + 4 * 12
  cached = _like(taught, tmp_path / 'cached', _rkd, path)
  want, got = (_train(r, 'distill')[0] for r in (live, cached))
  assert want[0]['loss/rkd'] > 0
  _close(got, want, 2e-5)


@pytest.mark.slow
@pytest.mark.once
def test_an_ensemble_in_loss_space_keeps_its_members(
  taught, data_dir, tmp_path
):
  def change(config):
    config.teacher.others = {'other': {'name': 'mlp', 'hidden': (5,)}}
    config.teacher.space = 'losses'
    config.teacher.train.epochs = 1

  config = _config(data_dir)
  with config.unlocked():
    change(config)
  first = Run(config, Workdir(tmp_path / 'live', config.to_dict()))
  stages.run_stages(first, ['teacher'], say=lambda line: None)
  path = tmp_path / 'cache'
  made = distillation.cache_teacher(first, path, dtype='float32')
  assert made['form']['features'] == ['teacher/output', 'other/output']
  cached = _like(first, tmp_path / 'cached', cache=path)
  want, got = (_train(r, 'distill')[0] for r in (first, cached))
  _close(got, want, 5e-6)


def _sobolev(config):
  words = {'kd': {'name': 'sobolev', 'weight': 1.0}}
  config.distill.terms = ml_collections.ConfigDict(words)


def test_another_run_is_refused_with_the_reason(taught, exact, tmp_path):
  changes = {
    'augmentation.seed is 0 there and 1 here': lambda c: c.update({'seed': 1}),
    'augmentation.crop_padding is 1 there and 0 here': lambda c: c.data.update(
      {'crop_padding': 0}
    ),
    'data.examples is 48 there and 40 here': lambda c: c.data.update(
      {'max_examples': 40}
    ),
    'augmentation.mixup is 0.0 there and 0.5 here': lambda c: c.data.update(
      {'mixup': 0.5}
    ),
    'teacher.network.input.size is 0 there and 16': (
      lambda c: c.teacher.input.update({'size': 16})
    ),
    'has 2 epochs, but this training has 3': lambda c: c.distill.train.update(
      {'epochs': 3}
    ),
    'distill.scheme.ema teaches': lambda c: c.distill.scheme.update(
      {'ema': 0.9}
    ),
    'sobolev. runs the teacher': _sobolev,
  }
  for i, (message, change) in enumerate(changes.items()):
    run = _like(taught, tmp_path / str(i), change, exact)
    with pytest.raises(ValueError, match=message):
      _train(run, 'distill')
    assert not (run.workdir.path / 'distill' / 'checkpoints').exists()
  run = _like(taught, tmp_path / 'none', cache=tmp_path / 'nowhere')
  with pytest.raises(ValueError, match='nowhere is no teacher cache'):
    _train(run, 'distill')
  # Other weights of the same network.
  run = _like(taught, tmp_path / 'weights', cache=exact)
  path = run.workdir.weights('teacher')
  variables = jax.tree.map(lambda x: 1.01 * x, weights.load_weights(path))
  weights.save_weights(path, variables)
  run.workdir.finish('teacher', run.workdir.result('teacher'))
  with pytest.raises(ValueError, match='teacher.weights is "'):
    _train(run, 'distill')


def test_without_augmentation_one_epoch_serves_every_seed(taught, tmp_path):
  def change(config):
    config.data.crop_padding = 0

  first = _like(taught, tmp_path / 'first', change)
  made = distillation.cache_teacher(first, tmp_path / 'cache')
  assert (made['epochs'], made['constant']) == (1, True)

  def seeded(config):
    change(config)
    config.seed = 5

  other = _like(taught, tmp_path / 'other', seeded, tmp_path / 'cache')
  teacher = cached_teacher.open_teacher(other)
  assert teacher.cache.digest == made['sha256']


def test_the_tail_is_kept_for_the_temperature_of_the_term(taught, tmp_path):
  words = {
    'name': 'top_k',
    'weight': 1.0,
    'k': 3,
    'temperature': 4.0,
    'tail': 'uniform',
  }

  def change(config):
    config.distill.terms = ml_collections.ConfigDict({'kd': words})
    config.compress.teacher = 'student'

  live = _like(taught, tmp_path / 'live', change)
  path = tmp_path / 'cache'
  made = distillation.cache_teacher(live, path, dtype='float32', top_k=4)
  assert made['form']['temperature'] == 4.0
  assert made['row_bytes'] == 4 + 4 * 4 + 4 * 2 + 4
  cached = _like(taught, tmp_path / 'cached', change, path)
  want, got = (_train(r, 'distill')[0] for r in (live, cached))
  _close(got, want, 2e-5)
  with pytest.raises(ValueError, match=r"'kd' .*reads all outputs"):
    distillation.cache_teacher(taught, tmp_path / 'no', top_k=4)


def test_the_command_says_bytes_before_and_how_to_go_on(
  taught, tmp_path, capsys
):
  workdir = tmp_path / 'run'
  run = _like(taught, workdir)
  file = tmp_path / 'config.py'
  stored = read_json(workdir / 'config.json')
  file.write_text(
    'import ml_collections\n'
    'def get_config():\n'
    f'  return ml_collections.ConfigDict({stored!r})\n'
  )
  words = ['cache-teacher', f'--config={file}', f'--workdir={workdir}']
  assert cli.main([*words, '--dtype=bfloat16', '--epochs=3']) == 0
  out, err = capsys.readouterr()
  cache = workdir / 'teacher_cache'
  assert '48 examples x 3 epochs x 24 bytes = 0.0 MB in' in out
  assert f'--config.teacher.cache={cache}' in out
  assert 'cache-teacher: step 144/144' in err
  data.TeacherCache(cache).check(cached_teacher.fingerprint(run, run.teacher()))
  assert cli.main(words) == 2
  assert 'form.dtype is "bfloat16" there' in capsys.readouterr().err
  with lock.exclusive(workdir):
    assert cli.main([*words, '--overwrite']) == 2
  assert 'is in use by process' in capsys.readouterr().err
  assert cli.main([*words, '--overwrite']) == 0
  assert data.TeacherCache(cache).form.dtype == 'float16'
  assert cli.main([*words, '--dtype=float8']) == 2
  assert 'dtype of a teacher cache' in capsys.readouterr().err
  shutil.rmtree(workdir / 'teacher')
  assert cli.main(words) == 2
  assert '--stages=teacher' in capsys.readouterr().err
