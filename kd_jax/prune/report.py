"""What pruning achieved, layer by layer: how many weights are zero.

Owns counts of weights that are there. Operations are counted elsewhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from kd_jax import rules as rules_lib


class LayerSparsity(NamedTuple):
  """Counts of one parameter, or of several together.

  Attributes:
    path: '/'-joined path.
    size: number of weights.
    nonzero: number of weights that are not zero.
    target: share of the weights that the masks set to zero; None without masks.

  Example:
    >>> LayerSparsity('w', size=8, nonzero=2).sparsity
    0.75
  """

  path: str
  size: int
  nonzero: int
  target: float | None = None

  @property
  def sparsity(self) -> float:
    """Share of zeros that was achieved; 0 for an empty parameter."""
    return 1 - self.nonzero / self.size if self.size else 0.0


def sparsity_report(
  params: Any,
  rules: rules_lib.Rules[bool] = (('.*', True),),
  *,
  masks: Mapping[str, Any] | None = None,
) -> list[LayerSparsity]:
  """Counts the zeros of every chosen parameter.

  Args:
    params: any pytree of arrays.
    rules: `(pattern, True or None)` pairs on parameter paths.
    masks: parameter path -> mask, such as `masks_of(opt_state)`; their zeros
      are the targets.

  Returns:
    One row per parameter, in the order of the tree; see `total` for their sum.

  Raises:
    ValueError: if a rule matches nothing.

  Example:
    >>> masks = {'kernel': np.array([True, True, False])}
    >>> params = {'kernel': np.array([0.0, 1.0, 0.0])}
    >>> for row in sparsity_report(params, masks=masks):
    ...   print(row.path, row.nonzero, row.size)
    ...   print(round(row.sparsity, 3), round(row.target, 3))
    kernel 1 3
    0.667 0.333
  """
  leaves = rules_lib.named_leaves(jax.tree.map(np.asarray, params))
  chosen = rules_lib.match(rules, list(leaves), kind='pruning rule')
  masks = {} if masks is None else masks
  return [
    LayerSparsity(
      name,
      int(leaf.size),
      int(np.count_nonzero(leaf)),
      float(1 - np.mean(masks[name])) if name in masks and leaf.size else None,
    )
    for name, leaf in leaves.items()
    if name in chosen
  ]


def total(rows: Sequence[LayerSparsity]) -> LayerSparsity:
  """The sum of rows, named 'total'.

  Its target counts a row without one as dense, and is None if no row has one.

  Args:
    rows: of `sparsity_report`; their paths do not matter.

  Example:
    >>> rows = [LayerSparsity('a', 4, 1, 0.75), LayerSparsity('b', 4, 4)]
    >>> total(rows)
    LayerSparsity(path='total', size=8, nonzero=5, target=0.375)
  """
  size = sum(row.size for row in rows)
  target = None
  if size and any(row.target is not None for row in rows):
    target = sum((row.target or 0.0) * row.size for row in rows) / size
  return LayerSparsity('total', size, sum(r.nonzero for r in rows), target)
