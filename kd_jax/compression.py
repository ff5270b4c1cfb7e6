"""A recipe of compression as data, and what it makes of one network.

Owns how the fields `prune` and `quantize` of a configuration's `compress`
become the parts of one train step, and the integers after it: dense -> prune ->
recover -> quantize -> freeze -> remove units -> fold -> convert. Nothing is
trained here, and what the network learns from is in `distillation`.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import optax

from kd_jax import adapters, deploy, prune, quantize
from kd_jax import rules as rules_lib
from kd_jax.parity import check_parity
from kd_jax.recipe_words import (
  OBSERVERS,
  SCORES,
  SPECS,
  WEIGHT_OBSERVERS,
  moment,
)
from kd_jax.types import Batch, StudentFn, Variables

_STRUCTURES = (
  "'weights', 'neurons', 'residual_blocks', 'channels', N:M such as '2:4', or "
  "blocks such as '8x128'"
)


class Phase(NamedTuple):
  """What happens in some of the steps.

  Attributes:
    name: 'dense', 'prune', 'recover', 'quantize' or 'freeze', or several of
      them joined by ' + '.
    begin: its first step.
    end: the step after its last one.
  """

  name: str
  begin: int
  end: int


class Converted(NamedTuple):
  """A network on integers.

  Attributes:
    variables: what `deploy.integer_forward` runs with.
    overrides: for `prune.resized`, of a network that lost units or blocks;
      else empty.
    folded: what was converted, for `parity.check_parity`.
  """

  variables: dict[str, Any]
  overrides: dict[str, Any]
  folded: dict[str, Any]


class Compression:
  """One network under a recipe.

  Args:
    recipe: with the fields `prune` and `quantize` of `configs/digits.py`.
    model: the linen module; it is not edited.
    variables: its trained variables, where compression starts.
    batch: pre-processed; its values are read where ranges are learned by
      gradients and where residual blocks leave, else only its shapes.
    steps: of training.
    epoch_steps: of one epoch.
    interceptors: others, which go first, such as `prune.resized(...)`.

  Raises:
    ValueError: for a word that a field does not know, or fields that do not go
      together.
  """

  def __init__(
    self,
    recipe: ml_collections.ConfigDict,
    model: adapters.LinenModule,
    variables: Variables,
    batch: Batch,
    *,
    steps: int,
    epoch_steps: int,
    interceptors: Sequence[adapters.Interceptor] = (),
  ):
    self.recipe, self.model = recipe, model
    self.steps = steps
    self._variables, self._batch = dict(variables), batch
    self._interceptors = tuple(interceptors)
    at = functools.partial(moment, steps=steps, epoch_steps=epoch_steps)
    p, q = recipe.prune, recipe.quantize
    self._prune = at(p.begin), at(p.end)
    self._quantize = at(q.begin), at(q.freeze)
    self._learned = rules_lib.choose('kind of ranges', q.ranges, _RANGES)
    self._check()

  def _check(self) -> None:
    p, q = self.recipe.prune, self.recipe.quantize
    rules_lib.choose('way to prune', p.method, _METHODS)
    if self._learned and self._quantize[0]:
      raise ValueError(
        f'quantize.ranges={q.ranges!r} learns from the first step on: '
        "quantize.begin must be '0%'."
      )
    if self._learned == 'lsq' and p.structure == 'neurons' and p.sparsity:
      raise ValueError(
        "quantize.ranges='lsq' gives every channel a step of its own, which "
        "cannot leave with it: prune.structure='neurons' needs other ranges."
      )
    if p.sparsity and p.method == 'gradual' and self._prune[0] >= self.steps:
      raise ValueError(f'prune.begin={p.begin!r} is not before the last step.')

  # --- what the fields say

  def rules(self, kind: str) -> list[tuple[str, Any]]:
    """The quantization rules of 'weights' or 'activations'."""
    named = [
      (pattern, rules_lib.choose(f'{kind} format', name, SPECS[kind]))
      for pattern, name in self.recipe.quantize[kind]
    ]
    if kind == 'activations' and self._learned:
      return self._signed(named)
    return named

  def _signed(self, named):
    """Learned ranges start at 0, where a layer's input is never negative."""
    return [
      (re.escape(layer), self._spec_of(named, layer, low))
      for layer, low in self._least_inputs.items()
    ]

  def _spec_of(self, named, layer, low):
    spec = rules_lib.first(named, layer)
    if spec is None or spec.symmetric or low >= 0:
      return spec
    if self._learned == 'pact':
      return None
    return SPECS['activations']['int8_symmetric']

  @functools.cached_property
  def _least_inputs(self) -> dict[str, float]:
    """layer -> the least value among its inputs in the batch."""
    stats = quantize.calibrate(
      deploy.evaluation(self.model, interceptors=self._interceptors),
      self._variables,
      [self._batch],
      deploy.ACTIVATION_RULES,
      observer=quantize.min_max(),
    )
    names, values = rules_lib.leaf_names(stats), jax.tree.leaves(stats)
    least: dict[str, float] = {}
    for name, value in zip(names, values):
      layer, _, which = name.rsplit('/', 2)
      if which == 'low':
        least[layer] = min(least.get(layer, 0.0), float(np.min(value)))
    return least

  @functools.cached_property
  def quantizes(self) -> dict[str, bool]:
    """Whether 'weights' and 'activations' are quantized at all."""
    return {
      kind: any(name != 'float' for _, name in self.recipe.quantize[kind])
      for kind in SPECS
    }

  def observer(self) -> quantize.Observer:
    """The observer of activations, as converted with."""
    if self._learned:
      return quantize.min_max()
    c = self.recipe.quantize
    return rules_lib.choose('observer', c.observer, OBSERVERS)(c)

  def weight_observer(self) -> quantize.Observer | None:
    """What chooses the ranges of weights; None for their extremes."""
    name = self.recipe.quantize.weight_observer
    return rules_lib.choose('weight observer', name, WEIGHT_OBSERVERS)()

  @functools.cached_property
  def plan(self) -> prune.Plan:
    """The units that can leave without changing what the others compute."""
    forward = adapters.from_linen(self.model, interceptors=self._interceptors)
    plan = prune.find_groups(
      forward, self._variables, self._batch, keep=self.recipe.prune.keep
    )
    exact = tuple(group for group in plan.groups if group.exact)
    if not exact:
      raise ValueError("prune.structure='neurons': no unit can leave exactly.")
    return plan._replace(groups=exact)

  @functools.cached_property
  def blocks(self) -> prune.ResidualBlocks:
    """The residual blocks that can leave whole."""
    blocks = prune.find_residual_blocks(
      adapters.from_linen(self.model, interceptors=self._interceptors),
      self._variables,
      self._batch,
      keep=self.recipe.prune.keep,
    )
    if len(blocks.names) < 2:
      raise ValueError(
        "prune.structure='residual_blocks' needs two blocks that could leave, "
        f'but the model has {len(blocks.names)}.'
      )
    return blocks

  def structure(self) -> prune.Structure:
    """Which weights are pruned together."""
    name = self.recipe.prune.structure
    if name == 'residual_blocks':
      return prune.residual_blocks(self.blocks)
    if name == 'weights':
      return prune.unstructured()
    if name == 'neurons':
      return prune.neurons(self.plan)
    if name == 'channels':
      return prune.channels()
    for pattern, made in (
      (r'(\d+):(\d+)', prune.n_m),
      (r'(\d+)x(\d+)', prune.block),
    ):
      if match := re.fullmatch(pattern, name):
        return made(int(match[1]), int(match[2]))
    raise ValueError(f'Unknown prune.structure {name!r}: use {_STRUCTURES}.')

  def schedule(self) -> Callable[[Any], jax.Array]:
    """The sparsity at every step."""
    p, (begin, end) = self.recipe.prune, self._prune
    shapes = {
      'cubic': functools.partial(
        prune.cubic, end=max(begin + 1, end), every=p.every
      ),
      'linear': functools.partial(
        prune.linear, end=max(begin + 1, end), every=p.every
      ),
      'once': prune.constant,
    }
    made = rules_lib.choose('sparsity schedule', p.schedule, shapes)
    return made(p.sparsity, begin=begin)

  def phases(self) -> list[Phase]:
    """What happens when, in order, from step 0 to the last."""
    p = self.recipe.prune
    spans = []
    if p.sparsity or p.method == 'preserve':
      begin, end = self._prune
      if p.method == 'preserve':
        begin, end = 0, 0
      if p.schedule == 'once':
        end = begin + 1
      spans += [('prune', begin, end), ('recover', end, self.steps)]
    if any(self.quantizes.values()):
      begin, freeze = self._quantize
      spans.append(('quantize', begin, freeze))
      spans.append(('freeze', freeze, self.steps))
      spans = [
        (name, a, min(b, begin) if name == 'recover' else b)
        for name, a, b in spans
      ]
    cuts = sorted(
      {0, self.steps, *(x for _, a, b in spans if a < b for x in (a, b))}
    )
    found = []
    for a, b in zip(cuts, cuts[1:]):
      names = [name for name, begin, end in spans if begin <= a < end]
      found.append(Phase(' + '.join(names) or 'dense', a, b))
    return found

  # --- the train step

  def make(
    self, *, taps: Sequence[str] = (), axis_name: str | None = None
  ) -> StudentFn:
    """The forward, with its activations rounded to their grids."""
    q, (begin, freeze) = self.recipe.quantize, self._quantize
    own: list[adapters.Interceptor] = []
    if self._freezes_norms:
      own.append(quantize.freeze_batch_norm(after=freeze))
    if self.quantizes['activations']:
      rules = self.rules('activations')
      if self._learned:
        own.append(quantize.learned_activations(rules, method=q.ranges))
      else:
        observer = self.observer()
        if freeze < self.steps:
          observer = quantize.freeze_observer(observer, after=max(freeze, 1))
        own.append(
          quantize.quantize_activations(
            rules, observer=observer, begin=begin, axis_name=axis_name
          )
        )
    return adapters.from_linen(
      self.model,
      taps=taps,
      interceptors=(*self._interceptors, *own),
      axis_name=axis_name,
    )

  @property
  def _freezes_norms(self) -> bool:
    quantized = any(self.quantizes.values())
    has_norms = bool(self._variables.get('batch_stats'))
    return quantized and has_norms and self._quantize[1] < self.steps

  def start(self) -> dict[str, Any]:
    """The variables before the first step."""
    variables = dict(self._variables)
    if self._freezes_norms:
      variables = quantize.init_batch_norm_steps(variables)
    if self.quantizes['activations']:
      rules, forward = self.rules('activations'), self.make()
      if self._learned:
        variables['params'] = quantize.init_learned_activations(
          forward, variables, self._batch, rules
        )
      else:
        variables['quant_stats'] = quantize.init_quant_stats(
          forward, variables, self._batch, rules
        )
    if self._learned == 'lsq' and self.quantizes['weights']:
      variables['params'] = quantize.init_lsq_params(
        variables['params'], self.rules('weights')
      )
    return variables

  def params_fn(self, params: Any, step: Any) -> Any:
    """The parameters that the forward sees at a step: masked, then rounded."""
    return self._rounded(self.masked(params, step), step)

  def masked(self, params: Any, step: Any) -> Any:
    """The parameters with what straight-through pruning masks at a step."""
    p = self.recipe.prune
    if p.method != 'straight_through' or not p.sparsity:
      return params
    score = rules_lib.choose('score', p.score, SCORES)()
    return prune.straight_through(
      self.schedule(),
      p.rules,
      score=score,
      scope=p.scope,
      structure=self.structure(),
    )(params, step)

  def _rounded(self, params, step):
    if not self.quantizes['weights']:
      return params
    rules = self.rules('weights')
    if self._learned == 'lsq':
      return quantize.lsq_params(params, rules)
    fake_quant = functools.partial(
      quantize.fake_quant_params, rules=rules, observer=self.weight_observer()
    )
    begin = self._quantize[0]
    if not begin:
      return fake_quant(params)
    return quantize.delayed(fake_quant, begin)(params, step)

  def wrap(self, tx: optax.GradientTransformation) -> Any:
    """The optimizer, pruning."""
    p = self.recipe.prune
    if p.method == 'preserve':
      return prune.preserve(tx, p.rules)
    if not p.sparsity or p.method == 'straight_through':
      return tx
    if p.method == 'sparse':
      return prune.sparse_train(
        tx,
        p.sparsity,
        p.rules,
        stop=self._prune[1],
        scope=p.scope,
        grow=p.grow,
        every=p.every,
      )
    return prune.prune(
      tx,
      self.schedule(),
      p.rules,
      score=rules_lib.choose('score', p.score, SCORES)(),
      scope=p.scope,
      structure=self.structure(),
      revive=p.revive,
    )

  # --- after training

  def finish(self, variables: Variables) -> dict[str, Any]:
    """What is saved of the trained variables: pruned weights are zero."""
    params = self.masked(variables['params'], self.steps)
    return {**variables, 'params': params}

  def simulated(self, variables: Variables) -> dict[str, Any]:
    """The variables that `make` runs with, rounded; from `finish`."""
    return {
      **variables,
      'params': self._rounded(variables['params'], self.steps),
    }

  def convert(self, variables: Variables) -> Converted:
    """Removes what was pruned as a whole, folds BatchNorm, makes integers.

    Args:
      variables: from `finish`.
    """
    variables, overrides = self._shrunk(dict(variables))
    rules = {kind: self.rules(kind) for kind in SPECS}
    if self._learned and self.quantizes['activations']:
      params, stats = quantize.learned_ranges(
        variables['params'], rules['activations']
      )
      variables |= {'params': params, 'quant_stats': stats}
    interceptors = self.interceptors(overrides)
    folded = deploy.fold(
      self.model, variables, self._batch, interceptors=interceptors
    )
    if not any(self.quantizes.values()):
      return Converted(folded, overrides, folded)
    integers = quantize.convert(
      folded,
      rules['weights'],
      rules['activations'],
      observer=self.observer(),
      weight_observer=self.weight_observer(),
    )
    return Converted(integers, overrides, folded)

  def interceptors(
    self, overrides: prune.Overrides
  ) -> tuple[adapters.Interceptor, ...]:
    """Those that a network needs which lost the units of `overrides`."""
    if self.recipe.prune.structure not in _LEAVING:
      return self._interceptors
    return (*self._interceptors, prune.resized(overrides))

  def integer_forward(
    self, overrides: prune.Overrides, **options: Any
  ) -> StudentFn:
    """The forward of `Converted`.

    Args:
      overrides: of it.
      **options: others of `deploy.integer_forward`.
    """
    return deploy.integer_forward(
      self.model,
      interceptors=self.interceptors(overrides),
      dynamic=self.rules('activations'),
      **options,
    )

  def parity(self, converted: Converted, batch: Batch) -> list[dict[str, Any]]:
    """Float, fake-quant and integers of every layer; see `check_parity`.

    Args:
      converted: the network.
      batch: pre-processed.

    Returns:
      A row for each layer, of JSON values; none where nothing is quantized.
    """
    if not any(self.quantizes.values()):
      return []
    report = check_parity(
      self.model,
      converted.folded,
      converted.variables,
      batch,
      weight_rules=self.rules('weights'),
      activation_rules=self.rules('activations'),
      observer=self.observer(),
      weight_observer=self.weight_observer(),
      interceptors=self.interceptors(converted.overrides),
    )
    # JSON has no infinity: equal outputs have no noise.
    infinite = (math.inf, -math.inf)
    return [
      {k: None if v in infinite else v for k, v in row.items()}
      for row in report.rows()
    ]

  def _shrunk(self, variables):
    p = self.recipe.prune
    if p.structure not in _LEAVING or not p.sparsity:
      return variables, {}
    params = variables['params']
    leaves = map(np.asarray, jax.tree.leaves(params))
    masks = {n: w != 0 for n, w in zip(rules_lib.leaf_names(params), leaves)}
    if p.structure == 'residual_blocks':
      gone = self.blocks.gone(masks)
      small = prune.without_blocks(self.blocks, variables, gone)
      return small, self.blocks.overrides(gone)
    kept = prune.kept_from_masks(self.plan, masks)
    small = prune.shrink(self.plan, variables, kept)
    return dict(small), self.plan.overrides(kept)


# Structures of which nothing is left at the end.
_LEAVING = ('neurons', 'residual_blocks')
_RANGES = {'observed': '', 'lsq': 'lsq', 'pact': 'pact'}
_METHODS = dict.fromkeys(('gradual', 'sparse', 'straight_through', 'preserve'))
