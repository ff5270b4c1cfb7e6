"""Makes student and teacher functions out of linen, nnx and plain functions.

A function made here serves as a student, `(variables, batch, rng, *, train)`,
and as a teacher, `(variables, batch)`. Owns no network and no loss. This room
and `models` are the only ones that import linen or nnx.
"""

from kd_jax.adapters.interceptors import Interceptor as Interceptor
from kd_jax.adapters.linen import LinenForward as LinenForward
from kd_jax.adapters.linen import LinenModule as LinenModule
from kd_jax.adapters.linen import from_linen as from_linen
from kd_jax.adapters.linen import init_linen as init_linen
from kd_jax.adapters.nnx import from_nnx as from_nnx
from kd_jax.adapters.plain import from_apply as from_apply
