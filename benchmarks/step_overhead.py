"""Measures what quantization and pruning add to a train step.

  python benchmarks/step_overhead.py \\
      --out benchmarks/results/step_overhead_resnet.md

One process compiles the train step of one network plain, with fake-quant, with
pruning and with both, and times all of them in turns. The loss is the
cross-entropy of random labels, without a teacher: a teacher's forward pass
would make every ratio smaller. By default a ResNet-20 on random 32x32 images;
`--model vit` is a small vision transformer.
"""

import argparse
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import page
import turns

import kd_jax
from kd_jax import adapters, deploy, models, optim, prune, quantize, qwix

MODELS = {
  'resnet': {'name': 'resnet', 'depth': 20},
  'vit': {'name': 'vit', 'patch_size': 4, 'width': 96, 'depth': 4, 'heads': 3},
  'tiny': {'name': 'cnn', 'widths': (4, 8)},
}
WEIGHTS = deploy.WEIGHT_RULES
ACTIVATIONS = deploy.ACTIVATION_RULES
# A range for each image, which Qwix has too.
DYNAMIC = (('.*', quantize.QuantSpec(axis=0, dynamic=True)),)
# Without products inside of attention and residual sums, as other toolkits
# quantize.
LAYERS = (('.*/(scores|context|add.*)', None), *ACTIVATIONS)
PER_TENSOR = ((WEIGHTS[0][0], quantize.QuantSpec()),)
SPARSITY = 0.8
CLASSES = 10
REFERENCE = 'plain'
QAT, PRUNING = 'QAT int8', 'pruning, between two prunings'
# The most that a step may take, relative to the plain one.
GOALS = {QAT: 1.10, PRUNING: 1.05}


class Form(NamedTuple):
  """A way to train the network.

  Attributes:
    student_fn: the forward.
    variables: what it starts with.
    tx: the optimizer.
    params_fn: see `kd_jax.make_train_step`.
  """

  student_fn: Callable[..., Any]
  variables: Mapping[str, Any]
  tx: optax.GradientTransformation
  params_fn: Callable[..., Any] = lambda params: params


def forms(
  model: adapters.LinenModule, batch: Mapping[str, jax.Array]
) -> dict[str, Form]:
  """The ways to train a model, by the names that the table gives them.

  Args:
    model: any linen model; simulated folding is left out where no BatchNorm
      follows a layer.
    batch: `image` and `label`.
  """
  variables = adapters.init_linen(model, jax.random.key(0), batch)
  plain = adapters.from_linen(model)
  observed = plain.intercepted(quantize.quantize_activations(ACTIVATIONS))
  stats = quantize.init_quant_stats(observed, variables, batch, ACTIVATIONS)
  with_stats = {**variables, 'quant_stats': stats}
  tx = optim.make_optimizer('adamw', learning_rate=1e-3, l2=1e-2)
  rounded = functools.partial(quantize.fake_quant_params, rules=WEIGHTS)
  # Each is measured for less than 5000 steps.
  held = prune.cubic(SPARSITY, initial=0.5, begin=0, end=10000, every=5000)
  renewed = prune.cubic(SPARSITY, initial=0.5, begin=0, end=10000)
  pruned = functools.partial(prune.prune, tx, rules=[('.*/kernel', True)])
  found = {
    REFERENCE: Form(plain, variables, tx),
    QAT: Form(observed, with_stats, tx, rounded),
    'QAT int8, weights alone': Form(plain, variables, tx, rounded),
    'QAT int8, activations alone': Form(observed, with_stats, tx),
    PRUNING: Form(plain, variables, pruned(held)),
    'pruning, masks renewed': Form(plain, variables, pruned(renewed)),
    'QAT int8 and pruning': Form(observed, with_stats, pruned(held), rounded),
  }
  names = kd_jax.rules.leaf_names(stats)
  if any('/scores/' in name or '/add' in name for name in names):
    layers = plain.intercepted(quantize.quantize_activations(LAYERS))
    stats = quantize.init_quant_stats(layers, variables, batch, LAYERS)
    found['QAT int8, Conv and Dense only'] = Form(
      layers, {**variables, 'quant_stats': stats}, tx, rounded
    )
  norms = quantize.foldable_batch_norms(
    lambda i: plain.intercepted(i), variables, batch
  )
  if norms:

    def folding(variables, batch, rng, *, train):
      variables = quantize.simulate_folding(variables, norms, PER_TENSOR)
      return observed(variables, batch, rng, train=train)

    found['QAT int8, simulated folding'] = Form(folding, with_stats, tx)
  learned = plain.intercepted(quantize.learned_activations(ACTIVATIONS))
  params = quantize.init_learned_activations(
    learned, variables, batch, ACTIVATIONS
  )
  params = quantize.init_lsq_params(params, WEIGHTS)
  steps = functools.partial(quantize.lsq_params, rules=WEIGHTS)
  found['LSQ'] = Form(learned, {**variables, 'params': params}, tx, steps)
  dynamic = plain.intercepted(quantize.quantize_activations(DYNAMIC))
  found['QAT int8, dynamic ranges'] = Form(dynamic, variables, tx, rounded)
  if importlib.util.find_spec('qwix'):
    other = qwix.quantize_model(model, WEIGHTS, DYNAMIC)
    start = adapters.init_linen(other, jax.random.key(0), batch)
    found['the same by Qwix'] = Form(adapters.from_linen(other), start, tx)
  return found


