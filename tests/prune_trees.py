"""Trees and gradients for the tests of pruning, and masks by a sort."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

KERNELS = [('.*/kernel', True)]
PATHS = ['blocks/kernel', 'conv/kernel', 'dense/kernel', 'zero/kernel']


def make_tree(seed=0):
  """Kernels of every kind, and what is never pruned.

  A convolution with an empty channel, a dense kernel in bfloat16 with ties, a
  stack of three scanned blocks, a kernel of zeros; biases, BatchNorm, None.
  """
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return {
    'conv': {
      'kernel': normal(3, 3, 4, 8).at[..., 2].set(0),
      'bias': normal(8),
    },
    'norm': {'scale': jnp.ones(8), 'bias': normal(8)},
    'dense': {
      'kernel': normal(16, 10).astype(jnp.bfloat16),
      'bias': None,
    },
    'blocks': {'kernel': normal(3, 8, 8), 'bias': normal(3, 8)},
    'zero': {'kernel': jnp.zeros((4, 4))},
  }


def kernels(tree):
  """Path -> kernel, as float32 NumPy arrays, in the order of the tree."""
  return {
    path: np.asarray(tree[path.split('/')[0]]['kernel'], np.float32)
    for path in PATHS
  }


def random_like(tree, seed):
  """Standard normal leaves with the shapes and dtypes of a tree."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), tree
  )


def train(tx, tree, steps, *, seed=1, grads=random_like):
  """Parameters and optimizer state after every step of a compiled loop."""

  @jax.jit
  def step(tree, state, grads):
    updates, state = tx.update(grads, state, tree)
    return optax.apply_updates(tree, updates), state

  state, history = tx.init(tree), []
  for i in range(steps):
    tree, state = step(tree, state, grads(tree, seed + i))
    history.append((tree, state))
  return history


def top(arrays, keep):
  """Masks of the `keep` largest of all arrays, by a stable sort."""
  flat = np.concatenate([np.ravel(a) for a in arrays]).astype(np.float64)
  mask = np.zeros(flat.size, bool)
  mask[np.argsort(-flat, kind='stable')[:keep]] = True
  splits = np.cumsum([a.size for a in arrays])[:-1]
  return [
    m.reshape(a.shape)
    for m, a in zip(np.split(mask, splits), arrays, strict=True)
  ]


def top_with_each(arrays, keep):
  """As `top`, but with the largest entry of every array, ties by index."""
  keep = max(keep, len(arrays))
  forced = [top([a], 1)[0] for a in arrays]
  rest = [np.where(f, np.inf, a) for f, a in zip(forced, arrays, strict=True)]
  return top(rest, keep)
