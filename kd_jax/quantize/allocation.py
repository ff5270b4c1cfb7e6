"""Bit allocation: one option for each parameter, under a budget.

Owns the choice; how much each option hurts comes from `sensitivities`, what it
costs from `weight_bytes` or a table of measured latencies.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from kd_jax import rules as rules_lib
from kd_jax.quantize.fake_quant import weight_scale
from kd_jax.quantize.sensitivities import Option, Sensitivity
from kd_jax.quantize.specs import QuantSpec

Spec = TypeVar('Spec', bound=QuantSpec | None)
# Partial choices kept; below this many the result is exact.
_FRONT = 50_000


class Allocation(NamedTuple):
  """An option for each parameter.

  Attributes:
    rules: `(pattern, option)` pairs, one for each path; `fake_quant_params`
      takes them when the options are specs.
    cost: the sum of costs.
    loss: the sum of sensitivities; an estimate of the whole network's loss,
      as if the changes did not interact.
  """

  rules: list[tuple[str, Any]]
  cost: float
  loss: float


def allocate(
  sensitivities: Iterable[Sensitivity[Option]],
  costs: Mapping[tuple[str, Option], float],
  budget: float,
) -> Allocation:
  """The options with the smallest total loss whose costs fit a budget.

  Parameters are added one by one; of all choices so far those are kept that
  no other one beats in both cost and loss. What is left at the end are all
  best trade-offs, whatever the budget: the result is exact, and more budget
  never gives a larger loss. With very many parameters of many sizes the
  choices are thinned to 50,000, evenly in cost, and the best may be missed.

  Args:
    sensitivities: rows `(path, option, loss)`; each path with at least one
      option. An option None, a parameter left as it is, needs a row too.
    costs: `(path, option)` -> cost >= 0: bytes, milliseconds or any unit.
    budget: the largest sum of costs allowed, in the same unit.

  Returns:
    The chosen options.

  Raises:
    ValueError: if a cost is missing, or even the cheapest options exceed the
      budget.

  Example:
    >>> rows = [
    ...   Sensitivity('a', 8, 0.0), Sensitivity('a', 4, 0.5),
    ...   Sensitivity('b', 8, 0.0), Sensitivity('b', 4, 0.1),
    ... ]
    >>> costs = {('a', 8): 8, ('a', 4): 4, ('b', 8): 8, ('b', 4): 4}
    >>> allocate(rows, costs, 12)
    Allocation(rules=[('a', 8), ('b', 4)], cost=12.0, loss=0.1)
  """
  table: dict[str, list[tuple[Any, float, float]]] = {}
  for path, option, loss in sensitivities:
    if (path, option) not in costs:
      raise ValueError(f'allocate: there is no cost of {path} with {option}.')
    cost = float(costs[path, option])
    if not (cost >= 0 and math.isfinite(loss)):
      raise ValueError(
        f'allocate: {path} with {option} has cost {cost} and loss {loss}; '
        'needs a cost >= 0 and a finite loss.'
      )
    table.setdefault(path, []).append((option, cost, float(loss)))
  least = sum(min(cost for _, cost, _ in rows) for rows in table.values())
  if least > budget:
    raise ValueError(
      f'allocate: the budget is {budget:g}, but the smallest possible cost is '
      f'{least:g}.'
    )
  costs_so_far, losses = np.zeros(1), np.zeros(1)
  steps = []
  for rows in table.values():
    costs_so_far, losses, *step = _extend(costs_so_far, losses, rows)
    steps.append(step)
  # Sums of floats in another order than the budget's may exceed it by an ulp.
  affordable = costs_so_far <= budget * (1 + 1e-12)
  affordable[0] = True
  i = best = int(np.flatnonzero(affordable)[-1])
  options = []
  for before, picked in reversed(steps):
    options.append(picked[i])
    i = before[i]
  rules = [
    (re.escape(path), rows[choice][0])
    for (path, rows), choice in zip(
      table.items(), reversed(options), strict=True
    )
  ]
  return Allocation(rules, float(costs_so_far[best]), float(losses[best]))


def _extend(
  cost: np.ndarray, loss: np.ndarray, rows: Sequence[tuple[Any, float, float]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Adds one parameter to a front of trade-offs, cheapest first."""
  more = np.array([c for _, c, _ in rows]), np.array([v for _, _, v in rows])
  costs = (cost[:, None] + more[0][None]).ravel()
  losses = (loss[:, None] + more[1][None]).ravel()
  order = np.lexsort((losses, costs))
  # A choice is kept if it is better than everything as cheap.
  best = np.minimum.accumulate(losses[order])
  keep = np.concatenate([[True], best[1:] < best[:-1]])
  order = order[keep]
  if len(order) > _FRONT:
    bins = np.linspace(costs[order[0]], costs[order[-1]], _FRONT)
    last = np.searchsorted(costs[order], bins, side='right') - 1
    order = order[np.unique(last)]
  return costs[order], losses[order], order // len(rows), order % len(rows)


def weight_bytes(w: jax.Array, spec: QuantSpec | None) -> int:
  """Bytes of a stored parameter: its codes, and a float32 for each scale.

  Args:
    w: the parameter; only shape and dtype matter.
    spec: the quantizer; None for the parameter in its own dtype. 4-bit codes
      are packed two to a byte along the last axis. Where all of a kernel has
      one scale, `convert` stores it once for each output channel, which is not
      counted.

  Example:
    >>> import jax.numpy as jnp
    >>> w = jnp.zeros((3, 5))
    >>> specs = None, QuantSpec(8), QuantSpec(4, axis=-1)
    >>> [weight_bytes(w, spec) for spec in specs]
    [60, 19, 29]
  """
  if spec is None:
    return w.size * w.dtype.itemsize
  scale, _ = jax.eval_shape(lambda w: weight_scale(w, spec), w)
  zero_points = 0 if spec.symmetric else scale.size
  row = w.shape[-1] if w.ndim else 1
  codes = w.size // max(row, 1) * -(-row * spec.bits // 8)
  return codes + 4 * scale.size + zero_points


def size_costs(
  params: Any, sensitivities: Iterable[Sensitivity[Spec]]
) -> dict[tuple[str, Spec], int]:
  """The bytes of every option of `sensitivities`, for `allocate`.

  Args:
    params: the parameters that were measured.
    sensitivities: rows whose options are `QuantSpec` or None.

  Example:
    >>> options = {None: 0.0, QuantSpec(8): 0.1}
    >>> rows = [Sensitivity('w', key, loss) for key, loss in options.items()]
    >>> list(size_costs({'w': np.zeros((4, 4), 'f')}, rows).values())
    [64, 20]
  """
  leaves = rules_lib.named_leaves(params)
  return {
    (path, option): weight_bytes(leaves[path], option)
    for path, option, _ in sensitivities
  }
