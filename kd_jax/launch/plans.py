"""What a launch on a TPU VM consists of: files to write and commands, in order.

Owns the order; the words of the commands are `gcloud`'s. Nothing is run from
here, and a plan printed is a shell script of all of it.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kd_jax.launch import gcloud
from kd_jax.launch.gcloud import Command, Machine, Package
from kd_jax.storage import workdir


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

  Returns:
    The plan; nothing is run.

  Example:
    >>> made = plan(
    ...   Machine('a', 'us-central1-a', 'v6e-8'), ['kd-jax', 'run'],
    ...   package=Package('kd_jax[tpu]==0.1.0'),
    ...   files=[File('configuration', 'a.json', '{}\\n')])
    >>> lines = str(made).splitlines()
    >>> [line[2:] for line in lines if line.startswith('# ')]
    ['configuration', 'create', 'state', 'copy', 'set up', 'start', 'follow', \
'exit code', 'delete']
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
