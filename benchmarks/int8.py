"""Measures float32, fake-quant and integer execution of one network.

  python benchmarks/int8.py --out benchmarks/results/int8.md

One process compiles every form of a small convolutional network with random
weights and times them in turns: the float32 network with BatchNorm folded, its
fake-quant twin, the integers of `quantize.convert` with each way to run
convolutions, and the ONNX file of the same integers in onnxruntime where that
is installed. A second table has the ways to run single convolutions.
"""

import argparse
import functools
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import page
import turns
from flax import linen as nn

from kd_jax import adapters, deploy, models, parity, quantize
from kd_jax.export import onnx
from kd_jax.quantize import convolutions as integer
from kd_jax.quantize import products
from kd_jax.quantize.convolution_ways import fastest
from kd_jax.report import measure

WEIGHTS = [('.*/kernel', quantize.INT8_WEIGHTS)]
ACTIVATIONS = [('.*', quantize.INT8_ACTIVATIONS)]
REFERENCE = 'float32'
WAYS = ('auto', 'direct', 'im2col', 'float32')
# How much faster the default way shall be, batch 16, on a CPU with VNNI and
# JAX 0.12 or newer.
GOAL = 2.0


def forms(
  widths: Sequence[int], size: int, batch: int
) -> tuple[dict[str, Callable[[Any], Any]], np.ndarray]:
  """Every form of the network, and images.

  Args:
    widths: channels of its convolutions; all but the first halve the image.
    size: height and width of the images.
    batch: how many.

  Returns:
    name -> `(images) -> logits`, compiled by the first call; and the images.
  """
  rng = np.random.default_rng(0)
  images = rng.normal(size=(batch, size, size, 3)).astype(np.float32)
  example = {'image': images}
  model = models.CNN(10, widths=tuple(widths))
  variables = adapters.init_linen(model, jax.random.key(0), example)
  # BatchNorm as after training, to some statistics.
  variables = jax.tree.map(
    lambda v: v + 0.1 * rng.random(v.shape, np.float32), variables
  )
  folded = deploy.fold(model, variables, example)
  skip = quantize.skip_folded_batch_norms
  observed = quantize.quantize_activations(ACTIVATIONS)
  plain = adapters.from_linen(model, interceptors=(skip,))
  fake = adapters.from_linen(
    model, interceptors=(skip, observed), train_argument=None
  )
  observe = jax.jit(lambda v, b: fake(v, b, train=True).model_state)
  folded = {**folded, **observe(folded, example)}
  integers = quantize.convert(folded, WEIGHTS, ACTIVATIONS)
  rounded = jax.jit(
    lambda v: v | {'params': quantize.fake_quant_params(v['params'], WEIGHTS)}
  )(folded)
  found = {
    REFERENCE: _compiled(plain, folded),
    'fake-quant': _compiled(fake, rounded),
  }
  for way in WAYS:
    forward = deploy.integer_forward(model, convolution=way)
    found[f'integer, {way}'] = _compiled(forward, integers)
  if util.find_spec('onnx') and util.find_spec('onnxruntime'):
    found['onnxruntime int8'] = _in_onnxruntime(model, integers, images)
  return found, images


def _compiled(forward, variables):
  run = jax.jit(lambda v, x: forward(v, {'image': x}).output)
  return lambda images: run(variables, images)


def _in_onnxruntime(model, integers, images):
  forward = deploy.integer_forward(model, simulate=True)
  image = jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32)
  with tempfile.TemporaryDirectory() as folder:
    path = onnx.export_onnx(
      lambda x: forward(integers, {'image': x}).output,
      image,
      pathlib.Path(folder) / 'model.onnx',
    )
    return onnx.load_onnx(path)


def convolutions(*, runs: int) -> str:
  """A Markdown table of the ways to run single convolutions on codes."""
  shapes = {
    '16x34x34x3 -> 64': ((16, 34, 34, 3), 64, 3, 1, 1),
    '16x34x34x64 -> 64': ((16, 34, 34, 64), 64, 3, 1, 1),
    '16x18x18x128 -> 256, by 2': ((16, 18, 18, 128), 256, 3, 2, 1),
    '16x16x16x128 -> 128, 1x1': ((16, 16, 16, 128), 128, 1, 1, 1),
    '4x18x18x64, depthwise': ((4, 18, 18, 64), 64, 3, 1, 64),
    '1x34x34x64 -> 64': ((1, 34, 34, 64), 64, 3, 1, 1),
  }
  rng = np.random.default_rng(0)
  lines = [
    '| convolution, 3x3 if not 1x1 | int8, direct | im2col | float32 | auto |',
    '| --- ' + '| ---: ' * 3 + '| --- |',
  ]
  for name, (shape, features, size, stride, groups) in shapes.items():
    channels = shape[-1] // groups
    x, w = (
      jnp.asarray(rng.integers(-127, 128, s), jnp.int8)
      for s in (shape, (size, size, channels, features))
    )
    layer = nn.Conv(
      features,
      (size, size),
      strides=stride,
      padding='VALID',
      feature_group_count=groups,
    )
    run = {
      way: jax.jit(
        functools.partial(_codes_convolved, layer, scale=1.0, way=way)
      )
      for way in ('direct', 'im2col')
    }
    calls = {way: functools.partial(fn, x, w) for way, fn in run.items()}
    floats = x.astype(jnp.float32), w.astype(jnp.float32)
    calls['float32'] = functools.partial(
      jax.jit(lambda x, w, layer=layer: integer.of_layer(layer, x, w)), *floats
    )
    times, _ = turns.in_turns(calls, runs=runs)
    best = ' | '.join(f'{times[way]["low_ms"]:.2f}' for way in calls)
    lines.append(f'| {name} | {best} | {fastest(w, groups)} |')
  return '\n'.join(lines)


