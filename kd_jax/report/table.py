"""A report as tables: columns of text, Markdown, and a rich table.

Owns which columns there are and where they fit; how a value is written is in
`units`, and what the numbers amount to in `findings`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kd_jax.report.findings import (
  Report,
  aims,
  batch_sizes,
  digits_of,
  examples_of,
  find_model,
  models_of,
  standard_error,
  summary,
  timing,
)
from kd_jax.report.looks import looks_of
from kd_jax.report.names import COMPRESSED, TEACHER
from kd_jax.report.units import (
  DASH,
  count,
  fraction,
  milliseconds,
  number,
  percent,
  seconds,
  size,
)

INTEGERS = (
  'Signal to noise of each output: fake-quant and integers against float, and '
  'integers against fake-quant'
)
WIDTH = 100  # columns of a terminal that the printed table never exceeds


# Of metrics whose title does not say all.
_MEANING = {
  'agreement': 'Agreement: share of examples on which the model and the '
  'teacher predict the same class.',
  'kl': 'KL: divergence from the teacher.',
  'calibration_error': 'ECE: expected calibration error.',
}


class Cell(NamedTuple):
  """One value of a table, and the smaller print under or beside it."""

  value: str
  detail: str = ''


class Column(NamedTuple):
  """A titled column of the models table; `brief` ones fit in a terminal."""

  title: str
  cells: list[Cell]
  brief: bool = True


def model_columns(report: Report) -> list[Column]:
  """The columns of the models table, every cell as text.

  Args:
    report: the report; missing values become dashes.

  Returns:
    The columns, each with one cell for each model.
  """
  models, digits = models_of(report), digits_of(report)
  teacher = find_model(report, TEACHER)
  quality, *others = looks_of(report)

  def write(look):
    return lambda value: look.written(value, digits if look.percent else 1)

  def plain(key, write):
    return [Cell(write(m.get(key))) for m in models]

  def beside(key, write, detail):
    return [Cell(write(m.get(key)), detail(m)) for m in models]

  def gap(m):
    a, b = quality.of(m), quality.of(teacher)
    if m is teacher or a is None or b is None:
      return ''
    shown = f'{quality.scaled(a - b):+.{digits if quality.percent else 3}f}'
    return f'{shown} pt' if quality.percent else shown

  def nonzero(m):
    left = number(m.get('nonzero_parameters'))
    return '' if left is None else f'{count(left)} nonzero'

  columns = [
    Column('model', [Cell(str(m.get('name') or DASH)) for m in models]),
    Column(quality.title, beside(quality.name, write(quality), gap)),
    *(
      Column(
        look.title,
        plain(look.name, write(look)),
        brief=look.percent and look.higher,
      )
      for look in others
    ),
    Column('parameters', beside('parameters', count, nonzero)),
    Column(
      'size',
      beside(
        'bytes', size, lambda m: fraction(m.get('bytes'), teacher.get('bytes'))
      ),
    ),
    Column('FLOPs', plain('flops', count), brief=False),
  ]
  batches = batch_sizes(report)
  for b in batches or ['']:
    columns.append(
      Column(
        f'ms, batch {b}' if b else 'latency, ms',
        [_latency(m, b) for m in models],
        brief=b in ('', *batches[:1], *batches[-1:]),
      )
    )
  columns.append(Column('training', plain('train_seconds', seconds), False))
  return columns


def reading_notes(report: Report) -> list[str]:
  """How to read the columns; what the protocol need not repeat."""
  n = examples_of(report)
  runs = {
    int(r)
    for m in models_of(report)
    for t in (m.get('latency') or {}).values()
    if (r := number((t or {}).get('runs')))
  }
  quality, *others = looks_of(report)
  error = standard_error(report, quality.of(find_model(report, TEACHER)))
  points = ' in percentage points' if quality.percent else ''
  notes = [
    f'{quality.heading}: beside or under it, the difference from '
    f'the teacher{points}.'
  ]
  if n and error is not None:
    notes[0] += (
      f" One standard error of the teacher's, on {n} test examples, is "
      f'{100 * error:.{digits_of(report)}f} points.'
    )
  named = {look.name for look in others}
  meaning = ' '.join(t for name, t in _MEANING.items() if name in named)
  notes += [meaning] if meaning else []
  notes += [
    'Size: 1 KB is 1000 bytes; beside or under it, the size relative to the '
    'teacher.',
  ]
  if report.get('compression'):
    notes.append(f'{COMPRESSED.capitalize()}: {report["compression"]}.')
  if batch_sizes(report):
    spread = f'{min(runs)} to {max(runs)}' if len(runs) > 1 else str(*runs)
    of = f' of {spread} runs' if runs else ''
    notes.append(
      f'Latency: median{of} in ms for one batch; beside or under it, the '
      'spread from low to high.'
    )
  return notes


def markdown(report: Report) -> str:
  """The whole report as GitHub Markdown.

  Args:
    report: the report; any value may be missing.

  Returns:
    Markdown text that ends with a newline.

  Example:
    >>> row = {'name': 'a', 'accuracy': 0.97}
    >>> '| a | 97.0 % |' in markdown({'models': [row]})
    True
  """
  columns = model_columns(report)
  notes = [m.get('note') or '' for m in models_of(report)]
  if any(notes):
    columns.append(Column('note', [Cell(str(n)) for n in notes]))
  lines = [f'# {_escape(title(report))}', '']
  lines += [_escape(' '.join(summary(report))), '', '## Models', '']
  lines += _markdown_table(
    [c.title for c in columns],
    [
      [f'{c.value} ({c.detail})' if c.detail else c.value for c in row]
      for row in zip(*(c.cells for c in columns), strict=True)
    ],
  )
  lines += ['', *_bullets(reading_notes(report))]
  sections = {
    'Aims': _bullets(f'{v}: {t} ({x})' for v, t, x in aims(report)),
    'Equality': _markdown_table(*parity_rows(report)),
    'Dropped steps': _markdown_table(*dropped_rows(report)),
    'Sparsity': _markdown_table(*sparsity_rows(report)),
    'Layers': _markdown_table(*layer_rows(report)),
    'Integers': _markdown_table(*integer_rows(report)),
    'How it was measured': _bullets(report.get('protocol') or []),
    'Made by': _bullets(f'{k}: {v}' for k, v in provenance(report)),
  }
  for name, body in sections.items():
    if body:
      lines += ['', f'## {name}', '', *body]
  return '\n'.join(lines) + '\n'


def print_table(report: Report, console: Console | None = None) -> None:
  """Prints models, aims and protocol in at most 100 columns.

  Args:
    report: the report; any value may be missing.
    console: where to print; standard output when None.
  """
  if console is None:
    console = Console()
    if not console.is_terminal and not console.is_jupyter:
      console = Console(width=WIDTH)
  table = Table(
    box=box.SIMPLE_HEAD, title=Text(title(report)), title_justify='left'
  )
  columns = [c for c in model_columns(report) if c.brief]
  for c in columns:
    first = c.title == 'model'
    table.add_column(
      Text(c.title),
      justify='left' if first else 'right',
      overflow='fold',
    )
  for row in zip(*(c.cells for c in columns), strict=True):
    table.add_row(*(_rich_cell(cell) for cell in row))
  console.print(table, width=WIDTH)
  for verdict, text, value in aims(report):
    style = {'met': 'green', 'not met': 'bold red'}.get(verdict, 'yellow')
    line = Text.assemble((f'{verdict:>12}', style), f'  {text} ({value})')
    console.print(line, width=WIDTH)
  for note in [*reading_notes(report), *(report.get('protocol') or [])]:
    console.print(Text(f'* {note}', style='dim'), width=WIDTH)


def title(report: Report) -> str:
  """The heading of the report, by the name of its data set."""
  name = (report.get('dataset') or {}).get('name')
  return f'kd_jax report: {name}' if name else 'kd_jax report'


def parity_rows(report: Report) -> tuple[list[str], list[list[str]]]:
  """Titles and rows of the table of artefacts held against each other."""
  titles = ['model', 'against', 'agreement', 'largest error', 'examples', '']
  rows = []
  for p in report.get('parity') or []:
    error, n = number(p.get('max_abs_error')), number(p.get('examples'))
    rows.append(
      [
        str(p.get('name') or DASH),
        str(p.get('against') or DASH),
        percent(p.get('agreement'), digits_of(report)),
        DASH if error is None else f'{error:.2g}',
        DASH if n is None else str(int(n)),
        str(p.get('note') or ''),
      ]
    )
  return titles, rows


def dropped_rows(report: Report) -> tuple[list[str], list[list[str]]]:
  """Titles and rows of the table of steps that failed, by training."""
  kinds = ('steps', 'dropped', 'spikes')
  rows = [
    [str(row.get('name') or DASH), *(count(row.get(kind)) for kind in kinds)]
    for row in report.get('dropped') or []
  ]
  return ['training', 'steps', 'dropped (NaN, Inf)', 'loss spikes'], rows


def sparsity_rows(report: Report) -> tuple[list[str], list[list[str]]]:
  """Titles and rows of the table of layers and how much of each is zero."""
  rows, layers = [], report.get('sparsity') or []
  aimed = any(number(layer.get('target')) is not None for layer in layers)
  for layer in layers:
    total, left = number(layer.get('size')), number(layer.get('nonzero'))
    zero = 1 - left / total if total and left is not None else None
    path = str(layer.get('path') or DASH)
    row = [path, count(total), count(left), percent(zero)]
    rows.append([*row, percent(layer.get('target'))] if aimed else row)
  titles = ['layer', 'weights', 'nonzero', 'zero']
  return [*titles, 'target'] if aimed else titles, rows


def layer_rows(report: Report) -> tuple[list[str], list[list[str]]]:
  """Titles and rows of the table of what each layer costs before and after."""
  kinds = (('flops', count), ('parameters', count), ('bytes', size))
  titles = ['layer', 'FLOPs', 'after', 'parameters', 'after', 'size', 'after']
  rows = []
  for layer in report.get('layers') or []:
    pairs = [(layer.get(kind) or (None, None), write) for kind, write in kinds]
    numbers = [write(v) for pair, write in pairs for v in pair]
    rows.append([str(layer.get('layer') or DASH), *numbers])
  return titles, rows


def integer_rows(report: Report) -> tuple[list[str], list[list[str]]]:
  """Titles and rows of the table of every layer's integers."""
  titles = [
    'layer',
    'runs',
    'fake-quant dB',
    'integer dB',
    'integer - fake-quant',
  ]
  titles += ['saturated', 'dead inputs', 'dead weights']
  kinds = ('fake_sqnr_db', 'integer_sqnr_db', 'sqnr_db')
  rows = []
  for layer in report.get('integers') or []:
    decibels = [number(layer.get(kind)) for kind in kinds]
    dead = [layer.get(kind) for kind in ('dead_inputs', 'dead_weights')]
    rows.append(
      [
        str(layer.get('layer') or DASH),
        str(layer.get('execution') or DASH),
        *('exact' if d is None else f'{d:.1f}' for d in decibels),
        percent(layer.get('saturation'), 2),
        *(DASH if n is None else str(n) for n in dead),
      ]
    )
  return titles, rows


