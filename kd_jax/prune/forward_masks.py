"""Masks in the forward alone: the optimizer trains dense weights.

Owns the map of parameters that makes masks anew at every step and lets the
gradient pass them. Masks that are kept in an optimizer's state are made in
`transform`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax import rules as rules_lib
from kd_jax.prune import masks as masks_lib
from kd_jax.prune import scopes
from kd_jax.prune.schedules import SparsitySchedule
from kd_jax.prune.scores import Score, magnitude
from kd_jax.prune.structures import Structure, unstructured


def straight_through(
  schedule: SparsitySchedule,
  rules: rules_lib.Rules[bool],
  *,
  score: Score | None = None,
  scope: scopes.Scope = 'global',
  structure: Structure | None = None,
) -> Callable[[Any, jax.Array], Any]:
  """A map of parameters that masks them, and whose gradient reaches them all.

  The optimizer trains dense weights; the network runs with the largest of
  them. Masks are made anew at every step.

  Args:
    schedule: `step -> sparsity`, see `schedules`.
    rules: `(pattern, True or None)` pairs on parameter paths.
    score: of the weights alone, without memory: `magnitude()` (when None),
      `lamp()` or `random()`.
    scope: as for `prune`.
    structure: as for `prune`.

  Returns:
    `params_fn(params, step) -> params` for `make_train_step`. To serve or
    evaluate the trained weights, call it with the last step.

  Raises:
    ValueError: for an unknown scope; when called, for a rule that matches
      nothing, shapes that the structure cannot divide and scores with memory.

  Example:
    >>> from kd_jax.prune.schedules import constant
    >>> params_fn = straight_through(constant(0.5), [('w', True)])
    >>> params = {'w': jnp.array([1.0, 3.0])}
    >>> params_fn(params, 0)['w'].tolist()
    [0.0, 3.0]
    >>> jax.grad(lambda p: params_fn(p, 0)['w'].sum())(params)['w'].tolist()
    [1.0, 1.0]

  References:
    Bengio, Leonard, Courville, 2013, arXiv:1308.3432 (straight-through).
  """
  score = magnitude() if score is None else score
  scope = scopes.resolve(scope)
  structure = unstructured() if structure is None else structure

  def params_fn(params, step):
    fixed = jax.lax.stop_gradient(params)
    weights = masks_lib.choose_params(fixed, rules)
    memory = score.init(weights)
    if jax.tree.leaves(memory):
      raise ValueError(
        'straight_through makes masks of the weights alone: its score is '
        'magnitude, lamp or random, none with a memory.'
      )
    scores = score.value(memory, weights)
    masks = structure(scores, jnp.float32(schedule(step)), scope)
    masked = masks_lib.apply_masks(fixed, masks)
    # p + (mask * p - p) is exactly mask * p, and its gradient that of p.
    return masks_lib.map_masked(
      lambda n, p, m, f: p + (m - f), masks, params, masked, fixed
    )

  return params_fn
