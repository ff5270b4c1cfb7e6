"""The report: what is written, what is read back, and what can be seen."""

import copy
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.text import Text
from rich.console import Console

from kd_jax import defaults
from kd_jax import report as reports
from kd_jax.recipe import assess, protocol
from kd_jax.report import looks, names, plots, table, units

FIGURES = (
  reports.curves_figure,
  reports.size_figure,
  reports.sparsity_figure,
)


def _curve(seed, steps, final, start_loss, sparsity=None):
  """A training curve as runs make them: noisy batches, a few evaluations."""
  rng = np.random.default_rng(seed)
  step = np.arange(0, steps, 10)
  rise = 1 - np.exp(-step / (steps / 9))
  accuracy = 0.1 + (final - 0.1) * rise
  batches = np.clip(rng.normal(accuracy, 0.02), 0, 1)
  every = np.arange(9, len(step), 10)
  curve = {
    'step': step.tolist(),
    'loss': (start_loss * np.exp(-rise * 4) * rng.uniform(0.8, 1.2, len(step))),
    'accuracy': batches.tolist(),
    'eval_step': step[every].tolist(),
    'eval_accuracy': (accuracy[every] + rng.normal(0, 0.003, len(every))),
  }
  if sparsity is not None:
    t = np.clip(step / (0.7 * steps), 0, 1)
    curve['sparsity'] = (sparsity * (1 - (1 - t) ** 3)).tolist()
  return {k: np.asarray(v).tolist() for k, v in curve.items()}


def _model(name, accuracy, size, ms, **more):
  latency = {
    str(batch): {
      'median_ms': ms * scale,
      'low_ms': ms * scale * 0.93,
      'high_ms': ms * scale * 1.31,
      'runs': 200,
    }
    for batch, scale in ((1, 1.0), (32, 9.0))
  }
  return {
    'name': name,
    'accuracy': accuracy,
    'agreement': min(1.0, accuracy + 0.0139),
    'kl': 0.031,
    'calibration_error': 0.012,
    'parameters': 24_106,
    'nonzero_parameters': 24_106,
    'bytes': size,
    'flops': 1.31e6,
    'latency': latency,
    'train_seconds': 31.4,
    'note': '',
  } | more


@pytest.fixture(scope='module')
def _made():
  small = {'nonzero_parameters': 5_212, 'train_seconds': None}
  big = {'parameters': 502_410, 'nonzero_parameters': 502_410}
  return {
    'format': 1,
    'kd_jax': '0.1.0',
    'created': '2026-11-21T10:00:00Z',
    'command': 'kd-jax run --config configs/digits.py --workdir runs/digits',
    'versions': {'python': '3.11.9', 'jax': '0.10.0', 'flax': '0.12.8'},
    'hardware': '2 x CPU (x86-64, AVX-512), 8 GB',
    'dataset': {
      'name': 'digits',
      'train_examples': 1149,
      'validation_examples': 288,
      'test_examples': 360,
      'classes': [str(i) for i in range(10)],
    },
    'compression': '80 % pruned, int8 fake-quant',
    'protocol': [
      'accuracy on the test split (360 images) at the last step, one seed (0)',
      'distillation: 0.9*KL(T=4, times T^2, batch mean) + 0.1*CE',
      'bytes of the file on disk; latency of one process on two cores',
    ],
    'models': [
      _model(
        'teacher',
        0.9861,
        2_012_344,
        1.25,
        agreement=1.0,
        kl=0.0,
        flops=3.1e7,
        train_seconds=148.0,
        **big,
      ),
      _model('student alone', 0.9667, 97_212, 0.42),
      _model('distilled', 0.9750, 97_212, 0.42),
      _model(
        'compressed',
        0.9722,
        97_212,
        0.61,
        nonzero_parameters=5_212,
        note='80 % sparse, 8 bits',
      ),
      _model('integer (JAX)', 0.9722, 27_904, 0.88, **small),
      _model('integer (StableHLO)', 0.9722, 31_310, 0.35, **small),
      _model('integer (ONNX)', 0.9694, 29_876, 0.084, **small),
    ],
    'curves': {
      'teacher': _curve(0, 1500, 0.986, 2.4),
      'student alone': _curve(1, 1500, 0.968, 2.3),
      'distilled': _curve(2, 1500, 0.975, 14.0),
      names.COMPRESSED: _curve(3, 1500, 0.972, 6.0, sparsity=0.8),
    },
    'sparsity': [
      {'path': 'conv1/kernel', 'size': 288, 'nonzero': 120},
      {'path': 'conv2/kernel', 'size': 9216, 'nonzero': 2012},
      {'path': 'dense1/kernel', 'size': 13824, 'nonzero': 2300},
      {'path': 'head/kernel', 'size': 640, 'nonzero': 640},
    ],
    'layers': [
      {
        'layer': 'conv2',
        'flops': [2_359_296, 589_824],
        'parameters': [9216, 2304],
        'bytes': [36_864, 2432],
      },
    ],
    'integers': [
      {
        'layer': 'conv2',
        'execution': 'static',
        'fake_sqnr_db': 38.94,
        'integer_sqnr_db': 38.91,
        'sqnr_db': None,
        'saturation': 0.0012,
        'dead_inputs': 34,
        'dead_weights': None,
      },
    ],
    'parity': [
      {
        'name': 'integer (StableHLO)',
        'against': 'integer (JAX)',
        'agreement': 1.0,
        'max_abs_error': 0.0,
        'examples': 360,
        'note': 'bitwise equal',
      },
      {
        'name': 'integer (ONNX)',
        'against': 'integer (JAX)',
        'agreement': 0.9972,
        'max_abs_error': 0.021,
        'examples': 360,
        'note': '5 of 5 layers run as integer kernels',
      },
    ],
    'aims': [
      {
        'text': 'teacher at 98 % or better on the test split',
        'value': '98.6 %',
        'met': True,
      },
      {
        'text': 'the artefact is at most 1/50 of the teacher',
        'value': '1/67',
        'met': True,
      },
      {
        'text': 'distillation gains two points',
        'value': '+0.8 pt',
        'met': False,
      },
    ],
  }


