"""Devices and processes: meshes, layouts, and the compilers of a step.

`meshes` and `compilers` are what most callers want, and their functions are
here; `layout` says where arrays lie, `clusters` and `processes` start several
processes, `hosts` is what they tell each other, and `preemption` turns signals
into a clean end. Owns where and when things are computed, not what.
"""

from kd_jax.sharding.compilers import COMPILERS as COMPILERS
from kd_jax.sharding.compilers import CompiledStep as CompiledStep
from kd_jax.sharding.compilers import axis_name as axis_name
from kd_jax.sharding.compilers import compile_step as compile_step
from kd_jax.sharding.compilers import place_state as place_state
from kd_jax.sharding.meshes import batch_spec as batch_spec
from kd_jax.sharding.meshes import connect as connect
from kd_jax.sharding.meshes import make_mesh as make_mesh
from kd_jax.sharding.meshes import own_mesh as own_mesh
from kd_jax.sharding.meshes import readers as readers
from kd_jax.sharding.meshes import replicate as replicate
from kd_jax.sharding.meshes import shard_batch as shard_batch
