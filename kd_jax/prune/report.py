"""What pruning achieved, layer by layer."""

from typing import Any, NamedTuple

import jax
import numpy as np

from kd_jax import rules as rules_lib


class LayerSparsity(NamedTuple):
  """Counts of one parameter.

  Attributes:
    path: '/'-joined path.
    size: number of weights.
    nonzero: number of weights that are not zero.
  """

  path: str
  size: int
  nonzero: int

  @property
  def sparsity(self) -> float:
    """Share of zeros."""
    return 1 - self.nonzero / self.size


def sparsity_report(
  params: Any, rules: rules_lib.Rules[bool] = (('.*', True),)
) -> list[LayerSparsity]:
  """Counts the zeros of every chosen parameter.

  Args:
    params: any pytree of arrays.
    rules: `(pattern, True or None)` pairs on parameter paths.

  Example:
    >>> for row in sparsity_report({'kernel': np.array([0.0, 1.0])}):
    ...   print(row.path, row.nonzero, row.size, row.sparsity)
    kernel 1 2 0.5
  """
  names = rules_lib.leaf_names(params)
  chosen = rules_lib.match(rules, names, kind='pruning rule')
  return [
    LayerSparsity(name, int(leaf.size), int(np.count_nonzero(leaf)))
    for name, leaf in zip(names, map(np.asarray, jax.tree.leaves(params)))
    if name in chosen
  ]
