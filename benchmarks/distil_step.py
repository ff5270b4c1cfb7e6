"""What the ways of `step_time.py` train, and those of them in JAX."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kd_jax
from kd_jax import adapters, models, optim, sharding

# Depth, first width and stem of the teacher and of the student.
PAIRS = {
  'resnet56/resnet20': ((56, 16, 16), (20, 16, 16)),
  'resnet32x4/resnet8x4': ((32, 64, 32), (8, 64, 32)),
  'tiny': ((8, 8, 8), (8, 4, 4)),
}
CLASSES = 100


class Recipe(NamedTuple):
  """The losses and SGD, the same in all ways.

  Attributes:
    temperature: of the soft targets.
    kd: their weight.
    ce: the labels' weight.
    rate: of learning.
    momentum: of SGD.
    decay: of kernels.
  """

  temperature: float = 4.0
  kd: float = 0.9
  ce: float = 0.1
  rate: float = 0.05
  momentum: float = 0.9
  decay: float = 5e-4


class Way(NamedTuple):
  """A way to train, ready to run.

  Attributes:
    step: makes one step and returns its loss, which may still be computed.
    finish: waits until what a step returned is computed; gives the loss.
    seconds: that it took to compile, with the first step.
  """

  step: Callable[[], Any]
  finish: Callable[[Any], float]
  seconds: float


class Problem(NamedTuple):
  """What all ways train.

  Attributes:
    teacher: linen module, and so is `student`.
    taught: the teacher's variables.
    start: the student's.
    batch: host arrays `image` float32 `[B, H, W, 3]` and `label` int32 `[B]`.
    recipe: see `Recipe`.
  """

  teacher: Any
  student: Any
  taught: Mapping[str, Any]
  start: Mapping[str, Any]
  batch: Mapping[str, np.ndarray]
  recipe: Recipe


def module(shape: Sequence[int], dtype: str) -> Any:
  """The linen module of a depth, width and stem."""
  depth, width, stem = shape
  return models.CifarResNet(
    CLASSES, depth=depth, width=width, stem_width=stem, dtype=dtype
  )


def random_batch(size: int, pixels: int) -> dict[str, np.ndarray]:
  """Normal images and uniform labels."""
  rng = np.random.default_rng(0)
  shape = (size, pixels, pixels, 3)
  return {
    'image': rng.normal(size=shape).astype(np.float32),
    'label': rng.integers(0, CLASSES, size).astype(np.int32),
  }


def ready(step: Callable[[], Any], finish: Callable[[Any], float]) -> Way:
  """A way after its first step, which compiles it."""
  began = time.perf_counter()
  first = finish(step())
  way = Way(step, finish, time.perf_counter() - began)
  if not np.isfinite(first):
    raise FloatingPointError(f'The first loss is {first}.')
  return way


def ours(problem: Problem, *, cached: bool) -> Way:
  """kd_jax's step; `cached` reads the teacher's logits from the batch."""
  teacher_fn = adapters.from_linen(problem.teacher)
  taught, batch = problem.taught, dict(problem.batch)
  if cached:
    logits = jax.jit(teacher_fn)(taught, batch).output
    batch['teacher'] = np.asarray(logits)
    taught = {}

    def teacher_fn(variables, batch):
      return kd_jax.Forward(batch['teacher'])

  student_fn, recipe = adapters.from_linen(problem.student), problem.recipe
  soft = kd_jax.soft_targets(temperature=recipe.temperature)
  objective = kd_jax.weighted_sum(
    {'kd': (recipe.kd, soft), 'ce': (recipe.ce, kd_jax.hard_labels())}
  )
  tx = optim.make_optimizer(
    'momentum',
    learning_rate=recipe.rate,
    momentum=recipe.momentum,
    l2=recipe.decay,
  )
  mesh = kd_jax.make_mesh(jax.devices()[:1])
  options = {'teacher_fn': teacher_fn}
  step = kd_jax.compile_step(
    kd_jax.make_train_step(student_fn, objective, tx, **options), mesh
  )
  state = kd_jax.init_state(
    student_fn,
    objective,
    tx,
    problem.start,
    batch,
    teacher=taught,
    **options,
  )
  state = sharding.place_state(state, mesh)
  batch, rng = sharding.shard_batch(batch, mesh), jax.random.key(0)

  def once():
    nonlocal state
    state, metrics = step(state, batch, rng)
    return metrics['loss/total']

  return ready(once, float)


def smallest_loop(problem: Problem) -> Way:
  """The same step in JAX, as one would write it for these networks."""
  teacher, student, recipe = problem.teacher, problem.student, problem.recipe
  tx = optax.chain(
    optax.add_decayed_weights(recipe.decay, mask=_kernels),
    optax.sgd(recipe.rate, momentum=recipe.momentum),
  )

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, taught, batch):
    params, stats, moments = state
    target = teacher.apply(taught, batch['image']) / recipe.temperature

    def loss_fn(params):
      logits, new = student.apply(
        {'params': params, 'batch_stats': stats},
        batch['image'],
        train=True,
        mutable=['batch_stats'],
      )
      log_p = jax.nn.log_softmax(logits / recipe.temperature)
      kl = optax.losses.kl_divergence(log_p, jax.nn.softmax(target))
      ce = optax.softmax_cross_entropy_with_integer_labels(
        logits, batch['label']
      )
      kd = recipe.temperature**2 * kl.mean()
      loss = recipe.kd * kd + recipe.ce * ce.mean()
      return loss, new['batch_stats']

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, stats), grads = grad_fn(params)
    updates, moments = tx.update(grads, moments, params)
    return (optax.apply_updates(params, updates), stats, moments), loss

  params, stats = (
    jax.tree.map(jnp.array, problem.start[name])
    for name in ('params', 'batch_stats')
  )
  state = (params, stats, tx.init(params))
  batch = {name: jnp.asarray(x) for name, x in problem.batch.items()}

  def once():
    nonlocal state
    state, loss = step(state, problem.taught, batch)
    return loss

  return ready(once, float)


def _kernels(params: Any) -> Any:
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key == 'kernel', params
  )
