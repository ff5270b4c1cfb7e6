"""Mutates files of the library and runs tests against every mutant.

  python .ci/mutants.py FILE=TESTS[,TESTS] ... [--sample 20] [-k EXPRESSION]

mutmut makes the mutants; those that put None in the place of a value are left
out, since nearly all crash. They run in one session of pytest: to import and
to compile takes longer than to test. If there are tests whose names hold that
of a function, or of a public one of its file that uses it, its mutants get
these and the tests without parameters; or else all. Between mutants the caches
of the library and the tests are cleared; `--cold` clears JAX's own too, for
which one function jitted twice is one program.
"""

import argparse
import importlib.machinery
import os
import pathlib
import random
import re
import signal
import sys
import time
from typing import NamedTuple

import jax
import pytest
from _pytest.runner import runtestprotocol
from mutmut.mutation.file_mutation import mutate_file_contents

OPTIONS = ['-p', 'no:cacheprovider', '-p', 'no:xdist', '-p', 'no:terminal']
OPTIONS += ['-o', 'addopts=']


class Mutant(NamedTuple):
  """One mutated function, as mutmut names it, and how it differs."""

  file: str
  tests: tuple[str, ...]
  name: str
  change: str

  @property
  def function(self):
    return re.sub(r'^x[_ǁ]|__mutmut_\d+$', '', self.name).split('ǁ')[-1]

  def activate(self, name=None):
    module = self.file.removesuffix('.py').replace('/', '.')
    os.environ['MUTANT_UNDER_TEST'] = f'{module}.{name or self.name}'


class Mutated(importlib.machinery.SourceFileLoader):
  """Imports a file with all its mutants, of which one may be active."""

  codes = {}

  def get_code(self, fullname):
    return compile(self.codes[fullname], self.path, 'exec')

  @classmethod
  def find_spec(cls, name, path, target=None):
    spec = importlib.machinery.PathFinder.find_spec(name, path, target)
    if name in cls.codes:
      spec.loader = cls(name, spec.origin)
    return spec


class Session:
  """Runs the collected tests for every mutant."""

  def __init__(self, mutants, args):
    self.mutants, self.timeout = mutants, args.timeout
    self.cold, self.every = args.cold, args.every

  def pytest_runtestloop(self, session):
    clean, counts = [], {}
    signal.signal(signal.SIGALRM, _raise_timeout)
    for mutant in self.mutants:
      items = self._tests_of(mutant, session.items)
      start = time.monotonic()
      if items not in clean:
        clean.append(items)
        mutant.activate('x_none__mutmut_0')
        failed = self._failed(session, items)
        print(f'{mutant.function}: {len(items)} tests, fail as is: {failed}')
      mutant.activate()
      failed = self._failed(session, items)
      result = 'lives' if failed is None else 'killed'
      seconds = time.monotonic() - start
      print(result, f'{seconds:.1f} s', mutant.name, failed or '', flush=True)
      if failed is None:
        print(mutant.change, flush=True)
      found = counts.setdefault(mutant.file, {'killed': 0, 'lives': 0})
      found[result] += 1
    for file, found in counts.items():
      print(file, found, flush=True)
    return True

  def _tests_of(self, mutant, items):
    names = _users(mutant)
    items = [i for i in items if i.nodeid.startswith(mutant.tests)]
    named = [i for i in items if any(n in i.name for n in names)]
    if self.every or not named:
      return items
    return named + [i for i in items if i not in named and '[' not in i.name]

  def _failed(self, session, items):
    """The name of the first test that fails, or None."""
    _forget()
    if self.cold:
      jax.clear_caches()
    signal.alarm(self.timeout)
    try:
      for item, following in zip(items, [*items[1:], None], strict=True):
        reports = runtestprotocol(item, log=False, nextitem=following)
        if any(report.failed for report in reports):
          return item.name
    finally:
      signal.alarm(0)
      session._setupstate.teardown_exact(None)
    return None


