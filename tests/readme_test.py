"""The README's Python blocks run, and its tables are those of the results.

Its files of Python are `extend_test`'s.
"""

import inspect
import pathlib
import re

import pytest

import kd_jax

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```python\n(?!""")(.*?)```', README, re.DOTALL)


def test_the_readme_has_python_blocks():
  assert len(BLOCKS) >= 2


@pytest.mark.usefixtures('full_optimization')
@pytest.mark.parametrize('number', range(len(BLOCKS)))
def test_readme_block_runs(number, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  exec(compile(BLOCKS[number], f'README block {number}', 'exec'), {})


def test_the_readme_has_every_name_of_kd_jax():
  table = next(t for t in _tables(README) if 'in `kd_jax`' in t[0])
  named = [
    n for row in table for n in re.findall(r'`(\w+)`', row['in `kd_jax`'])
  ]
  public = [
    name
    for name, value in vars(kd_jax).items()
    if not name.startswith('_') and not inspect.ismodule(value)
  ]
  assert sorted(named) == sorted(public)


def _tables(text):
  """Every table as its rows, each a dictionary of cells by columns."""
  found = []
  for lines in re.findall(r'(?:^\|.*\|\n)+', text, re.MULTILINE):
    cells = [
      [cell.strip() for cell in line.strip('|').split('|')]
      for line in lines.splitlines()
    ]
    # The second line is the rule below the names of the columns.
    found.append([dict(zip(cells[0], row, strict=True)) for row in cells[2:]])
  return found


@pytest.mark.parametrize(
  'page',
  [
    'digits',
    'fashion_mnist',
    'compare_digits',
    'compression_fashion_mnist_resnet',
  ],
)
def test_a_table_of_the_readme_has_the_numbers_of_its_page(page):
  path = ROOT / 'benchmarks' / 'results' / f'{page}.md'
  measured = [row for table in _tables(path.read_text()) for row in table]

  def is_quoted(row):
    return any(row.items() <= whole.items() for whole in measured)

  tables = [table for table in _tables(README) if table]
  assert any(all(map(is_quoted, table)) for table in tables)
