"""A trained network in evaluation mode, or several as one.

Owns neither training nor files: `run` makes these of what stages saved.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kd_jax import data, networks
from kd_jax.report.names import TEACHER as TEACHER
from kd_jax.types import StudentFn, Variables


@dataclasses.dataclass(frozen=True)
class Network:
  """A trained network in evaluation mode.

  Attributes:
    name: as the report calls it.
    make: `(taps=(), axis_name=None) -> forward`, of pre-processed batches.
    variables: what to run it with.
    taps: where its features are; of an ensemble, name -> the member's.
    cache: its stored outputs, to train with instead of running it; None for
      the live network.
  """

  name: str
  make: Callable[..., StudentFn]
  variables: Variables
  taps: Any = None
  cache: data.TeacherCache | None = None

  @functools.cached_property
  def forward(self) -> StudentFn:
    """The function without taps."""
    return self.make()


def ensemble(
  members: Mapping[str, Network],
  space: str,
  weights: Mapping[str, float] | None,
  taps: Sequence[str] = (),
  axis_name: str | None = None,
) -> StudentFn:
  """The ensemble's function; a tap is '<member>/<path>'."""
  made = {
    name: member.make(taps=networks.taps_of(taps, name), axis_name=axis_name)
    for name, member in members.items()
  }
  # Losses are averaged by the objective; what is measured is the mean logits.
  space = 'logits' if space == 'losses' else space
  return networks.combine(made, space=space, weights=weights or None)
