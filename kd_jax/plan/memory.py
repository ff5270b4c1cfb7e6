"""What a device holds for a train step, by owner.

Owns bytes: of arrays by their shapes and shardings, and of what only the
compiler knows by its analysis.
"""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding

from kd_jax import prune
from kd_jax.plan.steps import Step
from kd_jax.sharding import layout


def held(step: Step, compiler: str = 'jit') -> dict[str, int]:
  """Bytes that a device holds between steps, by owner, without padding.

  Args:
    step: from `steps.rehearse`.
    compiler: of the step.
  """

  def of(field):
    return sum(_shard_bytes(*pair) for pair in placed(step, compiler, field))

  masks = prune.masks_of(step.state.opt_state) or {}
  mask_bytes = 0
  if masks:
    ids = {id(mask) for mask in masks.values()}
    pairs = placed(step, compiler, 'opt_state')
    mask_bytes = sum(
      _shard_bytes(*pair) for pair in pairs if id(pair[0]) in ids
    )
  split = NamedSharding(step.run.mesh, layout.BATCH)
  return {
    'student': of('params') + of('model_state'),
    'teacher': of('teacher'),
    'optimizer': of('opt_state') - mask_bytes,
    'masks': mask_bytes,
    'objective': of('objective'),
    'batch': sum(_shard_bytes(leaf, split) for leaf in step.batch.values()),
  }


def memory_of(step: Step, compiler: str, analysis: Any) -> dict[str, int]:
  """`held`, and what the compiler adds to it while a step runs.

  Args:
    step: from `steps.rehearse`.
    compiler: of the step.
    analysis: from `jax.stages.Compiled.memory_analysis`; may be None.
  """
  memory = held(step, compiler)
  if analysis is None:
    return memory
  arguments = analysis.argument_size_in_bytes
  new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  memory['padding'] = max(0, arguments - sum(memory.values()))
  memory['temporaries'] = analysis.temp_size_in_bytes + max(0, new)
  memory['program'] = analysis.generated_code_size_in_bytes
  return memory


def placed(
  step: Step, compiler: str, field: str
) -> list[tuple[Any, NamedSharding]]:
  """The leaves of a part of the state, and where they lie."""
  mesh = step.run.mesh
  if field == 'teacher':
    tree = step.state.teacher
    where = layout.teacher_shardings(tree, mesh, step.run.layout)
  else:
    student = step.state.replace(teacher=None)
    tree = getattr(student, field)
    where = getattr(
      layout.state_shardings(student, mesh, step.run.layout), field
    )
  if compiler != 'jit':
    everywhere = NamedSharding(mesh, jax.P())
    where = jax.tree.map(lambda _: everywhere, tree)
  return list(zip(jax.tree.leaves(tree), jax.tree.leaves(where), strict=True))


def _shard_bytes(leaf: Any, where: NamedSharding) -> int:
  """Bytes of an array on one device, without padding."""
  shape = where.shard_shape(leaf.shape)
  return math.prod(shape) * _itemsize(leaf.dtype)


def _itemsize(dtype: Any) -> int:
  if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
    return 8
  return dtype.itemsize
