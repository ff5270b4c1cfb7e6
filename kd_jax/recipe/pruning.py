"""The field `prune` of a recipe, and what it makes of a network.

Owns the structures, schedules and wrappers that its words stand for, and the
removal of what was pruned as a whole. How pruning goes together with
quantization is `compression`.
"""

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

from kd_jax import adapters, prune
from kd_jax import rules as rules_lib
from kd_jax.recipe.words import SCORES, Training, Uncompressed
from kd_jax.types import Variables

_STRUCTURES = (
  "'weights', 'neurons', 'residual_blocks', 'channels', N:M such as '2:4', or "
  "blocks such as '8x128'"
)
_NAMED = ('weights', 'neurons', 'residual_blocks', 'channels')
_PATTERNS = ((r'(\d+):(\d+)', prune.n_m), (r'(\d+)x(\d+)', prune.block))
_METHODS = ('gradual', 'sparse', 'straight_through', 'preserve')
# field -> what it may say.
_WORDS: dict[str, Iterable[str]] = {
  'method': _METHODS,
  'score': SCORES,
  'scope': ('global', 'layer', 'erk'),
  'schedule': ('cubic', 'linear', 'once'),
  'revive': ('never', 'gradient'),
  'grow': ('gradient', 'random'),
}


class Pruning:
  """What one network loses, and when.

  Attributes:
    begin: the first step that prunes.
    end: the step at which the sparsity is reached.
    removes: whether what is pruned leaves the arrays at the end.

  Args:
    recipe: the field `prune` of `kd_jax.defaults`.
    network: what is pruned.
    training: in which it is.

  Raises:
    ValueError: for a word that a field does not know, a begin after the end or
      the last step, or more sparsity than N:M has.
  """

  def __init__(
    self,
    recipe: ml_collections.ConfigDict,
    network: Uncompressed,
    training: Training,
  ):
    self.recipe, self._network = recipe, network
    self.begin = training.at(recipe.begin, 'prune.begin')
    self.end = training.at(recipe.end, 'prune.end')
    self._last = training.steps - 1
    for field, words in _WORDS.items():
      known = dict.fromkeys(words)
      rules_lib.choose(f'prune.{field}', recipe[field], known)
    if recipe.structure not in _NAMED:
      _by_numbers(recipe.structure)
    if match := re.fullmatch(r'(\d+):(\d+)', recipe.structure):
      most = 1 - int(match[1]) / int(match[2])
      if recipe.sparsity > most:
        raise ValueError(
          f'prune.structure={recipe.structure!r} prunes a share of {most:g}: '
          f'prune.sparsity={recipe.sparsity:g} is more.'
        )
    late = self.begin >= training.steps
    waits = recipe.method in ('gradual', 'straight_through')
    if recipe.sparsity and waits and late:
      raise ValueError(
        f'prune.begin={recipe.begin!r} is not before the last step.'
      )
    gradual = waits and recipe.schedule != 'once'
    if recipe.sparsity and gradual and self.end < self.begin:
      raise ValueError(
        f'prune.end={recipe.end!r} is before prune.begin={recipe.begin!r}.'
      )
    if recipe.sparsity and recipe.method == 'sparse' and self.begin:
      raise ValueError(
        f"prune.method='sparse' is sparse from the first step: prune.begin "
        f"must be '0%', not {recipe.begin!r}."
      )
    if (
      recipe.method in ('sparse', 'preserve') and recipe.structure != 'weights'
    ):
      raise ValueError(
        f'prune.method={recipe.method!r} is for single weights: '
        f"prune.structure must be 'weights', not {recipe.structure!r}."
      )
    whole = recipe.structure in ('neurons', 'residual_blocks')
    self.removes = bool(whole and recipe.sparsity)

  def _find(self, find: Callable[..., Any]) -> Any:
    network = self._network
    forward = adapters.from_linen(
      network.model, interceptors=network.interceptors
    )
    return find(
      forward, network.variables, network.batch, keep=self.recipe.keep
    )

  @functools.cached_property
  def plan(self) -> prune.Plan:
    """The units that can leave without changing what the others compute.

    Raises:
      ValueError: if no unit can leave exactly.
    """
    plan = self._find(prune.find_groups)
    exact = tuple(group for group in plan.groups if group.exact)
    if not exact:
      raise ValueError("prune.structure='neurons': no unit can leave exactly.")
    return plan._replace(groups=exact)

  @functools.cached_property
  def blocks(self) -> prune.ResidualBlocks:
    """The residual blocks that can leave whole."""
    # Straight-through masks ask while a step is traced.
    with jax.ensure_compile_time_eval():
      return self._find(prune.find_residual_blocks)

  def structure(self) -> prune.Structure:
    """Which weights are pruned together."""
    name = self.recipe.structure
    made: dict[str, Callable[[], prune.Structure]] = {
      'weights': prune.unstructured,
      'neurons': lambda: prune.neurons(self.plan),
      'residual_blocks': lambda: prune.residual_blocks(self.blocks),
      'channels': prune.channels,
    }
    if name in made:
      return made[name]()
    return _by_numbers(name)

  def schedule(self) -> Callable[[Any], jax.Array]:
    """The sparsity at every step."""
    # '100%' is the step after the last one.
    r, end = self.recipe, max(self.begin + 1, min(self.end, self._last))
    shapes: dict[str, Callable[..., Callable[[Any], jax.Array]]] = {
      'cubic': functools.partial(prune.cubic, end=end, every=r.every),
      'linear': functools.partial(prune.linear, end=end, every=r.every),
      'once': prune.constant,
    }
    return shapes[r.schedule](r.sparsity, begin=self.begin)

  def span(self) -> tuple[int, int] | None:
    """The first step that changes masks and the first after them, or None."""
    if self.recipe.method == 'preserve':
      return 0, 0
    if not self.recipe.sparsity:
      return None
    once = self.recipe.schedule == 'once' and self.recipe.method != 'sparse'
    return self.begin, self.begin + 1 if once else self.end

  def masked(self, params: Any, step: Any) -> Any:
    """The parameters with what straight-through pruning masks at a step."""
    r = self.recipe
    if r.method != 'straight_through' or not r.sparsity:
      return params
    return prune.straight_through(
      self.schedule(),
      r.rules,
      score=self._score(),
      scope=r.scope,
      structure=self.structure(),
    )(params, step)

  def _score(self) -> prune.Score:
    return SCORES[self.recipe.score]()

  def wrap(self, tx: optax.GradientTransformation) -> Any:
    """The optimizer, pruning."""
    r = self.recipe
    if r.method == 'preserve':
      return prune.preserve(tx, r.rules)
    if not r.sparsity or r.method == 'straight_through':
      return tx
    if r.method == 'sparse':
      return prune.sparse_train(
        tx,
        r.sparsity,
        r.rules,
        stop=self.end,
        scope=r.scope,
        grow=r.grow,
        every=r.every,
      )
    return prune.prune(
      tx,
      self.schedule(),
      r.rules,
      score=self._score(),
      scope=r.scope,
      structure=self.structure(),
      revive=r.revive,
    )

  def remove(
    self, variables: Variables
  ) -> tuple[dict[str, Any], prune.Overrides]:
    """Takes away what training has put to zero as a whole.

    Args:
      variables: trained, pruned weights zero.

    Returns:
      The smaller variables, and what `prune.resized` runs them with.
    """
    variables = dict(variables)
    if not self.removes:
      return variables, {}
    leaves = rules_lib.named_leaves(variables['params'])
    masks = {name: np.asarray(leaf) != 0 for name, leaf in leaves.items()}
    if self.recipe.structure == 'residual_blocks':
      gone = self.blocks.gone(masks)
      small = prune.without_blocks(self.blocks, variables, gone)
      return small, self.blocks.overrides(gone)
    kept = prune.kept_from_masks(self.plan, masks)
    small = prune.shrink(self.plan, variables, kept)
    return small, self.plan.overrides(kept)


def _by_numbers(name: str) -> prune.Structure:
  """N:M or blocks, by their numbers."""
  for pattern, structure in _PATTERNS:
    if match := re.fullmatch(pattern, name):
      return structure(int(match[1]), int(match[2]))
  raise ValueError(f'Unknown prune.structure {name!r}: use {_STRUCTURES}.')
