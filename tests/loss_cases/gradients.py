"""Cases of `losses.gradients`: derivatives with respect to the input.

The derivatives themselves are checked through the sum of their squares, whose
gradient is a second derivative of the network.
"""

import functools

import jax.numpy as jnp
import numpy as np

from kd_jax import losses
from loss_cases.case import Case

B, INPUTS, HIDDEN, CLASSES = 8, (2, 3), 4, 5
_RNG = np.random.default_rng(7)
FIRST = _RNG.normal(size=(6, HIDDEN)).astype(np.float32)
SECOND = _RNG.normal(size=(HIDDEN, CLASSES)).astype(np.float32)


def _normal(rng, *shape):
  return rng.normal(size=shape).astype(np.float32)


def _network(x):
  hidden = jnp.tanh(x.reshape(len(x), -1).astype(jnp.float32) @ FIRST)
  return hidden @ SECOND


def _probabilities(x):
  logits = np.tanh(x.reshape(B, -1) @ FIRST) @ SECOND
  p = np.exp(logits - logits.max(axis=1, keepdims=True))
  return p / p.sum(axis=1, keepdims=True)


def _projected(x, direction):
  """The backward pass of the network by hand, `[B, 6]`."""
  slope = 1 - np.tanh(x.reshape(B, -1) @ FIRST) ** 2
  return (direction @ SECOND.T * slope) @ FIRST.T


def _square(gradient):
  return jnp.sum(jnp.square(gradient), axis=(1, 2))


def _input_gradient(student, label, of):
  return _square(losses.input_gradient(_network, student, label, of=of))


def _input_gradient_value(student, label, of):
  direction = np.eye(CLASSES)[label]
  if of == 'cross_entropy':
    direction = _probabilities(student) - direction
  return (_projected(student, direction) ** 2).sum(axis=1)


def _labelled(rng):
  label = rng.integers(0, CLASSES, B)
  return {'student': _normal(rng, B, *INPUTS), 'label': label}


def _projected_jacobian(student, direction):
  return _square(losses.projected_jacobian(_network, student, direction))


def _projected_jacobian_value(student, direction):
  return (_projected(student, direction) ** 2).sum(axis=1)


def _directed(rng):
  direction = _normal(rng, B, CLASSES)
  return {'student': _normal(rng, B, *INPUTS), 'direction': direction}


def _matching(student, teacher, normalize):
  s, t = student.reshape(B, -1), teacher.reshape(B, -1)
  if normalize:
    s, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t))
  return ((s - t) ** 2).mean(axis=1)


def _gradients(rng):
  shape = (B, *INPUTS)
  return {'student': _normal(rng, *shape), 'teacher': _normal(rng, *shape)}


def _jacobian_matching(student, teacher):
  loss = np.zeros(B)
  for i in range(B):
    for s, t in zip(student[i], teacher[i], strict=True):
      loss[i] += ((s / np.linalg.norm(s) - t / np.linalg.norm(t)) ** 2).sum()
  return loss


def _jacobians(rng):
  shape = (B, CLASSES, *INPUTS)
  return {'student': _normal(rng, *shape), 'teacher': _normal(rng, *shape)}


def _case(loss, value, inputs, *, minimum=0.0, **options):
  return Case(
    functools.partial(loss, **options),
    functools.partial(value, **options),
    inputs,
    per_example=True,
    minimum=minimum,
  )


def _gradient_matching(student, teacher, **options):
  return losses.gradient_matching(student, teacher, **options)


CASES: dict[str, Case] = {
  'input_gradient': _case(
    _input_gradient,
    _input_gradient_value,
    _labelled,
    minimum=None,
    of='cross_entropy',
  ),
  'input_gradient/logit': _case(
    _input_gradient,
    _input_gradient_value,
    _labelled,
    minimum=None,
    of='logit',
  ),
  'projected_jacobian': _case(
    _projected_jacobian, _projected_jacobian_value, _directed, minimum=None
  ),
  'gradient_matching': _case(
    _gradient_matching, _matching, _gradients, normalize=False
  ),
  'gradient_matching/normalized': _case(
    _gradient_matching, _matching, _gradients, normalize=True
  ),
  'jacobian_matching': _case(
    lambda student, teacher: losses.jacobian_matching(student, teacher),
    _jacobian_matching,
    _jacobians,
  ),
}
