"""A shrunk model held against the whole one whose units are at zero."""

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import prune


def random_units(groups, seed=0):
  """Some units of every group to keep, at least one and never all."""
  rng = np.random.default_rng(seed)
  return {
    g.name: np.sort(rng.permutation(g.size)[: rng.integers(1, g.size)])
    for g in groups
  }


def difference(plan, kept, forward, variables, batch):
  """The largest difference between the masked and the shrunk model."""
  masks = prune.unit_masks(plan, kept)
  params = prune.apply_masks(variables['params'], masks)
  masked = jax.jit(forward)({**variables, 'params': params}, batch)
  shrunk = jax.jit(prune.shrunk_forward(forward, plan, kept))(
    prune.shrink(plan, variables, kept), batch
  )
  masked, shrunk = (getattr(o, 'output', o) for o in (masked, shrunk))
  assert float(jnp.abs(masked).max()) > 1e-3
  return float(jnp.abs(masked - shrunk).max())
