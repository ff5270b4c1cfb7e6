"""What the common suite needs to know of a loss.

`CASES` of a module maps names to cases: the public function's name, with
options behind a slash where it has several: 'kl_divergence/T20'.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Inputs = Mapping[str, Any]


class Case(NamedTuple):
  """One loss and how to check it.

  Attributes:
    loss: takes the inputs as keywords: `student`, where there is one
      `teacher`, and extras such as `label` or `mask`. Student and teacher are
      arrays, or tuples of arrays for a loss of several maps.
    value: the same in NumPy, from the paper. It gets the inputs in float64
      and calls neither JAX nor the library.
    inputs: `rng -> inputs`, small float32 or integer arrays whose leading
      axis is the batch of 8, unless `shared` lists the name.
    per_example: whether the loss is `[B, ...]`, one number for each example,
      and not a scalar over the batch.
    minimum: the value where the student equals the teacher, or `inputs ->
      value` in NumPy; None where the gradient need not vanish there, or the
      two cannot be equal.
    permutation: whether the order of the batch is of no importance.
    shared: the inputs without a batch axis.
    zero_ok: whether the gradient is finite for a student of zeros.
  """

  loss: Callable[..., Any]
  value: Callable[..., Any]
  inputs: Callable[[np.random.Generator], Inputs]
  per_example: bool
  minimum: Callable[[Inputs], Any] | float | None = 0.0
  permutation: bool = True
  shared: tuple[str, ...] = ()
  zero_ok: bool = True
