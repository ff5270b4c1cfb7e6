"""Whole residual blocks: which can leave a model, and the model without them.

Owns the search for blocks, the structure that prunes them in training, and the
trees without them. Channels, heads and groups, which leave in part, are found
in `groups`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from kd_jax import rules as rules_lib
from kd_jax.prune import structures
from kd_jax.prune.resize import resized
from kd_jax.prune.shrink import mirrored_paths, mirrors
from kd_jax.types import Batch, TrainState, Variables

_PARAMS = 'params/'


class ResidualBlocks(NamedTuple):
  """The modules that can leave a model whole.

  Plain data: `json.dumps(blocks._asdict())` works.

  Attributes:
    names: '/'-joined paths of the modules, in the order of the computation.
    frozen: path -> why a module stays that also returns the shape it is given.
    shapes: path -> shape of every parameter and state of the model.
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


def find_residual_blocks(
  forward: Callable[..., Any],
  variables: Variables,
  batch: Batch,
  *,
  keep: Sequence[str] = (),
) -> ResidualBlocks:
  """Finds the modules that are the identity once their parameters are zero.

  Tried are the modules with modules inside that return an array of the shape
  they are given: with its parameters at zero, and without it, the model has to
  compute the same on the batch. Of modules within one another the outermost
  is found. A block with a projection on its shortcut changes shapes and stays.

  Args:
    forward: from `adapters.from_linen`; evaluation mode.
    variables: the model's variables.
    batch: one batch; its values count.
    keep: patterns of module paths; what they match does not leave.

  Returns:
    The blocks, plain data.

  Raises:
    ValueError: if the forward is not from `adapters.from_linen`, or a pattern
      of `keep` matches no module that could be tried.

  Example:
    >>> from kd_jax import adapters, models
    >>> model = models.make_model('resnet', num_classes=3, depth=14, width=4)
    >>> batch = {'image': jax.random.normal(jax.random.key(0), (2, 8, 8, 1))}
    >>> variables = model.init(jax.random.key(1), batch['image'])
    >>> forward = adapters.from_linen(model)
    >>> find_residual_blocks(forward, variables, batch).names
    ('stage1_block1', 'stage1_block2', 'stage2_block2', 'stage3_block2')

  References:
    Veit, Wilber, Belongie, "Residual Networks Behave Like Ensembles of
    Relatively Shallow Networks", 2016, arXiv:1605.06431.
  """
  intercepted = getattr(forward, 'intercepted', None)
  if intercepted is None:
    raise ValueError(
      'find_residual_blocks: the forward is not from adapters.from_linen.'
    )
  leaves = jax.tree.leaves(variables)
  shapes = {
    name: tuple(leaf.shape)
    for name, leaf in zip(rules_lib.leaf_names(variables), leaves)
  }
  tried, frozen = _candidates(intercepted, variables, batch, shapes)
  patterns = [(pattern, True) for pattern in keep]
  kept = rules_lib.match(
    patterns, [*tried, *frozen], kind='pattern of what to keep'
  )
  names: list[str] = []
  for name in tried:
    if any(name.startswith(f'{outer}/') for outer in names):
      continue
    if name in kept:
      frozen[name] = 'kept as asked'
    elif _is_identity(intercepted, variables, batch, name):
      names.append(name)
    else:
      frozen[name] = 'at zero it does not return what it is given'
  inside = tuple(f'{name}/' for name in names)
  frozen = {n: why for n, why in frozen.items() if not n.startswith(inside)}
  return ResidualBlocks(tuple(names), frozen, shapes)


def _candidates(intercepted, variables, batch, shapes):
  """Paths to try, outer ones first, and those of scanned modules -> why not."""
  tried: dict[str, bool] = {}
  frozen: dict[str, str] = {}

  def look(next_fun, args, kwargs, context):
    module = context.module
    if context.method_name != '__call__' or not module.path or not args:
      return next_fun(*args, **kwargs)
    path = '/'.join(module.path)
    params = module.variables.get('params', {})
    # Noted before what is inside of it; a dict keeps its order.
    tried.setdefault(path, any(isinstance(p, Mapping) for p in params.values()))
    out = next_fun(*args, **kwargs)
    shape = getattr(args[0], 'shape', None)
    tried[path] &= shape is not None and shape == getattr(out, 'shape', None)
    for name, leaf in traverse_util.flatten_dict(params, sep='/').items():
      if leaf.shape != shapes[f'{_PARAMS}{path}/{name}']:
        frozen[path] = 'it is scanned'
    return out

  run = intercepted(look)
  jax.eval_shape(lambda v, b: _output(run, v, b), dict(variables), dict(batch))
  chosen = [path for path, fits in tried.items() if fits]
  scanned = {path: frozen[path] for path in chosen if path in frozen}
  return [path for path in chosen if path not in scanned], scanned


