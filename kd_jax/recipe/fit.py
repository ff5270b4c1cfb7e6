"""Trains one network of a run: optimizer, step, loop, and its saved weights.

Owns the optimizer, the step and the loop of one training and what is saved of
it. Every stage that trains calls `fit`; which networks and objectives they are
is said in `stages`, `distillation` and `search`.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from kd_jax import data, deploy, models, optim, prune, rules, sharding
from kd_jax import train as train_lib
from kd_jax.guard import drop_nonfinite
from kd_jax.objectives import Objective
from kd_jax.params_fn import with_step
from kd_jax.recipe import evaluation
from kd_jax.recipe.network import Network
from kd_jax.recipe.run import Run
from kd_jax.recipe.words import Training
from kd_jax.sharding import hosts, layout
from kd_jax.step import init_state, make_train_step
from kd_jax.storage.checkpoint import Checkpoints
from kd_jax.storage.weights import save_weights
from kd_jax.train.feed import Several
from kd_jax.train.profiling import Profile
from kd_jax.types import (
  BatchStream,
  StudentFn,
  TeacherFn,
  TrainState,
  Variables,
)

Result = dict[str, Any]
# Words of a configuration -> arguments of `adapters.from_linen`.
_DTYPES = {'float32': None, 'bfloat16': 'bfloat16'}
_REMAT = {'none': '', 'blocks': models.BLOCKS, 'dots': 'dots'}


@dataclasses.dataclass(frozen=True)
class Student:
  """A network to train.

  Attributes:
    make: `(taps=(), axis_name=None, **options) -> forward`; the options are
      `dtype` and `remat` of `adapters.from_linen`.
    variables: where it starts.
    served: `(variables) -> variables` of the one network that is evaluated
      and saved; the first of a cohort.
    served_make: its `make`, if it is not the whole.
    params_fn: see `make_train_step`.
    frozen: pattern of parameters that do not train; '' for none.
    wrap: what to make of the optimizer, such as pruning.
    finish: `(variables) -> variables` to save at the end.
  """

  make: Callable[..., StudentFn]
  variables: Variables
  served: Callable[[Variables], Variables] = dict
  served_make: Callable[..., StudentFn] | None = None
  params_fn: Callable[..., Any] = lambda params: params
  frozen: str = ''
  wrap: Callable[[Any], Any] = lambda tx: tx
  finish: Callable[[Variables], Variables] = dict


def examples_for(run: Run, teacher: Network | None) -> data.Split:
  """Who learns from a teacher may learn on other examples, without labels."""
  return run.splits['train'] if teacher is None else run.transfer


def _optimizer(
  c: ml_collections.ConfigDict, steps: int, frozen: str
) -> optax.GradientTransformation:
  schedule = optim.make_schedule(
    c.schedule,
    peak=c.learning_rate,
    total_steps=steps,
    warmup_steps=int(c.warmup * steps),
    boundaries=c.boundaries,
  )
  options = c.optimizer.to_dict()
  known = dict(inspect.signature(optim.make_optimizer).parameters)
  del known['learning_rate']  # a field of the training
  for option in options:
    rules.choose('option of an optimizer', option, known)
  rules.choose('field of an optimizer', 'name', options)
  tx = optim.make_optimizer(learning_rate=schedule, **options)
  return optim.freeze(tx, frozen) if frozen else tx


class Prepared(NamedTuple):
  """A train step that is not compiled, and where it starts.

  Attributes:
    step: `(state, raw batch, rng) -> (state, metrics)`; augments on the device.
    state: before the first step.
  """

  step: Callable[..., Any]
  state: TrainState


def make_step(
  run: Run,
  key: str,
  c: ml_collections.ConfigDict,
  objective: Objective,
  student: Student,
  teacher: Network | None = None,
) -> Prepared:
  """The step that trains a network on the run's raw batches.

  Args:
    run: the run.
    key: names the random key of the objective's parameters.
    c: how long and with which optimizer; a `training` of `kd_jax.defaults`.
    objective: what to minimise.
    student: the network.
    teacher: of the objective, if it has one.
  """
  steps = Training.of(c, examples_for(run, teacher)).steps
  tx = _optimizer(c, steps, student.frozen)
  tx = optim.average_params(tx, decay=c.average) if c.average else tx
  tx = student.wrap(tx)
  objective_tx = _optimizer(c, steps, '')
  teacher_fn: TeacherFn | None = None
  variables: Variables | None = None
  example = run.example
  if teacher is not None and teacher.cache is not None:
    teacher.cache.check_epochs(c.epochs)
    teacher_fn, variables = teacher.cache.forward, {}
    stored = jax.tree.map(jnp.asarray, teacher.cache.placeholder())
    example = {**example, **stored}
  elif teacher is not None:
    teacher_fn = teacher.make(taps=objective.taps.teacher)
    variables = teacher.variables
  tapped = functools.partial(
    student.make,
    taps=objective.taps.student,
    dtype=rules.choose('precision', run.config.precision, _DTYPES),
  )
  remat = rules.choose('train.remat', c.remat, _REMAT)
  step = make_train_step(
    tapped(axis_name=run.axis_name, remat=remat),
    objective,
    tx,
    teacher_fn=teacher_fn,
    params_fn=student.params_fn,
    axis_name=run.axis_name,
    num_shards=layout.batch_parts(run.mesh),
    objective_tx=objective_tx,
    accumulate=c.accumulate,
  )

  def augmented_step(state, batch, rng):
    state, metrics = step(state, run.preprocess(batch, train=True), rng)
    masks = jax.tree.leaves(prune.masks_of(state.opt_state))
    if masks:
      kept = [jnp.sum(mask, dtype=jnp.int32) for mask in masks]
      total = sum(mask.size for mask in masks)
      metrics['sparsity'] = 1 - sum(map(jnp.float32, kept)) / total
    return state, metrics

  state = init_state(
    tapped(),
    objective,
    tx,
    student.variables,
    example,
    teacher_fn=teacher_fn,
    teacher=variables,
    objective_tx=objective_tx,
    rng=run.rng(key),
  )
  return Prepared(drop_nonfinite(augmented_step), state)


def fit(
  run: Run,
  where: str,
  c: ml_collections.ConfigDict,
  objective: Objective,
  student: Student,
  *,
  teacher: Network | None = None,
  key: str = '',
) -> Result:
  """Trains one network and saves its weights.

  Args:
    run: the run.
    where: the stage, or 'stage/part': its directory.
    c: as for `make_step`, and so are `objective`, `student` and `teacher`.
    key: names the run's random key; `where` if empty.

  Returns:
    The stage's result: history, seconds and steps.
  """
  key = key or where
  prepared = make_step(run, key, c, objective, student, teacher)
  examples = examples_for(run, teacher)
  evaluate = _evaluator(run, student)
  cache = None if teacher is None else teacher.cache
  trained = _train(run, where, key, c, examples, prepared, evaluate, cache)
  path = run.workdir.stage(where) / 'weights.safetensors'
  variables = hosts.fetch(student.served(_averaged(trained.state)))

  def save():
    save_weights(path, student.finish(jax.tree.map(jnp.asarray, variables)))

  hosts.on_first(save)
  result = _sparsity(trained.state)
  if trained.profile is not None:
    result['profile'] = trained.profile
  return result | {
    'history': trained.history,
    'train_seconds': trained.seconds,
    'steps': int(trained.state.step),
  }


def _train(
  run: Run,
  where: str,
  key: str,
  c: ml_collections.ConfigDict,
  examples: data.Split,
  prepared: Prepared,
  evaluate: Callable[[TrainState], dict[str, float]],
  cache: Any,
) -> train_lib.Trained:
  steps, per_epoch, _ = Training.of(c, examples)
  sharding.connect(run.mesh)
  source = data.make_input(examples, run.mesh, run.config.data.placement)
  batches = _batches(run, source.examples, c.batch_size)
  fingerprint: dict[str, Any] = {
    'stage': where,
    'config': run.workdir.fingerprint,
  }
  if cache is not None:
    batches = cache.attach(batches)
    fingerprint['teacher_cache'] = cache.digest
  taught = where.split('/')[0] not in ('teacher', 'alone')
  if taught and _has_local_terms(run.config):
    fingerprint['batch_parts'] = layout.batch_parts(run.mesh)
  compiled = functools.partial(
    sharding.compile_step,
    prepared.step,
    run.mesh,
    run.config.compiler,
    layout=run.layout,
  )
  state = sharding.place_state(
    prepared.state, run.mesh, run.config.compiler, layout=run.layout
  )
  several, profile = None, None
  if run.config.steps_per_dispatch > 1:
    put = functools.partial(source.put, stacked=True)
    several = Several(
      run.config.steps_per_dispatch, compiled(stacked=True), put
    )
  if run.profile:
    profile = Profile(run.workdir.stage(where) / 'profile')
  with Checkpoints(
    run.workdir.checkpoints(where),
    fingerprint=fingerprint,
    best=f'eval/{run.task.quality}',
    higher=run.task.metrics[run.task.quality].higher,
    keep=2,  # one to fall back on if the last is damaged
  ) as checkpoints:
    return train_lib.train(
      compiled(),
      state,
      batches,
      rng=run.rng(key),
      total_steps=steps,
      put=source.put,
      checkpoints=checkpoints,
      evaluate=evaluate,
      evaluate_every=c.evaluate_every_epochs * per_epoch,
      log_every=min(per_epoch, 50),
      title=where,
      several=several,
      profile=profile,
    )


def _has_local_terms(config: ml_collections.ConfigDict) -> bool:
  """Whether a term relates the examples of one device: a mesh changes it."""
  terms = [*config.distill.terms.values(), *config.compress.terms.values()]
  return any(term.get('scope') == 'local' for term in terms)


def _batches(run: Run, examples: data.Examples, size: int) -> BatchStream:
  """What this process reads of the batches of a training."""
  part, parts = sharding.readers(run.mesh)
  return data.train_batches(
    examples,
    batch_size=size,
    seed=run.config.seed,
    part=part,
    parts=parts,
    num_workers=run.config.data.num_workers,
  )


def _evaluator(
  run: Run, student: Student
) -> Callable[[TrainState], dict[str, float]]:
  """`(state) -> numbers` on the validation split; none without such a split."""
  if 'validation' not in run.splits:
    return lambda state: {}
  forward = (student.served_make or student.make)()
  fn = jax.jit(deploy.from_raw(forward, run.preprocess, reads=run.task.reads))
  params_at = jax.jit(with_step(student.params_fn))
  mesh = run.own_mesh if run.config.compiler == 'pmap' else run.mesh

  def evaluate(state: TrainState) -> dict[str, float]:
    variables = dict(student.served(_averaged(state)))
    variables['params'] = params_at(variables['params'], state.step)
    numbers = evaluation.evaluate(
      run, functools.partial(fn, variables), 'validation', mesh=mesh
    )
    masks = prune.masks_of(state.opt_state)
    if masks:
      layers = _pruned_layers(hosts.fetch(variables['params']), masks)
      nonzero = sum(layer.nonzero for layer in layers)
      numbers['sparsity'] = 1 - nonzero / sum(layer.size for layer in layers)
    return {f'eval/{name}': value for name, value in numbers.items()}

  return evaluate


def _sparsity(state: TrainState) -> Result:
  """Target and achieved sparsity of every masked parameter."""
  masks = prune.masks_of(state.opt_state)
  if not masks:
    return {}
  params = hosts.fetch(prune.apply_masks(state.params, masks))
  rows = prune.sparsity_report(params, masks=hosts.fetch(masks))
  return {'sparsity': [row._asdict() for row in rows if row.path in masks]}


def _pruned_layers(
  params: Any, masks: Mapping[str, jax.Array]
) -> list[prune.LayerSparsity]:
  return [r for r in prune.sparsity_report(params) if r.path in masks]


def _averaged(state: TrainState) -> dict[str, Any]:
  """The variables to evaluate with: averaged if asked for, and masked."""
  average = optim.averaged_params(state.opt_state)
  params = state.params
  if average is not None:
    params = jax.tree.map(lambda a, p: a.astype(p.dtype), average, params)
  params = prune.apply_masks(params, prune.masks_of(state.opt_state))
  return {'params': params, **state.model_state}
