"""A report of `layers.check_parity` as text.

Owns widths and words of the table; computes no numbers.
"""

import sys
from typing import TextIO

from kd_jax.parity.layers import LayerParity, ParityReport

_TITLES = (
  'layer',
  'runs',
  'fake dB',
  'int8 dB',
  'int8-fake',
  'max error',
  'saturated',
  'dead in',
  'dead w',
)


def print_parity(report: ParityReport, file: TextIO | None = None) -> None:
  """Prints a report of `check_parity` as a table, a line for each layer.

  Args:
    report: what it returned.
    file: where to; standard output when None.

  Example:
    >>> from kd_jax.parity import Parity
    >>> inf = float('inf')
    >>> layer = LayerParity(
    ...   'conv', 'static', 41.0, 41.0, 0.0, inf, 0.0, 3, 200)
    >>> whole = Parity(1.0, 0.1, 40.0, 8)
    >>> print_parity(ParityReport((layer,), whole, whole, whole))
    layer  runs    fake dB  int8 dB  int8-fake  max error  saturated  dead in  \
dead w
    conv   static     41.0     41.0        inf          0     0.00 %        3  \
   200
    outputs: fake-quant 40.0 dB, agrees on 100.00 % with float
    outputs: integers   40.0 dB, agrees on 100.00 % with float
    outputs: integers   40.0 dB, agrees on 100.00 % with fake-quant
  """
  lines = [_TITLES, *map(_words, report.layers)]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  for line in lines:
    words = [
      word.ljust(width) if i < 2 else word.rjust(width)
      for i, (word, width) in enumerate(zip(line, widths, strict=True))
    ]
    print('  '.join(words), file=file or sys.stdout)
  ends = (
    ('fake-quant', report.fake, 'float'),
    ('integers  ', report.integer, 'float'),
    ('integers  ', report.exact, 'fake-quant'),
  )
  for name, parity, reference in ends:
    print(
      f'outputs: {name} {parity.sqnr_db:.1f} dB, agrees on '
      f'{parity.agreement:.2%} with {reference}'.replace('%', ' %'),
      file=file or sys.stdout,
    )


def _words(row: LayerParity) -> tuple[str, ...]:
  share = '-' if row.saturation is None else f'{100 * row.saturation:.2f} %'
  dead = (row.dead_inputs, row.dead_weights)
  decibels = (row.fake_sqnr_db, row.integer_sqnr_db, row.sqnr_db)
  return (
    row.layer,
    row.execution,
    *(f'{value:.1f}' for value in decibels),
    f'{row.max_error:.3g}',
    share,
    *('-' if n is None else str(n) for n in dead),
  )
