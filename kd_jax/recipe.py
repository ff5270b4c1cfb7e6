"""The main job as stages: teacher -> student -> compress -> export -> report.

A stage reads the results of the stages before it from the work directory and
writes its own; a finished stage is skipped, a killed one continues. What a
stage does is calls of library functions: read this file to learn how they fit
together.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections

from kd_jax import (
  adapters,
  assess,
  data,
  deploy,
  objectives,
  optim,
  parity,
  prune,
  quantize,
  rules,
  sharding,
)
from kd_jax import train as train_lib
from kd_jax.checkpoint import Checkpoints
from kd_jax.export import export_stablehlo, onnx
from kd_jax.report import write_report
from kd_jax.run import Network, Run
from kd_jax.step import init_state, make_train_step
from kd_jax.types import StudentFn, TrainState, Variables
from kd_jax.weights import load_weights, save_weights

Result = dict[str, Any]


def _labels_only() -> objectives.Objective:
  return objectives.weighted_sum({'ce': (1.0, objectives.hard_labels())})


def _distillation(c: ml_collections.ConfigDict) -> objectives.Objective:
  return objectives.weighted_sum(
    {
      'kd': (c.weights.kd, objectives.soft_targets(temperature=c.temperature)),
      'ce': (c.weights.ce, objectives.hard_labels()),
    }
  )


def train_teacher(run: Run) -> Result:
  """Trains the teacher on the labels."""
  variables = adapters.init_linen(
    run.model('teacher'), run.rng('teacher'), run.example
  )
  return _fit(run, 'teacher', 'teacher', _labels_only(), variables)


def train_alone(run: Run) -> Result:
  """Trains the student on the labels, without the teacher."""
  variables = adapters.init_linen(
    run.model('student'), run.rng('alone'), run.example
  )
  return _fit(run, 'alone', 'student', _labels_only(), variables)


def distill(run: Run) -> Result:
  """Trains the same student, from the same start, on the teacher too."""
  variables = adapters.init_linen(
    run.model('student'), run.rng('distill'), run.example
  )
  objective = _distillation(run.config.distill)
  return _fit(
    run, 'distill', 'student', objective, variables, teacher=run.teacher()
  )


def compress(run: Run) -> Result:
  """Prunes and fake-quantizes the distilled student while distilling on."""
  c = run.config.compress
  variables = dict(run.student('distill').variables)
  variables['quant_stats'] = quantize.init_quant_stats(
    run.fake_quant_forward(), variables, run.example, run.rules('activations')
  )
  steps = _total_steps(run, 'compress')
  begin = round(c.prune.begin * steps)
  schedule = prune.cubic(
    c.prune.sparsity,
    begin=begin,
    end=max(begin + 1, round(c.prune.end * steps)),
    every=c.prune.every,
  )
  wrap = functools.partial(
    prune.prune,
    schedule=schedule,
    rules=c.prune.rules,
    scope=c.prune.scope,
  )
  return _fit(
    run,
    'compress',
    'student',
    _distillation(c),
    variables,
    teacher=run.teacher(),
    forward=run.fake_quant_forward,
    params_fn=run.fake_quant,
    wrap=wrap,
  )


def _total_steps(run: Run, stage: str) -> int:
  c = run.config[stage].train
  return c.epochs * data.batches_per_epoch(run.splits['train'], c.batch_size)


def _optimizer(run: Run, stage: str):
  c, total_steps = run.config[stage].train, _total_steps(run, stage)
  schedule = optim.make_schedule(
    c.schedule,
    peak=c.learning_rate,
    total_steps=total_steps,
    warmup_steps=int(c.warmup * total_steps),
  )
  tx = optim.make_optimizer(learning_rate=schedule, **c.optimizer.to_dict())
  return optim.average_params(tx, decay=c.average) if c.average else tx


def _fit(
  run: Run,
  stage: str,
  part: str,
  objective: objectives.Objective,
  variables: Variables,
  *,
  teacher: Network | None = None,
  forward: Callable[..., StudentFn] | None = None,
  params_fn: Callable[[Any], Any] = lambda params: params,
  wrap: Callable[[Any], Any] = lambda tx: tx,
) -> Result:
  """Trains one network from the given variables and saves its weights."""
  forward = forward or functools.partial(run.forward, part)
  teacher_fn = None if teacher is None else teacher.forward
  tx = wrap(_optimizer(run, stage))
  step = make_train_step(
    forward(axis_name=run.axis_name),
    objective,
    tx,
    teacher_fn=teacher_fn,
    params_fn=params_fn,
    axis_name=run.axis_name,
  )

  def augmented_step(state, batch, rng):
    state, metrics = step(state, run.preprocess(batch, train=True), rng)
    pruning = prune.find_state(state.opt_state)
    if pruning is not None:
      metrics['sparsity'] = pruning.sparsity
    return state, metrics

  state = init_state(
    forward(),
    objective,
    tx,
    variables,
    run.example,
    teacher_fn=teacher_fn,
    teacher=None if teacher is None else teacher.variables,
  )
  trained = _train(
    run, stage, augmented_step, state, _evaluator(run, forward(), params_fn)
  )
  save_weights(
    run.workdir.stage(stage) / 'weights.safetensors',
    jax.device_get(_served(trained.state)),
  )
  return {
    'history': trained.history,
    'train_seconds': trained.seconds,
    'steps': int(trained.state.step),
  }


def _train(run, stage, step, state, evaluate) -> train_lib.Trained:
  c, images = run.config[stage].train, run.splits['train']
  per_epoch = data.batches_per_epoch(images, c.batch_size)
  with Checkpoints(
    run.workdir.stage(stage) / 'checkpoints',
    fingerprint={'stage': stage, 'config': run.workdir.fingerprint},
    best='eval/accuracy',
  ) as checkpoints:
    return train_lib.train(
      sharding.compile_step(step, run.mesh, run.config.compiler),
      sharding.replicate(state, run.mesh),
      data.train_batches(
        images,
        batch_size=c.batch_size,
        seed=run.config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
      ),
      rng=run.rng(stage),
      total_steps=_total_steps(run, stage),
      put=functools.partial(sharding.shard_batch, mesh=run.mesh),
      checkpoints=checkpoints,
      evaluate=evaluate,
      evaluate_every=c.evaluate_every_epochs * per_epoch,
      log_every=min(per_epoch, 50),
      title=stage,
    )


def _evaluator(run: Run, forward: StudentFn, params_fn):
  """`(state) -> numbers` on the validation split; compiled once."""
  fn = jax.jit(deploy.from_images(forward, run.preprocess))

  def evaluate(state: TrainState) -> dict[str, float]:
    variables = _served(state)
    variables['params'] = params_fn(variables['params'])
    numbers = run.evaluate(lambda b: fn(variables, b['image']), 'validation')
    masks = prune.masks_of(state.opt_state)
    if masks:
      layers = _pruned_layers(variables['params'], masks)
      nonzero = sum(layer.nonzero for layer in layers)
      numbers['sparsity'] = 1 - nonzero / sum(layer.size for layer in layers)
    return {f'eval/{name}': value for name, value in numbers.items()}

  return evaluate


def _pruned_layers(params, masks) -> list[prune.LayerSparsity]:
  return [r for r in prune.sparsity_report(params) if r.path in masks]


def _served(state: TrainState) -> dict[str, Any]:
  """The variables to evaluate with: averaged if asked for, and masked."""
  params = optim.averaged_params(state.opt_state)
  params = state.params if params is None else params
  params = prune.apply_masks(params, prune.masks_of(state.opt_state))
  return {'params': params, **state.model_state}


def convert(run: Run) -> Result:
  """Folds BatchNorm and turns the compressed student into integers."""
  variables = load_weights(run.workdir.weights('compress'))
  integers = quantize.convert(
    deploy.fold(run.model('student'), variables, run.example),
    run.rules('weights'),
    run.rules('activations'),
    observer=run.observer(),
  )
  directory = run.workdir.stage('convert')
  save_weights(directory / 'weights.safetensors', integers)
  return {}


def export(run: Run) -> Result:
  """Writes the integer student for servers, and compares each file with it."""
  directory = run.workdir.stage('export')
  images = run.splits['test'].image
  network = run.integer()
  metadata = {
    'config': run.workdir.fingerprint,
    'dataset': run.config.data.name,
  }
  export_stablehlo(
    deploy.from_images(network.forward, run.preprocess),
    network.variables,
    jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype),
    directory / 'stablehlo',
    class_names=run.splits['test'].class_names,
    golden_images=images[:8],
    metadata=metadata,
    overwrite=True,
  )
  kernels = None
  if assess.has_onnx():
    simulated = run.integer(simulate=True)
    apply = deploy.from_images(simulated.forward, run.preprocess)
    onnx.export_onnx(
      functools.partial(apply, simulated.variables),
      jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype),
      directory / 'student.int8.onnx',
      class_names=run.splits['test'].class_names,
      metadata=metadata,
    )
    kernels = onnx.integer_kernels(directory / 'student.int8.onnx')
  note = '' if kernels else ', without ONNX: pip install "kd_jax[onnx]"'
  return {
    'parity': _parities(run, directory),
    'onnx_kernels': kernels,
    'note': note,
  }


def _parities(run: Run, directory) -> list[dict[str, Any]]:
  """Each form of the integer student against the form it came from."""
  integer = run.apply(run.integer())
  pairs = [
    (
      'integer (JAX)',
      integer,
      run.compressed().name,
      run.apply(run.compressed()),
    )
  ]
  for name, apply in assess.exported(directory).items():
    pairs.append((name, apply, 'integer (JAX)', integer))
  found = []
  for name, apply, against, reference in pairs:
    compared = parity.compare(apply, reference, run.batches('test'))
    if against == 'integer (JAX)':
      parity.require(
        compared, name=name, agreement=run.config.aims.export_agreement
      )
    numbers = compared._asdict()
    if math.isinf(compared.sqnr_db):  # equal outputs; JSON has no infinity
      numbers['sqnr_db'] = None
    found.append({'name': name, 'against': against} | numbers)
  return found


def report(run: Run) -> Result:
  """Measures every network on the test split and writes the report."""
  assembled = assess.assemble(run)
  write_report(assembled, run.workdir.stage('report'))
  return {'models': assembled['models'], 'aims': assembled['aims']}


STAGES: dict[str, Callable[[Run], Result]] = {
  'teacher': train_teacher,
  'alone': train_alone,
  'distill': distill,
  'compress': compress,
  'convert': convert,
  'export': export,
  'report': report,
}


def run_stages(
  run: Run,
  stages: Sequence[str] = (),
  *,
  overwrite: bool = False,
  say: Callable[[str], None] = print,
) -> None:
  """Runs the stages that are not finished, in order.

  Args:
    run: the configuration and its work directory.
    stages: names of `STAGES`; all when empty.
    overwrite: run the stages again, finished or not; the results of the
      stages that come after them are deleted, because they are stale.
    say: prints one line.

  Raises:
    ValueError: for an unknown stage, or one whose predecessors are missing.
  """
  order = list(STAGES)
  for name in stages:
    rules.choose('stage', name, STAGES)
  chosen = [name for name in order if name in (stages or order)]
  run.workdir.write_config()
  if overwrite:
    for name in order[order.index(chosen[0]) :]:
      run.workdir.clear(name)
  for name in chosen:
    if run.workdir.done(name):
      say(f'{name}: already done in {run.workdir.path / name}')
      continue
    result = STAGES[name](run)
    run.workdir.finish(name, result)
    say(f'{name}: done{_spent(result)}{result.get("note", "")}')


def _spent(result: Mapping[str, Any]) -> str:
  if 'train_seconds' not in result:
    return ''
  return f', {result["steps"]} steps in {result["train_seconds"]:.0f} s'
