"""Objectives: what a student is trained for, as (init, apply) pairs.

An objective is to losses what an optax transformation is to updates: it may
own trainable parameters and state, and objectives combine into objectives.
The formulas themselves live in `losses`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.types import Batch, Forward, Metrics

Schedule = Callable[[jax.Array], jax.Array]
Scalar = float | Schedule


class Inputs(NamedTuple):
  """What an objective sees of one step.

  Attributes:
    student: the student's forward.
    teacher: the teacher's forward, already constant; None without a teacher.
    batch: the batch, with `label` `[B]` int for classification or `target`
      `[B, D]` for regression.
    step: int32 scalar, number of completed steps; drives schedules.
    rng: a typed key of this step, the same on every device.
  """

  student: Forward
  teacher: Forward | None
  batch: Batch
  step: jax.Array
  rng: jax.Array


class Objective(NamedTuple):
  """A pair of pure functions; every term and every sum of terms is one.

  Attributes:
    init: `(inputs) -> (params, state)`. Called under `jax.eval_shape`-like
      conditions: it may look at shapes, dtypes and `inputs.rng` only.
    apply: `(params, state, inputs) -> (loss, state, metrics)`; `loss` is a
      scalar or `[B]` per example, differentiable in `params` and the student.
  """

  init: Callable[[Inputs], tuple[Any, Any]]
  apply: Callable[[Any, Any, Inputs], tuple[jax.Array, Any, Metrics]]


def term(loss_fn: Callable[[Inputs], Any]) -> Objective:
  """A term without parameters or state, from one function of the inputs.

  Args:
    loss_fn: `(inputs) -> loss` or `(inputs) -> (loss, metrics)`, with loss
      `[B]` or scalar.

  Example:
    A new distillation loss is one function and this call:

    >>> def l1_of_logits(inputs):
    ...   gap = inputs.student.output - inputs.teacher.output
    ...   return jnp.mean(jnp.abs(gap), axis=-1)
    >>> objective = weighted_sum({'l1': (1.0, term(l1_of_logits))})
  """

  def apply(params, state, inputs):
    out = loss_fn(inputs)
    loss, metrics = out if isinstance(out, tuple) else (out, {})
    return loss, state, metrics

  return Objective(lambda inputs: ({}, {}), apply)


def value_at(scalar: Scalar, step: jax.Array) -> jax.Array | float:
  """The value of a constant or of a schedule at a step."""
  return scalar(step) if callable(scalar) else scalar


def soft_targets(*, temperature: Scalar = 4.0) -> Objective:
  """Distillation with soft targets, `losses.kl_divergence`, times T**2.

  Args:
    temperature: T > 0, or a schedule `step -> T`.

  Raises:
    ValueError: for a constant temperature that is not positive.
  """
  if not callable(temperature) and temperature <= 0:
    raise ValueError(f'soft_targets: temperature={temperature} is not > 0.')

  def loss_fn(inputs):
    return losses.kl_divergence(
      inputs.student.output,
      _teacher(inputs, 'soft_targets').output,
      temperature=value_at(temperature, inputs.step),
    )

  return term(loss_fn)


def hard_labels(*, label_smoothing: float = 0.0) -> Objective:
  """Cross-entropy with `batch['label']`; also reports `accuracy`.

  Args:
    label_smoothing: see `losses.cross_entropy`.
  """

  def loss_fn(inputs):
    logits, label = inputs.student.output, _entry(inputs, 'label')
    loss = losses.cross_entropy(logits, label, label_smoothing=label_smoothing)
    hits = jnp.argmax(logits, axis=-1) == label
    return loss, {'accuracy': jnp.mean(hits.astype(jnp.float32))}

  return term(loss_fn)


def regression(*, to: str = 'target') -> Objective:
  """Mean squared error to the labels or to the teacher.

  Args:
    to: 'target' for `batch['target']` `[B, D]`, 'teacher' for the teacher's
      output of the same shape as the student's (also logit matching).
  """
  if to not in ('target', 'teacher'):
    raise ValueError(f"regression: to={to!r} is not 'target' or 'teacher'.")

  def loss_fn(inputs):
    if to == 'teacher':
      target = _teacher(inputs, 'regression').output
    else:
      target = _entry(inputs, 'target')
    return losses.squared_error(inputs.student.output, target)

  return term(loss_fn)


def weighted_sum(terms: Mapping[str, tuple[Scalar, Objective]]) -> Objective:
  """The sum of weighted terms, each averaged over the batch.

  Args:
    terms: name -> `(weight, term)`; a weight is a float or a schedule
      `step -> weight`.

  Returns:
    An objective whose loss is a scalar, and whose metrics hold the unweighted
    `loss/<name>` of every term, `loss/total`, and the terms' own metrics.

  Example:
    >>> objective = weighted_sum({
    ...   'kd': (0.9, soft_targets(temperature=4.0)),
    ...   'ce': (0.1, hard_labels()),
    ... })
  """
  if not terms:
    raise ValueError('weighted_sum needs at least one term.')

  def keyed(inputs, index):
    return inputs._replace(rng=jax.random.fold_in(inputs.rng, index))

  def init(inputs):
    made = {
      name: objective.init(keyed(inputs, i))
      for i, (name, (_, objective)) in enumerate(terms.items())
    }
    params = {name: p for name, (p, _) in made.items()}
    state = {name: s for name, (_, s) in made.items()}
    return params, state

  def apply(params, state, inputs):
    total, new_state, metrics = jnp.float32(0.0), {}, {}
    for i, (name, (weight, objective)) in enumerate(terms.items()):
      loss, new_state[name], extra = objective.apply(
        params[name], state[name], keyed(inputs, i)
      )
      loss = jnp.mean(loss)
      total += value_at(weight, inputs.step) * loss
      metrics |= extra | {f'loss/{name}': loss}
    return total, new_state, metrics | {'loss/total': total}

  return Objective(init, apply)


def _teacher(inputs: Inputs, name: str) -> Forward:
  if inputs.teacher is None:
    raise ValueError(
      f'{name} needs a teacher: give make_train_step a teacher_fn and '
      'init_state the teacher variables.'
    )
  return inputs.teacher


def _entry(inputs: Inputs, key: str) -> jax.Array:
  if key not in inputs.batch:
    raise ValueError(
      f'The objective needs batch[{key!r}]; the batch has '
      f'{", ".join(map(repr, inputs.batch))}.'
    )
  return inputs.batch[key]
