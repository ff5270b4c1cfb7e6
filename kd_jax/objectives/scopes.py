"""What a term sees of a batch that lies on several devices.

Owns the two scopes: 'global' relates all examples of the step, wherever they
are, and gives the numbers of one device; 'local' relates those of one device
only, which is what data-parallel PyTorch code computes and publishes. Owns no
loss; where arrays lie is for `kd_jax.sharding`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kd_jax.objectives.inputs import Inputs


def check_scope(scope: str) -> None:
  """Raises ValueError for another scope than 'global' and 'local'."""
  if scope not in ('global', 'local'):
    raise ValueError(f"scope={scope!r} is not 'global' or 'local'.")


def over_batch(
  loss: Callable[..., jax.Array],
  inputs: Inputs,
  scope: str,
  *arrays: jax.Array,
) -> jax.Array:
  """A loss over a batch, of the global batch or the mean over its parts.

  Args:
    loss: `(*arrays) -> scalar`.
    inputs: says how the step is mapped over devices.
    scope: 'global' or 'local'.
    *arrays: `[B, ...]`, the batch that this program sees.

  Raises:
    ValueError: for another scope, a batch that does not divide into
      `inputs.num_shards` parts, or 'local' where these are not known.
  """
  check_scope(scope)
  if scope == 'global':
    if inputs.axis_name is not None:
      arrays = jax.lax.all_gather(arrays, inputs.axis_name, tiled=True)
    return loss(*arrays)
  if inputs.axis_name is not None:
    return loss(*arrays)
  parts, size = local_parts(inputs), arrays[0].shape[0]
  if size % parts:
    raise ValueError(f'A batch of {size} has no {parts} equal local parts.')
  split = jax.tree.map(
    lambda x: x.reshape(parts, size // parts, *x.shape[1:]), arrays
  )
  return jnp.mean(jax.vmap(loss)(*split))


def local_parts(inputs: Inputs) -> int:
  """How many parts a batch has under `jit`, which does not know of devices.

  Raises:
    ValueError: under `jit` without `num_shards`.
  """
  if inputs.num_shards is None:
    raise ValueError(
      "scope='local' under jit needs make_train_step(num_shards=N), the number "
      'of devices that the batch is split over.'
    )
  return inputs.num_shards


def draw_global(
  draw: Callable[[jax.Array, tuple[int, ...]], jax.Array],
  key: jax.Array,
  shape: tuple[int, ...],
  axis_name: str | None,
) -> jax.Array:
  """This device's rows of what one device draws for the global batch.

  Args:
    draw: `(key, shape) -> array`.
    key: typed key, the same on every device.
    shape: of the rows of this device.
    axis_name: the mapped axis when the step runs per device, else None.
  """
  if axis_name is None:
    return draw(key, shape)
  rows, *rest = shape
  whole = draw(key, (rows * jax.lax.axis_size(axis_name), *rest))
  start = jax.lax.axis_index(axis_name) * rows
  return jax.lax.dynamic_slice_in_dim(whole, start, rows)
