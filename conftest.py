"""Shared by all tests: eight devices, strict numerics, quick compilation."""

import os
from importlib import metadata

# Most of the time of most tests is compilation, of programs that run for a few
# steps. Other processes inherit what is set here.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
if metadata.version('jaxlib').startswith('0.10.'):
  # An older generator of code. JAX 0.12 lacks it, and would end at the flag.
  flags = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'{flags} --xla_cpu_use_fusion_emitters=false'

import jax
import pytest

QUICK = 'jax_disable_most_optimizations'

jax.config.update('jax_platforms', 'cpu')
# Also for other processes: with libtpu there they would look for TPUs first.
os.environ['JAX_PLATFORMS'] = 'cpu'
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  """Makes a file the work of one process; those of slow tests are first.

  What one test compiled the next has in memory, and no process is left with
  the longest file when the others are done.
  """
  slow = set()
  for item in items:
    path = item.nodeid.partition('::')[0]
    if item.get_closest_marker('xdist_group') is None:
      item.add_marker(pytest.mark.xdist_group(path))
    if item.get_closest_marker('slow'):
      slow.add(path)
  items.sort(key=lambda item: item.nodeid.partition('::')[0] not in slow)


@pytest.fixture
def rng():
  """A typed key."""
  return jax.random.key(0)


@pytest.fixture
def full_optimization(monkeypatch):
  """Compiles as users do: for what is measured, and for what runs for long."""
  before = jax.config.read(QUICK)
  jax.config.update(QUICK, False)
  monkeypatch.setenv(QUICK.upper(), '0')
  yield
  jax.config.update(QUICK, before)


@pytest.fixture(scope='session')
def session_dir(tmp_path_factory):
  """A directory that all workers share."""
  base = tmp_path_factory.getbasetemp()
  # With xdist every worker has a base of its own, in one of the session.
  return base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base


@pytest.fixture(scope='session', autouse=True)
def compiled_once(session_dir):
  """Keeps programs that take long to compile, also for other processes.

  For this session, or where `JAX_COMPILATION_CACHE_DIR` says.
  """
  directory = os.environ.get('JAX_COMPILATION_CACHE_DIR')
  options = {
    'jax_compilation_cache_dir': directory or str(session_dir / 'compiled'),
    'jax_persistent_cache_min_compile_time_secs': 0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
  }
  for name, value in options.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)
  # What is small stays in memory here; to write it takes longer.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


@pytest.fixture(scope='session')
def data_dir(session_dir):
  """A directory in which the digits are prepared, once for all workers."""
  shared = session_dir / 'kd_jax_data'
  from kd_jax import data

  data.load_images('digits', 'test', data_dir=str(shared))
  return shared
