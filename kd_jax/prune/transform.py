"""Pruning as an optax wrapper: pruned weights are exactly zero after a step.

The wrapper masks the gradients that the wrapped optimizer sees and replaces
the updates of pruned weights by -w, so that `optax.apply_updates` yields
mask * (params + updates): neither momentum nor weight decay revives a weight.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kd_jax import rules as rules_lib
from kd_jax.prune import masks as masks_lib
from kd_jax.prune.schedules import SparsitySchedule


class PruneState(NamedTuple):
  """State of `prune`.

  Attributes:
    step: int32 scalar, number of updates so far.
    sparsity: float32 scalar, the target that the masks were made for.
    masks: parameter path -> boolean mask, True where kept.
    inner: state of the wrapped optimizer.
  """

  step: jax.Array
  sparsity: jax.Array
  masks: dict[str, jax.Array]
  inner: Any


def prune(
  tx: optax.GradientTransformation,
  schedule: SparsitySchedule,
  rules: rules_lib.Rules[bool],
  *,
  scope: str = 'global',
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer so that training prunes by magnitude.

  New masks are made before the update of every step at which the schedule
  asks for another sparsity, from the current weights. A pruned weight is zero
  and stays pruned while sparsity rises.

  Args:
    tx: any optax transformation; this wrapper goes outside of everything.
    schedule: `step -> sparsity`, see `schedules`; counts calls of `update`.
    rules: `(pattern, True or None)` pairs on parameter paths.
    scope: 'global' or 'layer', see `masks.magnitude_masks`.

  Returns:
    A transformation whose `update` needs `params`.

  Example:
    >>> from kd_jax.prune.schedules import constant
    >>> tx = prune(optax.adam(0.1), constant(0.5), [('.*', True)])
    >>> params = {'w': jnp.array([1.0, -2.0, 3.0, 0.1])}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> optax.apply_updates(params, updates)['w'].tolist()[0]
    0.0

  References:
    Zhu, Gupta, 2017, arXiv:1710.01878.
  """
  tx = optax.with_extra_args_support(tx)

  def init(params):
    chosen = masks_lib.choose_params(params, rules)
    return PruneState(
      step=jnp.int32(0),
      sparsity=jnp.float32(0),
      masks={n: jnp.ones_like(w, jnp.bool_) for n, w in chosen.items()},
      inner=tx.init(params),
    )

  def update(grads, state, params=None, **extra):
    if params is None:
      raise ValueError('prune: update needs the parameters.')
    sparsity = jnp.float32(schedule(state.step))

    def new_masks():
      weights = masks_lib.choose_params(params, rules)
      # A pruned weight scores 0, but so may a kept one: -1 would break the
      # order of the bits, so kept weights are moved up instead.
      scores = {
        name: jnp.where(state.masks[name], _positive(jnp.abs(w)), 0.0)
        for name, w in weights.items()
      }
      return masks_lib.score_masks(scores, sparsity, scope=scope)

    masks = jax.lax.cond(
      sparsity != state.sparsity, new_masks, lambda: state.masks
    )
    grads = masks_lib.apply_masks(grads, masks)
    updates, inner = tx.update(grads, state.inner, params, **extra)
    return _erase(updates, params, masks), PruneState(
      state.step + 1, sparsity, masks, inner
    )

  return optax.GradientTransformationExtraArgs(init, update)


def _positive(score: jax.Array) -> jax.Array:
  return jnp.maximum(score.astype(jnp.float32), jnp.finfo(jnp.float32).tiny)


def _erase(updates, params, masks):
  names = rules_lib.leaf_names(params)
  leaves, structure = jax.tree.flatten(updates)
  return structure.unflatten(
    jnp.where(masks[name], u, -p) if name in masks else u
    for name, u, p in zip(names, leaves, jax.tree.leaves(params))
  )


def find_state(opt_state: Any) -> PruneState | None:
  """The state of `prune` inside any optimizer state; None without it.

  Args:
    opt_state: the state of an optax chain.
  """
  is_prune = lambda x: isinstance(x, PruneState)
  for leaf in jax.tree.leaves(opt_state, is_leaf=is_prune):
    if is_prune(leaf):
      return leaf
  return None


def masks_of(opt_state: Any) -> dict[str, jax.Array]:
  """The pruning masks inside any optimizer state; empty without `prune`.

  Args:
    opt_state: the state of an optax chain.

  Returns:
    parameter path -> boolean mask.
  """
  state = find_state(opt_state)
  return {} if state is None else state.masks
