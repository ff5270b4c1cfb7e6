"""Terms on derivatives with respect to the input.

Owns which derivatives of which network are compared; their formulas are in
`losses`. They run both networks again, in evaluation mode, so that examples do
not interact, and differentiate the student twice: a step costs about three
times as much.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.objectives import base
from kd_jax.objectives.base import Inputs, Objective
from kd_jax.objectives.scopes import draw_global

# image -> logits
Network = Callable[[jax.Array], jax.Array]


def input_gradients(
  *, normalize: bool = False, image: str = 'image'
) -> Objective:
  """Gradients of the cross-entropy with respect to the image are matched.

  Args:
    normalize: whether each gradient is scaled to unit length (saliency).
    image: the key of the networks' input in the batch.
  """

  def loss_fn(inputs):
    label = base.entry(inputs, 'label')
    student, teacher, x = _functions(inputs, image)
    return losses.gradient_matching(
      losses.input_gradient(student, x, label),
      losses.input_gradient(teacher, x, label),
      normalize=normalize,
    )

  return base.term(loss_fn)


def sobolev(*, projections: int = 1, image: str = 'image') -> Objective:
  """Jacobians of the logits, matched along random directions.

  Args:
    projections: random unit directions of the logits per example and step.
    image: the key of the networks' input in the batch.

  References:
    Czarnecki et al., "Sobolev Training for Neural Networks", 2017,
    arXiv:1706.04859.
  """

  def loss_fn(inputs):
    student, teacher, x = _functions(inputs, image)
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


def jacobians(*, image: str = 'image') -> Objective:
  """The Jacobian row of the teacher's most likely class is matched.

  Args:
    image: the key of the networks' input in the batch.

  References:
    Srinivas, Fleuret, "Knowledge Transfer with Jacobian Matching", 2018,
    arXiv:1803.00443.
  """

  def loss_fn(inputs):
    student, teacher, x = _functions(inputs, image)
    logits = base.teacher_of(inputs, 'jacobians').output
    row = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    return losses.jacobian_matching(
      losses.projected_jacobian(student, x, row)[:, None],
      losses.projected_jacobian(teacher, x, row)[:, None],
    )

  return base.term(loss_fn)


def _functions(
  inputs: Inputs, image: str
) -> tuple[Network, Network, jax.Array]:
  """`image -> logits` of both networks, and the image."""
  what = 'A term on input gradients'
  student_fn = base.student_fn_of(inputs, what)
  teacher_fn = base.teacher_fn_of(inputs, what)

  def student(x):
    batch = {**inputs.batch, image: x}
    variables = inputs.student_variables
    return student_fn(variables, batch, None, train=False).output

  def teacher(x):
    batch = {**inputs.batch, image: x}
    return teacher_fn(inputs.teacher_variables or {}, batch).output

  return student, teacher, base.entry(inputs, image)


def _unit_vectors(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  draws = jax.random.normal(key, shape)
  return draws / jnp.linalg.norm(draws, axis=-1, keepdims=True)
