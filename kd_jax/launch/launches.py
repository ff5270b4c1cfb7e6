"""Launching a run on Cloud TPU: `kd-jax launch`.

Owns which files and commands a launch consists of, their order, and the
retries; the words are those of `gcloud` and `jobset`. Nothing of JAX. A run
that was preempted is started again with the same words: its work directory
knows how far it came, which is why that has to outlive the machine.
"""

import json
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kd_jax.launch import gcloud, jobset
from kd_jax.launch.gcloud import Command, Machine, Package
from kd_jax.sharding.preemption import REQUEUE
from kd_jax.storage import workdir

PLACES = ('tpu-vm', 'queued', 'gke', 'xpk')
# What `gcloud.state` says of a machine, and of a queued request for one.
_READY = ('READY', 'ACTIVE')
_GONE = ('PREEMPTED', 'TERMINATED', 'FAILED', 'SUSPENDED')


class File(NamedTuple):
  """A file that a launch writes on this machine.

  Attributes:
    why: a few words.
    path: where.
    text: what is in it, ending with a newline.
  """

  why: str
  path: str
  text: str

  def __str__(self) -> str:
    return (
      f"# {self.why}\ncat > {shlex.quote(self.path)} <<'END'\n{self.text}END"
    )

  def write(self) -> None:
    """Writes it; a ValueError if another file of this name is there."""
    path = Path(self.path)
    if path.exists() and path.read_text() != self.text:
      raise ValueError(
        f'{path} is there and differs from the {self.why} of this launch: use '
        'another --name, or delete it.'
      )
    workdir.write_text(path, self.text)


class LaunchError(OSError):
  """A launch that cannot go on."""


class Plan(NamedTuple):
  """A run on a TPU VM, step by step; as text, a shell script of all of it.

  Attributes:
    machine: where.
    files: written first.
    prepare: run on this machine.
    create: asks for the machine.
    set_up: copies and installs, on a machine that is ready.
    start: starts the run.
    keep: whether the machine stays when the run has ended.
  """

  machine: Machine
  files: tuple[File, ...]
  prepare: tuple[Command, ...]
  create: Command
  set_up: tuple[Command, ...]
  start: Command
  keep: bool

  def __str__(self) -> str:
    m = self.machine
    steps = (
      *(*self.files, *self.prepare, self.create, gcloud.state(m)),
      *(*self.set_up, self.start, gcloud.follow(m), gcloud.code(m)),
      *(() if self.keep else (gcloud.delete(m),)),
    )
    return '\n'.join(map(str, steps))


def plan(
  machine: Machine,
  run: Sequence[str],
  *,
  package: Package,
  files: Sequence[File] = (),
  keep: bool = False,
) -> Plan:
  """The launch of a run on a TPU VM.

  Args:
    machine: where.
    run: what to run there, beginning with 'kd-jax'.
    package: how every worker installs the library.
    files: to write here, and to copy to every worker before it.
    keep: whether the machine stays when the run has ended.
  """
  copies = (*((f.path, f.path) for f in files), *package.files)
  return Plan(
    machine,
    tuple(files),
    package.before,
    gcloud.create(machine),
    (
      *(gcloud.copy(machine, *pair) for pair in copies),
      gcloud.set_up(machine, package.requirement),
    ),
    gcloud.start(machine, run),
    keep,
  )


class Launch:
  """A launch that is being run.

  Args:
    plan: from `plan`.
    restarts: how often a run that was preempted is started again.
    patience: seconds between two looks at a machine that is not ready.
    execute: runs words, returns `(exit code, standard output)`; its output is
      shown while it runs if the second argument is true.
    say: prints a line.
    sleep: waits some seconds.
  """

  def __init__(
    self,
    plan: Plan,
    *,
    restarts: int = 100,
    patience: float = 30.0,
    execute: Callable[[Sequence[str], bool], tuple[int, str]] | None = None,
    say: Callable[[str], None] = print,
    sleep: Callable[[float], None] = time.sleep,
  ):
    self.plan, self.machine = plan, plan.machine
    self.restarts, self.patience = restarts, patience
    self.execute, self.say, self.sleep = execute or _execute, say, sleep
    # Whether the machine was ready once, and what was installed on it.
    self.was_ready = self.is_set_up = False

  def __call__(self) -> int:
    """Launches, follows, and deletes the machine; the run's exit code.

    A machine of this name that is there is used, and a run on it is followed:
    a launch that was interrupted can be given again.

    Raises:
      LaunchError: if a command fails for another reason than preemption, or
        the run was preempted too often.
      ValueError: if a file to write is there and differs.
    """
    for file in self.plan.files:
      file.write()
    for command in self.plan.prepare:
      self._do(command)
    try:
      for attempt in range(self.restarts + 1):
        if attempt:
          self.say(f'Preempted; start {attempt + 1}.')
        found = self._once()
        if found != REQUEUE:
          return found
      raise LaunchError(f'The run was preempted {self.restarts + 1} times.')
    finally:
      if not self.plan.keep:
        self._delete()

  def _once(self) -> int:
    """One start; `REQUEUE` if the machine or the run was preempted."""
    if self._ready():
      if self._code() == gcloud.RUNNING:
        return self._follow()
    elif not self._make():
      return REQUEUE
    set_up = () if self.is_set_up else self.plan.set_up
    for command in (*set_up, self.plan.start):
      status, _ = self._try(command, shown=True)
      if status and not self._ready():
        return REQUEUE
      if status:
        raise _failed(command, status)
    self.is_set_up = True
    return self._follow()

  def _follow(self) -> int:
    """The exit code of the run; a broken connection is made again."""
    while True:
      self._try(gcloud.follow(self.machine), shown=True)
      found = self._code()
      if found.isdigit():
        return int(found)
      if not self._ready():
        return REQUEUE
      if found != gcloud.RUNNING:
        raise LaunchError('The run ended without an exit code.')
      self.sleep(self.patience)

  def _code(self) -> str:
    return self._try(gcloud.code(self.machine))[1].strip()

  def _make(self) -> bool:
    """Makes the machine; whether that went well, the second time or later."""
    self.is_set_up = False
    now = self._state()
    if now in _GONE:
      self._delete()
    if now in _GONE or not now:
      status, _ = self._try(self.plan.create, shown=True)
      if status and not self.was_ready:
        raise _failed(self.plan.create, status)
    while (now := self._state()) not in _READY:
      if now in _GONE or not now:
        if not self.was_ready:
          raise LaunchError(f'{self.machine.name} is {now or "not there"}.')
        self.sleep(self.patience)
        return False
      self.say(f'{self.machine.name} is {now}.')
      self.sleep(self.patience)
    return self._ready()

  def _ready(self) -> bool:
    ready = self._state() in _READY
    if not ready and self.was_ready:
      # What looks like a preemption may be this side's connection.
      self.sleep(self.patience)
      ready = self._state() in _READY
    self.was_ready = self.was_ready or ready
    return ready

  def _state(self) -> str:
    status, text = self._try(gcloud.state(self.machine))
    return text.strip() if status == 0 else ''

  def _delete(self) -> None:
    command = gcloud.delete(self.machine)
    if self._try(command)[0]:
      self.say(
        f'{self.machine.name} was not deleted. If it is still there it costs '
        f'money:\n{command}'
      )

  def _do(self, command: Command) -> None:
    status, _ = self._try(command, shown=True)
    if status:
      raise _failed(command, status)

  def _try(self, command: Command, shown: bool = False) -> tuple[int, str]:
    if shown:
      self.say(str(command))
    return self.execute(command.words, shown)


