"""Schemes: who learns from whom.

Owns objectives around objectives, and no loss but mutual learning. Several
teachers and cohorts of students come from `networks.combine`, whose features
are named `<network>/<tap>`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax import losses, networks
from kd_jax.objectives import base
from kd_jax.objectives.base import Objective, Scalar, TapNames
from kd_jax.objectives.inputs import Inputs, mean
from kd_jax.types import Forward, Metrics, Variables


def each_teacher(
  objectives: Mapping[str, Objective],
  *,
  weights: Mapping[str, Scalar] | None = None,
) -> Objective:
  """The weighted mean over teachers of one objective for each.

  This is the ensemble in loss space; `networks.combine` averages logits or
  probabilities instead.

  Args:
    objectives: teacher's name in `networks.combine` -> its objective, whose
      taps are that teacher's own.
    weights: name -> weight, a float or a schedule; equal when None.

  Raises:
    ValueError: for weights of other names, negative ones, or a sum of 0; when
      applied, for a name that is not among the combined teachers.

  Example:
    >>> from kd_jax.objectives import soft_targets
    >>> student = Forward(jnp.log(jnp.array([[0.5, 0.5]])))
    >>> sure = jnp.log(jnp.array([[0.75, 0.25]]))
    >>> both = {'resnet/output': student.output, 'vgg/output': sure}
    >>> teacher = Forward(sure, both)
    >>> inputs = Inputs(student, teacher, {}, jnp.int32(0), jax.random.key(0))
    >>> kd = soft_targets(temperature=1.0)
    >>> for weights in (None, {'resnet': 0.0, 'vgg': 1.0}):
    ...   objective = each_teacher({'resnet': kd, 'vgg': kd}, weights=weights)
    ...   params, state = objective.init(inputs)
    ...   round(float(objective.apply(params, state, inputs)[0]), 4)
    0.0654
    0.1308
  """

  def own(inputs, name):
    teacher = _member(base.teacher_of(inputs, 'each_teacher'), name)
    whole = inputs.teacher_variables or {}
    return inputs._replace(
      teacher=teacher,
      teacher_fn=_member_fn(inputs.teacher_fn, whole, name),
      teacher_variables=networks.variables_of(whole, name),
    )

  taps = [
    TapNames(o.taps.student, _prefixed(name, o.taps.teacher))
    for name, o in objectives.items()
  ]
  return _mean_over(objectives, weights, own, taps)


def each_student(
  objectives: Mapping[str, Objective],
  *,
  weights: Mapping[str, Scalar] | None = None,
) -> Objective:
  """The weighted mean over the students of a cohort of one objective for each.

  Args:
    objectives: student's name in `networks.combine` -> its objective.
    weights: name -> weight, a float or a schedule; equal when None.

  Raises:
    ValueError: as `each_teacher`.

  Example:
    >>> from kd_jax.objectives import hard_labels
    >>> outputs = {
    ...   'a/output': jnp.log(jnp.array([[0.75, 0.25]])),
    ...   'b/output': jnp.log(jnp.array([[0.25, 0.75]]))}
    >>> student = Forward(outputs['a/output'], outputs)
    >>> batch, key = {'label': jnp.array([0])}, jax.random.key(0)
    >>> inputs = Inputs(student, None, batch, jnp.int32(0), key)
    >>> objective = each_student({'a': hard_labels(), 'b': hard_labels()})
    >>> loss, _, metrics = objective.apply(*objective.init(inputs), inputs)
    >>> round(float(loss), 4), {k: float(v) for k, v in metrics.items()}
    (0.837, {'accuracy/a': 1.0, 'accuracy/b': 0.0, 'accuracy': 0.5})
  """

  def own(inputs, name):
    whole = inputs.student_variables
    return inputs._replace(
      student=_member(inputs.student, name),
      student_fn=_member_fn(inputs.student_fn, whole, name),
      student_variables=networks.variables_of(whole, name),
    )

  taps = [
    TapNames(_prefixed(name, o.taps.student), o.taps.teacher)
    for name, o in objectives.items()
  ]
  return _mean_over(objectives, weights, own, taps)


def _prefixed(name: str, taps: Sequence[str]) -> tuple[str, ...]:
  return tuple(f'{name}/{tap}' for tap in taps)


def _member(forward: Forward, name: str) -> Forward:
  own = {
    tap: forward.features[f'{name}/{tap}']
    for tap in networks.taps_of(forward.features, name)
  }
  if base.OUTPUT not in own:
    raise ValueError(
      f'There is no network {name!r} in {", ".join(forward.features)}: make '
      'the function with networks.combine.'
    )
  model_state = networks.variables_of(forward.model_state, name)
  return Forward(own.pop(base.OUTPUT), own, model_state)


def _member_fn(fn: Any, whole: Variables, name: str) -> Any:
  """The function of one of the combined networks, for terms that run it.

  XLA leaves out the others, whose outputs nobody reads.

  Args:
    fn: of the combined networks; None where no term runs it again.
    whole: the variables of all of them.
    name: of the network.
  """
  if fn is None:
    return None

  def member(variables, *args, **kwargs):
    combined = networks.combine_variables({name: variables})
    own = {c: {**whole.get(c, {}), **values} for c, values in combined.items()}
    return _member(fn({**whole, **own}, *args, **kwargs), name)

  return member


def _mean_over(
  objectives: Mapping[str, Objective],
  weights: Mapping[str, Scalar] | None,
  own: Callable[[Inputs, str], Inputs],
  taps: Sequence[TapNames],
) -> Objective:
  weights = dict.fromkeys(objectives, 1.0) if weights is None else weights
  networks.check_weights(objectives, weights)
  constant = [w for w in weights.values() if not callable(w)]
  none = len(constant) == len(weights) and sum(constant) <= 0
  if min(constant, default=0) < 0 or none:
    raise ValueError(f'Weights are >= 0 with a positive sum, not {weights}.')

  def keyed(inputs: Inputs, i: int, name: str) -> Inputs:
    rng = jax.random.fold_in(inputs.rng, i)
    return own(inputs._replace(rng=rng), name)

  def init(inputs):
    made = {
      name: objective.init(keyed(inputs, i, name))
      for i, (name, objective) in enumerate(objectives.items())
    }
    return (
      {n: p for n, (p, _) in made.items()},
      {n: s for n, (_, s) in made.items()},
    )

  def apply(params, state, inputs):
    total: jax.Array | float = 0.0
    share: jax.Array | float = 0.0
    new = {}
    metrics: Metrics = {}
    hits: list[jax.Array] = []
    for i, (name, objective) in enumerate(objectives.items()):
      loss, new[name], extra = objective.apply(
        params[name], state[name], keyed(inputs, i, name)
      )
      weight = base.value_at(weights[name], inputs.step)
      total += weight * mean(loss, inputs)
      share += weight
      metrics |= {f'{key}/{name}': value for key, value in extra.items()}
      if 'accuracy' in extra:
        hits.append(extra['accuracy'])
    # Under its own name too, by which a run shows it.
    if hits:
      metrics['accuracy'] = jnp.mean(jnp.stack(hits))
    return total / jnp.where(share > 0, share, 1.0), new, metrics

  union = TapNames()
  for some in taps:
    union = union.union(some)
  return Objective(init, apply, union)


def mutual(names: Sequence[str], *, temperature: Scalar = 1.0) -> Objective:
  """Deep mutual learning: every student of a cohort learns from its peers.

  The mean over students k of the mean over the others l of
  KL(p_l || p_k) * T**2; the peer is constant. The labels come from
  `each_student({name: hard_labels(), ...})`; with both weights times the
  number of students it is the paper's sum over the cohort.

  Args:
    names: the students' names in `networks.combine`, two at least.
    temperature: T > 0, or a schedule; the paper's is 1.

  Raises:
    ValueError: for fewer than two names; when applied, for a name that is not
      among the combined students.

  References:
    Zhang et al., "Deep Mutual Learning", 2017, arXiv:1706.00384.

  Example:
    >>> outputs = {
    ...   'a/output': jnp.log(jnp.array([[0.75, 0.25]])),
    ...   'b/output': jnp.log(jnp.array([[0.5, 0.5]]))}
    >>> student = Forward(outputs['a/output'], outputs)
    >>> inputs = Inputs(student, None, {}, jnp.int32(0), None)
    >>> loss, _, _ = mutual(['a', 'b']).apply({}, {}, inputs)
    >>> [round(v, 4) for v in loss.tolist()]
    [0.1373]
  """
  if len(names) < 2:
    raise ValueError(f'mutual needs two students at least, not {names}.')
  base.check_temperature('mutual', temperature)

  def loss_fn(inputs):
    at = base.value_at(temperature, inputs.step)
    outputs = [_member(inputs.student, name).output for name in names]
    total: jax.Array | float = 0.0
    for i, own in enumerate(outputs):
      for j, peer in enumerate(outputs):
        if i != j:
          total += losses.kl_divergence(own, peer, temperature=at)
    return total / (len(names) * (len(names) - 1))

  return base.term(loss_fn)


def ema_teacher(objective: Objective, *, decay: Scalar = 0.999) -> Objective:
  """The objective, taught by a moving average of the student itself.

  The average is state of the objective: it is saved with the run. It starts
  as a copy of the student, and runs in evaluation mode with the student's
  current running statistics. The step needs no teacher_fn.

  Args:
    objective: any objective; it sees the average as its teacher. Its taps of
      the teacher must be among those of the student's function.
    decay: of the average, in [0, 1); or a schedule.

  Raises:
    ValueError: for another decay.

  References:
    Tarvainen, Valpola, "Mean teachers are better role models", 2017,
    arXiv:1703.01780.

  Example:
    >>> from kd_jax.objectives import regression
    >>> def student_fn(variables, batch, rng=None, *, train=False):
    ...   return Forward(variables['params']['w'] * batch['x'])
    >>> batch = {'x': jnp.ones((1, 1))}
    >>> def inputs_of(w):
    ...   now = {'params': {'w': jnp.full((1, 1), w)}}
    ...   return Inputs(
    ...     student_fn(now, batch), None, batch, jnp.int32(0),
    ...     jax.random.key(0), student_fn=student_fn, student_variables=now)
    >>> objective = ema_teacher(regression(to='teacher'), decay=0.5)
    >>> params, state = objective.init(inputs_of(0.0))
    >>> loss, state, _ = objective.apply(params, state, inputs_of(4.0))
    >>> state['average']['w'].tolist(), loss.tolist()
    ([[2.0]], [4.0])
  """
  if not callable(decay) and not 0 <= decay < 1:
    raise ValueError(f'ema_teacher: decay={decay} is not in [0, 1).')

  def taught(average, inputs):
    params = jax.tree.map(
      lambda a, p: a.astype(p.dtype),
      average,
      inputs.student_variables['params'],
    )
    variables = {**inputs.student.model_state, 'params': params}
    variables = jax.lax.stop_gradient(variables)
    student_fn = base.student_fn_of(inputs, 'ema_teacher')

    def teacher_fn(variables, batch):
      return student_fn(variables, batch, None, train=False)

    forward = teacher_fn(variables, inputs.batch)

    return inputs._replace(
      teacher=jax.lax.stop_gradient(forward),
      teacher_fn=teacher_fn,
      teacher_variables=variables,
    )

  def init(inputs):
    average = networks.exact(inputs.student_variables['params'])
    params, state = objective.init(taught(average, inputs))
    return params, {'average': average, 'inner': state}

  def apply(params, state, inputs):
    current = jax.lax.stop_gradient(inputs.student_variables['params'])
    rate = base.value_at(decay, inputs.step)
    first = jnp.equal(inputs.part, 0)

    def moved(a, p):
      return jnp.where(first, rate * a + (1 - rate) * p.astype(a.dtype), a)

    average = jax.tree.map(moved, state['average'], current)
    loss, inner, metrics = objective.apply(
      params, state['inner'], taught(average, inputs)
    )
    return loss, {'average': average, 'inner': inner}, metrics

  # One function serves both: what the teacher is asked for, it must tap too.
  taps = TapNames((*objective.taps.student, *objective.taps.teacher))
  return Objective(init, apply, taps.union(TapNames()))
