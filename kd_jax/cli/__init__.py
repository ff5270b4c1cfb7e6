"""The command line: `kd-jax run | compare | compress | evaluate | ...`.

Owns the way from words to a command, its errors as one sentence, and exit
codes. What a command does is in `commands`.
"""

import sys
from collections.abc import Sequence
from importlib import metadata

from kd_jax.cli import parsing
from kd_jax.cli.flags import COMMANDS as COMMANDS
from kd_jax.cli.usage import USAGE
from kd_jax.sharding import processes
from kd_jax.sharding.preemption import REQUEUE, Preempted, stoppable


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command.

  Args:
    argv: the words after the program's name; those of the process when None.

  Returns:
    The exit code: 0; 2 after an error, which is said in one sentence; 75 when
    stopped by a signal after what could be saved was saved (run the same
    command again); of `launch` also that of the run, and 130 when interrupted.
  """
  words = list(sys.argv[1:] if argv is None else argv)
  if not words or words[0] in ('help', '--help', '-h') or '--help' in words:
    print(USAGE, end='')
    return 0 if words else 2
  if words == ['--version']:
    print(f'kd-jax {metadata.version("kd_jax")}')
    return 0
  try:
    with stoppable():
      return _run(*words)
  except Preempted as e:
    print(f'kd-jax: {e} Run the same command to go on.', file=sys.stderr)
    return REQUEUE
  except (ValueError, OSError, ImportError, FloatingPointError) as e:
    if {'--debug', '--debug=true', '--debug=True', '--debug=1'} & {*words}:
      raise
    sentence = ' '.join(str(e).split())
    print(f'kd-jax: {sentence}', file=sys.stderr)
    return 2


def _run(command: str, *words: str) -> int:
  if command not in COMMANDS:
    raise ValueError(
      f'There is no command {command!r}; the commands are '
      f'{", ".join(COMMANDS)}. See kd-jax --help.'
    )
  values = parsing.parse(command, words)
  # Imported late: --help and a wrong flag should not wait for what all
  # commands import.
  from kd_jax import commands

  work = getattr(commands, command.replace('-', '_'))
  if not COMMANDS[command].several:
    return work(values)
  processes.initialize(
    values.coordinator,
    values.num_processes,
    values.process_id,
    initialization_timeout=values.initialization_timeout,
    heartbeat_timeout=values.heartbeat_timeout,
  )
  with processes.as_one():
    return work(values)
