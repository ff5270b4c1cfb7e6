"""The search for residual blocks: modules that are the identity at zero.

Owns the trials that tell which modules of a model are such blocks, and why
others stay. What a block is, and what is done with it, is in `residual`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import rules as rules_lib
from kd_jax.prune.residual import ResidualBlocks
from kd_jax.prune.resize import resized
from kd_jax.prune.trace import output_of
from kd_jax.types import Batch, Variables


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
    Of the three blocks of a ResNet-8 two project their shortcuts:

    >>> from kd_jax import adapters, models
    >>> model = models.make_model('resnet', num_classes=3, depth=8, width=2)
    >>> batch = {'image': jax.random.normal(jax.random.key(0), (2, 8, 8, 1))}
    >>> variables = adapters.init_linen(model, jax.random.key(1), batch)
    >>> forward = adapters.from_linen(model)
    >>> find_residual_blocks(forward, variables, batch).names
    ('stage1_block1',)

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
    jax.eval_shape(lambda v, b: output_of(run, v, b), variables, batch)

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
      if shape != self.shapes[f'params/{path}/{name}']:
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
    return np.asarray(output_of(forward, variables, self.batch), np.float32)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  return {n: tuple(x.shape) for n, x in rules_lib.named_leaves(tree).items()}
