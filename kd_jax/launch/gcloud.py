"""What is said to `gcloud` to run something on a Cloud TPU.

Owns the words of the commands, what is installed on a machine and where its
run leaves its exit code. In which order is in `plans`, and how often in
`launches`; nothing is run from here.
"""

import dataclasses
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import kd_jax
from kd_jax.launch import accelerators

RUNNING = 'running'
NONE = 'none'
_TPUS = ('gcloud', 'compute', 'tpus')
_LOG, _PID, _CODE = 'kd_jax.log', 'kd_jax.pid', 'kd_jax.code'
_PYTHON = '3.12'


@dataclasses.dataclass(frozen=True)
class Machine:
  """A Cloud TPU slice, with all of its workers.

  Attributes:
    name: of the node, and of the request if it is queued.
    zone: such as 'us-central1-a'.
    accelerator: such as 'v5litepod-16'.
    project: of Google Cloud; that of gcloud's configuration when empty.
    runtime: software version; that of the accelerator when empty.
    spot: whether it may be preempted, for a lower price.
    queued: whether it is asked for as a queued resource.
  """

  name: str
  zone: str
  accelerator: str
  project: str = ''
  runtime: str = ''
  spot: bool = False
  queued: bool = False

  @property
  def resource(self) -> str:
    """What gcloud calls that which is asked for."""
    return 'queued-resources' if self.queued else 'tpu-vm'


class Command(NamedTuple):
  """A command and what it is for.

  Attributes:
    why: a few words.
    words: the program and its arguments.
  """

  why: str
  words: tuple[str, ...]

  def __str__(self) -> str:
    return f'# {self.why}\n{shlex.join(self.words)}'


def _gcloud(
  machine: Machine, resource: str, verb: str, *words: str
) -> tuple[str, ...]:
  return (*_TPUS, resource, verb, machine.name, *_where(machine), *words)


def _where(machine: Machine) -> tuple[str, ...]:
  project = (f'--project={machine.project}',) if machine.project else ()
  return (f'--zone={machine.zone}', *project)


def create(machine: Machine) -> Command:
  """Asks for the machine."""
  runtime = machine.runtime or accelerators.runtime_version(machine.accelerator)
  words = [f'--accelerator-type={machine.accelerator}']
  if machine.queued:
    words += [f'--node-id={machine.name}', f'--runtime-version={runtime}']
  else:
    words.append(f'--version={runtime}')
  words += ['--spot'] if machine.spot else []
  return Command('create', _gcloud(machine, machine.resource, 'create', *words))


def state(machine: Machine) -> Command:
  """Prints the state: READY, PREEMPTED, ...; of a request ACTIVE, ..."""
  value = 'state.state' if machine.queued else 'state'
  words = _gcloud(
    machine, machine.resource, 'describe', f'--format=value({value})'
  )
  return Command('state', words)


def delete(machine: Machine) -> Command:
  """Gives the machine back."""
  force = ['--force'] if machine.queued else []
  return Command(
    'delete', _gcloud(machine, machine.resource, 'delete', *force, '--quiet')
  )


def on_workers(
  machine: Machine, why: str, command: str, worker: str = 'all'
) -> Command:
  """Runs a shell command on one worker or all."""
  words = (f'--worker={worker}', f'--command={command}')
  return Command(why, _gcloud(machine, 'tpu-vm', 'ssh', *words))


def copy(machine: Machine, source: str, target: str) -> Command:
  """Copies a file to every worker."""
  words = ('tpu-vm', 'scp', source, f'{machine.name}:{target}')
  return Command('copy', (*_TPUS, *words, *_where(machine), '--worker=all'))


def set_up(machine: Machine, requirement: str) -> Command:
  """Installs the library in a virtual environment on every worker.

  The images of TPU VMs come with a Python that is too old: uv brings another.
  """
  command = (
    'PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user uv && '
    f'python3 -m uv venv -q --clear --python {_PYTHON} kd_jax_env && '
    'python3 -m uv pip install -q --python kd_jax_env/bin/python '
    f'{shlex.quote(requirement)}'
  )
  return on_workers(machine, 'set up', command)


