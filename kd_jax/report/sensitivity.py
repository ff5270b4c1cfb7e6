"""The plot of a sensitivity analysis, as a matplotlib Figure.

Owns the picture of rows that `quantize.sensitivity` measured; measures
nothing.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from kd_jax.report.names import ALONE, COMPRESSED, DISTILLED, TEACHER
from kd_jax.report.plots import (
  COLORS,
  LAYERS,
  MARKERS,
  MUTED,
  PAPER,
  SPARE,
  figure,
)


def sensitivity_figure(
  rows: Iterable[tuple[str, Any, float]],
  *,
  loss: str = 'KL from the float network (log scale)',
) -> Any:
  """The loss of each parameter's options, as points on a line for each.

  Args:
    rows: `(path, option, loss)`, such as those of `quantize.sensitivity`. An
      option with `bits` is named by them, a float is a share of pruned
      weights. A point of zero loss or less is drawn at the left edge. The 40
      most sensitive parameters are shown if there are more.
    loss: label of the axis.

  Returns:
    A matplotlib Figure.

  Example:
    >>> figure = sensitivity_figure([('a', 0.5, 1e-3), ('b', 0.5, 1e-2)])
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['a', 'b']
  """
  rows = [(str(p), _label(o), float(v)) for p, o, v in rows]
  count = min(len({path for path, _, _ in rows}), LAYERS)
  report = {'sensitivity': rows, 'loss': loss}
  return figure(report, draw_sensitivity, width=6.8, height=1.5 + 0.28 * count)


def draw_sensitivity(ax: Any, report: Any) -> bool:
  """Draws a line for each parameter, with a point for each option's loss."""
  rows = [row for row in report['sensitivity'] if np.isfinite(row[2])]
  ax.set_title('Sensitivity, one parameter changed at a time', loc='left')
  ax.set_xlabel(report['loss'])
  if not rows:
    return False
  worst: dict[str, float] = {}
  for path, _, value in rows:
    worst[path] = max(value, worst.get(path, value))
  paths = list(worst)
  if len(paths) > LAYERS:
    kept = set(sorted(paths, key=lambda path: -worst[path])[:LAYERS])
    ax.set_title(
      f'The {LAYERS} most sensitive of {len(paths)} parameters', loc='left'
    )
    paths = [path for path in paths if path in kept]
  places = {path: i for i, path in enumerate(paths)}
  rows = [row for row in rows if row[0] in places]
  positive = [value for _, _, value in rows if value > 0]
  edge = min(positive) / 3 if positive else 1e-9
  points = [(places[p], o, max(v, edge)) for p, o, v in rows]
  for place in places.values():
    here = [value for i, _, value in points if i == place]
    ax.plot([min(here), max(here)], [place] * 2, color=MUTED, lw=0.8, zorder=1)
  colors = [COLORS[COMPRESSED], COLORS[ALONE], COLORS[DISTILLED]]
  colors += [COLORS[TEACHER], *SPARE]
  for n, option in enumerate(dict.fromkeys(option for _, option, _ in points)):
    here = [(value, i) for i, o, value in points if o == option]
    ax.plot(
      *zip(*here, strict=True),
      MARKERS[n % len(MARKERS)],
      color=colors[n % len(colors)],
      ms=7,
      mec=PAPER,
      mew=0.8,
      alpha=0.9,
      label=option,
    )
  ax.set_xscale('log')
  ax.set_yticks(range(len(paths)), paths)
  ax.set_ylim(len(paths) - 0.4, -0.6)
  ax.grid(False, axis='y')
  ax.legend(loc='upper left', bbox_to_anchor=(1.0, 1.0))
  return True


def _label(option: Any) -> str:
  bits = getattr(option, 'bits', None)
  if bits is not None:
    return f'{bits} bits'
  if isinstance(option, float):
    return f'{option:.0%} pruned'
  return 'float' if option is None else str(option)
