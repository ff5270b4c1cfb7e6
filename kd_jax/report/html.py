"""A report as one HTML page that needs nothing else: no network, no script.

Owns the page; plots and tables are made by `plots` and `table`. Plots are
inline SVG whose colours are CSS variables, so that they follow the page into
dark mode, and whose text stays text. The page quotes the report and escapes
every word of it.
"""

import html as escaping
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from kd_jax.report import names, plots
from kd_jax.report.findings import Report, aims, models_of, summary
from kd_jax.report.looks import quality_of
from kd_jax.report.table import (
  INTEGERS,
  Cell,
  dropped_rows,
  integer_rows,
  layer_rows,
  model_columns,
  parity_rows,
  provenance,
  reading_notes,
  sparsity_rows,
  title,
)
from kd_jax.report.units import DASH

# colour in the figure -> (CSS variable, in light mode, in dark mode)
_THEME = {
  plots.PAPER: ('paper', '#ffffff', '#1a1e24'),
  plots.INK: ('ink', '#1b1f24', '#e8ebee'),
  plots.MUTED: ('muted', '#5f6872', '#9aa4ae'),
  plots.GRID: ('grid', '#dde1e5', '#343b44'),
  plots.COLORS[names.TEACHER]: ('teacher', '#4a525c', '#c3cad2'),
  plots.COLORS[names.ALONE]: ('alone', '#d55e00', '#ff9248'),
  plots.COLORS[names.DISTILLED]: ('distilled', '#0072b2', '#5bb5f2'),
  plots.COLORS[names.COMPRESSED]: ('compressed', '#00805e', '#2fcf9f'),
  plots.SPARE[0]: ('spare0', '#b0568c', '#e79cc6'),
  plots.SPARE[1]: ('spare1', '#a67400', '#f0c04c'),
  plots.SPARE[2]: ('spare2', '#3f8fc4', '#93cdf5'),
}

_CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 48px}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 2px;overflow-wrap:anywhere}
h2{font-size:1.12rem;margin:0 0 10px}
p{margin:0 0 8px}
.made{color:var(--muted);font-size:.88rem;margin-bottom:18px}
.lead{font-size:1.22rem;line-height:1.4;font-weight:600}
.more{max-width:78ch}
section{background:var(--paper);border:1px solid var(--grid);
border-radius:10px;padding:18px 20px;margin:16px 0}
.wide{overflow-x:auto;margin:0 -20px;padding:0 20px}
table{border-collapse:separate;border-spacing:0;font-size:.9rem;width:100%;
font-variant-numeric:tabular-nums}
th,td{padding:7px 9px;text-align:right;vertical-align:top;
border-bottom:1px solid var(--grid);white-space:nowrap}
th{font-weight:600;color:var(--muted);font-size:.8rem}
thead th{vertical-align:bottom}
tbody tr:last-child>*{border-bottom:0}
th:first-child,td:first-child,.words{text-align:left}
tbody th{color:var(--ink);font-size:.9rem;white-space:normal;min-width:9.5em}
.words{white-space:normal;min-width:14em}
small{display:block;color:var(--muted);font-size:.8rem;font-weight:400}
.notes{color:var(--muted);font-size:.85rem;margin:12px 0 0;padding-left:1.2em}
.aims{list-style:none;margin:0;padding:0}
.aims li{display:flex;gap:12px;align-items:baseline;padding:5px 0}
.aims small{display:inline}
.tag{flex:0 0 7.2em;text-align:center;border-radius:99px;font-size:.78rem;
font-weight:600;padding:2px 0;border:1px solid currentColor}
.yes{color:var(--compressed)}.no{color:var(--alone)}.open{color:var(--muted)}
.plots{display:grid;gap:22px;
grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr))}
figure{margin:0 auto;width:100%;max-width:660px}
details{margin-top:14px}summary{cursor:pointer;color:var(--muted)}
figcaption{color:var(--muted);font-size:.85rem}
svg{display:block;width:100%;height:auto}
svg text{font-family:inherit!important}
dl{display:grid;grid-template-columns:max-content 1fr;gap:6px 16px;margin:0}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
ul.plain{margin:0;padding-left:1.2em}
code{font:.88em ui-monospace,Menlo,Consolas,monospace}
@media(max-width:560px){main{padding:18px 12px 32px}
section{padding:14px;margin:12px 0}.wide{margin:0 -14px;padding:0 14px}
.models th:first-child{position:sticky;left:-14px;background:var(--paper);
padding-left:14px;margin-left:-14px;min-width:8.2em;
border-right:1px solid var(--grid)}
.tag{flex-basis:5.6em}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:8px}}
@media print{section{break-inside:avoid}}
"""


def html(report: Report) -> str:
  """The whole report as one self-contained page.

  Args:
    report: the report; any value may be missing, and a part without any data
      is left out.

  Returns:
    An HTML document that loads nothing and runs nothing.

  Example:
    >>> page = html({'dataset': {'name': 'a<b'}, 'models': []})
    >>> '<h1>kd_jax report: a&lt;b</h1>' in page, '<script' in page
    (True, False)
  """
  lead, *more = summary(report)
  created = report.get('created')
  parts = [
    '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
    '<meta name="viewport" content="width=device-width,initial-scale=1">',
    '<meta name="color-scheme" content="light dark">',
    f'<title>{_text(title(report))}</title>',
    f'<style>{_theme()}{_CSS}</style></head><body><main>',
    f'<h1>{_text(title(report))}</h1>',
    f'<p class="made">{_text(created)}</p>' if created else '',
    f'<p class="lead">{_text(lead)}</p>',
    *(f'<p class="more">{_text(sentence)}</p>' for sentence in more),
    _section('Models', _models(report)),
    _section('Aims', _aim_list(report)),
    _section('Quality against size', _size(report)),
    _section('Training and pruning', _training(report)),
    _section('Layers', _details('Cost of each layer', *layer_rows(report))),
    _section('Integers', _details(INTEGERS, *integer_rows(report))),
    _section('Equality of the artefacts', _table(*parity_rows(report))),
    _section('How it was measured', _list(report.get('protocol') or [])),
    _section('Made by', _made_by(report)),
    '</main></body></html>\n',
  ]
  return '\n'.join(part for part in parts if part)


def _text(value: Any) -> str:
  """A value as HTML text."""
  # A unit never starts a line.
  text = re.sub(
    r'(?<=\d) (?=(?:%|[KMGT]?B|ms|pt|points)(?!\w))', '\xa0', str(value)
  )
  return escaping.escape(text)


def _theme() -> str:
  """The colours of both modes as CSS variables."""
  light = ''.join(f'--{name}:{c};' for name, c, _ in _THEME.values())
  dark = ''.join(f'--{name}:{c};' for name, _, c in _THEME.values())
  return (
    f':root{{color-scheme:light dark;--page:#f4f6f8;{light}}}'
    f'@media(prefers-color-scheme:dark){{:root{{--page:#101318;{dark}}}}}'
  )


def _section(name: str, body: str) -> str:
  return f'<section><h2>{name}</h2>{body}</section>' if body else ''


def _list(items: Iterable[Any], kind: str = 'plain') -> str:
  body = ''.join(f'<li>{_text(item)}</li>' for item in items)
  return f'<ul class="{kind}">{body}</ul>' if body else ''


def _cell(cell: Cell) -> str:
  """A value over its smaller print; a dash is typeset as one."""
  value = '&ndash;' if cell.value == DASH else _text(cell.value)
  return value + (f'<small>{_text(cell.detail)}</small>' if cell.detail else '')


def _models(report: Report) -> str:
  """The models table, each model's note under its name."""
  models, *columns = model_columns(report)
  head = ''.join(f'<th scope="col">{_text(c.title)}</th>' for c in columns)
  rows = []
  for i, model in enumerate(models_of(report)):
    name = _cell(Cell(models.cells[i].value, str(model.get('note') or '')))
    values = ''.join(f'<td>{_cell(c.cells[i])}</td>' for c in columns)
    rows.append(f'<tr><th scope="row">{name}</th>{values}</tr>')
  return (
    '<div class="wide"><table class="models"><thead><tr>'
    f'<th scope="col">model</th>{head}</tr></thead>'
    f'<tbody>{"".join(rows)}</tbody></table></div>'
    + _list(reading_notes(report), 'notes')
  )


