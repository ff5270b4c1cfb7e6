"""A recipe of compression as data, and what it makes of one network.

Owns how pruning and quantization go together in one train step, and become
integers after it: dense -> prune -> recover -> quantize -> freeze -> remove
units -> fold -> convert. What each of them is stands in `pruning` and
`quantization`. Nothing is trained here, and what the network learns from is in
`distillation`.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_collections
import optax

from kd_jax import adapters, deploy, prune, quantize
from kd_jax.parity import check_parity
from kd_jax.recipe.pruning import Pruning
from kd_jax.recipe.quantization import Quantization
from kd_jax.recipe.words import Training, Uncompressed
from kd_jax.types import Batch, StudentFn, Variables


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
  overrides: prune.Overrides
  folded: dict[str, Any]


class Compression:
  """One network under a recipe.

  Attributes:
    recipe: what was given.
    pruning: what it loses, and when.
    quantization: its grids, and when they are used.

  Args:
    recipe: with the fields `prune` and `quantize` of `kd_jax.defaults`.
    network: what is compressed.
    training: in which it is.

  Raises:
    ValueError: for a word that a field does not know, or fields that do not go
      together.
  """

  def __init__(
    self,
    recipe: ml_collections.ConfigDict,
    network: Uncompressed,
    training: Training,
  ):
    self.recipe, self._network = recipe, network
    self._steps = training.steps
    self.pruning = Pruning(recipe.prune, network, training)
    self.quantization = Quantization(recipe.quantize, network, training)
    if recipe.quantize.ranges == 'lsq' and self.pruning.removes:
      raise ValueError(
        "quantize.ranges='lsq' learns steps for what leaves, which the rest "
        f'was trained with: prune.structure={recipe.prune.structure!r} needs '
        'other ranges.'
      )

  def phases(self) -> list[Phase]:
    """What happens when, in order, from step 0 to the last."""
    spans = []
    if span := self.pruning.span():
      spans += [('prune', *span), ('recover', span[1], self._steps)]
    if self.quantization.anything:
      begin, freeze = self.quantization.begin, self.quantization.freeze
      spans = [
        (name, a, min(b, begin) if name == 'recover' else b)
        for name, a, b in spans
      ]
      spans.append(('quantize', begin, freeze))
      spans.append(('freeze', freeze, self._steps))
    cuts = sorted(
      {0, self._steps, *(x for _, a, b in spans if a < b for x in (a, b))}
    )
    found = []
    for a, b in itertools.pairwise(cuts):
      names = [name for name, begin, end in spans if begin <= a < end]
      found.append(Phase(' + '.join(names) or 'dense', a, b))
    return found

  def make(
    self,
    *,
    taps: Sequence[str] = (),
    axis_name: str | None = None,
    **options: Any,
  ) -> StudentFn:
    """The forward, with its activations rounded to their grids.

    Args:
      taps: see `adapters.from_linen`, and so are `axis_name` and the others.
    """
    own = self.quantization.interceptors(axis_name)
    return adapters.from_linen(
      self._network.model,
      taps=taps,
      interceptors=(*self._network.interceptors, *own),
      axis_name=axis_name,
      **options,
    )

  def start(self) -> dict[str, Any]:
    """The variables before the first step."""
    return self.quantization.start(self.make())

  def params_fn(self, params: Any, step: Any) -> Any:
    """The parameters that the forward sees at a step: masked, then rounded."""
    masked = self.pruning.masked(params, step)
    return self.quantization.rounded(masked, step)

  def wrap(self, tx: optax.GradientTransformation) -> Any:
    """The optimizer, pruning."""
    return self.pruning.wrap(tx)

  def finish(self, variables: Variables) -> dict[str, Any]:
    """What is saved of the trained variables: pruned weights are zero."""
    params = self.pruning.masked(variables['params'], self._steps)
    return {**variables, 'params': params}

  def simulated(self, variables: Variables) -> dict[str, Any]:
    """The variables that `make` runs with, rounded; from `finish`."""
    params = self.quantization.rounded(variables['params'], self._steps)
    return {**variables, 'params': params}

  def convert(self, variables: Variables) -> Converted:
    """Removes what was pruned as a whole, folds BatchNorm, makes integers.

    Args:
      variables: from `finish`.
    """
    variables, overrides = self.pruning.remove(variables)
    folded = deploy.fold(
      self._network.model,
      self.quantization.with_ranges(variables),
      self._network.batch,
      interceptors=self.interceptors(overrides),
    )
    return Converted(self.quantization.convert(folded), overrides, folded)

  def interceptors(
    self, overrides: prune.Overrides
  ) -> tuple[adapters.Interceptor, ...]:
    """Those of a network that lost what `overrides` says."""
    if not self.pruning.removes:
      return self._network.interceptors
    return (*self._network.interceptors, prune.resized(overrides))

  def integer_forward(
    self, overrides: prune.Overrides, **options: Any
  ) -> StudentFn:
    """The forward of `Converted`; in float where nothing is quantized.

    Args:
      overrides: of it.
      **options: others of `deploy.integer_forward`.
    """
    model, interceptors = self._network.model, self.interceptors(overrides)
    if getattr(model, 'dtype', 'float32') != 'float32':
      # Servers compute in float32 around the integers.
      model = model.clone(dtype='float32')
    if not self.quantization.anything:
      return adapters.from_linen(
        model,
        taps=options.get('taps', ()),
        interceptors=(*interceptors, quantize.skip_folded_batch_norms),
      )
    return deploy.integer_forward(
      model,
      interceptors=interceptors,
      dynamic=self.quantization.rules('activations'),
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
    if not self.quantization.anything:
      return []
    report = check_parity(
      self._network.model,
      converted.folded,
      converted.variables,
      batch,
      interceptors=self.interceptors(converted.overrides),
      **self.quantization.settings(converted.folded['params']),
    )
    # JSON has no infinity: equal outputs have no noise.
    infinite = (math.inf, -math.inf)
    return [
      {k: None if v in infinite else v for k, v in row.items()}
      for row in report.rows()
    ]
