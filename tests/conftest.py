"""Shared by all tests: eight simulated devices and strict numerics."""

import os
from importlib import metadata

if metadata.version('jaxlib').startswith('0.10.'):
  # An older generator of code, which with `quick_compilation` takes about half
  # the time: most of that of all tests is compilation. JAX 0.12 lacks it.
  flags = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'{flags} --xla_cpu_use_fusion_emitters=false'

import jax
import pytest

jax.config.update('jax_platforms', 'cpu')
# Also for other processes: with libtpu there they would look for TPUs first.
os.environ['JAX_PLATFORMS'] = 'cpu'
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture
def rng():
  """A typed key."""
  return jax.random.key(0)


@pytest.fixture
def quick_compilation():
  """Compiles in half the time to slower programs, for tests that compile much.

  Use it where what is compiled runs for a few steps and is not measured.
  """
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


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


@pytest.fixture(scope='session')
def data_dir(session_dir):
  """A directory in which the digits are prepared, once for all workers."""
  shared = session_dir / 'kd_jax_data'
  from kd_jax import data  # noqa: PLC0415

  data.load_images('digits', 'test', data_dir=str(shared))
  return shared