def _codes_convolved(layer, x, w, *, scale, way):
  scale = jnp.full((1, 1, 1, w.shape[-1]), scale)
  codes = products.Codes(x, jnp.float32(1)), products.Codes(w, scale)
  return integer.product(layer, *codes, None, way=way)


def benchmark(
  found: Mapping[str, Callable[[Any], Any]], images: np.ndarray, *, runs: int
) -> list[dict[str, Any]]:
  """Times and errors of every form.

  Returns:
    One dict per form: `name`, `median_ms`, `low_ms`, `high_ms`, `speedup` over
    float32, `row_ms` and `row_speedup` for the same form many times in a row,
    whose memory is warm, and `sqnr_db` of its logits against float32.
  """
  times = measure.latencies(found, images, runs=runs)
  in_a_row = {
    name: measure.latencies({name: run}, images, runs=runs)[name]['median_ms']
    for name, run in found.items()
  }
  rows = []
  for name, run in found.items():
    error = parity.compare(
      lambda b, run=run: run(b['image']),
      lambda b: found[REFERENCE](b['image']),
      [{'image': images}],
    )
    row = {'name': name, **times[name], 'sqnr_db': error.sqnr_db}
    row['speedup'] = times[REFERENCE]['median_ms'] / row['median_ms']
    row['row_ms'] = in_a_row[name]
    row['row_speedup'] = in_a_row[REFERENCE] / in_a_row[name]
    rows.append(row)
  return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """A Markdown table of the rows of `benchmark`."""
  lines = [
    '| form | ms in turns, median (quartiles) | speed / float32 | '
    'ms in a row | speed / float32 | SQNR dB |',
    '| --- ' + '| ---: ' * 5 + '|',
  ]
  for row in rows:
    error = '-' if row['name'] == REFERENCE else f'{row["sqnr_db"]:.1f}'
    lines.append(
      f'| {row["name"]} | {row["median_ms"]:.2f} ({row["low_ms"]:.2f} to '
      f'{row["high_ms"]:.2f}) | {row["speedup"]:.2f} | {row["row_ms"]:.2f} '
      f'| {row["row_speedup"]:.2f} | {error} |'
    )
  return '\n'.join(lines)


def notes(
  args: argparse.Namespace,
  images: np.ndarray,
  rows: Sequence[Mapping[str, Any]],
) -> list[str]:
  """How the numbers were made, and whether the goal is met."""
  shape = 'x'.join(map(str, images.shape))
  widths = '-'.join(map(str, args.widths))
  auto = next(r for r in rows if r['name'] == 'integer, auto')
  return [
    f'Goal: "integer, auto" at least {GOAL} times as fast as float32, for '
    'batch 16 on a CPU with VNNI and JAX 0.12 or newer: here, '
    f'{auto["speedup"]:.2f} times in turns, {auto["row_speedup"]:.2f} in a '
    'row.',
    'The three ways to run convolutions on codes give the same integers. '
    '`float32` convolves codes in float32 where that is exact, and is im2col '
    'where a sum has 1033 products or more. `auto`, the default, chooses '
    'for each layer. SQNR: of the logits, against float32.',
    f'3x3 convolutions of {widths} channels, the first at full resolution, '
    f'the others with stride 2, then pooling and 10 classes; {shape} float32 '
    'images.',
    'Single convolutions: milliseconds, the lower quartile; their inputs '
    'are padded already. float32 is the convolution of real numbers; the '
    'last column is what `auto` chooses here.',
    f'In turns: {args.runs} rounds after three that warm up; one round '
    'runs every form once, in an order of its own, in one process, so that '
    "a form finds the caches full of another's arrays. In a row: as often, "
    'one form after the other. Read the ratios where other jobs run.',
  ]


def main(argv: Sequence[str] | None = None) -> None:
  """Measures, prints, and writes the table."""
  parser = page.make_parser(__doc__)
  parser.add_argument('--widths', type=int, nargs='+', default=(64, 128, 256))
  parser.add_argument('--size', type=int, default=32, help='of the images')
  parser.add_argument('--batch', type=int, default=16)
  parser.add_argument('--runs', type=int, default=50, help='rounds of timing')
  args = parser.parse_args(argv)
  found, images = forms(args.widths, args.size, args.batch)
  rows = benchmark(found, images, runs=args.runs)
  packages = ['jax', 'flax']
  packages += ['onnxruntime'] if 'onnxruntime int8' in found else []
  page.publish(
    args.out,
    [table(rows), convolutions(runs=args.runs)],
    notes(args, images, rows),
    machine=page.machine(packages),
    command=page.command(__file__, argv),
  )


if __name__ == '__main__':
  main()
