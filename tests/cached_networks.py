"""A teacher that is a matrix product, images to cache it on, and its cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kd_jax
from kd_jax import data, losses, objectives, sharding
from kd_jax.sharding import layout
from kd_jax.types import Forward

CLASSES, SEED, BATCH = 6, 3, 8
# Also small arrays are split, or fsdp would be of no effect here.
LAYOUT = layout.Layout(least=1)


def images(count=21):
  """Random images of 4x4 pixels, whose ids are not their positions."""
  rng = np.random.default_rng(0)
  return data.ImageData(
    image=rng.integers(0, 256, (count, 4, 4, 1), np.uint8),
    label=rng.integers(0, CLASSES, count, np.int32),
    id=np.sort(rng.permutation(3 * count)[:count]).astype(np.int32),
    class_names=tuple('abcdef'),
  )


def preprocess(**options):
  """Random crops, unless other augmentation is asked for."""
  options = options or {'crop_padding': 2, 'flip': True}
  return data.make_preprocess(mean=(0.5,), std=(0.25,), seed=SEED, **options)


def network(variables, batch, rng=None, *, train=False):
  """Logits and one feature; works as teacher and as student."""
  x = batch['image'].reshape(batch['image'].shape[0], -1)
  hidden = jnp.tanh(x @ variables['params']['first'])
  return Forward(hidden @ variables['params']['last'], {'hidden': hidden})


def variables(seed, width=7):
  """Of `network`."""
  rng = np.random.default_rng(seed)
  shapes = {'first': (16, width), 'last': (width, 6)}
  return {
    'params': {n: rng.normal(size=s).astype('f') / 2 for n, s in shapes.items()}
  }


TEACHER = variables(1)


def fingerprint(**changes):
  """That of the teacher on the images."""
  options = {
    'variables': TEACHER,
    'images': images(),
    'network': {'name': 'product'},
    'augmentation': {'crop_padding': 2, 'flip': True, 'seed': SEED},
    'order': None,
  }
  options |= changes
  return data.make_fingerprint(
    options.pop('variables'), options.pop('images'), **options
  )


def write(directory, **options):
  """A cache of the teacher; `options` replace those of `write_cache`."""
  options = {
    'forward': network,
    'variables': TEACHER,
    'examples': images(),
    'preprocess': preprocess(),
    'fingerprint': fingerprint(),
    'seed': SEED,
    'epochs': 2,
    'batch_size': 16,
    'say': lambda line: None,
  } | options
  return data.write_cache(directory, **options)


OBJECTIVE = kd_jax.weighted_sum(
  {
    'kd': (0.9, objectives.soft_targets(temperature=4.0)),
    'ce': (0.1, objectives.hard_labels()),
    'hint': (
      1.0,
      objectives.on_features(losses.hint, student='hidden', teacher='hidden'),
    ),
  }
)


def training(mesh, compiler, teacher_fn, cache=None, objective=OBJECTIVE):
  """The state before the first step, and the compiled step."""
  process, tx = preprocess(), optax.sgd(0.1, momentum=0.9)
  step = kd_jax.make_train_step(
    network,
    objective,
    tx,
    teacher_fn=teacher_fn,
    axis_name=sharding.axis_name(compiler),
  )

  def raw_step(state, batch, rng):
    return step(state, process(batch, train=True), rng)

  example = process(images().read([0]), train=False)
  if cache is not None:
    example |= cache.placeholder()
  state = kd_jax.init_state(
    network,
    objective,
    tx,
    variables(5),
    example,
    teacher_fn=teacher_fn,
    teacher=TEACHER,
  )
  place = functools.partial(sharding.place_state, layout=LAYOUT)
  compiled = sharding.compile_step(raw_step, mesh, compiler, layout=LAYOUT)
  return place(state, mesh, compiler), (compiled, mesh)


def steps(state, step, batches):
  """(state, metrics) after every batch."""
  compiled, mesh = step
  for batch in batches:
    state, metrics = compiled(
      state, sharding.shard_batch(batch, mesh), jax.random.key(0)
    )
    yield state, jax.device_get(metrics)
