"""AdaRound of one layer, or of a scanned stack of layers.

Owns the search for the codes of one kernel: its loss, its steps of Adam, and
the comparison with nearest rounding. Which layers there are, and what goes into
them, is known to `rounding`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kd_jax.quantize.specs import QuantSpec

# The stretched sigmoid of the paper: h reaches 0 and 1.
_LOW, _HIGH = -0.1, 1.1
_ADAM = optax.scale_by_adam()


class Rounding(NamedTuple):
  """How a layer is rounded; static in compiled functions.

  Attributes:
    module: the layer apart from its model.
    spec: of its kernel.
    stack: number of leading axes of the kernel that count layers.
    steps: see `adaround`, and so are the others.
  """

  module: Any
  spec: QuantSpec
  stack: int
  steps: int
  batch_size: int
  warm_start: float
  beta: tuple[float, float]


class Problem(NamedTuple):
  """The arrays of a layer, or of every layer in a stack.

  Attributes:
    params: of the module.
    scale: of the kernel, with its shape.
    x: the layer's inputs.
    y: its outputs to come close to, or None for those of the kernel itself.
    unit: the error of rounding to nearest.
  """

  params: dict[str, jax.Array]
  scale: jax.Array
  x: jax.Array
  y: jax.Array | None
  unit: jax.Array | None = None


def round_layer(
  how: Rounding,
  problem: Problem,
  rng: jax.Array,
  learning_rate: float,
  regularization: float,
) -> jax.Array:
  """The kernel on its grid.

  Each step is one call of a compiled function: on CPUs, convolutions inside of
  XLA's loops are some 15 times slower.

  Args:
    how: the layer is rounded.
    problem: its arrays.
    rng: key of the draws.
    learning_rate: of Adam.
    regularization: weight of the pull towards 0 and 1.
  """
  problem, state = _start(how, problem)
  for i in range(how.steps):
    state = _step(how, problem, state, i, rng, learning_rate, regularization)
  return _finish(how, problem, state[0])


def _stacked(fn: Callable[..., Any], how: Rounding, *args: Any) -> Any:
  for _ in range(how.stack):
    fn = jax.vmap(fn)
  return fn(*args)


@functools.partial(jax.jit, static_argnums=0)
def _start(how: Rounding, problem: Problem) -> tuple[Problem, Any]:
  """The problem without None, and `(V, state of Adam)`."""

  def one(p):
    y = _run(how, p, _ratios(p), p.x) if p.y is None else p.y
    p = p._replace(y=y.astype(jnp.float32))
    unit = _error(how, p, _nearest(how, p), p.x, p.y)
    v = _soft_inverse(_ratios(p) - jnp.floor(_ratios(p)))
    p = p._replace(unit=jnp.where(unit > 0, unit, 1.0))
    return p, (v, _ADAM.init(v))

  return _stacked(one, how, problem)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(
  how: Rounding,
  problem: Problem,
  state: Any,
  i: int,
  rng: jax.Array,
  learning_rate: float,
  regularization: float,
) -> Any:
  """`(V, state of Adam)` after the next step."""
  rows = jax.random.randint(
    jax.random.fold_in(rng, i),
    (how.batch_size,),
    0,
    problem.x.shape[how.stack],
  )
  late = (i / how.steps - how.warm_start) / (1 - how.warm_start)
  weight = jnp.where(late > 0, regularization, 0.0)
  cosine = (1 + jnp.cos(jnp.pi * jnp.clip(late, 0, 1))) / 2
  power = how.beta[1] + (how.beta[0] - how.beta[1]) * cosine

  def loss(v, p):
    h = _soft(v)
    pull = jnp.where(_fixed(how, p), 0.0, 1 - jnp.abs(2 * h - 1) ** power)
    error = _error(how, p, _codes(how, p, h), p.x[rows], p.y[rows])
    return error / p.unit + weight * jnp.mean(pull)

  def one(p, state):
    v, opt_state = state
    updates, opt_state = _ADAM.update(jax.grad(loss)(v, p), opt_state)
    return v - learning_rate * updates, opt_state

  return _stacked(one, how, problem, state)


@functools.partial(jax.jit, static_argnums=0)
def _finish(how: Rounding, problem: Problem, v: jax.Array) -> jax.Array:
  """The learned kernel, or the one rounded to nearest if that is as good."""

  def one(p, v):
    learned = _codes(how, p, (_soft(v) >= 0.5).astype(jnp.float32))
    nearest = _nearest(how, p)
    errors = [_error(how, p, code, p.x, p.y) for code in (learned, nearest)]
    code = jnp.where(errors[0] < errors[1], learned, nearest)
    return (code * p.scale).astype(p.params['kernel'].dtype)

  return _stacked(one, how, problem, v)


def _ratios(p: Problem) -> jax.Array:
  return p.params['kernel'].astype(jnp.float32) / p.scale


def _nearest(how: Rounding, p: Problem) -> jax.Array:
  return jnp.clip(jnp.round(_ratios(p)), how.spec.qmin, how.spec.qmax)


def _fixed(how: Rounding, p: Problem) -> jax.Array:
  # Without the weights that set it the scale would be another.
  return jnp.abs(_nearest(how, p)) >= how.spec.qmax


def _codes(how: Rounding, p: Problem, h: jax.Array) -> jax.Array:
  """Codes between those below and above every weight."""
  learned = jnp.floor(_ratios(p)) + h
  learned = jnp.clip(learned, how.spec.qmin, how.spec.qmax)
  return jnp.where(_fixed(how, p), _nearest(how, p), learned)


def _run(how: Rounding, p: Problem, code: jax.Array, x: jax.Array) -> jax.Array:
  kernel = (code * p.scale).astype(p.params['kernel'].dtype)
  out = how.module.apply({'params': {**p.params, 'kernel': kernel}}, x)
  return out.astype(jnp.float32)


def _error(
  how: Rounding, p: Problem, code: jax.Array, x: jax.Array, y: jax.Array
) -> jax.Array:
  return jnp.sum(jnp.square(_run(how, p, code, x) - y)) / x.shape[0]


def _soft(v: jax.Array) -> jax.Array:
  return jnp.clip(jax.nn.sigmoid(v) * (_HIGH - _LOW) + _LOW, 0.0, 1.0)


def _soft_inverse(h: jax.Array) -> jax.Array:
  p = (h - _LOW) / (_HIGH - _LOW)
  return jnp.log(p) - jnp.log1p(-p)
