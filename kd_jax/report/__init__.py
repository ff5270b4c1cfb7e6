"""Reports: one dict of measurements as JSON, Markdown, a table and a page.

Owns how results are shown and kept; measures nothing. Importing this room
loads no matplotlib; the first plot does.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax.report.findings import summary
from kd_jax.report.html import html
from kd_jax.report.plots import curves_figure, size_figure, sparsity_figure
from kd_jax.report.sensitivity import sensitivity_figure
from kd_jax.report.table import markdown, print_table
from kd_jax.storage import files

FORMAT = 1
NAMES = ('report.json', 'report.md', 'report.html')

__all__ = [
  'FORMAT',
  'NAMES',
  'curves_figure',
  'html',
  'markdown',
  'print_table',
  'read_report',
  'sensitivity_figure',
  'size_figure',
  'sparsity_figure',
  'summary',
  'write_report',
]


def write_report(
  report: Mapping[str, Any],
  directory: str | os.PathLike[str],
  *,
  overwrite: bool = True,
) -> dict[str, Path]:
  """Writes a report as JSON, as Markdown and as a page.

  All three are made before any is written, and each replaces its predecessor
  in one move: a reader never sees half a file.

  Args:
    report: the report, with `'format': 1`. NumPy and JAX numbers are welcome;
      NaN and infinity become null.
    directory: a local directory; created if it does not exist.
    overwrite: whether reports already there may be replaced.

  Returns:
    file name -> path, for each of `NAMES`.

  Raises:
    FileExistsError: if a report is there and `overwrite` is False.
    TypeError: if the report holds something that JSON cannot.
    ValueError: if the report is of another format, or the directory is not
      local.

  Example:
    >>> import tempfile
    >>> report = {'format': 1, 'models': [
    ...   {'name': 'teacher', 'accuracy': np.float32(0.75), 'loss': np.nan}]}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   paths = write_report(report, directory)
    ...   read_report(directory)['models']
    [{'name': 'teacher', 'accuracy': 0.75, 'loss': None}]
    >>> list(paths)
    ['report.json', 'report.md', 'report.html']
  """
  if '://' in os.fspath(directory):
    raise ValueError(f'{directory} is not a local directory: write, then copy.')
  report = _plain(report)
  _check(report, 'The report')
  texts = (
    json.dumps(report, indent=1, allow_nan=False) + '\n',
    markdown(report),
    html(report),
  )
  paths = {name: Path(directory) / name for name in NAMES}
  for path in paths.values():
    if path.exists() and not overwrite:
      raise FileExistsError(f'{path} exists, and overwrite is False.')
  Path(directory).mkdir(parents=True, exist_ok=True)
  for path, text in zip(paths.values(), texts, strict=True):
    files.write(path, text.encode())
  return paths


def read_report(directory: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads what `write_report` wrote.

  Args:
    directory: the directory that holds `report.json`.

  Returns:
    The report.

  Raises:
    ValueError: if it is missing, damaged or of another format.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   path = Path(directory, 'report.json')
    ...   _ = path.write_text('{"format": 1, "models": [{"name": "int8"}]}')
    ...   read_report(directory)
    {'format': 1, 'models': [{'name': 'int8'}]}
  """
  path = Path(directory) / NAMES[0]
  try:
    report = json.loads(path.read_text(encoding='utf-8'))
  except (FileNotFoundError, NotADirectoryError) as e:
    raise ValueError(f'There is no report at {path}.') from e
  except ValueError as e:
    raise ValueError(f'{path} is damaged: it is not JSON ({e}).') from e
  _check(report, str(path))
  return report


def _check(report: Any, what: str) -> None:
  """Raises ValueError unless this is a report that we can show."""
  if not isinstance(report, Mapping):
    raise ValueError(
      f'{what} is damaged: it holds a {type(report).__name__}, not a report.'
    )
  if report.get('format') != FORMAT:
    raise ValueError(
      f'{what} has format {report.get("format")!r}, but this kd_jax reads '
      f'format {FORMAT}.'
    )
  models = report.get('models')
  if not isinstance(models, list) or not all(
    isinstance(m, Mapping) for m in models
  ):
    raise ValueError(f'{what} is damaged: its models are not a list of dicts.')


def _plain(value: Any) -> Any:
  """The same value in types that JSON has; no number where it has none."""
  if isinstance(value, Mapping):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  if hasattr(value, 'dtype'):
    return _plain(np.asarray(value).tolist())
  if isinstance(value, float) and not np.isfinite(value):
    return None
  return value
