"""How a report writes its numbers: three digits, a unit, or a dash.

Owns the wording of single values, so that the page, the Markdown and the
terminal never disagree. Knows nothing of reports.
"""

import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

DASH = '-'


def number(value: Any) -> float | None:
  """`value` as a finite float, or None when there is no such number.

  Example:
    >>> number(3), number(None), number(float('inf'))
    (3.0, None, None)
  """
  value = math.nan if value is None else float(value)
  return value if math.isfinite(value) else None


def percent(value: Any, digits: int = 1) -> str:
  """A fraction in percent; never rounded up to a perfect score.

  Example:
    >>> percent(0.98), percent(0.9997), percent(None)
    ('98.0 %', '99.97 %', '-')
  """
  value = number(value)
  if value is None:
    return DASH
  text = f'{100 * value:.{digits}f}'
  if value < 1 and float(text) == 100 and digits < 6:
    return percent(value, digits + 1)
  return f'{text} %'


def decimals(value: float, least: int = 0) -> int:
  """How many a number needs to be shown as it was given.

  Args:
    value: the number, of which six significant digits count.
    least: as many at least.

  Example:
    >>> decimals(96.75), decimals(98.0), decimals(98.0, 1), decimals(1e-5)
    (2, 0, 1, 5)
  """
  exponent = Decimal(f'{value:g}').as_tuple().exponent
  return max(least, -int(exponent))


def count(value: Any) -> str:
  """A count with three digits and a suffix.

  Example:
    >>> count(12345), count(512), count(1.2e7)
    ('12.3k', '512', '12.0M')
  """
  return _scaled(value, ('', 'k', 'M', 'G', 'T'))


def size(value: Any) -> str:
  """A number of bytes; 1 KB is 1000 bytes.

  Example:
    >>> size(83400), size(2_000_000), size(512)
    ('83.4 KB', '2.00 MB', '512 B')
  """
  return _scaled(value, (' B', ' KB', ' MB', ' GB', ' TB'))


def fraction(value: Any, of: Any) -> str:
  """How large `value` is beside `of`, as people say it; '' when unknown.

  Example:
    >>> fraction(1, 24), fraction(5, 8), fraction(3, 2), fraction(1, None)
    ('1/24', '1/1.6', '1.5x', '')
  """
  value, of = number(value), number(of)
  if not value or not of:
    return ''
  ratio = of / value
  if ratio < 0.95:
    return f'{1 / ratio:.1f}x'
  if ratio < 1.05:
    return '1/1'
  return f'1/{ratio:.1f}' if ratio < 9.95 else f'1/{ratio:.0f}'


def milliseconds(value: Any) -> str:
  """A time in ms with three significant digits, without the unit.

  Example:
    >>> milliseconds(0.12345), milliseconds(12.345), milliseconds(1234.5)
    ('0.123', '12.3', '1234')
  """
  value = number(value)
  if value is None:
    return DASH
  digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
  return f'{value:.{digits}f}'


def seconds(value: Any) -> str:
  """A duration: seconds up to two minutes, then minutes, then hours.

  Example:
    >>> seconds(90), seconds(600), seconds(9000)
    ('90 s', '10 min', '2.5 h')
  """
  value = number(value)
  if value is None:
    return DASH
  for limit, unit, name in ((120, 1, 's'), (7200, 60, 'min')):
    if value < limit:
      return f'{value / unit:.3g} {name}'
  return f'{value / 3600:.1f} h'


def _scaled(value: Any, suffixes: Sequence[str]) -> str:
  """Three significant digits and the suffix of the right power of 1000."""
  value = number(value)
  if value is None:
    return DASH
  power = 0
  # 999.5 would be written as 1000 of the smaller unit.
  while abs(value) >= 999.5 and power < len(suffixes) - 1:
    value, power = value / 1000, power + 1
  if power == 0:
    return f'{value:.0f}{suffixes[0]}'
  digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
  return f'{value:.{digits}f}{suffixes[power]}'
