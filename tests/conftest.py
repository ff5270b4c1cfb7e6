"""Shared by all tests: eight simulated devices and strict numerics."""

import os

import jax
import pytest

jax.config.update('jax_platforms', 'cpu')
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
def data_dir(tmp_path_factory):
  """A directory in which the digits are prepared, once for all workers."""
  base = tmp_path_factory.getbasetemp()
  # With xdist every worker has a base of its own, in one of the session.
  shared = base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base
  shared = shared / 'kd_jax_data'
  from kd_jax import data  # noqa: PLC0415

  data.load_images('digits', 'test', data_dir=str(shared))
  return shared
