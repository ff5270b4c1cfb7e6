"""Files that are written whole or not at all, and what tells their damage.

Owns bytes and digests, and what manifests and messages say beside them: JSON
values, how two of them differ, the versions of packages, errors in short.
Nothing of what is in a file or where it lies.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write(path: Path, data: bytes) -> None:
  """Writes a file beside its place, then moves it there.

  Args:
    path: the file; one that is there is replaced.
    data: its content.

  Raises:
    OSError: if it cannot be written, such as on a full disk; what was at
      `path` before is still there.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   write(Path(directory, 'a'), b'one')
    ...   write(Path(directory, 'a'), b'two')
    ...   [(path.name, path.read_bytes()) for path in Path(directory).iterdir()]
    [('a', b'two')]
  """
  half = path.with_name(path.name + '.tmp')
  try:
    with open(half, 'wb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(half, path)
  except OSError as e:
    half.unlink(missing_ok=True)
    raise OSError(f'{path} cannot be written: {e.strerror or e}.') from e


def describe(path: Path) -> dict[str, Any]:
  """The `sha256` and the `bytes` of a file.

  Args:
    path: a local file, which is read in pieces.

  Returns:
    The digest in hexadecimal, and the length.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   _ = Path(directory, 'a').write_bytes(b'abc')
    ...   about = describe(Path(directory, 'a'))
    >>> about['sha256'][:8], about['bytes']
    ('ba7816bf', 3)
  """
  with open(path, 'rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
    return {'sha256': digest, 'bytes': file.tell()}


def seal(entries: Mapping[str, Any]) -> dict[str, Any]:
  """JSON values with their own SHA-256 among them.

  Args:
    entries: an old seal among them is replaced.

  Example:
    >>> sealed = seal({'step': 1})
    >>> seal(sealed) == sealed, seal({**sealed, 'step': 2}) == sealed
    (True, False)
  """
  body = {key: x for key, x in entries.items() if key != 'sha256'}
  text = json.dumps(body, sort_keys=True)
  return {**body, 'sha256': hashlib.sha256(text.encode()).hexdigest()}


def as_json(
  value: Any,
  what: str,
  *,
  allow_nan: bool = True,
  error: type[ValueError] = ValueError,
) -> Any:
  """The value as it will be read back: tuples as lists, keys as strings.

  Args:
    value: of which it is made.
    what: it is called where it is not JSON.
    allow_nan: whether NaN and infinities pass, which JSON does not have.
    error: what is raised then.

  Example:
    >>> as_json({1: (2, 3)}, 'The sizes')
    {'1': [2, 3]}
  """
  try:
    return json.loads(json.dumps(value, allow_nan=allow_nan))
  except (TypeError, ValueError) as e:
    raise error(f'{what} is not JSON: {e}.') from e


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
  """Phrases that name the entries in which two dicts differ.

  Example:
    >>> differences({'a': '1', 'b': '2'}, {'a': '1', 'b': '3'})
    ['b is 2 there and 3 here']
  """
  return [
    f'{k} is {there.get(k, "absent")} there and {here.get(k, "absent")} here'
    for k in {**there, **here}
    if there.get(k) != here.get(k)
  ]


def version(package: str) -> str | None:
  """The installed version of a package, or None.

  Args:
    package: as pip names it.

  Example:
    >>> version('jax') is None, version('no-such-package') is None
    (False, True)
  """
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    return importlib.metadata.version(package)
  return None


def brief(error: BaseException) -> str:
  """The kind and the first line of an error, of 160 characters at most.

  Those of TensorStore run to sixty lines.

  Example:
    >>> brief(KeyError('step'))
    "KeyError: 'step'"
  """
  text = f'{type(error).__name__}: {str(error).strip()}'.splitlines()[0]
  return text if len(text) <= 160 else text[:157] + '...'
