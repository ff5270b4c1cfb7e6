"""Where arrays lie on meshes with explicit axes, of which an axis has a name.

Owns the moves that pruning and quantization need there, and leaves other arrays
as they are: under automatic sharding the compiler moves what it must. How a run
splits its arrays is in `sharding`.
"""

import math

import jax
from jax.sharding import NamedSharding, PartitionSpec


def gathered(x: jax.Array, axis: int, *, parts: int | None = None) -> jax.Array:
  """Takes an axis of a mesh with explicit axes off an array's own axis.

  Reshapes, sorts and paddings of an explicitly sharded axis are errors. Under
  automatic sharding the compiler gathers where it must, and this does nothing.

  Args:
    x: any array.
    axis: its axis, >= 0.
    parts: equal parts into which the axis will be split; it stays sharded if
      every device has whole parts.

  Returns:
    The same values.

  Example:
    >>> with jax.set_mesh(jax.make_mesh((2, 2), ('data', 'model'))):
    ...   x = jax.device_put(
    ...     jax.numpy.ones((4, 6)), PartitionSpec('data', 'model'))
    ...   print(jax.typeof(gathered(x, 0)), jax.typeof(gathered(x, 0, parts=4)))
    float32[4,6@model] float32[4@data,6@model]
  """
  sharding = jax.typeof(x).sharding
  spec = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
  names = spec[axis] if isinstance(spec[axis], tuple) else (spec[axis],)
  names = [name for name in names if name is not None]
  devices = math.prod(sharding.mesh.shape[name] for name in names)
  if not names or (parts is not None and parts % devices == 0):
    return x
  spec[axis] = None
  sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
  return jax.sharding.reshard(x, sharding)


def replicated(x: jax.Array) -> jax.Array:
  """The whole array on every device of a mesh with explicit axes.

  Args:
    x: any array; one that is not split explicitly is returned as it is.

  Example:
    >>> x = jax.numpy.arange(4.0)
    >>> replicated(x) is x
    True
    >>> with jax.set_mesh(jax.make_mesh((2,), ('data',))):
    ...   split = jax.device_put(x, PartitionSpec('data'))
    ...   print(jax.typeof(split), jax.typeof(replicated(split)))
    float32[4@data] float32[4]
  """
  if any(part is not None for part in jax.typeof(x).sharding.spec):
    return jax.sharding.reshard(x, PartitionSpec())
  return x


def placed_like(x: jax.Array, like: jax.Array) -> jax.Array:
  """Gives an array the explicit sharding of another of its shape.

  Args:
    x: any array.
    like: the other; where it is not split, `x` is returned as it is.

  Example:
    >>> with jax.set_mesh(jax.make_mesh((2,), ('data',))):
    ...   like = jax.device_put(jax.numpy.ones(4), PartitionSpec('data'))
    ...   print(jax.typeof(placed_like(jax.numpy.zeros(4), like)))
    float32[4@data]
  """
  sharding = jax.typeof(like).sharding
  if all(name is None for name in sharding.spec):
    return x
  return jax.sharding.reshard(x, sharding)
