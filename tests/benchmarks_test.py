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
  'share',
  'median',
  'low',
  'high',
  'relative',
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


def test_methods_against_their_flops(tmp_path):
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
  # KD is measured whether it is asked for or not.
  assert list(rows) == ['kd', 'at']
  numbers = np.array([[row[c] for c in COLUMNS] for row in rows.values()])
  assert np.isfinite(numbers).all() and (numbers > 0).all()
  kd, at = rows['kd'], rows['at']
  assert kd['share'] == kd['relative'] == kd['ratio'] == 1
  assert at['flops'] >= kd['flops']
  assert at['share'] == pytest.approx(at['flops'] / kd['flops'], abs=2e-3)
  assert at['relative'] == pytest.approx(at['median'] / kd['median'], rel=0.1)
  assert at['ratio'] == pytest.approx(at['relative'] / at['share'], abs=0.02)
  assert at['low'] <= at['median'] <= at['high']
  assert 'Not measured: fsp: ' in text and f'jax {jax.__version__}' in text


def test_methods_are_steps_of_their_own(capsys):
  methods = _load('methods')
  run = methods.open_run(methods.load_config(TINY))
  step, cost = methods.compile_step(run, 'kd')
  losses = [float(step(None)[1]['loss/total']) for _ in range(3)]
  # Each starts where the one before ended; the first has a learning rate of 0.
  assert losses[2] < losses[1] == losses[0]
  assert cost['flops'] > 0
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
      name, time, speed, error = map(str.strip, line.strip('| ').split('|'))
      rows[name] = (float(time.split()[0]), float(speed), float(error))
  ways = [f'integer, {way}' for way in ('direct', 'im2col', 'float32')]
  assert list(rows) == ['float32', 'fake-quant', *ways, 'onnxruntime int8']
  assert all(time > 0 and speed > 0 for time, speed, _ in rows.values())
  assert rows['float32'][1:] == (1.0, float('inf'))
  # The ways give the same integers, whose error is that of int8.
  assert len({rows[way][2] for way in ways}) == 1
  assert 15 < rows[ways[0]][2] < 60
