"""Structures against NumPy: N:M, blocks, channels, heads, and units."""

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
  top,
  top_with_each,
  train,
)

from kd_jax import prune


def _scores(seed=0):
  """Scores of a convolution, a stack of matrices and a matrix, with ties."""
  rng = np.random.default_rng(seed)
  shapes = {'conv': (3, 3, 8, 12), 'dense': (16, 10), 'stack': (3, 8, 4)}
  return {
    n: np.round(np.abs(rng.normal(size=s)), 1).astype('f')
    for n, s in shapes.items()
  }


def _compiled(structure, scope='layer'):
  run = jax.jit(lambda scores, s: structure(scores, s, scope))
  return lambda *args: {n: np.asarray(m) for n, m in run(*args).items()}


def _run(structure, scores, sparsity, scope='layer'):
  return _compiled(structure, scope)(scores, sparsity)


POOLS = {
  'l1': lambda x, axis: x.sum(axis),
  'l2': lambda x, axis: np.sqrt(np.square(x).sum(axis)),
  'mean': lambda x, axis: x.mean(axis),
}


@pytest.mark.parametrize('pool', POOLS)
@pytest.mark.parametrize('axis', [-1, -2])
def test_channels_are_the_largest_slices(axis, pool):
  scores = _scores()
  # Whole numbers, so that sums in any order are the same.
  scores = {n: np.round(10 * s) for n, s in scores.items()}
  structure = prune.channels(axis, pool=pool)

  def slices(s):
    return np.moveaxis(s, axis, 0).reshape(s.shape[axis], -1)

  pooled = {n: POOLS[pool](slices(s), 1).astype('f') for n, s in scores.items()}
  number = sum(p.size for p in pooled.values())
  for scope in ('layer', 'global'):
    run = _compiled(structure, scope)
    for sparsity in (0.0, 0.3, 0.5, 0.8):
      want = [
        top([p], p.size - round(sparsity * p.size))[0] for p in pooled.values()
      ]
      if scope == 'global':
        keep = number - round(sparsity * number)
        want = top_with_each(list(pooled.values()), keep)
      masks = run(scores, sparsity)
      for (name, mask), kept in zip(masks.items(), want, strict=True):
        assert mask.shape == scores[name].shape
        np.testing.assert_array_equal(slices(mask).all(1), kept)
        np.testing.assert_array_equal(slices(mask).any(1), kept)


@pytest.mark.parametrize('shape', ['joined', 'separate'])
def test_heads_are_equal_parts_of_an_axis(shape):
  s = np.random.default_rng(0).uniform(size=(6, 4, 3)).astype('f')
  x, axis = (s.reshape(6, 12), -1) if shape == 'joined' else (s, 1)
  masks = _run(prune.heads(4, axis), {'query': x}, 0.5)
  want = top([s.sum((0, 2))], 2)[0]
  np.testing.assert_array_equal(
    masks['query'].reshape(6, 4, 3), np.broadcast_to(want[:, None], (6, 4, 3))
  )


@pytest.mark.parametrize('pool', POOLS)
def test_blocks_reach_the_border_and_stacks_have_their_own(pool):
  scores = {'stack': _scores()['stack'], 'dense': _scores()['dense']}
  scores = {n: np.round(10 * s) for n, s in scores.items()}
  masks = _run(prune.block(3, 4, pool=pool), scores, 0.6)
  for name, s in scores.items():
    matrices = s.reshape(-1, *s.shape[-2:])
    starts = [
      (k, i, j)
      for k in range(len(matrices))
      for i in range(0, s.shape[-2], 3)
      for j in range(0, s.shape[-1], 4)
    ]
    blocks = [matrices[k, i : i + 3, j : j + 4] for k, i, j in starts]
    pooled = np.array([POOLS[pool](b.ravel(), 0) for b in blocks])
    # A mean in float32: values that differ by rounding alone would be ties.
    kept = top([pooled.astype('f')], len(starts) - round(0.6 * len(starts)))[0]
    want = np.zeros_like(matrices, bool)
    for (k, i, j), keep in zip(starts, kept, strict=True):
      want[k, i : i + 3, j : j + 4] = keep
    np.testing.assert_array_equal(masks[name].reshape(want.shape), want)


