"""The benchmarks run, on networks of no use."""

import functools
import importlib.util
import pathlib
import re
import subprocess
import sys

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
pytestmark = [
  pytest.mark.once,
  pytest.mark.usefixtures('beside_each_other'),
]


@pytest.fixture
def beside_each_other(monkeypatch):
  """Files of the benchmarks import each other, as when one is run."""
  monkeypatch.syspath_prepend(BENCHMARKS)


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
    return {
      name: {'low_ms': ms - 1, 'median_ms': ms, 'high_ms': ms + 1, 'runs': runs}
      for name, ms in ((name, given[name]) for name in applies)
    }

  monkeypatch.setattr('kd_jax.report.measure.latencies', latencies)
  out = tmp_path / 'results' / 'methods.md'
  arguments = ['--config', TINY, '--runs', '3', '--out', str(out)]
  # The tiny networks differ in width, which FSP cannot compare.
  _load('methods').main([*arguments, '--methods', 'at', 'fsp'])
  text = out.read_text()
  rows = {
    re.search(r'`(\w+)`', line)[1]: dict(
      zip(
        COLUMNS,
        map(float, re.findall(r'(?<= )\(?([\d.e+-]+)', line)),
        strict=True,
      )
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
  assert 'Made by `python benchmarks/methods.py --config ' in text


def test_methods_are_steps_of_their_own(capsys):
  methods = _load('methods')
  run = methods.open_run(methods.load_config(TINY))
  step = methods.compile_step(run, 'kd')
  losses = [float(step.once()[1]['loss/total']) for _ in range(3)]
  # Each starts where the one before ended; the first has a learning rate of 0.
  assert losses[2] < losses[1] == losses[0]
  assert step.flops > step.teacher_flops[0] > step.teacher_flops[1] >= 0
  # Its student gets the teacher's head, from no directory.
  assert methods.compile_step(run, 'simkd').flops > step.flops
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


def test_overhead_of_a_step(tmp_path, monkeypatch):
  # Rounds of given seconds: the median of the ratios, not the ratio of the
  # medians, which is 1.5 here.
  overhead = _load('step_overhead')
  seconds = {'plain': [1.0, 2.0, 4.0], overhead.QAT: [1.05, 3.0, 4.2]}

  def in_turns(steps, *, runs):
    for _ in range(runs):
      assert [step() for step in steps.values()] == [0, 0]
    return {n: {} for n in steps}, {n: np.array(seconds[n]) for n in steps}

  monkeypatch.setattr(overhead.turns, 'in_turns', in_turns)
  steps = {name: lambda: 0 for name in seconds}
  plain, qat = overhead.benchmark(steps, runs=3)
  assert qat['ratio'].tolist() == pytest.approx([1.05, 1.05, 1.275])
  assert plain['ratio'].tolist() == [1, 1, 1]
  for row in (plain, qat):
    row |= dict.fromkeys(('median_ms', 'low_ms', 'high_ms'), 1.0)
  text = overhead.table([plain, qat])
  assert '| 1.050 (1.050 to 1.275) | <= 1.10 | yes |' in text
  qat['ratio'] = np.float32([1.0, 1.11, 1.2])
  assert '| <= 1.10 | no |' in overhead.table([plain, qat])
  # The steps themselves, compiled.
  out = tmp_path / 'results' / 'overhead.md'
  monkeypatch.undo()
  arguments = ['--model', 'tiny', '--size', '8', '--batch', '4', '--runs', '2']
  overhead.main([*arguments, '--out', str(out)])
  names = [line.split(' | ')[0] for line in out.read_text().splitlines()]
  expected = ('plain', *overhead.GOALS, 'pruning, masks renewed', 'LSQ')
  assert {f'| {name}' for name in expected} < {*names}
  assert '| QAT int8, simulated folding' in names
  assert '| the same by Qwix' in names


def test_ways_to_distil_lose_alike_and_are_timed(tmp_path):
  step_time = _load('step_time')
  out = tmp_path / 'step_time.md'
  words = ['--pair', 'tiny', '--size', '8', '--batch', '4', '--rounds', '1']
  words += ['--steps', '1', '--no-torch_compile', '--out', str(out)]
  # It compares the losses of all ways itself, before it times them.
  step_time.main(words)
  rows = out.read_text().splitlines()[2:]
  names = [row.split('|')[1].strip() for row in rows if row.startswith('|')]
  ways = [step_time.OURS, step_time.CACHED, step_time.JAX_LOOP]
  torch = [step_time.EAGER] if importlib.util.find_spec('torch') else []
  assert names == ways + torch
  assert 'goal 1.03' in rows[0]


def test_ways_that_lose_otherwise_are_found(monkeypatch):
  step_time = _load('step_time')
  distil_step = step_time.distil_step
  batch = distil_step.random_batch(4, 8)
  ways = functools.partial(
    step_time.ways,
    'tiny',
    batch,
    'float32',
    torch_compile=False,
    recipe=distil_step.Recipe(decay=0.5),
  )
  ways()
  monkeypatch.setattr(distil_step, '_kernels', lambda params: True)
  with pytest.raises(AssertionError, match='kd_jax'):
    ways()


def test_steps_do_what_their_names_say():
  overhead = _load('step_overhead')
  batch = {
    'image': jax.numpy.ones((4, 8, 8, 3)),
    'label': jax.numpy.zeros(4, 'int32'),
  }
  model = overhead.models.make_model(**overhead.MODELS['tiny'], num_classes=10)
  found = overhead.forms(model, batch)
  held, renewed = 'pruning, between two prunings', 'pruning, masks renewed'
  sparsities = {}
  for name in (held, renewed):
    step = overhead.compiled(found[name], batch)
    made = [float(step()[0].opt_state.sparsity) for _ in range(3)]
    sparsities[name] = made[1:]
  # A step between two prunings makes no masks; the other makes them each time.
  assert len(set(sparsities[held])) == 1 and sparsities[held][0] == 0.5
  assert len(set(sparsities[renewed])) == 2


def test_accuracy_of_compressed_networks(tmp_path, data_dir):
  out = tmp_path / 'results' / 'compression.md'
  arguments = ['--model', 'tiny', '--data_dir', str(data_dir)]
  arguments += ['--train_examples', '64', '--epochs', '4', '--seeds', '1']
  arguments += ['--dense_epochs', '1', '--adaround_steps', '2']
  compression = _load('compression_accuracy')
  trained = ('int8, QAT', '80 % pruned', '90 % pruned', '2:4 pruned')
  trained += (compression.CHANNELS, compression.TOGETHER)
  arguments += ['--rows', *trained, 'int4 weights, PTQ, AdaRound']
  arguments += ['int8 static, PTQ', '--out', str(out)]
  compression.main(arguments)
  networks, goals, notes = out.read_text().split('\n\n')
  rows = {}
  for line in networks.splitlines()[2:]:
    name, accuracy, change, size, _, macs, _ = line.strip('| ').split(' | ')
    rows[name] = [
      float(n.replace(',', '')) for n in (accuracy, size, macs.strip())
    ]
    assert change == '-' or abs(float(change)) <= 100
  assert len(rows) == 9 and next(iter(rows)) == compression.DENSE
  accuracies, sizes, macs = map(
    lambda i: {name: row[i] for name, row in rows.items()}, range(3)
  )
  assert all(0 <= a <= 100 for a in accuracies.values())
  assert sizes['int8, QAT'] == sizes['int8 static, PTQ'] < sizes['dense'] / 2
  assert sizes['int4 weights, PTQ, AdaRound'] < sizes['int8, QAT']
  assert sizes['90 % pruned'] < sizes['80 % pruned'] < sizes['2:4 pruned']
  assert sizes[compression.TOGETHER] < sizes['int8, QAT']
  assert macs[compression.CHANNELS] < macs['dense'] / 2
  assert len({*macs.values()}) == 2
  # What was not measured is no goal.
  assert goals.count('| yes |') + goals.count('| no |') == 9
  assert 'latency, batch 32, onnxruntime |' in goals
  assert f'jax {jax.__version__}' in notes


def test_verdicts_compare_means_of_differences():
  compression = _load('compression_accuracy')
  speed = [{'batch 1': 1.6, 'batch 32': 1.7}, {'batch 1': 1.7, 'batch 32': 1.8}]

  def row(name, *accuracy):
    return {'name': name, 'accuracy': accuracy, 'speed': speed}

  rows = [row('dense', 90.0, 80.0)]
  rows += [row(name, 90.0, 80.0) for name in compression.GOALS]
  rows[1] = row('int8 static, PTQ', 89.0, 80.0)
  rows[2] = row('int8, QAT', 89.7, 79.8)
  rows += [row(compression.TOGETHER, 80.0, 80.0)]
  rows += [row(compression.IN_TURN, 80.0, 80.0)]
  lines = compression.verdicts(rows).splitlines()[2:]
  measured = [line.strip('| ').split(' | ')[1:] for line in lines]
  assert measured[:3] == [['-0.50', 'yes'], ['-0.25', 'no'], ['+0.00', 'yes']]
  # The mean over seeds of the ratio at each batch, then the comparison.
  assert [m[1] for m in measured[-3:]] == ['no', 'yes', 'no']


def test_stored_bytes_of_zeros_and_codes():
  stored = _load('compression_accuracy').stored_bytes
  kernel = np.zeros((4, 8), np.float32)
  kernel[0, :3] = 1
  # 32 bits say where three values of four bytes are.
  assert stored({'params': {'a': {'kernel': kernel}}}) == 4 + 12
  assert stored({'params': {'a': {'bias': kernel}}}) == 128
  assert stored({'int8': {'a': {'kernel': kernel.astype(np.int8)}}}) == 4 + 3
  assert stored({'int8': {'a': {'kernel': np.ones((4, 8), np.int8)}}}) == 32


def test_a_twin_in_pytorch(data_dir):
  torch = pytest.importorskip('torch')
  twin = _load('pytorch_twin')
  # The two networks are one function, of the same weights.
  variables = twin.initial(0)
  x = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
  forward = twin.adapters.from_linen(twin.models.CNN(10, widths=twin.WIDTHS))
  ours = forward(variables, {'image': x}).output
  model = twin.twin(variables, compressed=False).eval()
  with torch.no_grad():
    theirs = model(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy()
  np.testing.assert_allclose(ours, theirs, atol=1e-4)
  # So are the two recipes: the same zeros at the end.
  digits = twin.load(str(data_dir), max_examples=128)
  rows = twin.benchmark(digits, seeds=1, epochs=8, runs=1)
  assert [row['name'] for row in rows] == [*twin.FORMS]
  assert [row['sparsity'][0] for row in rows] == pytest.approx(
    [0, 0.8, 0, 0.8], abs=1e-4
  )
  assert all(row['accuracy'][0] > 20 for row in rows)
  lines = twin.table(rows).splitlines()
  assert lines[2].endswith(f'| 1.00 | {rows[0]["seconds"][0]:.1f} |')


@pytest.mark.slow
def test_soak_counts_and_compares(tmp_path):
  # In a process of its own, as it forks what has not started JAX yet.
  out = tmp_path / 'soak.md'
  done = subprocess.run(
    [sys.executable, BENCHMARKS / 'soak.py', '--cycles=3', f'--out={out}'],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  text = out.read_text()
  assert '| processes ended by a signal | 3 |' in text
  assert '| results with other bits, or other faults | 0 |' in text
  assert '`python benchmarks/soak.py --cycles=3 ' in text
