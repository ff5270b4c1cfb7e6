"""kd_jax: distil, prune and quantize JAX models in one compiled train step.

The names here are what research code needs to train with its own models;
everything else is in the submodules, which the README's table of rooms lists.
"""

from kd_jax.adapters import from_apply as from_apply
from kd_jax.adapters import from_linen as from_linen
from kd_jax.adapters import from_nnx as from_nnx
from kd_jax.guard import drop_nonfinite as drop_nonfinite
from kd_jax.objectives import hard_labels as hard_labels
from kd_jax.objectives import regression as regression
from kd_jax.objectives import soft_targets as soft_targets
from kd_jax.objectives import term as term
from kd_jax.objectives import weighted_sum as weighted_sum
from kd_jax.sharding import compile_step as compile_step
from kd_jax.sharding import make_mesh as make_mesh
from kd_jax.step import init_state as init_state
from kd_jax.step import make_eval_step as make_eval_step
from kd_jax.step import make_train_step as make_train_step
from kd_jax.types import Forward as Forward
from kd_jax.types import TrainState as TrainState

__version__ = '0.1.0'
