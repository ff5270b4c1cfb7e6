"""Primitives that call other jaxprs: functions, loops and branches.

Owns one rule for each: `(walk, equation, values) -> values`, which walks inside
and says what comes out. Operations that compute are in `primitives`, where the
table of all rules is.
"""

from collections.abc import Sequence
from typing import Any

from kd_jax.prune.trace import Value, Walk, shape_of
from kd_jax.prune.views import without


def call(walk: Walk, eqn: Any, values: Sequence[Value]) -> list[Value]:
  """A function: what is inside of it."""
  inner = eqn.params.get('jaxpr', eqn.params.get('call_jaxpr'))
  return walk.run(
    getattr(inner, 'jaxpr', inner), getattr(inner, 'consts', ()), values
  )


def _loop(
  walk: Walk,
  eqn: Any,
  body: Any,
  consts: Sequence[Value],
  carry: Sequence[Value],
  sequences: Sequence[Value],
) -> list[Value]:
  """The outputs of a loop's body; its carry is what it becomes."""
  # What changes from step to step is no zero that could be relied on.
  carry = [
    v._replace(zero=v.zero and (False,) * len(v.axes), const=None)
    for v in carry
  ]
  start = len(walk.trail)
  while True:
    del walk.trail[start:]
    outputs = walk.run(body.jaxpr, body.consts, [*consts, *carry, *sequences])
    known = [
      _same(walk, eqn, v, o)
      for v, o in zip(carry, outputs[: len(carry)], strict=True)
    ]
    # An axis that took any size may have met a tag: then it carries that.
    if all(
      (a is None) == (b is None)
      for v, k in zip(carry, known, strict=True)
      for a, b in zip(v.axes, k.axes, strict=True)
    ):
      return known + outputs[len(carry) :]
    carry = known


def _same(walk: Walk, eqn: Any, x: Value, y: Value) -> Value:
  axes = [
    walk.tie(pair, walk.at(eqn)) for pair in zip(x.axes, y.axes, strict=True)
  ]
  static = x.zero is not None and y.zero is not None
  return Value(tuple(axes), (False,) * len(axes) if static else None)


def scan(walk: Walk, eqn: Any, values: Sequence[Value]) -> list[Value]:
  """A loop over the first axes of its sequences, which are fixed."""
  body = eqn.params['jaxpr']
  # What is stacked has one axis more outside than inside; versions of JAX
  # write the numbers down in different ways.
  stacked = _longer(eqn.invars, body.jaxpr.invars)
  made = _longer(eqn.outvars, body.jaxpr.outvars)
  first = len(values) - stacked
  consts = values[: first - (len(eqn.outvars) - made)]
  carry = values[len(consts) : first]
  sequences = []
  for value in values[first:]:
    walk.fix(value.axes[0], f'the steps of {walk.at(eqn)}')
    sequences.append(without(value._replace(const=None), (0,)))
  outputs = _loop(walk, eqn, body, consts, carry, sequences)
  steps = [
    Value(
      (f'the steps of {walk.at(eqn)}', *v.axes), v.zero and (False, *v.zero)
    )
    for v in outputs[len(carry) :]
  ]
  return outputs[: len(carry)] + steps


def _longer(outside: Sequence[Any], inside: Sequence[Any]) -> int:
  return sum(
    len(shape_of(a)) > len(shape_of(b))
    for a, b in zip(outside, inside, strict=True)
  )


def while_(walk: Walk, eqn: Any, values: Sequence[Value]) -> list[Value]:
  """A loop as long as a condition holds."""
  p = eqn.params
  first, second = p['cond_nconsts'], p['body_nconsts']
  carry = values[first + second :]
  carry = _loop(
    walk, eqn, p['body_jaxpr'], values[first : first + second], carry, []
  )
  condition = p['cond_jaxpr']
  walk.run(condition.jaxpr, condition.consts, [*values[:first], *carry])
  return carry


def cond(walk: Walk, eqn: Any, values: Sequence[Value]) -> list[Value]:
  """One of several branches: what holds in all of them."""
  outputs = [
    walk.run(branch.jaxpr, branch.consts, values[1:])
    for branch in eqn.params['branches']
  ]
  made = outputs[0]
  for other in outputs[1:]:
    made = [_same(walk, eqn, x, y) for x, y in zip(made, other, strict=True)]
  return made
