"""Meshes of devices, and how a batch of this process gets onto one.

Owns which devices there are in which order, and which rows of a batch each
process reads. How parameters are split is `layout`; how a step is compiled for
a mesh is `compilers`.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax.sharding import hosts
from kd_jax.sharding import layout as layout_lib
from kd_jax.sharding.layout import AXES, BATCH
from kd_jax.types import Batch


def make_mesh(
  devices: Sequence[jax.Device] | None = None,
  *,
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
) -> Mesh:
  """A mesh with the axes 'data', 'fsdp' and 'tensor', see `layout`.

  Args:
    devices: the devices to use; all of them when None.
    data: devices along 'data'; -1, here or for one other axis, is as many as
      there are left.
    fsdp: along 'fsdp'.
    tensor: along 'tensor', whose neighbours lie next to each other.

  Returns:
    A mesh of three axes, always; those that are not used have size 1. They are
    automatic: the compiler moves what it must.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices.

  Example:
    >>> dict(make_mesh(jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
  open_ = [axis for axis, size in sizes.items() if size == -1]
  known = math.prod(size for size in sizes.values() if size != -1)
  bad = any(size < 1 for size in sizes.values() if size != -1)
  if bad or len(open_) > 1 or len(devices) % known:
    raise ValueError(
      f'A mesh of {sizes} does not fit {len(devices)} devices: the sizes are '
      'whole numbers that multiply to it, and one of them may be -1.'
    )
  if open_:
    sizes[open_[0]] = len(devices) // known
  elif known != len(devices):
    raise ValueError(
      f'A mesh of {sizes} has {known} devices, but there are {len(devices)}: '
      "let one axis be -1, such as 'data'."
    )
  return jax.make_mesh(
    tuple(sizes.values()),
    AXES,
    axis_types=(AxisType.Auto,) * 3,
    devices=devices,
  )


def own_mesh(mesh: Mesh) -> Mesh:
  """The devices of this process in a mesh, in its order, along 'data'.

  Args:
    mesh: from `make_mesh`, of all processes.

  Example:
    >>> mesh = make_mesh(tensor=1)
    >>> own_mesh(mesh).size == jax.local_device_count()
    True
  """
  return Mesh(
    np.reshape(mesh.local_devices, (-1, 1, 1)),
    AXES,
    axis_types=(AxisType.Auto,) * 3,
  )


def shard_batch(
  batch: Mapping[str, np.ndarray], mesh: Mesh, *, stacked: bool = False
) -> Batch:
  """Puts this process's part of a batch on the devices, split by examples.

  Args:
    batch: host arrays `[B, ...]`, B divisible by the devices of this process
      that the batch is split over; the rows that `readers` gives it.
    mesh: see `make_mesh`.
    stacked: whether the arrays are `[N, B, ...]`, for `compile_step` of
      several steps.

  Returns:
    The same dict of global `jax.Array`s.

  Raises:
    ValueError: if B does not divide over the devices.

  Example:
    >>> mesh = make_mesh(jax.devices()[:1])
    >>> batch = shard_batch({'image': np.zeros((4, 28, 28, 1))}, mesh)
    >>> batch['image'].shape, batch['image'].sharding.spec[0]
    ((4, 28, 28, 1), ('data', 'fsdp'))
  """
  sharding = NamedSharding(mesh, batch_spec(stacked))
  size = next(iter(batch.values())).shape[int(stacked)]
  parts = layout_lib.batch_parts(mesh)
  local = max(1, parts * len(mesh.local_devices) // mesh.devices.size)
  if size % local:
    raise ValueError(f'A batch of {size} does not divide over {local} devices.')
  return {
    key: jax.make_array_from_process_local_data(sharding, np.asarray(value))
    for key, value in batch.items()
  }


def readers(mesh: Mesh) -> tuple[int, int]:
  """Which part of a batch this process reads.

  Processes whose devices hold the same examples, as on a mesh whose axis
  'tensor' spans hosts, read the same part.

  Args:
    mesh: see `make_mesh`.

  Returns:
    `(part, parts)`, as `data.train_batches` takes them.

  Raises:
    ValueError: if the parts of two processes overlap.

  Example:
    >>> readers(make_mesh())
    (0, 1)
  """
  rows = layout_lib.batch_parts(mesh)
  places = NamedSharding(mesh, BATCH).devices_indices_map((rows,))
  held: dict[int, set[int]] = {}
  for device in mesh.devices.flat:
    [part] = places[device]
    held.setdefault(device.process_index, set()).update(range(rows)[part])
  parts = sorted({tuple(sorted(part)) for part in held.values()})
  if sum(map(len, parts)) != rows or len({len(part) for part in parts}) > 1:
    raise ValueError(
      f'On a mesh of {dict(mesh.shape)} the examples of two processes overlap: '
      "let 'tensor' divide the devices of a process, or be a multiple of them."
    )
  return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


@functools.cache
def connect(mesh: Mesh) -> None:
  """Lets the devices of several processes find each other before they work.

  Gloo, which joins CPUs, waits 30 s for a peer, and the first step comes after
  compilations that may differ by more. All processes call this; it is done once
  for a mesh, and nothing where one process has all of it.

  Args:
    mesh: from `make_mesh`.
  """
  if mesh.devices.size == len(mesh.local_devices):
    return
  sums = [
    axes
    for n in range(1, len(mesh.shape) + 1)
    for axes in itertools.combinations(mesh.axis_names, n)
  ]

  def add(x):
    return sum(jax.lax.psum(x, axes) for axes in sums)

  hosts.barrier()
  added = jax.jit(
    jax.shard_map(add, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
  )
  jax.block_until_ready(
    added(hosts.place(np.ones(()), NamedSharding(mesh, P())))
  )


def batch_spec(stacked: bool = False) -> P:
  """How a batch `[B, ...]`, or a stack of them `[N, B, ...]`, is split.

  Args:
    stacked: whether it is a stack.

  Example:
    >>> tuple(batch_spec()), tuple(batch_spec(stacked=True))
    ((('data', 'fsdp'),), (None, ('data', 'fsdp')))
  """
  return P(None, *BATCH) if stacked else BATCH


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Copies a pytree to every device of a mesh.

  Args:
    tree: of arrays that are equal on every process.
    mesh: from `make_mesh`.

  Example:
    >>> mesh = make_mesh()
    >>> x = replicate({'x': np.arange(3)}, mesh)['x']
    >>> x.tolist(), len(x.addressable_shards) == mesh.size
    ([0, 1, 2], True)
  """
  everywhere = NamedSharding(mesh, P())
  return jax.tree.map(lambda x: hosts.place(x, everywhere), tree)
