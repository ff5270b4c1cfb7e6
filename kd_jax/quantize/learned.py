"""Learned steps: LSQ for weights and activations, PACT for activations.

Owns the two maps with their gradients, and where their parameters live. These
are trainable parameters, in `params`, and any optimizer trains them: a step of
a weight is `quant_steps/<path>_step`, that of an activation is
`<layer path>/input<i>_step`, and PACT's clipping value is
`<layer path>/input<i>_alpha`. Rules reach them by these names, as for the L2
decay that PACT asks for.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.typing import ArrayLike

from kd_jax import rules as rules_lib
from kd_jax.quantize import inputs, specs
from kd_jax.quantize.activations import COLLECTION
from kd_jax.quantize.specs import QuantSpec, per_group
from kd_jax.types import Batch, StudentFn, Variables

STEPS = 'quant_steps'
_SUFFIX = {'lsq': '_step', 'pact': '_alpha'}
# A step that an optimizer drives to 0 or below acts as this; it still gets
# its gradient.
_LEAST = 1e-12


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def lsq(
  x: jax.Array,
  step: jax.Array,
  first: int,
  last: int,
  gradient_factor: float = 1.0,
) -> jax.Array:
  """Rounds to multiples of a step that is learned.

  Forward: step * clip(round(x / step), first, last). Backward to x: the
  gradient where the rounded code lies in [first, last], else 0. Backward to
  step, times `gradient_factor`: the sum of the gradient times first where the
  code saturates below, last where above, and round(x / step) - x / step else.

  Args:
    x: float array.
    step: float32, broadcastable to `x`; positive.
    first: smallest code.
    last: largest code.
    gradient_factor: see `lsq_gradient_factor`.

  Returns:
    Values on the grid, with the shape and dtype of `x`.

  References:
    Esser et al., "Learned Step Size Quantization", 2019, arXiv:1902.08153.

  Example:
    >>> x, step = jnp.array([0.3, 9.0]), jnp.float32(0.5)
    >>> lsq(x, step, -8, 7).tolist()
    [0.5, 3.5]
    >>> gradient = jax.grad(lambda s: lsq(x, s, -8, 7).sum())(step)
    >>> round(float(gradient), 4)
    7.4
  """
  return _lsq_fwd(x, step, first, last, gradient_factor)[0]


def _lsq_fwd(x, step, first, last, gradient_factor):
  size = jnp.maximum(step, _LEAST)
  code = jnp.round(x.astype(jnp.float32) / size)
  y = (jnp.clip(code, first, last) * size).astype(x.dtype)
  return y, (x, step)


def _lsq_bwd(first, last, gradient_factor, residuals, g):
  x, step = residuals
  t = x.astype(jnp.float32) / jnp.maximum(step, _LEAST)
  code = jnp.round(t)
  inside = (code >= first) & (code <= last)
  slope = jnp.where(inside, code - t, jnp.clip(code, first, last))
  to_step = _sum_to(g.astype(jnp.float32) * slope, jnp.shape(step))
  return (
    jnp.where(inside, g, 0).astype(x.dtype),
    (to_step * gradient_factor).astype(step.dtype),
  )


lsq.defvjp(_lsq_fwd, _lsq_bwd)


def _sum_to(values, shape):
  """Sums over the axes along which an array of `shape` was broadcast."""
  values = jnp.sum(values, axis=tuple(range(values.ndim - len(shape))))
  axes = tuple(i for i, n in enumerate(shape) if n == 1)
  return jnp.sum(values, axis=axes, keepdims=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def pact(x: jax.Array, alpha: jax.Array, bits: int = 8) -> jax.Array:
  """Clips to [0, alpha] and rounds to 2**bits - 1 steps; alpha is learned.

  Backward to x: the gradient where 0 <= x < alpha, else 0. Backward to alpha:
  the sum of the gradient where x >= alpha. The paper adds L2 decay of alpha,
  which is the optimizer's business.

  Args:
    x: float array, in use the input of a layer after a ReLU.
    alpha: float32, broadcastable to `x`; positive.
    bits: number of bits.

  Returns:
    Values on the grid, with the shape and dtype of `x`.

  References:
    Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural
    Networks", 2018, arXiv:1805.06085.

  Example:
    >>> x, alpha = jnp.array([-1.0, 0.4, 5.0, 7.0]), jnp.float32(3.0)
    >>> [round(v, 4) for v in pact(x, alpha, 4).tolist()]
    [0.0, 0.4, 3.0, 3.0]
    >>> float(jax.grad(lambda a: pact(x, a, 4).sum())(alpha))
    2.0
  """
  return _pact_fwd(x, alpha, bits)[0]


def _pact_fwd(x, alpha, bits):
  limit = jnp.maximum(alpha, _LEAST)
  scale = limit / (2**bits - 1)
  y = jnp.round(jnp.clip(x.astype(jnp.float32), 0, limit) / scale) * scale
  return y.astype(x.dtype), (x, alpha)


def _pact_bwd(bits, residuals, g):
  x, alpha = residuals
  limit = jnp.maximum(alpha, _LEAST)
  above = x >= limit
  to_alpha = _sum_to(
    jnp.where(above, g, 0).astype(jnp.float32), jnp.shape(alpha)
  )
  return (
    jnp.where((x >= 0) & ~above, g, 0).astype(x.dtype),
    to_alpha.astype(alpha.dtype),
  )


pact.defvjp(_pact_fwd, _pact_bwd)


def lsq_gradient_factor(count: int, positive: int) -> float:
  """1 / sqrt(count * positive): evens out the updates of steps and weights.

  Args:
    count: of a weight, the number of its values that share the step; of an
      activation, the number of features of one example that do.
    positive: the largest code.
  """
  return 1 / math.sqrt(count * positive)


def _codes(spec: QuantSpec) -> tuple[int, int]:
  """The smallest and the largest code, counted from that of 0."""
  if spec.symmetric:
    return spec.qmin, spec.qmax
  return 0, spec.qmax - spec.qmin


def initial_step(
  x: jax.Array,
  spec: QuantSpec,
  *,
  ignore_zeros: bool = True,
  name: str = 'tensor',
) -> jax.Array:
  """LSQ's first step: 2 mean|x| / sqrt(largest code).

  Args:
    x: the weight, or a batch of the activation.
    spec: the quantizer; its axes and groups have a step each.
    ignore_zeros: whether the mean is over the values that are not 0, as it
      has to be for pruned weights.
    name: of the tensor, for errors.

  Returns:
    float32, laid out as `fake_quant.weight_scale` does; 1 where all is 0.

  References:
    Esser et al., 2019, arXiv:1902.08153, section 2.1.
  """
  blocks, shape = specs.rows(x, spec, name)
  size = jnp.abs(blocks.astype(jnp.float32))
  weight = (size > 0) if ignore_zeros else jnp.ones_like(size)
  count = jnp.sum(weight, axis=-1, dtype=jnp.float32)
  mean = jnp.sum(size, axis=-1) / jnp.maximum(count, 1)
  step = 2 * mean / math.sqrt(_codes(spec)[1])
  return jnp.where(step > 0, step, 1.0).reshape(shape)


def _weight_specs(params, rules):
  names = rules_lib.leaf_names(params)
  chosen = rules_lib.match(rules, names, kind='weight rule')
  for name, spec in chosen.items():
    if not spec.symmetric:
      raise ValueError(f'{name}: LSQ quantizes weights symmetrically.')
  return chosen


def init_lsq_params(
  params: Mapping[str, Any],
  rules: rules_lib.Rules[QuantSpec],
  *,
  ignore_zeros: bool = True,
) -> dict[str, Any]:
  """Adds the steps of the weights that rules choose to the parameters.

  Args:
    params: nested dicts of arrays.
    rules: `(pattern, QuantSpec or None)` pairs on parameter paths; symmetric.
    ignore_zeros: see `initial_step`.

  Returns:
    The parameters and an entry `quant_steps` beside them.

  Raises:
    ValueError: if a rule matches nothing, or a spec is affine or does not fit
      its parameter.

  Example:
    >>> params = {'dense': {'kernel': jnp.array([[4.0], [0.0]])}}
    >>> rules = [('.*/kernel', QuantSpec(bits=4, axis=-1))]
    >>> params = init_lsq_params(params, rules)
    >>> step = params['quant_steps']['dense']['kernel_step']
    >>> step.shape, round(float(step[0, 0]), 3)
    ((1, 1), 3.024)
  """
  leaves = dict(zip(rules_lib.leaf_names(params), jax.tree.leaves(params)))
  steps = {
    f'{name}{_SUFFIX["lsq"]}': initial_step(
      leaves[name], spec, ignore_zeros=ignore_zeros, name=name
    )
    for name, spec in _weight_specs(params, rules).items()
  }
  return {**params, STEPS: traverse_util.unflatten_dict(steps, sep='/')}


def lsq_params(
  params: Mapping[str, Any], rules: rules_lib.Rules[QuantSpec]
) -> dict[str, Any]:
  """Rounds weights to their learned steps: a `params_fn` for a train step.

  Args:
    params: from `init_lsq_params`, or trained since.
    rules: the same rules.

  Returns:
    The parameters without `quant_steps`, the chosen ones on their grid;
    differentiable to weights and steps.

  Raises:
    ValueError: if there are no steps, or a rule matches nothing.

  Example:
    >>> params = {'w': jnp.array([[4.0], [1.0]])}
    >>> rules = [('w', QuantSpec(bits=4, axis=-1))]
    >>> rounded = lsq_params(init_lsq_params(params, rules), rules)
    >>> [round(v, 3) for v in rounded['w'][:, 0].tolist()]
    [3.78, 1.89]
  """
  if STEPS not in params:
    raise ValueError(
      f'lsq_params: params has no {STEPS!r}; make them with init_lsq_params.'
    )
  rest = {k: v for k, v in params.items() if k != STEPS}
  steps = traverse_util.flatten_dict(params[STEPS], sep='/')
  chosen = _weight_specs(rest, rules)

  def one(name, w):
    if name not in chosen:
      return w
    spec, step = chosen[name], steps[f'{name}{_SUFFIX["lsq"]}']
    factor = lsq_gradient_factor(w.size // step.size, spec.qmax)
    return lsq(w, per_group(step, w), spec.qmin, spec.qmax, factor)

  leaves, structure = jax.tree.flatten(rest)
  return structure.unflatten(map(one, rules_lib.leaf_names(rest), leaves))


def learned_activations(
  rules: rules_lib.Rules[QuantSpec], *, method: str = 'lsq'
) -> Callable[..., Any]:
  """An interceptor that rounds the inputs of layers with learned parameters.

  The layers are those of `activations.quantize_activations`; use that one for
  layers whose ranges shall be observed. An affine spec is for inputs that are
  never negative: their codes start at 0 and negative values become 0. A layer
  without its parameter, before `init_learned_activations`, is left as it is.

  Args:
    rules: `(pattern, QuantSpec or None)` pairs on layer paths.
    method: 'lsq', or 'pact' for affine specs.

  Returns:
    An interceptor for `flax.linen.intercept_methods`.

  Raises:
    ValueError: for another method, or a spec that it is not for.
  """
  suffix = rules_lib.choose('method', method, _SUFFIX)
  for pattern, spec in rules:
    if spec is None:
      continue
    if spec.dynamic or spec.group_size is not None:
      raise ValueError(
        f'learned_activations: the spec of {pattern!r} is dynamic or has '
        'groups; a learned range is per tensor or per axis.'
      )
    if method == 'pact' and spec.symmetric:
      raise ValueError(
        f'learned_activations: the spec of {pattern!r} is symmetric; PACT is '
        'for inputs that are never negative, with symmetric=False.'
      )

  def round_input(scope, layer, names, x):
    spec = rules_lib.first(rules, layer)
    names = (*names[:-1], f'{names[-1]}{suffix}')
    if spec is None:
      return inputs.mark(x, 'float', layer)
    parameter = inputs.read(scope, 'params', names)
    if parameter is not None:
      return _round_learned(x, parameter, spec, method)
    x = inputs.mark(x, 'learned', layer)
    if scope.is_mutable_collection(COLLECTION):
      first = _initial_step if method == 'lsq' else _initial_alpha
      value = first(jax.lax.stop_gradient(x), spec)
      inputs.write(scope, COLLECTION, names, value)
    return x

  return inputs.intercept_inputs(round_input)


def _initial_step(x, spec):
  return initial_step(x, spec, name='activation')


def _initial_alpha(x, spec):
  high = specs.extremes(x, spec, 'activation')[1].astype(jnp.float32)
  return jnp.where(high > 0, high, 1.0)


def _round_learned(x, parameter, spec, method):
  if method == 'pact':
    return pact(x, parameter, spec.bits)
  first, last = _codes(spec)
  features = max(x.size // max(x.shape[0], 1) // parameter.size, 1)
  return lsq(x, parameter, first, last, lsq_gradient_factor(features, last))


def init_learned_activations(
  student_fn: StudentFn,
  variables: Variables,
  batch: Batch,
  rules: rules_lib.Rules[QuantSpec] = (),
) -> dict[str, Any]:
  """The parameters with those of `learned_activations` among them.

  A batch is run through the model in training mode, unrounded, and every
  parameter starts from the values that its layer saw: LSQ's step by
  `initial_step`, PACT's alpha at the largest. A layer called several times
  starts from the last call.

  Args:
    student_fn: a forward with `learned_activations` among its interceptors.
    variables: the model's variables.
    batch: one batch.
    rules: its rules, to check that each matches a layer.

  Returns:
    `params`, a nested dict; the other collections are not changed.

  Raises:
    ValueError: if no layer has a learned range, a rule matches no layer, or a
      layer lies in a scan that does not carry `quant_stats`.
  """
  variables = {k: v for k, v in variables.items() if k != COLLECTION}
  marked, _ = inputs.marked_layers(student_fn, variables, batch)
  layers = marked.get('learned', set())
  if not layers:
    raise ValueError(
      'No layer of the model has a learned range: the rules match no '
      f'{", ".join(sorted(inputs.LAYERS))} layer without one.'
    )
  known = sorted(set().union(*marked.values()))
  rules_lib.match(rules, known, kind='activation rule')

  @jax.jit
  def first_values(variables, batch):
    forward = student_fn(variables, batch, jax.random.key(0), train=True)
    return forward.model_state.get(COLLECTION, {})

  values = first_values(dict(variables), dict(batch))
  values = {
    name: value
    for name, value in traverse_util.flatten_dict(values, sep='/').items()
    if name.endswith(tuple(_SUFFIX.values()))
  }
  lost = sorted(layers - {'/'.join(n.split('/')[:-1]) for n in values})
  if lost:
    raise ValueError(
      f'The learned range of {lost[0]!r} cannot be made: a scan or map around '
      f"it must carry the values it saw, with variable_axes={{'{COLLECTION}': "
      '0}.'
    )
  params = traverse_util.flatten_dict(variables['params'], sep='/')
  return traverse_util.unflatten_dict({**params, **values}, sep='/')


def learned_ranges(
  params: Mapping[str, Any], rules: rules_lib.Rules[QuantSpec]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Learned ranges of activations as if they had been observed.

  Args:
    params: with the parameters of `learned_activations`.
    rules: its rules.

  Returns:
    `(params without them, quant_stats)`: the state of a `min_max` observer for
    each, whose range gives the learned scale.
  """
  flat = traverse_util.flatten_dict(params, sep='/')
  stats: dict[str, ArrayLike] = {}
  for name in [n for n in flat if n.endswith(tuple(_SUFFIX.values()))]:
    layer, entry = name.rsplit('/', 1)
    spec = rules_lib.first(rules, layer)
    if spec is None or layer.split('/')[0] == STEPS:
      continue
    value = jnp.maximum(flat.pop(name), _LEAST)
    if entry.endswith(_SUFFIX['lsq']):
      value = value * (spec.qmax if spec.symmetric else _codes(spec)[1])
    path = f'{layer}/{entry.rsplit("_", 1)[0]}'
    stats[f'{path}/low'] = -value if spec.symmetric else jnp.zeros_like(value)
    stats[f'{path}/high'] = value
    stats[f'{path}/count'] = jnp.ones_like(value)
  return (
    traverse_util.unflatten_dict(flat, sep='/'),
    traverse_util.unflatten_dict(stats, sep='/'),
  )
