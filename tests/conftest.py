"""Shared by all tests: eight simulated devices and strict numerics."""

import jax
import pytest

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture
def rng():
  """A typed key."""
  return jax.random.key(0)
