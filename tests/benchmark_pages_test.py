"""What the benchmarks share, and the seeds, whose runs are given here."""

import importlib
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / 'benchmarks'
pytestmark = pytest.mark.once


@pytest.fixture
def load(monkeypatch):
  """Imports a file of the benchmarks, beside which the others are found."""
  monkeypatch.syspath_prepend(BENCHMARKS)
  return importlib.import_module


@pytest.fixture
def page(load):
  """The module of pages."""
  return load('page')


def test_a_page_says_what_made_it(page, tmp_path, monkeypatch, capsys):
  out = tmp_path / 'made' / 'page.md'
  monkeypatch.setattr(sys, 'argv', ['x', '--rows', '2:4 pruned', '--seeds=1'])
  monkeypatch.chdir(BENCHMARKS)
  parts = {
    'machine': page.machine(['jax', 'numpy']),
    'command': page.command('int8.py'),
  }
  page.publish(str(out), ['| a |', '| b |'], ['One.', 'Two.'], **parts)
  text = out.read_text()
  tables, (one, two, machine, made) = (
    text.split('- ')[0],
    text.split('\n- ')[-4:],
  )
  assert tables == '| a |\n\n| b |\n\n' and [one[-4:], two] == ['One.', 'Two.']
  versions = f'jax {jax.__version__}, numpy {np.__version__}; '
  assert 'python 3' in machine and versions in machine
  words = "python benchmarks/int8.py --rows '2:4 pruned' --seeds=1"
  assert made == f'Made by `{words}`.\n'
  assert capsys.readouterr().out == text
  # Without a file it is printed; given words stand for those of the process.
  command = page.command(str(BENCHMARKS / 'soak.py'), ['--cycles', '3'])
  assert command == 'python benchmarks/soak.py --cycles 3'
  page.publish(None, ['| a |'], [], machine='here', command=command)
  assert capsys.readouterr().out == (
    '| a |\n\n- here\n- Made by `python benchmarks/soak.py --cycles 3`.\n'
  )


def test_a_page_that_cannot_be_written_leaves_the_old_one(
  page, tmp_path, monkeypatch, capsys
):
  out = tmp_path / 'page.md'
  parts = {'machine': 'here', 'command': 'python x.py'}
  page.publish(str(out), ['old'], [], **parts)
  before = out.read_text()

  def full(descriptor):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('os.fsync', full)
  with pytest.raises(OSError, match='page.md cannot be written'):
    page.publish(str(out), ['new'], [], **parts)
  assert out.read_text() == before and [*tmp_path.iterdir()] == [out]
  # What was measured is on the screen.
  assert 'new' in capsys.readouterr().out


def test_rounds_are_kept_by_a_clock_of_choice(load):
  turns, now, called = load('turns'), 0.0, []

  def call(name, seconds):
    left = iter(seconds)

    def once():
      nonlocal now
      now += next(left)
      called.append(name)
      return np.zeros(1)

    return once

  # Three rounds warm up; what they take is not counted.
  calls = {'a': call('a', [9, 9, 9, 1, 2]), 'b': call('b', [9, 9, 9, 4, 3])}
  times, spent = turns.in_turns(calls, runs=2, clock=lambda: now)
  assert {n: s.tolist() for n, s in spent.items()} == {'a': [1, 2], 'b': [4, 3]}
  assert [sorted(called[i : i + 2]) for i in (0, 2, 4, 6, 8)] == [
    ['a', 'b']
  ] * 5
  assert times['a']['runs'] == 2 and times['b']['median_ms'] > 0


def test_seeds_are_tabulated_and_the_rest_passed_on(
  load, tmp_path, monkeypatch
):
  seeds, ran = load('seeds'), []

  def run(command, *, check):
    options = dict(w[2:].split('=') for w in command if w.startswith('--'))
    seed = int(options['config.seed'])
    path = pathlib.Path(options['workdir']) / 'report'
    path.mkdir(parents=True)
    model = dict.fromkeys(('agreement', 'calibration_error'), 0.5)
    model |= dict.fromkeys(('parameters', 'nonzero_parameters', 'bytes'), 1234)
    model |= {'name': 'teacher', 'accuracy': 0.9 + 0.02 * seed}
    model['latency'] = {b: {'median_ms': 2.0} for b in ('1', '32')}
    model['train_seconds'] = None
    report = {
      'models': [model],
      'aims': [{'text': 'above 91', 'met': seed > 0, 'value': '90'}],
      'dataset': {'test_examples': 359},
      'versions': {'jax': '0.10'},
      'hardware': '1 x elsewhere',
      'created': '2020-02-02T02:02',
    }
    (path / 'report.json').write_text(json.dumps(report))
    ran.append(options)

  monkeypatch.setattr(subprocess, 'run', run)
  out = tmp_path / 'results' / 'seeds.md'
  words = ['--config', 'c.py', '--seeds', '2', '--workdir', str(tmp_path)]
  seeds.main([*words, '--out', str(out), '--config.data.data_dir=DIR'])
  assert [o['config.data.data_dir'] for o in ran] == ['DIR', 'DIR']
  table, notes = out.read_text().split('\n\n')
  assert '| teacher | 91.00 ± 1.41 | 50.00 ± 0.00 |' in table
  aim, protocol, machine, made = notes.splitlines()
  assert aim == '- above 91: met by 1 of 2 seeds (seed 0: 90)'
  assert protocol.startswith('- 2 seeds, ') and '359 images' in protocol
  # Of the runs, not of the process that tabulates them.
  assert machine == '- 1 x elsewhere; jax 0.10; 2020-02-02.'
  assert made.endswith('--config.data.data_dir=DIR`.')