def provenance(report: Report) -> list[tuple[str, str]]:
  """What made the report: command, data, machine and versions."""
  data = report.get('dataset') or {}
  splits = [
    f'{data[key]} {name}'
    for name in ('train', 'validation', 'test')
    if data.get(key := f'{name}_examples') is not None
  ]
  classes = data.get('classes') or []
  named = [str(data.get('name') or DASH), ' / '.join(splits)]
  named += [f'{len(classes)} classes'] if classes else []
  versions = {'kd_jax': report.get('kd_jax'), **(report.get('versions') or {})}
  return [
    ('command', str(report.get('command') or DASH)),
    ('created', str(report.get('created') or DASH)),
    ('data', ', '.join(part for part in named if part)),
    ('hardware', str(report.get('hardware') or DASH)),
    ('versions', ', '.join(f'{k} {v or DASH}' for k, v in versions.items())),
    *(('resumed', str(change)) for change in report.get('resumed') or []),
  ]


def _latency(model: Mapping[str, Any], batch: str) -> Cell:
  t = timing(model, batch)
  spread = ''
  if t['low'] is not None and t['high'] is not None:
    spread = f'{milliseconds(t["low"])}-{milliseconds(t["high"])}'
  return Cell(milliseconds(t['median']), spread)


def _rich_cell(cell: Cell) -> Text:
  if not cell.detail:
    return Text(cell.value)
  return Text.assemble(cell.value, '\n', (cell.detail, 'dim'))


def _escape(text: Any) -> str:
  """Text that Markdown shows as it is, on one line."""
  text = ' '.join(str(text).split()).replace('&', '&amp;').replace('<', '&lt;')
  return re.sub(r'([\\`*_\[\]|~$])', r'\\\1', text)


def _bullets(items: Iterable[Any]) -> list[str]:
  return [f'- {_escape(item)}' for item in items]


def _markdown_table(
  titles: Sequence[str], rows: Sequence[Sequence[str]]
) -> list[str]:
  if not rows:
    return []
  align = ['--:' if t not in ('note', '') else ':--' for t in titles]
  lines = [titles, [':--', *align[1:]], *rows]
  escape: list[Callable[[Any], str]] = [_escape, str, *[_escape] * len(rows)]
  return [
    '| ' + ' | '.join(write(c) for c in line) + ' |'
    for write, line in zip(escape, lines, strict=True)
  ]
