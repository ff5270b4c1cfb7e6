"""Measures one recipe in kd_jax and in PyTorch, on twin networks.

  python benchmarks/pytorch_twin.py --seeds 3 --epochs 15 \\
      --out benchmarks/results/pytorch_twin.md

A small convolutional network learns the digits from its first step on pruned,
global magnitude along a cubic to 80 %, and with int8 fake-quant of weights per
output channel and of every layer's input. kd_jax does it with `prune.prune`,
`fake_quant_params` and `quantize_activations`, PyTorch with
`torch.nn.utils.prune` and `torch.ao.quantization.FakeQuantize`. Both start from
the same weights and see the same batches. It needs torch, the extra [parity].
"""

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import page
import torch
import turns
from torch import nn
from torch.ao import quantization
from torch.nn.utils import prune as torch_prune

import kd_jax
from kd_jax import adapters, data, deploy, models, optim, prune, quantize

WIDTHS = (16, 32, 64)
BATCH = 64
SPARSITY = 0.8
RATE, DECAY = 5e-3, 1e-2
# Steps between two prunings.
EVERY = 10


class Digits(NamedTuple):
  """Normalised images `[N, 8, 8, 1]` and labels of two splits."""

  train: tuple[np.ndarray, np.ndarray]
  test: tuple[np.ndarray, np.ndarray]

  def order(self, epochs: int, seed: int) -> np.ndarray:
    """The rows of every step, `[steps, BATCH]`."""
    rng, size = np.random.default_rng(seed), len(self.train[1])
    whole = size // BATCH * BATCH
    rows = [rng.permutation(size)[:whole] for _ in range(epochs)]
    return np.concatenate(rows).reshape(-1, BATCH)


def load(data_dir: str | None, max_examples: int | None = None) -> Digits:
  """The digits, normalised by the train split."""
  read = functools.partial(
    data.load_images, 'digits', data_dir=data_dir, validation=0.0
  )
  train, test = read('train', max_examples=max_examples), read('test')
  mean, std = train.statistics
  preprocess = data.make_preprocess(mean=mean, std=std)

  def normalised(split):
    batch = preprocess({'image': split.image}, train=False)
    return np.array(batch['image']), split.label

  return Digits(normalised(train), normalised(test))


class Outcome(NamedTuple):
  """What training gave.

  Attributes:
    accuracy: percent of the test split, fake-quantized.
    sparsity: share of zeros in the kernels.
    step: makes one more step.
  """

  accuracy: float
  sparsity: float
  step: Callable[[], Any]


def initial(seed: int) -> dict[str, Any]:
  """The variables that both start from."""
  example = {'image': jnp.zeros((1, 8, 8, 1))}
  model = models.CNN(10, widths=WIDTHS)
  return adapters.init_linen(model, jax.random.key(seed), example)


