"""Measures a step of distillation against the loops that one would write.

  python benchmarks/step_time.py --out benchmarks/results/step_time.md

One process trains the same student from the same teacher, weights, batch and
losses in several ways, in turns: kd_jax's compiled step, also with the
teacher's logits read from the batch; the smallest loop in JAX that does the
same; and, where torch is installed, PyTorch in eager mode and compiled. The
first losses of all of them are compared before anything is timed. By default a
ResNet-56 teaches a ResNet-20 on random 32x32 images.
"""

import argparse
import importlib.util
import time
from collections.abc import Mapping, Sequence

import distil_step
import jax
import jax.numpy as jnp
import numpy as np
import page
import turns

from kd_jax import adapters
from kd_jax.report import measure

RECIPE = distil_step.Recipe()
OURS, CACHED = 'kd_jax', 'kd_jax, cached teacher'
JAX_LOOP = 'smallest loop in JAX'
EAGER, COMPILED = 'PyTorch, eager', 'PyTorch, torch.compile'
# Name -> what it is compared with and the most that the ratio may be, by
# platform.
GOALS = {
  'cpu': {OURS: ((JAX_LOOP, 1.03), (EAGER, 1.2)), CACHED: ((EAGER, 1.0),)},
  'gpu': {OURS: ((JAX_LOOP, 1.03), (EAGER, 1 / 1.5), (COMPILED, 1.0))},
}


def ways(
  pair: str,
  batch: Mapping[str, np.ndarray],
  dtype: str,
  *,
  torch_compile: bool = True,
  recipe: distil_step.Recipe = RECIPE,
) -> tuple[dict[str, distil_step.Way], distil_step.Problem]:
  """All ways to train a pair, by the names that the table gives them.

  Args:
    pair: a key of `distil_step.PAIRS`.
    batch: see `distil_step.Problem`.
    dtype: of JAX's computation; PyTorch is compared in float32 only.
    torch_compile: also with `torch.compile`, which takes a minute to begin.
    recipe: of all ways.

  Returns:
    `(ways, problem)`.

  Raises:
    AssertionError: if their second losses, after one step, differ.
  """
  shapes = distil_step.PAIRS[pair]
  teacher, student = (distil_step.module(shape, dtype) for shape in shapes)
  image = {'image': batch['image'][:1]}
  taught, start = (
    adapters.init_linen(m, jax.random.key(i), image)
    for i, m in enumerate((teacher, student))
  )
  problem = distil_step.Problem(teacher, student, taught, start, batch, recipe)
  twins = None
  if dtype == 'float32' and importlib.util.find_spec('torch'):
    import torch_step

    problem, twins = torch_step.twins(shapes, problem)
  made = {
    OURS: distil_step.ours(problem, cached=False),
    CACHED: distil_step.ours(problem, cached=True),
    JAX_LOOP: distil_step.smallest_loop(problem),
  }
  if twins is not None:
    made[EAGER] = torch_step.way(twins, problem)
    if torch_compile:
      made[COMPILED] = torch_step.way(twins, problem, compiled=True)
  second = {name: way.finish(way.step()) for name, way in made.items()}
  tolerance = 1e-3 if dtype == 'float32' else 5e-2
  np.testing.assert_allclose(
    list(second.values()), second[JAX_LOOP], rtol=tolerance, err_msg=str(second)
  )
  return made, problem


def times(
  made: Mapping[str, distil_step.Way], *, rounds: int, steps: int
) -> np.ndarray:
  """Seconds of a step, `[ways, rounds]`.

  In a round every way makes `steps` steps in a row, after one that is not
  counted: PyTorch's threads wait busily for a while after its step, which
  would slow the way that comes next.
  """
  seconds = np.zeros((len(made), rounds))
  for i in range(rounds):
    for k in np.random.default_rng(i).permutation(len(made)):
      way = list(made.values())[k]
      time.sleep(0.05)
      way.finish(way.step())
      began = time.perf_counter()
      for _ in range(steps):
        out = way.step()
      way.finish(out)
      seconds[k, i] = (time.perf_counter() - began) / steps
  return seconds


def flops(problem: distil_step.Problem) -> dict[str, float]:
  """Of one step, from the multiply-accumulates of layers: by part."""
  batch = problem.batch

  def of(model, variables):
    forward = adapters.from_linen(model)
    return 2 * measure.multiply_accumulates(
      lambda v, b: forward(v, b).output, variables, batch
    )

  # Backward: as much for the inputs' gradients and for the weights'.
  return {
    'teacher': of(problem.teacher, problem.taught),
    'student': 3 * of(problem.student, problem.start),
  }