@pytest.mark.parametrize(
  ('n', 'm', 'axis'), [(2, 4, -2), (1, 4, 0), (2, 2, -1)]
)
def test_n_of_every_m_neighbours_stay(n, m, axis):
  rng = np.random.default_rng(0)
  s = np.round(np.abs(rng.normal(size=(8, 4, 6))), 1).astype('f')
  run = _compiled(prune.n_m(n, m, axis), 'global')
  for sparsity in (0.0, 0.25, 0.5, 0.9):
    mask = run({'w': s}, sparsity)['w']
    keep = max(n, m - round(sparsity * m))
    groups = np.moveaxis(s, axis, -1).reshape(-1, m)
    want = np.stack([top([g], keep)[0] for g in groups])
    np.testing.assert_array_equal(
      np.moveaxis(mask, axis, -1).reshape(-1, m), want
    )


def test_the_default_axis_of_n_m_is_the_one_that_products_sum_over():
  """Dense [in, out] and HWIO: 2 of 4 inputs of every output."""
  masks = _run(prune.n_m(2, 4), _scores(), 0.5)
  for mask in masks.values():
    groups = np.moveaxis(mask, -2, -1)
    counts = groups.reshape(*groups.shape[:-1], -1, 4).sum(-1)
    assert (counts == 2).all()


def test_shapes_that_do_not_fit_are_named():
  scores = {'head/kernel': jnp.ones((6, 10)), 'bias': jnp.ones(4)}
  with pytest.raises(ValueError, match="axis -2 of 'head/kernel'.*groups of 4"):
    prune.n_m(2, 4)(scores, 0.5, 'global')
  with pytest.raises(ValueError, match="axis -1 of 'head/kernel'.*3 parts"):
    prune.heads(3, -1)(scores, 0.5, 'global')
  for structure in (prune.channels(-2), prune.n_m(1, 2), prune.block(1, 1)):
    with pytest.raises(ValueError, match="'bias'.*has no axis -2"):
      structure(scores, 0.5, 'layer')
  with pytest.raises(ValueError, match='1 <= n <= m, not n=5, m=4'):
    prune.n_m(5, 4)
  with pytest.raises(ValueError, match='block: 0x4 is empty'):
    prune.block(0, 4)
  with pytest.raises(ValueError, match='at least 1, not 0'):
    prune.heads(0, -1)
  with pytest.raises(ValueError, match="pool 'l3'.*l1"):
    prune.channels(pool='l3')
  # Before training, not at the first pruning.
  tx = prune.prune(
    optax.sgd(0.1), prune.constant(0.5), KERNELS, structure=prune.n_m(2, 3)
  )
  with pytest.raises(ValueError, match="'blocks/kernel'.*groups of 3"):
    tx.init(make_tree())


def _tied():
  """Units of two matrices: row i of one with column i of the other."""

  def pool(scores):
    return {'units': scores['a'].sum(1) + scores['b'].sum(0)}

  def expand(kept, scores):
    a = jnp.broadcast_to(kept['units'][:, None], scores['a'].shape)
    return {'a': a, 'b': jnp.broadcast_to(kept['units'][None], (2, 4))}

  return prune.units(pool, expand)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_units_of_low_precision_are_those_of_its_values_in_float32(dtype):
  rng = np.random.default_rng(0)
  scores = jnp.asarray(np.abs(rng.normal(size=(512, 64))), dtype)
  for structure in (prune.channels(), prune.block(8, 8, pool='l2')):
    got, want = (
      structure({'w': x}, 0.5, 'layer')['w']
      for x in (scores, scores.astype(jnp.float32))
    )
    np.testing.assert_array_equal(got, want)


def test_units_may_span_parameters():
  rng = np.random.default_rng(0)
  scores = {
    n: rng.uniform(size=s) for n, s in {'a': (4, 3), 'b': (2, 4)}.items()
  }
  masks = _run(_tied(), scores, 0.25, 'global')
  kept = top([scores['a'].sum(1) + scores['b'].sum(0)], 3)[0]
  np.testing.assert_array_equal(masks['a'], np.stack([kept] * 3, 1))
  np.testing.assert_array_equal(masks['b'], np.stack([kept] * 2))
  with pytest.raises(ValueError, match="erk needs.*'units' is no parameter"):
    _run(_tied(), scores, 0.25, 'erk')


