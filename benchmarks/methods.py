"""Measures the train step of every method, and compares it with its FLOPs.

  python benchmarks/methods.py --runs 20 --out benchmarks/results/methods.md

One process compiles a step of every method, reads the compiler's count of its
FLOPs, and times all steps in turns. What is asked: does a step take the time
that its FLOPs add to plain KD? A teacher's forward pass runs at another rate
than training does, so the two rates are taken from two steps of the same run:
training from the student alone, the forward pass from what KD adds to it. By
default a ResNet-20 teaches a ResNet-8 on random 32x32 images; `--config` takes
other networks and data, as `kd-jax compare` does.
"""

import importlib.util
import json
import math
import pathlib
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import page
import turns

from kd_jax import adapters, data, methods, rules
from kd_jax.recipe import compare, distillation, fit
from kd_jax.recipe.network import TEACHER
from kd_jax.recipe.run import Run
from kd_jax.types import Variables

HERE = pathlib.Path(__file__).resolve()
# From their times every other one is expected.
REFERENCES = ('kd', 'alone')


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The default pair; `variant` is '' or 'tiny'."""
  tiny = variant == 'tiny'
  config = load_config(str(HERE.parent.parent / 'configs' / 'digits.py'))
  teacher, student = {'name': 'resnet20'}, {'name': 'resnet8'}
  if tiny:
    teacher = {'name': 'cnn', 'widths': (4, 8)}
    student = {'name': 'cnn', 'widths': (2, 4)}
  config.teacher.model = ml_collections.ConfigDict(teacher)
  config.student.model = ml_collections.ConfigDict(student)
  # The step alone, without crops.
  config.data.crop_padding = 0
  config.data.synthetic = ml_collections.ConfigDict(
    {
      'shape': (8, 8, 3) if tiny else (32, 32, 3),
      'classes': 5 if tiny else 100,
      'examples': 64 if tiny else 50000,
    }
  )
  config.distill.train.batch_size = 8 if tiny else 64
  return config


def load_config(path: str) -> ml_collections.ConfigDict:
  """A configuration from 'FILE' or 'FILE:VARIANT'."""
  file, _, variant = path.partition(':')
  spec = importlib.util.spec_from_file_location('config', file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(variant)


class Untrained(Run):
  """A run in no directory, whose teacher has random weights."""

  def with_config(self, config: ml_collections.ConfigDict) -> 'Untrained':
    """The same examples, with another configuration."""
    return Untrained(config, None, like=self)

  def trained(
    self, where: str, model: adapters.LinenModule, precision: str = 'float32'
  ) -> Variables:
    """The variables that a model starts with, the same at every call."""
    return adapters.init_linen(model, self.rng('teacher'), self.example)


def open_run(config: ml_collections.ConfigDict) -> Untrained:
  """A run of a configuration, on random images if it has `data.synthetic`."""
  if 'method_options' not in config:
    config.method_options = ml_collections.ConfigDict()
  like = None
  if 'synthetic' in config.data:
    images = _synthetic(**config.data.synthetic.to_dict())
    like = types.SimpleNamespace(splits={'train': images}, transfer=images)
  return Untrained(config, None, like=like)


def _synthetic(
  shape: Sequence[int], classes: int, examples: int
) -> data.ImageData:
  rng = np.random.default_rng(0)
  return data.ImageData(
    image=rng.integers(0, 256, (examples, *shape), np.uint8),
    label=rng.integers(0, classes, examples, np.int32),
    id=np.arange(examples, dtype=np.int32),
    class_names=tuple(map(str, range(classes))),
  )


class Step(NamedTuple):
  """A compiled step of a method.

  Attributes:
    once: makes one step from where the last one ended.
    flops: of the step.
    teacher_flops: of the teacher's forward pass with the method's taps, and of
      the part of it that ends at the taps; zeros without a teacher.
  """

  once: Callable[[], Any]
  flops: float
  teacher_flops: tuple[float, float]


def compile_step(run: Run, name: str) -> Step:
  """A method's step, built as a run builds it, and the compiler's costs.

  The teacher has random weights. Where the method is a chain of students, this
  is the first of them.

  Raises:
    ValueError: if the method does not fit these networks.
  """
  own = compare.with_method(run, name)
  model = own.model('teacher')
  variables = own.trained(TEACHER, model)
  teacher = own.network(TEACHER, model, variables)
  link = distillation.link(own, own.model('student'), teacher, 'distill')
  c = own.config.distill.train
  made = fit.make_step(own, 'distill', c, *link)
  batches = data.train_batches(own.transfer, batch_size=c.batch_size, seed=0)
  batch = jax.tree.map(jnp.asarray, next(batches))
  state, rng = made.state, jax.random.key(0)
  step = jax.jit(made.step, donate_argnums=0)
  compiled = step.lower(state, batch, rng).compile()

  def once():
    nonlocal state
    state, metrics = compiled(state, batch, rng)
    return state, metrics

  objective, _, teacher = link
  forward = (0.0, 0.0)
  if teacher is not None and name != 'alone':
    images = own.preprocess(batch, train=False)
    forward = _forward_flops(teacher, objective.taps.teacher, images)
  return Step(once, _flops(compiled), forward)


def _flops(compiled) -> float:
  return compiled.cost_analysis().get('flops', 0.0)


def _forward_flops(teacher, taps, batch) -> tuple[float, float]:
  fn = teacher.make(taps=taps)
  parts = (lambda f: (f.output, f.features), lambda f: f.features)
  return tuple(
    _flops(
      jax.jit(lambda v, b, part=part: part(fn(v, b)))
      .lower(teacher.variables, batch)
      .compile()
    )
    for part in parts
  )


def teacher_flops(step: Step, alone: float) -> float:
  """The teacher's share of a step's FLOPs.

  A method that reads features only runs the teacher up to them: it shows in a
  step that would otherwise train with fewer FLOPs than the student alone.

  Args:
    step: of the method.
    alone: FLOPs of the student's own step.
  """
  whole, to_taps = step.teacher_flops
  return whole if step.flops - whole >= 0.99 * alone else to_taps


def benchmark(
  run: Run, names: Sequence[str], *, runs: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
  """Costs and times of every method.

  Returns:
    One dict per measured method, `name`, `flops`, `teacher_flops`,
    `median_ms`, `low_ms`, `high_ms`, `expected_ms`, `ratio` (of median and
    expected) and `processor_ratio` (the same for the processor's time, None
    where the devices are no CPUs); and name -> reason for the others.
  """
  steps, left_out = {}, {}
  for name in dict.fromkeys((*REFERENCES, *names)):
    try:
      steps[name] = compile_step(run, name)
      print(f'{name}: {steps[name].flops / 1e9:.3f} GFLOP', flush=True)
    except ValueError as e:
      left_out[name] = str(e)
      print(f'{name}: not measured, {e}', flush=True)
  times, spent = turns.in_turns(
    {name: step.once for name, step in steps.items()},
    runs=runs,
    clock=time.process_time,
  )
  elapsed = {name: times[name]['median_ms'] for name in steps}
  processor = {name: float(np.median(s)) for name, s in spent.items()}
  alone = steps['alone'].flops
  forward = {name: teacher_flops(s, alone) for name, s in steps.items()}

  def expected(name, spent):
    trained = (steps[name].flops - forward[name]) / alone
    taught = forward[name] / forward['kd']
    return spent['alone'] * trained + (spent['kd'] - spent['alone']) * taught

  rows = []
  for name, step in steps.items():
    row = {'name': name, 'flops': step.flops, 'teacher_flops': forward[name]}
    row |= times[name] | {'expected_ms': expected(name, elapsed)}
    row['ratio'] = row['median_ms'] / row['expected_ms']
    row['processor_ratio'] = None
    if jax.default_backend() == 'cpu':
      row['processor_ratio'] = processor[name] / expected(name, processor)
    rows.append(row)
  return rows, left_out


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """A Markdown table of the rows of `benchmark`."""
  lines = [
    "| method | GFLOP | teacher's | ms, median (quartiles) | time / KD | "
    'expected / KD | time / expected | processor time / expected |',
    '| --- ' + '| ---: ' * 7 + '|',
  ]
  kd = next(row['median_ms'] for row in rows if row['name'] == 'kd')
  for row in rows:
    processor = row['processor_ratio']
    processor = '-' if processor is None else f'{processor:.2f}'
    title = methods.METHODS[row['name']].title
    lines.append(
      f'| {title} (`{row["name"]}`) | {row["flops"] / 1e9:.4g} '
      f'| {row["teacher_flops"] / 1e9:.4g} | {row["median_ms"]:.1f} '
      f'({row["low_ms"]:.1f} to {row["high_ms"]:.1f}) '
      f'| {row["median_ms"] / kd:.2f} | {row["expected_ms"] / kd:.2f} '
      f'| {row["ratio"]:.2f} | {processor} |'
    )
  return '\n'.join(lines)


def notes(
  run: Run, rows: Sequence[Mapping[str, Any]], left_out: Mapping[str, str]
) -> list[str]:
  """How the numbers were made."""
  c = run.config
  teacher, student = (
    json.dumps(part.model.to_dict()) for part in (c.teacher, c.student)
  )
  shape = 'x'.join(map(str, run.transfer.image_shape))
  above = {
    key: ', '.join(r['name'] for r in rows if (r[key] or 0) > 1.1) or 'none'
    for key in ('ratio', 'processor_ratio')
  }
  return [
    'Above 1.10 times what is expected of their FLOPs, in time: '
    f'{above["ratio"]}; in processor time: {above["processor_ratio"]}.',
    f'Teacher {teacher}, student {student}, {shape} images of '
    f'{run.transfer.num_classes} classes, batch {c.distill.train.batch_size}, '
    f'optimizer {c.distill.train.optimizer.name}.',
    "FLOPs: the compiler's cost analysis of the compiled step, which counts "
    'arithmetic and no memory traffic, and the body of a loop once.',
    f'Time: {rows[0]["runs"]} rounds after three that warm up; one round makes '
    'one step of every method in turn, in one process. Other processes on the '
    'machine lengthen it; they do not count in the processor time, the median '
    'sum over threads.',
    "Expected: the teacher's FLOPs at the rate of what KD adds to the student "
    'alone, all others at the rate of the student alone. FLOPs on the '
    "teacher's gradients count as training.",
    'Of a chain of students the first one is measured.',
    *(f'Not measured: {n}: {reason}' for n, reason in left_out.items()),
  ]


def main(argv: Sequence[str] | None = None) -> None:
  """Measures, prints, and writes the table."""
  parser = page.make_parser(__doc__)
  parser.add_argument(
    '--config',
    default=str(HERE),
    help='FILE or FILE:VARIANT with a get_config, for other networks and data',
  )
  parser.add_argument('--runs', type=int, default=30, help='rounds of timing')
  parser.add_argument(
    '--methods', nargs='+', default=list(methods.METHODS), metavar='NAME'
  )
  args = parser.parse_args(argv)
  try:
    for name in args.methods:
      rules.choose('method', name, methods.METHODS)
  except ValueError as e:
    parser.error(str(e))
  run = open_run(load_config(args.config))
  rows, left_out = benchmark(run, args.methods, runs=args.runs)
  assert all(math.isfinite(row['ratio']) for row in rows)
  page.publish(
    args.out,
    [table(rows)],
    notes(run, rows, left_out),
    machine=page.machine(),
    command=page.command(__file__, argv),
  )


if __name__ == '__main__':
  main()