def start(machine: Machine, run: Sequence[str]) -> Command:
  """Starts a run on every worker, which goes on without the connection."""
  # Without a TPU the run is to fail, not to go on on the processor.
  inner = (
    f'JAX_PLATFORMS=tpu,cpu kd_jax_env/bin/{shlex.join(run)}; echo $? > {_CODE}'
  )
  command = (
    f'rm -f {_CODE}; nohup setsid sh -c {shlex.quote(inner)} > {_LOG} 2>&1 '
    f'< /dev/null & echo $! > {_PID}'
  )
  return on_workers(machine, 'start', command)


def follow(machine: Machine) -> Command:
  """Prints the first worker's log until its run ends."""
  command = f'tail -n +1 --pid=$(cat {_PID}) -F {_LOG}'
  return on_workers(machine, 'follow', command, worker='0')


def code(machine: Machine) -> Command:
  """Prints the exit code of the first worker's run, 'running' or 'none'.

  A worker that can be reached always answers.
  """
  command = (
    f'cat {_CODE} || (kill -0 $(cat {_PID}) && echo {RUNNING}) || echo {NONE}'
  )
  return on_workers(machine, 'exit code', command, worker='0')


class Package(NamedTuple):
  """How every worker installs the same library.

  Attributes:
    requirement: what pip is told, with the extra [tpu].
    before: what makes the files, on this machine.
    files: `(here, there)` pairs to copy.
  """

  requirement: str
  before: tuple[Command, ...] = ()
  files: tuple[tuple[str, str], ...] = ()


def package(source: str) -> Package:
  """How to install the library from somewhere.

  Args:
    source: a requirement such as 'kd_jax==0.1.0', a URL that pip takes (name a
      commit of a repository, or workers may get different ones), a wheel, or a
      directory with the sources, of which a wheel is made.

  Raises:
    ValueError: if it is none of these.

  Example:
    >>> package('kd_jax==0.1.0').requirement
    'kd_jax[tpu]==0.1.0'
    >>> package('git+https://host/kd_jax@a1b2c3').requirement
    'kd_jax[tpu] @ git+https://host/kd_jax@a1b2c3'
  """
  path = Path(source)
  if '://' in source:
    return Package(f'kd_jax[tpu] @ {source}')
  if source.endswith('.whl') and path.is_file():
    return Package(f'./{path.name}[tpu]', files=((source, path.name),))
  if (path / 'kd_jax' / '__init__.py').is_file():
    found = re.search(
      r"^__version__ = '(.+)'",
      (path / 'kd_jax' / '__init__.py').read_text(),
      re.MULTILINE,
    )
    if found is None:
      raise ValueError(
        f'--package={source} has no __version__ in kd_jax/__init__.py.'
      )
    wheel = f'kd_jax-{found[1]}-py3-none-any.whl'
    pip = (sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps')
    build = Command('build', (*pip, '--wheel-dir=dist', source))
    return Package(f'./{wheel}[tpu]', (build,), ((f'dist/{wheel}', wheel),))
  match = re.fullmatch(r'kd_jax((?:[=<>~!]=|[<>]).+)?', source)
  if match is None:
    raise ValueError(
      f'--package={source} is no requirement such as kd_jax==0.1.0, no URL, '
      'no wheel, and no directory with the sources of kd_jax.'
    )
  return Package(f'kd_jax[tpu]{match[1] or ""}')


def here() -> str:
  """The library that is running: its sources if it is a clone, or its version.

  The default of `package`.
  """
  root = Path(kd_jax.__file__).parent.parent
  if (root / 'setup.cfg').is_file():
    return str(root)
  return f'kd_jax=={kd_jax.__version__}'
