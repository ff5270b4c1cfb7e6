"""The walk of `kd-jax compress`, as Markdown, a table and plots.

Owns how the numbers of `search.compress` are shown; measures nothing.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kd_jax.report import names, plots
from kd_jax.report.looks import Look, quality_of
from kd_jax.report.sensitivity import sensitivity_figure
from kd_jax.report.table import INTEGERS, integer_rows, layer_rows
from kd_jax.report.units import count, size

NAMES = ('compress.md', 'compress.png', 'sensitivity.png')
_AXES = {
  'bytes': 'Size of the weights in bytes',
  'flops': 'FLOPs of one example',
  'ms': 'Latency of one batch in ms',
}
_HEADER = (
  'candidate',
  'gone',
  'size',
  'FLOPs',
  'ms',
  'fits',
  'before',
  'after',
)


def cells(result: Mapping[str, Any]) -> list[list[str]]:
  """The table's rows as text: the uncompressed network, then the candidates."""
  uncompressed, look = result['uncompressed'], quality_of(result)
  rows = [
    [
      uncompressed['name'],
      '-',
      size(uncompressed['bytes']),
      count(uncompressed['flops']),
      '-',
      '-',
      '-',
      _number(look, uncompressed['quality']),
    ]
  ]
  for row in result['candidates']:
    rows.append(
      [
        row['name'] + (' *' if row['chosen'] else ''),
        f'{row["neurons"]:.0%}',
        size(row['bytes']),
        count(row['flops']),
        f'{row["ms"]:.3f}',
        'yes' if row['within'] else 'no',
        _number(look, row['untrained']),
        '-' if row['trained'] is None else _number(look, row['trained']),
      ]
    )
  return rows


def _number(look: Look, value: float) -> str:
  return f'{look.scaled(value):.{2 if look.percent else 4}f}'


def summary(result: Mapping[str, Any]) -> str:
  """What was found, in one sentence."""
  test, budget = result['test'], result['budget']
  look = quality_of(result)
  before = look.written(test['uncompressed'], 2)
  return (
    f'{test["name"]} is the best that was found within '
    f'{budget["limit"]:g} {budget["cost"]}: {look.title} '
    f'{look.written(test["quality"], 2)} on {test["examples"]} test examples, '
    f'where the uncompressed network has {before}.'
  )


def print_table(result: Mapping[str, Any]) -> None:
  """Prints the walk."""
  look = quality_of(result)
  table = Table(
    title=f'Validation {look.title}{look.unit} before and after training, * '
    'chosen'
  )
  for i, name in enumerate(_HEADER):
    table.add_column(name, justify='right' if i else 'left', no_wrap=True)
  for row in cells(result):
    table.add_row(*row)
  Console().print(table)
  print(summary(result))


def figure(result: Mapping[str, Any]) -> Any:
  """Quality against cost, of everything that was looked at.

  Args:
    result: what `search.compress` returned.

  Returns:
    A matplotlib Figure.
  """
  return plots.figure(result, draw, width=6.8, height=4.2)


def draw(ax: Any, result: Mapping[str, Any]) -> bool:
  """Draws each candidate, trained and untrained, and the budget."""
  cost, limit = result['budget']['cost'], result['budget']['limit']
  rows, colors, look = result['candidates'], plots.COLORS, quality_of(result)
  untrained = [(row[cost], look.scaled(row['untrained'])) for row in rows]
  trained = [r for r in rows if r['trained'] is not None]
  ax.plot(
    *zip(*untrained, strict=True),
    'o',
    mfc='none',
    color=plots.MUTED,
    label='quantized without training',
  )
  for row in trained:
    ends = (look.scaled(row['untrained']), look.scaled(row['trained']))
    ax.plot([row[cost]] * 2, ends, color=plots.GRID, zorder=1)
  ax.plot(
    *zip(*((r[cost], look.scaled(r['trained'])) for r in trained), strict=True),
    'o',
    color=colors[names.COMPRESSED],
    label='trained',
  )
  for row in trained:
    if row['chosen']:
      point = (row[cost], look.scaled(row['trained']))
      ax.plot(*point, '*', ms=15, color=colors[names.DISTILLED], label='chosen')
      # Where there is room: away from the nearer end of the axis.
      left = row[cost] > (min(r[cost] for r in rows) + limit) / 2
      ax.annotate(
        row['name'],
        point,
        xytext=(-10 if left else 10, -16),
        textcoords='offset points',
        ha='right' if left else 'left',
      )
  ax.axhline(
    look.scaled(result['uncompressed']['quality']),
    color=colors[names.TEACHER],
    ls='--',
    label='uncompressed',
  )
  ax.axvline(limit, color=colors[names.ALONE], ls=':', label='budget')
  ax.set_xlabel(_AXES[cost])
  ax.set_ylabel(f'Validation {look.title}{look.unit}')
  ax.set_title('Quality against cost', loc='left')
  ax.legend(loc='center left', bbox_to_anchor=(1.0, 0.5))
  return True


def markdown(result: Mapping[str, Any]) -> str:
  """The walk, the layers and their integers as Markdown."""
  look = quality_of(result)
  lines = [summary(result), '', *_table(_HEADER, cells(result)), '']
  lines += [
    'Gone: the share of channels and heads that were removed. Before and after '
    f'training: {look.title}{look.unit} on the validation split, quantized '
    'after the channels were removed and trained; * is chosen. Size is that of '
    'the weights file, FLOPs of one example, ms the median of 30 calls of all '
    'candidates in turns.',
    '',
  ]
  lines += [*_table(*layer_rows(result)), '', INTEGERS + '.', '']
  lines += _table(*integer_rows(result))
  return '\n'.join(lines) + '\n'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
  return [
    '| ' + ' | '.join(header) + ' |',
    '| --- ' + '| ---: ' * (len(header) - 1) + '|',
    *('| ' + ' | '.join(row) + ' |' for row in rows),
  ]


def write(
  result: Mapping[str, Any], directory: str | os.PathLike[str]
) -> dict[str, Path]:
  """Writes the tables and the plots.

  Args:
    result: what `search.compress` returned.
    directory: where to; exists.

  Returns:
    file name -> path, for each of `NAMES`.
  """
  paths = {name: Path(directory) / name for name in NAMES}
  paths[NAMES[0]].write_text(markdown(result), encoding='utf-8')
  figure(result).savefig(paths[NAMES[1]], dpi=150)
  # Without the names of the collections and of the parameter.
  rows = [
    (path.removesuffix('/kernel'), f'{bits} bits', loss)
    for path, bits, loss in result['sensitivity']
  ]
  loss = f'{result["sensitivity_of"]} from the uncompressed network (log scale)'
  sensitivity_figure(rows, loss=loss).savefig(paths[NAMES[2]], dpi=150)
  return paths
