"""One of two processes that write a teacher cache and train from it.

  python cached_processes.py INDEX PORT DIRECTORY

Process 0 writes its losses to DIRECTORY/losses.json.
"""

import json
import pathlib
import sys

import cached_networks as nets
import jax

from kd_jax import data, sharding


def main():
  """Writes the cache, and trains for two epochs."""
  index, port, directory = int(sys.argv[1]), *sys.argv[2:]
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 2)
  jax.distributed.initialize(
    f'127.0.0.1:{port}', 2, index, initialization_timeout=300
  )
  path = pathlib.Path(directory)
  nets.write(
    path / 'cache',
    form=data.Form('float32', features=('hidden',)),
  )
  cache = data.TeacherCache(path / 'cache')
  batches = data.train_batches(
    nets.images(),
    batch_size=nets.BATCH,
    seed=nets.SEED,
    epochs=2,
    part=index,
    parts=2,
  )
  state, step = nets.training(sharding.make_mesh(), 'jit', cache.forward, cache)
  losses = [
    {name: float(x) for name, x in metrics.items()}
    for _, metrics in nets.steps(state, step, cache.attach(batches))
  ]
  if index == 0:
    (path / 'losses.json').write_text(json.dumps(losses))
  jax.distributed.shutdown()


if __name__ == '__main__':
  main()
