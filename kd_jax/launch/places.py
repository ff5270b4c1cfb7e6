"""The places to launch on: `kd-jax launch tpu-vm | queued | gke | xpk`.

Owns what becomes of the command's flags and of the run's configuration in each
place. Nothing of JAX.
"""

import json
import signal
from collections.abc import Mapping
from typing import Any

from kd_jax.launch import gcloud, jobset, plans
from kd_jax.launch.launches import Launch

PLACES = ('tpu-vm', 'queued', 'gke', 'xpk')
# What is written, and what is told to others then.
_Workload = tuple[tuple[plans.File, ...], tuple[gcloud.Command, ...]]


def launch(
  place: str,
  options: Any,
  config: Mapping[str, Any],
) -> int:
  """`kd-jax launch`: prints or runs what starts a run on Cloud TPU.

  The configuration is sent as it is resolved here, as JSON: no worker executes
  a configuration file.

  Args:
    place: one of `PLACES`.
    options: the flags of the command line, as attributes.
    config: of `kd-jax run`.

  Returns:
    The exit code of the run; 0 for what is only printed or written, 130 if the
    launch was interrupted.

  Raises:
    LaunchError: see `launches.Launch`.
    ValueError: for options that cannot be.

  Example:
    >>> import contextlib, io, types
    >>> options = types.SimpleNamespace(
    ...   name='a', workdir='gs://bucket/runs/a', zone='us-central1-a',
    ...   accelerator='v6e-8', image='image', project='', cluster='c',
    ...   restarts=2, dry_run=True)
    >>> with contextlib.redirect_stdout(io.StringIO()) as shown:
    ...   code = launch('xpk', options, {'seed': 0})
    >>> code, shown.getvalue().splitlines()[:3]
    (0, ['# configuration', "cat > a.json <<'END'", '{"seed":0}'])
  """
  jobset.check_name(options.name)
  if '://' not in options.workdir:
    raise ValueError(
      f'--workdir={options.workdir} would be lost with the machine: use a '
      'bucket, such as gs://BUCKET/runs/digits.'
    )
  if place in ('tpu-vm', 'queued'):
    planned = _on_machine(options, config, queued=place == 'queued')
    if options.dry_run:
      print(str(planned))
      return 0
    return _interruptible(Launch(planned, restarts=options.restarts))
  files, commands = {'gke': _on_gke, 'xpk': _on_xpk}[place](options, config)
  if not options.dry_run:
    for file in files:
      file.write()
      print(f'Written: {file.path}. Next:')
    files = ()
  print('\n'.join(map(str, (*files, *commands))))
  return 0


def _on_machine(
  options: Any, config: Mapping[str, Any], *, queued: bool
) -> plans.Plan:
  machine = gcloud.Machine(
    options.name,
    options.zone,
    options.accelerator,
    options.project,
    options.runtime,
    options.spot,
    queued,
  )
  sent = _sent(options.name, config)
  package = gcloud.package(options.package or gcloud.here())
  run = _run(sent.path, options.workdir)
  return plans.plan(
    machine, run, package=package, files=[sent], keep=options.keep
  )


def _on_gke(options: Any, config: Mapping[str, Any]) -> _Workload:
  made = jobset.jobset(
    options.name,
    options.accelerator,
    _run(jobset.CONFIG, options.workdir),
    image=options.image,
    config=_json(config),
    spot=options.spot,
    restarts=options.restarts,
  )
  file = plans.File('workload', f'{options.name}.gke.json', jobset.text(made))
  return (file,), jobset.kubectl(options.name, file.path)


def _on_xpk(options: Any, config: Mapping[str, Any]) -> _Workload:
  sent = _sent(options.name, config)
  # Beside the work directory, which has to be empty when a run begins.
  there = f'{options.workdir.rstrip("/")}.json'
  words = jobset.xpk(
    options.name,
    options.accelerator,
    _run(there, options.workdir),
    cluster=options.cluster,
    zone=options.zone,
    image=options.image,
    project=options.project,
    restarts=options.restarts,
  )
  copy = gcloud.Command(
    'configuration, for all workers',
    ('gcloud', 'storage', 'cp', sent.path, there),
  )
  return (sent,), (copy, *words)


def _run(config: str, path: str) -> tuple[str, ...]:
  return ('kd-jax', 'run', f'--config={config}', f'--workdir={path}')


def _json(config: Mapping[str, Any]) -> str:
  return json.dumps(config, separators=(',', ':'), allow_nan=False) + '\n'


def _sent(name: str, config: Mapping[str, Any]) -> plans.File:
  return plans.File('configuration', f'{name}.json', _json(config))


def _interruptible(launched: Launch) -> int:
  """Runs a launch; SIGTERM, as Ctrl-C, gives the machine back first."""
  previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    return launched()
  except KeyboardInterrupt:
    print('Interrupted. The same command goes on where the run is.')
    return 130
  finally:
    signal.signal(signal.SIGTERM, previous)
