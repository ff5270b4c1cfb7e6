"""What a trained student becomes: folded, converted, wrapped with its input.

Owns the path from trained variables to a function of raw images; nothing
about files, which is `export`.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from kd_jax import adapters, quantize
from kd_jax import rules as rules_lib
from kd_jax.types import Batch, StudentFn, Variables

WEIGHTS = quantize.INT8_WEIGHTS
ACTIVATIONS = quantize.INT8_ACTIVATIONS
Preprocess = Callable[..., Batch]


def integer_forward(
  model: adapters.LinenModule,
  *,
  simulate: bool = False,
  taps: Sequence[str] = (),
  axis_name: str | None = None,
) -> StudentFn:
  """The forward of a linen model whose layers `quantize.convert` replaced.

  Args:
    model: the module that was trained; it is not edited.
    simulate: see `quantize.execute_integers`.
    taps: see `adapters.from_linen`, and so is `axis_name`.
  """
  return adapters.from_linen(
    model,
    taps=taps,
    interceptors=(
      quantize.skip_folded_batch_norms,
      quantize.execute_integers(simulate=simulate),
    ),
    axis_name=axis_name,
  )


def evaluation(model: adapters.LinenModule) -> Callable[..., StudentFn]:
  """The `make_forward` that post-training algorithms take, of a linen model.

  Args:
    model: the module; folded BatchNorms are left out when it runs.

  Returns:
    `(interceptor) -> forward`. Without its train argument the model stays in
    evaluation mode, also when `train=True` tells observers to learn.
  """

  def make_forward(interceptor: adapters.Interceptor) -> StudentFn:
    return adapters.from_linen(
      model,
      interceptors=(quantize.skip_folded_batch_norms, interceptor),
      train_argument=None,
    )

  return make_forward


def post_training_int8(
  model: adapters.LinenModule,
  variables: Variables,
  batches: Iterable[Batch],
  *,
  weights: quantize.QuantSpec = WEIGHTS,
  equalize: bool = False,
  smooth: float | None = None,
  rounding: str = 'nearest',
  correct: bool = False,
) -> dict[str, Any]:
  """A trained linen model on integers, without further training.

  Weights become int8 per output channel; the range of every layer's input is
  learned from the batches, in evaluation mode. The options run in this order,
  after BatchNorm is folded; `correct` comes last because it removes the mean
  of what rounding left. For other settings call the functions of `quantize`
  with `evaluation(model)`.

  Args:
    model: the module.
    variables: its trained variables.
    batches: pre-processed batches to calibrate with; a few are enough.
    weights: the quantizer of all kernels.
    equalize: whether channels are rescaled, see `quantize.equalize`.
    smooth: alpha of `quantize.smooth`, or None to leave it out.
    rounding: 'nearest' or 'adaround', see `quantize.adaround`.
    correct: whether biases are corrected, see `quantize.correct_biases`.

  Returns:
    What `integer_forward` runs with.

  Raises:
    ValueError: without any batch, or for an unknown rounding.
  """
  learn = rules_lib.choose(
    'rounding', rounding, {'nearest': False, 'adaround': True}
  )
  batches = iter(batches)
  example = next(batches, None)
  if example is None:
    raise ValueError('There is no batch to calibrate with.')
  batches = itertools.chain([example], batches)
  if learn or correct or smooth is not None:
    batches = list(batches)
  make_forward = evaluation(model)
  rules = [('.*/kernel', weights)], [('.*', ACTIVATIONS)]
  variables = fold(model, variables, example)
  if equalize:
    plain = adapters.from_linen(
      model, interceptors=(quantize.skip_folded_batch_norms,)
    )
    variables = quantize.equalize(plain, variables, example)
  if smooth is not None:
    variables = quantize.smooth(make_forward, variables, batches, alpha=smooth)
  stats = quantize.calibrate(make_forward, variables, batches, rules[1])
  rounded = variables = {**variables, 'quant_stats': stats}
  if learn:
    rounded = quantize.adaround(make_forward, variables, batches, *rules)
  if correct:
    rounded = quantize.correct_biases(
      make_forward, variables, batches, *rules, rounded=rounded
    )
  return quantize.convert(rounded, *rules)


def fold(
  model: adapters.LinenModule, variables: Variables, batch: Batch
) -> dict[str, Any]:
  """Folds every BatchNorm that directly follows a layer of a linen model.

  Args:
    model: the module.
    variables: its variables.
    batch: one batch; only its shapes and dtypes matter.
  """

  def make_forward(interceptor):
    return adapters.from_linen(model, interceptors=(interceptor,))

  norms = quantize.foldable_batch_norms(make_forward, variables, batch)
  return quantize.fold_batch_norm(variables, norms)


def from_images(
  forward: StudentFn, preprocess: Preprocess
) -> Callable[[Variables, jax.Array], jax.Array]:
  """`(variables, uint8 images) -> output`, pre-processing included.

  Args:
    forward: a student or teacher function.
    preprocess: `(batch, *, train) -> batch`, see `data.make_preprocess`.
  """

  def fn(variables: Mapping[str, Any], images: jax.Array) -> jax.Array:
    batch = preprocess({'image': images}, train=False)
    return forward(variables, batch).output

  return fn
