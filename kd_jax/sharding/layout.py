"""Where arrays lie on a mesh: from parameter paths to mesh axes.

Owns the three axes, the rules that split a student's and a teacher's
parameters, and how everything that mirrors them follows. Meshes are made in
`meshes`, and steps compiled for them in `compilers`.

- `data`: every device has a part of the batch.
- `fsdp`: likewise, and parameters, moments and masks are split too; the
  compiler gathers a layer's parameters where it needs them (Rajbhandari et
  al., "ZeRO", 2019, arXiv:1910.02054).
- `tensor`: the layers' own channels and heads are split (Shoeybi et al.,
  "Megatron-LM", 2019, arXiv:1909.08053).
"""

import math
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax import rules as rules_lib

DATA, FSDP, TENSOR = AXES = ('data', 'fsdp', 'tensor')
BATCH = P((DATA, FSDP))
# Memory banks of the objective: one row per training example.
BANKS = r'objective/state/(.*/)?bank_\w+'
# Parameter path -> the axis that `tensor` splits: outputs of what comes first
# in a block and inputs of what comes next, so that one sum joins them.
TENSOR_RULES: rules_lib.Rules[int] = (
  (r'.*/(query|key|value)/kernel', 1),
  (r'.*/(query|key|value)/bias', 0),
  (r'.*/out/kernel', 0),
  (r'.*/mlp/dense1/kernel', 1),
  (r'.*/mlp/dense1/bias', 0),
  (r'.*/mlp/dense2/kernel', 0),
  (r'.*/conv1/kernel', -1),
  (r'.*/norm1/(scale|bias|mean|var)', -1),
  (r'.*/conv2/kernel', -2),
)
# Smaller arrays are not worth a collective.
LEAST_FSDP = 2**12


class Layout(NamedTuple):
  """How the arrays of a run are split.

  Attributes:
    tensor: `(pattern, axis or None)` pairs on parameter paths, for `tensor`.
    least: entries of the smallest array that `fsdp` splits.
    teacher: axes that split the teacher too: none, 'fsdp', 'tensor' or both.

  Example:
    >>> mesh = jax.make_mesh((2, 2, 2), AXES)
    >>> own = Layout(tensor=[('wide/kernel', 1)], least=1)
    >>> tuple(param_spec('wide/kernel', (6, 8), mesh, own))
    ('fsdp', 'tensor')
  """

  tensor: rules_lib.Rules[int] = TENSOR_RULES
  least: int = LEAST_FSDP
  teacher: tuple[str, ...] = ()


DEFAULT = Layout()


def param_spec(
  path: str,
  shape: tuple[int, ...],
  mesh: Mesh,
  layout: Layout = DEFAULT,
  axes: tuple[str, ...] = (FSDP, TENSOR),
) -> P:
  """How one parameter is split.

  `tensor` splits the axis that the first matching rule names, if it divides;
  `fsdp` the largest other axis that does.

  Args:
    path: '/'-joined, without the collection.
    shape: of the parameter.
    mesh: with the axes of `AXES`.
    layout: the rules.
    axes: which of the two are used.

  Returns:
    One entry per axis of the parameter: 'fsdp', 'tensor', or None, which is
    not split. All None for what neither axis divides.

  Example:
    >>> mesh = jax.make_mesh((2, 2, 2), AXES)
    >>> tuple(param_spec('block1/mlp/dense1/kernel', (64, 256), mesh))
    ('fsdp', 'tensor')
    >>> tuple(param_spec('block1/mlp/dense1/bias', (256,), mesh))
    ('tensor',)
  """
  entries: list[str | None] = [None] * len(shape)
  axis = rules_lib.first(layout.tensor, path)
  parts = mesh.shape[TENSOR] if TENSOR in axes else 1
  if (
    parts > 1
    and axis is not None
    and -len(shape) <= axis < len(shape)
    and shape[axis] % parts == 0
  ):
    entries[axis] = TENSOR
  parts = mesh.shape[FSDP] if FSDP in axes else 1
  if parts > 1 and math.prod(shape) >= layout.least:
    fits = [i for i, n in enumerate(shape) if not entries[i] and n % parts == 0]
    if fits:
      entries[max(fits, key=lambda i: shape[i])] = FSDP
  return P(*entries)