def train_jax(
  digits: Digits, order: np.ndarray, seed: int, *, compressed: bool
) -> Outcome:
  """The recipe, or plain training, in kd_jax."""
  forward = adapters.from_linen(models.CNN(10, widths=WIDTHS))
  variables, total = initial(seed), len(order)
  tx = optim.make_optimizer(
    'adamw',
    learning_rate=optim.make_schedule('cosine', peak=RATE, total_steps=total),
    l2=DECAY,
  )

  def params_fn(params):
    return params

  if compressed:
    rules = deploy.ACTIVATION_RULES
    forward = forward.intercepted(quantize.quantize_activations(rules))
    stats = quantize.init_quant_stats(
      forward, variables, {'image': digits.train[0][:1]}, rules
    )
    variables = {**variables, 'quant_stats': stats}
    params_fn = functools.partial(
      quantize.fake_quant_params, rules=deploy.WEIGHT_RULES
    )
    schedule = prune.cubic(SPARSITY, begin=0, end=total // 2, every=EVERY)
    tx = prune.prune(tx, schedule, [('.*/kernel', True)])
  objective = kd_jax.weighted_sum({'ce': (1.0, kd_jax.hard_labels())})
  step = jax.jit(
    kd_jax.make_train_step(forward, objective, tx, params_fn=params_fn),
    donate_argnums=0,
  )

  def batch(rows):
    return {'image': digits.train[0][rows], 'label': digits.train[1][rows]}

  state = kd_jax.init_state(forward, objective, tx, variables, batch(order[0]))
  rng = jax.random.key(seed)
  for rows in order:
    state, _ = step(state, batch(rows), rng)
  trained = {'params': params_fn(state.params), **state.model_state}
  logits = jax.jit(forward)(trained, {'image': digits.test[0]}).output
  report = prune.sparsity_report(state.params, [('.*/kernel', True)])

  def once():
    nonlocal state
    state, metrics = step(state, batch(order[0]), rng)
    return state, metrics

  return Outcome(
    100 * float(np.mean(logits.argmax(-1) == digits.test[1])),
    prune.total(report).sparsity,
    once,
  )


def _input_quant() -> quantization.FakeQuantize:
  return quantization.FakeQuantize(
    observer=quantization.MovingAverageMinMaxObserver,
    averaging_constant=0.01,
    quant_min=-128,
    quant_max=127,
    dtype=torch.qint8,
    qscheme=torch.per_tensor_affine,
  )


def _weight_quant() -> quantization.FakeQuantize:
  return quantization.FakeQuantize(
    observer=quantization.PerChannelMinMaxObserver,
    quant_min=-127,
    quant_max=127,
    dtype=torch.qint8,
    qscheme=torch.per_channel_symmetric,
    ch_axis=0,
  )


class QuantConv(nn.Conv2d):
  """A convolution whose input and weight are fake-quantized."""

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self.input_quant, self.weight_quant = _input_quant(), _weight_quant()

  def forward(self, x):
    weight = self.weight_quant(self.weight)
    return self._conv_forward(self.input_quant(x), weight, self.bias)


class QuantLinear(nn.Linear):
  """The same of a dense layer."""

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self.input_quant, self.weight_quant = _input_quant(), _weight_quant()

  def forward(self, x):
    weight = self.weight_quant(self.weight)
    return nn.functional.linear(self.input_quant(x), weight, self.bias)


class Pool(nn.Module):
  """The mean over positions, of a fake-quantized input if compressed."""

  def __init__(self, compressed: bool):
    super().__init__()
    self.input_quant = _input_quant() if compressed else nn.Identity()

  def forward(self, x):
    return self.input_quant(x).mean((2, 3))


def twin(variables: dict[str, Any], *, compressed: bool) -> nn.Sequential:
  """The network of `initial` in PyTorch, with its weights."""
  conv = QuantConv if compressed else nn.Conv2d
  linear = QuantLinear if compressed else nn.Linear
  layers, channels = [], 1
  for i, width in enumerate(WIDTHS):
    stride = 2 if i else 1
    layers += [
      conv(channels, width, 3, stride=stride, padding=1, bias=False),
      nn.BatchNorm2d(width),
      nn.ReLU(),
    ]
    channels = width
  model = nn.Sequential(*layers, Pool(compressed), linear(channels, 10))
  params = variables['params']
  with torch.no_grad():
    for i in range(len(WIDTHS)):
      kernel = np.array(params[f'conv{i + 1}']['kernel'])
      model[3 * i].weight.copy_(torch.from_numpy(kernel.transpose(3, 2, 0, 1)))
    head = params['head']
    model[-1].weight.copy_(torch.from_numpy(np.array(head['kernel']).T))
    model[-1].bias.copy_(torch.from_numpy(np.array(head['bias'])))
  return model


def train_torch(
  digits: Digits, order: np.ndarray, seed: int, *, compressed: bool
) -> Outcome:
  """The recipe, or plain training, in PyTorch."""
  model, total = twin(initial(seed), compressed=compressed), len(order)
  kernels = [
    (m, 'weight') for m in model if isinstance(m, (nn.Conv2d, nn.Linear))
  ]
  size = sum(m.weight.numel() for m, _ in kernels)
  decayed = [m.weight for m, _ in kernels]
  known = {id(p) for p in decayed}
  others = [p for p in model.parameters() if id(p) not in known]
  optimizer = torch.optim.AdamW(
    [
      {'params': decayed, 'weight_decay': DECAY},
      {'params': others, 'weight_decay': 0.0},
    ],
    lr=RATE,
  )
  cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
  loss_fn = nn.CrossEntropyLoss()
  schedule = prune.cubic(SPARSITY, begin=0, end=total // 2, every=EVERY)
  # The same shares as in kd_jax, known before the loop.
  targets = [float(s) for s in schedule(np.arange(total))]
  images = torch.from_numpy(digits.train[0].transpose(0, 3, 1, 2).copy())
  labels = torch.from_numpy(digits.train[1].astype(np.int64))

  def renew(share):
    zeros = sum(int((m.weight == 0).sum()) for m, _ in kernels)
    more = size - max(1, round(size * (1 - share))) - zeros
    if more > 0:
      torch_prune.global_unstructured(
        kernels, pruning_method=torch_prune.L1Unstructured, amount=more
      )

  def step(rows):
    optimizer.zero_grad()
    loss = loss_fn(model(images[rows]), labels[rows])
    loss.backward()
    optimizer.step()
    return loss

  model.train()
  for i, rows in enumerate(order):
    if compressed and targets[i] != (targets[i - 1] if i else 0.0):
      renew(targets[i])
    step(rows)
    cosine.step()
  model.eval()
  if compressed:
    model.apply(quantization.disable_observer)
  with torch.no_grad():
    test = torch.from_numpy(digits.test[0].transpose(0, 3, 1, 2).copy())
    found = model(test).argmax(-1).numpy()
  if compressed:
    model.apply(quantization.enable_observer)
  model.train()
  zeros = sum(int((m.weight == 0).sum()) for m, _ in kernels)
  return Outcome(
    100 * float(np.mean(found == digits.test[1])),
    zeros / size,
    lambda: step(order[0]),
  )


FORMS: dict[str, tuple[Callable[..., Outcome], bool]] = {
  'kd_jax, plain': (train_jax, False),
  'kd_jax, 80 % pruned and int8': (train_jax, True),
  'PyTorch, plain': (train_torch, False),
  'PyTorch, 80 % pruned and int8': (train_torch, True),
}


def benchmark(
  digits: Digits, *, seeds: int, epochs: int, runs: int
) -> list[dict[str, Any]]:
  """Accuracies and times of every form.

  Returns:
    One dict per form: `name`, over seeds the lists `accuracy`, `sparsity` and
    `seconds`, and `median_ms`, `low_ms` and `high_ms` of a step, in turns.
  """
  rows, steps = [], {}
  for name, (train, compressed) in FORMS.items():
    row = {'name': name, 'accuracy': [], 'sparsity': [], 'seconds': []}
    for seed in range(seeds):
      started = time.perf_counter()
      order = digits.order(epochs, seed)
      made = train(digits, order, seed, compressed=compressed)
      row['seconds'].append(time.perf_counter() - started)
      row['accuracy'].append(made.accuracy)
      row['sparsity'].append(made.sparsity)
    steps[name] = made.step
    rows.append(row)
  times, _ = turns.in_turns(steps, runs=runs)
  return [row | times[row['name']] for row in rows]


def table(rows: Sequence[dict[str, Any]]) -> str:
  """A Markdown table of the rows of `benchmark`."""
  lines = [
    '| | accuracy % | zeros % | ms a step, median (quartiles) | against plain '
    '| seconds, all steps |',
    '| --- ' + '| ---: ' * 5 + '|',
  ]
  for plain, row in zip(
    (rows[0], rows[0], rows[2], rows[2]), rows, strict=True
  ):
    accuracy = row['accuracy']
    spread = np.std(accuracy, ddof=len(accuracy) > 1)
    lines.append(
      f'| {row["name"]} | {np.mean(accuracy):.2f} ± {spread:.2f} '
      f'| {100 * np.mean(row["sparsity"]):.2f} | {row["median_ms"]:.2f} '
      f'({row["low_ms"]:.2f} to {row["high_ms"]:.2f}) '
      f'| {row["median_ms"] / plain["median_ms"]:.2f} '
      f'| {np.mean(row["seconds"]):.1f} |'
    )
  return '\n'.join(lines)


def notes(args: argparse.Namespace, digits: Digits) -> list[str]:
  """How the numbers were made."""
  return [
    f'CNN of {"-".join(map(str, WIDTHS))} channels, digits, '
    f'{len(digits.train[1])} images to train on, {len(digits.test[1])} to '
    f'test, batch {BATCH}, {args.epochs} epochs with labels, AdamW, '
    f'{args.seeds} seeds, mean ± standard deviation. The same initial '
    'weights and batches in both.',
    f'{SPARSITY:.0%} of all kernels by global magnitude, renewed every '
    f'{EVERY} steps of the first half. int8: weights per output channel, '
    'inputs by an exponential average of extremes. Accuracy is that of the '
    'fake-quantized network.',
    f'Steps: {args.runs} rounds in turns after three that warm up, masks '
    'held. kd_jax compiles its step; PyTorch runs eagerly, with '
    f'{torch.get_num_threads()} threads, as its modules for fake-quant and '
    'pruning come. Seconds of kd_jax have the compilation in them.',
  ]


def main(argv: Sequence[str] | None = None) -> None:
  """Measures, prints, and writes the table."""
  parser = page.make_parser(__doc__)
  parser.add_argument('--data_dir', help="TFDS's directory")
  parser.add_argument('--seeds', type=int, default=5)
  parser.add_argument('--epochs', type=int, default=20)
  parser.add_argument('--runs', type=int, default=200, help='rounds of timing')
  parser.add_argument('--train_examples', type=int, help='all if left')
  args = parser.parse_args(argv)
  digits = load(args.data_dir, args.train_examples)
  rows = benchmark(digits, seeds=args.seeds, epochs=args.epochs, runs=args.runs)
  page.publish(
    args.out,
    [table(rows)],
    notes(args, digits),
    machine=page.machine(('jax', 'flax', 'torch')),
    command=page.command(__file__, argv),
  )


if __name__ == '__main__':
  main()
