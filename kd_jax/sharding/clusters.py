"""Which cluster a process was started in, and which accelerators it should see.

Owns what the environment, device files and the metadata server of a Cloud TPU
say; touches no backend of JAX, which must not be used before
`processes.initialize`. Addresses and ranks are then found by JAX itself.
"""

import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

_METADATA = 'http://{}/computeMetadata/v1/instance/attributes/{}'
_SLURM = (
  'SLURM_JOB_ID',
  'SLURM_STEP_NODELIST',
  'SLURM_NTASKS',
  'SLURM_PROCID',
  'SLURM_LOCALID',
)
_OPEN_MPI = 'OMPI_COMM_WORLD_SIZE'
# Set by the launcher of Open MPI 4; JAX reads the ranks of 5 by mpi4py alone.
_OPEN_MPI_4 = 'OMPI_MCA_orte_hnp_uri'
# The workers of a slice as GKE lists them, by commas.
_GKE = ('TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES')
# Of PCI devices: Google's, which also makes network cards.
_GOOGLE = '0x1ae0'
_NOT_TPU = ('0x0042',)

Metadata = Callable[[str], str | None]


def detect(
  environ: Mapping[str, str] | None = None,
  *,
  platforms: str | None = None,
  root: Path = Path('/'),
  metadata: Metadata | None = None,
) -> str | None:
  """The cluster of more than one process that this process belongs to.

  Args:
    environ: environment variables; those of the process when None.
    platforms: what JAX is asked to run on; TPUs are no cluster where it is
      'cpu'.
    root: where `dev` and `sys` lie.
    metadata: `(attribute) -> value` of this machine in Google Cloud, or None
      where there is no answer; asked only where TPUs are visible.

  Returns:
    'slurm', 'ompi' (Open MPI before 5), 'mpi4py' (later ones) or 'tpu': what
    `jax.distributed.initialize` finds by itself; None for one process alone.

  Example:
    >>> detect({'OMPI_COMM_WORLD_SIZE': '4'}), detect({'SLURM_JOB_ID': '7'})
    ('mpi4py', None)
  """
  environ = os.environ if environ is None else environ
  if all(name in environ for name in _SLURM):
    return 'slurm' if int(environ['SLURM_NTASKS']) > 1 else None
  if int(environ.get(_OPEN_MPI, 1)) > 1:
    return 'ompi' if _OPEN_MPI_4 in environ else 'mpi4py'
  if platforms == 'cpu' or tpu_file(root) is None:
    return None
  return 'tpu' if _tpu_workers(environ, metadata or _ask) > 1 else None


def _tpu_workers(environ: Mapping[str, str], metadata: Metadata) -> int:
  slices = int(environ.get('MEGASCALE_NUM_SLICES') or 1)
  listed = [environ[name] for name in _GKE if environ.get(name)]
  if listed:
    return slices * len(listed[0].split(','))
  if 'TPU_SKIP_MDS_QUERY' in environ:
    return 1
  workers = metadata('worker-network-endpoints') or ''
  for line in (metadata('tpu-env') or '').splitlines():
    name, _, value = line.partition(':')
    if name.strip() == 'MEGASCALE_NUM_SLICES':
      slices = int(value.strip().strip("'") or 1)
  return slices * len(workers.split(','))


def _ask(attribute: str) -> str | None:
  server = os.environ.get('GCE_METADATA_IP', 'metadata.google.internal')
  request = urllib.request.Request(
    _METADATA.format(server, attribute), headers={'Metadata-Flavor': 'Google'}
  )
  try:
    with urllib.request.urlopen(request, timeout=10) as answer:
      return answer.read().decode()
  except (urllib.error.URLError, OSError):
    return None


def nvidia_file(root: Path = Path('/')) -> Path | None:
  """A device file of an NVIDIA GPU, if there is one.

  Args:
    root: where `dev` lies.

  Returns:
    `dev/dxg` (WSL), else the first of `dev/nvidia0`, ...; None without any.
  """
  files = [*(root / 'dev').glob('nvidia[0-9]*'), *(root / 'dev').glob('dxg')]
  return min(files, default=None)


def tpu_file(root: Path = Path('/')) -> Path | None:
  """A device file of a TPU, if there is one.

  Numbered files under `vfio` may be anything that a virtual machine was given;
  they count beside a PCI device of Google that is no network card.

  Args:
    root: where `dev` and `sys` lie.
  """
  files = list((root / 'dev').glob('accel[0-9]*'))
  if any(map(_is_tpu, (root / 'sys/bus/pci/devices').glob('*'))):
    files += (root / 'dev/vfio').glob('[0-9]*')
  return min(files, default=None)


def _is_tpu(device: Path) -> bool:
  try:
    vendor = (device / 'vendor').read_text().strip()
    kind = (device / 'device').read_text().strip()
  except OSError:
    return False
  return vendor == _GOOGLE and kind not in _NOT_TPU


def check_accelerator(
  backend: str, platforms: str | None, *, root: Path = Path('/')
) -> None:
  """Raises if JAX fell back to the CPU of a machine with an accelerator.

  Args:
    backend: what JAX runs on, `jax.default_backend()`.
    platforms: what was asked for, `jax.config.jax_platforms`; None or '' if
      nothing was.
    root: where `dev` and `sys` lie.

  Raises:
    ValueError: if an NVIDIA GPU or a TPU is visible and the CPU is used, unless
      JAX_PLATFORMS names it.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...   (Path(root) / 'dev').mkdir()
    ...   (Path(root) / 'dev/nvidia0').touch()
    ...   print(nvidia_file(Path(root)).name, tpu_file(Path(root)))
    ...   try:
    ...     check_accelerator('cpu', None, root=Path(root))
    ...   except ValueError as e:
    ...     print(str(e).partition(' (')[0])
    nvidia0 None
    An NVIDIA GPU is visible
  """
  if backend != 'cpu' or 'cpu' in (platforms or '').split(','):
    return
  found = (
    ('A TPU', tpu_file(root), 'tpu'),
    ('An NVIDIA GPU', nvidia_file(root), 'cuda'),
  )
  for name, file, extra in found:
    if file is not None:
      raise ValueError(
        f'{name} is visible ({file}), but JAX runs on the CPU: install what it '
        f"needs, pip install 'kd_jax[{extra}]', or set JAX_PLATFORMS=cpu to "
        'use the CPU.'
      )
