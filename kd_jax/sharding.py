"""Meshes and compilers: the same step on one device or many.

`compile_step` is the only place that compiles a train step. Under 'jit' the
step is written for the global batch and XLA partitions it, parameters too, as
`layout` says; under 'shard_map' and 'pmap' it runs per device on its part of
the batch, and must have been made with that mesh axis as its `axis_name`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax import hosts, loops, rules
from kd_jax import layout as layout_lib
from kd_jax.layout import AXES, BATCH, DATA, Layout
from kd_jax.types import Batch, Metrics, TrainState


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

  Raises:
    ValueError: if the sizes do not multiply to the number of devices.
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
  """The devices of this process in a mesh, in its order, along 'data'."""
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
    `(part, parts)`, the `process_index` and `process_count` of
    `data.train_batches`.

  Raises:
    ValueError: if the parts of two processes overlap.
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
  compilations that may differ by more. All processes call this.
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
  """How a batch `[B, ...]`, or a stack of them `[N, B, ...]`, is split."""
  return P(None, *BATCH) if stacked else BATCH


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Copies a pytree to every device of a mesh."""
  everywhere = NamedSharding(mesh, P())
  return jax.tree.map(lambda x: hosts.place(x, everywhere), tree)


def place_state(
  state: TrainState,
  mesh: Mesh,
  how: str = 'jit',
  *,
  layout: Layout = layout_lib.DEFAULT,
) -> TrainState:
  """Puts a train state on the devices as a step compiled `how` wants it."""
  if how == 'shard_map':
    return replicate(state, mesh)
  if how == 'pmap':
    # The mesh that pmap's results lie on, or its second call traces anew.
    return replicate(state, Mesh(mesh.local_devices, (DATA,)))
  student = state.replace(teacher=None)
  placed = layout_lib.state_shardings(student, mesh, layout)
  teacher = layout_lib.teacher_shardings(state.teacher, mesh, layout)
  return jax.tree.map(hosts.place, state, placed.replace(teacher=teacher))


# (state, teacher, batch, rng) -> (state, metrics)
_Step = Callable[
  [TrainState, Any, Batch, jax.Array], tuple[TrainState, Metrics]
]
# The same compiled, and what lowers it for arguments or their shapes.
_Compiled = tuple[_Step, Callable[..., jax.stages.Lowered]]


def _jit(
  step: _Step,
  mesh: Mesh,
  donate: tuple[int, ...],
  layout: Layout,
  stacked: bool,
) -> _Compiled:
  everywhere = NamedSharding(mesh, P())
  split = NamedSharding(mesh, batch_spec(stacked))
  compiled = {}

  def jitted(state, teacher):
    # The shardings follow from the state, which is not known before.
    structure = jax.tree.structure((state, teacher))
    if structure not in compiled:
      placed = layout_lib.state_shardings(state, mesh, layout)
      held = layout_lib.teacher_shardings(teacher, mesh, layout)
      compiled[structure] = jax.jit(
        step,
        in_shardings=(placed, held, split, everywhere),
        out_shardings=(placed, everywhere),
        donate_argnums=donate,
      )
    return compiled[structure]

  def call(state, teacher, batch, rng):
    return jitted(state, teacher)(state, teacher, batch, rng)

  def lower(state, teacher, batch, rng):
    return jitted(state, teacher).lower(state, teacher, batch, rng)

  return call, lower


def _check_data_parallel(mesh: Mesh, how: str) -> None:
  if mesh.shape[DATA] != mesh.devices.size:
    raise ValueError(
      f"compiler={how!r} is data parallel: the mesh's axes 'fsdp' and 'tensor' "
      f'have to be 1, not {mesh.shape["fsdp"]} and {mesh.shape["tensor"]}; '
      "use 'jit'."
    )


def _shard_map(
  step: _Step,
  mesh: Mesh,
  donate: tuple[int, ...],
  layout: Layout,
  stacked: bool,
) -> _Compiled:
  del layout
  _check_data_parallel(mesh, 'shard_map')
  split = P(None, DATA) if stacked else P(DATA)
  mapped = jax.shard_map(
    step, mesh=mesh, in_specs=(P(), P(), split, P()), out_specs=P()
  )
  compiled = jax.jit(mapped, donate_argnums=donate)
  return compiled, compiled.lower


