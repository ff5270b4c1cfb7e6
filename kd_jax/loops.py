"""Loops inside of one compiled program: a batch in parts, steps in a row.

Owns how gradients of the parts of a batch are averaged, and how several steps
become one function. What a step does is in `step`; compiling is `sharding`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.types import Batch, TrainStep


def scan(
  body: Callable[[Any, Any], tuple[Any, Any]],
  carry: Any,
  xs: Any,
  *,
  unroll: bool | None = None,
) -> tuple[Any, Any]:
  """`jax.lax.scan`, written out where loops are slow.

  XLA runs a convolution inside of a loop on a CPU many times slower than
  outside.

  Args:
    body: `(carry, x) -> (carry, y)`.
    carry: the first one; its shapes and dtypes stay.
    xs: pytree of arrays `[N, ...]`.
    unroll: whether to write the iterations out; when None, where the program
      is compiled for CPUs.

  Returns:
    The last carry, and the ys as arrays `[N, ...]`.

  Example:
    >>> scan(lambda c, x: (c + x, c), 0, jnp.arange(4))[1].tolist()
    [0, 0, 1, 3]
  """
  if unroll is not None:
    return jax.lax.scan(body, carry, xs, unroll=unroll)
  return jax.lax.platform_dependent(
    carry,
    xs,
    cpu=functools.partial(jax.lax.scan, body, unroll=True),
    default=functools.partial(jax.lax.scan, body),
  )


def accumulate(
  gradients: Callable[..., tuple[Any, Any, Any]],
  carried: Any,
  zeros: Any,
  batch: Batch,
  rng: jax.Array,
  parts: int,
) -> tuple[Any, Any, Any]:
  """Gradients and numbers of a batch, as means over its parts in turn.

  Part p of P has the examples p, p + P, p + 2P, ...: with a batch that is
  split over devices every device has its share of every part, and no example
  moves.

  Args:
    gradients: `(carried, batch, rng, part) -> (carried, numbers, grads)`.
    carried: what one part hands on to the next.
    zeros: like the gradients.
    batch: dict of arrays `[B, ...]`.
    rng: a key; every part gets one of its own if there are several.
    parts: P; 1 calls `gradients` once, with the batch and the key as they are.

  Returns:
    `(carried, numbers, grads)`: integers among the numbers are the largest.

  Raises:
    ValueError: if P does not divide B.

  Example:
    >>> def gradients(carried, batch, rng, part):
    ...   return carried + 1, {}, jnp.mean(batch['x'])
    >>> batch = {'x': jnp.arange(6.0)}
    >>> carried, _, grad = accumulate(
    ...   gradients, jnp.int32(0), jnp.float32(0), batch, jax.random.key(0), 3)
    >>> int(carried), float(grad)
    (3, 2.5)
  """
  if parts == 1:
    return gradients(carried, batch, rng, 0)

  def split(x):
    if x.shape[0] % parts:
      raise ValueError(
        f'accumulate={parts} does not divide a batch of {x.shape[0]} examples.'
      )
    # Never [parts, B / parts, ...] at once, which would move examples.
    return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

  def body(carry, x):
    carried, total = carry
    part, own = x
    key = jax.random.fold_in(rng, part)
    carried, numbers, grads = gradients(carried, own, key, part)
    return (carried, jax.tree.map(jnp.add, total, grads)), numbers

  xs = jnp.arange(parts), jax.tree.map(split, dict(batch))
  # In bfloat16 a sum of many parts would lose the last of them.
  wide = jax.tree.map(_wide, zeros)
  (carried, total), numbers = scan(body, (carried, wide), xs)
  grads = jax.tree.map(lambda x, z: (x / parts).astype(z.dtype), total, zeros)
  return carried, jax.tree.map(_joined, numbers), grads


def _wide(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _joined(x: jax.Array) -> jax.Array:
  inexact = jnp.issubdtype(x.dtype, jnp.inexact)
  return jnp.mean(x, axis=0) if inexact else jnp.max(x, axis=0)


def several(step: TrainStep, *, unroll: bool | None = None) -> TrainStep:
  """A step that makes several, over stacked batches.

  Args:
    step: `(state, batch, rng) -> (state, metrics)`; it folds `state.step` into
      the key itself.
    unroll: see `scan`.

  Returns:
    The same for batches `[N, B, ...]`, with metrics `[N]`. Its numbers are
    those of single steps to rounding: XLA may fuse other operations.

  Example:
    >>> add = lambda s, batch, rng: (s + batch['x'].sum(), {'s': s})
    >>> state, metrics = several(add)(0.0, {'x': jnp.ones((3, 2))}, None)
    >>> float(state), metrics['s'].tolist()
    (6.0, [0.0, 2.0, 4.0])
  """

  def steps(state, batches, rng):
    def body(state, batch):
      return step(state, batch, rng)

    return scan(body, state, dict(batches), unroll=unroll)

  # What `sharding.compile_step` compares with its compiler.
  vars(steps).update(getattr(step, '__dict__', {}))
  return steps
