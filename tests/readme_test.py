"""The README's Python blocks run as they stand; files are `extend_test`'s."""

import pathlib
import re

import pytest

README = (pathlib.Path(__file__).parent.parent / 'README.md').read_text()
BLOCKS = re.findall(r'```python\n(?!""")(.*?)```', README, re.DOTALL)


def test_the_readme_has_python_blocks():
  assert len(BLOCKS) >= 2


@pytest.mark.usefixtures('full_optimization')
@pytest.mark.parametrize('number', range(len(BLOCKS)))
def test_readme_block_runs(number, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  exec(compile(BLOCKS[number], f'README block {number}', 'exec'), {})
