"""Measures what a teacher cache saves of a train step, and what it costs.

  python benchmarks/teacher_cache.py --out benchmarks/results/teacher_cache.md

For each pair of networks one process compiles the step of plain KD with the
live teacher, with its outputs from a cache in several forms, and the student's
step without a teacher, and times all of them in turns, batches read from the
cache included. Beside the ratio is the bound that FLOPs set,
(student's forward and backward + teacher's forward) / (student's forward and
backward), by the compiler's count and by the layers' own. By default the pairs
of `configs/cifar100_resnet56_resnet20.py` and `_resnet32x4_resnet8x4.py`, on
random 32x32 images in batches of 64.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import page
import turns

import kd_jax
from kd_jax import adapters, data, models, optim
from kd_jax.report import measure

PAIRS = {
  'resnet56 -> resnet20': ({'name': 'resnet56'}, {'name': 'resnet20'}),
  'resnet32x4 -> resnet8x4': ({'name': 'resnet32x4'}, {'name': 'resnet8x4'}),
  'tiny': ({'name': 'mlp', 'hidden': (64,)}, {'name': 'mlp', 'hidden': (4,)}),
}
FORMS = {
  'cached, float16': data.Form(),
  'cached, float32': data.Form('float32'),
  'cached, top 10': data.Form(top_k=10),
}
LIVE, ALONE = 'live teacher', 'no teacher'
CLASSES = 100


class Step(NamedTuple):
  """A way to make a step.

  Attributes:
    once: makes the next step, its batch included.
    flops: of the step, by the compiler.
    row_bytes: on disk, of one example and epoch; 0 without a cache.
  """

  once: Callable[[], Any]
  flops: float
  row_bytes: int


def make_images(count: int, size: int) -> data.ImageData:
  """Random images."""
  rng = np.random.default_rng(0)
  return data.ImageData(
    image=rng.integers(0, 256, (count, size, size, 3), np.uint8),
    label=rng.integers(0, CLASSES, count, np.int32),
    id=np.arange(count, dtype=np.int32),
    class_names=tuple(map(str, range(CLASSES))),
  )


def make_steps(
  pair: str, images: data.ImageData, batch_size: int, directory: str
) -> dict[str, Step]:
  """The steps of a pair, compiled, by the names that the table gives them.

  Args:
    pair: one of `PAIRS`.
    images: to train on, an epoch of which is cached in every form.
    batch_size: of the step.
    directory: where caches are written.
  """
  modules = [models.make_model(**o, num_classes=CLASSES) for o in PAIRS[pair]]
  teacher_fn, student_fn = map(adapters.from_linen, modules)
  preprocess = data.make_preprocess(
    mean=(0.5,) * 3, std=(0.25,) * 3, crop_padding=4, flip=True
  )
  example = preprocess(images.read([0]), train=False)
  teacher, student = (
    adapters.init_linen(module, jax.random.key(i), example)
    for i, module in enumerate(modules)
  )
  make = functools.partial(
    _step, preprocess, student_fn, student, images, batch_size
  )
  steps = {LIVE: make(teacher_fn, teacher), ALONE: make(None, None)}
  for name, form in FORMS.items():
    path = f'{directory}/{pair}/{name}'
    data.write_cache(
      path,
      teacher_fn,
      teacher,
      images,
      preprocess,
      fingerprint=data.make_fingerprint(
        teacher, images, network=PAIRS[pair][0], augmentation={'seed': 0}
      ),
      seed=0,
      epochs=1,
      form=form,
      batch_size=batch_size,
      say=lambda line: None,
    )
    cache = data.TeacherCache(path)
    steps[name] = make(cache.forward, {}, cache)
  return steps


def _step(
  preprocess,
  student_fn,
  student,
  images,
  batch_size,
  teacher_fn,
  teacher,
  cache=None,
) -> Step:
  terms = {'ce': (0.1, kd_jax.hard_labels())}
  if teacher_fn is not None:
    terms['kd'] = (0.9, kd_jax.soft_targets(temperature=4.0))
  objective = kd_jax.weighted_sum(terms)
  tx = optim.make_optimizer('momentum', learning_rate=0.05, l2=5e-4)
  pure = kd_jax.make_train_step(
    student_fn, objective, tx, teacher_fn=teacher_fn
  )

  def raw_step(state, batch, rng):
    return pure(state, preprocess(batch, train=True), rng)

  example = preprocess(images.read([0]), train=False)
  example |= cache.placeholder() if cache else {}
  state = kd_jax.init_state(
    student_fn,
    objective,
    tx,
    student,
    example,
    teacher_fn=teacher_fn,
    teacher=teacher,
  )

  def epochs():
    # Each epoch the same one, which is in the cache.
    while True:
      batches = data.train_batches(
        images, batch_size=batch_size, seed=0, epochs=1
      )
      yield from batches if cache is None else cache.attach(batches)

  endless, rng = epochs(), jax.random.key(0)
  jitted = jax.jit(raw_step, donate_argnums=0)
  run = jitted.lower(state, next(endless), rng).compile()

  def once():
    nonlocal state
    state, metrics = run(state, next(endless), rng)
    return state, metrics

  row_bytes = cache.manifest['row_bytes'] if cache else 0
  return Step(once, _flops(run), row_bytes)


def _flops(compiled) -> float:
  cost = compiled.cost_analysis()
  cost = cost[0] if isinstance(cost, list) else cost
  return float(cost.get('flops', 0.0))


def counted_bound(pair: str, size: int) -> float:
  """The bound by the layers' own multiply-accumulates.

  The student's backward pass is counted as twice its forward pass.
  """
  counts = []
  for options in PAIRS[pair]:
    module = models.make_model(**options, num_classes=CLASSES)
    batch = {'image': np.zeros((1, size, size, 3), np.float32)}
    variables = adapters.init_linen(module, jax.random.key(0), batch)
    forward = adapters.from_linen(module)
    counts.append(measure.multiply_accumulates(forward, variables, batch))
  teacher, student = counts
  return (3 * student + teacher) / (3 * student)


def rows_of(
  pair: str, steps: Mapping[str, Step], *, runs: int, size: int
) -> list[dict[str, Any]]:
  """One dict for each step of a pair.

  Returns:
    Each with `pair`, `name`, `ms` and `speedup`, quartiles of the time and of
    the live step's time over it in the same round; `bound` and `counted`, the
    bounds by the compiler's FLOPs and by multiply-accumulates; `row_bytes`.
  """
  calls = {name: step.once for name, step in steps.items()}
  _, seconds = turns.in_turns(calls, runs=runs)
  counted = counted_bound(pair, size)
  return [
    {
      'pair': pair,
      'name': name,
      'ms': np.percentile(1e3 * seconds[name], [25, 50, 75]),
      'speedup': np.percentile(seconds[LIVE] / seconds[name], [25, 50, 75]),
      'bound': steps[LIVE].flops / steps[ALONE].flops,
      'counted': counted,
      'row_bytes': step.row_bytes,
    }
    for name, step in steps.items()
  ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """A Markdown table of the rows of `rows_of`."""
  lines = [
    '| pair | step | ms, median (quartiles) | live / this (quartiles) | FLOP '
    'bound, compiled | counted | bytes an example and epoch |',
    '| --- | --- ' + '| ---: ' * 5 + '|',
  ]
  for row in rows:
    low, median, high = row['ms']
    slow, ratio, fast = row['speedup']
    lines.append(
      f'| {row["pair"]} | {row["name"]} | {median:.2f} ({low:.2f} to '
      f'{high:.2f}) | {ratio:.3f} ({slow:.3f} to {fast:.3f}) '
      f'| {row["bound"]:.3f} | {row["counted"]:.3f} '
      f'| {row["row_bytes"] or "-"} |'
    )
  return '\n'.join(lines)


def notes(args: argparse.Namespace) -> list[str]:
  """How the numbers were made."""
  return [
    f'Batch {args.batch} of {args.size}x{args.size}x3 random images with '
    f'crops and mirroring, {CLASSES} classes; SGD; KD at T = 4 and labels; '
    'networks with random weights. "No teacher" learns the labels alone.',
    'FLOP bound: the live step over the step without a teacher; counted: '
    "(3 student's forwards + the teacher's) / 3 student's forwards, in "
    'multiply-accumulates.',
    f'{args.runs} rounds after three that warm up, each step once a round '
    'in a drawn order, in one process; ratios are taken in each round. Times '
    'include making the batch and reading the cache, from warm files.',
    'Bytes include the 4 of the id. All of them hold for every example of '
    'every epoch: 50,000 examples and 240 epochs are 12 million rows.',
  ]


def main(argv: Sequence[str] | None = None) -> None:
  """Measures, prints, and writes the table."""
  parser = page.make_parser(__doc__)
  pairs = [name for name in PAIRS if name != 'tiny']
  parser.add_argument('--pairs', nargs='+', choices=[*PAIRS], default=pairs)
  parser.add_argument('--size', type=int, default=32, help='of the images')
  parser.add_argument('--batch', type=int, default=64)
  parser.add_argument('--images', type=int, default=1024)
  parser.add_argument('--runs', type=int, default=50, help='rounds of timing')
  args = parser.parse_args(argv)
  images, rows = make_images(args.images, args.size), []
  for pair in args.pairs:
    with tempfile.TemporaryDirectory() as directory:
      steps = make_steps(pair, images, args.batch, directory)
      rows += rows_of(pair, steps, runs=args.runs, size=args.size)
  page.publish(
    args.out,
    [table(rows)],
    notes(args),
    machine=page.machine(),
    command=page.command(__file__, argv),
  )


if __name__ == '__main__':
  main()
