"""What the layers with a product multiply, and their products on integers.

Owns the equation of every such layer (which axes of input and kernel are
summed) and the arithmetic on codes, zero points included; convolutions are in
`convolutions`. Knows layers by the names of their classes, imports none of
them, and reads no variables.
"""

import inspect
import math
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kd_jax.quantize.inputs import kind

_KERNELS = ('Conv', 'Dense', 'DenseGeneral', 'Einsum')


class Codes(NamedTuple):
  """Integers with what makes them real: scale * (code - zero_point).

  Attributes:
    code: int8.
    scale: float32, `[]` or with the rank of `code`, axes that share it 1; for
      groups, axis -2 has one for each group of neighbours.
    zero_point: int32 with the shape of `scale`, or None for 0.
  """

  code: jax.Array
  scale: jax.Array
  zero_point: jax.Array | None = None


class Equation(NamedTuple):
  """A product of two arrays as an einsum: one letter for each axis.

  Attributes:
    x: of the input.
    w: of the kernel, or of the second input.
    out: of the product.
    bias: of the bias, or '' for layers without a kernel.
  """

  x: str
  w: str
  out: str
  bias: str = ''


# Layers of two inputs and no kernel, see models.vit. The factor is a power of
# the size of the summed axis.
_ATTENTION = {
  'Scores': (Equation('bqnd', 'bknd', 'bnqk'), -0.5),
  'Context': (Equation('bnqk', 'bknd', 'bqnd'), 0.0),
}


def has_kernel(module: Any) -> bool:
  """Whether a module is a layer whose kernel has an integer product."""
  return kind(module, _KERNELS) is not None


def is_convolution(module: Any) -> bool:
  """Whether a layer with a kernel is a Conv."""
  return kind(module, _KERNELS) == 'Conv'


def is_attention_product(module: Any) -> bool:
  """Whether a module multiplies its two inputs."""
  return kind(module, _ATTENTION) is not None