def state_shardings(state: Any, mesh: Mesh, layout: Layout = DEFAULT) -> Any:
  """Where each array of a train state without its teacher lies.

  The student's parameters follow `param_spec`, and so does all that mirrors
  one: moments, averages, masks, statistics of its shape. Memory banks are split
  by rows, parameters of the objective by `fsdp`; the rest is everywhere.

  Args:
    state: a `TrainState`, of arrays or shapes.
    mesh: from `sharding.make_mesh`.
    layout: the rules.

  Returns:
    The tree of `state`, of `NamedSharding`.

  Example:
    >>> from kd_jax.types import ObjectiveState, TrainState
    >>> w = jax.ShapeDtypeStruct((256, 64), 'float32')
    >>> objective, moments = ObjectiveState({}, {}, ()), {'trace': {'w': w}}
    >>> state = TrainState(w, {'w': w}, {}, moments, objective, None)
    >>> mesh = jax.sharding.AbstractMesh((4, 2, 1), AXES)
    >>> placed = state_shardings(state, mesh)
    >>> tuple(placed.params['w'].spec)
    ('fsdp', None)
    >>> placed.opt_state['trace']['w'].spec == placed.params['w'].spec
    True
  """
  params = rules_lib.named_leaves(state.params)
  shapes = {name: tuple(leaf.shape) for name, leaf in params.items()}

  def spec(path, leaf):
    name, shape = rules_lib.path_name(path), tuple(leaf.shape)
    if re.fullmatch(BANKS, name):
      return BATCH if shape[0] % batch_parts(mesh) == 0 else P()
    if name.startswith('objective/'):
      return param_spec(name, shape, mesh, layout, (FSDP,))
    mirrored = rules_lib.mirrored(name, lambda end: shapes.get(end) == shape)
    if mirrored is None:
      return P()
    return param_spec(mirrored, shape, mesh, layout)

  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: NamedSharding(mesh, spec(path, leaf)), state
  )


def teacher_shardings(
  teacher: Any, mesh: Mesh, layout: Layout = DEFAULT
) -> Any:
  """Where each array of a teacher lies; see `state_shardings`.

  Args:
    teacher: its variables `{'params': ..., **collections}`, or their shapes.
    mesh: from `sharding.make_mesh`.
    layout: whose `teacher` names the axes that split it; everywhere otherwise.

  Example:
    >>> mesh = jax.sharding.AbstractMesh((4, 2, 1), AXES)
    >>> w = jax.ShapeDtypeStruct((64, 256), 'float32')
    >>> teacher = {'params': {'w': w}}
    >>> for layout in (DEFAULT, Layout(teacher=('fsdp',))):
    ...   tuple(teacher_shardings(teacher, mesh, layout)['params']['w'].spec)
    (None, None)
    (None, 'fsdp')
  """

  def spec(path, leaf):
    collection, _, name = rules_lib.path_name(path).partition('/')
    if collection != 'params':
      return P()
    return param_spec(name, tuple(leaf.shape), mesh, layout, layout.teacher)

  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: NamedSharding(mesh, spec(path, leaf)), teacher
  )


def batch_parts(mesh: Mesh) -> int:
  """Over how many devices the batch is split.

  Args:
    mesh: with the axes of `AXES`; 'data' and 'fsdp' split it, 'tensor' not.

  Example:
    >>> batch_parts(jax.sharding.AbstractMesh((4, 2, 3), AXES))
    8
  """
  return mesh.shape[DATA] * mesh.shape[FSDP]
