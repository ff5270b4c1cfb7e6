"""A run as a JobSet for Google Kubernetes Engine, and as an xpk workload.

Owns the file that `kubectl apply` takes and the words of `xpk`; nothing is sent
anywhere from here. JobSet restarts all workers of a slice together, so that a
run that was preempted goes on from its work directory.
"""

import json
import re
import shlex
from collections.abc import Sequence
from posixpath import basename, dirname
from typing import Any, NamedTuple

from kd_jax import rules
from kd_jax.launch.gcloud import Command

# Where a pod finds the configuration of its run.
CONFIG = '/etc/kd-jax/config.json'
# The exit code of `kd-jax` for what no restart would help.
_BAD_INPUT = 2

# Chips of a slice -> topology. v5p and v4 count two cores a chip.
_FLAT = {
  1: '1x1',
  4: '2x2',
  8: '2x4',
  16: '4x4',
  32: '4x8',
  64: '8x8',
  128: '8x16',
  256: '16x16',
}
_CUBE = {
  4: '2x2x1',
  8: '2x2x2',
  16: '2x2x4',
  32: '2x4x4',
  64: '4x4x4',
  128: '4x4x8',
  256: '4x8x8',
  512: '8x8x8',
}


class _Kind(NamedTuple):
  label: str
  topologies: dict[int, str]
  cores: int
  # Chips of the largest slice that is one machine.
  alone: int


_KINDS = {
  'v6e': _Kind('tpu-v6e-slice', _FLAT, 1, 8),
  'v5litepod': _Kind('tpu-v5-lite-podslice', _FLAT, 1, 8),
  'v5p': _Kind('tpu-v5p-slice', _CUBE, 2, 4),
  'v4': _Kind('tpu-v4-podslice', _CUBE, 2, 4),
}


class Slice(NamedTuple):
  """A TPU slice as Kubernetes names it.

  Attributes:
    label: value of the node label `cloud.google.com/gke-tpu-accelerator`.
    topology: such as '4x4'.
    hosts: number of machines.
    chips: of each machine.
  """

  label: str
  topology: str
  hosts: int
  chips: int