def matmul_rate(dtype: str, size: int = 2048) -> float:
  """FLOPs a second of a square matrix product: what MFU is relative to.

  The most of 30 runs: a peak is not lower because something else ran.
  """
  x = jnp.ones((size, size), dtype)
  product = jax.jit(lambda x: x @ x)
  _, spent = turns.in_turns({'product': lambda: product(x)}, runs=30)
  return 2 * size**3 / spent['product'].min()


def table(
  made: Mapping[str, distil_step.Way],
  seconds: np.ndarray,
  spent: Mapping[str, float],
  rate: float,
) -> str:
  """A Markdown table."""
  names = list(made)
  compared = [n for n in (JAX_LOOP, EAGER, COMPILED) if n in names]
  heads = ''.join(f'| time / {name} ' for name in compared)
  lines = [
    f'| step | ms, median (quartiles) {heads}| MFU | first step, s |',
    '| --- ' + '| ---: ' * (3 + len(compared)) + '|',
  ]
  goals = GOALS.get(jax.default_backend(), {})
  for k, name in enumerate(names):
    low, median, high = 1e3 * np.percentile(seconds[k], [25, 50, 75])
    row = f'| {name} | {median:.1f} ({low:.1f} to {high:.1f}) '
    for other in compared:
      if other == name:
        row += '| - '
        continue
      ratio = seconds[k] / seconds[names.index(other)]
      low, middle, high = np.percentile(ratio, [25, 50, 75])
      row += f'| {middle:.2f} ({low:.2f} to {high:.2f})'
      for against, goal in goals.get(name, ()):
        if against == other:
          met = 'met' if middle <= goal else 'not met'
          row += f', goal {goal:.2f} {met}'
      row += ' '
    work = spent['student'] + (0 if name == CACHED else spent['teacher'])
    row += f'| {work / (1e-3 * median) / rate:.1%} '
    lines.append(row + f'| {made[name].seconds:.1f} |')
  return '\n'.join(lines)


def notes(
  args: argparse.Namespace, spent: Mapping[str, float], rate: float
) -> list[str]:
  """How the numbers were made; `spent` and `rate` as in `table`."""
  total = sum(spent.values())
  return [
    f'{args.pair}; batch {args.batch} of {args.size}x{args.size}x3 random '
    f'images, {distil_step.CLASSES} classes, on the device; {args.dtype}; SGD '
    'with momentum and weight decay; soft targets and labels. PyTorch has its '
    'images and weights in channels-last order.',
    f'A step has {total / 1e9:.1f} GFLOP, of which the teacher has '
    f'{spent["teacher"] / total:.0%}: without it a step could take '
    f'{spent["student"] / total:.2f} of the time.',
    f'MFU: these FLOPs over those that a {args.dtype} matrix product of '
    f"2048x2048 by JAX makes in a step's time, at best {rate / 1e9:.0f} "
    'GFLOP/s.',
    f'{args.rounds} rounds; in each, every way makes one step that is not '
    f'counted and then {args.steps} in a row, in random order. Ratios are '
    'taken in each round; goals are compared with their median.',
  ]


def main(argv: Sequence[str] | None = None) -> None:
  """Measures, prints, and writes the table."""
  parser = page.make_parser(__doc__)
  parser.add_argument(
    '--pair', choices=[*distil_step.PAIRS], default='resnet56/resnet20'
  )
  parser.add_argument('--size', type=int, default=32, help='of the images')
  parser.add_argument('--batch', type=int, default=64)
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--steps', type=int, default=5, help='of a round')
  parser.add_argument(
    '--dtype', choices=['float32', 'bfloat16'], default='float32'
  )
  parser.add_argument(
    '--torch_compile', action=argparse.BooleanOptionalAction, default=True
  )
  args = parser.parse_args(argv)
  made, problem = ways(
    args.pair,
    distil_step.random_batch(args.batch, args.size),
    args.dtype,
    torch_compile=args.torch_compile,
  )
  seconds = times(made, rounds=args.rounds, steps=args.steps)
  spent, rate = flops(problem), matmul_rate(args.dtype)
  packages = ['jax', 'flax', *(['torch'] if EAGER in made else [])]
  page.publish(
    args.out,
    [table(made, seconds, spent, rate)],
    notes(args, spent, rate),
    machine=page.machine(packages),
    command=page.command(__file__, argv),
  )


if __name__ == '__main__':
  main()
