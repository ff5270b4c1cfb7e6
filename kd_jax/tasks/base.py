"""What a run knows of its problem: data, input, labels, and what is good.

Owns the interface alone. The step, the loop, the stages and the report are the
same for every task; what they ask is answered here.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_collections

from kd_jax import parity
from kd_jax.data import Split
from kd_jax.deploy import Preprocess
from kd_jax.metrics import Metric
from kd_jax.objectives import Objective
from kd_jax.types import StudentFn


def _as_it_is(
  c: ml_collections.ConfigDict, statistics: Mapping[str, Any]
) -> Preprocess:
  return lambda batch, *, train: batch


class Task(NamedTuple):
  """One kind of problem.

  Attributes:
    reads: the entry of a raw batch that networks see and servers are sent;
      pre-processing keeps its name.
    load: `(config.data, split) -> examples` of 'train', 'validation' or 'test';
      of 'transfer', those on which students learn from their teacher, if
      `config.data.transfer.name` says which.
    metrics: name -> metric of a network alone. The first is what decides:
      checkpoints, the search and the aims go by it.
    compared: name -> metric that compares a network with the teacher.
    agree: when two forms of a network predict the same; see `parity.compare`.
      Outputs are logits of classes if it is `parity.most_likely`: the search
      then measures a change of them by KL, else by its square.
    labels: `() -> objective` of who learns without a teacher.
    statistics: `(config.data, train split) -> JSON values`, what
      pre-processing has to know of the data.
    preprocess: `(config, statistics) -> preprocess`, and that
      `(batch, *, train) -> batch`, on the devices.
    identity: `(config.data) -> data set -> file -> digest`, what a run that
      goes on must find as it was; None for a digest of the train split.
    teacher_input: `(config, statistics, forward) -> forward`: a teacher's
      function behind an input of its own.
    drawn: fields of `config.data` for what pre-processing draws at random in
      training; zero where nothing is drawn.
    stand_in: `(config.data, split, count) -> examples` whose values do not
      matter, for plans of runs whose data is not here; `count` is 0 for as many
      as are known to be there. None to load them.

  Example:
    >>> import numpy as np
    >>> from kd_jax import data, metrics, objectives
    >>> def load(c, split):
    ...   return data.ArrayData(
    ...     {'x': np.ones((4, 3), 'f'), 'target': np.zeros((4, 1), 'f')},
    ...     id=np.arange(4, dtype=np.int32), reads='x', num_classes=1)
    >>> def labels():
    ...   terms = {'mse': (1.0, objectives.regression())}
    ...   return objectives.weighted_sum(terms)
    >>> task = Task('x', load, {'mse': metrics.mean_squared_error()}, labels)
    >>> task.quality, task.worth(0.5), task.load(None, 'train').input.shape
    ('mse', -0.5, (3,))
  """

  reads: str
  load: Callable[[ml_collections.ConfigDict, str], Split]
  metrics: Mapping[str, Metric]
  labels: Callable[[], Objective]
  compared: Mapping[str, Metric] = {}
  agree: parity.Agree = parity.most_likely
  statistics: Callable[[ml_collections.ConfigDict, Any], dict[str, Any]] = (
    lambda c, train: {}
  )
  preprocess: Callable[
    [ml_collections.ConfigDict, Mapping[str, Any]], Preprocess
  ] = _as_it_is
  identity: (
    Callable[[ml_collections.ConfigDict], dict[str, dict[str, str]]] | None
  ) = None
  teacher_input: Callable[
    [ml_collections.ConfigDict, Mapping[str, Any], StudentFn], StudentFn
  ] = lambda c, statistics, forward: forward
  drawn: tuple[str, ...] = ()
  stand_in: Callable[[ml_collections.ConfigDict, str, int], Split] | None = None

  @property
  def quality(self) -> str:
    """The name of the metric that decides."""
    return next(iter(self.metrics))

  @property
  def classifies(self) -> bool:
    """Whether outputs are logits of classes."""
    return self.agree is parity.most_likely

  def worth(self, value: float) -> float:
    """A value of that metric as a number of which more is better."""
    return value if self.metrics[self.quality].higher else -value

  def measured(self, *, with_teacher: bool) -> dict[str, Metric]:
    """All metrics, those that need a teacher included or not, as shown."""
    compared = self.compared if with_teacher else {}
    first = {self.quality: self.metrics[self.quality]}
    return first | dict(compared) | dict(self.metrics)
