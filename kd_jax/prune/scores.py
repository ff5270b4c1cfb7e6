"""Scores: how much each weight matters, as pure functions over dicts of arrays.

Owns the criteria and their memory over steps. How many weights stay, and in
which units, is the matter of `scopes` and `structures`.
"""

import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from kd_jax import rules as rules_lib
from kd_jax.placement import gathered, placed_like
from kd_jax.prune.masks import choose_params
from kd_jax.types import Arrays


class Score(NamedTuple):
  """Functions over dicts of parameter path -> array; the largest stay.

  Attributes:
    init: `(weights) -> state`, a pytree of arrays, before any gradient.
    update: `(state, weights, grads) -> state`, once a step, before the masks
      of that step are made.
    value: `(state, weights) -> scores`, float32 arrays of the same shapes.

  Example:
    >>> rows = Score(
    ...   init=lambda weights: (),
    ...   update=lambda state, weights, grads: (),
    ...   value=lambda state, weights: {
    ...     name: jnp.broadcast_to(abs(w).sum(1, keepdims=True), w.shape)
    ...     for name, w in weights.items()})
    >>> w = jnp.array([[1.0, -2.0], [0.0, 1.0]])
    >>> rows.value((), {'w': w})['w'].tolist()
    [[3.0, 3.0], [1.0, 1.0]]
  """

  init: Callable[[Arrays], Any]
  update: Callable[[Any, Arrays, Arrays], Any]
  value: Callable[[Any, Arrays], Arrays]


def _of_weights(value: Callable[[str, jax.Array], jax.Array]) -> Score:
  """A score without memory: a function of a path and its float32 weights."""

  def values(state, weights):
    return {n: one(n, w.astype(jnp.float32)) for n, w in weights.items()}

  def one(name, w):
    # A weight that is NaN has no score; scores lie where weights do.
    score = placed_like(value(name, w), w)
    return jnp.where(jnp.isnan(w), w, score)

  return Score(lambda weights: (), lambda state, weights, grads: (), values)


def magnitude(p: float = 1) -> Score:
  """|w|**p.

  Args:
    p: > 0; of importance only where scores are pooled into those of units.

  Raises:
    ValueError: for p <= 0.

  Example:
    >>> score = magnitude(p=2)
    >>> score.value((), {'w': jnp.array([-3.0, 2.0])})['w'].tolist()
    [9.0, 4.0]

  References:
    Han et al., "Learning both Weights and Connections", 2015,
    arXiv:1506.02626.
  """
  if p <= 0:
    raise ValueError(f'magnitude: p must be > 0, not {p}.')
  power = (lambda w: w) if p == 1 else (lambda w: w**p)
  return _of_weights(lambda name, w: power(jnp.abs(w)))


class AverageState(flax.struct.PyTreeNode):
  """Memory of a score that averages over steps.

  Attributes:
    count: int32 scalar, number of steps averaged.
    mean: parameter path -> float32 average.
  """

  count: jax.Array
  mean: Arrays


def _averaged(
  decay: float,
  contribution: Callable[[jax.Array, jax.Array], jax.Array],
  value: Callable[[jax.Array, jax.Array], jax.Array],
) -> Score:
  """A score whose memory is a moving average of a contribution per step."""
  if not 0 <= decay <= 1:
    raise ValueError(f'The decay of a score is in [0, 1], not {decay}.')

  def init(weights):
    zeros = {n: jnp.zeros_like(w, jnp.float32) for n, w in weights.items()}
    return AverageState(jnp.int32(0), zeros)

  def update(state, weights, grads):
    new = {
      n: contribution(w.astype(jnp.float32), grads[n].astype(jnp.float32))
      for n, w in weights.items()
    }
    count = (state.count + 1).astype(jnp.float32)
    rate = 1 / count if decay == 1 else (1 - decay) / (1 - decay**count)
    # One overflow, as of a loss scale that is too large, would stay for ever.
    finite = jnp.all(
      jnp.stack([jnp.all(jnp.isfinite(c)) for c in new.values()])
    )
    mean = {
      n: jnp.where(finite, m + rate * (new[n] - m), m)
      for n, m in state.mean.items()
    }
    return AverageState(state.count + finite.astype(jnp.int32), mean)

  def values(state, weights):
    return {
      n: value(state.mean[n], w.astype(jnp.float32)) for n, w in weights.items()
    }

  return Score(init, update, values)


