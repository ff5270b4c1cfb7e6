"""What the losses on features and tokens refuse, and their rare inputs.

Values and gradients are checked with all other losses, in `losses_test`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases.tokens import CASES

from kd_jax import losses

zeros = np.zeros
REFUSED = {
  'hint': (
    lambda: losses.hint(zeros((2, 3)), zeros((2, 4))),
    r'hint .*connector.*\(2, 3\) but teacher has shape \(2, 4\)',
  ),
  'flow_of_solution': (
    lambda: losses.flow_of_solution(
      [zeros((1, 4, 4, 3)), zeros((1, 2, 2, 5))],
      [zeros((1, 4, 4, 3)), zeros((1, 2, 2, 6))],
    ),
    r'equal channels.*connector.*\(1, 3, 5\).*\(1, 3, 6\)',
  ),
  'class_attention': (
    lambda: losses.class_attention(zeros((1, 4, 4, 3)), zeros((1, 4, 4, 5))),
    'same classes',
  ),
  'class_attention_size': (
    lambda: losses.class_attention(zeros((1, 1, 1, 3)), zeros((1, 4, 4, 3))),
    '1 x 1 cannot be averaged to 2 x 2',
  ),
  'norm_direction': (
    lambda: losses.norm_direction(
      zeros((1, 2)), zeros((1, 2)), zeros((4, 3)), zeros(1, int)
    ),
    r'class_mean has shape \(1, 3\)',
  ),
  'mask': (
    lambda: losses.hidden_cosine(
      zeros((2, 3, 4)), zeros((2, 3, 4)), zeros((2, 4))
    ),
    r'mask has shape \(2, 4\).*need \(2, 3\)',
  ),
  'attention_heads': (
    lambda: losses.attention_squared_error(
      zeros((1, 2, 3, 3)), zeros((1, 4, 3, 3))
    ),
    'as many heads',
  ),
  'relation_heads': (
    lambda: losses.minilm_relation(zeros((1, 2, 4)), zeros((1, 2, 4)), heads=3),
    '3 relation heads do not divide 4 features',
  ),
  'no_relation_heads': (
    lambda: losses.minilm_relation(zeros((1, 2, 4)), zeros((1, 2, 4)), heads=0),
    '0 relation heads',
  ),
  'relation_tokens': (
    lambda: losses.minilm_relation(zeros((1, 2, 4)), zeros((1, 3, 4)), heads=2),
    'same tokens',
  ),
  'input_gradient': (
    lambda: losses.input_gradient(
      lambda x: x, zeros((1, 2)), zeros(1, int), of='loss'
    ),
    "'loss'.*cross_entropy, logit",
  ),
  'projected_jacobian': (
    lambda: losses.projected_jacobian(
      lambda x: x, zeros((1, 2)), zeros((1, 3))
    ),
    r'^projected_jacobian: direction has shape \(1, 3\)',
  ),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_does_not_fit_is_named(name):
  call, message = REFUSED[name]
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.parametrize('name', [n for n in CASES if n.endswith('/masked')])
def test_a_batch_without_tokens_has_no_loss(name):
  case = CASES[name]
  inputs = case.inputs(np.random.default_rng(0))
  inputs['mask'] = np.zeros_like(inputs['mask'])

  def loss(student):
    return case.loss(**{**inputs, 'student': student})

  value, gradient = jax.value_and_grad(loss)(jnp.asarray(inputs['student']))
  assert value == 0
  np.testing.assert_array_equal(gradient, 0)


PARTS = {
  'hidden_squared_error': (losses.hidden_squared_error, 1),
  'hidden_cosine': (losses.hidden_cosine, 1),
  'attention_squared_error': (losses.attention_squared_error, 2),
  'attention_cross_entropy': (losses.attention_cross_entropy, 1),
  'minilm_relation': (functools.partial(losses.minilm_relation, heads=2), 1),
}


@pytest.mark.parametrize('name', PARTS)
def test_parts_of_a_batch_make_the_whole(name):
  loss, power = PARTS[name]
  inputs = CASES[f'{name}/masked'].inputs(np.random.default_rng(0))
  mean_count = np.mean(inputs['mask'].sum(axis=1) ** power)
  parts = [
    loss(*(x[rows] for x in inputs.values()), mean_count=mean_count)
    for rows in (slice(0, 3), slice(3, 8))
  ]
  np.testing.assert_allclose(
    np.concatenate(parts), loss(*inputs.values()), rtol=1e-6
  )


def test_margins_of_extreme_batch_norms():
  scale = jnp.array([1e-38, 1e-20, 1.0, 1.0, 0.0, 0.0, -2.0])
  bias = jnp.array([-5.0, 3.0, 50.0, -50.0, 2.0, -2.0, 0.0])
  margin = losses.batch_norm_margin(scale, bias)
  want = [-5, 0, -3, -50, 0, -2, -2 * np.sqrt(2 / np.pi)]
  np.testing.assert_allclose(margin, want, rtol=1e-6, atol=1e-12)


def test_margins_and_class_means_are_constant():
  ones = jnp.ones((1, 3))

  def loss(scale, bias, means):
    margin = losses.batch_norm_margin(scale, bias)
    ofd = losses.overhaul(ones, -ones, margin)
    return jnp.sum(ofd + losses.norm_direction(ones, ones, means, [0]))

  means = jnp.array([[1.0, 2.0, -3.0]])
  for gradient in jax.grad(loss, (0, 1, 2))(ones[0], ones[0], means):
    np.testing.assert_array_equal(gradient, 0)


def test_embeddings_of_zero_have_a_norm_direction_loss():
  none = jnp.zeros((1, 3))

  def loss(student):
    return losses.norm_direction(student, none, jnp.ones((1, 3)), [0])[0]

  value, gradient = jax.value_and_grad(loss)(none)
  assert value == 1 and np.isfinite(gradient).all()


def test_input_gradients_do_not_round_to_the_inputs_dtype():
  x = jnp.full((1, 2), 1 / 3, jnp.bfloat16)
  gradient = losses.input_gradient(jnp.sin, x, np.array([0]))
  assert gradient.dtype == jnp.float32
  full = losses.input_gradient(jnp.sin, x.astype(jnp.float32), np.array([0]))
  np.testing.assert_array_equal(gradient, full)
