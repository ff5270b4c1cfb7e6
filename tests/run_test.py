"""The main job through the command line, in its tiny form."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from kd_jax import cli
from kd_jax.report import read_report
from kd_jax.storage import weights

ROOT = pathlib.Path(__file__).parent.parent
TINY = str(ROOT / 'configs' / 'digits.py') + ':tiny'


def kd_jax(*words):
  """Runs the command in a process of its own."""
  return subprocess.run(
    [sys.executable, '-m', 'kd_jax', *words],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )


@pytest.fixture(scope='module')
def finished(tmp_path_factory, data_dir):
  """A finished tiny run: its directory and what was printed."""
  workdir = tmp_path_factory.mktemp('run')
  done = kd_jax(
    'run',
    f'--config={TINY}',
    f'--workdir={workdir}',
    f'--config.data.data_dir={data_dir}',
  )
  assert done.returncode == 0, done.stderr
  return workdir, done


@pytest.mark.slow
def test_run_reports_every_model(finished):
  workdir, done = finished
  report = read_report(workdir / 'report')
  names = [row['name'] for row in report['models']]
  assert names == [
    'teacher',
    'student alone',
    'distilled',
    'compressed',
    'integer (JAX)',
    'integer (StableHLO)',
    'integer (ONNX)',
  ]
  for row in report['models']:
    assert 0 <= row['accuracy'] <= 1
    assert row['bytes'] > 0
    assert row['latency']['1']['median_ms'] > 0
    assert row['name'] in done.stdout or row['name'].split()[0] in done.stdout
  for name in ('report.json', 'report.md', 'report.html'):
    assert (workdir / 'report' / name).stat().st_size > 1000


@pytest.mark.slow
def test_compressed_weights_have_the_sparsity_asked_for(finished):
  workdir, _ = finished
  params = weights.load_weights(workdir / 'compress' / 'weights.safetensors')
  kernels = [
    np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params['params'])
    if 'kernel' in jax.tree_util.keystr(path)
  ]
  size = sum(k.size for k in kernels)
  nonzero = sum(np.count_nonzero(k) for k in kernels)
  assert nonzero == size - round(0.8 * size)


@pytest.mark.slow
def test_exports_agree_with_the_integer_model(finished):
  workdir, _ = finished
  parity = read_report(workdir / 'report')['parity']
  exported = {p['name']: p for p in parity if p['against'] == 'integer (JAX)'}
  assert exported.keys() == {'integer (StableHLO)', 'integer (ONNX)'}
  for row in exported.values():
    assert row['agreement'] >= 0.995
    assert row['examples'] == 256


@pytest.mark.slow
@pytest.mark.once
def test_a_profile_says_where_the_time_of_a_training_goes(
  data_dir, tmp_path, capsys
):
  words = [
    'run',
    f'--config={TINY}',
    f'--workdir={tmp_path}',
    f'--config.data.data_dir={data_dir}',
    '--config.teacher.train.epochs=12',
    '--stages=teacher',
    '--profile',
  ]
  assert cli.main(words) == 0
  stage = tmp_path / 'teacher'
  profile = json.loads((stage / 'result.json').read_text())['profile']
  assert profile['steps_per_second'] > 0
  assert list((stage / 'profile').rglob('*.xplane.pb'))


@pytest.mark.slow
def test_a_second_run_says_that_all_is_done(finished, data_dir, capsys):
  workdir, _ = finished
  before = (workdir / 'report' / 'report.json').read_text()
  words = ['run', f'--config={TINY}', f'--workdir={workdir}']
  assert cli.main([*words, f'--config.data.data_dir={data_dir}']) == 0
  assert capsys.readouterr().out.count('already done') == 7
  assert (workdir / 'report' / 'report.json').read_text() == before


@pytest.mark.slow
def test_evaluate_repeats_the_numbers_of_the_report(finished, capsys):
  workdir, _ = finished
  assert cli.main(['evaluate', f'--workdir={workdir}']) == 0
  printed = capsys.readouterr().out
  row = read_report(workdir / 'report')['models'][0]
  assert f'{100 * row["accuracy"]:.2f} %' in printed
  for title in ('accuracy', 'agreement', 'KL', 'ECE'):
    assert title in printed


@pytest.mark.slow
def test_another_configuration_is_refused(finished, capsys):
  workdir, _ = finished
  words = ['run', f'--config={TINY}', f'--workdir={workdir}']
  assert cli.main([*words, '--config.seed=7']) == 2
  error = capsys.readouterr().err
  assert 'seed is 0 there and 7 now' in error


@pytest.mark.slow
def test_overwrite_runs_a_stage_again_and_drops_what_depends_on_it(
  finished, tmp_path, data_dir
):
  workdir, _ = finished
  copy = tmp_path / 'copy'
  subprocess.run(['cp', '-r', workdir, copy], check=True)
  done = kd_jax(
    'run',
    f'--config={TINY}',
    f'--workdir={copy}',
    f'--config.data.data_dir={data_dir}',
    '--stages=convert',
    '--overwrite',
  )
  assert done.returncode == 0, done.stderr
  assert (copy / 'compress' / 'result.json').exists()
  assert (copy / 'convert' / 'result.json').exists()
  assert not (copy / 'export').exists()


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path, data_dir):
  words = [
    'run',
    f'--config={TINY}',
    '--stages=teacher',
    f'--config.data.data_dir={data_dir}',
    '--config.teacher.train.epochs=8',
    '--config.teacher.train.evaluate_every_epochs=1',
  ]
  straight, killed = tmp_path / 'straight', tmp_path / 'killed'
  done = kd_jax(*words, f'--workdir={straight}')
  assert done.returncode == 0, done.stderr

  process = subprocess.Popen(
    [sys.executable, '-m', 'kd_jax', *words, f'--workdir={killed}'],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    stderr=subprocess.DEVNULL,
  )
  checkpoints = killed / 'teacher' / 'checkpoints'
  deadline = time.monotonic() + 120
  while not (checkpoints.is_dir() and _steps(checkpoints)):
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not (killed / 'teacher' / 'result.json').exists()

  done = kd_jax(*words, f'--workdir={killed}')
  assert done.returncode == 0, done.stderr
  results = [
    json.loads((w / 'teacher' / 'result.json').read_text())
    for w in (straight, killed)
  ]
  assert results[0]['history'] == results[1]['history']
  name = 'teacher/weights.safetensors'
  assert (straight / name).read_bytes() == (killed / name).read_bytes()


def _steps(checkpoints):
  return [p for p in checkpoints.iterdir() if p.name.isdigit()]


@pytest.mark.slow
def test_sigterm_saves_and_asks_to_be_run_again(tmp_path, data_dir):
  words = [
    'run',
    f'--config={TINY}',
    '--stages=teacher',
    f'--config.data.data_dir={data_dir}',
    '--config.teacher.train.epochs=5000',
    '--config.teacher.train.evaluate_every_epochs=1',
    f'--workdir={tmp_path / "run"}',
  ]
  process = subprocess.Popen(
    [sys.executable, '-m', 'kd_jax', *words],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    stderr=subprocess.PIPE,
    text=True,
  )
  checkpoints = tmp_path / 'run' / 'teacher' / 'checkpoints'
  deadline = time.monotonic() + 120
  while not (checkpoints.is_dir() and _steps(checkpoints)):
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  _, error = process.communicate(timeout=60)
  assert process.returncode == 75
  assert 'saved at step' in error
