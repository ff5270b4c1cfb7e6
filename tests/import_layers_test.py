"""The architecture, read from the source: who imports whom, and docstrings."""

import ast
import functools
import graphlib
import pathlib
import re
import subprocess
import sys

import kd_jax

PACKAGE = pathlib.Path(kd_jax.__file__).parent
SOURCES = {
  path.relative_to(PACKAGE).as_posix(): path
  for path in sorted(PACKAGE.rglob('*.py'))
}
# The rooms of each floor, from the top of the README's table downwards.
FLOORS = [
  {name.rstrip('/') for name in re.findall('`([a-z_/]+)`', row)}
  for row in re.findall(
    r'^\| ((?:`[a-z_/]+`(?:, )?)+) \|',
    (PACKAGE.parent / 'README.md').read_text().split('| room |')[1],
    re.MULTILINE,
  )
]
HIGH = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
# What a researcher's own step is made of; `models` is for those without any.
CORE = set().union(*FLOORS[: HIGH['step'] + 1]) - {'models', 'adapters'}
HEAVY = {'tensorflow', 'tensorflow_datasets', 'matplotlib', 'onnx'}


@functools.cache
def _tree(name):
  return ast.parse(SOURCES[name].read_text())


@functools.cache
def _imports(name):
  """Every module and name that a file imports, as dotted paths."""
  found = set()
  for node in ast.walk(_tree(name)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{name} imports relatively'
      found |= {f'{node.module}.{alias.name}' for alias in node.names}
  return found


def _own_room(name):
  return pathlib.PurePosixPath(name).parts[0].removesuffix('.py')


def _room(dotted):
  """'kd_jax.losses.logits.f' -> 'losses'; None for other packages."""
  parts = dotted.split('.')
  return parts[1] if parts[0] == 'kd_jax' and len(parts) > 1 else None


def _importers(*modules):
  """The files that import one of these, or something of it."""
  return {
    name
    for name in SOURCES
    if any(f'{i}.'.startswith(f'{m}.') for i in _imports(name) for m in modules)
  }


def test_only_models_and_adapters_import_linen_or_nnx():
  found = _importers('flax.linen', 'flax.nnx')
  assert {_own_room(name) for name in found} == {'models', 'adapters'}


def test_nothing_imports_the_inside_of_jax():
  for name, path in SOURCES.items():
    assert not re.search(r'jax\._src|jax\.core', path.read_text()), name


def test_the_readme_lists_the_rooms():
  rooms = {_own_room(name) for name in SOURCES} - {'__init__', '__main__'}
  assert rooms == set(HIGH)
  assert sum(map(len, FLOORS)) == len(HIGH)


def test_a_room_imports_those_above_it_in_the_table_alone():
  for name in SOURCES:
    if (own := _own_room(name)) in HIGH:
      rooms = {_room(imported) for imported in _imports(name)} & set(HIGH)
      below = {room for room in rooms if HIGH[room] > HIGH[own]}
      assert not below, f'{name} imports {below}'


def test_the_core_imports_the_core_alone():
  for name in SOURCES:
    if _own_room(name) in CORE:
      rooms = {_room(imported) for imported in _imports(name)} - {None}
      assert rooms <= CORE, f'{name} imports {rooms - CORE}'


def test_no_file_imports_itself_by_way_of_others():
  files = {}
  for name in SOURCES:
    module = f'kd_jax/{name}'.removesuffix('.py').removesuffix('/__init__')
    files[module.replace('/', '.')] = name
  imported = {
    module: {
      found
      for i in _imports(name)
      for found in (i, i.rpartition('.')[0])
      # What runs first in any case.
      if found in files
      and found not in ('kd_jax', module)
      and not module.startswith(f'{found}.')
    }
    for module, name in files.items()
  }
  order = list(graphlib.TopologicalSorter(imported).static_order())
  assert order.index('kd_jax.types') < order.index('kd_jax.step')


def test_the_lowest_rooms_import_nothing_of_ours():
  for name in ('types.py', 'rules.py', 'placement.py'):
    assert {_room(i) for i in _imports(name)} == {None}
  below = {'losses', 'types'}
  for name in SOURCES:
    if name.startswith('losses/'):
      assert {_room(i) for i in _imports(name)} - {None} <= below
  # One that quantizes need not prune, and the other way round.
  for name in SOURCES:
    for room, other in (('prune', 'quantize'), ('quantize', 'prune')):
      if name.startswith(f'{room}/'):
        assert other not in {_room(i) for i in _imports(name)}


def test_importing_the_package_loads_nothing_heavy():
  code = 'import sys, kd_jax; print(*{m.split(".")[0] for m in sys.modules})'
  out = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert 'kd_jax' in out.stdout.split()
  assert not HEAVY & set(out.stdout.split())


def _public(body, prefix=''):
  """Functions and classes with public names, methods included."""
  kinds = (ast.FunctionDef, ast.ClassDef)
  for node in body:
    if isinstance(node, kinds) and not node.name.startswith('_'):
      yield f'{prefix}{node.name}', node
      if isinstance(node, ast.ClassDef):
        yield from _public(node.body, f'{node.name}.')


def test_everything_public_has_a_docstring():
  for name in SOURCES:
    tree = _tree(name)
    assert ast.get_docstring(tree), f'{name} has no docstring'
    missing = [n for n, d in _public(tree.body) if not ast.get_docstring(d)]
    assert not missing, f'{name}: {missing}'


def test_no_file_needs_scrolling_to_be_understood():
  lines = {n: len(p.read_text().splitlines()) for n, p in SOURCES.items()}
  assert not {name: n for name, n in lines.items() if n > 400}
