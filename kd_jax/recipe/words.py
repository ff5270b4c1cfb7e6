"""The words of a recipe of compression, and what they stand for.

Owns the names that the fields of `config.compress` take, and what its words are
read beside: the network and the length of its training. What a recipe makes of
them is `compression`.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections

from kd_jax import adapters, data, prune, quantize
from kd_jax.types import Batch, Variables

INTEGER_WEIGHTS = {
  'int8': quantize.INT8_WEIGHTS,
  'int4': dataclasses.replace(quantize.INT8_WEIGHTS, bits=4),
}
SPECS: dict[str, dict[str, quantize.QuantSpec | None]] = {
  'weights': {**INTEGER_WEIGHTS, 'float': None},
  'activations': {
    'int8': quantize.INT8_ACTIVATIONS,
    'int8_symmetric': quantize.QuantSpec(narrow=False),
    'int8_dynamic': dataclasses.replace(
      quantize.INT8_ACTIVATIONS, dynamic=True
    ),
    'float': None,
  },
}
OBSERVERS: dict[str, Callable[[Any], quantize.Observer]] = {
  'ema': lambda c: quantize.ema_min_max(decay=c.observer_decay),
  'min_max': lambda c: quantize.min_max(),
  'percentile': lambda c: quantize.percentile(),
  'mse': lambda c: quantize.mse(),
  'entropy': lambda c: quantize.entropy(),
  'octav': lambda c: quantize.octav(),
}
WEIGHT_OBSERVERS: dict[str, Callable[[], quantize.Observer | None]] = {
  'extremes': lambda: None,
  'percentile': quantize.percentile,
  'mse': quantize.mse,
  # Pruned weights are no values to represent.
  'octav': lambda: quantize.octav(ignore_zeros=True),
}
SCORES: dict[str, Callable[[], prune.Score]] = {
  'magnitude': prune.magnitude,
  'taylor': prune.taylor,
  'fisher': prune.fisher,
  'snip': prune.snip,
  # The rate is the unit of these scores, which are only compared.
  'movement': lambda: prune.movement(1.0),
  'lamp': prune.lamp,
  'random': prune.random,
}
_MOMENT = re.compile(r'(\d+(?:\.\d+)?) ?(%|steps?|epochs?)')


class Uncompressed(NamedTuple):
  """The network that a recipe compresses.

  Attributes:
    model: the linen module; it is not edited.
    variables: its trained variables, where compression starts.
    batch: pre-processed; its values are read where ranges are learned by
      gradients and where residual blocks leave, else only its shapes.
    interceptors: others than those of compression, which go first, such as
      `prune.resized(...)`.
  """

  model: adapters.LinenModule
  variables: Variables
  batch: Batch
  interceptors: tuple[adapters.Interceptor, ...] = ()


class Training(NamedTuple):
  """The steps of a training.

  Attributes:
    steps: of all of it.
    epoch_steps: of one epoch.
    accumulate: forwards in a step, see `make_train_step`.
  """

  steps: int
  epoch_steps: int
  accumulate: int = 1

  @classmethod
  def of(
    cls, c: ml_collections.ConfigDict, examples: data.Examples
  ) -> 'Training':
    """What a configuration says of a training on some examples.

    Args:
      c: a `training` of `kd_jax.defaults`.
      examples: of the train split, or those to transfer with.

    Raises:
      ValueError: without an epoch, for a batch of no or too many examples, or
        one that `accumulate` does not divide.
    """
    if c.epochs < 1:
      raise ValueError(f'train.epochs={c.epochs} is not a number from 1 on.')
    if c.accumulate < 1 or c.batch_size % c.accumulate:
      raise ValueError(
        f'train.accumulate={c.accumulate} does not divide '
        f'train.batch_size={c.batch_size}.'
      )
    epoch_steps = data.batches_per_epoch(examples, c.batch_size)
    return cls(c.epochs * epoch_steps, epoch_steps, c.accumulate)

  def at(self, text: str, key: str) -> int:
    """A point in training as a step.

    Args:
      text: '30%' of the steps, '400 steps' or '12 epochs'.
      key: of the configuration, for the error.

    Returns:
      The step, at most `steps`.

    Raises:
      ValueError: for another text.

    Example:
      >>> points = '50%', '7 steps', '2 epochs', '9 epochs'
      >>> training = Training(steps=100, epoch_steps=20)
      >>> [training.at(point, 'prune.end') for point in points]
      [50, 7, 40, 100]
    """
    match = _MOMENT.fullmatch(text.strip())
    if match is None:
      raise ValueError(
        f"{key}={text!r} is no point in training: use '30%', '400 steps' or "
        "'12 epochs'."
      )
    number, unit = float(match[1]), match[2][0]
    size = {'%': self.steps / 100, 's': 1, 'e': self.epoch_steps}[unit]
    return min(round(number * size), self.steps)
