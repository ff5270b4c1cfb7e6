"""Whole residual blocks: pruned in training, and the trees without them.

Owns what is known of a model's blocks, the structure that prunes them, and
their removal. Which blocks a model has is found in `residual_search`; channels,
heads and groups, which leave in part, in `groups`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import rules as rules_lib
from kd_jax.prune import scopes, structures
from kd_jax.prune.shrink import mirrored_paths
from kd_jax.types import TrainState

_PARAMS = 'params/'


class ResidualBlocks(NamedTuple):
  """The modules that can leave a model whole.

  Plain data: `json.dumps(blocks._asdict())` works.

  Attributes:
    names: '/'-joined paths of the modules, in the order of the computation.
    frozen: path -> why a module stays that also returns the shape it is given.
    shapes: path -> shape of every parameter and state of the model.

  Example:
    >>> shapes = {'params/block/kernel': (2, 3), 'params/head/kernel': (3, 1)}
    >>> blocks = ResidualBlocks(('block',), {}, shapes)
    >>> blocks.params('block'), blocks.size('block')
    (['block/kernel'], 6)
    >>> blocks.gone({'block/kernel': np.zeros((2, 3), bool)})
    ['block']
  """

  names: tuple[str, ...]
  frozen: Mapping[str, str]
  shapes: Mapping[str, tuple[int, ...]]

  def __str__(self) -> str:
    lines = [f'{name}  {self.size(name):,} parameters' for name in self.names]
    lines += [f'{name} stays: {why}' for name, why in self.frozen.items()]
    return '\n'.join(lines)

  def params(self, name: str) -> list[str]:
    """Paths of a block's parameters, without the collection."""
    rules_lib.choose('residual block', name, dict.fromkeys(self.names))
    inside = f'{_PARAMS}{name}/'
    return [
      path.removeprefix(_PARAMS)
      for path in self.shapes
      if path.startswith(inside)
    ]

  def size(self, name: str) -> int:
    """Number of a block's parameters."""
    shapes = (self.shapes[_PARAMS + path] for path in self.params(name))
    return sum(int(np.prod(shape)) for shape in shapes)

  def gone(self, masks: Mapping[str, Any]) -> list[str]:
    """The blocks of which masks leave nothing.

    Args:
      masks: parameter path, without the collection -> mask, True where kept,
        as of `masks_from` or `masks_of`. A parameter without one is kept.
    """

    def is_gone(path):
      return path in masks and not np.any(np.asarray(masks[path]))

    return [n for n in self.names if all(map(is_gone, self.params(n)))]

  def overrides(self, gone: Sequence[str]) -> dict[str, None]:
    """What `prune.resized` needs to run a linen model without some blocks."""
    return {name: None for name in gone if self.params(name)}