def slice_of(accelerator: str) -> Slice:
  """The slice of an accelerator type.

  Raises:
    ValueError: for an unknown type or size.

  Example:
    >>> slice_of('v5litepod-16')
    Slice(label='tpu-v5-lite-podslice', topology='4x4', hosts=4, chips=4)
    >>> slice_of('v5p-8').topology
    '2x2x1'
  """
  match = re.fullmatch(r'([a-z0-9]+)-(\d+)', accelerator)
  if match is None:
    raise ValueError(
      f'{accelerator!r} is no accelerator: use a type and a size such as '
      "'v5litepod-16' or 'v6e-8'."
    )
  kind = rules.choose('type of accelerator', match[1], _KINDS)
  sizes = {str(n * kind.cores): n for n in kind.topologies}
  chips = rules.choose(f'size of {match[1]}', match[2], sizes)
  hosts = 1 if chips <= kind.alone else chips // 4
  return Slice(kind.label, kind.topologies[chips], hosts, chips // hosts)


def jobset(
  name: str,
  accelerator: str,
  run: Sequence[str],
  *,
  image: str,
  config: str,
  spot: bool = False,
  restarts: int = 100,
) -> dict[str, Any]:
  """A JobSet that runs the same words on every host of a slice.

  It starts again when a machine is taken away or the run asks for it, and not
  when the run refuses what it was told to do.

  Args:
    name: of the workload: lower-case letters, digits and '-'.
    accelerator: such as 'v5litepod-16'.
    run: what to run, beginning with 'kd-jax'.
    image: with the library in it.
    config: text of the file `CONFIG` in every pod.
    spot: whether on machines that may be preempted.
    restarts: how often.

  Returns:
    The JobSet and the ConfigMap that it needs, JSON values; JSON is YAML.

  Raises:
    ValueError: for an unknown accelerator or a name that Kubernetes refuses.
  """
  check_name(name)
  slice_ = slice_of(accelerator)
  selector = {
    'cloud.google.com/gke-tpu-accelerator': slice_.label,
    'cloud.google.com/gke-tpu-topology': slice_.topology,
  }
  selector |= {'cloud.google.com/gke-spot': 'true'} if spot else {}
  tpus = {'google.com/tpu': str(slice_.chips)}
  container = {
    'name': 'kd-jax',
    'image': image,
    'command': list(run),
    # Without a TPU the run is to fail, not to go on on the processor.
    'env': [{'name': 'JAX_PLATFORMS', 'value': 'tpu,cpu'}],
    'volumeMounts': [{'name': 'config', 'mountPath': dirname(CONFIG)}],
    'resources': {'requests': tpus, 'limits': tpus},
    # Coordinator and TPU runtime; reached inside of the slice alone.
    'ports': [{'containerPort': 8471}, {'containerPort': 8431}],
  }
  pod = {
    'restartPolicy': 'Never',
    'terminationGracePeriodSeconds': 60,
    'nodeSelector': selector,
    'containers': [container],
    'volumes': [{'name': 'config', 'configMap': {'name': name}}],
  }
  job = {
    'backoffLimit': 0,
    'completions': slice_.hosts,
    'parallelism': slice_.hosts,
    'completionMode': 'Indexed',
    'podFailurePolicy': {
      'rules': [
        {
          'action': 'FailJob',
          'onExitCodes': {
            'containerName': container['name'],
            'operator': 'In',
            'values': [_BAD_INPUT],
          },
        }
      ]
    },
    'template': {'spec': pod},
  }
  policy = {
    'maxRestarts': restarts,
    'rules': [
      {'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}
    ],
  }
  workload = {
    'apiVersion': 'jobset.x-k8s.io/v1alpha2',
    'kind': 'JobSet',
    'metadata': {
      'name': name,
      'annotations': {
        'alpha.jobset.sigs.k8s.io/exclusive-topology': (
          'cloud.google.com/gke-nodepool'
        )
      },
    },
    'spec': {
      'failurePolicy': policy,
      'replicatedJobs': [
        {'name': 'slice', 'replicas': 1, 'template': {'spec': job}}
      ],
    },
  }
  file = {
    'apiVersion': 'v1',
    'kind': 'ConfigMap',
    'metadata': {'name': name},
    'data': {basename(CONFIG): config},
  }
  return {'apiVersion': 'v1', 'kind': 'List', 'items': [file, workload]}


def check_name(name: str) -> None:
  """Raises a ValueError for a name that Google Cloud or Kubernetes refuses."""
  if not re.fullmatch(r'[a-z]([-a-z0-9]{0,38}[a-z0-9])?', name):
    raise ValueError(
      f'--name={name}: use lower-case letters, digits and '
      "'-', at most 40, beginning with a letter."
    )


def text(workload: dict[str, Any]) -> str:
  """The file for `kubectl apply -f`."""
  return json.dumps(workload, indent=2) + '\n'


def kubectl(name: str, path: str) -> tuple[Command, ...]:
  """What starts, follows and deletes the workload of a file."""
  first = (
    f'jobset.sigs.k8s.io/jobset-name={name},'
    'batch.kubernetes.io/job-completion-index=0'
  )
  logs = ('kubectl', 'logs', '--follow', f'--selector={first}', '--tail=-1')
  return (
    Command('start', ('kubectl', 'apply', f'--filename={path}')),
    Command('follow', logs),
    Command('delete', ('kubectl', 'delete', f'--filename={path}')),
  )


def xpk(
  name: str,
  accelerator: str,
  run: Sequence[str],
  *,
  cluster: str,
  zone: str,
  image: str,
  project: str = '',
  restarts: int = 100,
  requeue: int = 75,
) -> tuple[Command, ...]:
  """What starts and deletes the same workload by xpk.

  Args:
    name: of the workload.
    accelerator: such as 'v5litepod-16'.
    run: what to run, beginning with 'kd-jax'.
    cluster: an xpk cluster.
    zone: of the cluster.
    image: with the library in it.
    project: of Google Cloud; that of gcloud's configuration when empty.
    restarts: how often it may be started again.
    requeue: the exit code with which the run asks for that.
  """
  slice_of(accelerator)
  more = [f'--project={project}'] if project else []
  where = (
    f'--workload={name}',
    f'--cluster={cluster}',
    f'--zone={zone}',
    *more,
  )
  create = (
    *('xpk', 'workload', 'create', *where),
    *(f'--tpu-type={accelerator}', '--num-slices=1'),
    *(f'--max-restarts={restarts}', f'--restart-on-exit-codes={requeue}'),
    f'--docker-image={image}',
    f'--command={shlex.join(run)}',
  )
  return (
    Command('start', create),
    Command('delete', ('xpk', 'workload', 'delete', *where)),
  )
