"""Arguments and pages of the benchmarks: tables, notes, and what made them.

A script of this directory imports it as `page`.
"""

import argparse
import datetime
import pathlib
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata

from kd_jax.report import measure
from kd_jax.storage import files

ROOT = pathlib.Path(__file__).resolve().parent.parent


def make_parser(doc: str) -> argparse.ArgumentParser:
  """A parser with `--out`, the page that `publish` writes.

  Args:
    doc: the script's docstring, shown by `--help` with its line breaks.
  """
  parser = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--out', help='Markdown file to write')
  return parser


def command(script: str, argv: Sequence[str] | None = None) -> str:
  """The command that started a script, to be typed in the repository's root.

  Args:
    script: its `__file__`.
    argv: its arguments; those of this process when None. For `--data_dir` it
      says DIR, which is another one elsewhere.

  Example:
    >>> command(__file__, ['--rows', '2:4 pruned', '--seeds', '1'])
    "python benchmarks/page.py --rows '2:4 pruned' --seeds 1"
    >>> command(__file__, ['--data_dir=data', '--seeds', '1'])
    'python benchmarks/page.py --data_dir=DIR --seeds 1'
  """
  path = pathlib.Path(script).resolve().relative_to(ROOT).as_posix()
  words = sys.argv[1:] if argv is None else argv
  line = shlex.join(['python', path, *words])
  return re.sub(r"(--data_dir[ =])('[^']*'|\S+)", r'\1DIR', line)


def machine(packages: Sequence[str] = ('jax', 'flax')) -> str:
  """Hardware, versions of Python and of packages, and the day: a note."""
  versions = ', '.join(f'{p} {metadata.version(p)}' for p in packages)
  return (
    f'{measure.hardware()}; python {platform.python_version()}, {versions}; '
    f'{datetime.datetime.now(datetime.UTC):%Y-%m-%d}.'
  )


def publish(
  out: str | None,
  tables: Sequence[str],
  notes: Sequence[str],
  *,
  machine: str,
  command: str,
) -> None:
  """Prints a page and writes it, whole or not at all.

  Args:
    out: the file, whose directory is made; only printed when None.
    tables: Markdown, in this order.
    notes: sentences, the items of a list below the tables.
    machine: where and when it was measured, see `machine`; the next item.
    command: what made the page, see `command`; the last item.

  Raises:
    OSError: if the file cannot be written; by then the page is printed.
  """
  items = [*notes, machine, f'Made by `{command}`.']
  text = '\n\n'.join([*tables, '\n'.join(f'- {item}' for item in items)])
  print(text, flush=True)
  if out:
    path = pathlib.Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, f'{text}\n'.encode())
