"""Kills a tiny training at random moments and lets it go on, many times.

  python benchmarks/soak.py --cycles 2000 --out benchmarks/results/soak.md

Every cycle starts a process that trains from the last checkpoint, and ends it
after a random time with SIGKILL or SIGTERM, also while it starts, compiles,
saves in the background or evaluates. A training that came to its end is held
against one that was never stopped: parameters, optimizer, BatchNorm, average
and history must be the same bits. Then the next one begins. The exit code is 1
if any differs, or if a process ended otherwise than it was told to.
"""

import faulthandler
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import optax
import page
from flax import linen as nn

from kd_jax import adapters, data, guard, metrics, objectives, optim, sharding
from kd_jax.sharding import preemption
from kd_jax.step import init_state, make_eval_step, make_train_step
from kd_jax.storage import files
from kd_jax.storage.checkpoint import Checkpoints
from kd_jax.train.loop import train

STEPS, EVALUATE_EVERY, LOG_EVERY, BATCH, CLASSES = 24, 4, 3, 8, 3
RESULT = 'result.json'
# A process that lasts longer than this many times the undisturbed one hangs.
PATIENCE = 60
FAILED = 1


class Network(nn.Module):
  """A convolution, BatchNorm, dropout and a classifier."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(4, (3, 3))(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
    x = nn.Dropout(0.1, deterministic=not train)(x)
    return nn.Dense(CLASSES)(x.mean((1, 2)))


def train_to_the_end(directory: pathlib.Path) -> None:
  """Trains from the last checkpoint, and writes digests of what came out."""
  draw = np.random.default_rng(0)
  images = data.ImageData(
    image=draw.integers(0, 255, (40, 8, 8, 1), np.uint8),
    label=draw.integers(0, CLASSES, 40, np.int32),
    id=np.arange(40, dtype=np.int32),
    class_names=tuple('abc'),
  )
  preprocess = data.make_preprocess(mean=(0.5,), std=(0.25,), crop_padding=1)
  network = Network()
  example = preprocess(images.read([0]), train=False)
  variables = adapters.init_linen(network, jax.random.key(0), example)
  forward = adapters.from_linen(network)
  tx = optim.average_params(optax.adam(0.01), decay=0.9)
  objective = objectives.hard_labels()
  train_step = make_train_step(forward, objective, tx)

  def step(state, batch, rng):
    return train_step(state, preprocess(batch, train=True), rng)

  mesh, measured = (
    sharding.make_mesh(),
    metrics.classification(),
  )
  eval_step = jax.jit(
    lambda v, b: make_eval_step(forward, measured)(
      v, None, preprocess(b, train=False)
    )
  )

  def evaluate(state):
    v = {'params': state.params, **state.model_state}
    batches = data.eval_batches(images, batch_size=BATCH)
    numbers = metrics.evaluate(lambda b: eval_step(v, b), batches, measured)
    return {f'eval/{name}': value for name, value in numbers.items()}

  state = init_state(forward, objective, tx, variables, example)
  with Checkpoints(
    directory / 'checkpoints', fingerprint={'soak': 1}, best='eval/accuracy'
  ) as checkpoints:
    trained = train(
      sharding.compile_step(guard.drop_nonfinite(step), mesh, 'jit'),
      sharding.place_state(state, mesh, 'jit'),
      data.train_batches(images, batch_size=BATCH, seed=0),
      rng=jax.random.key(1),
      total_steps=STEPS,
      put=lambda batch: sharding.shard_batch(batch, mesh),
      checkpoints=checkpoints,
      evaluate=evaluate,
      evaluate_every=EVALUATE_EVERY,
      log_every=LOG_EVERY,
    )
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(trained.state):
    digest.update(f'{path}'.encode() + np.asarray(leaf).tobytes())
  result = {'state': digest.hexdigest(), 'history': trained.history}
  files.write(directory / RESULT, json.dumps(result).encode())


def start(directory: pathlib.Path) -> int:
  """The id of a new process that trains.

  It is forked from this one, in which JAX is imported but has started nothing:
  imports would be most of the time of a cycle.
  """
  if child := os.fork():
    return child
  code = FAILED
  try:
    with open(directory / 'log', 'a') as log:
      os.dup2(log.fileno(), 1)
      os.dup2(log.fileno(), 2)
    # Shows where all threads are, if this process hangs.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    with preemption.stoppable():
      train_to_the_end(directory)
    code = 0
  except preemption.Preempted:
    code = preemption.REQUEUE
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stderr.flush()
    os._exit(code)


def wait(child: int, seconds: float) -> int | None:
  """The exit code of a process, or None if it still runs after a time."""
  deadline = time.monotonic() + seconds
  while True:
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
      return os.waitstatus_to_exitcode(status)
    if time.monotonic() > deadline:
      return None
    time.sleep(0.002)


class Soaked(NamedTuple):
  """What a soak found.

  Attributes:
    cycles: processes that were ended by a signal.
    counts: what happened, by name.
    wrong: sentences; empty if all went well.
    seconds: of the soak.
    alone: seconds of the training that was never stopped.
  """

  cycles: int
  counts: Counter
  wrong: list[str]
  seconds: float
  alone: float


def soak(cycles: int, seed: int, directory: pathlib.Path) -> Soaked:
  """Ends processes until so many were ended, and checks every result."""
  draw, counts, wrong = random.Random(seed), Counter(), []
  expected, alone = undisturbed(directory)
  begun, ended, run = time.monotonic(), 0, directory / 'run'
  run.mkdir()
  while ended < cycles and not wrong:
    child = start(run)
    code = wait(child, draw.uniform(0, 1.2 * alone))
    if code is None:
      term = draw.random() < 0.3
      os.kill(child, signal.SIGTERM if term else signal.SIGKILL)
      code = wait(child, PATIENCE * alone)
      if code is None:
        os.kill(child, signal.SIGUSR1)
        wait(child, 1.0)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        wrong.append(
          f'cycle {ended}: SIGTERM did not end the process.{_log(run)}'
        )
        break
      ended += 1
      if ended % 100 == 0:
        print(f'{ended} of {cycles} cycles', file=sys.stderr, flush=True)
      allowed = (-signal.SIGTERM, preemption.REQUEUE, 0) if term else ()
      counts[_name(code, term)] += 1
      counts['ended while a save was under way'] += _saving(run)
    else:
      allowed = ()
    if code not in (0, -signal.SIGKILL, *allowed):
      wrong.append(f'cycle {ended}: exit code {code}.{_log(run)}')
    if (run / RESULT).exists():
      counts['trainings that came to their end'] += 1
      if (run / RESULT).read_bytes() != expected:
        wrong.append(f'cycle {ended}: the result is not that of one start.')
      shutil.rmtree(run)
      run.mkdir()
  return Soaked(ended, counts, wrong, time.monotonic() - begun, alone)


def undisturbed(directory: pathlib.Path) -> tuple[bytes, float]:
  """The result of a training in one go, and its seconds; compiles first."""
  for name in ('compiling', 'reference'):
    path = directory / name
    path.mkdir()
    begun = time.monotonic()
    code = wait(start(path), 600)
    if code != 0:
      raise RuntimeError((path / 'log').read_text())
  return (path / RESULT).read_bytes(), time.monotonic() - begun


def _log(run: pathlib.Path) -> str:
  """The end of what a process printed, as a block of Markdown."""
  return f'\n\n```\n{(run / "log").read_text()[-8000:]}\n```\n'


def _name(code: int, term: bool) -> str:
  if not term:
    return 'SIGKILL'
  saved = code == preemption.REQUEUE
  return 'SIGTERM, saved and asked to go on' if saved else 'SIGTERM, other'


def _saving(run: pathlib.Path) -> bool:
  """Whether a save was not finished."""
  steps = run / 'checkpoints'
  return steps.is_dir() and any('tmp' in path.name for path in steps.iterdir())


def table(found: Soaked) -> str:
  """The counts as Markdown."""
  lines = ['| what | times |', '| --- | --- |']
  lines.append(f'| processes ended by a signal | {found.cycles} |')
  lines += [f'| {name} | {n} |' for name, n in sorted(found.counts.items())]
  lines.append(
    f'| results with other bits, or other faults | {len(found.wrong)} |'
  )
  return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> int:
  """Soaks, prints, and writes the page; 1 if anything was wrong."""
  parser = page.make_parser(__doc__)
  parser.add_argument('--cycles', type=int, default=2000)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as directory:
    # Read by every process, written by the first.
    os.environ['JAX_PLATFORMS'] = 'cpu'
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_compilation_cache_dir', f'{directory}/compiled')
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
    found = soak(args.cycles, args.seed, pathlib.Path(directory))
  page.publish(
    args.out,
    [table(found)],
    [
      *(f'Wrong: {sentence}' for sentence in found.wrong),
      f'{STEPS} steps with an evaluation and a save every {EVALUATE_EVERY}, '
      f'in {found.alone:.2f} s when never stopped; ended after a random time '
      f'of up to 1.2 of that, by SIGKILL in 70 % of the cycles; seed '
      f'{args.seed}; {found.seconds:.0f} s in all.',
    ],
    machine=page.machine(('jax', 'flax', 'orbax-checkpoint')),
    command=page.command(__file__, argv),
  )
  return FAILED if found.wrong else 0


if __name__ == '__main__':
  sys.exit(main())
