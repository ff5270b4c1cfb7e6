"""What is published: the wheel, the source distribution, lowest versions."""

import configparser
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

pytestmark = pytest.mark.once
ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ('.ci', 'benchmarks', 'configs', 'kd_jax', 'notebooks', 'tests')
FILES = (
  'CHANGELOG.md',
  'CONTRIBUTING.md',
  'LICENSE',
  'MANIFEST.in',
  'README.md',
  'conftest.py',
  'pyproject.toml',
  'setup.cfg',
)


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  """A directory with both distributions, the wheel made from the other."""
  directory = tmp_path_factory.mktemp('published')
  # Of a copy, since setuptools leaves files beside what it builds.
  source = directory / 'source'
  for folder in FOLDERS:
    ignored = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
  for file in FILES:
    shutil.copy(ROOT / file, source)
  _build('sdist', source, directory)
  [archive] = directory.glob('*.tar.gz')
  with tarfile.open(archive) as tar:
    tar.extractall(directory / 'unpacked', filter='data')
  [unpacked] = (directory / 'unpacked').iterdir()
  _build('wheel', unpacked, directory)
  return directory


def _build(kind, source, directory):
  """Calls setuptools as pip does, without the network."""
  call = f'build_meta.build_{kind}({str(directory)!r})'
  words = [sys.executable, '-c', f'from setuptools import build_meta; {call}']
  done = subprocess.run(words, cwd=source, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_is_the_package(published):
  [wheel] = published.glob('*.whl')
  with zipfile.ZipFile(wheel) as file:
    found = {name for name in file.namelist() if '.dist-info/' not in name}
  modules = {
    str(path.relative_to(ROOT)) for path in (ROOT / 'kd_jax').rglob('*.py')
  }
  # With py.typed type checkers read the annotations of what is installed.
  assert found == modules | {'kd_jax/py.typed'}


def test_the_source_distribution_has_its_tests(published):
  [archive] = published.glob('*.tar.gz')
  with tarfile.open(archive) as tar:
    found = {name.split('/', 1)[-1] for name in tar.getnames()}
  missing = set(FILES) | {
    str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in (ROOT / folder).rglob('*')
    if '__pycache__' not in path.parts
  }
  assert not missing - found


def test_every_requirement_has_a_floor():
  config = configparser.ConfigParser()
  config.read(ROOT / 'setup.cfg')
  wanted = config['options']['install_requires']
  extras = config['options.extras_require'].values()
  # Extras of JAX have the floor of JAX.
  lines = [
    line
    for line in '\n'.join([wanted, *extras]).splitlines()
    if line and not line.startswith('jax[')
  ]
  assert len(lines) > 20
  assert not [line for line in lines if '>=' not in line and '==' not in line]
