"""Metrics against NumPy over all examples at once, with padded batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import metrics, step
from kd_jax.types import Forward

CLASSES, EXAMPLES, BATCH = 4, 37, 8


def _data(seed=0):
  rng = np.random.default_rng(seed)
  return {
    'student': rng.normal(scale=2, size=(EXAMPLES, CLASSES)).astype('f'),
    'teacher': rng.normal(scale=2, size=(EXAMPLES, CLASSES)).astype('f'),
    'label': rng.integers(0, CLASSES, EXAMPLES).astype('i4'),
    'target': rng.normal(size=(EXAMPLES, CLASSES)).astype('f'),
  }


def _batches(data, fill=np.nan):
  """Batches of one shape; the last is filled up with NaN and mask 0."""
  for start in range(0, EXAMPLES, BATCH):
    part = {k: v[start : start + BATCH] for k, v in data.items()}
    size = len(part['label'])
    batch = {'mask': (np.arange(BATCH) < size).astype('f')}
    for key, value in part.items():
      padding = np.zeros((BATCH - size, *value.shape[1:]), value.dtype)
      if value.dtype == np.float32:
        padding += fill
      batch[key] = np.concatenate([value, padding])
    yield batch


def _student(variables, batch, rng=None, *, train=False):
  assert not train
  return Forward(batch['student'] * variables['params'])


def _teacher(variables, batch):
  return Forward(batch['teacher'] * variables['params'])


def _evaluate(chosen, data, **options):
  """Through the eval step of the library, compiled."""
  eval_step = jax.jit(
    step.make_eval_step(_student, chosen, teacher_fn=_teacher, **options)
  )
  ones = {'params': jnp.float32(1)}
  return metrics.evaluate(
    lambda batch: eval_step(ones, ones, batch), _batches(data), chosen
  )


def _softmax(z):
  e = np.exp(z.astype(np.float64) - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def _calibration_error(logits, label, bins):
  """Guo et al., equation 3, bin by bin."""
  p = _softmax(logits)
  confidence, hits = p.max(-1), p.argmax(-1) == label
  total = 0.0
  for low, high in zip(
    np.arange(bins) / bins, np.arange(1, bins + 1) / bins, strict=True
  ):
    member = (confidence > low) & (confidence <= high)
    if member.any():
      gap = abs(hits[member].mean() - confidence[member].mean())
      total += member.mean() * gap
  return total


def test_sums_over_uneven_batches_are_exact():
  data = _data()
  chosen = (
    metrics.classification()
    | metrics.classification_compared()
    | {'mse': metrics.mean_squared_error()}
  )
  got = _evaluate(chosen, data)
  student, teacher = data['student'], data['teacher']
  p, q = _softmax(student), _softmax(teacher)
  assert got == pytest.approx(
    {
      'accuracy': np.mean(student.argmax(-1) == data['label']),
      'agreement': np.mean(student.argmax(-1) == teacher.argmax(-1)),
      'kl': np.mean(np.sum(q * np.log(q / p), -1)),
      'calibration_error': _calibration_error(student, data['label'], 15),
      'mse': np.mean((student - data['target']).astype(np.float64) ** 2),
    },
    rel=1e-5,
  )


@pytest.mark.parametrize('bins', [1, 5, 15, 40])
def test_calibration_error_is_that_of_the_bins(bins):
  data = _data(seed=bins)
  chosen = {'ece': metrics.calibration_error(bins=bins)}
  want = _calibration_error(data['student'], data['label'], bins)
  assert _evaluate(chosen, data)['ece'] == pytest.approx(want, rel=1e-4)


def test_a_certain_and_right_model_is_calibrated():
  metric = metrics.calibration_error()
  logits, label = jnp.eye(3) * 1e4, jnp.arange(3)
  sums = metric.update(Forward(logits), None, {'label': label}, jnp.ones(3))
  assert metric.result(jax.device_get(sums)) == 0.0
  wrong = metric.update(
    Forward(logits), None, {'label': label[::-1]}, 1 - sums['count'][:3]
  )
  assert metric.result(jax.device_get(wrong)) == pytest.approx(2 / 3)


@pytest.mark.parametrize('fill', [np.nan, np.inf, 1e30])
def test_what_padding_holds_does_not_matter(fill):
  chosen = metrics.classification() | metrics.classification_compared()
  data = _data()
  eval_step = step.make_eval_step(_student, chosen, teacher_fn=_teacher)
  ones = {'params': jnp.float32(1)}

  def run(fill):
    return metrics.evaluate(
      lambda batch: eval_step(ones, ones, batch), _batches(data, fill), chosen
    )

  assert run(fill) == run(0.0)


def test_without_a_mask_every_example_counts():
  data = {k: v[:BATCH] for k, v in _data().items()}
  chosen = {'accuracy': metrics.accuracy()}
  eval_step = step.make_eval_step(_student, chosen)
  sums = eval_step({'params': jnp.float32(1)}, None, data)
  assert float(sums['accuracy']['count']) == BATCH


def test_the_eval_step_measures_with_the_mapped_parameters():
  """Fake-quantized weights are what is measured, not those beneath."""
  data = _data()
  chosen = {'mse': metrics.mean_squared_error()}
  got = _evaluate(chosen, data, params_fn=lambda p: 2 * p)
  want = np.mean((2 * data['student'] - data['target']) ** 2)
  assert got['mse'] == pytest.approx(want, rel=1e-5)


def test_without_a_teacher_nothing_compares_with_it():
  assert set(metrics.classification()) == {
    'accuracy',
    'calibration_error',
  }


def test_an_empty_data_set_is_named():
  with pytest.raises(ValueError, match='nothing to evaluate'):
    metrics.evaluate(lambda batch: {}, [], {})


def test_a_mask_of_another_shape_is_refused():
  tokens = Forward(jnp.zeros((4, 4, 3)))
  batch = {'label': jnp.zeros((4, 4), jnp.int32)}
  with pytest.raises(ValueError, match='one mask entry per example'):
    metrics.accuracy().update(tokens, None, batch, jnp.ones(3))
