"""Commands on two processes with two devices each, against one with four.

They are stopped, killed, and go on; in a directory and in a bucket.
"""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time

import fake_bucket
import pytest
from pairs import BOUND, ROOT, RUN, environment, joined, small, stopped_at

from kd_jax import data
from kd_jax.report import read_report
from kd_jax.weights import load_weights

pytestmark = [
  pytest.mark.slow,
  pytest.mark.once,
  pytest.mark.xdist_group('hosts'),
]
TRAINED = ('teacher', 'alone', 'distill', 'compress')
WORKER = 'tests/commands_worker.py'


@pytest.fixture(scope='module')
def configs(tmp_path_factory, data_dir):
  """A directory with the configurations."""
  directory = tmp_path_factory.mktemp('configs')

  def run(config):
    config.data.data_dir = str(data_dir)
    config.mesh.fsdp = 4

  def compare(config):
    config.data.data_dir = str(data_dir)
    config.update({'methods': ('kd',), 'seeds': 1})

  def search(config):
    config.search.update({'weights': ('int8', 'int4'), 'channels': (0.0,)})

  small('digits', directory / 'digits.json', run)
  small('compare_digits', directory / 'compare.json', compare)
  small('compress', directory / 'compress.json', search)
  return directory


def _commands(configs, place):
  """Words of each command, in turn; what a run needs is there before it."""
  run, cache = place / 'run', place / 'cache'
  config = f'--config={configs / "digits.json"}'
  return [
    ['run', config, f'--workdir={run}'],
    [
      'cache-teacher',
      config,
      f'--workdir={run}',
      f'--out={cache}',
      '--dtype=float32',
    ],
    [
      'run',
      config,
      f'--workdir={place / "cached"}',
      f'--config.teacher.cache={cache}',
      '--stages=teacher,distill',
    ],
    [
      'compare',
      f'--config={configs / "compare.json"}',
      f'--workdir={place / "compare"}',
    ],
    [
      'compress',
      f'--recipe={configs / "compress.json"}',
      f'--model={run}',
      '--budget=1.6 KB',
      f'--workdir={place / "small"}',
    ],
  ]


@pytest.fixture(scope='module')
def two(configs, tmp_path_factory):
  """Where two processes ran all commands, their codes, what they printed."""
  place = tmp_path_factory.mktemp('two')
  commands = _commands(configs, place)
  for index in range(2):
    # At last one that is not the same on both.
    differ = [*commands[0][:2], f'--workdir={place / "differ"}']
    differ.append(f'--config.seed={index}')
    words = json.dumps([*commands, differ])
    (place / f'{index}.json').write_text(words)
  started = joined(WORKER, own=lambda index: [str(place / f'{index}.json')])
  return place, *started.ended()


@pytest.fixture(scope='module')
def one(configs, tmp_path_factory):
  """Where one process did, with as many devices."""
  place = tmp_path_factory.mktemp('one')
  words = place / 'commands.json'
  words.write_text(json.dumps(_commands(configs, place)))
  command = [sys.executable, WORKER, str(words)]
  done = subprocess.run(command, cwd=ROOT, env=environment(4), timeout=BOUND)
  assert done.returncode == 0
  return place


def _json(path):
  return json.loads(path.read_text())


def _histories(one, two, directory, stages):
  for stage in stages:
    a, b = (_json(p / directory / stage / 'result.json') for p in (two, one))
    assert a['steps'] == b['steps']
    for row, wanted in zip(a['history'], b['history'], strict=True):
      assert row == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_all_commands_end_and_one_process_speaks(two):
  place, codes, said = two
  assert codes == [0, 0], said
  names = ('run', 'cache-teacher', 'run', 'compare', 'compress')
  ends = [f'{name} ended with 0' for name in names] + ['run ended with 2']
  for words in said:
    assert [x for x in words.splitlines() if ' ended with ' in x] == ends
    assert 'Process 1 differs from process 0: seed is 1, not 0.' in words
  assert not (place / 'differ').exists()
  for word in ('report: done', 'step 24/24', 'MB in', 'on the test split'):
    assert word in said[0] and word not in said[1]
  for word in ('Artefact: ', 'Table and plot', 'cache-teacher: step'):
    assert word in said[0] and word not in said[1]


def test_a_whole_run_equals_one_process(two, one):
  place = two[0]
  _histories(one, place, 'run', TRAINED)
  a, b = (read_report(p / 'run' / 'report') for p in (place, one))
  assert '4 x cpu (cpu) of 2 processes' in a['hardware']
  for row, wanted in zip(a['models'], b['models'], strict=True):
    for name in ('name', 'parameters', 'nonzero_parameters', 'flops'):
      assert row[name] == wanted[name]
    assert row['accuracy'] == pytest.approx(wanted['accuracy'], abs=1e-5)
    assert row['kl'] == pytest.approx(wanted['kl'], rel=1e-4, abs=1e-5)


def test_a_teacher_cache_of_two_processes_is_that_of_one(two, one):
  caches = [data.TeacherCache(p / 'cache') for p in (two[0], one)]
  assert caches[0].manifest['shards'].keys() == caches[1].manifest['shards'].keys()
  _histories(one, two[0], 'cached', ('teacher', 'distill'))
  # The live teacher's losses, and it was not the live one.
  live, cached = (
    _json(two[0] / name / 'distill' / 'result.json')['history']
    for name in ('run', 'cached')
  )
  assert cached[-1] == pytest.approx(live[-1], rel=1e-5, abs=1e-5)
