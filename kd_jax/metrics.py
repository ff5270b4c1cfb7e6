"""Metrics as sums that add over batches and devices, and their results.

Owns what is measured of outputs; which metrics count for a problem is `tasks`.
A metric never averages averages: `update` returns sums and counts, sums add
with `merge`, and `result` divides once. Uneven last batches are exact because
padding has mask 0.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import losses
from kd_jax.types import ATTENTION_MASK, Batch, Forward, check_same_shape


class Metric(NamedTuple):
  """A pair of functions.

  Attributes:
    update: `(student, teacher, batch, mask) -> sums`, a pytree of float32.
    result: `(sums) -> float`, on the host, of the sums of all batches.
    title: what a table calls it; its name if empty.
    percent: whether it is a share that people read in percent.
    higher: whether more is better.

  Example:
    >>> largest = Metric(
    ...   update=lambda s, t, b, mask: {'sum': jnp.sum(jnp.max(s.output, -1)
    ...     * mask), 'count': jnp.sum(mask)},
    ...   result=lambda sums: float(sums['sum'] / sums['count']))
    >>> out = Forward(jnp.array([[1.0, 5.0], [2.0, 0.0], [9.0, 0.0]]))
    >>> sums = largest.update(out, None, {}, jnp.array([1.0, 1.0, 0.0]))
    >>> largest.result(sums)
    3.5
  """

  update: Callable[[Forward, Forward | None, Batch, jax.Array], Any]
  result: Callable[[Any], float]
  title: str = ''
  percent: bool = False
  higher: bool = True


def _counts(prediction: jax.Array, batch: Batch, mask: jax.Array) -> jax.Array:
  """Which predictions count: no example, and no token, that only pads."""
  if mask.shape != prediction.shape[: mask.ndim]:
    raise ValueError(
      f'A metric needs one mask entry per example: mask has shape {mask.shape} '
      f'but the predictions have shape {prediction.shape}.'
    )
  counts = jnp.expand_dims(mask > 0, range(mask.ndim, prediction.ndim))
  tokens = batch.get(ATTENTION_MASK)
  if tokens is not None and prediction.ndim > 1:
    check_same_shape(
      'a metric of tokens needs one mask entry per token',
      attention_mask=tokens,
      prediction=prediction,
    )
    counts &= tokens != 0
  return jnp.broadcast_to(counts, prediction.shape)


def _mean(
  value: Callable[[Forward, Forward, Batch], jax.Array], **looks: Any
) -> Metric:
  def update(student, teacher, batch, mask):
    values = value(student, teacher, batch)
    counts = _counts(values, batch, mask)
    # where, not a product: padding may hold NaN.
    total = jnp.sum(jnp.where(counts, values, 0.0))
    return {'sum': total, 'count': jnp.sum(counts, dtype=jnp.float32)}

  def result(sums):
    return float(sums['sum'] / sums['count'])

  return Metric(update, result, **looks)


def _taught(teacher: Forward | None) -> jax.Array:
  if teacher is None:
    raise ValueError(
      'A metric that compares with the teacher needs one: give make_eval_step '
      'a teacher_fn, and the eval step the teacher variables.'
    )
  return teacher.output


def _entry(batch: Batch, key: str) -> jax.Array:
  if key not in batch:
    there = ', '.join(map(repr, batch))
    raise ValueError(f'A metric needs batch[{key!r}]; the batch has {there}.')
  return batch[key]


def _equal(a: jax.Array, b: jax.Array) -> jax.Array:
  return (a == b).astype(jnp.float32)


def accuracy() -> Metric:
  """Share of examples whose most likely class is `batch['label']`.

  Example:
    >>> student = Forward(jnp.array([[2.0, 1.0], [2.0, 1.0], [5.0, 6.0]]))
    >>> batch, mask = {'label': jnp.array([0, 1, 0])}, jnp.array([1, 1, 0])
    >>> metric = accuracy()
    >>> metric.result(metric.update(student, None, batch, mask))
    0.5
  """
  return _mean(
    lambda s, t, b: _equal(jnp.argmax(s.output, -1), _entry(b, 'label')),
    percent=True,
  )


def agreement() -> Metric:
  """Share of examples on which teacher and student pick the same class.

  Needs no labels; whether the class is right does not matter. Where one of
  them has equal logits, it picks the first of those.

  References:
    Stanton et al., "Does Knowledge Distillation Really Work?", 2021,
    arXiv:2106.05945.

  Example:
    >>> student = Forward(jnp.array([[2.0, 1.0], [2.0, 1.0]]))
    >>> teacher = Forward(jnp.array([[3.0, 0.0], [0.0, 3.0]]))
    >>> metric = agreement()
    >>> metric.result(metric.update(student, teacher, {}, jnp.ones(2)))
    0.5
  """
  return _mean(
    lambda s, t, b: _equal(
      jnp.argmax(s.output, -1), jnp.argmax(_taught(t), -1)
    ),
    percent=True,
  )


def kl() -> Metric:
  """Mean KL(teacher || student) in nats, at temperature 1.

  Example:
    >>> student = Forward(jnp.log(jnp.array([[0.5, 0.5]])))
    >>> teacher = Forward(jnp.log(jnp.array([[0.75, 0.25]])))
    >>> metric = kl()
    >>> sums = metric.update(student, teacher, {}, jnp.ones(1))
    >>> round(metric.result(sums), 4)
    0.1308
  """
  return _mean(
    lambda s, t, b: losses.kl_divergence(s.output, _taught(t), temperature=1.0),
    title='KL',
    higher=False,
  )


def mean_squared_error() -> Metric:
  """Mean squared error to `batch['target']`, over examples and dimensions.

  Example:
    >>> student = Forward(jnp.zeros((1, 2)))
    >>> batch, metric = {'target': jnp.array([[1, 3]])}, mean_squared_error()
    >>> metric.result(metric.update(student, None, batch, jnp.ones(1)))
    5.0
  """
  return _mean(
    lambda s, t, b: losses.squared_error(s.output, _entry(b, 'target')),
    title='MSE',
    higher=False,
  )


def calibration_error(*, bins: int = 15) -> Metric:
  """Expected calibration error with equal-width confidence bins.

  The mean over bins, weighted by their counts, of |accuracy - confidence|.

  Args:
    bins: number of bins of (0, 1]; each holds its upper bound.

  Example:
    Sure of both examples, right about one:

    >>> metric, student = calibration_error(), Forward(99.0 * jnp.eye(2))
    >>> batch = {'label': jnp.array([0, 0])}
    >>> metric.result(metric.update(student, None, batch, jnp.ones(2)))
    0.5

  References:
    Guo et al., "On Calibration of Modern Neural Networks", 2017,
    arXiv:1706.04599.

  Example:
    >>> student = Forward(jnp.log(jnp.array([[0.75, 0.25], [0.75, 0.25]])))
    >>> batch, metric = {'label': jnp.array([0, 1])}, calibration_error()
    >>> sums = metric.update(student, None, batch, jnp.ones(2))
    >>> round(metric.result(sums), 4)
    0.25
  """

  def update(student, teacher, batch, mask):
    probabilities = jax.nn.softmax(student.output.astype(jnp.float32))
    confidence = jnp.max(probabilities, axis=-1)
    counts = _counts(confidence, batch, mask).ravel()
    # where, not a product: padding may hold NaN.
    confidence = jnp.where(counts, confidence.ravel(), 0.0)
    label = _entry(batch, 'label')
    hits = _equal(jnp.argmax(student.output, -1), label).ravel()
    index = jnp.clip(jnp.ceil(confidence * bins) - 1, 0, bins - 1)
    member = jax.nn.one_hot(index.astype(jnp.int32), bins) * counts[:, None]
    return {
      'confidence': jnp.sum(member * confidence[:, None], axis=0),
      'hits': jnp.sum(member * hits[:, None], axis=0),
      'count': jnp.sum(member, axis=0),
    }

  def result(sums):
    gap = np.abs(sums['hits'] - sums['confidence'])
    return float(gap.sum() / sums['count'].sum())

  return Metric(update, result, title='ECE', percent=True, higher=False)


def classification() -> dict[str, Metric]:
  """What every classifier is measured by, accuracy first.

  Example:
    >>> list(classification())
    ['accuracy', 'calibration_error']
  """
  return {'accuracy': accuracy(), 'calibration_error': calibration_error()}


def classification_compared() -> dict[str, Metric]:
  """How a classifier is compared with its teacher.

  Example:
    >>> list(classification_compared())
    ['agreement', 'kl']
  """
  return {'agreement': agreement(), 'kl': kl()}


def describe(metrics: Mapping[str, Metric]) -> list[dict[str, Any]]:
  """How metrics are to be shown, as JSON values, for reports.

  Args:
    metrics: name -> metric; the order is kept.

  Example:
    >>> describe({'kl': kl()})
    [{'name': 'kl', 'title': 'KL', 'percent': False, 'higher': False}]
  """
  return [
    {
      'name': name,
      'title': metric.title or name,
      'percent': metric.percent,
      'higher': metric.higher,
    }
    for name, metric in metrics.items()
  ]


def evaluate(
  eval_step: Callable[[Batch], Any],
  batches: Iterable[Batch],
  metrics: Mapping[str, Metric],
) -> dict[str, float]:
  """Runs an eval step over batches and returns name -> result.

  Args:
    eval_step: `(batch) -> sums`, as `step.make_eval_step` makes them.
    batches: batches of one shape; the last one padded and masked.
    metrics: the metrics that `eval_step` was made with.

  Returns:
    name -> result. Sums are added in float64 on the host.

  Raises:
    ValueError: if there is no batch.

  Example:
    >>> step = lambda b: {'accuracy': accuracy().update(
    ...   Forward(b['x']), None, b, b['mask'])}
    >>> batch = {'x': jnp.eye(2), 'label': jnp.array([0, 0]),
    ...          'mask': jnp.array([1.0, 1.0])}
    >>> evaluate(step, [batch], {'accuracy': accuracy()})
    {'accuracy': 0.5}
  """
  # Sums stay on the device until the end: no wait between batches.
  sums = [eval_step(batch) for batch in batches]
  if not sums:
    raise ValueError('There is nothing to evaluate: the data set is empty.')
  # float64 on the host: counts stay exact past 2**24 examples.
  total = jax.tree.map(
    lambda *xs: np.sum(np.stack([np.asarray(x, np.float64) for x in xs]), 0),
    *jax.device_get(sums),
  )
  return {name: metric.result(total[name]) for name, metric in metrics.items()}
