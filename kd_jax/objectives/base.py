"""Objectives: what a student is trained for, as (init, apply) pairs.

Owns the types, the weighted sum, and how a term reads features, parameters and
batch, with errors that say what is missing. An objective is to losses what an
optax transformation is to updates: it may own trainable parameters and state,
and objectives combine into objectives. The terms are in the other files, the
formulas in `losses`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import rules
from kd_jax.objectives.inputs import Inputs, mean
from kd_jax.types import (
  Forward,
  Metrics,
  StudentFn,
  TeacherFn,
  Variables,
  check_has,
  names_of,
)

Schedule = Callable[[jax.Array], jax.Array]
Scalar = float | Schedule


class TapNames(NamedTuple):
  """The features that an objective reads, by tap name.

  Attributes:
    student: for `adapters.from_linen(student, taps=objective.taps.student)`.
    teacher: likewise for the teacher.

  Example:
    >>> at = TapNames(('s1', 's2'), ('t1', 't2'))
    >>> at.union(TapNames(('s1',), ('t9',)))
    TapNames(student=('s1', 's2'), teacher=('t1', 't2', 't9'))
  """

  student: tuple[str, ...] = ()
  teacher: tuple[str, ...] = ()

  def union(self, other: 'TapNames') -> 'TapNames':
    """The names in either, each once."""
    return TapNames(
      *(
        tuple(dict.fromkeys((*a, *b))) for a, b in zip(self, other, strict=True)
      )
    )


NO_TAPS = TapNames()


class Objective(NamedTuple):
  """A pair of pure functions; every term and every sum of terms is one.

  Attributes:
    init: `(inputs) -> (params, state)`. Called under `jax.eval_shape`-like
      conditions: it may look at shapes, dtypes and `inputs.rng` only.
    apply: `(params, state, inputs) -> (loss, state, metrics)`; `loss` is a
      scalar or `[B]` per example, differentiable in `params` and the student.
    taps: the features that it reads.

  Example:
    A term that trains a bias and counts its steps:

    >>> def init(inputs):
    ...   return {'bias': jnp.zeros(())}, {'count': 0}
    >>> def apply(params, state, inputs):
    ...   error = jnp.square(inputs.student.output - params['bias'])
    ...   return jnp.mean(error, axis=-1), {'count': state['count'] + 1}, {}
    >>> objective = Objective(init, apply)
    >>> inputs = Inputs(Forward(jnp.array([[1.0, 3.0]])), None, {}, None, None)
    >>> loss, state, _ = objective.apply(*objective.init(inputs), inputs)
    >>> loss.tolist(), state
    ([5.0], {'count': 1})
  """

  init: Callable[[Inputs], tuple[Any, Any]]
  apply: Callable[[Any, Any, Inputs], tuple[jax.Array, Any, Metrics]]
  taps: TapNames = NO_TAPS


def term(
  loss_fn: Callable[[Inputs], Any], *, taps: TapNames = NO_TAPS
) -> Objective:
  """A term without parameters or state, from one function of the inputs.

  Args:
    loss_fn: `(inputs) -> loss` or `(inputs) -> (loss, metrics)`, with loss
      `[B]` or scalar.
    taps: the features that `loss_fn` reads.

  Example:
    A new distillation loss is one function and this call:

    >>> def l1_of_logits(inputs):
    ...   gap = inputs.student.output - inputs.teacher.output
    ...   return jnp.mean(jnp.abs(gap), axis=-1)
    >>> student, teacher = Forward(jnp.ones((1, 2))), Forward(jnp.zeros((1, 2)))
    >>> inputs = Inputs(student, teacher, {}, jnp.int32(0), jax.random.key(0))
    >>> objective = weighted_sum({'l1': (0.5, term(l1_of_logits))})
    >>> params, state = objective.init(inputs)
    >>> loss, state, metrics = objective.apply(params, state, inputs)
    >>> float(loss), float(metrics['loss/l1'])
    (0.5, 1.0)
  """

  def apply(params, state, inputs):
    out = loss_fn(inputs)
    loss, metrics = out if isinstance(out, tuple) else (out, {})
    return loss, state, metrics

  return Objective(lambda inputs: ({}, {}), apply, taps)


def of_labels(loss: Callable[[jax.Array], jax.Array], inputs: Inputs) -> Any:
  """A loss of `batch['label']`, and of both labels where mixup mixed images.

  Args:
    loss: `label -> [B, ...]` or a scalar.
    inputs: those of the step; `data.make_preprocess(mixup=...)` adds the second
      label and the share of the first to the batch.

  Example:
    >>> batch = {'label': jnp.array([1]), 'mix_label': jnp.array([3])}
    >>> batch['mix_weight'] = jnp.array([0.75])
    >>> inputs = Inputs(None, None, batch, None, None)
    >>> of_labels(lambda label: label * 1.0, inputs).tolist()
    [1.5]
  """
  first = loss(entry(inputs, 'label'))
  if 'mix_label' not in inputs.batch:
    return first
  share, ndim = inputs.batch['mix_weight'], jnp.ndim(first)
  share = share.reshape(-1, *(1 for _ in range(ndim - 1)))
  return share * first + (1 - share) * loss(inputs.batch['mix_label'])


def value_at(scalar: Scalar, step: jax.Array) -> jax.Array | float:
  """The value of a constant or of a schedule at a step.

  Args:
    scalar: a number, or a function of the step.
    step: number of completed steps.

  Example:
    >>> value_at(0.9, step=100), value_at(lambda step: step / 400, step=100)
    (0.9, 0.25)
  """
  return scalar(step) if callable(scalar) else scalar


def check_temperature(what: str, temperature: Any) -> None:
  """Raises ValueError for a temperature that is not positive.

  Args:
    what: names the term in the message.
    temperature: a number; the words of a schedule, of which the start counts;
      or a schedule, which is not looked at: nothing is computed here, since a
      computation would keep processes from being connected afterwards.

  Example:
    >>> check_temperature('kd', {'end': 4.0, 'until': 0.5})
    Traceback (most recent call last):
    ValueError: kd: a temperature that starts at 0.0 is not > 0.
  """
  if callable(temperature):
    return
  if isinstance(temperature, Mapping):
    start = temperature.get('start', 0.0)
    if start <= 0:
      raise ValueError(
        f'{what}: a temperature that starts at {start} is not > 0.'
      )
  elif temperature <= 0:
    raise ValueError(f'{what}: temperature={temperature} is not > 0.')


def values_at(options: Mapping[str, Any], step: jax.Array) -> dict[str, Any]:
  """A loss's options at a step, schedules replaced by their values."""
  return {name: value_at(value, step) for name, value in options.items()}


