"""A trained linen model, quantized without further training.

Owns the order of folding, rescaling, calibration, rounding and correction; the
algorithms are `quantize`'s, and the forwards that run the result `forwards`'.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kd_jax import adapters, quantize
from kd_jax import rules as rules_lib
from kd_jax.deploy.forwards import Rules, evaluation
from kd_jax.quantize.stored import COLLECTION
from kd_jax.types import Batch, Variables, check_has, check_variables

WEIGHT_RULES: Rules = (('.*/kernel', quantize.INT8_WEIGHTS),)
ACTIVATION_RULES: Rules = (('.*', quantize.INT8_ACTIVATIONS),)


def calibrated(
  model: adapters.LinenModule,
  variables: Variables,
  batches: Iterable[Batch],
  *,
  weight_rules: Rules = WEIGHT_RULES,
  activation_rules: Rules = ACTIVATION_RULES,
  observer: quantize.Observer | None = None,
  weight_observer: quantize.Observer | None = None,
  equalize: bool = False,
  smooth: float | None = None,
  rounding: str = 'nearest',
  adaround_steps: int = 1000,
  correct: bool = False,
  interceptors: Sequence[adapters.Interceptor] = (),
  train_argument: str | None = 'train',
) -> dict[str, Any]:
  """A trained linen model prepared for integers, in float.

  The options run in the order of the arguments, after BatchNorm is folded;
  `correct` comes last because it removes the mean of what rounding left. For
  other settings call the functions of `quantize` with `evaluation(model)`.

  Args:
    model: the module.
    variables: its trained variables.
    batches: pre-processed batches to calibrate with; a few are enough.
    weight_rules: `(pattern, QuantSpec or None)` pairs on parameter paths.
    activation_rules: the same on layer paths.
    observer: how the ranges of activations are learned; `ema_min_max()` when
      None.
    weight_observer: how those of weights are chosen, see `fake_quant_params`.
    equalize: whether channels are rescaled, see `quantize.equalize`.
    smooth: alpha of `quantize.smooth`, or None to leave it out.
    rounding: 'nearest' or 'adaround', see `quantize.adaround`.
    adaround_steps: of each layer.
    correct: whether biases are corrected, see `quantize.correct_biases`.
    interceptors: others, as for `integer_forward`.
    train_argument: as for `evaluation`.

  Returns:
    What `quantize.convert` turns into integers and `parity.check_parity`
    compares them with: folded `params`, and `quant_stats` if there are
    activation rules.

  Raises:
    ValueError: without any batch, for one in place of several, for what `fold`
      refuses, an unknown rounding, or 'adaround' with a `weight_observer`.

  Example:
    >>> import jax.numpy as jnp
    >>> from kd_jax import models
    >>> model = models.make_model('mlp', num_classes=1, hidden=())
    >>> layer = {'kernel': jnp.ones((2, 1)), 'bias': jnp.zeros(1)}
    >>> batches = [{'image': jnp.array([[-1.0, 3.0]])}]
    >>> ready = calibrated(model, {'params': {'head': layer}}, batches)
    >>> seen = ready['quant_stats']['head']['input0']
    >>> float(seen['low']), float(seen['high'])
    (-1.0, 3.0)
  """
  learn = _learns_rounding(rounding, weight_observer)
  example, batches = _first_and_all(batches)
  if learn or correct or smooth is not None:
    batches = list(batches)
  make_forward = evaluation(
    model, interceptors=interceptors, train_argument=train_argument
  )
  rules = weight_rules, activation_rules
  variables = fold(
    model,
    variables,
    example,
    interceptors=interceptors,
    train_argument=train_argument,
  )
  if equalize:
    variables = quantize.equalize(make_forward(), variables, example)
  if smooth is not None:
    variables = quantize.smooth(make_forward, variables, batches, alpha=smooth)
  if any(spec is not None for _, spec in activation_rules):
    stats = quantize.calibrate(
      make_forward, variables, batches, activation_rules, observer=observer
    )
    variables = {**variables, 'quant_stats': stats}
  rounded = variables
  if learn:
    rounded = quantize.adaround(
      make_forward,
      variables,
      batches,
      *rules,
      observer=observer,
      steps=adaround_steps,
    )
  if correct:
    rounded = quantize.correct_biases(
      make_forward,
      variables,
      batches,
      *rules,
      rounded=rounded,
      observer=observer,
      weight_observer=weight_observer,
    )
  return rounded


def _learns_rounding(
  rounding: str, weight_observer: quantize.Observer | None
) -> bool:
  """Whether AdaRound is asked for; an error if it cannot be had."""
  learn = rules_lib.choose(
    'rounding', rounding, {'nearest': False, 'adaround': True}
  )
  if learn and weight_observer is not None:
    raise ValueError(
      "rounding='adaround' learns on the grid of the extremes; it takes no "
      'weight_observer.'
    )
  return learn


def _first_and_all(
  batches: Iterable[Batch],
) -> tuple[Batch, Iterable[Batch]]:
  """The first batch, and all of them; each is made once."""
  if isinstance(batches, Mapping):
    raise ValueError('batches are several: give [batch] for a single one.')
  batches = iter(batches)
  first = next(batches, None)
  if first is None:
    raise ValueError('There is no batch to calibrate with.')
  check_has('a batch', first, ('items',), "name -> array, as {'image': x}")
  return first, itertools.chain([first], batches)


def post_training_quantize(
  model: adapters.LinenModule,
  variables: Variables,
  batches: Iterable[Batch],
  *,
  weight_rules: Rules = WEIGHT_RULES,
  activation_rules: Rules = ACTIVATION_RULES,
  observer: quantize.Observer | None = None,
  weight_observer: quantize.Observer | None = None,
  **options: Any,
) -> dict[str, Any]:
  """A trained linen model on integers, without further training.

  Static, with the default rules: weights int8 per output channel, and the
  range of every layer's input learned from the batches in evaluation mode.
  Dynamic, with activation specs that are `dynamic`: ranges are found in each
  batch at hand; give the same rules to `integer_forward(dynamic=...)`.
  Weight-only, without activation rules.

  Args:
    model: as for `calibrated`, and so are the others.
    variables: the trained variables.
    batches: pre-processed batches to calibrate with.
    weight_rules: on parameter paths.
    activation_rules: on layer paths.
    observer: of the ranges of activations.
    weight_observer: of those of weights.
    **options: `equalize`, `smooth`, `rounding`, `adaround_steps`,
      `correct`, `interceptors` and `train_argument` of `calibrated`.

  Returns:
    What `integer_forward` runs with.

  Raises:
    ValueError: as `calibrated`.

  Example:
    >>> import jax.numpy as jnp
    >>> from kd_jax import models
    >>> model = models.make_model('mlp', num_classes=1, hidden=())
    >>> layer = {'kernel': jnp.array([[1.27], [0.5]]), 'bias': jnp.zeros(1)}
    >>> batches = [{'image': jnp.ones((1, 2))}]
    >>> variables = post_training_quantize(
    ...   model, {'params': {'head': layer}}, batches, activation_rules=())
    >>> variables['int8']['head']['kernel'].tolist()
    [[127], [50]]
  """
  ready = calibrated(
    model,
    variables,
    batches,
    weight_rules=weight_rules,
    activation_rules=activation_rules,
    observer=observer,
    weight_observer=weight_observer,
    **options,
  )
  return quantize.convert(
    ready,
    weight_rules,
    activation_rules,
    observer=observer,
    weight_observer=weight_observer,
  )


def fold(
  model: adapters.LinenModule,
  variables: Variables,
  batch: Batch,
  *,
  interceptors: Sequence[adapters.Interceptor] = (),
  train_argument: str | None = 'train',
) -> dict[str, Any]:
  """Folds every BatchNorm that directly follows a layer of a linen model.

  Args:
    model: the module.
    variables: its variables.
    batch: one batch; only its shapes and dtypes matter.
    interceptors: others, as for `integer_forward`.
    train_argument: as for `evaluation`.

  Returns:
    The variables without these BatchNorms; `evaluation` and `integer_forward`
    run with them.

  Raises:
    ValueError: for a class in place of a module, parameters or integers in
      place of variables, or what `quantize.fold_batch_norm` raises.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax import linen as nn
    >>> class Net(nn.Module):
    ...   @nn.compact
    ...   def __call__(self, x, train=False):
    ...     x = nn.Dense(1, name='dense')(x)
    ...     return nn.BatchNorm(not train, epsilon=0, name='norm')(x)
    >>> variables = {
    ...   'params': {
    ...     'dense': {'kernel': jnp.array([[3.0]]), 'bias': jnp.zeros(1)},
    ...     'norm': {'scale': jnp.ones(1), 'bias': jnp.zeros(1)},
    ...   },
    ...   'batch_stats': {
    ...     'norm': {'mean': jnp.ones(1), 'var': 4 * jnp.ones(1)}},
    ... }
    >>> folded = fold(Net(), variables, {'image': jnp.ones((1, 1))})
    >>> dense = folded['params']['dense']
    >>> float(dense['kernel'][0, 0]), float(dense['bias'][0])
    (1.5, -0.5)
  """

  check_variables(variables)
  if COLLECTION in variables:
    raise ValueError('These variables hold integers already.')

  def make_forward(interceptor):
    return adapters.from_linen(
      model,
      interceptors=(*interceptors, interceptor),
      train_argument=train_argument,
    )

  norms = quantize.foldable_batch_norms(make_forward, variables, batch)
  return quantize.fold_batch_norm(variables, norms)
