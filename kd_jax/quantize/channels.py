"""Which channels of a network may be rescaled without changing its output.

Owns a walk over the jaxpr of any forward that finds vectors of free positive
scales: a layer's output channels, or a normalization's gain, may be multiplied
by one if the layers that read them divide by it and nothing between sees the
difference. What the scales should be is decided in `equalization`.

A value is followed through functions with f(s x) = s f(x) for s > 0: ReLU,
leaky ReLU, PReLU, maximum and average pooling, sums with a bias (which is
scaled as well), reshapes, flattening. Anything else ends the search, and the
channels that reached it stay as they are; so do weights that are used twice.
A cap, as in ReLU6, is such an end.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from kd_jax import rules as rules_lib
from kd_jax.quantize.channel_rules import RULES
from kd_jax.quantize.channel_values import Leaf, Scaled, Source, Value
from kd_jax.types import Batch, Variables

_CALLS = frozenset(
  {
    'jit',
    'pjit',
    'closed_call',
    'core_call',
    'custom_jvp_call',
    'custom_vjp_call',
    'custom_vjp_call_jaxpr',
    'checkpoint',
    'remat',
    'remat2',
  }
)


class Reader(NamedTuple):
  """How a kernel reads rescaled channels.

  Attributes:
    channels: int, broadcastable to the kernel (without stacked axes): the
      channel that each weight multiplies.
    inputs: int `[D]`, the channel at each index of the layer's input.
    axis: the axis of that input, from the end.
  """

  channels: np.ndarray
  inputs: np.ndarray
  axis: int


class FreeScale(NamedTuple):
  """A vector of scales that the network's output does not depend on.

  Attributes:
    kind: 'layer' if the channels are those of a kernel, 'norm' if they are
      those of a normalization's scale.
    size: number of channels, C.
    stacked: leading axes of the parameters that a scan runs over; each index
      of them has scales of its own.
    multiplied: variable -> int, broadcastable to it without the stacked axes:
      the channel of each entry. The first is the kernel or the norm's scale.
    divided: kernel -> how it reads the channels.
  """

  kind: str
  size: int
  stacked: int
  multiplied: Mapping[str, np.ndarray]
  divided: Mapping[str, Reader]


def free_scales(
  forward: Callable[..., Any], variables: Variables, batch: Batch
) -> list[FreeScale]:
  """Finds the scales that may be moved from one layer into the next.

  Args:
    forward: `(variables, batch) -> Forward` in evaluation mode, of any model.
    variables: its variables; only shapes and dtypes matter.
    batch: one batch; only its shapes and dtypes matter.

  Returns:
    One entry for each layer or norm whose output reaches only kernels, in the
    order of the computation. Names are '/'-joined paths in `variables`, such
    as 'params/conv1/kernel'.

  Example:
    >>> import jax.numpy as jnp
    >>> from kd_jax.types import Forward
    >>> def forward(variables, batch):
    ...   p = variables['params']
    ...   return Forward(jax.nn.relu(batch['x'] @ p['a']) @ p['b'])
    >>> variables = {'params': {'a': jnp.ones((4, 3)), 'b': jnp.ones((3, 2))}}
    >>> [scale] = free_scales(forward, variables, {'x': jnp.ones((1, 4))})
    >>> scale.size, list(scale.multiplied), list(scale.divided)
    (3, ['params/a'], ['params/b'])
  """
  variables, batch = dict(variables), dict(batch)
  closed = jax.make_jaxpr(lambda v, b: forward(v, b).output)(variables, batch)
  names = rules_lib.leaf_names(variables)
  walk = _Walk(uses=dict.fromkeys(names, 0))
  leaves = [Leaf(name) for name in names]
  rest = [None] * (len(closed.jaxpr.invars) - len(leaves))
  walk.stop(walk.run(closed.jaxpr, [*leaves, *rest]))
  return [
    FreeScale(
      source.kind,
      source.size,
      source.stacked,
      dict(source.multiplied),
      {name: Reader(*reader) for name, reader in source.divided.items()},
    )
    for source in walk.sources
    if source.free
    and source.divided
    and all(
      walk.uses[name] == 1 for name in (*source.multiplied, *source.divided)
    )
  ]


@dataclasses.dataclass
class _Walk:
  """State of the walk: how often leaves are used, and what may be rescaled."""

  uses: dict[str, int]
  sources: list[Source] = dataclasses.field(default_factory=list)

  def stop(self, values: Iterable[Value]) -> None:
    """Something reads these values that does not commute with scales."""
    for value in values:
      if isinstance(value, Leaf):
        self.use(value)
      elif isinstance(value, Scaled):
        value.source.free = False

  def use(self, leaf: Leaf) -> None:
    self.uses[leaf.name] += 1

  def add_source(
    self, kind: str, size: int, leaf: Leaf, channels: np.ndarray
  ) -> Source:
    source = Source(kind, size, leaf.stacked, {leaf.name: channels})
    self.sources.append(source)
    return source

  def run(self, jaxpr: Any, inputs: Sequence[Value]) -> list[Value]:
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom):
      if hasattr(atom, 'val'):
        return 0 if np.ndim(atom.val) == 0 and atom.val == 0 else None
      return known.get(atom)

    for eqn in jaxpr.eqns:
      values = [read(atom) for atom in eqn.invars]
      outputs = self._equation(eqn, values)
      known |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]

  def _equation(self, eqn: Any, values: Sequence[Value]) -> list[Value]:
    name = eqn.primitive.name
    inside = _inside(eqn)
    if name == 'scan':
      return self._scan(eqn, values, inside)
    if (
      name in _CALLS
      and inside is not None
      and len(inside.invars) == len(values)
    ):
      return self.run(inside, values)
    if all(value is None for value in values):
      return [None] * len(eqn.outvars)
    output = RULES[name](self, eqn, values) if name in RULES else NotImplemented
    if output is NotImplemented:
      self.stop(values)
      output = None
    return [output] * len(eqn.outvars)

  def _scan(self, eqn: Any, values: Sequence[Value], body: Any) -> list[Value]:
    inputs: list[Value] = []
    for value, outer, inner in zip(
      values, eqn.invars, body.invars, strict=True
    ):
      # Constants and carries keep their shape; what is scanned loses an axis.
      scanned = outer.aval.ndim == inner.aval.ndim + 1
      if scanned and isinstance(value, Leaf) and value.axis is None:
        inputs.append(dataclasses.replace(value, stacked=value.stacked + 1))
      else:
        self.stop([value])
        inputs.append(None)
    self.stop(self.run(body, inputs))
    return [None] * len(eqn.outvars)


def _inside(eqn: Any) -> Any:
  for key in ('jaxpr', 'call_jaxpr', 'fun_jaxpr'):
    if key in eqn.params:
      return getattr(eqn.params[key], 'jaxpr', eqn.params[key])
  return None
