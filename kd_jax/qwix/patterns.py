"""Which modules a rule reaches: our pairs of patterns as one of Qwix.

Owns regular expressions of paths; what quantizes there is in `fields`.
"""

import re
from collections.abc import Iterable, Sequence

from kd_jax.quantize import QuantSpec

EVERYTHING = '.*'


def module_of(pattern: str, spec: QuantSpec | None) -> str | None:
  """The modules whose kernels a weight rule is for; None if it is for none.

  Raises:
    ValueError: for a pattern that is not of kernels.
  """
  # A '|' in brackets chooses a part of a path, another one whole paths.
  outside, found = pattern, 1
  while found:
    outside, found = re.subn(r'\([^()]*\)', '', outside)
  if '|' not in outside:
    if pattern == 'kernel':
      return ''
    if pattern.endswith('/kernel'):
      return pattern.removesuffix('/kernel')
    if spec is None and pattern == EVERYTHING:
      return pattern
    if spec is None and pattern.endswith('/.*'):
      return f'{pattern.removesuffix("/.*")}(/.*)?'
    name = re.fullmatch(r'.*\b(\w+)', pattern)
    if spec is None and name and not 'kernel'.endswith(name[1]):
      return None
  raise ValueError(
    f'Qwix quantizes the kernels of modules: weight rule {pattern!r} has to '
    "end in '/kernel'."
  )


def both(module: str, pattern: str) -> str | None:
  """A pattern of what both match; None if that is surely nothing."""
  if pattern in (EVERYTHING, module):
    return module
  for one, other in ((module, pattern), (pattern, module)):
    if re.fullmatch(r'[\w/]*', one):
      return one if re.fullmatch(other, one) else None
  if module == EVERYTHING:
    return pattern
  return rf'(?=(?:{module})\Z)(?:{pattern})'


def check_reach(
  pattern: str,
  modules: Iterable[tuple[str, QuantSpec | None]],
  before: Sequence[tuple[str, QuantSpec | None]],
) -> None:
  """Raises if an activation rule may reach a layer with float weights."""
  for module, weight in modules:
    if weight is None and both(module, pattern) is not None:
      if not any(p in (module, EVERYTHING) and s is None for p, s in before):
        raise ValueError(
          'Qwix quantizes no inputs where weights stay in float: put '
          f'({module!r}, None) before the activation rule {pattern!r}.'
        )
    elif weight is not None and both(module, pattern) == pattern:
      return
  raise ValueError(
    'Qwix quantizes no inputs where weights stay in float: activation rule '
    f'{pattern!r} needs a weight rule {f"{pattern}/kernel"!r}.'
  )