def taylor(decay: float = 0.9, *, squared: bool = False) -> Score:
  """E|w g|, the change of the loss to first order if the weight were 0.

  The gradient is that of whatever objective is trained, distillation
  included, of one batch at a time. E is an exponential moving average over
  steps, corrected for its start; a step whose contributions are not all
  finite is left out.

  Args:
    decay: of the average, in [0, 1]; 1 is the plain mean of all steps.
    squared: E (w g)**2 instead, as in the paper.

  Raises:
    ValueError: for a decay outside [0, 1].

  Example:
    >>> weights, grads = {'w': jnp.array([1.0, 2])}, {'w': jnp.array([3.0, -4])}
    >>> score = taylor()
    >>> state = score.update(score.init(weights), weights, grads)
    >>> [round(float(v), 4) for v in score.value(state, weights)['w']]
    [3.0, 8.0]

  References:
    Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019,
    arXiv:1906.10771.
  """
  power = jnp.square if squared else jnp.abs
  return _averaged(decay, lambda w, g: power(w * g), lambda mean, w: mean)


def fisher(decay: float = 0.99) -> Score:
  """w**2 E[g**2] / 2, the change of the loss to second order.

  E[g**2], of the gradients of batches, stands for the diagonal of the Hessian.

  Args:
    decay: of the average, as for `taylor`.

  Raises:
    ValueError: for a decay outside [0, 1].

  Example:
    >>> weights, grads = {'w': jnp.array([1.0, 2])}, {'w': jnp.array([2.0, 3])}
    >>> score = fisher()
    >>> state = score.update(score.init(weights), weights, grads)
    >>> [round(float(v), 4) for v in score.value(state, weights)['w']]
    [2.0, 18.0]

  References:
    LeCun, Denker, Solla, "Optimal Brain Damage", 1989; Theis et al., 2018,
    arXiv:1801.05787 (with the Fisher information).
  """
  return _averaged(
    decay,
    lambda w, g: jnp.square(g),
    lambda mean, w: jnp.square(w) * mean / 2,
  )


def snip() -> Score:
  """|w g| of the first batch: pruning at initialization.

  Train with `schedules.constant` and the scope 'global', from dense weights:
  the first step's gradient decides, and later ones change nothing. The paper
  divides by the sum of all, which changes no order.

  Example:
    >>> weights, score = {'w': jnp.array([1.0, 2.0])}, snip()
    >>> state = score.init(weights)
    >>> for grad in ([3.0, 1.0], [0.0, 9.0]):
    ...   state = score.update(state, weights, {'w': jnp.array(grad)})
    >>> score.value(state, weights)['w'].tolist()
    [3.0, 2.0]

  References:
    Lee, Ajanthan, Torr, 2018, arXiv:1810.02340.
  """
  every = taylor(decay=0)

  def update(state, weights, grads):
    new = every.update(state, weights, grads)
    return jax.tree.map(
      lambda a, b: jnp.where(state.count == 0, a, b), new, state
    )

  return every._replace(update=update)


def movement(learning_rate: float) -> Score:
  """S <- S - learning_rate g w: weights that move away from 0 score high.

  Signed: a weight that shrinks scores below 0, whatever its size. In the paper
  the gradient is that at the masked weights and reaches all of them: use
  `revive='gradient'`. Before the first gradient all scores are equal. A step
  with a contribution that is not finite is left out.

  Args:
    learning_rate: of the scores; sets their unit only, unless it is 0.

  Example:
    >>> weights, grads = {'w': jnp.array([1.0, 2])}, {'w': jnp.array([-1.0, 1])}
    >>> score = movement(0.5)
    >>> state = score.update(score.init(weights), weights, grads)
    >>> score.value(state, weights)['w'].tolist()
    [0.5, -1.0]

  References:
    Sanh, Wolf, Rush, "Movement Pruning", 2020, arXiv:2005.07683.
  """

  def init(weights):
    return {n: jnp.zeros_like(w, jnp.float32) for n, w in weights.items()}

  def update(state, weights, grads):
    new = {
      n: s
      - learning_rate
      * grads[n].astype(jnp.float32)
      * weights[n].astype(jnp.float32)
      for n, s in state.items()
    }
    finite = jnp.all(
      jnp.stack([jnp.all(jnp.isfinite(s)) for s in new.values()])
    )
    return {n: jnp.where(finite, new[n], s) for n, s in state.items()}

  return Score(init, update, lambda state, weights: state)


