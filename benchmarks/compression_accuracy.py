"""Measures what compression costs a trained network in accuracy.

  python benchmarks/compression_accuracy.py --dataset digits --model resnet \\
      --seeds 3 --out benchmarks/results/compression_digits_resnet.md

A dense network is trained once a seed. From it every row starts, and what is
trained again is taught by it, T = 4, with 0.9 of the loss and 0.1 for the
labels: the dense network itself, fake-quant, pruning, channels removed, and
these together. All of them train for the same number of epochs; what loses
weights starts with the dense network's learning rate again, after Renda,
Frankle, Carbin, 2020, arXiv:2003.02389. Rows of integers are executed on
integers. The test split is read for the table alone.
"""

import argparse
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import util
from typing import Any

import compression_task
import jax
import jax.numpy as jnp
import numpy as np
import page
from compression_rows import CHANNELS, DENSE, IN_TURN, TOGETHER, recipes
from compression_task import Task, Trained, Variables

import kd_jax
from kd_jax import adapters, prune, quantize
from kd_jax.export import onnx
from kd_jax.report import measure

LATENCY_BATCHES = (1, 32)
# Points of accuracy that a row may lose against the dense network.
GOALS = {
  'int8 static, PTQ': 0.5,
  'int8, QAT': 0.2,
  'int4 weights, QAT': 1.0,
  '80 % pruned': 0.5,
  '90 % pruned': 1.0,
  CHANNELS: 1.0,
}
SPEED_GOAL = 1.7


@functools.partial(jax.jit, static_argnums=0)
def _logits(forward, variables, images):
  return forward(variables, {'image': images}).output


def accuracy(trained: Trained, images: jax.Array, labels: np.ndarray) -> float:
  """Percent of the labels that are found."""
  found = [
    _logits(*trained, images[i : i + 500]).argmax(-1)
    for i in range(0, len(images), 500)
  ]
  return 100 * float(np.mean(np.concatenate(found) == labels))


