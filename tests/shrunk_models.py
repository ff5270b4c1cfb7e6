"""A shrunk model held against the whole one whose units are at zero."""

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import prune
from kd_jax.prune.plan import axis_masks


def random_units(groups, seed=0):
  """Some units of every group to keep, at least one and never all."""
  rng = np.random.default_rng(seed)
  return {
    g.name: np.sort(rng.permutation(g.size)[: rng.integers(1, g.size)])
    for g in groups
  }


def unit_masks(plan, kept):
  """Masks that put the units that leave to zero instead of removing them."""
  made = {}
  for path, axes in axis_masks(plan, kept).items():
    if not path.startswith('params/'):
      continue
    shape = plan.shapes[path]
    mask = np.ones(shape, bool)
    for axis, kept_there in axes.items():
      spread = [1] * len(shape)
      spread[axis] = -1
      mask &= kept_there.reshape(spread)
    made[path.removeprefix('params/')] = mask
  return made


def difference(plan, kept, forward, variables, batch):
  """The largest difference between the masked and the shrunk model."""
  masks = unit_masks(plan, kept)
  params = prune.apply_masks(variables['params'], masks)
  masked = jax.jit(forward)({**variables, 'params': params}, batch)
  shrunk = jax.jit(prune.shrunk_forward(forward, plan, kept))(
    prune.shrink(plan, variables, kept), batch
  )
  masked, shrunk = (getattr(o, 'output', o) for o in (masked, shrunk))
  assert float(jnp.abs(masked).max()) > 1e-3
  return float(jnp.abs(masked - shrunk).max())