def weighted_sum(terms: Mapping[str, tuple[Scalar, Objective]]) -> Objective:
  """The sum of weighted terms, each averaged over the batch.

  Args:
    terms: name -> `(weight, term)`; a weight is a float or a schedule
      `step -> weight`. One that is 0 at a step does not hide a term that is
      infinite there.

  Returns:
    An objective whose loss is a scalar, and whose metrics hold the unweighted
    `loss/<name>` of every term, `loss/total`, and the terms' own metrics.

  Raises:
    ValueError: without terms or names, for a term named 'total', or for what
      is no pair; when applied, for parameters of other terms.

  Example:
    >>> from kd_jax import objectives
    >>> objective = weighted_sum({
    ...   'kd': (0.9, objectives.soft_targets(temperature=1.0)),
    ...   'ce': (0.1, objectives.hard_labels()),
    ... })
    >>> student = Forward(jnp.log(jnp.array([[0.5, 0.5]])))
    >>> teacher = Forward(jnp.log(jnp.array([[0.75, 0.25]])))
    >>> inputs = Inputs(
    ...   student, teacher, {'label': jnp.array([0])}, jnp.int32(0),
    ...   jax.random.key(0))
    >>> loss, _, metrics = objective.apply(*objective.init(inputs), inputs)
    >>> {name: round(float(x), 4) for name, x in sorted(metrics.items())}
    {'accuracy': 1.0, 'loss/ce': 0.6931, 'loss/kd': 0.1308, 'loss/total': 0.187}
  """
  check_has('terms', terms, ('items',), 'name -> (weight, objective)')
  if not terms:
    raise ValueError('weighted_sum needs at least one term.')
  if 'total' in terms:
    raise ValueError("A term cannot be named 'total', which is their sum.")
  for name, pair in terms.items():
    _check_pair(name, pair)

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
    if set(params) != set(terms):
      raise ValueError(
        f'The state was made for the terms {", ".join(params)}, and this '
        f'objective has {", ".join(terms)}: give init_state the same one.'
      )
    total, new_state = jnp.float32(0.0), {}
    metrics: Metrics = {}
    for i, (name, (weight, objective)) in enumerate(terms.items()):
      loss, new_state[name], extra = objective.apply(
        params[name], state[name], keyed(inputs, i)
      )
      loss = mean(loss, inputs)
      total += value_at(weight, inputs.step) * loss
      metrics |= extra | {f'loss/{name}': loss}
    return total, new_state, metrics | {'loss/total': total}

  taps = TapNames()
  for _, objective in terms.values():
    taps = taps.union(objective.taps)
  return Objective(init, apply, taps)