def arguments(
  module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
  """The arguments of a module's call by position, wherever it can be.

  Returns:
    Positional arguments, and those that can be given by keyword only.
  """
  signature = inspect.signature(type(module).__call__)
  bound = signature.bind(module, *args, **kwargs)
  return list(bound.args[1:]), dict(bound.kwargs)


def is_input(value: Any) -> bool:
  """Whether an argument is an array that can be quantized."""
  dtype = getattr(value, 'dtype', None)
  return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def equation(module: Any, values: Sequence[Any]) -> Equation:
  """The equation of a dense layer.

  Args:
    module: a Dense, DenseGeneral or Einsum layer.
    values: its positional arguments.

  Raises:
    ValueError: for an einsum that is no plain product.
  """
  rank = values[0].ndim
  found = kind(module, _KERNELS)
  letters = string.ascii_letters
  x = letters[:rank]
  if found == 'Dense':
    o = letters[rank]
    return Equation(x, x[-1] + o, x[:-1] + o, o)
  if found == 'Einsum':
    given = values[1] if len(values) > 1 else None
    text = given if given is not None else module.einsum_str
    return parse('/'.join(module.path), text, (rank, rank))
  axes = [a % rank for a in _tuple(module.axis)]
  batch = [a % rank for a in _tuple(module.batch_dims)]
  new = letters[rank : rank + len(_tuple(module.features))]
  first, summed = (''.join(x[a] for a in group) for group in (batch, axes))
  rest = ''.join(c for c in x if c not in first + summed)
  return Equation(x, first + summed + new, first + rest + new, first + new)


def _tuple(value: Any) -> tuple[int, ...]:
  return tuple(value) if isinstance(value, Sequence) else (value,)


def parse(path: str, text: str, ranks: Sequence[int]) -> Equation:
  """The equation of an einsum of two arrays.

  Args:
    path: of the layer, for errors.
    text: of the einsum; an ellipsis stands for the same axes in both operands,
      or for axes of the first one alone.
    ranks: of the operands.

  Raises:
    ValueError: for an einsum that is no plain product.
  """
  operands, out = text.replace(' ', '').split('->')
  x, w = operands.split(',')
  if '...' in x:
    unused = [c for c in string.ascii_letters if c not in text]
    rest = ''.join(unused[: ranks[0] - len(x) + 3])
    same = '...' not in w or ranks[1] - len(w) == ranks[0] - len(x)
    x, out = x.replace('...', rest), out.replace('...', rest)
    w = w.replace('...', rest) if same else w
  plain = all(len(set(part)) == len(part) for part in (x, w, out))
  alone = (set(x) ^ set(w)) - set(out)
  if '...' in x + w or not plain or alone or set(out) - set(x + w):
    raise ValueError(
      f'{path}: the einsum {text!r} has no integer execution; '
      'every axis must be in the output or in both operands.'
    )
  return Equation(x, w, out, ''.join(c for c in out if c in w))


def arrange(value: jax.Array, letters: str, out: str) -> jax.Array:
  """An array with the axes `letters` as one that broadcasts to axes `out`.

  Args:
    value: `[]`, or with an axis for each of `letters`; an axis that is not in
      `out` has size 1.
    letters: of `value`.
    out: of the array that it will be combined with.

  Raises:
    ValueError: if an axis of more than size 1 is not in `out`.

  Example:
    >>> arrange(jnp.ones((1, 2, 3)), 'kab', 'bxa').shape
    (3, 1, 2)
  """
  if not value.ndim:
    return value
  gone = tuple(i for i, c in enumerate(letters) if c not in out)
  if any(value.shape[i] != 1 for i in gone):
    raise ValueError(
      f'a scale of shape {value.shape} varies along an axis that is summed.'
    )
  value = jnp.squeeze(value, gone)
  kept = [c for c in letters if c in out]
  value = jnp.transpose(value, [kept.index(c) for c in out if c in kept])
  return jnp.expand_dims(value, [i for i, c in enumerate(out) if c not in kept])


def multiply(
  eq: Equation, x: jax.Array, w: jax.Array, **options: Any
) -> jax.Array:
  """The product of two arrays of any dtype.

  Args:
    eq: the equation.
    x: the input.
    w: the kernel or second input.
    **options: of `jax.lax.dot_general`.
  """
  batch = [c for c in eq.w if c in eq.x and c in eq.out]
  summed = [c for c in eq.w if c in eq.x and c not in eq.out]
  contracted = [eq.x.index(c) for c in summed], [eq.w.index(c) for c in summed]
  batched = [eq.x.index(c) for c in batch], [eq.w.index(c) for c in batch]
  y = jax.lax.dot_general(x, w, (contracted, batched), **options)
  used = (*batch, *summed)
  made = batch + [c for c in eq.x + eq.w if c not in used]
  order = [made.index(c) for c in eq.out]
  return y if order == sorted(order) else jnp.transpose(y, order)


def contract(
  eq: Equation, x: Codes, w: Codes, bias: jax.Array | None = None
) -> jax.Array:
  """The product of two arrays of codes: int8 by int8 into int32.

  sum (q_x - z_x) (q_w - z_w) = sum q_x q_w - z_x sum q_w - z_w sum q_x
  + K z_x z_w, then times both scales. Each group of a kernel is summed in int32
  and their multiples in float32.

  Args:
    eq: the equation.
    x: the input; scale and zero point are `[]` or vary along axes that are not
      summed.
    w: the kernel or second input; with groups, along an axis that is summed.
    bias: in the order of `eq.bias`; int32 in steps of both scales, or float32.

  Returns:
    float32 in the order of `eq.out`.

  Example:
    >>> eq = Equation('bk', 'ko', 'bo', 'o')
    >>> x = Codes(jnp.array([[3, 5]], jnp.int8), jnp.float32(0.5), jnp.int32(1))
    >>> w = Codes(jnp.array([[2], [-1]], jnp.int8), jnp.full((1, 1), 0.25))
    >>> contract(eq, x, w).tolist()
    [[0.0]]
  """
  out = eq.out
  if _groups(eq, w) > 1:
    eq, x, w = _split_groups(eq, x, w)
  total = _total(eq, x, w)
  scale = arrange(x.scale, eq.x, eq.out) * arrange(w.scale, eq.w, eq.out)
  bias = bias if bias is None else arrange(bias, eq.bias, out)
  groups = None if eq.out == out else lambda y: jnp.sum(y, axis=0)
  return finish(total, scale, bias, groups)


def finish(
  total: jax.Array,
  scale: jax.Array,
  bias: jax.Array | None,
  sum_groups: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
  """What a product of codes is worth, its bias included; float32.

  Args:
    total: int32 sums of products.
    scale: of both operands.
    bias: int32 in steps of `scale`, which has no groups then, or float32.
    sum_groups: adds up the groups of a kernel, if it has some.
  """
  if bias is not None and bias.dtype == jnp.int32:
    return (total + bias).astype(jnp.float32) * scale
  y = total.astype(jnp.float32) * scale
  y = y if sum_groups is None else sum_groups(y)
  return y if bias is None else y + bias


def _total(eq: Equation, x: Codes, w: Codes) -> jax.Array:
  """The sum of products of codes less their zero points, int32."""
  total = multiply(eq, x.code, w.code, preferred_element_type=jnp.int32)
  zero_x = zero_w = None
  if x.zero_point is not None:
    zero_x = arrange(x.zero_point, eq.x, eq.out)
    total -= zero_x * _sum(w.code, eq.w, eq.out)
  if w.zero_point is not None:
    zero_w = arrange(w.zero_point, eq.w, eq.out)
    total -= zero_w * _sum(x.code, eq.x, eq.out)
  if zero_x is not None and zero_w is not None:
    sizes = dict(zip(eq.x, x.code.shape, strict=True))
    count = math.prod(sizes[c] for c in eq.x if c not in eq.out)
    total += count * zero_x * zero_w
  return total


def _sum(code: jax.Array, letters: str, out: str) -> jax.Array:
  summed = tuple(i for i, c in enumerate(letters) if c not in out)
  total = jnp.sum(code, axis=summed, keepdims=True, dtype=jnp.int32)
  return arrange(total, letters, out)


def _groups(eq: Equation, w: Codes) -> int:
  """The number of groups of the kernel's last but one axis, if it is summed."""
  if w.scale.ndim < 2 or eq.w[-2] in eq.out:
    return 1
  return w.scale.shape[-2]


def _split_groups(
  eq: Equation, x: Codes, w: Codes
) -> tuple[Equation, Codes, Codes]:
  """Gives the groups an axis of their own, in front of the one they are of."""
  c = eq.w[-2]
  g = next(v for v in string.ascii_letters if v not in eq.x + eq.w)

  def split(value, letters, groups):
    if value is None or not value.ndim:
      return value
    axis = letters.index(c)
    inner = value.shape[axis] // groups
    shape = (*value.shape[:axis], groups, inner, *value.shape[axis + 1 :])
    return value.reshape(shape)

  groups = w.scale.shape[-2]
  x = Codes(split(x.code, eq.x, groups), *(split(v, eq.x, 1) for v in x[1:]))
  w = Codes(split(w.code, eq.w, groups), split(w.scale, eq.w, groups))
  both = g + c
  letters = eq.x.replace(c, both), eq.w.replace(c, both)
  return Equation(*letters, g + eq.out, eq.bias), x, w


def attention(module: Any, queries: Codes, keys: Codes) -> jax.Array:
  """The product of an attention layer, see `models.vit`.

  Args:
    module: a Scores or Context layer.
    queries: its first input.
    keys: its second input.

  Returns:
    What the layer returns for the real values, float32.
  """
  eq, power = _attention_product(module)
  y = contract(eq, queries, keys)
  return _joined_heads(module, y * queries.code.shape[-1] ** power)


def simulated_attention(
  module: Any, queries: jax.Array, keys: jax.Array
) -> jax.Array:
  """`attention` of real values, whose product is of the values themselves."""
  eq, power = _attention_product(module)
  y = multiply(eq, queries, keys)
  return _joined_heads(module, y * queries.shape[-1] ** power)


def _attention_product(module: Any) -> tuple[Equation, float]:
  """What a layer multiplies, and the power of the summed axis's size."""
  name = kind(module, _ATTENTION)
  if name is None:
    raise ValueError(
      f'{type(module).__name__} is no layer that multiplies its two inputs: '
      f'valid: {", ".join(_ATTENTION)}.'
    )
  return _ATTENTION[name]


def _joined_heads(module: Any, y: jax.Array) -> jax.Array:
  if kind(module, _ATTENTION) == 'Context':
    return y.reshape(*y.shape[:2], -1)
  return y