def _users(mutant):
  """The public functions of a file that need a function, or are it."""
  parts = re.split(
    r'^(?=(?:async )?def |class )',
    pathlib.Path(mutant.file).read_text(),
    flags=re.M,
  )
  bodies = {re.split(r'\W+', part)[1]: part for part in parts[1:]}
  found = {mutant.function}
  for _ in bodies:
    found |= {
      name
      for name, body in bodies.items()
      if any(re.search(rf'\b{f}\b', body) for f in found)
    }
  return [name for name in found if not name.startswith('_')]


def _forget():
  """Clears what functions of the library and the tests remember."""
  for name, module in list(sys.modules.items()):
    path = getattr(module, '__file__', None) or ''
    if name.startswith('kd_jax') or path.startswith(os.path.abspath('tests')):
      for value in list(vars(module).values()):
        for method in ('cache_clear', 'clear_cache'):
          if callable(value) and hasattr(value, method):
            getattr(value, method)()


def _raise_timeout(*_):
  raise TimeoutError('The mutant takes too long.')


def _mutants(file, tests, args):
  """A sample of the mutants of a file, which is imported with them."""
  mutated = mutate_file_contents(file, pathlib.Path(file).read_text())
  Mutated.codes[file.removesuffix('.py').replace('/', '.')] = mutated.code
  changes = _changes(mutated.code)
  kept = [n for n in mutated.mutant_names if not _puts_none(changes[n])]
  kept = [n for n in kept if re.search(args.only, n)]
  sample = random.Random(0).sample(kept, min(args.sample, len(kept)))
  sample.sort(key=kept.index)
  print(f'{file}: {len(mutated.mutant_names)} mutants, {len(kept)} not of None')
  tests = tuple(tests.split(','))
  return [Mutant(file, tests, n, '\n'.join(changes[n])) for n in sample]


def _changes(code):
  """Name of a mutant -> its lines that differ from the original's."""
  functions, name = {}, None
  for line in code.splitlines():
    found = re.match(r'( *)def (x\S*?__mutmut_(?:orig|\d+))\(', line)
    if found:
      outside, name = re.compile(f'{found[1]}[^ )]'), found[2]
      functions[name] = []
    elif name is not None and outside.match(line):
      name = None
    if name is not None:
      functions[name].append(line.replace(name, ''))
  changes = {}
  for name, lines in functions.items():
    original = functions[re.sub(r'\d+$', 'orig', name)]
    same = [a == b for a, b in zip(original, lines, strict=False)]
    first = same.index(False) if False in same else 0
    ends = zip(
      reversed(original[first:]), reversed(lines[first:]), strict=False
    )
    same = [a == b for a, b in ends]
    end = same.index(False) if False in same else len(same)
    changes[name] = [f'  - {x}' for x in original[first : len(original) - end]]
    changes[name] += [f'  + {x}' for x in lines[first : len(lines) - end]]
  return changes


def _puts_none(change):
  old = ''.join(line for line in change if line.startswith('  -'))
  new = ''.join(line for line in change if line.startswith('  +'))
  return new.count('None') > old.count('None')


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('files', nargs='+', help='FILE=TESTS[,TESTS]')
  parser.add_argument('-k', default='', help='as of pytest')
  parser.add_argument('-m', default='not slow', help='as of pytest')
  parser.add_argument('--sample', type=int, default=60, help='of each file')
  parser.add_argument('--only', default='', help='a pattern of mutants')
  parser.add_argument('--timeout', type=int, default=300, help='in seconds')
  parser.add_argument('--cold', action='store_true', help='compile all anew')
  parser.add_argument('--every', action='store_true', help='test, for each')
  parser.add_argument('--list', action='store_true', help='run nothing')
  args = parser.parse_args()
  pairs = [entry.split('=') for entry in args.files]
  mutants = [m for pair in pairs for m in _mutants(*pair, args)]
  if args.list:
    print('\n'.join(f'{m.name}\n{m.change}' for m in mutants))
    return
  os.environ['MUTANT_UNDER_TEST'] = ''
  os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
  sys.meta_path.insert(0, Mutated)
  plugins = [Session(mutants, args)]
  tests = dict.fromkeys(test for mutant in mutants for test in mutant.tests)
  pytest.main([*OPTIONS, '-k', args.k, '-m', args.m, *tests], plugins=plugins)


if __name__ == '__main__':
  main()
