"""The files of the README's section "Extend it": one run with most of them,
and one for the task, whose networks see no images."""

import functools
import pathlib
import re

import pytest

from kd_jax import cli, models, optim, tasks, terms
from kd_jax.cli import registries
from kd_jax.export import exporters
from kd_jax.recipe import words
from kd_jax.report import measure, read_report
from kd_jax.storage.workdir import read_json

ROOT = pathlib.Path(__file__).parent.parent
SECTION = re.search(
  r'\n## Extend it\n(.*?)\n## ', (ROOT / 'README.md').read_text(), re.DOTALL
)[1]
FILES = {
  re.match(r'"""(\w+\.py)', text)[1]: text
  for text in re.findall(r'```python\n(.*?)```', SECTION, re.DOTALL)
}
# Takes from each file what it sets, as one configuration.
TOGETHER = """
import pathlib
import runpy

from kd_jax import defaults


def overlay(config, own, default):
  for name, value in own.items():
    if value == default.get(name):
      continue
    if isinstance(value, dict) and name not in ('terms', 'model'):
      overlay(config[name], value, default[name])
    else:
      config[name] = value


def get_config():
  config = defaults.get_config(tiny=True)
  config.teacher.model = {'name': 'mlp', 'hidden': (16,)}
  for path in sorted(pathlib.Path(__file__).parent.glob('my_*.py')):
    own = runpy.run_path(str(path))['get_config']()
    overlay(config, own.to_dict(), defaults.get_config().to_dict())
  return config
"""


def test_there_is_a_file_for_each_kind():
  kinds = ('loss', 'model', 'data', 'task', 'score', 'observer', 'exporter')
  assert sorted(FILES) == sorted(f'my_{kind}.py' for kind in kinds)


def test_what_a_file_registers_is_not_launched(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(models.MODELS, 'shallow', None)
  config = tmp_path / 'my_model.py'
  config.write_text(FILES['my_model.py'])
  flags = ['--name=a', '--zone=z', '--accelerator=v5litepod-4', '--dry_run']
  flags += [f'--config={config}', '--workdir=gs://bucket/run']
  assert cli.main(['launch', 'tpu-vm', *flags]) == 2
  said = capsys.readouterr()
  assert "my_model.py registers model 'shallow', which" in said.err
  assert not said.out


def test_an_optimizer_of_a_file_is_not_launched(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(optim.OPTIMIZERS, 'mine', None)
  config = tmp_path / 'mine.py'
  config.write_text(
    'from kd_jax import defaults, optim\n'
    "optim.OPTIMIZERS['mine'] = optim.OPTIMIZERS['sgd']\n"
    'get_config = defaults.get_config\n'
  )
  flags = ['--name=a', '--zone=z', '--accelerator=v5litepod-4', '--dry_run']
  flags += [f'--config={config}', '--workdir=gs://bucket/run']
  assert cli.main(['launch', 'tpu-vm', *flags]) == 2
  assert "registers optimizer 'mine', which" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.once
def test_a_run_uses_all_of_them(tmp_path, monkeypatch, capsys):
  for name, text in {**FILES, 'together.py': TOGETHER}.items():
    if name != 'my_task.py':
      (tmp_path / name).write_text(text)
  # What the files register goes when this test ends.
  monkeypatch.setitem(terms.TERMS, 'cosine', None)
  monkeypatch.setitem(models.MODELS, 'shallow', None)
  monkeypatch.setitem(words.SCORES, 'brain_damage', None)
  monkeypatch.setitem(words.OBSERVERS, 'three_sigma', None)
  monkeypatch.setitem(exporters.EXPORTERS, 'one program', None)
  before = registries.entries()
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds'))
  latencies = functools.partial(measure.latencies, runs=2)
  monkeypatch.setattr(measure, 'latencies', latencies)
  workdir = tmp_path / 'run'
  arguments = [f'--config={tmp_path / "together.py"}', f'--workdir={workdir}']
  assert cli.main(['run', *arguments]) == 0
  after = registries.entries()
  assert [name for name in after if after[name] is not before[name]] == [
    "model 'shallow'",
    "term 'cosine'",
    "score 'brain_damage'",
    "observer 'three_sigma'",
    "exporter 'one program'",
  ]

  # The directory alone says what it needs, as a new process would find out.
  for registry, name in (
    (terms.TERMS, 'cosine'),
    (models.MODELS, 'shallow'),
    (words.SCORES, 'brain_damage'),
    (words.OBSERVERS, 'three_sigma'),
    (exporters.EXPORTERS, 'one program'),
  ):
    with monkeypatch.context() as without:
      without.delitem(registry, name)
      assert cli.main(['evaluate', f'--workdir={workdir}']) == 2
      assert f'registers {name!r}: give' in capsys.readouterr().err

  config = read_json(workdir / 'config.json')
  assert config['student']['model'] == {'name': 'shallow', 'width': 32}
  assert config['compress']['prune']['score'] == 'brain_damage'
  assert config['compress']['quantize']['observer'] == 'three_sigma'
  (last,) = read_json(workdir / 'distill' / 'result.json')['history']
  assert last['loss/cosine'] > 0
  report = read_report(workdir / 'report')
  assert report['dataset']['classes'] == ['left', 'right']
  rows = {row['name']: row for row in report['models']}
  pruned = rows['compressed']
  own, integer = rows['one program'], rows['integer (JAX)']
  assert own['accuracy'] == integer['accuracy'] and own['bytes'] > 0
  assert own['note'] == 'for the platform of the run'
  assert pruned['nonzero_parameters'] < 0.25 * pruned['parameters']


@pytest.mark.slow
@pytest.mark.once
def test_a_run_of_a_task_of_ones_own(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(tasks.TASKS, 'diabetes', None)
  latencies = functools.partial(measure.latencies, runs=2)
  monkeypatch.setattr(measure, 'latencies', latencies)
  config, workdir = tmp_path / 'my_task.py', tmp_path / 'run'
  config.write_text(FILES['my_task.py'])
  arguments = [f'--config={config}', f'--workdir={workdir}']
  fewer = [f'--config.{s}.train.epochs=20' for s in ('alone', 'compress')]
  assert cli.main(['run', *arguments, *fewer]) == 0

  report = read_report(workdir / 'report')
  rows = {row['name']: row for row in report['models']}
  # The mean predicts with an error of 1: what was learned stays to the end.
  assert all(row['mse'] < 0.8 for row in rows.values())
  assert rows['integer (ONNX)']['mse'] == pytest.approx(
    rows['integer (JAX)']['mse'], abs=1e-3
  )
  assert report['curves']['distilled']['eval_mse'][-1] < 0.8
  aims = {aim['text']: aim['met'] for aim in report['aims']}
  assert aims['teacher MSE at most 0.600'] == (rows['teacher']['mse'] <= 0.6)
  shown = capsys.readouterr().out
  assert 'MSE' in shown and 'accuracy' not in shown

  # In a process of its own, the directory alone knows no such task.
  del tasks.TASKS['diabetes']
  assert cli.main(['evaluate', arguments[1]]) == 2
  assert "registers 'diabetes': give that file" in capsys.readouterr().err
  assert cli.main(['evaluate', *arguments]) == 0
  assert f'{rows["distilled"]["mse"]:.4f}' in capsys.readouterr().out
