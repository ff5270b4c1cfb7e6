"""Pruning as an optax wrapper: pruned weights are exactly zero after a step.

Owns `prune` and `preserve`. Their state is in `state`, which weights go is
decided by `scores` and `structures`, and sparse training from the start is in
`sparse_training`. The wrapper replaces the updates of pruned weights by -w, so
that `optax.apply_updates` yields mask * (params + updates): neither momentum
nor weight decay revives a weight.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kd_jax import rules as rules_lib
from kd_jax.placement import placed_like
from kd_jax.prune import masks as masks_lib
from kd_jax.prune import scopes
from kd_jax.prune.masks import any_nan, erase, keep_if, map_masked
from kd_jax.prune.schedules import SparsitySchedule
from kd_jax.prune.scores import Score, magnitude
from kd_jax.prune.state import PruneState
from kd_jax.prune.structures import Structure, unstructured
from kd_jax.types import Arrays


def prune(
  tx: optax.GradientTransformation,
  schedule: SparsitySchedule,
  rules: rules_lib.Rules[bool],
  *,
  score: Score | None = None,
  scope: scopes.Scope = 'global',
  structure: Structure | None = None,
  revive: str = 'never',
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer so that training prunes.

  New masks are made before the update of every step at which the schedule
  asks for another sparsity, from the current weights and the scores up to
  this step's gradient. A pruned weight is exactly zero after every update.
  While a score is NaN the masks stay as they are, and so does
  `PruneState.sparsity`; they are made as soon as no score is.

  Args:
    tx: any optax transformation; this wrapper goes outside of everything.
    schedule: `step -> sparsity`, see `schedules`; counts calls of `update`.
    rules: `(pattern, True or None)` pairs on parameter paths.
    score: which weights matter, see `scores`; `magnitude()` when None.
    scope: 'global', 'layer', 'erk' or `erk(...)`, see `magnitude_masks`.
    structure: which weights go together, see `structures`; `unstructured()`
      when None.
    revive: 'never' is one-way: a pruned weight stays zero, also when the
      schedule falls, and the wrapped optimizer sees gradient 0 for it.
      'gradient' lets it come back: the state holds the weights as they were
      before masking, the wrapped optimizer updates them with the gradient at
      the masked weights, which reaches pruned ones too, and new masks are
      made from scores of those weights. A weight that comes back has the
      value it grew to.

  Returns:
    A transformation whose `update` needs `params`.

  Raises:
    ValueError: for an unknown scope or way to revive, or a number in place of
      a schedule; in `init`, for a rule
      that matches nothing and for shapes that the structure cannot divide.

  Example:
    >>> from kd_jax.prune.schedules import constant
    >>> tx = prune(optax.adam(0.1), constant(0.5), [('.*', True)])
    >>> params = {'w': jnp.array([1.0, -2.0, 3.0, 0.1])}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> optax.apply_updates(params, updates)['w'].tolist()[0]
    0.0

  References:
    Zhu, Gupta, "To prune, or not to prune", 2017, arXiv:1710.01878 (its masked
    weights keep their value and come back by comparison with the others);
    Guo, Yao, Chen, "Dynamic Network Surgery", 2016, arXiv:1608.04493, is
    'gradient'.
  """
  if not callable(schedule):
    raise ValueError(
      f'prune takes a schedule, such as constant({schedule}), not {schedule!r}.'
    )
  tx = optax.with_extra_args_support(tx)
  score = magnitude() if score is None else score
  scope = scopes.resolve(scope)
  structure = unstructured() if structure is None else structure
  revives = rules_lib.choose(
    'revive', revive, {'never': False, 'gradient': True}
  )
  make = _masks_of_all if revives else _masks_of_the_kept

  def init(params):
    weights = masks_lib.choose_params(params, rules)
    masked = _masked_params(params, weights, structure, scope)
    return PruneState(
      step=jnp.int32(0),
      sparsity=jnp.float32(0),
      masks={n: jnp.ones_like(w, jnp.bool_) for n, w in masked.items()},
      inner=tx.init(params),
      score=score.init(weights),
      # A copy, as a compiled step may be given both to overwrite.
      dense={n: jnp.array(w) for n, w in masked.items()} if revives else (),
    )

  def update(grads, state, params=None, **extra):
    if params is None:
      raise ValueError('prune: update needs the parameters.')
    # The weights that are trained: with all their entries, if they revive.
    trained = _unmasked(params, state.masks, state.dense) if revives else params
    weights = masks_lib.choose_params(trained, rules)
    memory = score.update(
      state.score, weights, masks_lib.choose_params(grads, rules)
    )
    target = jnp.float32(schedule(state.step))

    def renew():
      scores = score.value(memory, weights)
      masks = make(lambda s: structure(s, target, scope), scores, state.masks)
      return _unless_nan(scores, state, masks, target)

    masks, sparsity = jax.lax.cond(
      target != state.sparsity, renew, lambda: (state.masks, state.sparsity)
    )
    if not revives:
      grads = masks_lib.apply_masks(grads, masks)
    updates, inner = tx.update(grads, state.inner, trained, **extra)
    dense: Any = ()
    if revives:
      dense = _by_path(optax.apply_updates(trained, updates), masks)
      updates = _revived(updates, params, state.masks, dense)
    new = PruneState(state.step + 1, sparsity, masks, inner, memory, dense)
    return erase(updates, params, masks), new

  return optax.GradientTransformationExtraArgs(init, update)


