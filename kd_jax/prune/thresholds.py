"""The largest scores, with exact counts and without a sort.

Owns the threshold between what stays and what goes. It is found by bisection on
the bits of the scores, which order as the floats do: 32 counts give the exact
k-th largest score over any number of arrays. Counts are sums, which under
sharding become all-reduces; a sort would gather the parameters. Whose scores
they are, and how many stay, is the matter of `masks` and `scopes`.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def ordered_bits(scores: jax.Array) -> jax.Array:
  """uint32 that order as float32 scores do; NaN is below -inf, -0 equals 0.

  Example:
    >>> bits = ordered_bits(jnp.array([jnp.nan, -jnp.inf, -1.0, 0.0, 2.0]))
    >>> bool((bits[1:] > bits[:-1]).all()), int(bits[0])
    (True, 0)
  """
  bits = jax.lax.bitcast_convert_type(
    jnp.asarray(scores, jnp.float32), jnp.uint32
  )
  sign, infinity = jnp.uint32(2**31), jnp.uint32(0x7F800000)
  magnitude = bits & ~sign
  negative = (bits >= sign) & (magnitude > 0)
  ordered = jnp.where(negative, ~bits, magnitude | sign)
  return jnp.where(magnitude > infinity, jnp.uint32(0), ordered)


def largest(
  scores: Sequence[jax.Array], keep: ArrayLike, *, each: bool = False
) -> list[jax.Array]:
  """Masks of the `keep` largest entries over several arrays together.

  Args:
    scores: arrays of any shapes, converted to float32. Infinities order as
      numbers do; NaN is smaller than all of them.
    keep: int32 scalar, between 0 and the total number of entries.
    each: keeps the largest entry of every array whatever the others are;
      `keep` must not be below the number of arrays then.

  Returns:
    Boolean arrays of the same shapes with exactly `keep` True in all. Among
    equal scores those of earlier arrays and lower flat indices are kept.

  Example:
    >>> masks = largest([jnp.array([3.0, 1.0]), jnp.array([1.0, 2.0])], 3)
    >>> [mask.tolist() for mask in masks]
    [[True, True], [False, True]]
    >>> masks = largest([jnp.array([3.0, 2.0]), jnp.array([1.0])], 2, each=True)
    >>> [mask.tolist() for mask in masks]
    [[True, False], [True]]
  """
  return _largest([list(scores)], jnp.reshape(jnp.int32(keep), (1,)), each)[0]


def largest_each(
  scores: Sequence[jax.Array], keeps: Sequence[ArrayLike]
) -> list[jax.Array]:
  """Masks of the largest entries of every array by itself.

  Args:
    scores: arrays of any shapes, as for `largest`.
    keeps: how many entries each array keeps, int32 scalars.

  Example:
    >>> masks = largest_each([jnp.array([3.0, 1.0]), jnp.array([1.0])], [1, 0])
    >>> [mask.tolist() for mask in masks]
    [[True, False], [False]]
  """
  keep = jnp.stack([jnp.int32(k) for k in keeps])
  return [m for [m] in _largest([[s] for s in scores], keep, False)]


# Compiled, so that calls outside of jit are compiled once per shapes.
@functools.partial(jax.jit, static_argnames='each')
def _largest(
  groups: list[list[jax.Array]], keep: jax.Array, each: bool
) -> list[list[jax.Array]]:
  """Masks of the keep[g] largest entries of every group g of arrays."""
  bits = [[ordered_bits(s) for s in group] for group in groups]
  index = [_flat_indices(group) for group in groups]
  if each:
    bits = [[_first_on_top(b) for b in group] for group in bits]

  def count(holds, limits):
    """How many entries of each group satisfy a comparison with its limit."""
    counts = [
      sum(
        jnp.sum(holds(g, i, limits[g]), dtype=jnp.int32)
        for i in range(len(group))
      )
      for g, group in enumerate(groups)
    ]
    return jnp.stack([jnp.int32(c) for c in counts])

  # The largest t with at least `keep` scores >= t is the k-th largest score.
  threshold = _bisect(
    lambda t: count(lambda g, i, t: bits[g][i] >= t, t) >= keep, len(groups), 32
  )
  above = count(lambda g, i, t: bits[g][i] > t, threshold)
  # The largest i such that the ties before i are not more than are missing.
  last = _bisect(
    lambda n: (
      count(lambda g, i, n: (bits[g][i] == threshold[g]) & (index[g][i] < n), n)
      <= keep - above
    ),
    len(groups),
    max(sum(s.size for s in group) for group in groups).bit_length(),
  )
  return [
    [
      (b > threshold[g]) | ((b == threshold[g]) & (i < last[g]))
      for b, i in zip(bits[g], index[g], strict=True)
    ]
    for g in range(len(groups))
  ]


def _bisect(
  holds: Callable[[jax.Array], jax.Array], size: int, bits: int
) -> jax.Array:
  """The `[size]` largest uint32 below 2**bits for which falling tests hold."""

  def body(i, value):
    candidate = value + (jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32))
    return jnp.where(holds(candidate), candidate, value)

  zeros = jnp.zeros(size, jnp.uint32)
  # Under shard_map the start must vary over the axes that the scores vary over.
  start = jnp.where(holds(zeros), zeros, zeros)
  return jax.lax.fori_loop(0, bits, body, start)


def _flat_indices(arrays: list[jax.Array]) -> list[jax.Array]:
  """The position of every entry in the concatenation of flat arrays."""
  indices, offset = [], 0
  for array in arrays:
    index = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
      index = index * size + jax.lax.broadcasted_iota(
        jnp.uint32, array.shape, axis
      )
    indices.append(index + offset)
    offset += array.size
  return indices


def _first_on_top(bits: jax.Array) -> jax.Array:
  """Makes the first of the largest entries larger than any score."""
  if not bits.size:
    return bits
  [index] = _flat_indices([bits])
  top = bits == jnp.max(bits)
  first = jnp.min(jnp.where(top, index, jnp.uint32(bits.size)))
  return jnp.where(index == first, jnp.uint32(2**32 - 1), bits)
