"""SET and RigL against NumPy: what is dropped, what is grown, what rests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from prune_trees import (
  KERNELS,
  PATHS,
  kernels,
  make_tree,
  random_like,
  top,
  train,
)

from kd_jax import optim, prune

RULES = [('w', True)]


def _update(tx):
  @jax.jit
  def update(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return update


def test_rigl_is_the_papers():
  """Drop by magnitude, grow by the dense gradient, new weights at zero."""
  rng = np.random.default_rng(0)
  options = {'stop': 12, 'every': 3, 'drop': 0.6}
  tx = prune.sparse_train(optax.sgd(0.1), 0.5, RULES, **options)
  w = rng.normal(size=(5, 8)).astype('f')
  params = {'w': jnp.asarray(w)}
  state, update = tx.init(params), _update(tx)
  mask, exchanged = np.asarray(state.masks['w']), []
  assert mask.sum() == 20
  for step in range(16):
    g = rng.normal(size=w.shape).astype('f')
    params, state = update(params, state, {'w': jnp.asarray(g)})
    if step in (3, 6, 9):
      moved = round(0.6 / 2 * (1 + np.cos(np.pi * step / 12)) * 20)
      kept = top([np.where(mask, np.abs(w), -1)], 20 - moved)[0]
      grown = top([np.where(kept, -1, np.abs(g))], moved)[0]
      # One that was dropped and grown at once keeps its value.
      w = np.where((kept | grown) & mask, w, 0)
      exchanged.append(((kept | grown) & ~mask).sum())
      mask = kept | grown
    else:
      w = np.where(mask, w - np.float32(0.1) * g, 0)
    np.testing.assert_array_equal(state.masks['w'], mask)
    np.testing.assert_allclose(params['w'], w, rtol=1e-5)
  assert min(exchanged) > 0
  assert int(state.step) == 16


@pytest.mark.parametrize(
  ('scope', 'grow'),
  [('erk', 'gradient'), ('layer', 'random'), ('global', 'gradient')],
)
def test_sparsity_is_exact_at_every_step(scope, grow):
  tx = prune.sparse_train(
    optax.adamw(0.1, weight_decay=0.1),
    0.8,
    KERNELS,
    stop=9,
    every=2,
    scope=scope,
    grow=grow,
  )
  start = make_tree()
  first = prune.masks_of(tx.init(start))
  counts = {n: int(m.sum()) for n, m in first.items()}
  size = sum(m.size for m in first.values())
  assert list(counts) == PATHS and min(counts.values()) >= 1
  if scope == 'layer':
    for name, mask in first.items():
      assert counts[name] == int(prune.kept_count(mask.size, 0.8))
  else:
    assert sum(counts.values()) == int(prune.kept_count(size, 0.8))
  if scope == 'erk':
    densities = prune.erk_densities({n: m.shape for n, m in first.items()}, 0.8)
    for name, mask in first.items():
      assert abs(counts[name] - float(densities[name]) * mask.size) < 1.01
  previous, changes = first, []
  for tree, state in train(tx, start, 12):
    masks = prune.masks_of(state)
    assert {n: int(m.sum()) for n, m in masks.items()} == counts
    for name, kernel in kernels(tree).items():
      np.testing.assert_array_equal(kernel[~np.asarray(masks[name])], 0.0)
    changes.append(any((masks[n] != previous[n]).any() for n in masks))
    previous = masks
    assert float(state.sparsity) == pytest.approx(0.8)
  # Near the end a share may round to no weight at all.
  assert {2, 4} <= set(np.flatnonzero(changes)) <= {2, 4, 6, 8}


def test_random_growth_takes_all_and_other_weights_each_time():
  """SET: chance decides among those that are left, by seed, path and step."""
  options = {'stop': 1000, 'every': 1, 'grow': 'random'}
  params = {'w': jnp.arange(1.0, 41.0)}
  runs = []
  for seed in (0, 0, 1):
    wrapper = prune.sparse_train(
      optax.sgd(0.0), 0.5, RULES, seed=seed, **options
    )
    update, state, tree = _update(wrapper), wrapper.init(params), params
    grown = []
    for _ in range(8):
      old = state.masks['w']
      tree, state = update(tree, state, {'w': jnp.zeros(40)})
      grown.append(np.flatnonzero(state.masks['w'] & ~old).tolist())
    runs.append(grown)
  assert runs[0] == runs[1] != runs[2]
  # Not the first by index, as ties would give, and not the same each time.
  places = [i for grown in runs[0] for i in grown]
  assert len(set(places)) > 8 and max(places) > 20
  assert runs[0][2] != runs[0][3]


def _inner(name):
  return {
    'adam': lambda: optax.adam(0.1),
    'adagrad': lambda: optim.make_optimizer('adagrad', learning_rate=0.1),
    'averaged': lambda: optim.average_params(
      optax.sgd(0.1, momentum=0.9), decay=0.5
    ),
    'decay': lambda: optim.make_optimizer(
      'adamw', learning_rate=0.1, l2=0.1, decayed='w'
    ),
    'multi': lambda: optax.multi_transform(
      {'a': optax.adam(0.1), 'b': optax.sgd(0.1)}, {'w': 'a', 'b': 'b'}
    ),
  }[name]()


# What holds the past of a weight, and what a new weight has there.
MEMORY = {
  'adam': {'mu': 0.0, 'nu': 0.0},
  'adagrad': {'sum_of_squares': 0.1},
  'averaged': {'trace': 0.0, 'average': 0.0},
  'decay': {'mu': 0.0, 'nu': 0.0},
  'multi': {'mu': 0.0, 'nu': 0.0},
}


@pytest.mark.parametrize('name', MEMORY)
def test_an_exchange_moves_nothing_and_new_weights_have_no_past(name):
  # Masks made dense by hand, so that all weights have a past.
  tx = prune.sparse_train(_inner(name), 0.5, RULES, stop=9, every=2)
  rng = np.random.default_rng(0)

  def normal():
    return {
      'w': jnp.asarray(rng.normal(size=(4, 5)), jnp.float32),
      'b': jnp.asarray(rng.normal(size=3), jnp.float32),
    }

  params = normal()
  state, update = tx.init(params), _update(tx)
  mask = state.masks['w']
  state = state._replace(masks={'w': jnp.ones_like(mask)})
  for _ in range(2):
    params, state = update(params, state, normal())
  state = state._replace(masks={'w': mask})
  params['w'] = jnp.where(mask, params['w'], 0)
  new, after = update(params, state, normal())
  stays = np.asarray(mask & after.masks['w'])
  grown = np.asarray(after.masks['w'] & ~mask)
  assert 0 < grown.sum() <= round(0.15 * (1 + np.cos(np.pi * 2 / 9)) * 10)
  np.testing.assert_array_equal(new['b'], params['b'])
  np.testing.assert_array_equal(new['w'], np.where(stays, params['w'], 0))
  for key, fresh in MEMORY[name].items():
    old = optax.tree.get(state.inner, key)['w']
    got = optax.tree.get(after.inner, key)['w']
    assert (np.asarray(old)[grown] != np.float32(fresh)).all()
    np.testing.assert_array_equal(
      got, np.where(grown, np.float32(fresh), old), err_msg=key
    )
  for old, got in zip(
    jax.tree.leaves(state.inner), jax.tree.leaves(after.inner), strict=True
  ):
    if np.ndim(old) != 2:
      np.testing.assert_array_equal(old, got)


def test_nan_exchanges_nothing():
  tx = prune.sparse_train(optax.sgd(0.1), 0.5, RULES, stop=9, every=1, drop=1.0)
  params = {'w': jnp.arange(1.0, 9.0)}
  state, update = tx.init(params), _update(tx)
  params, state = update(params, state, {'w': jnp.ones(8)})
  _, broken = update(params, state, {'w': jnp.full(8, jnp.nan)})
  _, fine = update(params, state, {'w': jnp.ones(8)})
  np.testing.assert_array_equal(broken.masks['w'], state.masks['w'])
  assert (fine.masks['w'] != state.masks['w']).any()


def test_the_first_forward_can_be_sparse_too():
  tx = prune.sparse_train(optax.adam(0.1), 0.9, KERNELS, stop=9)
  start = make_tree()
  state, update = tx.init(start), _update(tx)
  sparse = prune.apply_masks(start, prune.masks_of(state))
  grads = random_like(start, 0)
  for tree in (start, sparse):
    new, _ = update(tree, state, grads)
    for name, kernel in kernels(new).items():
      np.testing.assert_array_equal(kernel[~np.asarray(state.masks[name])], 0.0)


def test_arguments_out_of_range_are_named():
  make = functools.partial(
    prune.sparse_train, optax.sgd(0.1), sparsity=0.5, rules=RULES, stop=9
  )
  for option in (
    {'sparsity': 1.0},
    {'drop': 0.0},
    {'drop': 1.5},
    {'every': 0},
    {'stop': -1},
  ):
    [(name, value)] = option.items()
    with pytest.raises(ValueError, match=f'not .*{name}={value}'):
      make(**option)
  with pytest.raises(ValueError, match="Unknown grow 'up'.*gradient"):
    make(grow='up')
  with pytest.raises(ValueError, match="scope 'local'"):
    make(scope='local')
  params = {'w': jnp.ones(2)}
  with pytest.raises(ValueError, match='needs the parameters'):
    make().update(params, make().init(params))
  with pytest.raises(ValueError, match='matches nothing'):
    make(rules=[('v', True)]).init(params)
