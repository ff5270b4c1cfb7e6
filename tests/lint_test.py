"""What checkers say of the code: its lint, its format, its types."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def _check(*words):
  words = [sys.executable, '-m', *words]
  done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.once
def test_ruff_finds_nothing_to_correct_or_to_format():
  _check('ruff', 'check', '--no-cache', '.')
  _check('ruff', 'format', '--no-cache', '--check', '.')


@pytest.mark.once
@pytest.mark.slow
def test_mypy_finds_nothing(tmp_path):
  _check('mypy', '--cache-dir', str(tmp_path))
