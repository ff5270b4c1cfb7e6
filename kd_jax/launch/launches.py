"""Runs on a TPU VM that are launched, followed, and started again.

Owns what happens under preemption: which commands are given again, and when a
launch gives up. What they are is in `plans`. A run that was preempted is
started again with the same words: its work directory knows how far it came,
which is why that has to outlive the machine.
"""

import shlex
import subprocess
import time
from collections.abc import Callable, Sequence

from kd_jax.launch import gcloud
from kd_jax.launch.gcloud import Command
from kd_jax.launch.plans import Plan
from kd_jax.sharding.preemption import REQUEUE

# Seconds between two looks at a machine that is not ready.
_PATIENCE = 30.0
# What `gcloud.state` says of a machine, and of a queued request for one.
_READY = ('READY', 'ACTIVE')
_GONE = ('PREEMPTED', 'TERMINATED', 'FAILED', 'SUSPENDED')


class LaunchError(OSError):
  """A launch that cannot go on."""


class Launch:
  """A launch that is being run.

  Args:
    plan: from `plan`.
    restarts: how often a run that was preempted is started again.
    execute: runs words, returns `(exit code, standard output)`; its output is
      shown while it runs if the second argument is true.
    say: prints a line.
    sleep: waits some seconds.

  Example:
    >>> from kd_jax.launch import plans
    >>> machine = gcloud.Machine('a', 'us-central1-a', 'v6e-8')
    >>> package = gcloud.Package('kd_jax[tpu]==0.1.0')
    >>> made = plans.plan(machine, ['kd-jax', 'run'], package=package)
    >>> verbs = []
    >>> def execute(words, shown):
    ...   verbs.append(words[4])
    ...   answers = {'describe': 'READY', 'ssh': '3'}
    ...   return 0, answers.get(words[4], '')
    >>> Launch(made, execute=execute, say=lambda line: None)()
    3
    >>> verbs[0], verbs[-1]
    ('describe', 'delete')
  """

  def __init__(
    self,
    plan: Plan,
    *,
    restarts: int = 100,
    execute: Callable[[Sequence[str], bool], tuple[int, str]] | None = None,
    say: Callable[[str], None] = print,
    sleep: Callable[[float], None] | None = None,
  ):
    self.plan, self.machine = plan, plan.machine
    self.restarts, self.say = restarts, say
    self.execute, self.sleep = execute or _execute, sleep or time.sleep
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
      if found == gcloud.NONE:
        raise LaunchError('The run ended without an exit code.')
      self.sleep(_PATIENCE)

  def _code(self) -> str:
    """What the worker says of the run; '' if the machine is not there."""
    while not (found := self._try(gcloud.code(self.machine))[1].strip()):
      if not self._ready():
        return ''
      # A connection that fails says nothing of the run, which may go on.
      self.say(f'{self.machine.name} does not answer.')
      self.sleep(_PATIENCE)
    return found

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
        self.sleep(_PATIENCE)
        return False
      self.say(f'{self.machine.name} is {now}.')
      self.sleep(_PATIENCE)
    return self._ready()

  def _ready(self) -> bool:
    ready = self._state() in _READY
    if not ready and self.was_ready:
      # What looks like a preemption may be this side's connection.
      self.sleep(_PATIENCE)
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
