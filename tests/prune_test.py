"""Pruning: exact counts, exact zeros, schedules, sharded thresholds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kd_jax import optim, prune, sharding

ALL = [('.*', True)]
SPARSITIES = [0.0, 0.01, 0.25, 1 / 3, 0.5, 0.625, 0.8, 0.9, 0.99, 0.9999]


def _numpy_masks(arrays, keep):
  """The `keep` largest of all arrays; ties by order: a stable sort."""
  flat = np.concatenate([np.ravel(a) for a in arrays]).astype(np.float64)
  mask = np.zeros(flat.size, bool)
  mask[np.argsort(-flat, kind='stable')[:keep]] = True
  splits = np.cumsum([a.size for a in arrays])[:-1]
  return [m.reshape(a.shape) for m, a in zip(np.split(mask, splits), arrays)]


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
  return {n: v.astype('f') for n, v in zip(('a', 'b'), values)}


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
      for name, want in zip(names, _numpy_masks(arrays, keep)):
        np.testing.assert_array_equal(masks[name], want)


def test_largest_agrees_with_a_sort_for_every_count():
  scores = np.abs(np.round(np.random.default_rng(1).normal(size=9), 1))
  scores = scores.astype('f')
  run = jax.jit(lambda keep: prune.largest([jnp.asarray(scores)], keep)[0])
  for keep in range(1, 10):
    np.testing.assert_array_equal(run(keep), _numpy_masks([scores], keep)[0])


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
  with pytest.raises(ValueError, match='matches nothing'):
    prune.prune(optax.sgd(1.0), prune.constant(0.5), [('x', True)]).init(params)


def _cubic(step, *, final, begin, end, every, initial):
  if step < begin:
    return 0.0
  held = end if step >= end else begin + (step - begin) // every * every
  left = 1 - (held - begin) / (end - begin)
  return final + (initial - final) * left**3


@pytest.mark.parametrize(
  'options',
  [
    {'final': 0.8, 'begin': 2, 'end': 12, 'every': 1, 'initial': 0.0},
    {'final': 0.9, 'begin': 0, 'end': 10, 'every': 3, 'initial': 0.2},
    {'final': 0.5, 'begin': 5, 'end': 6, 'every': 10, 'initial': 0.1},
  ],
)
def test_cubic_schedule_is_the_papers(options):
  options = dict(options)
  final = options.pop('final')
  schedule = jax.jit(prune.cubic(final, **options))
  for step in range(20):
    want = _cubic(step, final=final, **options)
    assert float(schedule(step)) == pytest.approx(want, abs=1e-6), step
  # Exactly the final one at the end, so that it is reached at all.
  assert schedule(options['end']) == np.float32(final)


def test_bad_schedules_are_named():
  for sparsity in (-0.1, 1.0, 2.0):
    with pytest.raises(ValueError, match=r'in \[0, 1\)'):
      prune.cubic(sparsity, begin=0, end=1)
    with pytest.raises(ValueError, match=r'in \[0, 1\)'):
      prune.constant(sparsity)
  for options in ({'begin': 3, 'end': 3}, {'begin': -1, 'end': 3}):
    with pytest.raises(ValueError, match='begin < end'):
      prune.cubic(0.5, **options)
  with pytest.raises(ValueError, match='every >= 1'):
    prune.cubic(0.5, begin=0, end=3, every=0)


OPTIMIZERS = {
  'sgd': {'name': 'sgd'},
  'momentum': {'name': 'momentum'},
  'nesterov': {'name': 'nesterov', 'l1': 0.1},
  'adamw': {'name': 'adamw', 'l2': 0.5, 'decay': '.*'},
  'lion': {'name': 'lion', 'l2': 0.5, 'decay': '.*'},
  'accumulated': {'name': 'momentum', 'accumulate': 3},
  'averaged': {'name': 'momentum', 'average': 0.5},
}


def _optimizer(name, *, average=None, **options):
  options = {'decay': 'kernel'} | options
  tx = optim.make_optimizer(name, learning_rate=0.1, **options)
  return tx if average is None else optim.average_params(tx, decay=average)


def _train(tx, steps=12):
  """The states and parameters after every step, with random gradients."""
  rng = np.random.default_rng(0)
  params = {
    'kernel': jnp.asarray(rng.normal(size=(6, 5)), jnp.float32),
    'bias': jnp.asarray(rng.normal(size=5), jnp.float32),
  }
  state, history = tx.init(params), []

  @jax.jit
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(steps):
    grads = jax.tree.map(
      lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params
    )
    params, state = step(params, state, grads)
    history.append((params, state))
  return history


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_pruned_weights_stay_exactly_zero(name):
  schedule = prune.cubic(0.8, begin=2, end=8, every=2)
  tx = prune.prune(_optimizer(**OPTIMIZERS[name]), schedule, [('kernel', True)])
  previous = None
  for step, (params, state) in enumerate(_train(tx)):
    mask = prune.masks_of(state)['kernel']
    kernel = np.asarray(params['kernel'])
    np.testing.assert_array_equal(kernel[~mask], 0.0)
    assert np.isfinite(kernel).all()
    want = 30 - round(
      _cubic(step, final=0.8, begin=2, end=8, every=2, initial=0) * 30
    )
    assert int(mask.sum()) == want
    # Masks only ever lose weights.
    if previous is not None:
      assert not np.any(mask & ~previous)
    previous = np.asarray(mask)
  assert int(state.step) == 12
  assert np.count_nonzero(params['bias']) == 5


def test_kept_weights_move_as_without_pruning():
  """One-shot from the start: the rest of the model trains undisturbed."""
  masked = prune.prune(optax.adam(0.1), prune.constant(0.5), [('kernel', True)])
  [*_, (pruned, state)] = _train(masked)
  [*_, (dense, _)] = _train(optax.adam(0.1))
  mask = prune.masks_of(state)['kernel']
  np.testing.assert_allclose(
    np.where(mask, pruned['kernel'], 0),
    np.where(mask, dense['kernel'], 0),
    rtol=1e-5,
  )
  np.testing.assert_array_equal(pruned['bias'], dense['bias'])


def test_the_wrapped_optimizer_sees_no_gradient_of_pruned_weights():
  """They would else count in norms for clipping, and gather momentum."""
  tx = prune.prune(
    optax.sgd(0.1, momentum=0.9), prune.constant(0.5), [('kernel', True)]
  )
  [*_, (_, state)] = _train(tx)
  trace = optax.tree.get(state.inner, 'trace')['kernel']
  mask = prune.masks_of(state)['kernel']
  np.testing.assert_array_equal(trace != 0, mask)


def test_the_average_is_masked_by_its_reader():
  """The average remembers weights from before they were pruned."""
  tx = prune.prune(
    _optimizer('momentum', average=0.9),
    prune.constant(0.5, begin=6),
    [('kernel', True)],
  )
  [*_, (params, state)] = _train(tx)
  masks = prune.masks_of(state)
  average = prune.apply_masks(optim.averaged_params(state), masks)
  np.testing.assert_array_equal(average['kernel'][~masks['kernel']], 0.0)
  assert np.count_nonzero(average['kernel']) == 15
  np.testing.assert_array_equal(params['kernel'] == 0, ~masks['kernel'])


def test_a_pruned_weight_does_not_come_back_for_one_that_became_zero():
  """Both have magnitude 0, and the pruned one has the lower index."""
  params = {'w': jnp.array([0.1, 5.0, 4.0, 3.0])}
  schedule = lambda step: jnp.where(step < 2, 0.25, 0.5)
  tx = prune.prune(optax.sgd(1.0), schedule, ALL)
  state, masks = tx.init(params), []
  for grads in ([0, 0, 0, 0], [0, 0, 4.0, 3.0], [0, 0, 0, 0]):
    updates, state = tx.update({'w': jnp.array(grads)}, state, params)
    params = optax.apply_updates(params, updates)
    masks.append(prune.masks_of(state)['w'].tolist())
  assert params['w'].tolist() == [0, 5, 0, 0]
  assert masks[1] == [False, True, True, True]
  assert masks[2] == [False, True, True, False]


def test_update_without_parameters_is_named():
  tx = prune.prune(optax.sgd(0.1), prune.constant(0.5), ALL)
  params = {'w': jnp.ones(2)}
  with pytest.raises(ValueError, match='needs the parameters'):
    tx.update(params, tx.init(params))


def test_masks_are_found_in_any_chain_and_empty_without_one():
  tx = optax.chain(
    optax.clip(1.0), prune.prune(optax.sgd(0.1), prune.constant(0.5), ALL)
  )
  params = {'w': jnp.ones(2)}
  assert set(prune.masks_of(tx.init(params))) == {'w'}
  assert prune.masks_of(optax.adam(0.1).init(params)) == {}


def test_sharded_parameters_get_the_same_mask_with_all_reduces_only():
  mesh = sharding.make_mesh()
  w = np.random.default_rng(0).normal(size=(64, 24)).astype('f')
  v = np.round(np.random.default_rng(1).normal(size=(16, 8))).astype('f')
  params = {'v': v, 'w': w}
  split = {
    'v': NamedSharding(mesh, PartitionSpec(None, 'data')),
    'w': NamedSharding(mesh, PartitionSpec('data', None)),
  }
  run = jax.jit(
    lambda p: prune.magnitude_masks(p, 0.8, ALL),
    in_shardings=(split,),
    out_shardings=split,
  )
  masks = run(jax.device_put(params, split))
  alone = prune.magnitude_masks(params, 0.8, ALL)
  for name, mask in masks.items():
    assert mask.sharding.is_equivalent_to(split[name], mask.ndim)
    np.testing.assert_array_equal(mask, alone[name])
  text = run.lower(params).compile().as_text()
  assert 'all-reduce' in text
  for word in ('all-gather', 'sort', 'all-to-all', 'collective-permute'):
    assert word not in text, word


def test_the_report_counts_zeros_layer_by_layer():
  params = {
    'a': {'kernel': jnp.array([[0.0, 1.0], [0.0, 2.0]]), 'bias': jnp.ones(2)},
    'b': {'kernel': jnp.zeros(3)},
  }
  rows = prune.sparsity_report(params, [('.*/kernel', True)])
  assert [(r.path, r.size, r.nonzero) for r in rows] == [
    ('a/kernel', 4, 2),
    ('b/kernel', 3, 0),
  ]
  assert [r.sparsity for r in rows] == [0.5, 1.0]
  assert len(prune.sparsity_report(params)) == 3
  with pytest.raises(ValueError, match='matches nothing'):
    prune.sparsity_report(params, [('c/.*', True)])