def test_units_that_were_pruned_come_last_even_below_negative_scores():
  rows = [[-9.0, -9.0], [-np.inf, -np.inf], [-1.0, -np.inf], [-2.0, -3.0]]
  masks = _run(prune.channels(0), {'w': np.array(rows, 'f')}, 0.25)
  # Within a kept row, what was pruned stays so.
  assert masks['w'].tolist() == [
    [True, True],
    [False, False],
    [True, False],
    [True, True],
  ]


STRUCTURES = {
  'unstructured': prune.unstructured(),
  'n_m': prune.n_m(2, 4),
  'block': prune.block(4, 3),
  'channels': prune.channels(),
  'heads': prune.heads(2, -1),
}


def _units_of(name, mask):
  """The mask of whole units, and whether it is made of whole units."""
  if name == 'channels':
    flat = mask.reshape(-1, mask.shape[-1])
  elif name == 'heads':
    flat = mask.reshape(-1, 2, mask.shape[-1] // 2).swapaxes(1, 2)
    flat = flat.reshape(-1, 2)
  else:
    return mask, True
  return flat.any(0), bool((flat.any(0) == flat.all(0)).all())


@pytest.mark.parametrize(
  ('name', 'scope'),
  [*((name, 'global') for name in STRUCTURES)]
  + [(name, s) for name in ('channels', 'heads') for s in ('layer', 'erk')],
)
def test_training_with_every_structure_and_scope(name, scope):
  """Exact zeros, exact counts, masks that only lose, nothing empty."""
  schedule = prune.linear(0.5, begin=1, end=5)
  tx = prune.prune(
    optax.adam(0.1),
    schedule,
    KERNELS,
    scope=scope,
    structure=STRUCTURES[name],
  )
  previous = None
  for step, (tree, state) in enumerate(train(tx, make_tree(), 6)):
    masks = {n: np.asarray(m) for n, m in prune.masks_of(state).items()}
    assert list(masks) == PATHS
    for path, kernel in kernels(tree).items():
      np.testing.assert_array_equal(kernel[~masks[path]], 0.0)
      assert masks[path].any()
      if previous is not None:
        assert not (masks[path] & ~previous[path]).any()
    previous = masks
    units = {n: _units_of(name, m) for n, m in masks.items()}
    assert all(whole for _, whole in units.values())
    counts = {n: (int(u.sum()), u.size) for n, (u, _) in units.items()}
    target = float(schedule(step))
    if name == 'n_m':
      kept = max(2, 4 - round(target * 4))
      assert all(k == size * kept / 4 for k, size in counts.values())
    elif name == 'block':
      assert step < 5 or sum(k for k, _ in counts.values()) < 420
    elif scope == 'layer':
      for kept, size in counts.values():
        assert kept == int(prune.kept_count(size, target))
    else:
      kept, size = map(sum, zip(*counts.values(), strict=True))
      assert kept == int(prune.kept_count(size, target))
  assert tree['dense']['kernel'].dtype == jnp.bfloat16
  assert tree['dense']['bias'] is None
  np.testing.assert_array_equal(tree['norm']['scale'] != 0, True)


def test_one_shot_masks_take_any_scores():
  scores = {'w': jnp.array([-1.0, 2.0, jnp.inf, -jnp.inf])}
  assert prune.masks_from(scores, 0.5)['w'].tolist() == [
    False,
    True,
    True,
    False,
  ]
  masks = prune.masks_from(
    {'w': _scores()['dense']}, 0.5, structure=prune.n_m(2, 4)
  )
  assert int(masks['w'].sum()) == 80


def test_nan_scores_are_an_error_or_the_smallest():
  scores = {'a': jnp.ones(2), 'b': jnp.array([1.0, jnp.nan, -jnp.inf])}
  with pytest.raises(ValueError, match="scores of 'b' contain NaN"):
    prune.masks_from(scores, 0.5)
  compiled = jax.jit(lambda s: prune.masks_from(s, 0.2))(scores)
  assert compiled['b'].tolist() == [True, False, True]
