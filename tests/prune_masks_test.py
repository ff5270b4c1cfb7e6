"""Masks: exact counts in every scope, order of all floats, ties by index."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prune_trees import KERNELS, kernels, make_tree, top

from kd_jax import prune

ALL = [('.*', True)]
SPARSITIES = [0.0, 0.01, 0.25, 1 / 3, 0.5, 0.625, 0.8, 0.9, 0.99, 0.9999]


def _arrays(kind):
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 3, 5)), rng.normal(size=(7, 4))
  values = {
    'random': (a, b),
    'ties': (np.round(a), np.round(b)),
    'equal': (np.ones_like(a), np.ones_like(b)),
    'zeros': (np.zeros_like(a), np.zeros_like(b)),
    'mostly_zeros': (a * (np.abs(a) > 1.5), b * (np.abs(b) > 1.5)),
    'tiny_and_huge': (a * 1e-38, b * 1e38),
  }[kind]
  return {n: v.astype('f') for n, v in zip(('a', 'b'), values, strict=True)}


KINDS = ['random', 'ties', 'equal', 'zeros', 'mostly_zeros', 'tiny_and_huge']


@pytest.mark.parametrize('scope', ['global', 'layer'])
@pytest.mark.parametrize('kind', KINDS)
def test_masks_are_those_of_a_stable_sort_at_every_sparsity(kind, scope):
  params = _arrays(kind)
  masks_at = jax.jit(
    lambda sparsity: prune.magnitude_masks(params, sparsity, ALL, scope=scope)
  )
  for sparsity in SPARSITIES:
    masks = masks_at(sparsity)
    groups = [['a', 'b']] if scope == 'global' else [['a'], ['b']]
    for names in groups:
      arrays = [np.abs(params[n]) for n in names]
      size = sum(a.size for a in arrays)
      keep = max(size - round(sparsity * size), 1)
      assert sum(int(masks[n].sum()) for n in names) == keep
      for name, want in zip(names, top(arrays, keep), strict=True):
        np.testing.assert_array_equal(masks[name], want)


def test_largest_agrees_with_a_sort_for_every_count():
  """Over several arrays, signs, infinities, both zeros and NaN."""
  rng = np.random.default_rng(1)
  a = np.round(rng.normal(size=(3, 4)), 1).astype('f')
  a[0, :3] = [-np.inf, np.inf, np.nan]
  b = np.array([-0.0, 0.0, 0.5, -0.5, np.inf, -1e-45, 1e-45], 'f')
  scores = [jnp.asarray(a), jnp.asarray(b)]
  run = jax.jit(lambda keep: prune.largest(scores, keep))
  # NaN is below everything; 0 and -0 are equal.
  ordered = [
    np.where(np.isnan(x), -1e300, x.astype(np.float64)) for x in (a, b)
  ]
  ordered = [np.where(np.isneginf(x), -1e200, x) for x in ordered]
  for keep in range(a.size + b.size + 1):
    for got, want in zip(run(keep), top(ordered, keep), strict=True):
      np.testing.assert_array_equal(got, want)


def test_bfloat16_weights_are_counted_exactly_too():
  w = jnp.asarray(_arrays('random')['b'], jnp.bfloat16)
  mask = prune.magnitude_masks({'w': w}, 0.5, ALL)['w']
  assert int(mask.sum()) == 14
  assert jnp.abs(w[mask]).min() >= jnp.abs(w[~mask]).max()


def test_rules_choose_what_is_pruned():
  params = {'a': {'kernel': jnp.arange(4.0), 'bias': jnp.zeros(2)}}
  masks = prune.magnitude_masks(params, 0.5, [('.*/kernel', True)])
  assert set(masks) == {'a/kernel'}
  masked = prune.apply_masks(params, masks)
  np.testing.assert_array_equal(masked['a']['kernel'], [0, 0, 2, 3])
  np.testing.assert_array_equal(masked['a']['bias'], params['a']['bias'])


def test_bad_rules_and_scopes_are_named():
  params = {'kernel': jnp.ones(2)}
  with pytest.raises(ValueError, match="pruning rule 'kernl' matches nothing"):
    prune.magnitude_masks(params, 0.5, [('kernl', True)])
  with pytest.raises(ValueError, match='choose no parameter'):
    prune.magnitude_masks(params, 0.5, [('.*', None)])
  with pytest.raises(ValueError, match="scope 'globl'.*mean global"):
    prune.magnitude_masks(params, 0.5, ALL, scope='globl')


def test_kept_counts_are_those_of_exact_arithmetic():
  """Decimals as decimals, other float32 as they are, halves to even."""
  sizes = [1, 2, 3, 5, 15, 25, 150, 10_000, 2**24 + 1, 2**24 + 3, 10**9 + 7]
  sizes += [2**31 - 1, 2**15, 3 * 2**20 + 5]
  decimals = [Fraction(n, 10_000) for n in (0, 1, 700, 1250, 2500, 3333, 7000)]
  decimals += [Fraction(n, 10_000) for n in (9000, 9500, 9990, 9999)]
  rng = np.random.default_rng(0)
  others = [Fraction(float(s)) for s in rng.uniform(0.01, 1, 40).astype('f')]
  others += [Fraction(float(np.float32(1 / 3))), Fraction(5, 2**20)]
  counts = jax.jit(lambda s: [prune.kept_count(size, s) for size in sizes])
  for sparsity in decimals + others:
    got = counts(np.float32(float(sparsity)))
    for size, count in zip(sizes, got, strict=True):
      want = max(size - round(sparsity * size), 1)
      assert int(count) == want, (size, float(sparsity))
  assert int(prune.kept_count(15, 0.9)) == 1  # 13.5 is rounded to 14.
  assert int(prune.kept_count(25, 0.9)) == 3  # 22.5 is rounded to 22.
  assert int(prune.kept_count(0, 0.5)) == 0
  with pytest.raises(ValueError, match='2147483648 weights are too many'):
    prune.kept_count(2**31, 0.5)


def test_shares_below_nothing_and_beyond_all_are_clipped():
  for size in (1, 10, 2**31 - 1):
    assert int(prune.kept_count(size, -0.5)) == size
    assert int(prune.kept_count(size, 1.0)) == 1
    assert int(prune.kept_count(size, 2.0)) == 1


def test_a_global_threshold_empties_no_layer_and_keeps_the_total():
  params = {
    'large': 10 + jnp.arange(96.0),
    'small': jnp.array([0.1, 0.3, 0.3, 0.2]),
  }

  @jax.jit
  def run(sparsity):
    plain = prune.magnitude_masks(params, sparsity, ALL)
    kept = prune.magnitude_masks(params, sparsity, ALL, at_least_one=True)
    return plain, kept, prune.masks_from(params, sparsity)

  for sparsity, keep in ((0.5, 50), (0.9, 10), (0.98, 2), (0.995, 2)):
    plain, *kept = run(sparsity)
    # The bare formula may leave a layer empty, and count on.
    assert not plain['small'].any()
    assert int(plain['large'].sum()) == int(prune.kept_count(100, sparsity))
    for masks in kept:
      assert masks['small'].tolist() == [False, True, False, False]
      assert int(masks['large'].sum()) == keep - 1
      assert bool(masks['large'][1 - keep :].all())


def _paper_densities(shapes, sparsity):
  """Section 3 of 1911.11134: dense layers leave, eps is solved again."""
  raw = {n: sum(s) / np.prod(s) for n, s in shapes.items()}
  sizes = {n: np.prod(s) for n, s in shapes.items()}
  dense, total = set(), sum(sizes.values())
  keep = total - round(sparsity * total)
  while True:
    rest = [n for n in shapes if n not in dense]
    eps = keep - sum(sizes[n] for n in dense)
    eps /= sum(raw[n] * sizes[n] for n in rest)
    above = {n for n in rest if eps * raw[n] > 1}
    if not above:
      return {n: 1.0 if n in dense else eps * raw[n] for n in shapes}
    # One at a time, as several at once may overshoot.
    dense.add(max(above, key=raw.get))


SHAPES = {
  'stem': (3, 3, 3, 16),
  'conv': (3, 3, 16, 64),
  'point': (1, 1, 64, 128),
  'dense': (128, 10),
  'tiny': (4, 3),
}


def test_erk_densities_and_masks_are_the_papers():
  rng = np.random.default_rng(0)
  params = {n: rng.normal(size=s).astype('f') for n, s in SHAPES.items()}
  size = sum(w.size for w in params.values())

  @jax.jit
  def run(sparsity):
    masks = prune.magnitude_masks(params, sparsity, ALL, scope=prune.erk())
    return prune.erk_densities(SHAPES, sparsity), masks

  for sparsity in (0.1, 0.5, 0.8, 0.95, 0.99):
    densities, masks = run(sparsity)
    want = _paper_densities(SHAPES, sparsity)
    total = sum(int(m.sum()) for m in masks.values())
    assert total == size - round(sparsity * size)
    for name, mask in masks.items():
      assert float(densities[name]) == pytest.approx(want[name], rel=1e-5)
      kept = int(mask.sum())
      assert abs(kept - want[name] * mask.size) < 1.01, name
      np.testing.assert_array_equal(mask, top([np.abs(params[name])], kept)[0])


def test_erk_counts_are_exact_where_almost_nothing_or_all_is_left():
  params = {n: jnp.ones(s) for n, s in SHAPES.items()}
  size = sum(w.size for w in params.values())
  masks_at = jax.jit(
    lambda s: prune.magnitude_masks(params, s, ALL, scope='erk')
  )
  for sparsity in (0.0, 0.0001, 0.003, 0.9995, 0.9999):
    counts = {n: int(m.sum()) for n, m in masks_at(sparsity).items()}
    assert sum(counts.values()) == max(size - round(sparsity * size), 5)
    assert min(counts.values()) >= 1
    assert all(counts[n] <= params[n].size for n in params)


def test_erk_counts_on_what_is_left_of_each_layer():
  """-inf marks what was pruned before; the total is exact all the same."""
  gone = jnp.full(9, -jnp.inf)
  scores = {
    'a': jnp.concatenate([gone, jnp.ones(1)]),
    'b': jnp.arange(10.0),
    'c': jnp.concatenate([jnp.ones(9), gone[:1]]),
  }
  masks = prune.masks_from(scores, 0.5, scope='erk')
  counts = {n: int(m.sum()) for n, m in masks.items()}
  assert counts['a'] == 1 and sum(counts.values()) == 15
  for name, mask in masks.items():
    assert not np.any(mask & np.isneginf(scores[name]))
  # Where that is less than is asked for, the share of each layer is kept.
  masks = prune.masks_from(scores, 0.1, scope='erk')
  assert {n: int(m.sum()) for n, m in masks.items()} == {'a': 9, 'b': 9, 'c': 9}


def test_erk_leaves_out_the_axis_of_stacked_layers():
  shapes = {'blocks/kernel': (6, 32, 32), 'head/kernel': (32, 32)}
  densities = jax.jit(
    lambda s: [
      prune.erk_densities(shapes, s, stacked=names)
      for names in (None, 'blocks/.*')
    ]
  )
  plain, stacked = densities(0.8)
  assert float(stacked['blocks/kernel']) == pytest.approx(0.2, abs=1e-4)
  assert float(stacked['head/kernel']) == pytest.approx(0.2, abs=1e-4)
  assert float(plain['blocks/kernel']) < 0.19
  params = {n: jnp.arange(np.prod(s)).reshape(s) for n, s in shapes.items()}
  scope = prune.erk(stacked='blocks/.*')
  masks = jax.jit(
    lambda params: prune.magnitude_masks(params, 0.8, ALL, scope=scope)
  )(params)
  assert int(masks['head/kernel'].sum()) == 205


@pytest.mark.parametrize('scope', ['global', 'layer', 'erk'])
def test_properties_of_magnitude_masks(scope):
  """Exact; equal for scaled weights; whatever the order of the leaves."""
  masks_of = jax.jit(
    lambda tree, s: prune.magnitude_masks(
      tree, s, KERNELS, scope=scope, at_least_one=True
    )
  )
  rng = np.random.default_rng(0)
  # Distinct magnitudes, whose order no tie decides.
  start = make_tree()
  names = kernels(start)
  sizes = [w.size for w in names.values()]
  for _ in range(5):
    values = np.split(
      rng.permutation(sum(sizes)).astype('f') + 1, np.cumsum(sizes)[:-1]
    )
    arrays = dict(zip(names, values, strict=True))
    shaped = {n: a.reshape(names[n].shape) for n, a in arrays.items()}
    tree = {n.split('/')[0]: {'kernel': w} for n, w in shaped.items()}
    sparsity = round(rng.uniform(0, 0.99), 2)
    masks = masks_of(tree, sparsity)
    kept = {n: int(m.sum()) for n, m in masks.items()}
    assert min(kept.values()) >= 1
    if scope == 'layer':
      for name, count in kept.items():
        assert count == int(prune.kept_count(masks[name].size, sparsity))
    else:
      assert sum(kept.values()) == int(prune.kept_count(sum(sizes), sparsity))
    scaled = masks_of(jax.tree.map(lambda w: -3.7 * w, tree), sparsity)
    # The same leaves in the opposite order.
    order = {f'{9 - i}{n}': w for i, (n, w) in enumerate(tree.items())}
    turned = masks_of(order, sparsity)
    for i, name in enumerate(tree):
      np.testing.assert_array_equal(
        masks[f'{name}/kernel'], scaled[f'{name}/kernel']
      )
      np.testing.assert_array_equal(
        masks[f'{name}/kernel'], turned[f'{9 - i}{name}/kernel']
      )


def test_empty_parameters_are_no_trouble():
  params = {'empty': jnp.zeros((0, 3)), 'w': jnp.arange(4.0)}
  for scope in ('global', 'layer', 'erk'):
    masks = prune.magnitude_masks(params, 0.5, ALL, scope=scope)
    assert masks['empty'].shape == (0, 3)
    assert masks['w'].tolist() == [False, False, True, True]
