"""A forward of a plain function, and what every adapter asks of its inputs.

Owns what needs neither linen nor nnx.
"""

from collections.abc import Callable
from typing import Any

import jax

from kd_jax.types import Batch, Forward, StudentFn, Variables


def from_apply(
  apply: Callable[[Any, Any], jax.Array], *, image: str = 'image'
) -> StudentFn:
  """A forward of a plain function of parameters and input.

  Args:
    apply: `(params, x) -> output`; no state, no randomness. For more, write
      the forward itself: it is only a function.
    image: the key of the input in the batch.

  Example:
    >>> forward = from_apply(lambda params, x: x @ params)
    >>> eye = jax.numpy.eye(2)
    >>> forward({'params': eye}, {'image': eye}).output.tolist()
    [[1.0, 0.0], [0.0, 1.0]]
  """

  def forward(variables, batch, rng=None, *, train=False):
    output = apply(variables['params'], entry(batch, image))
    return Forward(output, {}, untrained(variables))

  return forward


def entry(batch: Batch, key: str) -> jax.Array:
  """An entry of the batch, or a ValueError that names those there are."""
  if key not in batch:
    raise ValueError(
      f'The batch has no {key!r}; it has {", ".join(map(repr, batch))}.'
    )
  return batch[key]


def untrained(variables: Variables) -> dict[str, Any]:
  """The collections other than the parameters."""
  return {k: v for k, v in variables.items() if k != 'params'}
