"""The plots of a report, as matplotlib Figures that no pyplot knows of.

Owns lines, bars and colours; measures nothing. A Figure from here shows itself
in a notebook, saves with `savefig`, and never touches the global state of
pyplot; matplotlib is loaded by the first call.
"""

import io
import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from kd_jax.report.findings import (
  Report,
  examples_of,
  models_of,
  standard_error,
)
from kd_jax.report.labels import name_points
from kd_jax.report.looks import quality_of
from kd_jax.report.names import ALONE, COMPRESSED, DISTILLED, TEACHER
from kd_jax.report.units import count, number, percent, size

INK, MUTED, GRID, PAPER = '#1b1f24', '#5f6872', '#dde1e5', '#ffffff'
# Okabe and Ito's palette, which survives every common colour blindness; line
# styles and markers say the same again without any colour.
COLORS = {
  TEACHER: '#4a525c',
  ALONE: '#d55e00',
  DISTILLED: '#0072b2',
  COMPRESSED: '#009e73',
}
SPARE = ('#b0568c', '#a67400', '#3f8fc4')
STYLES = ('-', '--', '-', '-.', ':')
MARKERS = ('s', '^', 'o', 'D', 'v', 'P', 'X', '<', '>')
LAYERS = 40  # bars that a figure can hold and still be read

if TYPE_CHECKING:
  from matplotlib.typing import RcKeyType

Style: TypeAlias = 'dict[RcKeyType, Any]'
_STYLE: Style = {
  'axes.axisbelow': True,
  'axes.edgecolor': MUTED,
  'axes.facecolor': PAPER,
  'axes.grid': True,
  'axes.labelcolor': INK,
  'axes.spines.right': False,
  'axes.spines.top': False,
  'axes.titlesize': 11,
  'figure.facecolor': PAPER,
  'font.family': 'sans-serif',
  'font.sans-serif': ['DejaVu Sans'],
  'font.size': 10,
  'grid.color': GRID,
  'legend.fontsize': 9,
  'legend.frameon': False,
  'lines.linewidth': 1.8,
  'text.color': INK,
  # A dollar in the name of a model is not the start of a formula.
  'text.parse_math': False,
  'xtick.color': MUTED,
  'xtick.labelcolor': INK,
  'ytick.color': MUTED,
  'ytick.labelcolor': INK,
}


def curves_figure(report: Report) -> Any:
  """Training curves: quality, loss and, where pruned, sparsity by step.

  Args:
    report: the report; reads `curves`.

  Returns:
    A matplotlib Figure with two panels, or three when a stage was pruned.

  Example:
    >>> curve = {'step': [10, 20], 'loss': [2.0, 1.0]}
    >>> len(curves_figure({'curves': {'teacher': curve}}).axes)
    2
  """
  draws = [draw_quality, draw_loss]
  if any(_series(c, 'step', 'sparsity') for c in _curves(report).values()):
    draws.append(draw_sparsity_schedule)
  return figure(report, *draws)


def size_figure(report: Report) -> Any:
  """Quality against size on disk (log scale), each model named beside it.

  Args:
    report: the report; reads `models`, leaving out those without a quality
      or a size.

  Returns:
    A matplotlib Figure.

  Example:
    >>> rows = [{'name': 'teacher', 'accuracy': 0.98, 'bytes': 4000}]
    >>> size_figure({'models': rows}).axes[0].get_xscale()
    'log'
  """
  return figure(report, draw_size, width=5.6, height=4.0)


def sparsity_figure(report: Report) -> Any:
  """How much of each layer is exactly zero, as bars.

  Args:
    report: the report; reads `sparsity`, and shows the 40 largest layers when
      there are more.

  Returns:
    A matplotlib Figure.

  Example:
    >>> len(sparsity_figure({'sparsity': []}).axes)
    1
  """
  bars = min(len(report.get('sparsity') or []), LAYERS)
  return figure(report, draw_sparsity, width=6.4, height=1.3 + 0.3 * bars)


def figure(
  report: Report,
  *draws: Callable[[Any, Report], bool],
  width: float = 5.0,
  height: float = 3.5,
) -> Any:
  """A Figure of panels side by side, one for each of `draws`.

  Args:
    report: the report.
    *draws: functions `(axes, report) -> whether there was anything to draw`.
    width: of each panel, in inches.
    height: of the figure, in inches.

  Returns:
    A matplotlib Figure; a panel without data says so.
  """
  # The library must import without matplotlib, which is slow to load.
  import matplotlib
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  class Shown(Figure):
    # Jupyter knows how to show a Figure only after pyplot has been imported.
    def _repr_png_(self) -> bytes:
      return _png(self)

  with matplotlib.rc_context(_STYLE):
    fig = Shown(figsize=(width * len(draws), height), layout='constrained')
    FigureCanvasAgg(fig)
    for i, draw in enumerate(draws):
      ax = fig.add_subplot(1, len(draws), i + 1)
      if not draw(ax, report):
        ax.text(
          0.5,
          0.5,
          'not measured',
          color=MUTED,
          ha='center',
          va='center',
          transform=ax.transAxes,
        )
  return fig


