"""Two processes of one command, joined by gloo, for `hosts_*_test.py`."""

import json
import os
import pathlib
import runpy
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
BOUND = 500  # seconds, of what takes 20 alone
RUN = ('-m', 'kd_jax', 'run')


def environment(devices):
  """The variables of a process with some devices."""
  return os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(devices),
    'PYTHONPATH': str(ROOT),
  }


class Pair:
  """Two processes that know of each other, with two devices each; started now.

  Args:
    command: what follows 'python'.
    own: `(index, port) -> words` of each process, after those.
    environ: `(index) -> variables` of each process, besides `environment`.
  """

  def __init__(self, command, own, environ=lambda index: {}):
    with socket.create_server(('127.0.0.1', 0)) as free:
      port = free.getsockname()[1]
    self.processes = [
      subprocess.Popen(
        [sys.executable, *command, *own(index, port)],
        cwd=ROOT,
        env=environment(2) | environ(index),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
      for index in range(2)
    ]

  def send(self, signum, *indices):
    """Sends a signal to some of the processes."""
    for index in indices:
      self.processes[index].send_signal(signum)

  def ended(self, bound=BOUND):
    """The exit codes and what was printed."""
    try:
      said = [p.communicate(timeout=bound)[0] for p in self.processes]
    finally:
      for process in self.processes:
        process.kill()
    return [p.returncode for p in self.processes], said


def joined(*command, own=lambda index: (), environ=lambda index: {}):
  """A pair of processes that parse the flags of several processes."""
  return Pair(
    command,
    lambda index, port: [
      *own(index),
      f'--coordinator=:{port}',
      '--num_processes=2',
      f'--process_id={index}',
      '--heartbeat_timeout=10',
    ],
    environ,
  )


def stopped_at(said):
  """The step at which both processes say that they stopped."""
  steps = {int(w.split('saved at step ')[1].split('.')[0]) for w in said}
  assert len(steps) == 1, said
  return steps.pop()


def small(file, path, change):
  """Writes a configuration that is quick to compile, as JSON.

  Its teacher has a kernel that FSDP splits, and is saved six times.

  Args:
    file: of `configs`, without '.py'.
    path: where to.
    change: what else to do with the configuration.
  """
  made = runpy.run_path(str(ROOT / 'configs' / f'{file}.py'))
  config = made['get_config']('tiny')
  config.teacher.model = {'name': 'mlp', 'hidden': (64,)}
  config.teacher.train.update({'epochs': 6, 'evaluate_every_epochs': 1})
  change(config)
  path.write_text(json.dumps(config.to_dict()))