def stored_bytes(variables: Variables) -> int:
  """Bytes of all arrays; zeros of kernels are left out where that is smaller.

  Such a kernel is stored as one bit a weight and the values that are not 0.
  """
  total = 0
  for name, leaf in kd_jax.rules.named_leaves(variables).items():
    sparse = -(-leaf.size // 8)
    sparse += int(jnp.count_nonzero(leaf)) * leaf.dtype.itemsize
    is_kernel = name.endswith('/kernel')
    total += min(leaf.nbytes, sparse) if is_kernel else leaf.nbytes
  return total


def speeds(
  dense: Trained, small: Trained, images: jax.Array
) -> dict[str, float]:
  """The latency of the dense network over that of a smaller one.

  Both with BatchNorm folded, each a hundred times in a row: onnxruntime's
  threads wait busily for a while and would slow whoever comes next.

  Returns:
    'batch <size>, <runtime>' -> ratio of medians.
  """
  networks = {
    name: _folded(trained, {'image': images[:1]})
    for name, trained in (('dense', dense), ('small', small))
  }
  runtimes = {'XLA': lambda network: functools.partial(_logits, *network)}
  if util.find_spec('onnx') and util.find_spec('onnxruntime'):
    runtimes['onnxruntime'] = functools.partial(_in_onnxruntime, images[:1])
  found = {}
  for runtime, make in runtimes.items():
    calls = {name: make(network) for name, network in networks.items()}
    for batch in LATENCY_BATCHES:
      some = np.asarray(images[:batch])
      dense_ms, small_ms = (
        measure.latencies({name: call}, some, runs=100)[name]['median_ms']
        for name, call in calls.items()
      )
      found[f'batch {batch}, {runtime}'] = dense_ms / small_ms
  return found


def _folded(trained: Trained, example: dict[str, jax.Array]) -> Trained:
  make = trained.forward.intercepted
  norms = quantize.foldable_batch_norms(make, trained.variables, example)
  return Trained(
    make(quantize.skip_folded_batch_norms),
    quantize.fold_batch_norm(trained.variables, norms),
  )


def _in_onnxruntime(image: jax.Array, network: Trained) -> Callable[..., Any]:
  with tempfile.TemporaryDirectory() as folder:
    path = onnx.export_onnx(
      lambda x: network.forward(network.variables, {'image': x}).output,
      jax.ShapeDtypeStruct(image.shape, image.dtype),
      pathlib.Path(folder) / 'model.onnx',
    )
    return onnx.load_onnx(path)


def benchmark(
  task: Task,
  *,
  seeds: int,
  epochs: int,
  dense_epochs: int,
  adaround_steps: int = 1000,
  names: Sequence[str] = (),
) -> list[dict[str, Any]]:
  """The dense network and rows made of it.

  Args:
    task: images and network.
    seeds: how many dense networks.
    epochs: of every row that trains.
    dense_epochs: of the dense networks.
    adaround_steps: of every layer.
    names: the rows, of `recipes`; all when empty.

  Returns:
    One dict per row: `name`, and over seeds the lists `accuracy` in percent,
    `bytes`, `seconds` and, of the dense network and where shapes change,
    `macs` of an image and `speed` (of `speeds`).
  """
  plain = adapters.from_linen(task.model)
  first = compression_task.trainer(
    task, plain, epochs=dense_epochs, taught=False, rewound=True
  )

  def train_dense(_, seed):
    start = adapters.init_linen(task.model, jax.random.key(seed), task.example)
    return Trained(plain, first(start, None, seed))

  found = recipes(task, epochs, adaround_steps)
  chosen = {name: kd_jax.rules.choose('row', name, found) for name in names}
  found = {DENSE: train_dense, **(chosen or found)}
  rows, dense = [], [{}] * seeds
  for name, recipe in found.items():
    row = {'name': name, 'accuracy': [], 'bytes': [], 'macs': [], 'speed': []}
    row['seconds'] = []
    for seed in range(seeds):
      started = time.perf_counter()
      trained = recipe(dense[seed], seed)
      row['accuracy'].append(accuracy(trained, *task.test))
      row['seconds'].append(time.perf_counter() - started)
      row['bytes'].append(stored_bytes(trained.variables))
      if name == DENSE:
        dense[seed] = trained.variables
      # Where shapes are those of the dense network, so is their number.
      if name in (DENSE, CHANNELS):
        costs = prune.layer_costs(*trained, task.example)
        row['macs'].append(sum(cost.macs for cost in costs))
      if name == CHANNELS:
        whole = Trained(plain, dense[seed])
        row['speed'].append(speeds(whole, trained, task.test[0]))
    rows.append(row)
    print(f'{name}: {_spread(row["accuracy"])} %', flush=True)
  return rows


def _spread(values: Sequence[float], sign: str = '') -> str:
  """Mean and, of several, standard deviation."""
  text = f'{np.mean(values):{sign}.2f}'
  return text if len(values) == 1 else f'{text} ± {np.std(values, ddof=1):.2f}'


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """A Markdown table of the rows of `benchmark`."""
  lines = [
    '| network | accuracy % | against dense | bytes | of dense % | MACs | '
    'seconds |',
    '| --- ' + '| ---: ' * 6 + '|',
  ]
  dense = rows[0]
  for row in rows:
    change = '-' if row is dense else _spread(_changes(row, dense), '+')
    size, macs = np.mean(row['bytes']), np.mean(row['macs'] or dense['macs'])
    lines.append(
      f'| {row["name"]} | {_spread(row["accuracy"])} | {change} '
      f'| {size:,.0f} | {100 * size / np.mean(dense["bytes"]):.1f} '
      f'| {macs:,.0f} | {np.mean(row["seconds"]):.0f} |'
    )
  return '\n'.join(lines)


def _changes(row: Mapping[str, Any], other: Mapping[str, Any]) -> list[float]:
  """Differences in accuracy, seed by seed."""
  return [
    a - b for a, b in zip(row['accuracy'], other['accuracy'], strict=True)
  ]


def verdicts(rows: Sequence[Mapping[str, Any]]) -> str:
  """What was aimed at, and whether the means over seeds reach it."""
  named = {row['name']: row for row in rows}
  lines = ['| goal | measured | met |', '| --- | ---: | --- |']

  def add(text, measured, met):
    lines.append(f'| {text} | {measured} | {"yes" if met else "no"} |')

  for name, limit in GOALS.items():
    if name not in named:
      continue
    change = float(np.mean(_changes(named[name], named[DENSE])))
    text = f'{name}: at most {limit} points lost'
    # Of binary fractions, 0.5 points may come out as a little more.
    add(text, f'{change:+.2f}', change >= -limit - 1e-9)
  measured = named[CHANNELS]['speed'] if CHANNELS in named else [{}]
  for where in measured[0]:
    ratios = [speed[where] for speed in measured]
    text = f'{CHANNELS}: {SPEED_GOAL} times lower latency, {where}'
    add(text, _spread(ratios), np.mean(ratios) >= SPEED_GOAL)
  if {TOGETHER, IN_TURN} <= {*named}:
    change = _changes(named[TOGETHER], named[IN_TURN])
    text = f'"{TOGETHER}" above "{IN_TURN}" at equal epochs'
    add(text, _spread(change, '+'), np.mean(change) > 0)
  return '\n'.join(lines)


def notes(
  args: argparse.Namespace, task: Task, dense_epochs: int, minutes: float
) -> list[str]:
  """How the numbers were made."""
  images, labels = task.test
  shape = 'x'.join(map(str, images.shape[1:]))
  options = compression_task.network_options(
    args.dataset, args.model, args.width
  )
  words = ', '.join(f'{k} {v}' for k, v in options.items())
  batches = min(compression_task.CALIBRATION, task.steps)
  return [
    f'{args.dataset}, {shape}: {len(task.train["id"]):,} images to train '
    f'on, {len(labels):,} to test; one of them is '
    f'{100 / len(labels):.2f} points. Network: {words}.',
    f'Seeds: {args.seeds}; mean and standard deviation; differences are '
    'taken seed by seed. Goals are compared with means.',
    f'Epochs: {dense_epochs} of the dense network with labels; in all rows '
    f'but PTQ {args.epochs} more, taught by it. Batch '
    f'{compression_task.BATCH}, AdamW, peak of the learning rate '
    f'{task.rates[0]:g} for the dense network and for what loses weights, '
    f'{task.rates[1]:g} for the rest. Pruned by magnitude, layer by layer to '
    f'Erdos-Renyi-Kernel densities. "{IN_TURN}" prunes, recovers and '
    f'quantizes in a third of them each. PTQ: {batches} batches without '
    f'labels, AdaRound {args.adaround_steps} steps a layer.',
    'Rows of integers are measured on integers, BatchNorm folded; their '
    'activations are int8, or float32 where weights alone are quantized. '
    'All layers are quantized, the first and the last too.',
    'Bytes: of all arrays; a pruned kernel as one bit a weight and its '
    'nonzero values. MACs: of one image, with zeros. Seconds: of one seed, '
    'compilation and the test included, mean over seeds.',
    f'{minutes:.0f} minutes in all.',
  ]


def make_parser() -> argparse.ArgumentParser:
  """The arguments."""
  parser = page.make_parser(__doc__)
  parser.add_argument(
    '--dataset', choices=[*compression_task.DATASETS], default='digits'
  )
  parser.add_argument('--data_dir', help="TFDS's directory")
  parser.add_argument(
    '--model', choices=[*compression_task.MODELS], default='resnet'
  )
  parser.add_argument('--width', type=int, help="the network's own if left")
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--epochs', type=int, default=30, help='of every row')
  parser.add_argument(
    '--dense_epochs', type=int, help='of the dense network; --epochs if left'
  )
  parser.add_argument(
    '--adaround_steps', type=int, default=1000, help='of every layer'
  )
  parser.add_argument(
    '--rows', nargs='+', default=(), metavar='NAME', help='all if left'
  )
  parser.add_argument('--train_examples', type=int, help='all if left')
  return parser


def main(argv: Sequence[str] | None = None) -> None:
  """Measures, prints, and writes the tables."""
  args = make_parser().parse_args(argv)
  started = time.perf_counter()
  task = compression_task.make_task(
    args.dataset,
    args.model,
    data_dir=args.data_dir,
    train_examples=args.train_examples,
    width=args.width,
  )
  dense_epochs = args.dense_epochs or args.epochs
  rows = benchmark(
    task,
    seeds=args.seeds,
    epochs=args.epochs,
    dense_epochs=dense_epochs,
    adaround_steps=args.adaround_steps,
    names=args.rows,
  )
  minutes = (time.perf_counter() - started) / 60
  page.publish(
    args.out,
    [table(rows), verdicts(rows)],
    notes(args, task, dense_epochs, minutes),
    machine=page.machine(),
    command=page.command(__file__, argv),
  )


if __name__ == '__main__':
  main()
