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

from kd_jax import rules as rules_lib
from kd_jax.prune import scopes, structures
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
  compute the same on the batch. Of a module that holds two or more blocks the
  blocks are found, else the module. A block with a projection on its shortcut
  changes shapes and stays.

  Args:
    forward: from `adapters.from_linen`; evaluation mode.
    variables: the model's variables.
    batch: one batch; its values count.
    keep: patterns of module paths; what they match does not leave, nor does
      what it is in.

  Returns:
    The blocks, plain data.

  Raises:
    ValueError: if the forward is not from `adapters.from_linen`, or a pattern
      of `keep` matches no module.

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
  if not hasattr(forward, 'intercepted'):
    raise ValueError(
      'find_residual_blocks: the forward is not from adapters.from_linen.'
    )
  search = _Search(forward.intercepted, dict(variables), dict(batch))
  patterns = [(pattern, True) for pattern in keep]
  kept = rules_lib.match(
    patterns, [*search.modules], kind='pattern of what to keep'
  )
  why = {name: search.reason(name, [*kept]) for name in search.candidates()}
  identities = [name for name, reason in why.items() if not reason]
  names = _innermost_of_several(identities)
  frozen = {
    name: reason
    for name, reason in why.items()
    if reason and not any(name.startswith(f'{outer}/') for outer in names)
  }
  return ResidualBlocks(tuple(names), frozen, search.shapes)


def _innermost_of_several(names: Sequence[str]) -> list[str]:
  """Without what lies in another, unless it is one of several in there."""
  found: list[str] = []
  outermost: list[str] = []
  for name in names:
    if any(name.startswith(f'{outer}/') for outer in outermost):
      continue
    outermost.append(name)
    inside = [other for other in names if other.startswith(f'{name}/')]
    inside = _innermost_of_several(inside)
    found += inside if len(inside) > 1 else [name]
  return found


class _Search:
  """The modules of one model, and what it computes without each."""

  def __init__(
    self,
    intercepted: Callable[..., Any],
    variables: dict[str, Any],
    batch: dict[str, Any],
  ) -> None:
    self.intercepted = intercepted
    self.variables, self.batch = variables, batch
    self.shapes = _shapes(variables)
    # path -> whether it could be a block, in the order of the calls.
    self.modules: dict[str, bool] = {}
    self.scanned: set[str] = set()
    run = intercepted(self._look)
    jax.eval_shape(lambda v, b: _output(run, v, b), variables, batch)

  def _look(
    self,
    next_fun: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    context: Any,
  ) -> Any:
    module = context.module
    if context.method_name != '__call__' or not module.path:
      return next_fun(*args, **kwargs)
    path = '/'.join(module.path)
    params = module.variables.get('params', {})
    holds = any(isinstance(p, Mapping) for p in params.values())
    # Noted before what is inside of it.
    self.modules.setdefault(path, holds)
    out = next_fun(*args, **kwargs)
    given, made = (getattr(x, 'shape', None) for x in ((*args, None)[0], out))
    self.modules[path] &= given is not None and given == made
    for name, shape in _shapes(params).items():
      if shape != self.shapes[f'{_PARAMS}{path}/{name}']:
        self.scanned.add(path)
    return out

  def candidates(self) -> list[str]:
    return [path for path, fits in self.modules.items() if fits]

  def reason(self, name: str, kept: Sequence[str]) -> str:
    """Why a module stays; '' if it can leave."""
    inside = [path for path in kept if path.startswith(f'{name}/')]
    if name in kept:
      return 'kept as asked'
    if inside:
      return f'it holds {inside[0]}, kept as asked'
    if name in self.scanned:
      return 'it is scanned'
    without = self._run(self.variables, resized({name: None}))
    if not np.allclose(self._filled(name, 0), without, rtol=1e-5, atol=1e-6):
      return 'at zero it does not return what it is given'
    if np.array_equal(self._filled(name, 0.5), without):
      return 'the output does not depend on it'
    return ''

  def _filled(self, name: str, value: float) -> np.ndarray:
    """The output with one value in all parameters of a module."""

    def fill(path, leaf):
      inside = rules_lib.path_name(path).startswith(f'{name}/')
      return jnp.full_like(leaf, value) if inside else leaf

    params = self.variables['params']
    params = jax.tree_util.tree_map_with_path(fill, params)
    return self._run({**self.variables, 'params': params})

  def _run(
    self, variables: dict[str, Any], *interceptors: Callable[..., Any]
  ) -> np.ndarray:
    # Not compiled as a whole: what differs between two calls is one module.
    forward = self.intercepted(*interceptors)
    return np.asarray(_output(forward, variables, self.batch), np.float32)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  return {n: tuple(x.shape) for n, x in rules_lib.named_leaves(tree).items()}


def _output(
  forward: Callable[..., Any], variables: dict[str, Any], batch: dict[str, Any]
) -> Any:
  out = forward(variables, batch)
  return getattr(out, 'output', out)


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
    found = mirrors(known, path)
    parts = path.split('/') if found is None else found.split('/')[1:]
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
      return None if leaves(path.lstrip('/')) else node
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
