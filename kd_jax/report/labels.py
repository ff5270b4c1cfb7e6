"""Names beside points of a plot, placed so that all can be read.

Owns geometry only: knows axes and boxes, not reports.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Box = tuple[float, float, float, float]


def name_points(
  ax: Any, points: Sequence[tuple[str, float, float]], *, color: str
) -> None:
  """Writes names beside points so that none covers a name or a point.

  Every name tries a spiral of places and takes the cheapest: near, right or
  above, off all other boxes, its leader line crossing no name. Later sweeps
  let the first names make way for the last.

  Args:
    ax: axes whose limits and scales are final.
    points: (name, x, y) in data coordinates.
    color: of the leader lines.
  """
  # The layout engine moves the axes, and with them every pixel below.
  ax.figure.draw_without_rendering()
  renderer = ax.figure.canvas.get_renderer()
  scale = ax.figure.dpi / 72
  area = ax.get_window_extent(renderer).extents
  centers = [ax.transData.transform((x, y)) for _, x, y in points]
  r = 6 * scale
  dots = [(x - r, y - r, x + r, y + r) for x, y in centers]
  notes = [_note(ax, point, color) for point in points]
  halves: list[tuple[float, float]] = []
  for note in notes:
    box = note.get_window_extent(renderer)
    halves.append((box.width / 2 + 3 * scale, box.height / 2 + scale))
  chosen: dict[int, tuple[float, float, float]] = {}
  for i in [*range(len(notes))] * 4:
    chosen.pop(i, None)
    placed = {
      j: _box(centers[j], place, halves[j]) for j, place in chosen.items()
    }
    best = math.inf
    w, h = halves[i]
    for place in _spiral(w, h, scale):
      # A place costs its distance at least, and the spiral only widens.
      if place[0] / scale >= best:
        break
      cost = _cost(i, place, centers, halves[i], dots, placed, area, scale)
      if cost < best:
        best, chosen[i] = cost, place
  for i, (far, dx, dy) in chosen.items():
    notes[i].set_position((dx / scale, dy / scale))
    notes[i].arrow_patch.set_visible(far > 10 * scale)


def _note(ax: Any, point: tuple[str, float, float], color: str) -> Any:
  """The name of a point as an annotation that the layout ignores."""
  name, x, y = point
  note = ax.annotate(
    name,
    (x, y),
    (0, 0),
    textcoords='offset points',
    ha='center',
    va='center',
    fontsize=9.5,
    arrowprops={
      'arrowstyle': '-',
      'color': color,
      'lw': 0.7,
      'shrinkA': 1,
      'shrinkB': 5,
    },
  )
  note.set_in_layout(False)
  return note


def _box(center: Any, place: Any, half: tuple[float, float]) -> Box:
  x, y = center[0] + place[1], center[1] + place[2]
  return x - half[0], y - half[1], x + half[0], y + half[1]


def _cost(
  i: int,
  place: tuple[float, float, float],
  centers: Sequence[Any],
  half: tuple[float, float],
  dots: Sequence[Box],
  placed: dict[int, Box],
  area: Any,
  scale: float,
) -> float:
  """What it costs to write name `i` at a place, given all other names."""
  far, dx, dy = place
  here = _box(centers[i], place, half)
  line = (centers[i], (centers[i][0] + dx, centers[i][1] + dy))
  total = far / scale + (6 if dx < 0 else 0) + (2 if dy < 0 else 0)
  total += 900 * sum(_overlap(here, other) for other in placed.values())
  total += 900 * sum(_overlap(here, dot) for dot in dots)
  for j, other in placed.items():
    end = ((other[0] + other[2]) / 2, (other[1] + other[3]) / 2)
    total += 300 * (_crosses(line, other) + _crosses((centers[j], end), here))
  # A line through another point would seem to name that one.
  total += 60 * sum(
    _crosses(line, dot)
    for dot in dots
    if not _overlap((*centers[i], *centers[i]), dot)
  )
  inside = here[0] >= area[0] and here[1] >= area[1]
  inside = inside and here[2] <= area[2] and here[3] <= area[3]
  return total if inside else total + 2000


def _spiral(
  w: float, h: float, scale: float
) -> Iterator[tuple[float, float, float]]:
  """(distance, dx, dy) of places around a point for a box of w by h halves."""
  for step in range(14):
    far = (6.5 + 9 * step) * scale
    for angle in np.arange(0, 2 * np.pi, np.pi / 12):
      dx, dy = np.cos(angle), np.sin(angle)
      yield far, dx * (far + w), dy * (far + h)


def _overlap(a: Any, b: Any) -> bool:
  return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _crosses(line: Any, box: Any) -> bool:
  """Whether a segment passes through a box (Liang and Barsky's clipping)."""
  (x0, y0), (x1, y1) = line
  enter, leave = 0.0, 1.0
  for start, delta, low, high in (
    (x0, x1 - x0, box[0], box[2]),
    (y0, y1 - y0, box[1], box[3]),
  ):
    if not delta:
      if not low < start < high:
        return False
      continue
    near, far = sorted(((low - start) / delta, (high - start) / delta))
    enter, leave = max(enter, near), min(leave, far)
  return enter < leave
