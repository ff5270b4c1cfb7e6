"""Collectives of a compiled program, read from its text.

Owns the parser of XLA's HLO as `jax.stages.Compiled.as_text()` writes it, and
whose collectives they are. It counts what stands in the program: the body of a
loop once.
"""

import collections
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

KINDS = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)

_SHAPE = re.compile(r'\b(pred|bf16|f8\w*|[suf]\d+|c64|c128)\[([\d,]*)\]')
_LINE = re.compile(
  r'%?(?P<name>[\w.\-]+) = (?P<type>.*?) '
  rf'(?P<kind>{"|".join(KINDS)})(?P<start>-start)?\('
)
_SCOPE = re.compile(r'op_name="([^"]*)"')
_MESH = re.compile(r'replica_groups=mesh\[(.*?)\] ?\{(.*?)\}')
_IOTA = re.compile(r'replica_groups=\[(\d+),(\d+)\]')
_LIST = re.compile(r'replica_groups=\{\{([\d,]+)\}')


class Array(NamedTuple):
  """One array of a collective, as a device holds it.

  Attributes:
    dtype: as HLO writes it, such as 'f32'.
    shape: of the result.
  """

  dtype: str
  shape: tuple[int, ...]

  @property
  def bytes(self) -> int:
    """Without padding."""
    return math.prod(self.shape) * _bits(self.dtype) // 8


class Collective(NamedTuple):
  """One collective instruction; a combined one moves several arrays.

  Attributes:
    kind: of `KINDS`.
    arrays: its results on a device.
    group: devices that take part together; 0 for all.
    scope: the operation in the source that it was made for, by
      `jax.named_scope`s: of a combined one that of one of its arrays.
  """

  kind: str
  arrays: tuple[Array, ...]
  group: int
  scope: str

  @property
  def bytes(self) -> int:
    """Of the whole arrays: what enters a reduce-scatter, else the results."""
    results = sum(array.bytes for array in self.arrays)
    return results * self.group if self.kind == 'reduce-scatter' else results

  def sent(self, devices: int) -> float:
    """Bytes that a device sends in the best algorithm (a ring).

    Args:
      devices: of the whole program, where the group is all of them.
    """
    n = self.group or devices
    if n < 2:
      return 0.0
    share = {'all-reduce': 2 * (n - 1) / n, 'collective-permute': 1.0}
    return self.bytes * share.get(self.kind, (n - 1) / n)


def collectives(text: str) -> list[Collective]:
  """The collectives of a program, in the order of its text.

  An asynchronous one counts once, by its start.

  Args:
    text: of one device's program.

  Example:
    >>> line = '%r = f32[8,4]{1,0} all-reduce(%x), replica_groups=[1,4]<=[4]'
    >>> [found] = collectives(line)
    >>> found.kind, found.bytes, found.group, found.sent(4)
    ('all-reduce', 128, 4, 192.0)
  """
  found = []
  for line in text.splitlines():
    match = _LINE.search(line)
    if not match:
      continue
    arrays = tuple(
      Array(dtype, tuple(int(n) for n in dims.split(',') if n))
      for dtype, dims in _SHAPE.findall(match['type'])
    )
    if match['start'] and match['kind'] != 'all-reduce':
      # Operands stand before results; a context of counters may follow.
      arrays = _results(arrays)
    scope = _SCOPE.search(line)
    found.append(
      Collective(match['kind'], arrays, _group(line), scope[1] if scope else '')
    )
  return found


def _results(arrays: Sequence[Array]) -> tuple[Array, ...]:
  data = [a for a in arrays if a.shape or a.dtype not in ('u32', 's32')]
  return tuple(data[len(data) // 2 :])


def _group(line: str) -> int:
  if match := _MESH.search(line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    return math.prod(int(sizes[a]) for a in re.findall(r"'(\w+)'", match[2]))
  if match := _IOTA.search(line):
    return int(match[2])
  if match := _LIST.search(line):
    return match[1].count(',') + 1
  return 0


def _bits(dtype: str) -> int:
  return 8 if dtype == 'pred' else int(re.findall(r'\d+', dtype)[0])


def owned(
  found: Iterable[Collective], parameters: Iterable[tuple[int, int]]
) -> list[tuple[Collective, dict[str, int]]]:
  """Whose the bytes of every collective are.

  'teacher' is what stands in the scope `teacher` of `make_train_step`. Gathers
  are of 'parameters'. Arrays as large as a parameter are its 'gradients', once
  for each, unless they stand in the student's forward pass. 'statistics' are
  the student's others: means of BatchNorm and observers, and what their
  gradients need. 'metrics' are scalars, and what stands in no network.

  Args:
    found: from `collectives`.
    parameters: entries of each trained parameter, on a device and in all.

  Returns:
    The same collectives, combined ones first, each with bytes by owner.
  """
  left = list(parameters)
  rows = []
  # BatchNorm's backward pass sums what are gradients too, but other sums of
  # that size must not take the place of a gradient that was combined.
  for collective in sorted(found, key=lambda c: -len(c.arrays)):
    shares: dict[str, int] = collections.Counter()
    for array in collective.arrays:
      size = array.bytes
      if collective.kind == 'reduce-scatter':
        size *= collective.group
      shares[_owner(collective, array, left)] += size
    rows.append((collective, dict(shares)))
  return rows


def _owner(
  collective: Collective, array: Array, left: list[tuple[int, int]]
) -> str:
  scope = collective.scope
  if re.search(r'\bteacher\b', scope):
    return 'teacher'
  if collective.kind in ('all-gather', 'collective-broadcast'):
    return 'parameters'
  student = re.search(r'\bstudent\b', scope)
  if student and 'transpose(' not in scope:
    return 'statistics'
  if not array.shape:
    return 'metrics'
  entries = math.prod(array.shape)
  for parameter in left:
    if entries in parameter:
      left.remove(parameter)
      return 'gradients'
  return 'statistics' if student else 'metrics'
