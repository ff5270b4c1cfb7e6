"""How a report writes its metrics: title, percent or number, which is better.

Owns no metric and no number. A report says so itself, in `metrics`; those of
image classification are meant where it does not. The first metric is the one
that decides.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kd_jax.report.units import decimals, number, percent


class Look(NamedTuple):
  """One metric; see `metrics.Metric`."""

  name: str
  title: str
  percent: bool
  higher: bool

  @property
  def heading(self) -> str:
    """Its title as the first word of a line."""
    return f'{self.title[:1].upper()}{self.title[1:]}'

  @property
  def unit(self) -> str:
    """What follows its title on axes and over columns; '' without one."""
    return ' (%)' if self.percent else ''

  def scaled(self, value: Any) -> Any:
    """Numbers as axes show them, whose unit is `unit`."""
    return 100 * value if self.percent else value

  def written(self, value: Any, digits: int = 1) -> str:
    """A value with its unit, or a dash.

    Args:
      value: a number or None.
      digits: decimals of a percentage; others have two more.
    """
    value = number(value)
    if value is None or self.percent:
      return percent(value, digits)
    return f'{value:.{digits + 2}f}'

  def digits(self, bound: float) -> int:
    """For `written` and `distance`, those that show a bound whole."""
    if self.percent:
      return decimals(100 * bound, 1)
    return decimals(bound, 3) - 2

  def distance(self, value: float, digits: int = 1) -> str:
    """How far apart two values are, without a sign: in points, or a number."""
    if self.percent:
      return f'{100 * abs(value):.{digits}f} points'
    return f'{abs(value):.{digits + 2}f}'

  def of(self, row: Mapping[str, Any]) -> float | None:
    """Its value in a row of a report, if there is one."""
    return number(row.get(self.name))


CLASSIFICATION = (
  Look('accuracy', 'accuracy', True, True),
  Look('agreement', 'agreement', True, True),
  Look('kl', 'KL', False, False),
  Look('calibration_error', 'ECE', True, False),
)


def looks_of(report: Mapping[str, Any]) -> Sequence[Look]:
  """The metrics of a report, the one that decides first.

  Example:
    >>> looks_of({})[0].written(0.987)
    '98.7 %'
  """
  said = report.get('metrics')
  return [Look(**row) for row in said] if said else CLASSIFICATION


def quality_of(report: Mapping[str, Any]) -> Look:
  """The metric that decides."""
  return looks_of(report)[0]
