"""The benchmarks run, on networks of no use."""

import importlib.util
import pathlib
import re

import jax
import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / 'benchmarks'
TINY = f'{BENCHMARKS / "methods.py"}:tiny'
COLUMNS = (
  'flops',
  'teacher',
  'median',
  'low',
  'high',
  'relative',
  'expected',
  'ratio',
  'processor',
)
pytestmark = pytest.mark.usefixtures('quick_compilation')


def _load(name):
  """A script, which is a file and not a module of a package."""
  path = BENCHMARKS / f'{name}.py'
  spec = importlib.util.spec_from_file_location(f'benchmark_{name}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_methods_against_their_flops(tmp_path, monkeypatch):
  # Every step is called and the times are given: nothing here depends on the
  # machine's speed, nor on digits that the table rounds away.
  given = {'kd': 200.0, 'alone': 120.0, 'at': 260.0}

  def latencies(applies, images, *, runs):
    for _ in range(runs):
      for apply in applies.values():
        jax.block_until_ready(apply(images))
    spread = lambda ms: {'low_ms': ms - 1, 'median_ms': ms, 'high_ms': ms + 1}
    return {name: {**spread(given[name]), 'runs': runs} for name in applies}

  monkeypatch.setattr('kd_jax.report.measure.latencies', latencies)
  out = tmp_path / 'results' / 'methods.md'
  arguments = ['--config', TINY, '--runs', '3', '--out', str(out)]
  # The tiny networks differ in width, which FSP cannot compare.
  _load('methods').main([*arguments, '--methods', 'at', 'fsp'])
  text = out.read_text()
  rows = {
    re.search(r'`(\w+)`', line)[1]: dict(
      zip(COLUMNS, map(float, re.findall(r'(?<= )\(?([\d.e+-]+)', line)))
    )
    for line in text.splitlines()
    if '(`' in line
  }
  # What the others are expected from is measured, asked for or not.
  assert list(rows) == ['kd', 'alone', 'at']
  kd, alone, at = rows['kd'], rows['alone'], rows['at']
  assert alone.pop('teacher') == 0
  numbers = [row[c] for row in rows.values() for c in row]
  assert np.isfinite(numbers).all()
  assert {name: row['median'] for name, row in rows.items()} == given
  for row in (kd, alone):
    assert row['ratio'] == 1
  assert at['flops'] >= kd['flops'] > alone['flops']
  # The same forward pass, and some FLOPs of the method's own.
  assert at['teacher'] == pytest.approx(kd['teacher'], rel=0.05)
  more = (at['flops'] - at['teacher']) / alone['flops']
  taught = at['teacher'] / kd['teacher']
  expected = more * alone['relative'] + taught * (1 - alone['relative'])
  assert at['expected'] == pytest.approx(expected, abs=0.01)
  assert at['relative'] == 1.3
  assert at['ratio'] == pytest.approx(1.3 / at['expected'], abs=0.01)
  assert (at['low'], at['high']) == (259, 261)
  assert 'Not measured: fsp: ' in text and f'jax {jax.__version__}' in text


def test_methods_are_steps_of_their_own(capsys):
  methods = _load('methods')
  run = methods.open_run(methods.load_config(TINY))
  step = methods.compile_step(run, 'kd')
  losses = [float(step.once(None)[1]['loss/total']) for _ in range(3)]
  # Each starts where the one before ended; the first has a learning rate of 0.
  assert losses[2] < losses[1] == losses[0]
  assert step.flops > step.teacher_flops[0] > step.teacher_flops[1] >= 0
  with pytest.raises(SystemExit):
    methods.main(['--config', TINY, '--methods', 'kdd'])
  assert "Unknown method 'kdd'" in capsys.readouterr().err


def test_forms_of_an_integer_network(tmp_path):
  out = tmp_path / 'results' / 'int8.md'
  arguments = ['--widths', '4', '8', '--size', '8', '--batch', '2']
  _load('int8').main([*arguments, '--runs', '2', '--out', str(out)])
  forms, ways, _ = out.read_text().split('\n\n')
  assert len(ways.splitlines()) == 8 and '| im2col |' in ways
  rows = {}
  for line in forms.splitlines():
    if line.startswith('| ') and '---' not in line and 'median' not in line:
      name, *times, error = map(str.strip, line.strip('| ').split('|'))
      times = [float(t.split()[0]) for t in times]
      rows[name] = (*times, float('inf') if error == '-' else float(error))
  ways = [f'integer, {way}' for way in ('auto', 'direct', 'im2col', 'float32')]
  assert list(rows) == ['float32', 'fake-quant', *ways, 'onnxruntime int8']
  assert all(number > 0 for row in rows.values() for number in row)
  time, speed, in_a_row, speed_in_a_row, error = rows['float32']
  assert (speed, speed_in_a_row, error) == (1.0, 1.0, float('inf'))
  # The ways give the same integers, whose error is that of int8.
  assert len({rows[way][-1] for way in ways}) == 1
  assert 15 < rows[ways[0]][-1] < 60
