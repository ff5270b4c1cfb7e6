"""The compressed networks of `compression_accuracy.py`, by name."""

import dataclasses
import functools
from collections.abc import Callable

import compression_task
from compression_task import Task, Trained, Variables

from kd_jax import adapters, deploy, prune, quantize

Recipe = Callable[[Variables, int], Trained]
INT8 = deploy.WEIGHT_RULES
INT4 = tuple((p, dataclasses.replace(s, bits=4)) for p, s in INT8)
ACTIVATIONS = deploy.ACTIVATION_RULES
DYNAMIC = tuple(
  (p, dataclasses.replace(s, dynamic=True)) for p, s in ACTIVATIONS
)
KERNELS = (('.*/kernel', True),)
# Groups of four inputs; images have one to three channels.
GROUPED = (('(stem|patch|conv1)/kernel', None), *KERNELS)

# Small layers stay denser than large ones.
SCOPE = 'erk'

DENSE, CONTROL = 'dense', 'dense, trained longer'
TOGETHER, IN_TURN = '80 % pruned and int8, in one run', '80 % pruned, then int8'
CHANNELS = '50 % of channels removed'


class Recipes:
  """Makes recipes: `(variables of the dense network, seed) -> Trained`.

  Args:
    task: images and network.
    epochs: of what is trained.
  """

  def __init__(self, task: Task, epochs: int):
    self.task, self.epochs = task, epochs
    observe = quantize.quantize_activations(ACTIVATIONS)
    # One function each for all recipes, so that it is compiled once.
    self.plain = adapters.from_linen(task.model)
    self.observed = self.plain.intercepted(observe)
    self.integer = deploy.integer_forward(task.model)
    self.train = functools.partial(
      compression_task.trainer, task, epochs=epochs
    )

  def after_training(self, rules=INT8, activations=ACTIVATIONS) -> Recipe:
    """Integers without training."""
    forward = deploy.integer_forward(
      self.task.model, dynamic=activations if activations == DYNAMIC else ()
    )

    def recipe(dense, seed):
      integers = deploy.post_training_quantize(
        self.task.model,
        dense,
        self.task.calibration(),
        weight_rules=rules,
        activation_rules=activations,
      )
      return Trained(forward, integers)

    return recipe

  def adaround(self, steps: int) -> Recipe:
    """Integers without training, int4 weights rounded as AdaRound learns."""
    model = self.task.model

    def recipe(dense, seed):
      evaluation, batches = deploy.evaluation(model), [*self.task.calibration()]
      folded = deploy.fold(model, dense, self.task.example)
      stats = quantize.calibrate(evaluation, folded, batches, ACTIVATIONS)
      learned = quantize.adaround(
        evaluation,
        {**folded, 'quant_stats': stats},
        batches,
        INT4,
        ACTIVATIONS,
        steps=steps,
      )
      return Trained(self.integer, quantize.convert(learned, INT4, ACTIVATIONS))

    return recipe

  def floats(self, **options) -> Recipe:
    """Floats trained on; `options` of `compression_task.trainer`."""
    run = self.train(self.plain, **options)
    return lambda dense, seed: Trained(self.plain, run(dense, dense, seed))

  def integers(
    self, *, rules=INT8, before=lambda v, dense, seed: v, **options
  ) -> Recipe:
    """Integers trained with fake-quant, from what `before` makes."""
    rounded = functools.partial(quantize.fake_quant_params, rules=rules)
    run = self.train(self.observed, params_fn=rounded, **options)
    example = self.task.example

    def recipe(dense, seed):
      start = before(dense, dense, seed)
      stats = quantize.init_quant_stats(self.observed, start, example)
      trained = run({**start, 'quant_stats': stats}, dense, seed)
      folded = deploy.fold(self.task.model, trained, example)
      return Trained(self.integer, quantize.convert(folded, rules, ACTIVATIONS))

    return recipe

  def in_turn(self) -> Recipe:
    """Prunes, recovers and quantizes, in a third of the epochs each."""
    thirds = [self.epochs // 3 + (i < self.epochs % 3) for i in range(3)]
    parts = [
      self.train(self.plain, epochs=n, wrap=wrap, rewound=True)
      for n, wrap in zip(
        thirds[:2], (pruning(0.8, end=1.0), held(0.8)), strict=True
      )
    ]

    def before(variables, dense, seed):
      for i, part in enumerate(parts, start=1):
        variables = part(variables, dense, seed + 1000 * i)
      return variables

    return self.integers(before=before, wrap=held(0.8), epochs=thirds[2])

  def smaller(self, share: float) -> Recipe:
    """Removes a share of the units of every group, and trains."""

    def recipe(dense, seed):
      plan = prune.find_groups(self.plain, dense, self.task.example)
      scores = prune.magnitudes(dense['params'])
      kept = prune.choose_units(plan, scores, share, scope='layer')
      forward = prune.shrunk_forward(self.plain, plan, kept)
      small = prune.shrink(plan, dense, kept)
      train = self.train(forward, rewound=True)
      return Trained(forward, train(small, dense, seed))

    return recipe


def pruning(sparsity: float, *, end: float = 0.5, rules=KERNELS, **options):
  """A `wrap` that prunes along a cubic, up to a share of the steps."""

  def wrap(tx, total):
    last = max(1, round(end * total))
    every = max(1, last // 50)
    schedule = prune.cubic(sparsity, begin=0, end=last, every=every)
    return prune.prune(tx, schedule, rules, scope=SCOPE, **options)

  return wrap


def held(sparsity: float):
  """A `wrap` for weights that are as sparse already, which stay so."""
  constant = prune.constant(sparsity)
  return lambda tx, total: prune.prune(tx, constant, KERNELS, scope=SCOPE)


def recipes(task: Task, epochs: int, adaround_steps: int) -> dict[str, Recipe]:
  """The rows by name; see `Recipes`."""
  make = Recipes(task, epochs)
  return {
    CONTROL: make.floats(),
    'int8 static, PTQ': make.after_training(),
    'int8 dynamic, PTQ': make.after_training(activations=DYNAMIC),
    'int8 weights alone, PTQ': make.after_training(activations=()),
    'int4 weights alone, PTQ': make.after_training(INT4, activations=()),
    'int4 weights, PTQ': make.after_training(INT4),
    'int4 weights, PTQ, AdaRound': make.adaround(adaround_steps),
    'int8, QAT': make.integers(),
    'int4 weights, QAT': make.integers(rules=INT4),
    '80 % pruned': make.floats(wrap=pruning(0.8), rewound=True),
    '90 % pruned': make.floats(wrap=pruning(0.9), rewound=True),
    '2:4 pruned': make.floats(
      wrap=pruning(0.5, rules=GROUPED, structure=prune.n_m(2, 4)),
      rewound=True,
    ),
    CHANNELS: make.smaller(0.5),
    TOGETHER: make.integers(wrap=pruning(0.8), rewound=True),
    # Three trainings of whole epochs, together as long as the others.
    **({IN_TURN: make.in_turn()} if epochs >= 3 else {}),
  }
