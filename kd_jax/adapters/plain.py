"""A forward of a plain function, and what every adapter asks of its inputs.

Owns what needs neither linen nor nnx.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from kd_jax.types import Batch, Forward, Reads, StudentFn, Variables, names_of


def from_apply(
  apply: Callable[..., jax.Array], *, reads: Reads = 'image'
) -> StudentFn:
  """A forward of a plain function of parameters and inputs.

  Args:
    apply: `(params, *inputs) -> output`; no state, no randomness. For more,
      write the forward itself: it is only a function.
    reads: the entry of a batch that is the input, or the entries in order.

  Returns:
    `forward(variables, batch, rng=None, *, train=False) -> Forward` without
    features. When called it raises ValueError for a batch without an entry.

  Example:
    >>> forward = from_apply(lambda params, x: x @ params)
    >>> eye = jax.numpy.eye(2)
    >>> forward({'params': eye}, {'image': eye}).output.tolist()
    [[1.0, 0.0], [0.0, 1.0]]
  """

  def forward(variables, batch, rng=None, *, train=False):
    output = apply(variables['params'], *entries(batch, reads))
    return Forward(output, {}, untrained(variables))

  return forward


def entries(batch: Batch, reads: Reads) -> tuple[jax.Array, ...]:
  """Entries of the batch, or a ValueError that names those there are.

  Args:
    batch: name -> array.
    reads: a name, or several in the order in which they are returned.

  Raises:
    ValueError: if one is missing, or the batch is no mapping.

  Example:
    >>> entries({'ids': 1, 'mask': 2}, ('mask', 'ids'))
    (2, 1)
  """
  if not isinstance(batch, Mapping):
    raise ValueError(
      f'A batch is a mapping, such as {{{names_of(reads)[0]!r}: inputs}}, not '
      f'{type(batch).__name__}.'
    )
  for name in names_of(reads):
    if name not in batch:
      raise ValueError(
        f'The batch has no {name!r}; it has {", ".join(map(repr, batch))}.'
      )
  return tuple(batch[name] for name in names_of(reads))


def untrained(variables: Variables) -> dict[str, Any]:
  """The collections other than the parameters.

  Args:
    variables: `{'params': ..., **collections}`.

  Example:
    >>> untrained({'params': 1, 'batch_stats': 2})
    {'batch_stats': 2}
  """
  return {k: v for k, v in variables.items() if k != 'params'}
