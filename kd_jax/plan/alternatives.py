"""What a plan looks at besides the configuration as it is.

Owns how a configuration is changed for each alternative, and what its step
costs by arithmetic on the step as it is. Compiles nothing.
"""

import jax
import ml_collections

from kd_jax.plan import chips
from kd_jax.plan.memory import held
from kd_jax.plan.program import Program, in_numbers
from kd_jax.plan.steps import Step
from kd_jax.sharding import layout

ALTERNATIVES = {
  'cached_teacher': 'teacher outputs from a cache',
  'fsdp': 'parameters and moments split over all devices',
  'remat': "activations of the student's blocks computed twice",
  'double_batch': 'twice the batch, half the steps',
}


def change(name: str, config: ml_collections.ConfigDict, stage: str) -> None:
  """Changes a configuration in place.

  Args:
    name: of `ALTERNATIVES`; a cached teacher is none of the configuration's.
    config: see `kd_jax.defaults`.
    stage: of `steps.STAGES`.

  Raises:
    ValueError: a phrase that says what is in the way.
  """
  train = config[stage].train
  if name == 'fsdp':
    if config.compiler != 'jit':
      raise ValueError("only compiler='jit' splits parameters")
    if config.mesh.fsdp != 1:
      raise ValueError('the configuration splits them already')
    config.mesh.data, config.mesh.fsdp = 1, -1
  elif name == 'remat':
    if train.remat != 'none':
      raise ValueError('the configuration does so already')
    train.remat = 'blocks'
  elif name == 'double_batch':
    train.batch_size *= 2


def estimated(
  name: str,
  base: Program,
  step: Step,
  changed: Step,
  target: chips.Topology,
  *,
  dtype: str,
  teacher_flops: float,
  student_flops: float,
) -> Program:
  """An alternative by arithmetic on the step that was compiled.

  Args:
    name: of `ALTERNATIVES`.
    base: the configuration's own step, compiled.
    step: the same, in shapes.
    changed: the alternative's.
    target: the devices.
    dtype: as for `program.bounds`.
    teacher_flops: of the teacher's forward pass on one device.
    student_flops: likewise of the student's.
  """
  flops, hbm, ici = base.flops, base.hbm_bytes, base.ici_bytes
  if flops is None or hbm is None or ici is None:
    return Program('impossible', why='the step itself does not fit')
  memory = dict(base.memory) | held(changed, changed.run.config.compiler)
  if name == 'cached_teacher':
    hbm *= 1 - (teacher_flops / flops if flops else 0.0)
    flops -= teacher_flops
    why = 'memory traffic less by the share of FLOPs'
  elif name == 'remat':
    flops += student_flops
    why = 'temporaries as before, which is the most they can be'
  elif name == 'double_batch':
    memory['temporaries'] *= 2
    flops *= 2
    hbm *= 2
    why = 'twice the work and temporaries, the same collectives'
  else:
    n = layout.batch_parts(changed.run.mesh)
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(step.state.params))
    ici += whole * (n - 1) / n
    why = 'parameters gathered twice, gradients scattered once'
  return in_numbers(
    'estimated',
    changed,
    target,
    dtype,
    why=why,
    memory=memory,
    flops=flops,
    hbm_bytes=hbm,
    ici_bytes=ici,
  )