def _failed(command: Command, status: int) -> LaunchError:
  return LaunchError(
    f'{command.why.capitalize()} failed with exit code {status}: '
    f'{shlex.join(command.words)}'
  )


def _execute(words: Sequence[str], shown: bool) -> tuple[int, str]:
  try:
    done = subprocess.run(
      words,
      check=False,
      stdout=None if shown else subprocess.PIPE,
      stderr=None if shown else subprocess.DEVNULL,
      text=True,
    )
  except FileNotFoundError as e:
    raise LaunchError(
      f'{words[0]} is not installed: see https://cloud.google.com/sdk, or use '
      '--dry_run to print the commands.'
    ) from e
  return done.returncode, done.stdout or ''


def launch(
  place: str,
  options: Any,
  config: Mapping[str, Any],
  *,
  say: Callable[[str], None] = print,
) -> int:
  """`kd-jax launch`: prints or runs what starts a run on Cloud TPU.

  The configuration is sent as it is resolved here, as JSON: no worker executes
  a configuration file.

  Args:
    place: one of `PLACES`.
    options: the flags of the command line, as attributes.
    config: of `kd-jax run`.
    say: prints lines.

  Returns:
    The exit code of the run; 0 for what is only printed or written, 130 if the
    launch was interrupted.

  Raises:
    LaunchError: see `Launch`.
    ValueError: for options that cannot be.
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
      say(str(planned))
      return 0
    return _interruptible(Launch(planned, restarts=options.restarts, say=say))
  files, commands = {'gke': _on_gke, 'xpk': _on_xpk}[place](options, config)
  if not options.dry_run:
    for file in files:
      file.write()
      say(f'Written: {file.path}. Next:')
    files = ()
  say('\n'.join(map(str, (*files, *commands))))
  return 0


def _on_machine(
  options: Any, config: Mapping[str, Any], *, queued: bool
) -> Plan:
  machine = Machine(
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
  return plan(machine, run, package=package, files=[sent], keep=options.keep)


def _on_gke(
  options: Any, config: Mapping[str, Any]
) -> tuple[tuple[File, ...], tuple[Command, ...]]:
  made = jobset.jobset(
    options.name,
    options.accelerator,
    _run(jobset.CONFIG, options.workdir),
    image=options.image,
    config=_json(config),
    spot=options.spot,
    restarts=options.restarts,
  )
  file = File('workload', f'{options.name}.gke.json', jobset.text(made))
  return (file,), jobset.kubectl(options.name, file.path)


def _on_xpk(
  options: Any, config: Mapping[str, Any]
) -> tuple[tuple[File, ...], tuple[Command, ...]]:
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
    requeue=REQUEUE,
  )
  copied = ('gcloud', 'storage', 'cp', sent.path, there)
  return (sent,), (Command('configuration, for all workers', copied), *words)


def _run(config: str, path: str) -> tuple[str, ...]:
  return ('kd-jax', 'run', f'--config={config}', f'--workdir={path}')


def _json(config: Mapping[str, Any]) -> str:
  return json.dumps(config, separators=(',', ':'), allow_nan=False) + '\n'


def _sent(name: str, config: Mapping[str, Any]) -> File:
  return File('configuration', f'{name}.json', _json(config))


def _interruptible(launched: Launch) -> int:
  """Runs a launch; SIGTERM, as Ctrl-C, gives the machine back first."""
  previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    return launched()
  except KeyboardInterrupt:
    launched.say('Interrupted. The same command goes on where the run is.')
    return 130
  finally:
    signal.signal(signal.SIGTERM, previous)
