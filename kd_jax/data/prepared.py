"""Prepared data sets on disk: what identifies one, and reading its records.

Owns what is said when a file of a data set is damaged; how a data set is found
and prepared is `builders`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from etils import epath


class ByPosition(Protocol):
  """Gives the record at a position, as a list does."""

  def __getitem__(self, position: int, /) -> Mapping[str, Any]: ...


class Source(ByPosition, Protocol):
  """Reads several records at once too; `tfds.DataSource`."""

  def __len__(self) -> int: ...

  def __getitems__(
    self, positions: Sequence[int]
  ) -> Sequence[Mapping[str, Any]]: ...


class Records:
  """The records of one TFDS split; a damaged file is named.

  Args:
    source: where they are read.
    shards: `(file, number of records)` in the order of the positions.
  """

  def __init__(
    self,
    source: Source,
    shards: Sequence[tuple[str, int]],
  ):
    self._source, self._shards = source, shards

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, position: int) -> Mapping[str, Any]:
    try:
      return self._source[position]
    except Exception as e:  # of ArrayRecord, and of any decoder
      what = str(e).splitlines()[0] if str(e) else type(e).__name__
      raise ValueError(
        f'{self._file(position)} is damaged: example {position} of its split '
        f'cannot be read ({what[:160]}). Prepare the data set again.'
      ) from e

  def __getitems__(
    self, positions: Sequence[int]
  ) -> Sequence[Mapping[str, Any]]:
    try:
      return self._source.__getitems__(positions)
    except Exception:  # it does not say which record it was
      return [self[position] for position in positions]

  def _file(self, position: int) -> str:
    for file, count in self._shards:
      if position < count:
        return file
      position -= count
    return self._shards[-1][0]


def identify(directory: epath.Path) -> dict[str, str]:
  """What tells a prepared data set from another, without reading all of it.

  Returns:
    file -> SHA-256 for what describes the set, and under 'names and sizes of
    its files' that of the names and sizes.
  """
  found, sizes = {}, []
  for path in sorted(directory.iterdir()):
    sizes.append(f'{path.name} {path.stat().length}\n')
    if path.suffix in ('.json', '.txt'):
      found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
  listing = hashlib.sha256(''.join(sizes).encode()).hexdigest()
  return {**found, 'names and sizes of its files': listing}
