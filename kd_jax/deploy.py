"""What a trained student becomes: folded, converted, wrapped with its input.

Owns the path from trained variables to a function of raw inputs; nothing
about files, which is `export`.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from kd_jax import adapters, quantize
from kd_jax import rules as rules_lib
from kd_jax.adapters.plain import names_of
from kd_jax.types import Batch, Reads, StudentFn, Variables

Rules = rules_lib.Rules[quantize.QuantSpec]
WEIGHT_RULES: Rules = (('.*/kernel', quantize.INT8_WEIGHTS),)
ACTIVATION_RULES: Rules = (('.*', quantize.INT8_ACTIVATIONS),)
Preprocess = Callable[..., Batch]


def integer_forward(
  model: adapters.LinenModule,
  *,
  simulate: bool = False,
  dynamic: Rules = (),
  convolution: str = 'auto',
  taps: Sequence[str] = (),
  axis_name: str | None = None,
  interceptors: Sequence[adapters.Interceptor] = (),
) -> StudentFn:
  """The forward of a linen model whose layers `quantize.convert` replaced.

  Args:
    model: the module that was trained; it is not edited.
    simulate: see `quantize.execute_integers`, and so are `dynamic` and
      `convolution`.
    taps: see `adapters.from_linen`, and so is `axis_name`.
    interceptors: others, which go first, such as `prune.resized(...)` for a
      shrunk model.
  """
  return adapters.from_linen(
    model,
    taps=taps,
    interceptors=(
      *interceptors,
      quantize.skip_folded_batch_norms,
      quantize.execute_integers(
        simulate=simulate, dynamic=dynamic, convolution=convolution
      ),
    ),
    axis_name=axis_name,
  )


def evaluation(
  model: adapters.LinenModule,
  *,
  interceptors: Sequence[adapters.Interceptor] = (),
) -> Callable[..., StudentFn]:
  """The `make_forward` that post-training algorithms take, of a linen model.

  Args:
    model: the module; folded BatchNorms are left out when it runs. It sees
      the entries of a batch that its attribute `reads` names, or 'image'.
    interceptors: others, as for `integer_forward`.

  Returns:
    `(*interceptors) -> forward`. Without its train argument the model stays in
    evaluation mode, also when `train=True` tells observers to learn.
  """

  def make_forward(*others: adapters.Interceptor) -> StudentFn:
    return adapters.from_linen(
      model,
      interceptors=(*interceptors, quantize.skip_folded_batch_norms, *others),
      train_argument=None,
    )

  return make_forward


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

  Returns:
    What `quantize.convert` turns into integers and `parity.check_parity`
    compares them with: folded `params`, and `quant_stats` if there are
    activation rules.

  Raises:
    ValueError: without any batch, for an unknown rounding, or for 'adaround'
      with a `weight_observer`.
  """
  learn = _learns_rounding(rounding, weight_observer)
  example, batches = _first_and_all(batches)
  if learn or correct or smooth is not None:
    batches = list(batches)
  make_forward = evaluation(model, interceptors=interceptors)
  rules = weight_rules, activation_rules
  variables = fold(model, variables, example, interceptors=interceptors)
  if equalize:
    variables = quantize.equalize(make_forward(), variables, example)
  if smooth is not None:
    variables = quantize.smooth(make_forward, variables, batches, alpha=smooth)
  if activation_rules:
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
  batches = iter(batches)
  first = next(batches, None)
  if first is None:
    raise ValueError('There is no batch to calibrate with.')
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
    **options: `equalize`, `smooth`, `rounding`, `adaround_steps`, `correct`
      and `interceptors` of `calibrated`.

  Returns:
    What `integer_forward` runs with.

  Raises:
    ValueError: as `calibrated`.
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
) -> dict[str, Any]:
  """Folds every BatchNorm that directly follows a layer of a linen model.

  Args:
    model: the module.
    variables: its variables.
    batch: one batch; only its shapes and dtypes matter.
    interceptors: others, as for `integer_forward`.
  """

  def make_forward(interceptor):
    return adapters.from_linen(model, interceptors=(*interceptors, interceptor))

  norms = quantize.foldable_batch_norms(make_forward, variables, batch)
  return quantize.fold_batch_norm(variables, norms)


def from_raw(
  forward: StudentFn, preprocess: Preprocess, *, reads: Reads = 'image'
) -> Callable[..., jax.Array]:
  """`(variables, *raw inputs) -> output`, pre-processing included.

  Args:
    forward: a student or teacher function.
    preprocess: `(batch, *, train) -> batch`, see `data.make_preprocess`.
    reads: the entry of a batch that is the input, such as uint8 images, or the
      entries in the order of the inputs.
  """

  names = names_of(reads)

  def fn(variables: Mapping[str, Any], *raw: jax.Array) -> jax.Array:
    batch = preprocess(dict(zip(names, raw, strict=True)), train=False)
    return forward(variables, batch).output

  return fn
