"""Learned steps: LSQ and PACT with their gradients, and LSQ for weights.

Owns the two maps and the steps of weights. They are trainable parameters, in
`params`, and any optimizer trains them: the step of a weight is
`quant_steps/<path>_step`, by which rules reach it. Those of activations are in
`learned_inputs`.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from kd_jax import rules as rules_lib
from kd_jax.quantize import specs
from kd_jax.quantize.specs import QuantSpec, per_group

STEPS = 'quant_steps'
_SUFFIX = '_step'
# A step that an optimizer drives to 0 or below acts as this; it still gets
# its gradient.
LEAST = 1e-12


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


def _lsq_fwd(
  x: jax.Array, step: jax.Array, first: int, last: int, gradient_factor: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  size = jnp.maximum(step, LEAST)
  code = jnp.round(x.astype(jnp.float32) * (1 / size))
  y = (jnp.clip(code, first, last) * size).astype(x.dtype)
  return y, (x, step)


def _lsq_bwd(
  first: int,
  last: int,
  gradient_factor: float,
  residuals: tuple[jax.Array, jax.Array],
  g: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  x, step = residuals
  t = x.astype(jnp.float32) * (1 / jnp.maximum(step, LEAST))
  code = jnp.round(t)
  inside = (code >= first) & (code <= last)
  slope = jnp.where(inside, code - t, jnp.clip(code, first, last))
  to_step = _sum_to(g.astype(jnp.float32) * slope, jnp.shape(step))
  return (
    jnp.where(inside, g, 0).astype(x.dtype),
    (to_step * gradient_factor).astype(step.dtype),
  )


lsq.defvjp(_lsq_fwd, _lsq_bwd)


def _sum_to(values: jax.Array, shape: Sequence[int]) -> jax.Array:
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


def _pact_fwd(
  x: jax.Array, alpha: jax.Array, bits: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  limit = jnp.maximum(alpha, LEAST)
  scale = limit / (2**bits - 1)
  y = jnp.round(jnp.clip(x.astype(jnp.float32), 0, limit) / scale) * scale
  return y.astype(x.dtype), (x, alpha)


def _pact_bwd(
  bits: int, residuals: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
  x, alpha = residuals
  limit = jnp.maximum(alpha, LEAST)
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

  Example:
    >>> round(lsq_gradient_factor(100, 7), 4)
    0.0378

  References:
    Esser et al., 2019, arXiv:1902.08153, section 2.2.
  """
  return 1 / math.sqrt(count * positive)


def codes_from_zero(spec: QuantSpec) -> tuple[int, int]:
  """The smallest and the largest code, counted from that of 0.

  Affine quantizers are taken as unsigned: their codes start at 0.

  Args:
    spec: the quantizer.

  Example:
    >>> codes_from_zero(QuantSpec(bits=4, symmetric=False, narrow=False))
    (0, 15)
  """
  if spec.symmetric:
    return spec.qmin, spec.qmax
  return 0, spec.qmax - spec.qmin


def initial_step(
  x: jax.Array, spec: QuantSpec, *, name: str = 'tensor'
) -> jax.Array:
  """LSQ's first step: 2 mean|x| / sqrt(largest code).

  The mean is over the values that are not 0, as it has to be for pruned
  weights.

  Args:
    x: the weight, or a batch of the activation.
    spec: the quantizer; its axes and groups have a step each.
    name: of the tensor, for errors.

  Returns:
    float32, laid out as `fake_quant.weight_scale` does; 1 where all is 0.

  References:
    Esser et al., 2019, arXiv:1902.08153, section 2.1.
  """
  blocks, shape = specs.rows(x, spec, name)
  size = jnp.abs(blocks.astype(jnp.float32))
  count = jnp.sum(size > 0, axis=-1, dtype=jnp.float32)
  mean = jnp.sum(size, axis=-1) / jnp.maximum(count, 1)
  step = 2 * mean / math.sqrt(codes_from_zero(spec)[1])
  return jnp.where(step > 0, step, 1.0).reshape(shape)


def step_of(steps: Mapping[str, jax.Array], path: str) -> jax.Array | None:
  """The step of a weight as `lsq` uses it, or None without one.

  Args:
    steps: `quant_steps`, flat.
    path: of the weight.
  """
  step = steps.get(f'{path}{_SUFFIX}')
  return None if step is None else jnp.maximum(step, LEAST)


def _weight_specs(
  params: Any, rules: rules_lib.Rules[QuantSpec]
) -> dict[str, QuantSpec]:
  names = rules_lib.leaf_names(params)
  chosen = rules_lib.match(rules, names, kind='weight rule')
  for name, spec in chosen.items():
    if not spec.symmetric:
      raise ValueError(f'{name}: LSQ quantizes weights symmetrically.')
  return chosen


def init_lsq_params(
  params: Mapping[str, Any], rules: rules_lib.Rules[QuantSpec]
) -> dict[str, Any]:
  """Adds the steps of the weights that rules choose to the parameters.

  Args:
    params: nested dicts of arrays.
    rules: `(pattern, QuantSpec or None)` pairs on parameter paths; symmetric.

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
  leaves = rules_lib.named_leaves(params)
  steps = {
    f'{name}{_SUFFIX}': initial_step(leaves[name], spec, name=name)
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
    ValueError: if there are no steps, none for a parameter, or a rule matches
      nothing.

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
    if f'{name}{_SUFFIX}' not in steps:
      raise ValueError(
        f'lsq_params: {name!r} has no step: init_lsq_params got other rules.'
      )
    spec, step = chosen[name], steps[f'{name}{_SUFFIX}']
    factor = lsq_gradient_factor(w.size // step.size, spec.qmax)
    return lsq(w, per_group(step, w), spec.qmin, spec.qmax, factor)

  leaves, structure = jax.tree.flatten(rest)
  new = map(one, rules_lib.leaf_names(rest), leaves)
  return jax.tree.unflatten(structure, new)
