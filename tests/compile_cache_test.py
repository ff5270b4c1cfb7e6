"""What is compiled: once in a run, and not again by the next run."""

import logging
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from kd_jax import cli, commands
from kd_jax.train import compile_cache

ROOT = pathlib.Path(__file__).parent.parent
TINY = str(ROOT / 'configs' / 'digits.py') + ':tiny'
# What `kd-jax run` does, with a count of cache hits and misses at the end.
COUNTED = """
import sys
import jax
from kd_jax import cli
counts = {'cache_hits': 0, 'cache_misses': 0}
def count(event, **kwargs):
  name = event.rsplit('/', 1)[-1]
  if name in counts:
    counts[name] += 1
jax.monitoring.register_event_listener(count)
code = cli.main(sys.argv[1:])
print('counts', counts['cache_hits'], counts['cache_misses'])
sys.exit(code)
"""


@pytest.fixture
def restored():
  """Leaves JAX as it was."""
  names = (
    'jax_compilation_cache_dir',
    'jax_enable_compilation_cache',
    'jax_persistent_cache_min_compile_time_secs',
    'jax_persistent_cache_min_entry_size_bytes',
  )
  before = {name: getattr(jax.config, name) for name in names}
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def _run(workdir, data_dir, **environment):
  words = [
    'run',
    f'--config={TINY}',
    f'--workdir={workdir}',
    '--stages=teacher',
    f'--config.data.data_dir={data_dir}',
  ]
  env = {
    name: value
    for name, value in os.environ.items()
    if 'CACHE' not in name.upper()
  }
  done = subprocess.run(
    [sys.executable, '-c', COUNTED, *words],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=env | {'JAX_PLATFORMS': 'cpu'} | environment,
  )
  assert done.returncode == 0, done.stderr
  hits, misses = done.stdout.split('counts')[1].split()
  return int(hits), int(misses)


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path, data_dir):
  home = {'XDG_CACHE_HOME': str(tmp_path / 'caches')}
  _, misses = _run(tmp_path / 'one', data_dir, **home)
  assert misses > 10
  assert any((tmp_path / 'caches' / 'kd_jax' / 'compiled').iterdir())
  hits, misses = _run(tmp_path / 'two', data_dir, **home)
  assert hits > 10 and misses == 0


def test_where_programs_are_kept(tmp_path, monkeypatch, restored):
  # What the environment, or a program, chose.
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'own'))
  assert compile_cache.enable() == str(tmp_path / 'own')
  jax.config.update('jax_compilation_cache_dir', None)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert compile_cache.enable() == str(tmp_path / 'kd_jax' / 'compiled')
  asked = str(tmp_path / 'asked')
  assert compile_cache.enable(asked) == asked
  assert jax.config.jax_compilation_cache_dir == asked
  assert compile_cache.enable('off') is None
  assert not jax.config.jax_enable_compilation_cache


def test_a_directory_that_cannot_be_written_is_a_warning(
  tmp_path, caplog, restored
):
  (tmp_path / 'file').write_text('')
  before = jax.config.jax_compilation_cache_dir
  assert compile_cache.enable(str(tmp_path / 'file' / 'cache')) is None
  assert 'not kept for later runs' in caplog.text
  assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.slow
def test_every_step_of_a_run_is_compiled_once(
  tmp_path, data_dir, caplog, capsys, restored
):
  """Train steps, evaluation and gathering, over two stages of two epochs."""
  words = [
    'run',
    f'--config={TINY}',
    f'--workdir={tmp_path / "run"}',
    '--stages=teacher,alone',
    f'--config.data.data_dir={data_dir}',
    '--config.steps_per_dispatch=3',
    '--config.data.placement=device',
  ]
  for stage in ('teacher', 'alone'):
    words.append(f'--config.{stage}.train.epochs=2')
    words.append(f'--config.{stage}.train.evaluate_every_epochs=1')
  jax.config.update('jax_log_compiles', True)
  try:
    with caplog.at_level(logging.WARNING):
      code = cli.main(words)
  finally:
    jax.config.update('jax_log_compiles', False)
  assert code == 0, capsys.readouterr().err
  compiled = [
    record.getMessage().split(' ')[1]
    for record in caplog.records
    if record.getMessage().startswith('Compiling ')
  ]
  # Four steps an epoch: a group of three and a single one, in each stage.
  assert compiled.count('jit(train_step)') == 4
  assert compiled.count('jit(eval_step)') <= 1
  assert compiled.count('jit(apply)') <= 2


@pytest.mark.parametrize(
  'words',
  [
    ['run', f'--config={TINY}'],
    ['compare', f'--config={ROOT}/configs/compare_digits.py'],
    ['cache-teacher', f'--config={TINY}'],
    [
      'compress',
      f'--recipe={ROOT}/configs/compress.py',
      '--model=nothing.safetensors',
      '--budget=1 KB',
    ],
  ],
  ids=lambda words: words[0],
)
def test_every_command_that_trains_keeps_programs(
  words, tmp_path, monkeypatch, restored
):
  """Before anything else: what follows is not made here."""
  monkeypatch.setattr(commands, '_agree', lambda *_, **__: 1 / 0)
  place = str(tmp_path / 'programs')
  words = [*words, f'--workdir={tmp_path / "run"}', f'--compile_cache={place}']
  with pytest.raises(ZeroDivisionError):
    cli.main(words)
  assert jax.config.jax_compilation_cache_dir == place
