"""The walk over a traced forward that moves tags from inputs to outputs.

Owns what is known of an array, and how axes are tied, fixed and split; what
each primitive does with them is in `primitives`, what tags mean in `tags`, and
what becomes of them in `analysis`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jax.extend import core

from kd_jax.prune.tags import Tags
from kd_jax.types import Batch, Variables

# Tags of the positions; a reason why the axis is fixed; or None for an axis
# that takes any size, such as one made by broadcasting.
Axis: TypeAlias = np.ndarray | str | None

# In the innermost scope of an equation's name stack: the module's path.
MARK = '@'
# Left out of the trail: calls, and what JAX leaves out where sizes are 1.
_UNSEEN = frozenset(
  [
    'broadcast_in_dim',
    'convert_element_type',
    'copy',
    'jit',
    'pjit',
    'reshape',
    'slice',
    'squeeze',
    'stop_gradient',
    'transpose',
  ]
)
# Attributes that say into how many equal parts a module splits its channels.
COUNTS = ('heads', 'num_heads', 'num_groups')


class Value(NamedTuple):
  """What is known of one traced array.

  Attributes:
    axes: one `Axis` for each of its axes.
    zero: of an array that depends on parameters only: for each axis, whether
      removed positions are zero when the parameters are masked; None of an
      array that depends on the batch.
    const: its value, if it is one number everywhere.
  """

  axes: tuple[Axis, ...]
  zero: tuple[bool, ...] | None
  const: float | None = None


# (walk, equation, values of the inputs) -> values of the outputs
Rule: TypeAlias = Callable[['Walk', Any, Sequence[Value]], Sequence[Value]]


class Count(NamedTuple):
  """An attribute that has to follow what is removed.

  Attributes:
    module: path of the module.
    name: of the attribute.
    tags: one for each of what it counts.
  """

  module: str
  name: str
  tags: np.ndarray


class Step(NamedTuple):
  """What one equation made that depends on the batch.

  Attributes:
    name: of the primitive.
    where: the module or scope.
    shape: of its first output.
    axes: of the same.
  """

  name: str
  where: str
  shape: tuple[int, ...]
  axes: tuple[Axis, ...]


class Walk:
  """The state of one walk.

  Attributes:
    tags: of all axes.
    modules: module path -> its integer attributes.
    rules: primitive -> `(walk, equation, values) -> values`; that of None is
      for all others.
    counts: the attributes that removal changes.
    trail: what was computed, in order; operations that only move or spread
      numbers are left out.
    where: the module or scope of the equation at hand.
  """

  def __init__(
    self,
    tags: Tags,
    modules: Mapping[str, Mapping[str, int]],
    rules: Mapping[str | None, Rule],
  ):
    self.tags = tags
    self.modules = modules
    self.rules = rules
    self.counts: dict[tuple[str, str], Count] = {}
    self.trail: list[Step] = []
    self.where = ''
    self.module = ''

  def run(
    self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Value]
  ) -> list[Value]:
    """The outputs of a jaxpr.

    Args:
      jaxpr: an open jaxpr.
      consts: the arrays of its constvars.
      inputs: what is known of its inputs.
    """
    known: dict[Any, Value] = {}
    outside = self.where, self.module

    def read(atom):
      if isinstance(atom, core.Literal):
        return constant(atom.val)
      return known[atom]

    known.update(zip(jaxpr.constvars, map(constant, consts), strict=True))
    known.update(zip(jaxpr.invars, inputs, strict=True))
    for eqn in jaxpr.eqns:
      self.where, self.module = _place(eqn, *outside)
      name = eqn.primitive.name
      rule = self.rules.get(name, self.rules[None])
      outputs = rule(self, eqn, [read(v) for v in eqn.invars])
      known.update(zip(eqn.outvars, outputs, strict=True))
      if outputs and outputs[0].zero is None and name not in _UNSEEN:
        shape = shape_of(eqn.outvars[0])
        self.trail.append(Step(name, self.where, shape, outputs[0].axes))
    self.where, self.module = outside
    return [read(v) for v in jaxpr.outvars]

  def at(self, eqn: Any) -> str:
    """The equation in words: what, and where."""
    name = eqn.primitive.name
    return f'{name} in {self.where}' if self.where else name

  def tie(self, axes: Sequence[Axis], what: str) -> Axis:
    """One axis of several that have to be the same.

    Args:
      axes: of equal size.
      what: the operation, for what gets fixed by it.
    """
    fixed = next((a for a in axes if isinstance(a, str)), None)
    tagged = [a for a in axes if isinstance(a, np.ndarray)]
    if not tagged:
      return fixed
    first, *others = tagged
    if fixed is not None:
      self.fix(first, f'{fixed} ({what})')
    for other in others:
      self.tags.tie(first, other, f'meets a fixed position ({what})')
    return first

  def fix(self, axis: Axis, reason: str) -> None:
    """Keeps all positions of an axis for good."""
    if isinstance(axis, np.ndarray):
      self.tags.fix(axis, reason)

  def split(
    self, axis: Axis, sizes: Sequence[int], kind: str | None
  ) -> list[Axis]:
    """The axes that one axis becomes; `kind` as in `Tags.factor`."""
    if not isinstance(axis, np.ndarray):
      return [axis] * len(sizes)
    if len(sizes) == 1:
      return [axis]
    first, rest = sizes[0], sizes[1:]
    major: Axis
    minor: Axis
    if 1 in (first, math.prod(rest)):
      major, minor = (None, axis) if first == 1 else (axis, None)
    else:
      name = None if kind else self._count(first)
      parts = 'groups' if kind else 'equal parts'
      reason = f'the {first} {parts} in {self.where or "a reshape"} stay'
      major, minor = self.tags.factor(axis, first, kind or name, reason)
      if name and isinstance(major, np.ndarray):
        key = (self.module, name)
        self.counts.setdefault(key, Count(self.module, name, major))
    return [major, *self.split(minor, rest, kind)]

  def _count(self, size: int) -> str | None:
    attributes = self.modules.get(self.module, {})
    return next((n for n in COUNTS if attributes.get(n) == size), None)


def shape_of(atom: Any) -> tuple[int, ...]:
  """The shape of a variable or literal of a jaxpr."""
  return tuple(atom.aval.shape)


def constant(array: Any) -> Value:
  """What is known of an array that is written in the model's code."""
  shape = np.shape(array)
  const = None
  if shape == () and getattr(array, 'dtype', np.dtype(float)).kind in 'biuf':
    const = float(array)
  return Value(
    ('a constant of the model',) * len(shape), (False,) * len(shape), const
  )


def _place(eqn: Any, where: str, module: str) -> tuple[str, str]:
  """Where an equation stands, and in which linen module."""
  stack = str(eqn.source_info.name_stack)
  marked = [p for p in stack.split('/') if p.startswith(MARK)]
  if marked:
    module = marked[-1].removeprefix(MARK).replace('|', '/')
    return module or 'the model', module
  return where or stack, module


def output_of(
  forward: Callable[..., Any], variables: Variables, batch: Batch
) -> Any:
  """What a forward computes: of a `Forward` the output."""
  out = forward(variables, batch)
  return getattr(out, 'output', out)