def compiled(form: Form, batch: Mapping[str, jax.Array]) -> Callable[[], Any]:
  """A function that makes the next step."""
  objective = kd_jax.weighted_sum({'ce': (1.0, kd_jax.hard_labels())})
  train_step = kd_jax.make_train_step(
    form.student_fn, objective, form.tx, params_fn=form.params_fn
  )
  state = kd_jax.init_state(
    form.student_fn, objective, form.tx, form.variables, batch
  )
  rng = jax.random.key(0)
  run = jax.jit(train_step, donate_argnums=0).lower(state, batch, rng).compile()

  def once():
    nonlocal state
    state, metrics = run(state, batch, rng)
    return state, metrics

  return once


def benchmark(
  steps: Mapping[str, Callable[[], Any]], *, runs: int
) -> list[dict[str, Any]]:
  """Times of every step.

  Args:
    steps: name -> one step, with `REFERENCE` among them.
    runs: rounds of timing.

  Returns:
    One dict per step: `name`, `median_ms`, `low_ms`, `high_ms`, and `ratio`:
    the quartiles of its time over that of the plain step in the same round.
  """
  times, spent = turns.in_turns(steps, runs=runs)
  return [
    {
      'name': name,
      **times[name],
      'ratio': np.percentile(spent[name] / spent[REFERENCE], [25, 50, 75]),
    }
    for name in steps
  ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """A Markdown table of the rows of `benchmark`."""
  lines = [
    '| step | ms, median (quartiles) | time / plain (quartiles) | goal | met |',
    '| --- ' + '| ---: ' * 3 + '| --- |',
  ]
  for row in rows:
    low, median, high = row['ratio']
    goal = GOALS.get(row['name'])
    met = '-' if goal is None else 'yes' if median <= goal else 'no'
    lines.append(
      f'| {row["name"]} | {row["median_ms"]:.2f} ({row["low_ms"]:.2f} to '
      f'{row["high_ms"]:.2f}) | {median:.3f} ({low:.3f} to {high:.3f}) '
      f'| {"-" if goal is None else f"<= {goal:.2f}"} | {met} |'
    )
  return '\n'.join(lines)


def notes(args: argparse.Namespace) -> list[str]:
  """How the numbers were made."""
  words = ', '.join(f'{k} {v}' for k, v in MODELS[args.model].items())
  return [
    f'Network: {words}; batch {args.batch} of {args.size}x{args.size}x3 '
    'random images; AdamW, cross-entropy, no teacher.',
    'QAT int8: weights per output channel, the inputs of every layer by '
    'an exponential average of their extremes. Conv and Dense only: sums of '
    "branches and attention's products stay in float. LSQ: the steps of "
    'weights and inputs are learned. Simulated folding: weights per tensor; it '
    'needs a BatchNorm behind a layer.',
    f'Pruning: global magnitude to {SPARSITY:.0%} along a cubic. Masks are '
    'renewed at some steps only, in practice every tenth or hundredth.',
    f'{args.runs} rounds after three that warm up; one round makes one '
    'step of every form in turn, in one process. Ratios are taken in each '
    'round; goals are compared with their median.',
  ]


def main(argv: Sequence[str] | None = None) -> None:
  """Measures, prints, and writes the table."""
  parser = page.make_parser(__doc__)
  parser.add_argument('--model', choices=[*MODELS], default='resnet')
  parser.add_argument('--size', type=int, default=32, help='of the images')
  parser.add_argument('--batch', type=int, default=64)
  parser.add_argument('--runs', type=int, default=50, help='rounds of timing')
  args = parser.parse_args(argv)
  model = models.make_model(**MODELS[args.model], num_classes=CLASSES)
  rng = np.random.default_rng(0)
  shape = (args.batch, args.size, args.size, 3)
  batch = {
    'image': jnp.asarray(rng.normal(size=shape), jnp.float32),
    'label': jnp.asarray(rng.integers(0, CLASSES, args.batch), jnp.int32),
  }
  found = forms(model, batch)
  steps = {name: compiled(form, batch) for name, form in found.items()}
  page.publish(
    args.out,
    [table(benchmark(steps, runs=args.runs))],
    notes(args),
    machine=page.machine(),
    command=page.command(__file__, argv),
  )


if __name__ == '__main__':
  main()