def residual_blocks(
  blocks: ResidualBlocks, *, pool: str = 'mean'
) -> structures.Structure:
  """The structure of pruning whole residual blocks, for `prune`.

  All parameters of a block are masked together, biases and scales of norms
  included, so that `without_blocks` can remove what training has put to zero.
  One block always stays. Under fake-quant the additions of a block at zero
  still round what passes; they are gone with the block.

  Args:
    blocks: from `find_residual_blocks`.
    pool: 'mean' or 'sum' of the scores of a block's weights.

  Returns:
    `structure(scores, sparsity, scope) -> masks`; `sparsity` is the share of
    blocks to prune, in one ranking whatever the scope is. A block without any
    scores stays and is not counted. Every parameter with scores and every one
    of a block gets a mask.

  Raises:
    ValueError: for an unknown pool, or with fewer than two blocks.

  Example:
    >>> shapes = {f'params/{name}/w': (2,) for name in 'abc'}
    >>> found = ResidualBlocks(('a', 'b', 'c'), {}, shapes)
    >>> scores = {f'{n}/w': jnp.ones(2) * i for i, n in enumerate('bac')}
    >>> masks = residual_blocks(found)(scores, 1 / 3, 'global')
    >>> {name: bool(mask.all()) for name, mask in sorted(masks.items())}
    {'a/w': True, 'b/w': False, 'c/w': True}
  """
  mean = rules_lib.choose('pool', pool, {'mean': True, 'sum': False})
  if len(blocks.names) < 2:
    raise ValueError(
      'residual_blocks: one block always stays, so two are needed that could '
      f'leave; the model has {", ".join(blocks.names) or "none"}.'
    )
  members = [blocks.params(name) for name in blocks.names]

  def scored(scores):
    return [paths for paths in members if not scores.keys().isdisjoint(paths)]

  def pooled(scores):
    totals = []
    for paths in scored(scores):
      own = [scores[path] for path in paths if path in scores]
      total = sum(jnp.sum(s, dtype=jnp.float32) for s in own)
      totals.append(total / (sum(s.size for s in own) if mean else 1))
    return {'blocks': jnp.stack(totals)} if totals else {}

  def expand(kept, scores):
    masks = {name: jnp.ones_like(s, jnp.bool_) for name, s in scores.items()}
    for i, paths in enumerate(scored(scores)):
      for path in paths:
        whole = masks.get(path, jnp.ones(blocks.shapes[_PARAMS + path], bool))
        masks[path] = whole & kept['blocks'][i]
    return masks

  ranked = structures.units(pooled, expand)

  def structure(scores, sparsity, scope):
    scopes.resolve(scope)
    return ranked(scores, sparsity, 'global')

  return structure


def without_blocks(
  blocks: ResidualBlocks, tree: Any, gone: Sequence[str]
) -> Any:
  """Removes blocks from a tree of dicts that mirrors the parameters.

  Args:
    blocks: from `find_residual_blocks`.
    tree: parameters, variables, an optimizer's state, masks, or a
      `TrainState`, of which the teacher and the objective stay.
    gone: names of the blocks that leave.

  Returns:
    The same tree without the entries of these blocks. It runs under
    `prune.resized(blocks.overrides(gone))`.

  Raises:
    ValueError: for an unknown block.

  Example:
    >>> found = ResidualBlocks(('a',), {}, {'params/a/w': (1,)})
    >>> without_blocks(found, {'params': {'a': {'w': 1.0}, 'b': 2.0}}, ['a'])
    {'params': {'b': 2.0}}
  """
  names = tuple(blocks.overrides(gone))
  known = mirrored_paths(blocks.shapes)
  tops = {path.split('/')[1] for path in blocks.shapes if '/' in path}

  def leaves(path):
    end = rules_lib.mirrored(path, known.__contains__)
    parts = path.split('/') if end is None else known[end].split('/')[1:]
    # Of a collection that the model did not have: from its first module on.
    while parts and parts[0] not in tops:
      parts.pop(0)
    return '/'.join(parts).startswith(tuple(f'{name}/' for name in names))

  def of(node, path=''):
    """The node without what leaves, or None if nothing of it is left."""
    like = type(node)
    if isinstance(node, Mapping):
      kept = {k: of(v, f'{path}/{k}') for k, v in node.items()}
      kept = {k: v for k, v in kept.items() if v is not None or node[k] is None}
      return like(kept) if kept or not node else None
    children, structure = jax.tree_util.tree_flatten_with_path(
      node, is_leaf=lambda child: child is not node
    )
    if children and not children[0][0]:
      return None if leaves(path) else node
    made = [
      of(child, f'{path}/{rules_lib.path_name(key)}') for key, child in children
    ]
    # Tuples keep their length: what is empty in one stays as an empty dict.
    emptied = [
      m is None and child is not None
      for m, (_, child) in zip(made, children, strict=True)
    ]
    new = [{} if e else m for e, m in zip(emptied, made, strict=True)]
    return jax.tree.unflatten(structure, new)

  if isinstance(tree, TrainState):
    return tree.replace(
      params=of(tree.params),
      model_state=of(tree.model_state),
      opt_state=of(tree.opt_state),
    )
  return of(tree)