def _check_pair(name: str, pair: Any) -> None:
  objective = (
    pair[1] if isinstance(pair, tuple | list) and len(pair) == 2 else 0
  )
  weight = pair[0] if isinstance(objective, Objective) else None
  number = isinstance(weight, float | int | np.number | jax.Array)
  if not number and not callable(weight):
    raise ValueError(
      f'weighted_sum: {name!r} is not (weight, objective), a number or a '
      'schedule and what a function of kd_jax.objectives returned, such as '
      '(0.9, soft_targets()).'
    )


OUTPUT = 'output'


def read_taps(
  student: str | Sequence[str], teacher: str | Sequence[str]
) -> TapNames:
  """The taps of a term; the name 'output' stands for the network's output."""
  return TapNames(
    *(
      tuple(n for n in names_of(side) if n != OUTPUT)
      for side in (student, teacher)
    )
  )


def pairs(
  student: str | Sequence[str], teacher: str | Sequence[str]
) -> list[tuple[str, str]]:
  """Which student tap learns from which teacher tap.

  Raises:
    ValueError: if there are none, or not as many of one as of the other.
  """
  student, teacher = names_of(student), names_of(teacher)
  if not student or len(student) != len(teacher):
    raise ValueError(
      f'Every student tap needs one teacher tap: student={student}, '
      f'teacher={teacher}.'
    )
  return list(zip(student, teacher, strict=True))


def teacher_of(inputs: Inputs, what: str) -> Forward:
  """The teacher's forward, or a ValueError that says how to give one."""
  if inputs.teacher is None:
    raise ValueError(
      f'{what} needs a teacher: give make_train_step a teacher_fn and '
      'init_state the teacher variables.'
    )
  return inputs.teacher


def student_fn_of(inputs: Inputs, what: str) -> StudentFn:
  """The student's function, or a ValueError that says who needs it."""
  if inputs.student_fn is None:
    raise ValueError(f'{what} runs the student: give Inputs its student_fn.')
  return inputs.student_fn


def teacher_fn_of(inputs: Inputs, what: str) -> TeacherFn:
  """The teacher's function, or a ValueError that says how to give one."""
  teacher_of(inputs, what)
  if inputs.teacher_fn is None:
    raise ValueError(f'{what} runs the teacher: give Inputs its teacher_fn.')
  return inputs.teacher_fn


def student_feature(inputs: Inputs, name: str) -> jax.Array:
  """A feature of the student; 'output' is its output."""
  return _feature(inputs.student, name, 'student')


def teacher_feature(inputs: Inputs, name: str) -> jax.Array:
  """A feature of the teacher; 'output' is its output."""
  teacher = teacher_of(inputs, f'A term that reads the feature {name!r}')
  return _feature(teacher, name, 'teacher')


def _feature(forward: Forward, name: str, side: str) -> jax.Array:
  if name == OUTPUT:
    return forward.output
  if name not in forward.features:
    raise ValueError(
      f'The {side} has no feature {name!r}, '
      f'{rules.near_misses(name, forward.features)}: make its function with '
      f'from_linen(model, taps=objective.taps.{side}).'
    )
  return forward.features[name]


def entry(inputs: Inputs, key: str) -> jax.Array:
  """An entry of the batch, or a ValueError that names those there are."""
  if key not in inputs.batch:
    raise ValueError(
      f'The objective needs batch[{key!r}]; the batch has '
      f'{", ".join(map(repr, inputs.batch)) or "nothing"}.'
    )
  return inputs.batch[key]


def teacher_params(inputs: Inputs, path: str) -> Any:
  """The teacher's parameters at a '/'-joined path."""
  return _params_at(inputs.teacher_variables, path, 'teacher')


def student_params(inputs: Inputs, path: str) -> Any:
  """The student's parameters at a '/'-joined path, as its forward saw them."""
  return _params_at(inputs.student_variables, path, 'student')


def _params_at(variables: Variables | None, path: str, side: str) -> Any:
  node = (variables or {}).get('params', {})
  for part in path.split('/'):
    if part not in node:
      raise ValueError(
        f'The {side} has no parameters at {path!r}; where {part!r} should be '
        f'there are {", ".join(map(str, node)) or "none"}.'
      )
    node = node[part]
  return node
