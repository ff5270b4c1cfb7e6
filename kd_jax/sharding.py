"""Meshes and compilers: the same step on one device or many.

`compile_step` is the only place that compiles a train step. Under 'jit' the
step is written for the global batch and XLA partitions it; under 'shard_map'
and 'pmap' it runs per device on its part of the batch, and must have been
made with that mesh axis as its `axis_name`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax import rules
from kd_jax.types import Batch, Metrics, TrainState

AXIS = 'data'
SHARDED = r'objective/state/(.*/)?bank_\w+'


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A one-axis mesh named 'data' over all devices.

  Args:
    devices: the devices to use; all of them when None.
  """
  devices = jax.devices() if devices is None else list(devices)
  return jax.make_mesh(
    (len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices
  )


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
  """Puts this process's part of a batch on the devices, split over 'data'.

  Args:
    batch: host arrays `[B, ...]`, B divisible by the local devices.
    mesh: see `make_mesh`.

  Returns:
    The same dict of global `jax.Array`s.

  Raises:
    ValueError: if B does not divide over the devices.
  """
  sharding = NamedSharding(mesh, P(AXIS))
  size = len(next(iter(batch.values())))
  if size % len(mesh.local_devices):
    raise ValueError(
      f'A batch of {size} does not divide over {len(mesh.local_devices)} '
      'devices.'
    )
  return {
    key: jax.make_array_from_process_local_data(sharding, np.asarray(value))
    for key, value in batch.items()
  }


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Copies a pytree to every device of a mesh."""
  return jax.device_put(tree, NamedSharding(mesh, P()))


def state_shardings(state: Any, mesh: Mesh) -> Any:
  """Where each array of a train state lies: everywhere, or split by rows.

  Memory banks of the objective (`SHARDED`), one row per training example, are
  split over 'data' if their rows divide over it; all else is replicated.

  Args:
    state: a `TrainState`, of arrays or shapes.
    mesh: from `make_mesh`.

  Returns:
    The tree of `state`, of `NamedSharding`.
  """

  def sharding(path, leaf):
    name, devices = rules.path_name(path), mesh.devices.size
    split = re.fullmatch(SHARDED, name) and leaf.shape[0] % devices == 0
    return NamedSharding(mesh, P(AXIS) if split else P())

  return jax.tree_util.tree_map_with_path(sharding, state)


def place_state(state: TrainState, mesh: Mesh, how: str = 'jit') -> TrainState:
  """Puts a train state on the devices as a step compiled `how` wants it."""
  if how != 'jit':
    return replicate(state, mesh)
  return jax.device_put(state, state_shardings(state, mesh))


def _jit(step, mesh, donate):
  replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
  compiled = {}

  def call(state, teacher, batch, rng):
    # The shardings follow from the state, which is not known before.
    structure = jax.tree.structure(state)
    if structure not in compiled:
      placed = state_shardings(state, mesh)
      compiled[structure] = jax.jit(
        step,
        in_shardings=(placed, replicated, split, replicated),
        out_shardings=(placed, replicated),
        donate_argnums=donate,
      )
    return compiled[structure](state, teacher, batch, rng)

  return call


def _shard_map(step, mesh, donate):
  mapped = jax.shard_map(
    step, mesh=mesh, in_specs=(P(), P(), P(AXIS), P()), out_specs=P()
  )
  return jax.jit(mapped, donate_argnums=donate)


def _pmap(step, mesh, donate):
  devices = mesh.devices.size

  def split(x):
    return x.reshape(devices, x.shape[0] // devices, *x.shape[1:])

  mapped = jax.pmap(
    step,
    axis_name=AXIS,
    in_axes=(None, None, 0, None),
    out_axes=None,
    devices=list(mesh.devices.flat),
  )

  def call(state, teacher, batch, rng):
    return mapped(state, teacher, jax.tree.map(split, batch), rng)

  return call


COMPILERS = {'jit': _jit, 'shard_map': _shard_map, 'pmap': _pmap}


def axis_name(how: str) -> str | None:
  """The `axis_name` that a step compiled this way must be made with."""
  rules.choose('compiler', how, COMPILERS)
  return None if how == 'jit' else AXIS


def compile_step(
  step: Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]],
  mesh: Mesh,
  how: str = 'jit',
  *,
  donate: bool = True,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
  """Compiles a train step for a mesh, data parallel.

  Args:
    step: from `make_train_step`, made with `axis_name=axis_name(how)`.
    mesh: from `make_mesh`.
    how: 'jit' (global view, the default choice), 'shard_map', or 'pmap',
      which JAX keeps in maintenance mode. The state stays replicated, never
      stacked. The batch is that of all devices in every case.
    donate: lets the new state take the old one's memory ('jit' and
      'shard_map'); the old state cannot be used afterwards. The teacher is
      never donated.

  Returns:
    A function like `step`, traced once per batch shape.

  Raises:
    ValueError: for an unknown `how`.
  """
  compiler = rules.choose('compiler', how, COMPILERS)

  def without_teacher(state, teacher, batch, rng):
    new, metrics = step(state.replace(teacher=teacher), batch, rng)
    return new.replace(teacher=None), metrics

  compiled = compiler(without_teacher, mesh, (0,) if donate else ())

  def call(state, batch, rng):
    new, metrics = compiled(
      state.replace(teacher=None), state.teacher, dict(batch), rng
    )
    return new.replace(teacher=state.teacher), metrics

  return call