def _pmap(
  step: _Step,
  mesh: Mesh,
  donate: tuple[int, ...],
  layout: Layout,
  stacked: bool,
) -> _Compiled:
  del donate, layout
  _check_data_parallel(mesh, 'pmap')
  devices, axis = mesh.devices.size, int(stacked)

  def split(x):
    return x.reshape(*x.shape[:axis], devices, -1, *x.shape[axis + 1 :])

  mapped = jax.pmap(
    step,
    axis_name=DATA,
    in_axes=(None, None, axis, None),
    out_axes=None,
    devices=list(mesh.devices.flat),
  )

  def call(state, teacher, batch, rng):
    return mapped(state, teacher, jax.tree.map(split, batch), rng)

  def lower(state, teacher, batch, rng):
    raise ValueError(
      "A step compiled by 'pmap' cannot be lowered: use 'jit' or 'shard_map'."
    )

  return call, lower


COMPILERS = {'jit': _jit, 'shard_map': _shard_map, 'pmap': _pmap}


def axis_name(how: str) -> str | None:
  """The `axis_name` that a step compiled this way must be made with."""
  rules.choose('compiler', how, COMPILERS)
  return None if how == 'jit' else DATA


@dataclasses.dataclass(frozen=True, eq=False)
class CompiledStep:
  """A train step as `compile_step` makes it.

  Attributes:
    traces: the shapes of the batch at every trace so far.
  """

  _call: _Step
  _lower: Callable[..., jax.stages.Lowered]
  traces: list[dict[str, tuple[int, ...]]]

  def __call__(
    self, state: TrainState, batch: Batch, rng: jax.Array
  ) -> tuple[TrainState, Metrics]:
    """One step, or one for each batch of a stack."""
    student = state.replace(teacher=None)
    new, metrics = self._call(student, state.teacher, dict(batch), rng)
    return new.replace(teacher=state.teacher), metrics

  def lower(self, state: Any, batch: Any, rng: Any) -> jax.stages.Lowered:
    """As that of `jax.jit`, for arguments or their shapes.

    Raises:
      ValueError: for a step compiled by 'pmap'.
    """
    student = state.replace(teacher=None)
    return self._lower(student, state.teacher, dict(batch), rng)


def compile_step(
  step: Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]],
  mesh: Mesh,
  how: str = 'jit',
  *,
  donate: bool = True,
  layout: Layout = layout_lib.DEFAULT,
  stacked: bool = False,
) -> CompiledStep:
  """Compiles a train step for a mesh.

  Args:
    step: from `make_train_step`, made with `axis_name=axis_name(how)`.
    mesh: from `make_mesh`.
    how: 'jit' (global view, the default choice), 'shard_map', or 'pmap',
      which JAX keeps in maintenance mode. The state stays replicated, never
      stacked. The batch is that of all devices in every case.
    layout: how parameters are split under 'jit'.
    donate: lets the new state take the old one's memory ('jit' and
      'shard_map'); the old state cannot be used afterwards. The teacher is
      never donated.
    stacked: whether the compiled function takes batches `[N, B, ...]`, makes
      N steps of them and returns metrics `[N]`.

  Returns:
    A function like `step`, traced once per batch shape. As that of `jax.jit`
    it has a method `lower`, of the same arguments or their shapes ('jit' and
    'shard_map'). Its attribute `traces` is a list that grows by the shapes of
    the batch with every trace.

  Raises:
    ValueError: for an unknown `how`.
  """
  compiler = rules.choose('compiler', how, COMPILERS)
  traces: list[dict[str, tuple[int, ...]]] = []

  def train_step(state, teacher, batch, rng):
    traces.append({name: tuple(x.shape) for name, x in batch.items()})

    def without_teacher(state, batch, rng):
      new, metrics = step(state.replace(teacher=teacher), batch, rng)
      return new.replace(teacher=None), metrics

    run = loops.several(without_teacher) if stacked else without_teacher
    return run(state, batch, rng)

  donated = (0,) if donate else ()
  call, lower = compiler(train_step, mesh, donated, layout, stacked)
  return CompiledStep(call, lower, traces)
