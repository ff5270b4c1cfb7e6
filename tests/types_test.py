"""The types that the package declares are those that it uses."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.once
@pytest.mark.slow
def test_mypy_finds_nothing(tmp_path):
  words = [sys.executable, '-m', 'mypy', '--cache-dir', str(tmp_path)]
  done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