def _unless_nan(
  scores: Arrays, state: PruneState, masks: Arrays, sparsity: jax.Array
) -> tuple[Arrays, jax.Array]:
  """New masks and their sparsity, or those of the state if a score is NaN."""
  unknown = any_nan(scores)
  masks = keep_if(unknown, state.masks, masks)
  return masks, jnp.where(unknown, state.sparsity, sparsity)


def _masks_of_all(
  make: Callable[[Arrays], Arrays], scores: Arrays, old: Arrays
) -> Arrays:
  """Masks that may keep what was pruned before."""
  masks = make(scores)
  return {n: placed_like(masks[n], m) for n, m in old.items()}


def _masks_of_the_kept(
  make: Callable[[Arrays], Arrays], scores: Arrays, old: Arrays
) -> Arrays:
  """Masks in which what was pruned before stays so."""
  masks = make(
    {
      n: jnp.where(old[n], s, -jnp.inf) if n in old else s
      for n, s in scores.items()
    }
  )
  return {n: masks[n] & m for n, m in old.items()}


def preserve(
  tx: optax.GradientTransformation, rules: rules_lib.Rules[bool]
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer so that what is zero stays zero.

  For a network that was pruned before and trains on, such as with fake-quant.

  Args:
    tx: any optax transformation; this wrapper goes outside of everything.
    rules: `(pattern, True or None)` pairs on parameter paths.

  Returns:
    A transformation whose `update` needs `params`; its state is a
    `PruneState`, with the masks of the parameters that `init` was given.

  Raises:
    ValueError: in `init`, for a rule that matches nothing.

  Example:
    >>> tx = preserve(optax.sgd(0.1), [('.*', True)])
    >>> params = {'w': jnp.array([0.0, 2.0])}
    >>> updates, _ = tx.update({'w': jnp.ones(2)}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)['w'].tolist()
    [0.0, 1.899999976158142]
  """
  tx = optax.with_extra_args_support(tx)

  def init(params):
    weights = masks_lib.choose_params(params, rules)
    masks = {name: w != 0 for name, w in weights.items()}
    zeros = [jnp.sum(~m, dtype=jnp.float32) for m in masks.values()]
    size = sum(m.size for m in masks.values())
    sparsity = sum(zeros, start=jnp.float32(0)) / max(size, 1)
    return PruneState(jnp.int32(0), sparsity, masks, tx.init(params))

  def update(grads, state, params=None, **extra):
    if params is None:
      raise ValueError('preserve: update needs the parameters.')
    grads = masks_lib.apply_masks(grads, state.masks)
    updates, inner = tx.update(grads, state.inner, params, **extra)
    new = state._replace(step=state.step + 1, inner=inner)
    return erase(updates, params, state.masks), new

  return optax.GradientTransformationExtraArgs(init, update)


def _masked_params(
  params: Any,
  weights: Mapping[str, jax.Array],
  structure: Structure,
  scope: scopes.Scope,
) -> dict[str, jax.Array]:
  """The parameters that the structure masks: those chosen, or more."""
  shapes = jax.eval_shape(
    lambda w: structure(
      {n: x.astype(jnp.float32) for n, x in w.items()}, jnp.float32(0), scope
    ),
    weights,
  )
  masked = _by_path(params, shapes)
  if not masked:
    raise ValueError(
      'prune: the structure masks no parameter, only '
      f'{", ".join(map(repr, list(shapes)[:3]))}.'
    )
  return masked


def _by_path(params: Any, paths: Mapping[str, Any]) -> dict[str, jax.Array]:
  leaves = rules_lib.named_leaves(params)
  return {name: leaf for name, leaf in leaves.items() if name in paths}


def _unmasked(
  params: Any, masks: Mapping[str, jax.Array], dense: Mapping[str, jax.Array]
) -> Any:
  """The parameters as they were before masking."""
  return map_masked(
    lambda n, p: jnp.where(masks[n], p, dense[n]), masks, params
  )


def _revived(
  updates: Any,
  params: Any,
  masks: Mapping[str, jax.Array],
  dense: Mapping[str, jax.Array],
) -> Any:
  """Updates that bring back a weight, now 0, with the value it grew to."""
  return map_masked(
    lambda n, u, p: jnp.where(masks[n], u, dense[n] - p), masks, updates, params
  )
