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
from typing import Any

from kd_jax.launch.accelerators import Slice, slice_of
from kd_jax.launch.gcloud import Command
from kd_jax.sharding.preemption import REQUEUE

# Where a pod finds the configuration of its run.
CONFIG = '/etc/kd-jax/config.json'
# The exit code of `kd-jax` for what no restart would help.
_BAD_INPUT = 2
_CONTAINER = 'kd-jax'
# A slice is a node pool, and no two jobs share one.
_ANNOTATIONS = {
  'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'
}


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
  asked = slice_of(accelerator)
  pod = {
    'restartPolicy': 'Never',
    'terminationGracePeriodSeconds': 60,
    'nodeSelector': _selector(asked, spot),
    'containers': [_container(asked, image, run)],
    'volumes': [{'name': 'config', 'configMap': {'name': name}}],
  }
  workload = {
    'apiVersion': 'jobset.x-k8s.io/v1alpha2',
    'kind': 'JobSet',
    'metadata': {'name': name, 'annotations': _ANNOTATIONS},
    'spec': {
      'failurePolicy': {
        'maxRestarts': restarts,
        'rules': [
          {'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}
        ],
      },
      'replicatedJobs': [
        {
          'name': 'slice',
          'replicas': 1,
          'template': {'spec': _job(asked, pod)},
        }
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


def _selector(asked: Slice, spot: bool) -> dict[str, str]:
  """The labels of nodes that a pod may run on."""
  labels = {
    'cloud.google.com/gke-tpu-accelerator': asked.label,
    'cloud.google.com/gke-tpu-topology': asked.topology,
  }
  return labels | ({'cloud.google.com/gke-spot': 'true'} if spot else {})


def _container(asked: Slice, image: str, run: Sequence[str]) -> dict[str, Any]:
  tpus = {'google.com/tpu': str(asked.chips)}
  return {
    'name': _CONTAINER,
    'image': image,
    'command': list(run),
    # Without a TPU the run is to fail, not to go on on the processor.
    'env': [{'name': 'JAX_PLATFORMS', 'value': 'tpu,cpu'}],
    'volumeMounts': [{'name': 'config', 'mountPath': dirname(CONFIG)}],
    'resources': {'requests': tpus, 'limits': tpus},
    # Coordinator and TPU runtime; reached inside of the slice alone.
    'ports': [{'containerPort': 8471}, {'containerPort': 8431}],
  }


def _job(asked: Slice, pod: dict[str, Any]) -> dict[str, Any]:
  """A pod on every host, of which bad input ends all."""
  bad_input = {
    'containerName': _CONTAINER,
    'operator': 'In',
    'values': [_BAD_INPUT],
  }
  return {
    'backoffLimit': 0,
    'completions': asked.hosts,
    'parallelism': asked.hosts,
    'completionMode': 'Indexed',
    'podFailurePolicy': {
      'rules': [{'action': 'FailJob', 'onExitCodes': bad_input}]
    },
    'template': {'spec': pod},
  }


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
  """
  slice_of(accelerator)
  project_flag = (f'--project={project}',) if project else ()
  where = (
    f'--workload={name}',
    f'--cluster={cluster}',
    f'--zone={zone}',
    *project_flag,
  )
  create = (
    *('xpk', 'workload', 'create', *where),
    *(f'--tpu-type={accelerator}', '--num-slices=1'),
    *(f'--max-restarts={restarts}', f'--restart-on-exit-codes={REQUEUE}'),
    f'--docker-image={image}',
    f'--command={shlex.join(run)}',
  )
  return (
    Command('start', create),
    Command('delete', ('xpk', 'workload', 'delete', *where)),
  )
