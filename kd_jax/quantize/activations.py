"""Fake-quant of activations: one interceptor, observers in `quant_stats`.

The inputs of every chosen layer are rounded to the grid of their observer's
range. The model is not edited: `adapters.from_linen` runs the interceptor
inside the forward, so it is traced once and scoped to that forward.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax import rules as rules_lib
from kd_jax.quantize import observers, products
from kd_jax.quantize.fake_quant import (
  QuantSpec,
  dynamic_scale,
  fake_quant,
  scale_and_zero_point,
)
from kd_jax.types import Batch, StudentFn, Variables

COLLECTION = 'quant_stats'
# Layers whose inputs are quantized, by the name of their class or of one of
# its bases. Those of models.layers without a product are there so that a
# runtime finds integers on both sides of a residual sum, a concatenation and
# the pooling; Scores and Context are the products of models.vit.
LAYERS = frozenset(
  {
    'Add',
    'Concatenate',
    'Context',
    'Conv',
    'Dense',
    'DenseGeneral',
    'Einsum',
    'GlobalAveragePool',
    'Scores',
  }
)


def is_quantizable(module: Any) -> bool:
  """Whether a linen module is of a kind that `LAYERS` names."""
  return any(base.__name__ in LAYERS for base in type(module).__mro__)


def input_name(index: int) -> str:
  """The name in `quant_stats` of a layer's input by position."""
  return f'input{index}'


def quantize_activations(
  rules: rules_lib.Rules[QuantSpec],
  *,
  observer: observers.Observer | None = None,
  axis_name: str | None = None,
) -> Callable[..., Any]:
  """An interceptor that fake-quantizes the inputs of linen layers.

  In a forward that may change `quant_stats` (training, calibration) the
  observers learn from the batch first and the new range is used; otherwise
  the stored range is. A layer that has seen no batch is left unquantized.

  Args:
    rules: `(pattern, QuantSpec or None)` pairs on '/'-joined layer paths, of
      Conv, Dense, Add and GlobalAveragePool layers. That every rule matches
      something is checked by `init_quant_stats`.
    observer: how ranges are learned; `ema_min_max()` when None.
    axis_name: the mapped axis under `shard_map` or `pmap`.

  Returns:
    An interceptor for `flax.linen.intercept_methods`.
  """
  observer = observer or observers.ema_min_max()

  def interceptor(next_fun, args, kwargs, context):
    module = context.module
    if context.method_name != '__call__' or not is_quantizable(module):
      return next_fun(*args, **kwargs)
    path = '/'.join(module.path)
    spec = rules_lib.first(rules, path)
    if spec is None:
      return next_fun(*args, **kwargs)
    values, options = products.arguments(module, args, kwargs)
    for i, x in enumerate(values):
      if products.is_input(x):
        name = input_name(i)
        values[i] = _round(module.scope, observer, spec, name, x, axis_name)
    return next_fun(*values, **options)

  return interceptor


def _round(scope, observer, spec, name, x, axis_name):
  if not spec.dynamic:
    return _observe(scope, observer, spec, name, x, axis_name)
  return fake_quant(x, *dynamic_scale(x, spec), spec.qmin, spec.qmax)


def _observe(scope, observer, spec, name, x, axis_name):
  known = scope.has_variable(COLLECTION, name)
  learning = scope.is_mutable_collection(COLLECTION)
  if not (known or learning):
    return x
  stats = scope.get_variable(COLLECTION, name) if known else observer.init()
  if learning:
    stats = observer.update(stats, x, axis_name)
    scope.put_variable(COLLECTION, name, stats)
  scale, zero_point = scale_and_zero_point(*observer.range(stats), spec)
  quantized = fake_quant(x, scale, zero_point, spec.qmin, spec.qmax)
  return quantized if learning else jnp.where(stats['count'] > 0, quantized, x)


def init_quant_stats(
  student_fn: StudentFn,
  variables: Variables,
  batch: Batch,
  rules: rules_lib.Rules[QuantSpec] = (),
) -> Any:
  """The `quant_stats` collection of a model, before any batch: zeros.

  Nothing is computed; the forward is only traced for the shapes.

  Args:
    student_fn: a forward with `quantize_activations` among its interceptors.
    variables: the model's variables, without `quant_stats`.
    batch: one batch; only its shapes and dtypes matter.
    rules: the activation rules, to check that each matches a layer.

  Returns:
    The collection; merge it as `variables | {'quant_stats': stats}`.

  Raises:
    ValueError: if no layer is quantized, or a rule matches no layer.
  """
  forward = jax.eval_shape(
    lambda variables, batch, rng: student_fn(variables, batch, rng, train=True),
    dict(variables),
    dict(batch),
    jax.random.key(0),
  )
  stats = forward.model_state.get(COLLECTION, {})
  if any(spec is not None and spec.dynamic for _, spec in rules):
    # Layers with dynamic ranges leave no trace, so rules cannot be checked.
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), stats)
  if not stats:
    raise ValueError(
      'No layer of the model is quantized: the rules match no '
      f'{", ".join(sorted(LAYERS))} layer.'
    )
  # A leaf is <layer path>/input<i>/<statistic>.
  layers = {n.rsplit('/', 2)[0] for n in rules_lib.leaf_names(stats)}
  used = [rule for rule in rules if rule[1] is not None]
  rules_lib.match(used, sorted(layers), kind='activation rule')
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), stats)
