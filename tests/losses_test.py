"""Every loss against NumPy in float64, through one common suite.

A new loss is one row of CASES.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses


def _log_softmax(z):
  z = np.asarray(z, np.float64)
  z = z - z.max(axis=-1, keepdims=True)
  return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def _kl(student, teacher, *, temperature):
  log_s = _log_softmax(student / temperature)
  log_t = _log_softmax(teacher / temperature)
  return temperature**2 * np.sum(np.exp(log_t) * (log_t - log_s), axis=-1)


def _kl_gradient(student, teacher, *, temperature):
  """Of the sum over examples: Hinton et al., equation 2, times T**2."""
  p = np.exp(_log_softmax(student / temperature))
  q = np.exp(_log_softmax(teacher / temperature))
  return temperature * (p - q)


def _target(label, classes, smoothing):
  return (1 - smoothing) * np.eye(classes)[label] + smoothing / classes


def _cross_entropy(logits, label, *, label_smoothing=0.0):
  target = _target(label, logits.shape[-1], label_smoothing)
  return -np.sum(target * _log_softmax(logits), axis=-1)


def _squared_error(prediction, target):
  return np.mean((prediction - target) ** 2, axis=-1)


class Case(NamedTuple):
  """One loss and how to check it.

  Attributes:
    loss: `(student, target) -> [...]`.
    value: the same in NumPy.
    labels: whether the target holds integer labels, not a teacher's output.
    softmax: whether the student's values only enter through a softmax.
  """

  loss: Callable
  value: Callable
  labels: bool = False
  softmax: bool = True


def _case(loss, value, *, labels=False, softmax=True, **options):
  bound = [functools.partial(f, **options) for f in (loss, value)]
  return Case(*bound, labels, softmax)


CASES = {
  'kl_T1': _case(losses.kl_divergence, _kl, temperature=1.0),
  'kl_T4': _case(losses.kl_divergence, _kl, temperature=4.0),
  'kl_T20': _case(losses.kl_divergence, _kl, temperature=20.0),
  'cross_entropy': _case(losses.cross_entropy, _cross_entropy, labels=True),
  'cross_entropy_smoothed': _case(
    losses.cross_entropy, _cross_entropy, labels=True, label_smoothing=0.1
  ),
  'squared_error': _case(losses.squared_error, _squared_error, softmax=False),
}
SOFTMAX = [name for name, case in CASES.items() if case.softmax]
WITH_TEACHER = [name for name, case in CASES.items() if not case.labels]
SHAPES = {'classes': (6, 5), 'tokens': (2, 3, 5)}


def _inputs(case, shape=SHAPES['classes'], seed=0):
  rng = np.random.default_rng(seed)
  student = rng.normal(scale=3.0, size=shape).astype(np.float32)
  if case.labels:
    return student, rng.integers(0, shape[-1], shape[:-1])
  return student, rng.normal(scale=3.0, size=shape).astype(np.float32)


def _gradient(case, student, target):
  return jax.grad(lambda s: case.loss(s, target).sum())(jnp.asarray(student))


def test_every_public_loss_has_a_case():
  covered = {case.loss.func for case in CASES.values()}
  public = {f for f in vars(losses).values() if callable(f)}
  assert covered == public


@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize('name', CASES)
def test_value_is_the_papers_formula(name, shape):
  case = CASES[name]
  student, target = _inputs(case, shape)
  value = case.loss(student, target)
  assert value.shape == shape[:-1] and value.dtype == jnp.float32
  np.testing.assert_allclose(
    value, case.value(student.astype(np.float64), target), rtol=1e-5, atol=1e-5
  )


def _differences(value, student, eps=1e-5):
  """Central differences of the summed value, in float64."""
  student = student.astype(np.float64)
  gradient = np.zeros_like(student)
  for index in np.ndindex(student.shape):
    step = np.zeros_like(student)
    step[index] = eps
    rise = value(student + step).sum() - value(student - step).sum()
    gradient[index] = rise / (2 * eps)
  return gradient


@pytest.mark.parametrize('name', CASES)
def test_gradient_is_that_of_the_papers_formula(name):
  case = CASES[name]
  student, target = _inputs(case)
  want = _differences(lambda s: case.value(s, target), student)
  got = _gradient(case, student, target)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', WITH_TEACHER)
def test_minimum_is_zero_where_student_equals_teacher(name):
  case = CASES[name]
  student, other = _inputs(case)
  np.testing.assert_array_equal(case.loss(student, student), 0.0)
  gradient = _gradient(case, student, student)
  np.testing.assert_allclose(gradient, 0.0, atol=1e-6)
  assert np.all(np.asarray(case.loss(student, other)) > 0)


@pytest.mark.parametrize('name', CASES)
def test_gradient_is_finite_at_equal_logits(name):
  case = CASES[name]
  student, target = _inputs(case)
  for constant in (0.0, 7.0):
    flat = np.full_like(student, constant)
    assert np.isfinite(_gradient(case, flat, target)).all()
    if not case.labels:
      assert np.isfinite(_gradient(case, flat, flat)).all()


@pytest.mark.parametrize('name', SOFTMAX)
def test_extreme_logits_give_finite_values_and_gradients(name):
  case = CASES[name]
  student, target = _inputs(case)
  extreme = 1e4 * np.sign(student)
  targets = [target] if case.labels else [target, extreme, -extreme]
  for target in targets:
    value = case.loss(extreme, target)
    np.testing.assert_allclose(
      value, case.value(extreme.astype(np.float64), target), rtol=1e-5
    )
    assert np.isfinite(_gradient(case, extreme, target)).all()


@pytest.mark.parametrize('temperature', [1.0, 4.0])
def test_a_class_without_teacher_mass_contributes_nothing(temperature):
  student, teacher = _inputs(CASES['kl_T1'])
  teacher[:, 1] = -np.inf
  loss = functools.partial(losses.kl_divergence, temperature=temperature)
  # The limit of very negative logits, which NumPy computes without a NaN.
  limit = np.where(np.isinf(teacher), -1e4, teacher)
  want = _kl(student, limit, temperature=temperature)
  np.testing.assert_allclose(loss(student, teacher), want, rtol=1e-5)
  gradient = jax.grad(lambda s: loss(s, teacher).sum())(jnp.asarray(student))
  want = _kl_gradient(student, limit, temperature=temperature)
  np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-5)
  # Both sides may exclude a class, as masked vocabularies do.
  student[:, 1] = -np.inf
  assert np.isfinite(loss(student, teacher)).all()


@pytest.mark.parametrize('name', WITH_TEACHER)
def test_no_gradient_reaches_the_teacher(name):
  case = CASES[name]
  student, teacher = _inputs(case)
  gradient = jax.grad(lambda t: case.loss(student, t).sum())
  np.testing.assert_array_equal(gradient(jnp.asarray(teacher)), 0.0)


@pytest.mark.parametrize('name', CASES)
def test_jit_equals_eager_and_one_example_at_a_time(name):
  case = CASES[name]
  student, target = _inputs(case)
  value = case.loss(student, target)
  np.testing.assert_allclose(
    jax.jit(case.loss)(student, target), value, rtol=1e-6, atol=1e-6
  )
  np.testing.assert_allclose(
    jax.vmap(case.loss)(student, target), value, rtol=1e-6, atol=1e-6
  )


@pytest.mark.parametrize('name', CASES)
def test_bfloat16_is_computed_in_float32(name):
  case = CASES[name]
  student, target = _inputs(case)
  student = jnp.asarray(student, jnp.bfloat16)
  if not case.labels:
    target = jnp.asarray(target, jnp.bfloat16)
  value = case.loss(student, target)
  assert value.dtype == jnp.float32
  # Equal to the float32 loss of the rounded inputs: only they were rounded.
  full = target if case.labels else target.astype(jnp.float32)
  want = case.loss(student.astype(jnp.float32), full)
  np.testing.assert_array_equal(value, want)
  gradient = jax.grad(lambda s: case.loss(s, target).sum())(student)
  assert gradient.dtype == jnp.bfloat16


@pytest.mark.parametrize('name', CASES)
def test_permuting_the_batch_permutes_the_loss(name):
  case = CASES[name]
  student, target = _inputs(case)
  order = np.random.default_rng(1).permutation(len(student))
  value = np.asarray(case.loss(student, target))
  permuted = case.loss(student[order], target[order])
  np.testing.assert_allclose(permuted, value[order], rtol=1e-6)


@pytest.mark.parametrize('name', SOFTMAX)
def test_the_loss_ignores_an_offset_of_the_logits(name):
  case = CASES[name]
  student, target = _inputs(case)
  np.testing.assert_allclose(
    case.loss(student + 5.0, target), case.loss(student, target), rtol=1e-4
  )


def test_temperature_may_be_traced():
  student, teacher = _inputs(CASES['kl_T4'])
  loss = jax.jit(
    lambda t: losses.kl_divergence(student, teacher, temperature=t)
  )
  want = _kl(student, teacher, temperature=3.0)
  np.testing.assert_allclose(loss(3.0), want, rtol=1e-5, atol=1e-5)


def test_shapes_that_differ_are_named():
  with pytest.raises(ValueError, match=r'same classes.*\(2, 3\).*\(2, 4\)'):
    losses.kl_divergence(np.zeros((2, 3)), np.zeros((2, 4)))
  with pytest.raises(ValueError, match=r'label has shape \(2, 1\)'):
    losses.cross_entropy(np.zeros((2, 3)), np.zeros((2, 1), int))
  with pytest.raises(ValueError, match=r'prediction has shape \(2, 1\)'):
    losses.squared_error(np.zeros((2, 1)), np.zeros(2))
