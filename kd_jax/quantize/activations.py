"""Fake-quant of activations: one interceptor, observers in `quant_stats`.

Owns the interceptor for linen models, the collection `quant_stats` with its
observers' states, and the same as a plain function for nnx modules and
functions. The inputs of every chosen layer are rounded to the grid of their
observer's range. The model is not edited: `adapters.from_linen` runs the
interceptor inside the forward, so it is traced once and scoped to that forward.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax import rules as rules_lib
from kd_jax.quantize import inputs, observers, specs
from kd_jax.quantize.fake_quant import fake_quant
from kd_jax.quantize.inputs import LAYERS
from kd_jax.quantize.specs import QuantSpec, scale_and_zero_point
from kd_jax.types import Batch, StudentFn, Variables, check_has

COLLECTION = 'quant_stats'


def activation(
  stats: observers.Stats | None,
  x: jax.Array,
  spec: QuantSpec,
  observer: observers.Observer | None = None,
  *,
  learning: bool = True,
  begin: int = 0,
  axis_name: str | None = None,
) -> tuple[jax.Array, observers.Stats | None]:
  """Fake-quantizes one activation: for nnx modules and plain functions.

  Args:
    stats: the observer's state, None before the first batch; a spec with
      `dynamic` has none and keeps None.
    x: `[B, ...]`, float.
    spec: the quantizer; with an `axis` every index of it has its own range.
    observer: how the range is learned; `observers.ema_min_max()` when None.
    learning: whether the observer learns from this batch, before it is rounded.
    begin: number of batches that the observer sees before anything is rounded.
    axis_name: the mapped axis that the batch is spread over, under
      `shard_map` or `pmap`.

  Returns:
    `(rounded x, new stats)`. Without any batch seen x is left as it is. The
    gradient passes straight through to the values inside the range.

  Raises:
    ValueError: for a spec with groups, or without the axes that it names.

  Example:
    >>> x = jnp.array([0.0, 0.26, 2.55])
    >>> spec = QuantSpec(symmetric=False, narrow=False)
    >>> rounded, stats = activation(None, x, spec)
    >>> [round(v, 4) for v in rounded.tolist()], float(stats['count'])
    ([0.0, 0.26, 2.55], 1.0)
  """
  if spec.group_size is not None:
    raise ValueError(
      f'activation: group_size={spec.group_size} is for weights; activations '
      'have a range per tensor or per axis.'
    )
  if spec.dynamic:
    grid = dynamic_scale(x, spec, axis_name)
    return fake_quant(x, *grid, spec.qmin, spec.qmax), stats
  observer = observer or observers.ema_min_max()
  check_has('observer', observer, observers.Observer._fields, 'as mse() is one')
  if stats is None:
    stats = observers.init_stats(observer, x, spec)
  if learning:
    stats = observers.observe(observer, stats, x, spec, axis_name)
  low, high = observers.observed_range(observer, stats, x, spec)
  grid = scale_and_zero_point(low, high, spec)
  rounded = fake_quant(x, *grid, spec.qmin, spec.qmax)
  if learning and begin == 0:
    return rounded, stats
  # Those seen before this batch in training, and any at all in evaluation.
  needed = begin + 1 if learning else max(begin, 1)
  return jnp.where(jnp.max(stats['count']) >= needed, rounded, x), stats


def dynamic_scale(
  x: jax.Array, spec: QuantSpec, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
  """Scale and zero point of an activation, from its own extremes.

  Args:
    x: the activation.
    spec: the quantizer; its `axis` keep their sizes, the other axes become 1.
    axis_name: the mapped axis that the batch is spread over; all of it counts,
      unless every example has its own range.

  Returns:
    `(scale, zero_point)`, float32 with the rank of `x`; no gradient passes.

  Example:
    >>> spec = QuantSpec(symmetric=False, narrow=False, axis=0, dynamic=True)
    >>> x = jnp.array([[0.0, 2.55], [0.0, 5.1]])
    >>> [round(s, 3) for s in dynamic_scale(x, spec)[0][:, 0].tolist()]
    [0.01, 0.02]
  """
  low, high = specs.extremes(jax.lax.stop_gradient(x), spec, 'activation')
  if axis_name is not None and 0 not in spec.kept_axes(x.ndim):
    low = jax.lax.pmin(low, axis_name)
    high = jax.lax.pmax(high, axis_name)
  return scale_and_zero_point(low, high, spec)


def quantize_activations(
  rules: rules_lib.Rules[QuantSpec],
  *,
  observer: observers.Observer | None = None,
  begin: int = 0,
  axis_name: str | None = None,
) -> Callable[..., Any]:
  """An interceptor that fake-quantizes the inputs of linen layers.

  In a forward that may change `quant_stats` (training, calibration) the
  observers learn from the batch first and the new range is used; otherwise
  the stored range is. A layer that has seen no batch is left unquantized. A
  layer that is called several times has one observer, which sees every call.

  Layers are those whose class, or one of its bases, `LAYERS` names: Conv,
  Dense, DenseGeneral, Einsum, and of `models` Add, Concatenate,
  GlobalAveragePool, Scores and Context. Both products of linen's
  MultiHeadDotProductAttention are layers of their own, `<attention>/scores`
  and `<attention>/context`. In scanned blocks the scan must carry the
  collection, `variable_axes={'quant_stats': 0, ...}`.

  For several observers use several interceptors, each with its own rules.

  Args:
    rules: `(pattern, QuantSpec or None)` pairs on '/'-joined layer paths.
      That every rule matches something is checked by `init_quant_stats`.
    observer: how ranges are learned; `ema_min_max()` when None. See
      `delays.freeze_observer` to stop it.
    begin: calls that the observer sees before anything is rounded.
    axis_name: the mapped axis under `shard_map` or `pmap`.

  Returns:
    An interceptor for `flax.linen.intercept_methods`.

  Raises:
    ValueError: when run, for a spec with groups, or an attention whose function
      does not let its products be replaced.

  Example:
    >>> from flax import linen as nn
    >>> params = {'kernel': jnp.array([[1.0], [10.0]]), 'bias': jnp.zeros(1)}
    >>> rules = [('.*', QuantSpec(bits=4, dynamic=True))]
    >>> with nn.intercept_methods(quantize_activations(rules)):
    ...   y = nn.Dense(1).apply({'params': params}, jnp.array([[0.7, 0.24]]))
    >>> round(float(y[0, 0]), 3)
    2.7
  """

  def round_input(scope, layer, names, x):
    spec = rules_lib.first(rules, layer)
    if spec is None:
      return inputs.mark(x, 'float', layer)
    if spec.dynamic:
      x, _ = activation(None, x, spec, axis_name=axis_name)
      return inputs.mark(x, 'dynamic', layer)
    stats = inputs.read(scope, COLLECTION, names)
    learning = scope.is_mutable_collection(COLLECTION)
    if stats is None:
      x = inputs.mark(x, 'static', layer)
      if not learning:
        return x
    x, stats = activation(
      stats,
      x,
      spec,
      observer,
      learning=learning,
      begin=begin,
      axis_name=axis_name,
    )
    if learning:
      inputs.write(scope, COLLECTION, names, stats)
    return x

  return inputs.intercept_inputs(
    round_input, lambda layer: rules_lib.first(rules, layer) is not None
  )


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
    The collection; merge it as `variables | {'quant_stats': stats}`. Empty if
    all ranges are dynamic.

  Raises:
    ValueError: if no layer is quantized, a rule matches no layer, with None as
      value too, or a layer lies in a scan that does not carry `quant_stats`.

  Example:
    >>> from flax import linen as nn
    >>> from kd_jax import adapters
    >>> rules = [('.*', specs.INT8_ACTIVATIONS)]
    >>> forward = adapters.from_linen(
    ...   nn.Sequential([nn.Dense(2)]),
    ...   interceptors=[quantize_activations(rules)], train_argument=None)
    >>> layer = {'kernel': jnp.ones((3, 2)), 'bias': jnp.zeros(2)}
    >>> variables = {'params': {'layers_0': layer}}
    >>> batch = {'image': jnp.ones((1, 3))}
    >>> stats = init_quant_stats(forward, variables, batch)
    >>> [(name, float(v)) for name, v in stats['layers_0']['input0'].items()]
    [('count', 0.0), ('high', 0.0), ('low', 0.0)]
  """
  variables = {k: v for k, v in variables.items() if k != COLLECTION}
  marked, state = inputs.marked_layers(student_fn, variables, batch)
  static = marked.get('static', set())
  dynamic = marked.get('dynamic', set())
  if not static and not dynamic:
    raise ValueError(
      'No layer of the model is quantized: the rules match no '
      f'{", ".join(sorted(LAYERS))} layer.'
    )
  layers = sorted(set().union(*marked.values()))
  rules_lib.match(rules, layers, kind='activation rule')
  stats = state.get(COLLECTION, {})
  # A leaf is <layer path>/input<i>/<statistic>.
  paths = (name.split('/')[:-2] for name in rules_lib.leaf_names(stats))
  observed = {'/'.join(path) for path in paths}
  lost = sorted(static - observed)
  if lost:
    raise ValueError(
      f'The observer of {lost[0]!r} has nowhere to be kept: a scan or map '
      f"around it must carry it, with variable_axes={{'{COLLECTION}': 0}}."
    )
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), stats)
