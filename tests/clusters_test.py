"""Which cluster and which accelerators there are, from files and variables."""

import functools
import pathlib

import pytest

from kd_jax.sharding import clusters, hosts, processes

SLURM = {
  'SLURM_JOB_ID': '7',
  'SLURM_STEP_NODELIST': 'node[1-2]',
  'SLURM_NTASKS': '2',
  'SLURM_PROCID': '0',
  'SLURM_LOCALID': '0',
}
OPEN_MPI = {'OMPI_COMM_WORLD_SIZE': '4'}


def machine(root, *files, devices=()):
  """A file system with these device files and PCI devices."""
  for file in files:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  for i, (vendor, kind) in enumerate(devices):
    path = root / f'sys/bus/pci/devices/0000:00:0{i}.0'
    path.mkdir(parents=True)
    (path / 'vendor').write_text(f'{vendor}\n')
    (path / 'device').write_text(f'{kind}\n')
  return root


@pytest.mark.parametrize(
  'environ, cluster',
  [
    ({}, None),
    (SLURM, 'slurm'),
    (SLURM | {'SLURM_NTASKS': '1'}, None),
    ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '2'}, None),  # no step: no srun
    (OPEN_MPI, 'mpi4py'),
    (OPEN_MPI | {'OMPI_MCA_orte_hnp_uri': '1.0;tcp://10.0.0.1:1'}, 'ompi'),
    ({'OMPI_COMM_WORLD_SIZE': '1'}, None),
  ],
)
def test_launchers(environ, cluster, tmp_path):
  assert clusters.detect(environ, root=tmp_path) == cluster


def test_pods_by_the_environment_and_the_metadata_server(tmp_path):
  root = machine(tmp_path, 'dev/accel0')
  answers = {}
  detect = functools.partial(clusters.detect, root=root, metadata=answers.get)
  assert detect({}) is None
  assert detect({'TPU_WORKER_HOSTNAMES': 'a,b'}) == 'tpu'
  assert detect({'TPU_WORKER_HOSTNAMES': 'a'}) is None
  slices = {'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '2'}
  assert detect(slices) == 'tpu'
  answers['worker-network-endpoints'] = 'x:1:10.0.0.1'
  assert detect({}) is None
  answers['tpu-env'] = "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\n"
  assert detect({}) == 'tpu'
  del answers['tpu-env']
  answers['worker-network-endpoints'] = 'x:1:10.0.0.1,y:2:10.0.0.2'
  assert detect({}) == 'tpu'
  assert detect({'TPU_SKIP_MDS_QUERY': '1'}) is None
  assert detect({}, platforms='cpu') is None


def test_the_metadata_server_is_asked_only_beside_a_tpu(tmp_path):
  def metadata(attribute):
    raise AssertionError(attribute)

  assert clusters.detect({}, root=tmp_path, metadata=metadata) is None


@pytest.mark.parametrize(
  'files, devices, name',
  [
    (['dev/nvidia0', 'dev/nvidiactl'], [], r'GPU.*nvidia0.*kd_jax\[cuda\]'),
    (['dev/accel0'], [], r'TPU.*accel0.*kd_jax\[tpu\]'),
    (['dev/vfio/0'], [('0x1ae0', '0x0063')], r'TPU.*vfio/0'),
  ],
)
def test_the_cpu_beside_an_accelerator_is_an_error(
  tmp_path, files, devices, name
):
  root = machine(tmp_path, *files, devices=devices)
  with pytest.raises(ValueError, match=f'{name}.*JAX_PLATFORMS=cpu'):
    clusters.check_accelerator('cpu', None, root=root)
  with pytest.raises(ValueError):
    clusters.check_accelerator('cpu', 'cuda', root=root)
  clusters.check_accelerator('cpu', 'cpu', root=root)
  clusters.check_accelerator('gpu', None, root=root)


@pytest.mark.parametrize(
  'files, devices',
  [
    ([], []),
    (['dev/nvidiactl', 'dev/vfio/vfio'], [('0x10de', '0x2330')]),
    # A network card of Google, and a card given to a virtual machine.
    (['dev/vfio/0'], [('0x1ae0', '0x0042'), ('0x10de', '0x2330')]),
  ],
)
def test_the_cpu_of_a_machine_without_one_is_not(tmp_path, files, devices):
  root = machine(tmp_path, *files, devices=devices)
  clusters.check_accelerator('cpu', None, root=root)


@pytest.mark.parametrize(
  'arguments, message',
  [
    ((':1', None, 0), '--num_processes missing'),
    ((None, 2, None), '--coordinator and --process_id missing'),
    ((':1', 2, 2), '--process_id=2 is not one of --num_processes=2'),
    (('host', 2, 0), '--coordinator=host has no port'),
    (('host:0', 2, 0), 'has no port'),
  ],
)
def test_wrong_addresses_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    processes.initialize(*arguments)


def test_one_process_needs_nothing(monkeypatch):
  def refuse(**arguments):
    raise AssertionError(arguments)

  monkeypatch.setattr('jax.distributed.initialize', refuse)
  processes.initialize()
  processes.initialize(':1', 1, 0)


def _joined(monkeypatch, *arguments):
  """What `jax.distributed.initialize` is called with."""
  calls = []
  monkeypatch.setattr(
    'jax.distributed.initialize', lambda **options: calls.append(options)
  )
  processes.initialize(
    *arguments, initialization_timeout=7, heartbeat_timeout=9
  )
  return calls[0]


def test_a_coordinator_without_a_host_listens_on_loopback(monkeypatch):
  options = _joined(monkeypatch, ':4711', 2, 1)
  assert options['coordinator_address'] == '127.0.0.1:4711'
  assert options['coordinator_bind_address'] == '127.0.0.1:4711'
  assert (options['num_processes'], options['process_id']) == (2, 1)
  assert options['heartbeat_timeout_seconds'] == 9


def test_other_names_are_listened_on_alone_where_they_are_ours(monkeypatch):
  options = _joined(monkeypatch, '127.0.0.2:4711', 2, 0)
  assert options['coordinator_bind_address'] == '127.0.0.2:4711'
  options = _joined(monkeypatch, 'kd-jax.invalid:4711', 2, 0)
  assert options['coordinator_bind_address'] == '[::]:4711'


def test_clusters_are_joined_by_jax_itself(monkeypatch):
  for name, value in SLURM.items():
    monkeypatch.setenv(name, value)
  options = _joined(monkeypatch)
  assert not {'coordinator_address', 'num_processes'} & set(options)
  monkeypatch.delenv('SLURM_PROCID')
  monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '2')
  options = _joined(monkeypatch)
  assert options['cluster_detection_method'] == 'mpi4py'


def test_a_file_that_is_not_seen_is_an_error(tmp_path):
  with pytest.raises(ValueError, match='file system that all hosts share'):
    hosts.wait_for(pathlib.Path(tmp_path / 'config.json'), within=0.1)
