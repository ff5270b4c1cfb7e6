"""A run without data and without weights: shapes of everything, no values.

Owns what stands in for data sets and trained networks. The train steps that are
made with them are `steps`'.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections

from kd_jax import adapters, data, deploy
from kd_jax.recipe import distillation
from kd_jax.recipe.run import Run
from kd_jax.types import Batch, Variables


class Rehearsal(Run):
  """A run that reads no data set and no file.

  Examples are the task's `stand_in`, trained networks have the weights that
  they start with: make both under `jax.eval_shape`, and they cost nothing. A
  teacher cache of the configuration need not be there.

  Args:
    config: as for `Run`.
    devices: of the mesh; all of them when None.
    examples: of the train split; 0 for as many as are known to be there.
    source: a run whose examples to take in place of stand-ins.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    devices: Sequence[Any] | None = None,
    *,
    examples: int = 0,
    source: Run | None = None,
  ) -> None:
    config = config.copy_and_resolve_references()
    self.cached = bool(config.teacher.cache)
    config.teacher.cache = ''
    super().__init__(config, None, devices=devices)
    self._examples, self._source = examples, source

  @functools.cached_property
  def splits(self) -> dict[str, data.Split]:
    """The train split alone, of no values that matter; or a run's own."""
    if self._source:
      return self._source.splits
    return {'train': self._stand_in('train')}

  @functools.cached_property
  def transfer(self) -> data.Split:
    """The examples to learn from a teacher on, likewise."""
    if self._source:
      return self._source.transfer
    if not self.config.data.transfer.name:
      return self.splits['train']
    return self._stand_in('transfer')

  @functools.cached_property
  def statistics(self) -> dict[str, Any]:
    """What pre-processing has to know of the train split, likewise."""
    if self._source:
      return self._source.statistics
    return super().statistics

  def _stand_in(self, split: str) -> data.Split:
    c, make = self.config.data, self.task.stand_in
    return make(c, split, self._examples) if make else self.task.load(c, split)

  @functools.cached_property
  def example(self) -> Batch:
    """A batch of one example, pre-processed."""
    # Kept for later: no value of what is traced now.
    with jax.ensure_compile_time_eval():
      return self.preprocess(self.splits['train'].read([0]), train=False)

  def again(self) -> 'Rehearsal':
    """The same run, which has made nothing yet."""
    devices = list(self.mesh.devices.flat)
    return Rehearsal(
      self.config, devices, examples=self._examples, source=self._source
    )

  def trained(
    self, where: str, model: adapters.LinenModule, precision: str = 'float32'
  ) -> Variables:
    """Variables as they start, on integers if that is asked for."""
    example = self.example
    if where.split('/')[0] == 'teacher':
      example = distillation.example_for_teacher(self)
    if precision != 'int8':
      return adapters.init_linen(model, jax.random.key(0), example)
    # Conversion looks at values.
    with jax.ensure_compile_time_eval():
      variables = adapters.init_linen(model, jax.random.key(0), example)
      return deploy.post_training_quantize(model, variables, [example])