def lamp() -> Score:
  """w**2 over the sum of all w**2 of the layer that are not smaller.

  The largest weight of every layer scores 1, so that one threshold over all
  layers ('global') empties none and needs no densities. Of equal weights the
  one with the lower index counts as the larger. The score sorts each parameter
  by itself, which gathers a sharded one.

  Example:
    >>> lamp().value((), {'w': jnp.array([1.0, -2.0, 2.0])})['w'].tolist()
    [0.1111111119389534, 1.0, 0.5]

  References:
    Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", 2020,
    arXiv:2010.07611.
  """

  def value(name, w):
    for axis in range(w.ndim):
      w = gathered(w, axis)
    square = jnp.square(w).ravel()
    order = jnp.argsort(-square, stable=True)
    square = square[order]
    total = jnp.cumsum(square)
    score = jnp.where(square == 0, 0.0, square / total)
    return jnp.zeros_like(score).at[order].set(score).reshape(w.shape)

  return _of_weights(value)


def random(seed: int = 0) -> Score:
  """Uniform in [0, 1), the same at every step: the baseline of every table.

  A weight's score depends on the seed, its parameter's path and its index.

  Args:
    seed: another seed gives other scores.

  Example:
    >>> weights = {'w': jnp.zeros(3)}
    >>> one, other = (random(seed).value((), weights)['w'] for seed in (0, 1))
    >>> one.shape, bool((one == other).any())
    ((3,), False)
  """

  def value(name, w):
    return jax.random.uniform(path_key(jax.random.key(seed), name), w.shape)

  return _of_weights(value)


def path_key(key: jax.Array, name: str) -> jax.Array:
  """A key for one parameter; it depends on the path, not on the position."""
  return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def magnitudes(params: Any) -> dict[str, jax.Array]:
  """|w| of every parameter, for `masks_from` and `choose_units`.

  Args:
    params: any pytree of arrays.

  Returns:
    parameter path -> array of the parameter's shape.

  Example:
    >>> magnitudes({'dense': {'kernel': jnp.array([-2.0, 1.0])}})
    {'dense/kernel': Array([2., 1.], dtype=float32)}
  """
  leaves = rules_lib.named_leaves(params)
  return {name: jnp.abs(leaf) for name, leaf in leaves.items()}


def accumulate(
  score: Score,
  grad_fn: Callable[[Any, Any], Any],
  params: Any,
  batches: Iterable[Any],
  *,
  rules: rules_lib.Rules[bool] = (('.*', True),),
) -> Arrays:
  """Scores a trained model from batches, without training it.

  Args:
    score: any score; give `taylor` and `fisher` a decay of 1 for the plain
      mean over the batches.
    grad_fn: `(params, batch) -> gradients`, a tree like `params`; it is
      compiled here.
    params: any pytree of arrays.
    batches: at least one.
    rules: `(pattern, True or None)` pairs that choose parameters by path.

  Returns:
    parameter path -> float32 scores, for `masks_from`.

  Raises:
    ValueError: if there is no batch, or a rule matches nothing.

  Example:
    >>> loss = lambda params, x: jnp.sum(params['w'] * x)
    >>> params = {'w': jnp.array([1.0, 2.0])}
    >>> batches = [jnp.ones(2), -jnp.ones(2)]
    >>> scores = accumulate(taylor(decay=1), jax.grad(loss), params, batches)
    >>> scores['w'].tolist()
    [1.0, 2.0]
  """
  weights = choose_params(params, rules)

  @jax.jit
  def update(state, params, batch):
    grads = choose_params(grad_fn(params, batch), rules)
    return score.update(state, choose_params(params, rules), grads)

  state, seen = score.init(weights), False
  for batch in batches:
    state, seen = update(state, params, batch), True
  if not seen:
    raise ValueError('accumulate: there is no batch to score with.')
  return score.value(state, weights)
