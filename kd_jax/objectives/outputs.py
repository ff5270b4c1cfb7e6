"""Terms on the networks' outputs: soft targets, labels, regression values.

Owns what needs no feature, and schedules; terms that relate the outputs of a
batch's examples are in `relations`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax import losses, rules
from kd_jax.objectives import base
from kd_jax.objectives.base import Objective, Scalar
from kd_jax.objectives.inputs import mean


def on_outputs(
  loss: Callable[..., jax.Array], *, with_label: bool = False, **options: Any
) -> Objective:
  """A term from any loss of student and teacher outputs.

  Args:
    loss: `(student_output, teacher_output, **options)`, or with the labels as
      third argument; returns `[B]`, `[B, L]` or a scalar over the batch.
    with_label: whether the loss takes `batch['label']`.
    **options: of the loss; a callable among them is a schedule `step -> value`.

  Example:
    >>> from kd_jax.types import Forward
    >>> student = Forward(jnp.log(jnp.array([[0.5, 0.5]])))
    >>> teacher = Forward(jnp.log(jnp.array([[0.75, 0.25]])))
    >>> inputs = base.Inputs(student, teacher, {}, jnp.int32(2), None)
    >>> kd = on_outputs(losses.kl_divergence, temperature=lambda step: 3 - step)
    >>> [round(x, 4) for x in kd.apply({}, {}, inputs)[0].tolist()]
    [0.1308]
    >>> dkd = on_outputs(losses.decoupled_kd, with_label=True, beta=8.0)
    >>> dkd.apply({}, {}, inputs)
    Traceback (most recent call last):
    ValueError: The objective needs batch['label']; the batch has nothing.
  """
  if 'temperature' in options:
    base.check_temperature(loss.__name__, options['temperature'])

  def loss_fn(inputs):
    teacher = base.teacher_of(inputs, f'The loss {loss.__name__}')
    arrays = [inputs.student.output, teacher.output]
    at = base.values_at(options, inputs.step)
    if not with_label:
      return loss(*arrays, **at)
    return base.of_labels(lambda label: loss(*arrays, label, **at), inputs)

  return base.term(loss_fn)


def soft_targets(
  *,
  temperature: Scalar = 4.0,
  standardize: bool = False,
  convention: str = 'canonical',
) -> Objective:
  """Distillation with soft targets, `losses.kl_divergence`, times T**2.

  Args:
    temperature: T > 0, or a schedule `step -> T`.
    standardize: whether both sides' logits become z-scores first, see
      `losses.standardized_kl_divergence`.
    convention: see `losses.kl_divergence`.

  Raises:
    ValueError: for a constant temperature that is not positive.

  Example:
    >>> from kd_jax.types import Forward
    >>> student = Forward(jnp.log(jnp.array([[0.5, 0.5]])))
    >>> teacher = Forward(jnp.log(jnp.array([[0.75, 0.25]])))
    >>> inputs = base.Inputs(student, teacher, {}, jnp.int32(0), None)
    >>> loss, _, _ = soft_targets(temperature=1.0).apply({}, {}, inputs)
    >>> [round(x, 4) for x in loss.tolist()]
    [0.1308]
  """
  base.check_temperature('soft_targets', temperature)
  loss = losses.kl_divergence
  if standardize:
    loss = losses.standardized_kl_divergence

  def loss_fn(inputs):
    return loss(
      inputs.student.output,
      base.teacher_of(inputs, 'soft_targets').output,
      temperature=base.value_at(temperature, inputs.step),
      convention=convention,
    )

  return base.term(loss_fn)


def hard_labels(
  *, label_smoothing: float = 0.0, student: str = base.OUTPUT
) -> Objective:
  """Cross-entropy with `batch['label']`; also reports `accuracy`.

  A batch that `data.make_preprocess(mixup=...)` mixed is learned from both
  labels of every image, by their shares.

  Args:
    label_smoothing: see `losses.cross_entropy`.
    student: 'output', or the tap of another head `[B, C]`.

  Example:
    >>> from kd_jax.types import Forward
    >>> student = Forward(jnp.log(jnp.array([[0.75, 0.25], [0.75, 0.25]])))
    >>> batch = {'label': jnp.array([0, 1])}
    >>> inputs = base.Inputs(student, None, batch, jnp.int32(0), None)
    >>> loss, _, metrics = hard_labels().apply({}, {}, inputs)
    >>> [round(x, 4) for x in loss.tolist()], float(metrics['accuracy'])
    ([0.2877, 1.3863], 0.5)
  """

  def loss_fn(inputs):
    logits = base.student_feature(inputs, student)
    loss = base.of_labels(
      lambda label: losses.cross_entropy(
        logits, label, label_smoothing=label_smoothing
      ),
      inputs,
    )
    hits = jnp.argmax(logits, axis=-1) == base.entry(inputs, 'label')
    return loss, {'accuracy': mean(hits, inputs)}

  return base.term(loss_fn, taps=base.read_taps(student, ()))


def regression(
  *, to: str = 'target', huber_delta: float | None = None
) -> Objective:
  """Squared or Huber error to the labels or to the teacher.

  Args:
    to: 'target' for `batch['target']` `[B, D]`, 'teacher' for the teacher's
      output of the same shape as the student's (also logit matching).
    huber_delta: where the Huber loss turns linear; None for squared error.

  Raises:
    ValueError: for another `to`; when applied, for outputs and targets of
      different shapes.

  Example:
    >>> from kd_jax.types import Forward
    >>> student = Forward(jnp.array([[3.0]]))
    >>> batch = {'target': jnp.array([[1.0]])}
    >>> inputs = base.Inputs(student, None, batch, jnp.int32(0), None)
    >>> for objective in (regression(), regression(huber_delta=1.0)):
    ...   objective.apply({}, {}, inputs)[0].tolist()
    [4.0]
    [1.5]
  """
  if to not in ('target', 'teacher'):
    raise ValueError(f"regression: to={to!r} is not 'target' or 'teacher'.")

  def loss_fn(inputs):
    if to == 'teacher':
      target = base.teacher_of(inputs, 'regression').output
    else:
      target = base.entry(inputs, 'target')
    if huber_delta is None:
      return losses.squared_error(inputs.student.output, target)
    return losses.huber(inputs.student.output, target, delta=huber_delta)

  return base.term(loss_fn)


def teacher_free(
  *, correct_probability: float = 0.99, temperature: Scalar = 20.0
) -> Objective:
  """Distillation from a hand-made teacher, `losses.teacher_free_kd`.

  Args:
    correct_probability: what the virtual teacher gives the label.
    temperature: T > 0, or a schedule.

  Example:
    >>> from kd_jax.types import Forward
    >>> student = Forward(jnp.log(jnp.array([[0.99, 0.01], [0.01, 0.99]])))
    >>> batch = {'label': jnp.array([0, 0])}
    >>> inputs = base.Inputs(student, None, batch, jnp.int32(0), None)
    >>> loss, _, _ = teacher_free(temperature=1.0).apply({}, {}, inputs)
    >>> [round(x, 3) for x in loss.tolist()]
    [0.0, 4.503]
  """
  base.check_temperature('teacher_free', temperature)

  def loss_fn(inputs):
    return base.of_labels(
      lambda label: losses.teacher_free_kd(
        inputs.student.output,
        label,
        correct_probability=correct_probability,
        temperature=base.value_at(temperature, inputs.step),
      ),
      inputs,
    )

  return base.term(loss_fn)


def top_k_targets(
  *, k: int, temperature: Scalar = 1.0, tail: str = 'renormalize'
) -> Objective:
  """Soft targets from the teacher's k most likely classes only.

  What a cache of teacher outputs keeps; see `losses.top_k_kl_divergence`.

  Args:
    k: how many classes.
    temperature: T > 0, or a schedule.
    tail: 'renormalize' or 'uniform': what stands for the other classes.

  Raises:
    ValueError: when applied, for a k that is not in 1..C.

  Example:
    >>> from kd_jax.types import Forward
    >>> student = Forward(jnp.log(jnp.array([[0.5, 0.25, 0.25]])))
    >>> teacher = Forward(jnp.log(jnp.array([[0.4, 0.2, 0.4]])))
    >>> inputs = base.Inputs(student, teacher, {}, jnp.int32(0), None)
    >>> loss, _, _ = top_k_targets(k=3).apply({}, {}, inputs)
    >>> [round(x, 4) for x in loss.tolist()]
    [0.0541]
  """
  base.check_temperature('top_k_targets', temperature)

  def loss_fn(inputs):
    at = base.value_at(temperature, inputs.step)
    logits = base.teacher_of(inputs, 'top_k_targets').output
    classes = logits.shape[-1]
    if not 1 <= k <= classes:
      raise ValueError(f'top_k_targets: k={k} is not in 1..{classes}.')
    probabilities = jax.nn.softmax(logits.astype(jnp.float32) / at)
    top, index = jax.lax.top_k(probabilities, k)
    return losses.top_k_kl_divergence(
      inputs.student.output, top, index, temperature=at, tail=tail
    )

  return base.term(loss_fn)


def distillation_token(
  *,
  student: str = 'head_dist',
  hard: bool = True,
  temperature: Scalar = 3.0,
) -> Objective:
  """The distillation token of DeiT: a second head that learns the teacher.

  The first head learns the labels, `hard_labels(student='head')`; both get
  the weight 0.5 in the paper.

  Args:
    student: tap of the second head's logits `[B, C]`.
    hard: cross-entropy with the teacher's class (the paper's better variant)
      instead of soft targets.
    temperature: of the soft targets.

  References:
    Touvron et al., "Training data-efficient image transformers & distillation
    through attention", 2020, arXiv:2012.12877.

  Example:
    >>> from kd_jax.types import Forward
    >>> token = jnp.log(jnp.array([[0.75, 0.25]]))
    >>> student = Forward(jnp.zeros((1, 2)), {'head_dist': token})
    >>> teacher = Forward(jnp.array([[0.0, 2.0]]))
    >>> inputs = base.Inputs(student, teacher, {}, jnp.int32(0), None)
    >>> objective = distillation_token()
    >>> loss, _, _ = objective.apply({}, {}, inputs)
    >>> objective.taps.student, [round(x, 4) for x in loss.tolist()]
    (('head_dist',), [1.3863])
  """
  base.check_temperature('distillation_token', temperature)

  def loss_fn(inputs):
    logits = base.student_feature(inputs, student)
    teacher = base.teacher_of(inputs, 'distillation_token').output
    if hard:
      return losses.hard_distillation(logits, teacher)
    at = base.value_at(temperature, inputs.step)
    return losses.kl_divergence(logits, teacher, temperature=at)

  return base.term(loss_fn, taps=base.read_taps(student, ()))


def schedule(
  *,
  end: float,
  start: float = 0.0,
  begin: int = 0,
  until: int,
  shape: str = 'linear',
) -> Callable[[jax.Array], jax.Array]:
  """A schedule for a weight or a temperature.

  Args:
    end: the value from step `until` on.
    start: the value up to step `begin`.
    begin: first step of the change.
    until: last step of the change, >= begin.
    shape: 'linear', 'cosine', or 'step', which jumps at `until`.

  Raises:
    ValueError: for an unknown shape, or `until` before `begin`.

  Example:
    A weight that warms up over 100 steps:

    >>> [float(schedule(end=2.0, until=100)(s)) for s in (0, 50, 200)]
    [0.0, 1.0, 2.0]
  """
  if until < begin:
    raise ValueError(f'schedule: until={until} is before begin={begin}.')
  bend = rules.choose('shape of a schedule', shape, _SHAPES)

  def value(step):
    share = (step - begin) / max(until - begin, 1)
    done = jnp.where(step >= until, 1.0, bend(jnp.clip(share, 0.0, 1.0)))
    return start + (end - start) * done

  return value


_SHAPES = {
  'linear': lambda share: share,
  'cosine': lambda share: 0.5 * (1 - jnp.cos(jnp.pi * share)),
  'step': jnp.zeros_like,
}
