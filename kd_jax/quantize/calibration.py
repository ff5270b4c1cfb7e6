"""Calibration after training: ranges of activations, and biases.

Owns what is measured on a handful of batches without changing any kernel.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from kd_jax import rules as rules_lib
from kd_jax.quantize import observers, record
from kd_jax.quantize.activations import (
  COLLECTION,
  init_quant_stats,
  quantize_activations,
)
from kd_jax.quantize.fake_quant import fake_quant_params
from kd_jax.quantize.inputs import kind
from kd_jax.quantize.specs import QuantSpec
from kd_jax.types import Batch, Variables


def calibrate(
  make_forward: record.MakeForward,
  variables: Variables,
  batches: Iterable[Batch],
  rules: rules_lib.Rules[QuantSpec],
  *,
  observer: observers.Observer | None = None,
) -> Any:
  """Learns the ranges of a trained model's activations in one pass.

  Args:
    make_forward: `(*interceptors) -> forward` in evaluation mode; see `record`.
    variables: the model's variables; a `quant_stats` among them is ignored.
    batches: pre-processed batches; a few are enough. Each is read once.
    rules: activation rules, `(pattern, QuantSpec or None)` on layer paths.
    observer: how ranges are learned; `ema_min_max()` when None.

  Returns:
    The collection `quant_stats`; merge it as
    `variables | {'quant_stats': stats}`.

  Raises:
    ValueError: without any batch, or for a rule that matches no layer.

  Example:
    >>> from flax import linen as nn
    >>> from kd_jax import adapters
    >>> model = nn.Sequential([nn.Dense(2)])
    >>> make_forward = lambda *given: adapters.from_linen(
    ...   model, interceptors=given, train_argument=None)
    >>> x = jnp.array([[-1.0, 3.0]])
    >>> variables = model.init(jax.random.key(0), x)
    >>> rules = [('.*', QuantSpec(symmetric=False, narrow=False))]
    >>> stats = calibrate(make_forward, variables, [{'image': x}], rules)
    >>> float(stats['layers_0']['input0']['high'])
    3.0
  """
  forward = make_forward(quantize_activations(rules, observer=observer))
  variables = {k: v for k, v in variables.items() if k != COLLECTION}

  def observe(stats, variables, batch):
    variables = {**variables, COLLECTION: stats}
    state = forward(variables, batch, None, train=True).model_state
    return state[COLLECTION]

  observe = jax.jit(observe, donate_argnums=0)
  stats = None
  for batch in batches:
    if stats is None:
      stats = init_quant_stats(forward, variables, batch, rules)
    stats = observe(stats, variables, batch)
  if stats is None:
    raise ValueError('There is no batch to calibrate with.')
  return stats


def frozen(observer: observers.Observer | None) -> observers.Observer:
  """An observer that learns nothing: the ranges stay as they are."""
  observer = observer or observers.ema_min_max()
  return observer._replace(update=lambda stats, x, axis_name: stats)


def correct_biases(
  make_forward: record.MakeForward,
  variables: Variables,
  batches: Iterable[Batch],
  weight_rules: rules_lib.Rules[QuantSpec],
  activation_rules: rules_lib.Rules[QuantSpec] = (),
  *,
  rounded: Variables | None = None,
  observer: observers.Observer | None = None,
  weight_observer: observers.Observer | None = None,
) -> dict[str, Any]:
  """Removes the mean error that quantization gives each output channel.

  b <- b - (E[W~ x~] - E[W x]), over examples and positions, where x is the
  layer's input in the float model and x~ that in the quantized one, all of
  whose earlier layers are corrected already. One pass does it for all layers:
  each batch runs through the float model first, then through the quantized
  one, and every layer subtracts the mean error before the next one reads it.

  Args:
    make_forward: `(*interceptors) -> forward` in evaluation mode; see `record`.
    variables: float variables with BatchNorm folded.
    batches: a handful of pre-processed batches; each is read once.
    weight_rules: on parameter paths; the layers whose kernel they choose are
      corrected.
    activation_rules: on layer paths, to correct for rounded inputs as well.
    rounded: the variables to correct, such as those from `adaround`, with
      `quant_stats` if there are activation rules; `variables` when None.
    observer: the observer calibrated with.
    weight_observer: how ranges of weights are chosen, see `fake_quant_params`.

  Returns:
    `rounded` with corrected biases; its kernels are as they were given. A
    Conv or Dense layer without a bias gets one: run the model with
    `skip_folded_batch_norms`, which adds it, or with integers. Other layers
    without a bias are not corrected.

  Raises:
    ValueError: without any batch, or for a rule that matches nothing.

  References:
    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
    Correction", 2019, arXiv:1906.04721, section 4.2.

  Example:
    >>> from flax import linen as nn
    >>> from kd_jax import adapters
    >>> model = nn.Sequential([nn.Dense(1)])
    >>> make_forward = lambda *given: adapters.from_linen(
    ...   model, interceptors=given, train_argument=None)
    >>> layer = {'kernel': jnp.array([[7.0], [1.4]]), 'bias': jnp.zeros(1)}
    >>> variables, x = {'params': {'layers_0': layer}}, jnp.array([[1.0, 2.0]])
    >>> rules = [('.*/kernel', QuantSpec(bits=4, axis=-1))]
    >>> got = correct_biases(make_forward, variables, [{'image': x}], rules)
    >>> round(float(got['params']['layers_0']['bias'][0]), 4)
    0.8
  """
  rounded = variables if rounded is None else rounded
  names = rules_lib.leaf_names(variables['params'])
  chosen = rules_lib.match(weight_rules, names, kind='weight rule')
  layers = {n.removesuffix('/kernel') for n in chosen if n.endswith('/kernel')}

  def mean(module, path, x, y):
    # `skip_folded_batch_norms` adds a bias to these two alone.
    biased = module.has_variable('params', 'bias')
    if path in layers and (biased or kind(module, {'Conv', 'Dense'})):
      return _channel_mean(module, y)
    return None

  float_fn = make_forward(record.record('mean', mean))
  quantizer = quantize_activations(activation_rules, observer=frozen(observer))
  rounded_fn = make_forward(record.chain(quantizer, _correct))

  @jax.jit
  def errors(variables, rounded, batch):
    # The ranges travel with what is measured.
    variables = {**variables, COLLECTION: rounded.get(COLLECTION, {})}
    stats = float_fn(variables, batch, None, train=True).model_state[COLLECTION]
    params = fake_quant_params(
      rounded['params'], weight_rules, observer=weight_observer
    )
    rounded = {**rounded, 'params': params, COLLECTION: stats}
    return record.measure(rounded_fn, rounded, batch, 'error')

  total: dict[str, jax.Array] = {}
  count = 0
  for batch in batches:
    size = len(jax.tree.leaves(batch)[0])
    error = errors(dict(variables), dict(rounded), batch)
    for layer, shift in error.items():
      total[layer] = total.get(layer, 0.0) + size * shift
    count += size
  if not count:
    raise ValueError('There is no batch to correct biases with.')
  means = {layer: error / count for layer, error in total.items()}
  return {**rounded, 'params': _less(rounded['params'], means)}


def _correct(
  next_fun: Callable[..., Any],
  args: Sequence[Any],
  kwargs: Mapping[str, Any],
  context: Any,
) -> Any:
  """Takes the mean error off a layer's output, and measures it.

  An interceptor: the layer's mean in the float model is in its variables.
  """
  y = next_fun(*args, **kwargs)
  module = context.module
  if not record.is_layer(context):
    return y
  if not module.has_variable(COLLECTION, 'mean'):
    return y
  error = _channel_mean(module, y) - module.get_variable(COLLECTION, 'mean')
  module.put_variable(COLLECTION, 'error', error)
  error = jnp.expand_dims(error, tuple(range(y.ndim - error.ndim)))
  return y - error.astype(y.dtype)


def _less(params: Any, errors: Mapping[str, jax.Array]) -> dict[str, Any]:
  """The parameters with the errors of layers taken off their biases."""
  flat = traverse_util.flatten_dict(params, sep='/')
  for layer, error in errors.items():
    bias = flat.get(f'{layer}/bias')
    if bias is None:
      bias = jnp.zeros(error.shape, flat[f'{layer}/kernel'].dtype)
    flat[f'{layer}/bias'] = (bias - error).astype(bias.dtype)
  return traverse_util.unflatten_dict(flat, sep='/')


def _channel_mean(module: Any, y: jax.Array) -> jax.Array:
  """The mean of a layer's output over all axes but those of its bias."""
  features = 1
  if module.has_variable('params', 'bias'):
    features = module.get_variable('params', 'bias').ndim
  axes = tuple(range(y.ndim - features))
  return jnp.mean(y.astype(jnp.float32), axis=axes)
