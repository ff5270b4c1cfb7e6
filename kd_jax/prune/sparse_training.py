"""Sparse training from the start: SET and RigL, as an optax wrapper.

Owns the exchange of weights during training. The number of weights of every
layer is constant; which ones there are changes every few steps: the smallest
go, others begin at zero. Masks and counts are those of `masks` and `scopes`;
pruning along a schedule is in `transform`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kd_jax import rules as rules_lib
from kd_jax.prune import masks as masks_lib
from kd_jax.prune import scopes
from kd_jax.prune.masks import any_nan, erase, keep_if
from kd_jax.prune.scores import path_key, random
from kd_jax.prune.state import PruneState
from kd_jax.prune.thresholds import largest_each


def sparse_train(
  tx: optax.GradientTransformation,
  sparsity: float,
  rules: rules_lib.Rules[bool],
  *,
  stop: int,
  scope: scopes.Scope = 'erk',
  grow: str = 'gradient',
  drop: float = 0.3,
  every: int = 100,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer so that training is sparse from its first update on.

  Masks are random at first. At the steps every, 2 every, ... below `stop`
  weights are exchanged, in every layer by itself: of its kept weights the
  share drop / 2 * (1 + cos(pi t / stop)) with the smallest |w| is dropped, and
  as many of the others are grown, by the largest |gradient| or at random. A
  weight that was dropped may be grown at once, and then keeps its value. New
  weights begin at 0, with the optimizer state that a new weight has. The
  exchange takes the place of that step's update: no weight moves, and the
  wrapped optimizer does not count it. If a weight or gradient is NaN then,
  nothing is exchanged.

  Read the masks with `masks_of`. The first forward sees what it is given;
  `apply_masks(params, masks_of(tx.init(params)))` makes that sparse too.

  Args:
    tx: any optax transformation; this wrapper goes outside of everything.
    sparsity: share of zeros, in [0, 1).
    rules: `(pattern, True or None)` pairs on parameter paths.
    stop: step from which masks are fixed; the paper's is 75 % of the run.
    scope: how the layers share the weights: 'layer', 'erk' or `erk(...)`;
      'global' leaves it to chance.
    grow: 'gradient' is RigL, 'random' is SET.
    drop: share of the weights exchanged at first, in (0, 1].
    every: steps from one exchange to the next, >= 1.
    seed: of the first masks and of random growth.

  Returns:
    A transformation whose `update` needs `params`; its state is a
    `PruneState`.

  Raises:
    ValueError: for an argument outside of its range or an unknown name; in
      `init`, for a rule that matches nothing.

  Example:
    >>> rules = [('.*', True)]
    >>> tx = sparse_train(optax.adam(0.1), 0.5, rules, stop=10, every=2)
    >>> params = {'w': jnp.arange(1.0, 9.0)}
    >>> state = tx.init(params)
    >>> for _ in range(5):
    ...   updates, state = tx.update(params, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> int(state.masks['w'].sum()), int((params['w'] != 0).sum())
    (4, 4)

  References:
    Evci et al., "Rigging the Lottery", 2019, arXiv:1911.11134 (RigL); Mocanu
    et al., 2017, arXiv:1707.04780 (SET).
  """
  tx = optax.with_extra_args_support(tx)
  scope = scopes.resolve(scope)
  by_gradient = rules_lib.choose(
    'grow', grow, {'gradient': True, 'random': False}
  )
  _check(sparsity, drop, every, stop)

  def first_masks(weights):
    scores = random(seed).value((), weights)
    return masks_lib.score_masks(scores, sparsity, scope=scope)

  def init(params):
    weights = masks_lib.choose_params(params, rules)
    masks = jax.jit(first_masks)(weights)
    return PruneState(
      step=jnp.int32(0),
      sparsity=jnp.float32(sparsity),
      masks=masks,
      inner=tx.init(masks_lib.apply_masks(params, masks)),
    )

  def update(grads, state, params=None, **extra):
    if params is None:
      raise ValueError('sparse_train: update needs the parameters.')

    def train():
      masked = masks_lib.apply_masks(grads, state.masks)
      updates, inner = tx.update(masked, state.inner, params, **extra)
      return erase(updates, params, state.masks), state.masks, inner

    def exchange():
      weights = masks_lib.choose_params(params, rules)
      wanted = masks_lib.choose_params(grads, rules)
      unknown = any_nan(weights) | any_nan(wanted)
      if not by_gradient:
        wanted = _draws(weights, seed, state.step)
      share = drop / 2 * (1 + jnp.cos(jnp.pi * state.step / stop))
      masks = _exchanged(state.masks, weights, wanted, share)
      masks = keep_if(unknown, state.masks, masks)
      return _exchange(tx, params, state, masks, jax.eval_shape(train)[0])

    due = (state.step % every == 0) & (state.step > 0) & (state.step < stop)
    updates, masks, inner = jax.lax.cond(due, exchange, train)
    return updates, PruneState(state.step + 1, state.sparsity, masks, inner)

  return optax.GradientTransformationExtraArgs(init, update)


