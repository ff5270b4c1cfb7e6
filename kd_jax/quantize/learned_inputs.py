"""Learned ranges of activations: LSQ and PACT inside of linen models.

Owns the interceptor and its parameters, which live among the layers' own in
`params`, and any optimizer trains them: LSQ's step is
`<layer path>/input<i>_step` and PACT's clipping value
`<layer path>/input<i>_alpha`. Rules reach them by these names, as for the L2
decay that PACT asks for. The maps themselves are in `learned`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.typing import ArrayLike

from kd_jax import rules as rules_lib
from kd_jax.quantize import inputs, learned, specs
from kd_jax.quantize.activations import COLLECTION
from kd_jax.quantize.specs import QuantSpec
from kd_jax.types import Batch, StudentFn, Variables

SUFFIXES = {'lsq': '_step', 'pact': '_alpha'}
_LEARNED = re.compile(r'input\d+_(step|alpha)')


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

  Example:
    >>> from flax import linen as nn
    >>> rules = [('.*', QuantSpec(symmetric=False, narrow=False))]
    >>> params = {
    ...   'kernel': jnp.ones((2, 1)), 'bias': jnp.zeros(1),
    ...   'input0_step': jnp.float32(0.5),
    ... }
    >>> with nn.intercept_methods(learned_activations(rules)):
    ...   y = nn.Dense(1).apply({'params': params}, jnp.array([[0.9, -3.0]]))
    >>> float(y[0, 0])
    1.0
  """
  suffix = rules_lib.choose('method', method, SUFFIXES)
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
      if spec.axis is None:
        value = value.reshape(())
      inputs.write(scope, COLLECTION, names, value)
    return x

  return inputs.intercept_inputs(
    round_input, lambda layer: rules_lib.first(rules, layer) is not None
  )


def _initial_step(x: jax.Array, spec: QuantSpec) -> jax.Array:
  return learned.initial_step(x, spec, name='activation')


def _initial_alpha(x: jax.Array, spec: QuantSpec) -> jax.Array:
  high = specs.extremes(x, spec, 'activation')[1].astype(jnp.float32)
  return jnp.where(high > 0, high, 1.0)


def _round_learned(
  x: jax.Array, parameter: jax.Array, spec: QuantSpec, method: str
) -> jax.Array:
  if method == 'pact':
    return learned.pact(x, parameter, spec.bits)
  first, last = learned.codes_from_zero(spec)
  features = max(x.size // max(x.shape[0], 1) // parameter.size, 1)
  factor = learned.lsq_gradient_factor(features, last)
  return learned.lsq(x, parameter, first, last, factor)


def init_learned_activations(
  student_fn: StudentFn,
  variables: Variables,
  batch: Batch,
  rules: rules_lib.Rules[QuantSpec] = (),
) -> dict[str, Any]:
  """The parameters with those of `learned_activations` among them.

  A batch is run through the model in training mode, unrounded, and every
  parameter starts from the values that its layer saw: LSQ's step by
  `learned.initial_step`, PACT's alpha at the largest. A layer called several
  times starts from the last call.

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

  Example:
    >>> from flax import linen as nn
    >>> from kd_jax import adapters
    >>> rules = [('.*', QuantSpec(symmetric=False, narrow=False))]
    >>> forward = adapters.from_linen(
    ...   nn.Sequential([nn.Dense(1)]), train_argument=None,
    ...   interceptors=[learned_activations(rules, method='pact')])
    >>> layer = {'kernel': jnp.ones((2, 1)), 'bias': jnp.zeros(1)}
    >>> variables = {'params': {'layers_0': layer}}
    >>> batch = {'image': jnp.array([[1.0, 6.0]])}
    >>> params = init_learned_activations(forward, variables, batch, rules)
    >>> float(params['layers_0']['input0_alpha'])
    6.0
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
    if name.endswith(tuple(SUFFIXES.values()))
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

  Raises:
    ValueError: for a range per axis.

  Example:
    >>> params = {'dense': {'input0_step': jnp.float32(0.5)}}
    >>> rules = [('.*', QuantSpec(bits=4, symmetric=False, narrow=False))]
    >>> rest, stats = learned_ranges(params, rules)
    >>> rest, float(stats['dense']['input0']['high'])
    ({}, 7.5)
  """
  flat = traverse_util.flatten_dict(params, sep='/')
  stats: dict[str, ArrayLike] = {}
  for name in list(flat):
    layer, _, entry = name.rpartition('/')
    if not _LEARNED.fullmatch(entry):
      continue
    spec = rules_lib.first(rules, layer)
    if spec is None or layer.split('/')[0] == learned.STEPS:
      continue
    value = jnp.maximum(flat.pop(name), learned.LEAST)
    if spec.axis is not None:
      raise ValueError(f'{name}: only a range per tensor can be observed.')
    if entry.endswith(SUFFIXES['lsq']):
      value = value * learned.codes_from_zero(spec)[1]
    path = name.rpartition('_')[0]
    stats[f'{path}/low'] = -value if spec.symmetric else jnp.zeros_like(value)
    stats[f'{path}/high'] = value
    stats[f'{path}/count'] = jnp.ones_like(value)
  return (
    traverse_util.unflatten_dict(flat, sep='/'),
    traverse_util.unflatten_dict(stats, sep='/'),
  )
