"""The field `quantize` of a recipe, and what it makes of a network.

Owns the rules, observers and interceptors that its words stand for, fake-quant
of weights at a step, and the integers at the end. How quantization goes
together with pruning is `compression`.
"""

import functools
import re
from typing import Any

import ml_collections
import numpy as np

from kd_jax import adapters, deploy, quantize
from kd_jax import rules as rules_lib
from kd_jax.recipe.words import (
  OBSERVERS,
  SPECS,
  WEIGHT_OBSERVERS,
  Training,
  Uncompressed,
)
from kd_jax.types import StudentFn, Variables

_RANGES = {'observed': '', 'lsq': 'lsq', 'pact': 'pact'}


class Quantization:
  """The grids of one network, and when they are used.

  Attributes:
    begin: the first step that rounds.
    freeze: the step from which ranges and BatchNorm's statistics stay.
    learned: '' for ranges that are observed, or 'lsq' or 'pact'.

  Args:
    recipe: the field `quantize` of `kd_jax.defaults`.
    network: what is quantized.
    training: in which it is.

  Raises:
    ValueError: for a word that a field does not know, or learned ranges that
      begin later than training.
  """

  def __init__(
    self,
    recipe: ml_collections.ConfigDict,
    network: Uncompressed,
    training: Training,
  ):
    self.recipe, self._network, self._training = recipe, network, training
    self.begin = training.at(recipe.begin, 'quantize.begin')
    self.freeze = training.at(recipe.freeze, 'quantize.freeze')
    self.learned = rules_lib.choose('quantize.ranges', recipe.ranges, _RANGES)
    for kind, specs in SPECS.items():
      rules_lib.check_pairs(recipe[kind], f'rule of quantize.{kind}')
      for _, name in recipe[kind]:
        rules_lib.choose(f'quantize.{kind}', name, specs)
    self._observer = rules_lib.choose(
      'quantize.observer', recipe.observer, OBSERVERS
    )
    self._weight_observer = rules_lib.choose(
      'quantize.weight_observer', recipe.weight_observer, WEIGHT_OBSERVERS
    )
    if self.learned and self.begin:
      raise ValueError(
        f'quantize.ranges={recipe.ranges!r} learns from the first step on: '
        "quantize.begin must be '0%'."
      )
    dynamic = [n for _, n in recipe.activations if n.endswith('dynamic')]
    if dynamic and self.begin:
      raise ValueError(
        f'quantize.activations={dynamic[0]!r} rounds from the first step on: '
        "quantize.begin must be '0%'."
      )

  def rounds(self, kind: str) -> bool:
    """Whether 'weights' or 'activations' are quantized at all."""
    return any(name != 'float' for _, name in self.recipe[kind])

  @property
  def anything(self) -> bool:
    """Whether there is anything to quantize."""
    return any(map(self.rounds, SPECS))

  def rules(self, kind: str) -> list[tuple[str, Any]]:
    """The quantization rules of 'weights' or 'activations'."""
    named = [
      (pattern, SPECS[kind][name]) for pattern, name in self.recipe[kind]
    ]
    if kind == 'activations' and self.learned:
      return self._signed(named)
    return named

  def _signed(
    self, named: rules_lib.Rules[quantize.QuantSpec]
  ) -> list[tuple[str, quantize.QuantSpec | None]]:
    """Learned ranges start at 0, where a layer's input is never negative."""
    return [
      (re.escape(layer), self._spec_of(named, layer, low))
      for layer, low in self._least_inputs.items()
    ]

  def _spec_of(
    self, named: rules_lib.Rules[quantize.QuantSpec], layer: str, low: float
  ) -> quantize.QuantSpec | None:
    spec = rules_lib.first(named, layer)
    if spec is None or spec.symmetric or low >= 0:
      return spec
    if self.learned == 'pact':
      return None
    return SPECS['activations']['int8_symmetric']

  @functools.cached_property
  def _least_inputs(self) -> dict[str, float]:
    """layer -> the least value among its inputs in the batch."""
    network = self._network
    stats = quantize.calibrate(
      deploy.evaluation(network.model, interceptors=network.interceptors),
      network.variables,
      [network.batch],
      deploy.ACTIVATION_RULES,
      observer=quantize.min_max(),
    )
    least: dict[str, float] = {}
    for name, value in rules_lib.named_leaves(stats).items():
      layer, _, which = name.rsplit('/', 2)
      if which == 'low':
        least[layer] = min(least.get(layer, 0.0), float(np.min(value)))
    return least

  def observer(self) -> quantize.Observer:
    """The observer of activations, as converted with."""
    if self.learned:
      return quantize.min_max()
    return self._observer(self.recipe)

  def weight_observer(self) -> quantize.Observer | None:
    """What chooses the ranges of weights; None for their extremes."""
    return self._weight_observer()

  def interceptors(
    self, axis_name: str | None = None
  ) -> list[adapters.Interceptor]:
    """Those of the train step: frozen norms, then rounded activations."""
    found: list[adapters.Interceptor] = []
    # Observers and norms count forwards, not steps.
    forwards = self._training.accumulate
    if self._freezes_norms:
      found.append(quantize.freeze_batch_norm(after=self.freeze * forwards))
    if not self.rounds('activations'):
      return found
    rules = self.rules('activations')
    if self.learned:
      method = self.recipe.ranges
      return [*found, quantize.learned_activations(rules, method=method)]
    observer = self.observer()
    if self.freeze < self._training.steps:
      after = max(self.freeze * forwards, 1)
      observer = quantize.freeze_observer(observer, after=after)
    return [
      *found,
      quantize.quantize_activations(
        rules,
        observer=observer,
        begin=self.begin * forwards,
        axis_name=axis_name,
      ),
    ]

  @property
  def _freezes_norms(self) -> bool:
    has_norms = bool(self._network.variables.get('batch_stats'))
    return self.anything and has_norms and self.freeze < self._training.steps

  def start(self, forward: StudentFn) -> dict[str, Any]:
    """The variables before the first step, of the forward of training."""
    variables = dict(self._network.variables)
    if self._freezes_norms:
      variables = quantize.init_batch_norm_steps(variables)
    if self.rounds('activations'):
      rules = self.rules('activations')
      if self.learned:
        variables['params'] = quantize.init_learned_activations(
          forward, variables, self._network.batch, rules
        )
      else:
        variables['quant_stats'] = quantize.init_quant_stats(
          forward, variables, self._network.batch, rules
        )
    if self.learned == 'lsq' and self.rounds('weights'):
      variables['params'] = quantize.init_lsq_params(
        variables['params'], self.rules('weights')
      )
    return variables

  def rounded(self, params: Any, step: Any) -> Any:
    """The parameters on their grids, from step `begin` on."""
    if not self.rounds('weights'):
      return params
    rules = self.rules('weights')
    if self.learned == 'lsq':
      return quantize.lsq_params(params, rules)
    fake_quant = functools.partial(
      quantize.fake_quant_params, rules=rules, observer=self.weight_observer()
    )
    if not self.begin:
      return fake_quant(params)
    return quantize.delayed(fake_quant, self.begin)(params, step)

  def with_ranges(self, variables: Variables) -> dict[str, Any]:
    """Trained variables whose learned ranges are where observed ones are."""
    if not self.learned or not self.rounds('activations'):
      return dict(variables)
    params, stats = quantize.learned_ranges(
      variables['params'], self.rules('activations')
    )
    return {**variables, 'params': params, 'quant_stats': stats}

  def settings(self, params: Any = None) -> dict[str, Any]:
    """Rules and observers, as `parity.check_parity` names them.

    Args:
      params: of a network that may have lost modules: rules that were for
        these alone are left out. None for all rules.
    """
    weights = self.rules('weights')
    if params is not None:
      names = rules_lib.leaf_names(params)
      weights = [
        rule
        for rule in weights
        if any(re.fullmatch(rule[0], name) for name in names)
      ]
    return {
      'weight_rules': weights,
      'activation_rules': self.rules('activations'),
      'observer': self.observer(),
      'weight_observer': self.weight_observer(),
    }

  def convert(self, folded: Variables) -> dict[str, Any]:
    """Integers of folded variables; the same where nothing is quantized."""
    if not self.anything:
      return dict(folded)
    settings = self.settings(folded['params'])
    rules = settings.pop('weight_rules'), settings.pop('activation_rules')
    return quantize.convert(folded, *rules, **settings)
