"""Pruning as an optax wrapper: pruned weights are exactly zero after a step.

Owns `prune`, its state, and what reads or resets that state; which weights go
is decided by `scores` and `structures`. The wrapper replaces the updates of
pruned weights by -w, so that `optax.apply_updates` yields
mask * (params + updates): neither momentum nor weight decay revives a weight.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kd_jax import rules as rules_lib
from kd_jax.prune import masks as masks_lib
from kd_jax.prune import scopes
from kd_jax.prune.schedules import SparsitySchedule
from kd_jax.prune.scores import Score, magnitude
from kd_jax.prune.structures import Structure, unstructured


class PruneState(NamedTuple):
  """State of `prune`, of `preserve` and of `sparse_train`.

  Attributes:
    step: int32 scalar, number of updates so far.
    sparsity: float32 scalar, the target that the masks were made for.
    masks: parameter path -> boolean mask, True where kept.
    inner: state of the wrapped optimizer.
    score: memory of the score.
    dense: parameter path -> weights before masking, with
      `revive='gradient'`; else empty. Those of kept weights are not read.
  """

  step: jax.Array
  sparsity: jax.Array
  masks: dict[str, jax.Array]
  inner: Any
  score: Any = ()
  dense: Any = ()


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
    ValueError: for an unknown scope or way to revive; in `init`, for a rule
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
  tx = optax.with_extra_args_support(tx)
  score = magnitude() if score is None else score
  scope = scopes.resolve(scope)
  structure = unstructured() if structure is None else structure
  revives = rules_lib.choose(
    'way to revive', revive, {'never': False, 'gradient': True}
  )

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
      unknown = any_nan(scores)
      if not revives:
        scores = {
          n: jnp.where(state.masks[n], s, -jnp.inf) if n in state.masks else s
          for n, s in scores.items()
        }
      masks = structure(scores, target, scope)
      masks = {
        n: masks_lib.placed_like(masks[n], m) if revives else masks[n] & m
        for n, m in state.masks.items()
      }
      masks = {
        n: jnp.where(unknown, m, masks[n]) for n, m in state.masks.items()
      }
      return masks, jnp.where(unknown, state.sparsity, target)

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


def any_nan(arrays: Mapping[str, jax.Array]) -> jax.Array:
  """Whether any entry of any array is NaN, as a boolean scalar."""
  return jnp.any(jnp.stack([jnp.any(jnp.isnan(a)) for a in arrays.values()]))


def _map(fn: Callable[..., jax.Array], tree: Any, *others: Any) -> Any:
  """`jax.tree.map` with the path of every leaf as first argument."""
  names = rules_lib.leaf_names(tree)
  leaves, structure = jax.tree.flatten(tree)
  new = map(fn, names, leaves, *map(jax.tree.leaves, others))
  return jax.tree.unflatten(structure, new)


def _unmasked(
  params: Any, masks: Mapping[str, jax.Array], dense: Mapping[str, jax.Array]
) -> Any:
  return _map(
    lambda n, p: jnp.where(masks[n], p, dense[n]) if n in masks else p, params
  )


def _revived(
  updates: Any,
  params: Any,
  masks: Mapping[str, jax.Array],
  dense: Mapping[str, jax.Array],
) -> Any:
  """Updates that bring back a weight, now 0, with the value it grew to."""
  return _map(
    lambda n, u, p: jnp.where(masks[n], u, dense[n] - p) if n in masks else u,
    updates,
    params,
  )


def erase(updates: Any, params: Any, masks: Mapping[str, jax.Array]) -> Any:
  """Updates that set pruned weights to exactly zero.

  Args:
    updates: a tree like `params`.
    params: the parameters that they will be applied to.
    masks: parameter path -> mask.

  Returns:
    The updates, with -w at every pruned weight w.
  """
  return _map(
    lambda n, u, p: jnp.where(masks[n], u, -p) if n in masks else u,
    updates,
    params,
  )


def _is_prune(node: Any) -> bool:
  return isinstance(node, PruneState)


def find_state(opt_state: Any) -> PruneState | None:
  """The state of `prune` inside any optimizer state; None without it.

  Args:
    opt_state: the state of an optax chain.
  """
  for leaf in jax.tree.leaves(opt_state, is_leaf=_is_prune):
    if _is_prune(leaf):
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


def rewind(trained: Any, initial: Any, masks: Mapping[str, jax.Array]) -> Any:
  """Weights back to their early values, masks kept: a lottery ticket.

  Args:
    trained: the parameters after training, or a state that holds them, such as
      `(params, opt_state)` or a `TrainState`.
    initial: the same tree as it was early in training (at its start, or some
      steps later, which large networks need).
    masks: parameter path -> mask, True where kept.

  Returns:
    `initial`, with pruned weights set to zero in every leaf that mirrors a
    masked parameter: the parameters, momentum, averages. States of `prune`
    keep the step, and so the place in the schedule, and the sparsity of
    `trained`, and get `masks`.

  Raises:
    ValueError: if the two trees differ in structure.

  Example:
    Three rounds that each prune half of what is left:

    >>> from kd_jax.prune import magnitude_masks
    >>> rules = [('w', True)]
    >>> initial = {'w': jnp.array([0.5, -1.0, 2.0, 0.1])}
    >>> train = lambda params: {'w': 2 * params['w']}
    >>> params = initial
    >>> for sparsity in (0.25, 0.5, 0.75):
    ...   params = train(params)
    ...   masks = magnitude_masks(params, sparsity, rules)
    ...   params = rewind(params, initial, masks)
    >>> params['w'].tolist()
    [0.0, 0.0, 2.0, 0.0]

  References:
    Frankle, Carbin, "The Lottery Ticket Hypothesis", 2019, arXiv:1803.03635;
    Frankle et al., 2020, arXiv:1912.05671 (rewinding to a later step).
  """
  after = [jax.tree.structure(trained)]
  before = [jax.tree.structure(initial)]
  if after != before:
    raise ValueError(
      f'rewind: the trees differ: {after[0]} after training, {before[0]} '
      'before.'
    )

  def one(after, before):
    if _is_prune(before):
      inner = _mask_mirrored(before.inner, masks)
      return before._replace(
        step=after.step, sparsity=after.sparsity, masks=dict(masks), inner=inner
      )
    return before

  tree = jax.tree.map(one, trained, initial, is_leaf=_is_prune)
  return _mask_mirrored(tree, masks)


def _mask_mirrored(tree: Any, masks: Mapping[str, jax.Array]) -> Any:
  """Masks every leaf that mirrors a masked parameter, outside of `prune`."""
  found = masks_lib.mirrored(tree, masks, is_leaf=_is_prune)
  leaves, structure = jax.tree.flatten(tree, is_leaf=_is_prune)
  masked = (
    leaf if name is None else jnp.where(masks[name], leaf, 0)
    for name, leaf in zip(found, leaves, strict=True)
  )
  return jax.tree.unflatten(structure, masked)


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
      nothing and for shapes that the structure cannot divide.

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
    scores = score.value(score.init(weights), weights)
    masks = structure(scores, jnp.float32(schedule(step)), scope)
    masked = masks_lib.apply_masks(fixed, masks)
    # p + (mask * p - p) is exactly mask * p, and its gradient that of p.
    return _map(
      lambda n, p, m, f: p + (m - f) if n in masks else p, params, masked, fixed
    )

  return params_fn
