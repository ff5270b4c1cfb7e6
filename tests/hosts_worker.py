"""One process of `hosts_test.py`: `hosts_worker.py INDEX PORT DIRECTORY`.

Says what it found in `DIRECTORY/INDEX.json`; the test itself calls `train_on`
for the numbers of one process.
"""

import fcntl
import functools
import json
import os
import pathlib
import shutil
import sys

import jax
import numpy as np
import optax

from kd_jax import adapters, data, models, objectives, prune, sharding, step
from kd_jax import train as train_lib
from kd_jax.sharding import hosts, processes
from kd_jax.sharding.layout import Layout
from kd_jax.storage import checkpoint as checkpoint_lib
from kd_jax.storage import lock
from kd_jax.storage.workdir import Workdir, write_json

# Splits even the small arrays of these networks.
LAYOUT = Layout(least=16)
FSDP = {'data': 1, 'fsdp': -1}
TENSOR = {'data': 1, 'tensor': -1}
BATCH = 16


@functools.cache
def images():
  rng = np.random.default_rng(0)
  return data.ImageData(
    image=rng.integers(0, 256, (48, 6, 6, 1), np.uint8),
    label=(np.arange(48) % 4).astype(np.int32),
    id=np.arange(48, dtype=np.int32),
    class_names=('a', 'b', 'c', 'd'),
  )


def _made(compiler):
  """A step of distillation with BatchNorm and pruning, and its state."""
  axis_name = sharding.axis_name(compiler)
  preprocess = data.make_preprocess(mean=(0.5,), std=(0.25,), crop_padding=1)
  example = preprocess(images().read([0]), train=False)
  networks = []
  for seed, widths in ((0, (4,)), (1, (8, 32))):
    model = models.CNN(4, widths=widths)
    variables = adapters.init_linen(model, jax.random.key(seed), example)
    networks.append((model, variables))
  (teacher, teacher_variables), (student, variables) = networks
  objective = objectives.weighted_sum(
    {
      'kd': (0.9, objectives.soft_targets()),
      'ce': (0.1, objectives.hard_labels()),
    }
  )
  tx = prune.prune(
    optax.sgd(0.05, momentum=0.9),
    prune.cubic(0.5, begin=0, end=4),
    [('.*/kernel', True)],
  )
  teacher_fn = adapters.from_linen(teacher)
  pure = step.make_train_step(
    adapters.from_linen(student, axis_name=axis_name),
    objective,
    tx,
    teacher_fn=teacher_fn,
    axis_name=axis_name,
  )
  state = step.init_state(
    adapters.from_linen(student),
    objective,
    tx,
    variables,
    example,
    teacher_fn=teacher_fn,
    teacher=teacher_variables,
  )

  def train_step(state, batch, rng):
    return pure(state, preprocess(batch, train=True), rng)

  return train_step, state


def train_on(mesh, directory, steps, compiler='jit'):
  """Trains up to a step; goes on from what the directory holds.

  Returns:
    The losses of all steps, and the sorted ids of the batches of this call.
  """
  pure, state = _made(compiler)
  part, parts = sharding.readers(mesh)
  sharding.connect(mesh)
  seen = []

  def put(batch):
    batch = sharding.shard_batch(batch, mesh)
    seen.append(sorted(hosts.fetch(batch['id']).tolist()))
    return batch

  with checkpoint_lib.Checkpoints(directory) as checkpoints:
    trained = train_lib.train(
      sharding.compile_step(pure, mesh, compiler, layout=LAYOUT),
      sharding.place_state(state, mesh, compiler, layout=LAYOUT),
      data.train_batches(
        images(),
        batch_size=BATCH,
        seed=0,
        part=part,
        parts=parts,
      ),
      rng=jax.random.key(3),
      total_steps=steps,
      put=put,
      checkpoints=checkpoints,
      log_every=1,
    )
  return [row['loss/total'] for row in trained.history], seen


def damage(directory):
  """Flips a byte of each file of arrays that process 1 wrote."""
  for path in pathlib.Path(directory).rglob('*'):
    if path.is_file() and 'ocdbt.process_1' in str(path):
      content = bytearray(path.read_bytes())
      content[len(content) // 2] ^= 1
      path.write_bytes(content)


def error_of(work):
  """The sentence that something fails with."""
  try:
    work()
  except Exception as e:
    return f'{type(e).__name__}: {e}'
  return None


def main(index, port, directory):
  """What one of two processes does."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 2)
  processes.initialize(f':{port}', 2, index, initialization_timeout=240)
  found = {
    'processes': jax.process_count(),
    'first': hosts.is_first(),
    'exchanged': hosts.exchange('ä' * index),
    'agreed': error_of(lambda: processes.check_agreement({'seed': 1})),
    'settings': error_of(lambda: processes.check_agreement({'seed': index})),
    'packages': error_of(
      lambda: processes.check_agreement({}, packages={'jax': f'0.{index}'})
    ),
    'value': hosts.on_first(lambda: {'by': index}),
    'failed': error_of(lambda: hosts.on_first(lambda: {}['missing'])),
    'unseen': error_of(
      lambda: hosts.wait_for(directory / 'missing', within=0.1)
    ),
  }
  own = Workdir(directory / f'own{index}', {'seed': 0})
  if index == 1:
    write_json(own.stage('teacher') / 'result.json', {})
    (directory / 'taken').mkdir()
    other = os.open(directory / 'taken' / lock.NAME, os.O_CREAT | os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
  found['done'] = own.done('teacher')
  found['finished'] = own.finished('teacher')
  found['locked'] = error_of(lock.exclusive(directory / 'taken').__enter__)
  fsdp = sharding.make_mesh(**FSDP)
  found['from one'] = train_on(fsdp, directory / 'one', 6)
  found['two'] = train_on(fsdp, directory / 'two', 3)
  hosts.on_first(
    lambda: shutil.copytree(directory / 'two', directory / 'damaged') and None
  )
  hosts.on_first(lambda: damage(directory / 'damaged'))
  found['damaged'] = error_of(lambda: train_on(fsdp, directory / 'damaged', 4))
  for name, axes, compiler in (
    ('tensor', TENSOR, 'jit'),
    ('shard_map', {}, 'shard_map'),
    ('pmap', {}, 'pmap'),
  ):
    mesh = sharding.make_mesh(**axes)
    found[name] = train_on(mesh, directory / name, 2, compiler)
  (directory / f'{index}.json').write_text(json.dumps(found))
  hosts.barrier()


if __name__ == '__main__':
  main(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]))
