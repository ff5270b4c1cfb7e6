"""What each primitive does with tags: one rule for every one understood.

A rule is `(walk, equation, values) -> values`: what is known of the outputs,
given what is known of the inputs. Owns those of operations that compute, and
the table of all; `views` has those that move positions, `calls` those that walk
into other jaxprs. What has no rule fixes all that goes into it, with a reason
that names it. Nothing is guessed: a rule that cannot tell which positions an
operation picks fixes them too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kd_jax.prune import calls, views
from kd_jax.prune.trace import Axis, Rule, Value, Walk, shape_of
from kd_jax.prune.views import fix_axis, without


def _unknown(walk: Walk, eqn: Any, values: Sequence[Value]) -> list[Value]:
  reason = f'{walk.at(eqn)} is not understood'
  for value in values:
    for axis in value.axes:
      walk.fix(axis, reason)
  return [_fixed(v, reason) for v in eqn.outvars]


def _fixed(atom: Any, reason: str) -> Value:
  return Value((reason,) * len(shape_of(atom)), None)


def _identity(walk: Walk, eqn: Any, values: Sequence[Value]) -> list[Value]:
  return list(values)


def _elementwise(walk: Walk, eqn: Any, values: Sequence[Value]) -> list[Value]:
  shape = shape_of(eqn.outvars[0])
  axes = []
  for i, size in enumerate(shape):
    axes.append(
      walk.tie(
        [
          value.axes[i]
          for value, atom in zip(values, eqn.invars, strict=True)
          # Size-1 axes broadcast, and so do scalars.
          if len(value.axes) == len(shape) and shape_of(atom)[i] == size
        ],
        walk.at(eqn),
      )
    )
  zero, const = None, None
  if all(v.zero is not None for v in values):
    name = eqn.primitive.name
    zero = tuple(_is_zero(name, values, i) for i in range(len(shape)))
    if name in ('convert_element_type', 'copy', 'stop_gradient'):
      const = values[0].const
  value = Value(tuple(axes), zero, const)
  return [value] * len(eqn.outvars)


def _is_zero(name: str, values: Sequence[Value], axis: int) -> bool:
  """Whether zeros along an axis stay zeros in an elementwise operation."""

  def number(value):
    if value.const is not None:
      return value.const
    return 0.0 if value.zero and value.zero[axis] else None

  numbers = [number(v) for v in values]
  if name == 'mul':
    return 0.0 in numbers
  if name == 'div':
    return numbers[0] == 0.0
  if name == 'select_n':
    return all(n == 0.0 for n in numbers[1:])
  if None in numbers:
    return False
  if name in ('add', 'sub', 'add_any') or name in _ZERO_AT_ZERO:
    return all(n == 0.0 for n in numbers)
  if name in ('max', 'min'):
    return {'max': max, 'min': min}[name](numbers) == 0.0
  if name == 'clamp':
    return numbers[0] <= 0.0 <= numbers[2] and numbers[1] == 0.0
  return False


def _reduce(walk: Walk, eqn: Any, values: Sequence[Value]) -> list[Value]:
  name, gone = eqn.primitive.name, eqn.params['axes']
  for value in values:
    # A zero among parameters is no new extreme of their absolute values.
    blurs = value.zero is None or name not in ('reduce_max', 'reduce_min')
    for i in gone:
      axis = value.axes[i]
      if name.startswith('arg'):
        fix_axis(walk, eqn, axis)
      elif blurs and isinstance(axis, np.ndarray):
        walk.tags.blur(axis, f'{walk.at(eqn)} is taken over it')
  out = without(values[0], gone)
  zero = (
    out.zero
    if name in ('reduce_sum', 'reduce_max', 'reduce_min')
    else (out.zero and (False,) * len(out.axes))
  )
  return [Value(out.axes, zero)] * len(eqn.outvars)


def _window(walk: Walk, eqn: Any, values: Sequence[Value]) -> list[Value]:
  """Pooling: axes with a window of 1 and stride 1 pass."""
  p, shape = eqn.params, shape_of(eqn.outvars[0])
  ones = (1,) * len(shape)
  size = p['window_dimensions']
  stride = p.get('window_strides') or ones
  spread = p.get('base_dilation') or ones
  pads = p.get('padding') or ((0, 0),) * len(shape)
  full = [v for v in values if len(v.axes) == len(shape)]
  axes = []
  for i in range(len(shape)):
    axis = walk.tie([v.axes[i] for v in full], walk.at(eqn))
    whole = (size[i], stride[i], spread[i], *pads[i]) == (1, 1, 1, 0, 0)
    axes.append(axis if whole else fix_axis(walk, eqn, axis))
  return [Value(tuple(axes), None)] * len(eqn.outvars)


def _along(parameter: str) -> Callable:
  """Running sums, sorts: one axis is ordered, the others pass."""

  def rule(walk, eqn, values):
    axes = []
    rank = len(shape_of(eqn.outvars[0]))
    along = eqn.params.get(parameter, rank - 1) if parameter else rank - 1
    for i in range(rank):
      axis = walk.tie([v.axes[i] for v in values], walk.at(eqn))
      axes.append(fix_axis(walk, eqn, axis) if i == along % rank else axis)
    return [Value(tuple(axes), None)] * len(eqn.outvars)

  return rule


def _contract(
  walk: Walk, eqn: Any, left: tuple[Value, int], right: tuple[Value, int]
) -> None:
  """Two axes that are multiplied and summed; values and axis numbers."""
  (x, i), (w, j) = left, right
  axis = walk.tie([x.axes[i], w.axes[j]], walk.at(eqn))
  exact = any(v.zero is not None and v.zero[k] for v, k in (left, right))
  if isinstance(axis, np.ndarray) and not exact:
    walk.tags.blur(
      axis,
      f'{walk.at(eqn)} multiplies activations, and a scale of their product '
      'follows their number',
    )


def _dot(walk: Walk, eqn: Any, values: Sequence[Value]) -> list[Value]:
  (contracted, batch), (x, w) = eqn.params['dimension_numbers'], values
  for i, j in zip(*contracted, strict=True):
    _contract(walk, eqn, (x, i), (w, j))
  axes = [
    walk.tie([x.axes[i], w.axes[j]], walk.at(eqn))
    for i, j in zip(*batch, strict=True)
  ]
  zero = [False] * len(axes)
  for value, summed, shared in zip(values, contracted, batch, strict=True):
    left = without(value, (*summed, *shared))
    axes += left.axes
    zero += left.zero or (False,) * len(left.axes)
  static = x.zero is not None and w.zero is not None
  return [Value(tuple(axes), tuple(zero) if static else None)]


def _conv(walk: Walk, eqn: Any, values: Sequence[Value]) -> list[Value]:
  (x, w), numbers = values, eqn.params['dimension_numbers']
  groups = eqn.params['feature_group_count']
  if eqn.params['batch_group_count'] != 1:
    return _unknown(walk, eqn, values)
  for value, spec in ((x, numbers.lhs_spec), (w, numbers.rhs_spec)):
    for i in spec[2:]:
      walk.fix(value.axes[i], '')  # spatial
  channels, made = numbers.lhs_spec[1], numbers.rhs_spec[0]
  outputs = w.axes[made]
  inner = numbers.rhs_spec[1]
  if groups == 1:
    _contract(walk, eqn, (x, channels), (w, inner))
  else:
    size = shape_of(eqn.invars[0])[channels]
    whole, places = walk.split(
      x.axes[channels], [groups, size // groups], 'groups'
    )
    size = shape_of(eqn.invars[1])[made]
    parts, _ = walk.split(outputs, [groups, size // groups], 'groups')
    walk.tie([whole, parts], walk.at(eqn))
    _contract(walk, eqn, (Value((places,), None), 0), (w, inner))
  axes: list[Axis] = [None] * len(x.axes)
  axes[numbers.out_spec[0]] = x.axes[numbers.lhs_spec[0]]
  axes[numbers.out_spec[1]] = outputs
  for i in numbers.out_spec[2:]:
    axes[i] = 'a spatial axis'
  return [Value(tuple(axes), None)]


def _words(names: str) -> list[str]:
  return names.split()


def _for_each(rule: Rule, names: str) -> dict[str | None, Rule]:
  return dict.fromkeys(_words(names), rule)


# f(0) = 0.
_ZERO_AT_ZERO = _words(
  'abs neg sign sqrt cbrt square integer_pow tanh sin tan asin atan sinh asinh '
  'atanh erf expm1 log1p round floor ceil convert_element_type copy real '
  'reduce_precision stop_gradient'
)
RULES: dict[str | None, Rule] = {
  None: _unknown,
  'conv_general_dilated': _conv,
  'dot_general': _dot,
  'reshape': views.reshape,
  'transpose': views.transpose,
  'squeeze': views.squeeze,
  'broadcast_in_dim': views.broadcast,
  'concatenate': views.concatenate,
  'pad': views.pad,
  'split': views.split,
  'gather': views.gather,
  'dynamic_update_slice': views.update_slice,
  'iota': views.iota,
  'scan': calls.scan,
  'while': calls.while_,
  'cond': calls.cond,
  **_for_each(views.slice_, 'slice dynamic_slice'),
  **_for_each(_along('dimension'), 'sort'),
  **_for_each(_along('axis'), 'cumsum cumprod cummax cummin cumlogsumexp'),
  **_for_each(_along(''), 'top_k'),
  **_for_each(
    calls.call,
    'jit pjit closed_call core_call remat remat2 checkpoint custom_jvp_call '
    'custom_vjp_call custom_vjp_call_jaxpr',
  ),
  **_for_each(
    _reduce,
    'reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or '
    'argmax argmin',
  ),
  **_for_each(
    _window,
    'reduce_window reduce_window_sum reduce_window_max reduce_window_min',
  ),
  **_for_each(
    _identity, 'optimization_barrier sharding_constraint mesh_cast reshard'
  ),
  **_for_each(
    views.adaptable,
    'random_bits random_seed random_wrap random_unwrap random_fold_in '
    'random_split threefry2x32 random_gamma',
  ),
  **_for_each(
    _elementwise,
    'abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil '
    'clamp complex conj convert_element_type copy cos cosh digamma div eq '
    'erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite '
    'le lgamma log log1p logistic lt max min mul name ne neg nextafter not or '
    'population_count pow pvary real reduce_precision rem round rsqrt '
    'select_n shift_left shift_right_arithmetic shift_right_logical sign sin '
    'sinh sqrt square stop_gradient sub tan tanh xor',
  ),
}
