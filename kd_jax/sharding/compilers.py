"""Three compilers of a step: the same step on one device or many.

Owns neither the step nor where arrays lie. `compile_step` is the only place
that compiles a train step. Under 'jit' the step is written for the global batch
and XLA partitions it, parameters too, as `layout` says; under 'shard_map' and
'pmap' it runs per device on its part of the batch, and must have been made with
that mesh axis as its `axis_name`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax import loops, rules
from kd_jax.sharding import hosts
from kd_jax.sharding import layout as layout_lib
from kd_jax.sharding.layout import DATA, Layout
from kd_jax.sharding.meshes import batch_spec, replicate
from kd_jax.types import Batch, Metrics, TrainState, TrainStep


def place_state(
  state: TrainState,
  mesh: Mesh,
  compiler: str = 'jit',
  *,
  layout: Layout = layout_lib.DEFAULT,
) -> TrainState:
  """Puts a train state on the devices as a step of that `compiler` wants it.

  Args:
    state: of arrays in host memory or on any device.
    mesh: from `make_mesh`.
    compiler: of `compile_step`: 'jit' splits what `layout` says, the others
      copy the state to every device.
    layout: how parameters are split under 'jit'.

  Returns:
    The state with the same values.

  Example:
    >>> from kd_jax.sharding import make_mesh
    >>> from kd_jax.types import ObjectiveState
    >>> state = TrainState(
    ...   jax.numpy.int32(0), {'w': jax.numpy.ones((64, 128))}, {}, (),
    ...   ObjectiveState({}, {}, ()), None)
    >>> mesh = make_mesh(jax.devices()[:1])
    >>> place_state(state, mesh).params['w'].sharding.mesh.shape['data']
    1
  """
  if compiler == 'shard_map':
    return replicate(state, mesh)
  if compiler == 'pmap':
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


def _check_data_parallel(mesh: Mesh, compiler: str) -> None:
  if mesh.shape[DATA] != mesh.devices.size:
    raise ValueError(
      f"compiler={compiler!r} is data parallel: the mesh's axes 'fsdp' and "
      f"'tensor' have to be 1, not {mesh.shape['fsdp']} and "
      f"{mesh.shape['tensor']}; use 'jit'."
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


def axis_name(compiler: str) -> str | None:
  """The `axis_name` that a step of this compiler must be made with.

  Args:
    compiler: 'jit', 'shard_map' or 'pmap'.

  Raises:
    ValueError: for another compiler.

  Example:
    >>> axis_name('jit'), axis_name('shard_map')
    (None, 'data')
  """
  rules.choose('compiler', compiler, COMPILERS)
  return None if compiler == 'jit' else DATA


@dataclasses.dataclass(frozen=True, eq=False)
class CompiledStep:
  """A train step as `compile_step` makes it.

  Attributes:
    traces: the shapes of the batch at every trace so far, as the step sees
      it: of the global batch under 'jit', else of one device's part.
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
  step: TrainStep,
  mesh: Mesh,
  compiler: str = 'jit',
  *,
  donate: bool = True,
  layout: Layout = layout_lib.DEFAULT,
  stacked: bool = False,
) -> CompiledStep:
  """Compiles a train step for a mesh.

  Args:
    step: from `make_train_step`, made with `axis_name=axis_name(compiler)`.
      Made without, 'pmap' trains on the first device's examples alone.
    mesh: from `make_mesh`.
    compiler: 'jit' (global view, the default choice), 'shard_map', or 'pmap',
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
    the batch with every trace, see `CompiledStep`.

  Raises:
    ValueError: for an unknown compiler, a step that was made for another, or
      for 'shard_map' or 'pmap' on a mesh with more than one device along 'fsdp'
      or 'tensor'.

  Example:
    >>> import numpy as np
    >>> import optax
    >>> from kd_jax.objectives import term
    >>> from kd_jax.sharding import make_mesh, shard_batch
    >>> from kd_jax.step import init_state, make_train_step
    >>> from kd_jax.types import Forward
    >>> mesh = make_mesh()
    >>> student_fn = lambda v, batch, rng, *, train: Forward(
    ...   batch['x'] * v['params'].reshape(1))
    >>> objective = term(lambda inputs: inputs.student.output)
    >>> tx, batch = optax.sgd(1.0), {'x': np.ones(8 * mesh.size, np.float32)}
    >>> state = init_state(
    ...   student_fn, objective, tx, {'params': jax.numpy.array([3.0])}, batch)
    >>> step = compile_step(make_train_step(student_fn, objective, tx), mesh)
    >>> state, metrics = step(
    ...   place_state(state, mesh), shard_batch(batch, mesh), jax.random.key(0))
    >>> float(metrics['loss/total']), state.params.tolist(), len(step.traces)
    (3.0, [2.0], 1)
  """
  expected = axis_name(compiler)
  if getattr(step, 'axis_name', expected) != expected:
    raise ValueError(
      f'compiler={compiler!r} needs a step that was made with '
      f'make_train_step(axis_name={expected!r}); see axis_name(compiler).'
    )
  compiled = COMPILERS[compiler]
  traces: list[dict[str, tuple[int, ...]]] = []

  def train_step(state, teacher, batch, rng):
    traces.append({name: tuple(x.shape) for name, x in batch.items()})

    def without_teacher(state, batch, rng):
      new, metrics = step(state.replace(teacher=teacher), batch, rng)
      return new.replace(teacher=None), metrics

    run = loops.several(without_teacher) if stacked else without_teacher
    return run(state, batch, rng)

  donated = (0,) if donate else ()
  call, lower = compiled(train_step, mesh, donated, layout, stacked)
  return CompiledStep(call, lower, traces)