def _check(sparsity: float, drop: float, every: int, stop: int) -> None:
  if not (0 <= sparsity < 1 and 0 < drop <= 1 and every >= 1 and stop >= 0):
    raise ValueError(
      'sparse_train: needs 0 <= sparsity < 1, 0 < drop <= 1, every >= 1 and '
      f'stop >= 0, not sparsity={sparsity}, drop={drop}, every={every}, '
      f'stop={stop}.'
    )


def _draws(
  weights: Mapping[str, jax.Array], seed: int, step: jax.Array
) -> dict[str, jax.Array]:
  """A random number for every weight, other ones at every step."""
  key = jax.random.fold_in(jax.random.key(seed), step)
  return {
    n: jax.random.uniform(path_key(key, n), w.shape) for n, w in weights.items()
  }


def _exchanged(
  masks: Mapping[str, jax.Array],
  weights: Mapping[str, jax.Array],
  wanted: Mapping[str, jax.Array],
  share: jax.Array,
) -> dict[str, jax.Array]:
  """Masks that gave a share of their smallest weights for as many others."""
  active = [jnp.sum(m, dtype=jnp.int32) for m in masks.values()]
  moved = [jnp.round(share * a).astype(jnp.int32) for a in active]
  magnitudes = [
    jnp.where(m, jnp.abs(weights[n]), -jnp.inf) for n, m in masks.items()
  ]
  kept = largest_each(
    magnitudes, [a - k for a, k in zip(active, moved, strict=True)]
  )
  offers = [
    jnp.where(k, -jnp.inf, jnp.abs(wanted[n]))
    for n, k in zip(masks, kept, strict=True)
  ]
  grown = largest_each(offers, moved)
  return {n: k | g for n, k, g in zip(masks, kept, grown, strict=True)}


def _exchange(
  tx: optax.GradientTransformation,
  params: Any,
  state: PruneState,
  masks: Mapping[str, jax.Array],
  updates: Any,
) -> tuple[Any, Mapping[str, jax.Array], Any]:
  """What puts new masks in force instead of an update.

  Args:
    tx: the wrapped optimizer.
    params: the parameters.
    state: with the masks that they have.
    masks: the new ones.
    updates: of the wrapped optimizer, or their shapes.

  Returns:
    Updates that drop weights and move none, the masks, and the optimizer's
    state, in which new weights have no past.
  """
  stays = {n: m & state.masks[n] for n, m in masks.items()}
  new = {n: m & ~state.masks[n] for n, m in masks.items()}
  zeros = jax.tree.map(lambda u: jnp.zeros(u.shape, u.dtype), updates)
  fresh = tx.init(masks_lib.apply_masks(params, stays))
  renewed = _renewed(state.inner, fresh, new)
  return erase(zeros, params, stays), masks, renewed


def _renewed(inner: Any, fresh: Any, new: Mapping[str, jax.Array]) -> Any:
  """An optimizer state in which new weights have no past."""
  leaves, structure = jax.tree.flatten(inner)
  names = masks_lib.mirrored(inner, new)
  renewed = (
    old if name is None else jnp.where(new[name], start, old).astype(old.dtype)
    for name, old, start in zip(
      names, leaves, jax.tree.leaves(fresh), strict=True
    )
  )
  return jax.tree.unflatten(structure, renewed)