def _is_identity(intercepted, variables, batch, name) -> bool:
  """Whether the model with a block at zero is the model without it."""

  def zero(path, leaf):
    inside = rules_lib.path_name(path).startswith(f'{name}/')
    return jnp.zeros_like(leaf) if inside else leaf

  params = jax.tree_util.tree_map_with_path(zero, variables['params'])
  # Not compiled as a whole: what differs between two calls is one module.
  masked = _output(intercepted(), {**variables, 'params': params}, batch)
  without = _output(intercepted(resized({name: None})), variables, batch)
  masked, without = (np.asarray(x, np.float32) for x in (masked, without))
  return np.allclose(masked, without, rtol=1e-5, atol=1e-6)


def _output(forward, variables, batch):
  out = forward(variables, batch)
  return getattr(out, 'output', out)


def residual_blocks(
  blocks: ResidualBlocks, *, pool: str = 'mean'
) -> structures.Structure:
  """The structure of pruning whole residual blocks, for `prune`.

  All parameters of a block are masked together, biases and scales of norms
  included, so that `without_blocks` can remove what training has put to zero.
  One block always stays.

  Args:
    blocks: from `find_residual_blocks`.
    pool: 'mean' or 'sum' of the scores of a block's weights.

  Returns:
    `structure(scores, sparsity, scope) -> masks`; `sparsity` is the share of
    blocks to prune, in one ranking whatever the scope is. Every parameter
    with scores and every one of a block gets a mask.

  Raises:
    ValueError: for an unknown pool, or without any block.

  Example:
    >>> shapes = {f'params/{name}/w': (2,) for name in 'abc'}
    >>> found = ResidualBlocks(('a', 'b', 'c'), {}, shapes)
    >>> scores = {f'{n}/w': jnp.ones(2) * i for i, n in enumerate('bac')}
    >>> masks = residual_blocks(found)(scores, 1 / 3, 'global')
    >>> {name: bool(mask.all()) for name, mask in sorted(masks.items())}
    {'a/w': True, 'b/w': False, 'c/w': True}
  """
  mean = rules_lib.choose('pool', pool, {'mean': True, 'sum': False})
  if not blocks.names:
    raise ValueError('residual_blocks: no block can leave the model.')
  members = [blocks.params(name) for name in blocks.names]

  def pooled(scores):
    totals = []
    for paths in members:
      scored = [scores[path] for path in paths if path in scores]
      total = sum((s.sum(dtype=jnp.float32) for s in scored), jnp.float32(0))
      count = sum(s.size for s in scored) if mean else 1
      totals.append(total / max(1, count))
    return {'blocks': jnp.stack(totals)}

  def expand(kept, scores):
    masks = {name: jnp.ones_like(s, jnp.bool_) for name, s in scores.items()}
    for i, paths in enumerate(members):
      for path in paths:
        whole = masks.get(path, jnp.ones(blocks.shapes[_PARAMS + path], bool))
        masks[path] = whole & kept['blocks'][i]
    return masks

  ranked = structures.units(pooled, expand)
  return lambda scores, sparsity, scope: ranked(scores, sparsity, 'global')


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

  def stays(path):
    found = mirrors(known, path)
    if found is None:  # of a collection that the model did not have
      return not any(f'/{name}/' in f'/{path}' for name in names)
    inside = found.split('/', 1)[-1]
    return not any(inside.startswith(f'{name}/') for name in names)

  def one(path, node):
    if not isinstance(node, Mapping):
      return node
    root = rules_lib.path_name(path)
    flat = traverse_util.flatten_dict(node, keep_empty_nodes=True)
    return traverse_util.unflatten_dict(
      {k: v for k, v in flat.items() if stays('/'.join((root, *k)))}
    )

  def of(tree):
    return jax.tree_util.tree_map_with_path(
      one, tree, is_leaf=lambda node: isinstance(node, Mapping)
    )

  if isinstance(tree, TrainState):
    return tree.replace(
      params=of(tree.params),
      model_state=of(tree.model_state),
      opt_state=of(tree.opt_state),
    )
  return of(tree)