def _aim_list(report: Report) -> str:
  """The aims, each with its verdict in words and colour."""
  kinds = {'met': 'yes', 'not met': 'no'}
  items = ''.join(
    f'<li><span class="tag {kinds.get(verdict, "open")}">{verdict}</span>'
    f'<span>{_text(text)} <small>({_text(value)})</small></span></li>'
    for verdict, text, value in aims(report)
  )
  return f'<ul class="aims">{items}</ul>' if items else ''


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A plain table; a column without a title holds words."""
  if not rows:
    return ''
  kinds = ['' if name else ' class="words"' for name in titles]
  head = ''.join(
    f'<th scope="col"{kind}>{_text(name)}</th>'
    for kind, name in zip(kinds, titles, strict=True)
  )
  body = ''.join(
    '<tr>'
    + ''.join(
      f'<td{kind}>{_cell(Cell(value))}</td>'
      for kind, value in zip(kinds, row, strict=True)
    )
    + '</tr>'
    for row in rows
  )
  return (
    f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
    f'<tbody>{body}</tbody></table></div>'
  )


def _made_by(report: Report) -> str:
  """Command, data, machine and versions."""
  items = []
  for name, value in provenance(report):
    shown = (
      f'<code>{_text(value)}</code>' if name == 'command' else _text(value)
    )
    items.append(f'<dt>{name}</dt><dd>{shown}</dd>')
  return f'<dl>{"".join(items)}</dl>'


def _figure(
  name: str, report: Report, draw: Any, caption: str, **size: float
) -> str:
  """One plot with its caption, or nothing when there is nothing to draw."""
  drawn = []

  def drawing(ax, report):
    drawn.append(draw(ax, report))
    return drawn[0]

  fig = plots.figure(report, drawing, **size)
  if not drawn[0]:
    return ''
  label = _text(f'{draw.__name__.removeprefix("draw_")} plot: {caption}')
  return (
    f'<figure>{_svg(name, fig, label)}'
    f'<figcaption>{_text(caption)}</figcaption></figure>'
  )


def _training(report: Report) -> str:
  """The panels of the training curves, side by side where there is room."""
  higher = quality_of(report).higher
  found = [
    _figure(
      'quality',
      report,
      plots.draw_quality,
      'Evaluations during training. The axis leaves out the first steps'
      + (', and does not start at zero.' if higher else '.'),
    ),
    _figure(
      'loss',
      report,
      plots.draw_loss,
      'Running mean over a twentieth of the run, above the raw values. Each '
      'stage has its own objective, so heights compare within a stage only.',
    ),
    _figure(
      'schedule',
      report,
      plots.draw_sparsity_schedule,
      'Share of the prunable weights that is zero while training.',
    ),
  ]
  titles, rows = sparsity_rows(report)
  if rows:
    found.append(
      _figure(
        'sparsity',
        report,
        plots.draw_sparsity,
        'Zero weights of every layer that may be pruned.',
        height=max(3.5, 1.1 + 0.3 * min(len(rows), plots.LAYERS)),
      )
    )
  if not (body := ''.join(found)):
    return ''
  body = f'<div class="plots">{body}</div>'
  body += _details('Dropped steps and loss spikes', *dropped_rows(report))
  if rows:
    body += _details('Sparsity as a table', titles, rows)
  return body


def _details(label: str, titles: list[str], rows: list[list[str]]) -> str:
  """A table that opens on demand."""
  if not rows:
    return ''
  summary = f'<summary>{_text(label)}</summary>'
  return f'<details>{summary}{_table(titles, rows)}</details>'


def _size(report: Report) -> str:
  look = quality_of(report)
  up = 'Up' if look.higher else 'Down'
  return _figure(
    'size',
    report,
    plots.draw_size,
    f'{up} and to the left is better. A model without a size or '
    f'{look.title} is not shown.',
    height=3.7,
  )


def _svg(name: str, fig: Any, label: str) -> str:
  """A figure as SVG to put into a page: themed, unique ids, no addresses."""
  import matplotlib  # slow to load

  buffer = io.StringIO()
  settings: plots.Style = {'svg.fonttype': 'none', 'svg.hashsalt': name}
  nothing = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
  with matplotlib.rc_context(settings):
    fig.savefig(buffer, format='svg', metadata=nothing)
  text = buffer.getvalue()
  text = text[text.index('<svg') :]
  text = re.sub(r' xmlns(:\w+)?="[^"]*"', '', text, count=2)
  text = re.sub(r'\b(id="|href="#|url\(#)', rf'\g<1>{name}-', text)
  text = re.sub(
    r'(<svg )', rf'\1role="img" aria-label="{label}" ', text, count=1
  )
  for color, (variable, _, _) in _THEME.items():
    text = text.replace(f': {color}', f': var(--{variable})')
  return text