def draw_quality(ax: Any, report: Report) -> bool:
  """Draws the quality by step: of evaluations, else of training batches."""
  look = quality_of(report)
  _label(ax, look.heading, 'training step', f'{look.title}{look.unit}')
  ends = []
  for i, (stage, curve) in enumerate(_curves(report).items()):
    color, line = _look(stage, i)
    batches = _series(curve, 'step', look.name)
    evaluated = _series(curve, 'eval_step', f'eval_{look.name}')
    if evaluated:
      steps, values = evaluated
      style = {'marker': MARKERS[i % len(MARKERS)], 'ms': 4, 'label': stage}
    elif batches:
      steps, values = batches[0], _smooth(batches[1])
      style = {'label': f'{stage} (training batches)'}
    else:
      continue
    ax.plot(steps, look.scaled(values), line, color=color, **style)
    # The first steps are chance level and would flatten all that follows.
    tail = values[len(values) // 5 :]
    worst = np.nanmin if look.higher else np.nanmax
    ends.append(worst(tail if np.isfinite(tail).any() else values))
  if ends and look.percent and look.higher:
    bottom = max(0.0, 100 * min(ends) - 4)
    ax.set_ylim(bottom, 100 + (100 - bottom) * 0.03)
  elif ends and not look.higher:
    ax.set_ylim(0, look.scaled(1.1 * max(ends)))
  if ends:
    _legend(ax, loc='lower right')
  return bool(ends)


def draw_loss(ax: Any, report: Report) -> bool:
  """Draws each stage's own training loss by step, smoothed over the raw."""
  _label(ax, 'Training loss', 'training step', "loss (each stage's own)")
  shown = []
  for i, (stage, curve) in enumerate(_curves(report).items()):
    found = _series(curve, 'step', 'loss')
    if not found:
      continue
    steps, values = found
    color, line = _look(stage, i)
    ax.plot(steps, values, color=color, lw=0.8, alpha=0.3)
    ax.plot(steps, _smooth(values), line, color=color, label=stage)
    shown.append(values[np.isfinite(values)])
  if shown:
    values = np.concatenate(shown)
    if values.min() > 0 and values.max() > 20 * values.min():
      ax.set_yscale('log')
      ax.set_ylabel("loss (each stage's own), log scale")
      ax.yaxis.set_major_formatter(lambda v, _: f'{v:g}')
      ax.yaxis.set_minor_formatter(lambda v, _: '')
    _legend(ax, loc='upper right')
  return bool(shown)


def draw_sparsity_schedule(ax: Any, report: Report) -> bool:
  """Draws the share of pruned weights by step."""
  _label(ax, 'Sparsity schedule', 'training step', 'weights that are zero (%)')
  shown = False
  for i, (stage, curve) in enumerate(_curves(report).items()):
    found = _series(curve, 'step', 'sparsity')
    if found:
      color, line = _look(stage, i)
      ax.plot(found[0], 100 * found[1], line, color=color, label=stage)
      shown = True
  if shown:
    ax.set_ylim(0, 100)
    _legend(ax, loc='upper left')
  return shown


def draw_size(ax: Any, report: Report) -> bool:
  """Draws the quality by bytes, with a name at every point."""
  look = quality_of(report)
  _label(ax, '', 'size on disk (log scale)', f'{look.title}{look.unit}')
  known = [
    (str(m.get('name')), number(m.get('bytes')), look.of(m))
    for m in models_of(report)
  ]
  points = [(n, b, a) for n, b, a in known if b and b > 0 and a is not None]
  if not points:
    return False
  names, sizes = [p[0] for p in points], [p[1] for p in points]
  scores = [look.scaled(p[2]) for p in points]
  ax.set_xscale('log')
  ax.set_xlim(min(sizes) / 3, max(sizes) * 2.2)
  spread = max(max(scores) - min(scores), 1.0 if look.percent else 1e-3)
  ax.set_ylim(min(scores) - 0.45 * spread, max(scores) + 0.45 * spread)
  ax.set_xticks(list(_decades(*ax.get_xlim())))
  ax.xaxis.set_major_formatter(lambda v, _: re.sub(r'\.0+', '', size(v)))
  ax.xaxis.set_minor_formatter(lambda v, _: '')
  ax.minorticks_off()
  teacher = next((a for n, _, a in points if n == TEACHER), None)
  error = standard_error(report, teacher)
  if error and teacher is not None:
    ax.axhspan(
      100 * (teacher - error),
      100 * (teacher + error),
      color=COLORS[TEACHER],
      alpha=0.12,
      lw=0,
      label=f'teacher, one standard error ({examples_of(report)} examples)',
    )
    _legend(ax, loc='lower left', bbox_to_anchor=(0, 1.0), borderaxespad=0.2)
  shown = list(zip(names, sizes, scores, strict=True))
  for i, (name, x, y) in enumerate(shown):
    color = COLORS.get(name, COLORS[COMPRESSED])
    marker = MARKERS[i % len(MARKERS)]
    ax.plot(x, y, marker, color=color, ms=8, mec=PAPER, mew=0.8)
  name_points(ax, shown, color=MUTED)
  return True


def draw_sparsity(ax: Any, report: Report) -> bool:
  """Draws one bar for each layer: the share of its weights that is zero."""
  _label(ax, 'Sparsity by layer', 'weights that are exactly zero (%)', 'layer')
  known = [
    (
      str(layer.get('path')),
      number(layer.get('size')),
      number(layer.get('nonzero')),
    )
    for layer in report.get('sparsity') or []
  ]
  layers = [(p, n, left) for p, n, left in known if n and left is not None]
  if len(layers) > LAYERS:
    kept = sorted(layers, key=lambda row: -row[1])[:LAYERS]
    ax.set_title(
      f'Sparsity of the {LAYERS} largest of {len(layers)} layers', loc='left'
    )
    layers = [row for row in layers if row in kept]
  if not layers:
    return False
  zero = [1 - left / n for _, n, left in layers]
  rows = np.arange(len(layers))
  ax.barh(
    rows,
    100 * np.array(zero),
    color=COLORS[COMPRESSED],
    height=0.66,
    alpha=0.45,
  )
  ax.set_yticks(rows, [path for path, _, _ in layers])
  ax.set_ylim(len(layers) - 0.4, -0.6)
  ax.set_xlim(0, 100)
  ax.grid(False, axis='y')
  for row, (_, n, left), share in zip(rows, layers, zero, strict=True):
    inside = share > 0.6
    ax.annotate(
      f'{percent(share)}, {count(left)} of {count(n)} left',
      (100 * share, row),
      (-5 if inside else 5, 0),
      textcoords='offset points',
      ha='right' if inside else 'left',
      va='center',
      color=INK,
      fontsize=8.5,
    )
  return True


def _png(fig: Any) -> bytes:
  buffer = io.BytesIO()
  fig.savefig(buffer, format='png', dpi=100)
  return buffer.getvalue()


def _curves(report: Report) -> dict[str, Any]:
  return {str(k): v for k, v in (report.get('curves') or {}).items() if v}


def _series(curve: Any, x: str, y: str) -> tuple[np.ndarray, np.ndarray] | None:
  """Two columns of a curve as float arrays, or None without a finite value."""
  xs, ys = (
    np.array([number(v) if number(v) is not None else np.nan for v in values])
    for values in (curve.get(x) or [], curve.get(y) or [])
  )
  length = min(len(xs), len(ys))
  xs, ys = xs[:length], ys[:length]
  return (xs, ys) if np.isfinite(xs * ys).any() else None


def _look(stage: str, index: int) -> tuple[str, str]:
  """Colour and line style of a stage: the known ones always look alike."""
  if stage in COLORS:
    index = list(COLORS).index(stage)
    return COLORS[stage], STYLES[index]
  return SPARE[index % len(SPARE)], STYLES[index % len(STYLES)]


def _smooth(values: np.ndarray) -> np.ndarray:
  """A centred running mean over a twentieth of the curve; gaps stay gaps."""
  width = max(1, len(values) // 20) | 1
  valid = np.isfinite(values)
  kernel = np.ones(width)
  total = np.convolve(np.where(valid, values, 0.0), kernel, 'same')
  weight = np.convolve(valid.astype(float), kernel, 'same')
  return np.where(valid, total / np.maximum(weight, 1), np.nan)


def _label(ax: Any, title: str, x: str, y: str) -> None:
  ax.set_xlabel(x)
  ax.set_ylabel(y)
  if title:
    ax.set_title(title, loc='left')


def _legend(ax: Any, **place: Any) -> None:
  handles, labels = ax.get_legend_handles_labels()
  ax.legend(handles, labels, **place)


def _decades(low: float, high: float) -> Iterator[float]:
  """Round sizes between two bounds: 1, 2, 5, or only 1 over many decades."""
  steps = (
    (1,) if high / low > 2000 else (1, 3) if high / low > 60 else (1, 2, 5)
  )
  for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high))):
    yield from (
      s * 10.0**power for s in steps if low <= s * 10.0**power <= high
    )