@pytest.fixture
def report(_made):
  return copy.deepcopy(_made)


def _empty(report):
  """The same report after nothing was measured but names."""
  models = [{'name': m['name'], 'accuracy': None} for m in report['models']]
  models[0]['latency'] = {'1': None}
  return {'format': 1, 'models': models, 'dataset': None, 'curves': None}


def _printed(report, width=140):
  console = Console(width=width, file=io.StringIO(), force_terminal=False)
  reports.print_table(report, console)
  return console.file.getvalue()


def _boxes(fig, report):
  """The box of each model's name in a figure, in pixels."""
  fig.draw_without_rendering()
  names = [m['name'] for m in report['models']]
  found = {}
  for text in fig.axes[0].texts:
    if text.get_text() in names:
      # Text's own extent: an annotation's includes its leader line.
      found[text.get_text()] = Text.get_window_extent(text)
  return found


class _Page(HTMLParser):
  """Collects the tags of a page, its addresses and its words."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.addresses, self.ids, self.words = [], [], [], ''
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    for key, value in attrs:
      if key in ('src', 'href', 'xlink:href', 'action', 'srcset', 'data'):
        self.addresses.append(value)
      if key == 'id':
        self.ids.append(value)

  def handle_data(self, data):
    self.words += data.replace('\xa0', ' ') + '\n'


def test_round_trip(report, tmp_path):
  paths = reports.write_report(report, tmp_path / 'new' / 'run')
  assert reports.read_report(tmp_path / 'new' / 'run') == report
  assert set(paths) == {'report.json', 'report.md', 'report.html'}
  found = {p.name for p in (tmp_path / 'new' / 'run').iterdir()}
  assert found == set(paths)  # no temporary file stays behind
  assert paths['report.md'].read_text('utf-8') == reports.markdown(report)
  assert paths['report.html'].read_text('utf-8') == reports.html(report)


def test_overwrites_only_when_allowed(report, tmp_path):
  reports.write_report(report, tmp_path)
  report['created'] = 'later'
  with pytest.raises(FileExistsError, match='overwrite is False'):
    reports.write_report(report, tmp_path, overwrite=False)
  assert reports.read_report(tmp_path)['created'] != 'later'
  reports.write_report(report, tmp_path)
  assert reports.read_report(tmp_path)['created'] == 'later'


def test_a_failed_write_keeps_the_old_report(report, tmp_path):
  reports.write_report(report, tmp_path)
  before = {p: p.read_bytes() for p in tmp_path.iterdir()}
  report['command'] = object()
  with pytest.raises(TypeError):
    reports.write_report(report, tmp_path)
  assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_crash_while_writing_keeps_the_old_files(
  report, tmp_path, monkeypatch
):
  reports.write_report(report, tmp_path)
  before = {p: p.read_bytes() for p in tmp_path.iterdir()}

  def crash(source, target):
    raise OSError('no space left')

  monkeypatch.setattr('os.replace', crash)
  with pytest.raises(OSError, match='no space'):
    reports.write_report(report | {'created': 'later'}, tmp_path)
  assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_bucket_is_not_taken_for_a_directory(report):
  with pytest.raises(ValueError, match='not a local directory'):
    reports.write_report(report, 'gs://bucket/run')


def test_nan_and_numpy_numbers_become_valid_json(report, tmp_path):
  report['models'][0]['kl'] = float('nan')
  report['models'][1]['kl'] = np.float32('inf')
  report['models'][2]['bytes'] = np.int64(7)
  report['curves']['teacher']['loss'] = np.array([1.0, np.nan])
  path = reports.write_report(report, tmp_path)['report.json']

  def refuse(constant):
    raise AssertionError(f'{constant} is not JSON')

  read = json.loads(path.read_text('utf-8'), parse_constant=refuse)
  assert [m['kl'] for m in read['models'][:2]] == [None, None]
  assert read['models'][2]['bytes'] == 7
  assert read['curves']['teacher']['loss'] == [1.0, None]


@pytest.mark.parametrize(
  'content, message',
  [
    (None, 'There is no report at'),
    (b'{"format": 1, "models": [', 'is damaged: it is not JSON'),
    (b'\xff\xfe\x00', 'is damaged: it is not JSON'),
    (b'[1, 2]', 'holds a list, not a report'),
    (b'{"format": 2, "models": []}', 'has format 2, but .* reads format 1'),
    (b'{"format": 1, "models": {"a": 1}}', 'models are not a list'),
    (b'{"format": 1, "models": ["a"]}', 'models are not a list'),
  ],
)
def test_reading_says_what_is_wrong(tmp_path, content, message):
  if content is not None:
    (tmp_path / 'report.json').write_bytes(content)
  with pytest.raises(ValueError, match=message) as error:
    reports.read_report(tmp_path)
  assert 'report.json' in str(error.value)
  assert str(error.value).endswith('.') and '\n' not in str(error.value)


def test_units():
  assert units.percent(0.98611) == '98.6 %'
  assert units.percent(0.99996) == '99.996 %'  # not a perfect score
  assert units.percent(1.0) == '100.0 %'
  assert units.size(999) == '999 B'
  assert units.size(999_700) == '1.00 MB'
  assert units.count(99_960) == '100k'
  assert units.fraction(83_400, 2_000_000) == '1/24'
  assert units.fraction(2, 1) == '2.0x'
  assert units.seconds(148) == '2.47 min'
  assert units.milliseconds(0.084) == '0.084'
  for write in (units.percent, units.size, units.count, units.seconds):
    assert write(None) == write(float('nan')) == '-'


def test_missing_values_are_dashes(report):
  empty = _empty(report)
  for column in table.model_columns(empty)[1:]:
    assert {cell.value for cell in column.cells} == {'-'}, column.title
    assert {cell.detail for cell in column.cells} == {''}, column.title
  row = next(r for r in reports.markdown(empty).splitlines() if '| tea' in r)
  assert set(row.split('|')[2:-1]) == {' - '}
  cells = re.findall(r'<td>(.*?)</td>', reports.html(empty))
  assert len(cells) >= 7 * 8 and set(cells) == {'&ndash;'}
  assert 'None' not in _printed(empty) and 'nan' not in _printed(empty)


def test_an_empty_report_can_still_be_shown(tmp_path):
  nothing = {'format': 1, 'models': []}
  reports.write_report(nothing, tmp_path)
  assert 'No model but the teacher was measured' in reports.html(nothing)
  for make in FIGURES:
    texts = [t.get_text() for ax in make(nothing).axes for t in ax.texts]
    assert set(texts) == {'not measured'}


def test_markdown_tables_are_well_formed(report):
  report['models'][1]['name'] = 'a|b <i>*c*'
  report['models'][2]['note'] = 'two\nlines'
  blocks = re.findall(r'(?:^\|.*\n)+', reports.markdown(report), flags=re.M)
  assert len(blocks) == 5
  for block, rows in zip(blocks, (7, 2, 4, 1, 1), strict=True):
    lines = block.splitlines()
    cells = [len(re.findall(r'(?<!\\)\|', line)) for line in lines]
    assert len(lines) == rows + 2 and len(set(cells)) == 1
    assert set(lines[1]) <= set('|:- ')
  assert r'a\|b &lt;i>\*c\*' in blocks[0] and 'two lines' in blocks[0]


def test_all_forms_quote_protocol_aims_and_models(report):
  page = _Page(reports.html(report)).words
  printed = ' '.join(_printed(report).split())
  text = reports.markdown(report).replace('\\', '')
  for shown in (page, printed, text):
    for line in report['protocol']:
      assert line in shown
    for aim in report['aims']:
      assert aim['text'] in shown and aim['value'] in shown
    assert 'not met' in shown and '98.6 %' in shown and '1/67' in shown
    assert '1.16-1.64' in shown  # the spread beside the median
  assert report['hardware'] in page and report['command'] in text


def test_layers_and_their_integers_are_told(report, tmp_path):
  report['sparsity'][0]['target'] = 0.58
  reports.write_report(report, tmp_path)
  text = (tmp_path / 'report.md').read_text()
  rows = [line for line in text.splitlines() if line.startswith('| conv2 |')]
  assert rows == [
    '| conv2 | 2.36M | 590k | 9.22k | 2.30k | 36.9 KB | 2.43 KB |',
    '| conv2 | static | 38.9 | 38.9 | exact | 0.12 % | 34 | - |',
  ]
  assert '| conv1/kernel | 288 | 120 | 58.3 % | 58.0 % |' in text
  assert '| head/kernel | 640 | 640 | 0.0 % | - |' in text
  page = (tmp_path / 'report.html').read_text()
  for word in ('Cost of each layer', 'dead weights', '2.43', 'target'):
    assert word in page


def test_print_table_fits_100_columns(report):
  report['models'][3]['name'] = 'a' * 70
  report['models'][4]['name'] = '[bold]not markup[/bold] :smile:'
  report['aims'][0]['text'] = 'a long aim ' * 20
  report['protocol'].append('a long note ' * 20)
  latency = report['models'][0]['latency']
  latency |= {str(batch): latency['1'] for batch in (2, 4, 8, 16)}
  printed = _printed(report)
  assert max(map(len, printed.splitlines())) <= 100
  assert '[bold]' in printed
  assert 'batch 1 ' in printed and 'batch 32' in printed
  assert '502k nonzero' in printed  # a long name squeezes no number
  assert max(map(len, _printed(report, width=80).splitlines())) <= 80


def test_page_needs_nothing_else(report):
  text = reports.html(report)
  page = _Page(text)
  assert page.tags.count('svg') == 5 and 'style' in page.tags
  assert not {'script', 'link', 'iframe', 'img', 'base'} & set(page.tags)
  assert page.addresses and all(a.startswith('#') for a in page.addresses)
  assert 'http' not in text and '@import' not in text
  assert all(u.startswith('#') for u in re.findall(r'url\((.*?)\)', text))
  assert len(page.ids) == len(set(page.ids))
  assert {a[1:] for a in page.addresses} <= set(page.ids)
  assert set(re.findall(r'url\(#(.*?)\)', text)) <= set(page.ids)
  assert 'prefers-color-scheme:dark' in text and 'width=device-width' in text
  defined = set(re.findall(r'(--\w+):#', text))
  assert set(re.findall(r'var\((--\w+)\)', text)) <= defined


def test_page_is_the_same_twice(report):
  assert reports.html(report) == reports.html(report)


def test_page_escapes_every_word(report):
  evil = '<script>alert("1")</script> & $x$'
  for model in report['models'][3:5]:
    model['name'] = model['note'] = evil
  report['curves'][evil] = report['curves'].pop(names.COMPRESSED)
  report['sparsity'][0]['path'] = evil
  report['parity'][0] |= {'name': evil, 'against': evil, 'note': evil}
  report['aims'][2] |= {'text': evil, 'value': evil}
  report['protocol'].append(evil)
  report |= {'created': evil, 'command': evil, 'hardware': evil}
  report['versions'][evil] = evil
  report['dataset']['name'] = evil
  page = _Page(reports.html(report))
  assert 'script' not in page.tags
  assert page.words.count(evil) >= 16
  assert evil not in reports.markdown(report)


def test_summary_is_honest_about_a_gain_within_the_noise(report):
  lead, speed, gain, aims = reports.summary(report)
  assert lead == (
    "integer (ONNX) scores 96.9 %, 1.7 points below the teacher's 98.6 %, in "
    "29.9 KB, 1/67 of the teacher's size."
  )
  assert '0.084 ms against 1.25 ms: 14.9 times as fast.' in speed
  assert 'a gain of 0.8 points, within the noise of 360' in gain
  # 2 sqrt(p (1 - p) / n) for both, added in quadrature
  noise = 200 * ((0.975 * 0.025 + 0.9667 * 0.0333) / 360) ** 0.5
  assert f'{noise:.1f} points' in gain
  assert aims.startswith('2 of 3 aims met; the others: distillation gains')


def test_bounds_are_written_as_they_were_given():
  accuracy = looks.Look('accuracy', 'accuracy', True, True)
  error = looks.Look('mse', 'MSE', False, False)
  for look, bound, text in (
    (accuracy, 0.98, '98.0 %'),
    (accuracy, 0.9675, '96.75 %'),
    (error, 0.6, '0.600'),
    (error, 0.01234, '0.01234'),
  ):
    assert look.written(bound, look.digits(bound)) == text


def test_summary_does_not_flatter(report):
  models = {m['name']: m for m in report['models']}
  models['distilled']['accuracy'] = 0.80
  models['integer (ONNX)']['accuracy'] = 0.9861
  models['integer (ONNX)']['bytes'] = 4_024_688
  times = {'median_ms': 2.5, 'low_ms': 1.6, 'high_ms': 3.0}
  models['integer (ONNX)']['latency']['1'] |= times
  lead, speed, gain, _ = reports.summary(report)
  assert 'the same as the teacher' in lead and "2.0x of the teacher's" in lead
  assert '2.0 times as slow, though the spreads overlap' in speed
  assert 'a loss of 16.7 points, beyond the noise' in gain
  report['models'].remove(models['student alone'])
  assert 'what distillation gained is unknown' in reports.summary(report)[2]


@pytest.mark.parametrize('make', FIGURES)
def test_figures_have_labelled_axes(report, make):
  fig = make(report)
  for ax in fig.axes:
    assert ax.get_xlabel() and ax.get_ylabel()
    assert len(ax.lines) + len(ax.patches) > 0
  assert fig._repr_png_().startswith(b'\x89PNG')


def test_every_stage_of_a_run_has_a_colour_of_its_own():
  assert set(plots.COLORS) == set(assess.TRAINED.values())


def test_curves_name_every_stage_and_survive_gaps(report):
  report['curves']['teacher']['loss'][3] = None
  report['curves']['distilled']['eval_accuracy'] = [None, 0.5]
  report['curves']['student alone'] = {'step': [0, 1], 'loss': [None, None]}
  accuracy, loss, schedule = reports.curves_figure(report).axes

  def legend(ax):
    return [t.get_text() for t in ax.get_legend().get_texts()]

  assert legend(accuracy) == ['teacher', 'distilled', names.COMPRESSED]
  assert legend(loss) == ['teacher', 'distilled', names.COMPRESSED]
  assert legend(schedule) == [names.COMPRESSED]
  assert '%' in accuracy.get_ylabel() and 'step' in accuracy.get_xlabel()
  assert loss.get_yscale() == 'log'
  report['curves'][names.COMPRESSED].pop('sparsity')
  assert len(reports.curves_figure(report).axes) == 2


@pytest.mark.parametrize('crowded', [False, True])
def test_size_figure_names_every_model_without_overlap(report, crowded):
  if crowded:
    # Beside 'compressed', where its name would stand.
    report['models'][1] |= {'bytes': 150_000, 'accuracy': 0.9722}
    for model in report['models'][4:]:
      model |= {'bytes': 28_000, 'accuracy': 0.9722}
    more = {'bytes': 28_400, 'accuracy': 0.9722}
    report['models'] += [
      report['models'][4] | more | {'name': rf'ONNX int{bits}, $\no formula$'}
      for bits in (2, 3, 4)
    ]
  fig = reports.size_figure(report)
  boxes = _boxes(fig, report)
  assert set(boxes) == {m['name'] for m in report['models']}
  names = list(boxes)
  area = fig.bbox
  for i, name in enumerate(names):
    assert area.x0 <= boxes[name].x0 and boxes[name].x1 <= area.x1, name
    for other in names[:i]:
      assert not boxes[name].overlaps(boxes[other]), (name, other)
  for line in fig.axes[0].lines:
    x, y = fig.axes[0].transData.transform(line.get_xydata()[0])
    assert not any(box.contains(x, y) for box in boxes.values())
  assert fig.axes[0].get_xscale() == 'log'
  assert 'size on disk' in fig.axes[0].get_xlabel()


def test_sparsity_figure_shows_the_largest_of_many_layers(report):
  report['sparsity'] = [
    {'path': f'layer{i}', 'size': 100 + i, 'nonzero': 50} for i in range(60)
  ]
  [ax] = reports.sparsity_figure(report).axes
  labels = [t.get_text() for t in ax.get_yticklabels()]
  assert labels == [f'layer{i}' for i in range(20, 60)]
  assert '40 largest of 60' in ax.get_title(loc='left')
  widths = [bar.get_width() for bar in ax.patches]
  np.testing.assert_allclose(widths[-1], 100 * (1 - 50 / 159))


def test_figures_show_themselves_in_a_notebook(report):
  formatters = pytest.importorskip('IPython.core.formatters')
  data, _ = formatters.DisplayFormatter().format(reports.size_figure(report))
  assert data['image/png'].startswith(b'\x89PNG')


def test_import_loads_no_matplotlib():
  code = (
    'import sys, kd_jax.report; '
    'sys.exit(any(m.split(".")[0] == "matplotlib" for m in sys.modules))'
  )
  subprocess.run([sys.executable, '-c', code], check=True)


def test_figures_leave_pyplot_alone(report):
  pyplot = pytest.importorskip('matplotlib.pyplot')
  with pyplot.rc_context({'font.size': 23, 'svg.fonttype': 'path'}):
    before = dict(pyplot.rcParams), pyplot.get_fignums()
    for make in FIGURES:
      make(report)
    reports.html(report)
    assert (dict(pyplot.rcParams), pyplot.get_fignums()) == before


def test_dropped_steps_and_spikes_are_said():
  rows = [
    {'name': 'teacher', 'steps': 100, 'dropped': 0, 'spikes': 0},
    {'name': 'distilled', 'steps': 200, 'dropped': 3, 'spikes': 2},
  ]
  report = {'format': 1, 'models': [], 'dropped': rows}
  words = ' '.join(reports.summary(report))
  assert '3 of 200 steps of distilled, 2 spikes in the loss' in words
  assert 'of teacher' not in words
  assert '| distilled | 200 | 3 | 2 |' in reports.markdown(report)
  assert 'went well' not in ' '.join(
    reports.summary({**report, 'dropped': rows[:1]})
  )


@pytest.mark.parametrize(
  'changes, words',
  [
    ({}, '80 % pruned, int8 fake-quant'),
    ({'prune.sparsity': 0.0}, 'not pruned, int8 fake-quant'),
    (
      {'prune.structure': 'residual_blocks', 'prune.sparsity': 0.125},
      '12.5 % pruned (residual blocks), int8 fake-quant',
    ),
    ({'prune.method': 'preserve'}, 'zeros preserved, int8 fake-quant'),
    (
      {'quantize.weights': (('.*', 'int4'),)},
      '80 % pruned, fake-quant of int4 weights and int8 activations',
    ),
    (
      {
        'quantize.weights': (('.*', 'float'),),
        'quantize.activations': (('.*', 'float'),),
      },
      '80 % pruned, not quantized: rows called integer compute in float',
    ),
  ],
)
def test_a_report_says_what_compressed_is(report, changes, words):
  recipe = defaults.get_config().compress
  recipe.update_from_flattened_dict(changes)
  report['compression'] = protocol.compression(recipe)
  assert report['compression'] == words
  assert f'- Compressed: {words}.' in reports.markdown(report)
  report['compression'] = None
  assert 'Compressed:' not in reports.markdown(report)
