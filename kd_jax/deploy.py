"""What a trained student becomes: folded, converted, wrapped with its input.

Owns the path from trained variables to a function of raw images; nothing
about files, which is `export`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from kd_jax import adapters, quantize, rules
from kd_jax.types import Batch, StudentFn, Variables

WEIGHTS = quantize.INT8_WEIGHTS
ACTIVATIONS = quantize.INT8_ACTIVATIONS
Preprocess = Callable[..., Batch]


def integer_forward(
  model: adapters.LinenModule,
  *,
  simulate: bool = False,
  dynamic: rules.Rules[quantize.QuantSpec] = (),
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


def post_training_int8(
  model: adapters.LinenModule,
  variables: Variables,
  batches: Iterable[Batch],
  *,
  interceptors: Sequence[adapters.Interceptor] = (),
) -> dict[str, Any]:
  """A trained linen model on integers, without further training.

  Weights become int8 per output channel; the range of every layer's input is
  learned from the batches, in evaluation mode.

  Args:
    model: the module.
    variables: its trained variables.
    batches: pre-processed batches to calibrate with; a few are enough.
    interceptors: others, as for `integer_forward`.

  Returns:
    What `integer_forward` runs with.

  Raises:
    ValueError: without any batch.
  """
  interceptor = quantize.quantize_activations([('.*', ACTIVATIONS)])
  # Without its train argument the model stays in evaluation mode, whatever
  # the observers, which learn in training only, are told.
  forward = adapters.from_linen(
    model, interceptors=(*interceptors, interceptor), train_argument=None
  )

  @jax.jit
  def observe(variables, batch):
    state = forward(variables, batch, train=True).model_state
    return state['quant_stats']

  example = None
  variables = dict(variables)
  for batch in batches:
    if example is None:
      example = batch
      variables['quant_stats'] = quantize.init_quant_stats(
        forward, variables, batch
      )
    variables['quant_stats'] = observe(variables, batch)
  if example is None:
    raise ValueError('There is no batch to calibrate with.')
  return quantize.convert(
    fold(model, variables, example, interceptors=interceptors),
    [('.*/kernel', WEIGHTS)],
    [('.*', ACTIVATIONS)],
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
