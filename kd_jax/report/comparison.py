"""A comparison of methods over seeds, as JSON, Markdown, a table and a plot.

Owns how `compare.compare`'s numbers are shown. Spread is the sample standard
deviation over seeds; nothing is a best step.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kd_jax.report import names, plots
from kd_jax.report.looks import Look, looks_of, quality_of
from kd_jax.storage import files

FORMAT = 2
NAMES = ('comparison.json', 'comparison.md', 'comparison.png')
Comparison = Mapping[str, Any]
_BASELINES = ('alone', 'kd')
# All columns need so many characters; a narrower terminal shows some.
_WIDTH = 128


def spread(values: Sequence[float]) -> tuple[float, float]:
  """Mean and sample standard deviation; 0 for a single value.

  Example:
    >>> spread([1.0, 3.0])
    (2.0, 1.4142135623730951)
  """
  deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
  return float(np.mean(values)), float(deviation)


def ranked(comparison: Comparison) -> list[dict[str, Any]]:
  """The rows, the teacher first and then by mean quality, best first."""
  look = quality_of(comparison)
  teacher = [r for r in comparison['rows'] if r['name'] == 'teacher']
  others = [r for r in comparison['rows'] if r['name'] != 'teacher']
  sign = -1 if look.higher else 1
  others.sort(key=lambda row: sign * spread(row[look.name])[0])
  return teacher + others


def cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
  """Header and rows of the table, as text."""
  quality, *others = looks_of(comparison)
  header = ['method', _heading(quality), 'vs alone']
  header += [*map(_heading, others), 'parameters', 'step']
  alone = {r['name']: r for r in comparison['rows']}.get('alone')
  rows = []
  for row in ranked(comparison):
    gain = '-'
    if alone is not None and row['name'] not in ('teacher', 'alone'):
      # The same seeds, so the difference is taken seed by seed.
      pairs = zip(row[quality.name], alone[quality.name], strict=True)
      mean, deviation = spread([quality.scaled(a - b) for a, b in pairs])
      gain = f'{mean:+.2f} ± {deviation:.2f}'
    step = row.get('relative_step')
    rows.append(
      [
        row['title'],
        _written(quality, row),
        gain,
        *(_written(look, row) for look in others),
        f'{row["parameters"]:,}',
        '-' if step is None else f'{step:.2f}x',
      ]
    )
  return header, rows


def _heading(look: Look) -> str:
  return f'{look.title} %' if look.percent else look.title


def _written(look: Look, row: Mapping[str, Any]) -> str:
  mean, deviation = spread([look.scaled(v) for v in row[look.name]])
  digits = 2 if look.percent else 4
  return f'{mean:.{digits}f} ± {deviation:.{digits}f}'


def notes(comparison: Comparison) -> list[str]:
  """How the numbers were made, one sentence each."""
  data, seeds = comparison['dataset'], comparison['seeds']
  train, look = comparison['train'], quality_of(comparison)
  points = 'points of ' if look.percent else ''
  return [
    f'{data["name"]}: {data["train_examples"]} training examples, '
    f'{data["test_examples"]} test examples; mean ± sample standard deviation '
    f'over {seeds} seeds, each with its own teacher; test split, last step.',
    f'Every student: {_words(comparison["student"])}; teacher: '
    f'{_words(comparison["teacher"])}; {train["epochs"]} epochs, batch '
    f'{train["batch_size"]}, {train["optimizer"]["name"]}, learning rate '
    f'{train["learning_rate"]}, schedule {train["schedule"]}; the same '
    'batches and crops for all methods of a seed, and the same start but for '
    'a reused head.',
    'Weights of the terms on the teacher: the published ones times the factor '
    f'of the table below{_chosen(comparison)}.',
    f'vs alone: {points}{look.title} more than the student trained without '
    'teacher, seed by seed.',
    'Agreement and KL(teacher || student) in nats compare with the teacher, at '
    'temperature 1; ECE is the expected calibration error with 15 bins.',
    "step: the median time of a training step relative to plain KD's, all "
    'methods measured in turns in one process.',
    f'{comparison["hardware"]}; '
    + ', '.join(f'{k} {v}' for k, v in comparison['versions'].items())
    + f'; {comparison["created"][:10]}.',
  ]


def _chosen(comparison: Comparison) -> str:
  if len(comparison['scales']) == 1:
    return ''
  scales = ', '.join(f'{scale:g}' for scale in comparison['scales'])
  return (
    f', for each method that of {scales} which is best on the validation '
    'split of the first seed'
  )


def _words(options: Mapping[str, Any]) -> str:
  inside = ', '.join(f'{k}={v}' for k, v in options.items() if k != 'name')
  return f'{options["name"]}({inside})' if inside else options['name']


def markdown(comparison: Comparison) -> str:
  """The table, the objectives and the notes as Markdown."""
  header, rows = cells(comparison)
  lines = [
    '| ' + ' | '.join(header) + ' |',
    '| --- ' + '| ---: ' * (len(header) - 1) + '|',
    *('| ' + ' | '.join(row) + ' |' for row in rows),
    '',
    *(f'- {note}' for note in notes(comparison)),
    '',
    '| method | objective | published weights | factor | paper |',
    '| --- | --- | --- | --- | --- |',
  ]
  for row in ranked(comparison):
    if row['name'] != 'teacher':
      scheme = ', '.join(f'{k}={v}' for k, v in row['scheme'].items())
      terms = row['terms'] + (f'; {scheme}' if scheme else '')
      lines.append(
        f'| {row["title"]} (`{row["name"]}`) | {terms} | {row["weights"]} | '
        f'{row["scale"]:g} | {row["paper"]} |'
      )
  return '\n'.join(lines) + '\n'


def print_table(comparison: Comparison) -> None:
  """Prints the table and the notes; narrow terminals get fewer columns."""
  console = Console()
  if not console.is_terminal and not console.is_jupyter:
    console = Console(width=_WIDTH)
  header, rows = cells(comparison)
  brief = {'method', 'vs alone', 'step'}
  brief |= {
    _heading(look)
    for look in looks_of(comparison)
    if look.percent and look.higher
  }
  brief.add(_heading(quality_of(comparison)))
  shown = [
    i
    for i, name in enumerate(header)
    if console.width >= _WIDTH or name in brief
  ]
  table = Table()
  for i in shown:
    table.add_column(
      header[i], justify='right' if i else 'left', overflow='fold'
    )
  for row in rows:
    table.add_row(*(row[i] for i in shown))
  console.print(table)
  for note in notes(comparison):
    console.print(note, style='dim')


def quality_figure(comparison: Comparison) -> Any:
  """How good every method is: each seed a dot, the mean with its deviation.

  Returns:
    A matplotlib Figure; the student alone and plain KD are marked by lines.
  """
  height = 1.6 + 0.26 * len(comparison['rows'])
  return plots.figure(comparison, _draw, width=7.5, height=height)


def _draw(ax: Any, comparison: Comparison) -> bool:
  rows = [r for r in ranked(comparison) if r['name'] != 'teacher'][::-1]
  if not rows:
    return False
  look, places = quality_of(comparison), np.arange(len(rows))
  for y, row in zip(places, rows, strict=True):
    values = [look.scaled(v) for v in row[look.name]]
    color = plots.COLORS[names.DISTILLED]
    if row['name'] in _BASELINES:
      color = plots.COLORS[names.ALONE]
    mean, deviation = spread(values)
    ax.plot(values, [y] * len(values), '.', color=color, alpha=0.35, ms=5)
    ax.errorbar(
      mean, y, xerr=deviation, fmt='D', color=color, ms=4.5, lw=1.4, capsize=2
    )
  named = {row['name']: row for row in comparison['rows']}
  for name, style in (('alone', ':'), ('kd', '--')):
    if name in named:
      mean = look.scaled(spread(named[name][look.name])[0])
      color = plots.COLORS[names.ALONE]
      ax.axvline(mean, ls=style, lw=1.0, color=color, zorder=0)
  ax.set_yticks(places, [row['title'] for row in rows])
  ax.set_ylim(-0.7, len(rows) - 0.3)
  ax.grid(axis='y', visible=False)
  ax.set_xlabel(
    f'test {_heading(look)}, last step, {comparison["seeds"]} seeds: dots, '
    'mean, standard deviation'
  )
  teacher = named.get('teacher')
  title = f'{comparison["dataset"]["name"]}: methods of distillation'
  if teacher:
    title += f' (teacher {_written(look, teacher)}{" %" * look.percent})'
  ax.set_title(title, loc='left')
  return True


def write(comparison: Comparison, directory: Path) -> dict[str, Path]:
  """Writes `NAMES` into a directory, each file whole or not at all.

  Returns:
    file name -> path.
  """
  paths = {name: directory / name for name in NAMES}
  text = json.dumps(comparison, indent=1, allow_nan=False) + '\n'
  files.write(paths['comparison.json'], text.encode())
  files.write(paths['comparison.md'], markdown(comparison).encode())
  half = directory / 'comparison.tmp.png'
  quality_figure(comparison).savefig(half, dpi=150)
  os.replace(half, paths['comparison.png'])
  return paths


def read(directory: str | os.PathLike) -> dict[str, Any]:
  """Reads what `write` wrote.

  Raises:
    ValueError: if there is no comparison, or one of another format.
  """
  path = Path(directory) / 'comparison.json'
  try:
    comparison = json.loads(path.read_text())
  except (OSError, json.JSONDecodeError) as e:
    raise ValueError(f'{path} cannot be read as a comparison: {e}') from e
  if comparison.get('format') != FORMAT:
    raise ValueError(
      f'{path} has format {comparison.get("format")!r}, not {FORMAT}.'
    )
  return comparison
