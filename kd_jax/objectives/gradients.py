"""Terms on derivatives with respect to the input.

Owns which derivatives of which network are compared; their formulas are in
`losses`. They run both networks again, in evaluation mode, so that examples do
not interact, and differentiate the student twice: a step costs about three
times as much.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.objectives import base
from kd_jax.objectives.base import Objective
from kd_jax.objectives.inputs import Inputs
from kd_jax.objectives.scopes import draw_global

# input -> logits
Network = Callable[[jax.Array], jax.Array]


def input_gradients(
  *, normalize: bool = False, reads: str = 'image'
) -> Objective:
  """Gradients of the cross-entropy with respect to the input are matched.

  Args:
    normalize: whether each gradient is scaled to unit length (saliency).
    reads: the entry of a batch that both networks see.

  References:
    Zagoruyko, Komodakis, "Paying More Attention to Attention", 2016,
    arXiv:1612.03928, section 3.2.

  Example:
    >>> from kd_jax.types import Forward
    >>> def linear(variables, batch, rng=None, *, train=False):
    ...   return Forward(batch['x'] @ variables['w'])
    >>> batch = {'x': jnp.ones((1, 2)), 'label': jnp.array([0])}
    >>> w = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> for scale in (1.0, 3.0):
    ...   inputs = Inputs(
    ...     linear({'w': w}, batch), linear({'w': scale * w}, batch), batch,
    ...     jnp.int32(0), None, student_fn=linear, student_variables={'w': w},
    ...     teacher_fn=linear, teacher_variables={'w': scale * w})
    ...   input_gradients(reads='x').apply({}, {}, inputs)[0].tolist()
    [0.0]
    [1.0]
  """

  def loss_fn(inputs):
    student, teacher, x = _functions(inputs, reads)
    gradients = (
      base.of_labels(
        functools.partial(losses.input_gradient, network, x), inputs
      )
      for network in (student, teacher)
    )
    return losses.gradient_matching(*gradients, normalize=normalize)

  return base.term(loss_fn)


def sobolev(*, projections: int = 1, reads: str = 'image') -> Objective:
  """Jacobians of the logits, matched along random directions.

  Args:
    projections: random unit directions of the logits per example and step.
    reads: the entry of a batch that both networks see.

  References:
    Czarnecki et al., "Sobolev Training for Neural Networks", 2017,
    arXiv:1706.04859.

  Example:
    >>> from kd_jax.types import Forward
    >>> def linear(variables, batch, rng=None, *, train=False):
    ...   return Forward(batch['x'] @ variables['w'])
    >>> batch, w = {'x': jnp.ones((1, 2))}, jnp.eye(2)
    >>> inputs = Inputs(
    ...   linear({'w': w}, batch), linear({'w': 3 * w}, batch), batch,
    ...   jnp.int32(0), jax.random.key(0), student_fn=linear,
    ...   student_variables={'w': w}, teacher_fn=linear,
    ...   teacher_variables={'w': 3 * w})
    >>> loss, _, _ = sobolev(reads='x').apply({}, {}, inputs)
    >>> [round(x, 4) for x in loss.tolist()]
    [2.0]
  """

  def loss_fn(inputs):
    student, teacher, x = _functions(inputs, reads)
    shape = inputs.student.output.shape
    total: jax.Array | float = 0.0
    for i in range(projections):
      key = jax.random.fold_in(inputs.rng, i)
      direction = draw_global(_unit_vectors, key, shape, inputs.axis_name)
      total += losses.gradient_matching(
        losses.projected_jacobian(student, x, direction),
        losses.projected_jacobian(teacher, x, direction),
      )
    return total / projections

  return base.term(loss_fn)


def jacobians(*, reads: str = 'image') -> Objective:
  """The Jacobian row of the teacher's most likely class is matched.

  Args:
    reads: the entry of a batch that both networks see.

  References:
    Srinivas, Fleuret, "Knowledge Transfer with Jacobian Matching", 2018,
    arXiv:1803.00443.

  Example:
    >>> from kd_jax.types import Forward
    >>> def linear(variables, batch, rng=None, *, train=False):
    ...   return Forward(batch['x'] @ variables['w'])
    >>> batch, w = {'x': jnp.ones((1, 2))}, jnp.eye(2)
    >>> turned = w[::-1]
    >>> inputs = Inputs(
    ...   linear({'w': w}, batch), linear({'w': turned}, batch), batch,
    ...   jnp.int32(0), None, student_fn=linear, student_variables={'w': w},
    ...   teacher_fn=linear, teacher_variables={'w': turned})
    >>> loss, _, _ = jacobians(reads='x').apply({}, {}, inputs)
    >>> [round(x, 4) for x in loss.tolist()]
    [2.0]
  """

  def loss_fn(inputs):
    student, teacher, x = _functions(inputs, reads)
    logits = base.teacher_of(inputs, 'jacobians').output
    row = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    return losses.jacobian_matching(
      losses.projected_jacobian(student, x, row)[:, None],
      losses.projected_jacobian(teacher, x, row)[:, None],
    )

  return base.term(loss_fn)


def _functions(
  inputs: Inputs, reads: str
) -> tuple[Network, Network, jax.Array]:
  """`input -> logits` of both networks, and the input."""
  what = 'A term on input gradients'
  student_fn = base.student_fn_of(inputs, what)
  teacher_fn = base.teacher_fn_of(inputs, what)

  def student(x):
    batch = {**inputs.batch, reads: x}
    variables = inputs.student_variables
    return student_fn(variables, batch, None, train=False).output

  def teacher(x):
    batch = {**inputs.batch, reads: x}
    return teacher_fn(inputs.teacher_variables or {}, batch).output

  return student, teacher, base.entry(inputs, reads)


def _unit_vectors(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  draws = jax.random.normal(key, shape)
  return draws / jnp.linalg.norm(draws, axis=-1, keepdims=True)
