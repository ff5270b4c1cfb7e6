"""The state of the wrappers that prune: found, read, and put back.

Owns `PruneState` and what works on any optimizer's state that holds one. What
fills it is in `transform` and `sparse_training`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kd_jax.prune.masks import mirrored


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

  Example:
    >>> import optax
    >>> from kd_jax import prune
    >>> params = {'w': jnp.array([1.0, -3.0, 2.0, 4.0])}
    >>> tx = prune.prune(optax.sgd(0.1), lambda step: 0.5, [('w', True)])
    >>> _, state = tx.update(params, tx.init(params), params)
    >>> int(state.step), float(state.sparsity), state.masks['w'].tolist()
    (1, 0.5, [False, True, False, True])
  """

  step: jax.Array
  sparsity: jax.Array
  masks: dict[str, jax.Array]
  inner: Any
  score: Any = ()
  dense: Any = ()


def find_state(opt_state: Any) -> PruneState | None:
  """The state of `prune` inside any optimizer state; None without it.

  Args:
    opt_state: the state of an optax chain.

  Returns:
    The first `PruneState`, in the order of the tree.

  Example:
    >>> import optax
    >>> from kd_jax.prune import constant, prune
    >>> tx = prune(optax.sgd(0.1), constant(0.5), [('w', True)])
    >>> params = {'w': jnp.array([3.0, 1.0])}
    >>> opt_state = optax.chain(optax.identity(), tx).init(params)
    >>> float(find_state(opt_state).sparsity), find_state(())
    (0.0, None)
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

  Example:
    >>> import optax
    >>> from kd_jax.prune import constant, prune
    >>> tx = prune(optax.sgd(0.1), constant(0.5), [('w', True)])
    >>> params = {'w': jnp.array([3.0, 1.0])}
    >>> _, state = tx.update(params, tx.init(params), params)
    >>> masks_of(state)['w'].tolist()
    [True, False]
  """
  state = find_state(opt_state)
  return {} if state is None else state.masks


def _is_prune(node: Any) -> bool:
  return isinstance(node, PruneState)


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
    Frankle, Carbin, "The Lottery Ticket Hypothesis", 2018, arXiv:1803.03635;
    Frankle et al., 2019, arXiv:1912.05671 (rewinding to a later step).
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
  found = mirrored(tree, masks, is_leaf=_is_prune)
  leaves, structure = jax.tree.flatten(tree, is_leaf=_is_prune)
  masked = (
    leaf if name is None else jnp.where(masks[name], leaf, 0)
    for name, leaf in zip(found, leaves, strict=True)
  )
  return jax.tree.unflatten(structure, masked)
