"""Two processes with two devices each, joined by gloo, against one with four.

What each process does alone is in `hosts_worker.py`.
"""

import json
import shutil

import hosts_worker
import jax
import numpy as np
import pytest
from pairs import Pair

from kd_jax import sharding
from kd_jax.storage.checkpoint import CheckpointError

pytestmark = pytest.mark.xdist_group('hosts')


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  """Losses and ids of six steps in one process with four devices."""
  return hosts_worker.train_on(
    mesh(4, **hosts_worker.FSDP), tmp_path_factory.mktemp('straight'), 6
  )


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
  """What two processes found, and the directory of their checkpoints."""
  directory = tmp_path_factory.mktemp('pair')
  one = mesh(4, **hosts_worker.FSDP)
  hosts_worker.train_on(one, directory / 'one', 3)
  started = Pair(
    ['tests/hosts_worker.py'],
    lambda index, port: [str(index), str(port), str(directory)],
  )
  codes, said = started.ended()
  assert codes == [0, 0], said
  found = [json.loads((directory / f'{i}.json').read_text()) for i in range(2)]
  return found, directory


def mesh(devices, **axes):
  return sharding.make_mesh(jax.devices()[:devices], **axes)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['two', 'tensor', 'shard_map', 'pmap'])
def test_training_equals_one_process(pair, reference, name):
  """Parameters split over hosts, replicated ones, and every compiler."""
  found, _ = pair
  losses, ids = found[0][name]
  assert found[1][name] == found[0][name]
  assert ids == reference[1][: len(ids)]
  np.testing.assert_allclose(losses, reference[0][: len(ids)], rtol=1e-5)


@pytest.mark.slow
def test_two_processes_go_on_from_the_checkpoint_of_one(pair, reference):
  found, _ = pair
  losses, ids = found[1]['from one']
  assert ids == reference[1][3:]
  np.testing.assert_allclose(losses, reference[0], atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
  'devices, axes', [(4, {}), (2, hosts_worker.FSDP), (1, {})]
)
def test_one_process_goes_on_from_the_checkpoint_of_two(
  pair, reference, tmp_path, devices, axes
):
  shutil.copytree(pair[1] / 'two', tmp_path / 'two')
  losses, ids = hosts_worker.train_on(
    mesh(devices, **axes), tmp_path / 'two', 6
  )
  assert ids == reference[1][3:]
  np.testing.assert_allclose(losses, reference[0], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_damage_to_what_one_process_wrote_is_found_by_all(pair, tmp_path):
  found, directory = pair
  for one in found:
    assert one['damaged'].startswith('CheckpointError'), one['damaged']
  # As it is by one process that reads what two wrote.
  shutil.copytree(directory / 'two', tmp_path / 'two')
  hosts_worker.damage(tmp_path / 'two')
  with pytest.raises(CheckpointError, match='damaged'):
    hosts_worker.train_on(mesh(1), tmp_path / 'two', 4)


@pytest.mark.slow
def test_processes_that_differ_are_refused_by_all(pair):
  found, _ = pair
  assert [one['processes'] for one in found] == [2, 2]
  for one in found:
    assert one['agreed'] is None
    differ = 'ValueError: Process 1 differs from process 0: '
    assert one['settings'].startswith(f'{differ}seed is 1, not 0.')
    assert one['packages'].startswith(f"{differ}jax is '0.1', not '0.0'.")


@pytest.mark.slow
def test_process_0_speaks_and_fails_for_all(pair):
  found, _ = pair
  assert [one['first'] for one in found] == [True, False]
  assert [one['exchanged'] for one in found] == [['', 'ä']] * 2
  assert [one['value'] for one in found] == [{'by': 0}] * 2
  assert found[0]['failed'] == "KeyError: 'missing'"
  assert found[1]['failed'] == "ValueError: Process 0: 'missing'"
  assert all('all hosts share' in one['unseen'] for one in found)
  # Process 1 alone sees a result, and another run has the lock.
  assert [one['done'] for one in found] == [False, True]
  assert [one['finished'] for one in found] == [False, False]
  assert 'ValueError: ' in found[0]['locked']
  assert all('in use by' in one['locked'] for one in found)
