"""The optax wrapper: exact zeros, revival, NaN, rewinding, straight-through."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from prune_trees import KERNELS, kernels, make_tree, top, train

from kd_jax import optim, prune

ALL = [('.*', True)]


OPTIMIZERS = {
  'sgd': {'name': 'sgd'},
  'momentum': {'name': 'momentum'},
  'nesterov': {'name': 'nesterov', 'l1': 0.1},
  'adamw': {'name': 'adamw', 'l2': 0.5, 'decayed': '.*'},
  'lion': {'name': 'lion', 'l2': 0.5, 'decayed': '.*'},
  'accumulated': {'name': 'momentum', 'batches': 3},
  'averaged': {'name': 'momentum', 'average': 0.5},
}


def _optimizer(name, *, average=None, batches=1, **options):
  options = {'decayed': 'kernel'} | options
  tx = optim.make_optimizer(name, learning_rate=0.1, **options)
  tx = optax.MultiSteps(tx, batches) if batches > 1 else tx
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
    assert int(mask.sum()) == 30 - round(30 * float(schedule(step)))
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
  tx = prune.prune(
    optax.sgd(1.0), lambda step: jnp.where(step < 2, 0.25, 0.5), ALL
  )
  state, masks, update = tx.init(params), [], jax.jit(tx.update)
  for grads in ([0, 0, 0, 0], [0, 0, 4.0, 3.0], [0, 0, 0, 0]):
    grads = {'w': jnp.array(grads, jnp.float32)}
    updates, state = update(grads, state, params)
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


@pytest.mark.parametrize('scope', ['global', 'layer', 'erk'])
def test_masks_only_lose_weights_at_random_schedules(scope):
  """Exact totals too, with all kinds of leaves, when sparsity rises."""
  rng = np.random.default_rng(0)
  levels = np.sort(rng.uniform(0, 0.99, size=20)).astype('f')
  tx = prune.prune(
    optax.sgd(0.1, momentum=0.9),
    lambda step: jnp.asarray(levels)[step],
    KERNELS,
    scope=scope,
  )
  previous = None
  for level, (tree, state) in zip(
    levels, train(tx, make_tree(), 20), strict=True
  ):
    masks = {n: np.asarray(m) for n, m in state.masks.items()}
    counts = {n: int(m.sum()) for n, m in masks.items()}
    assert min(counts.values()) >= 1
    if scope == 'layer':
      for name, mask in masks.items():
        assert counts[name] == int(prune.kept_count(mask.size, level))
    else:
      size = sum(m.size for m in masks.values())
      assert sum(counts.values()) == int(prune.kept_count(size, level))
    for name, kernel in kernels(tree).items():
      np.testing.assert_array_equal(kernel[~masks[name]], 0.0)
      assert previous is None or not (masks[name] & ~previous[name]).any()
    previous = masks


def test_never_is_never_also_when_the_schedule_falls():
  tx = prune.prune(
    optax.sgd(0.1),
    lambda step: jnp.asarray([0.75, 0.25, 0.5])[step],
    [('kernel', True)],
  )
  history = _train(tx, 3)
  counts = [int(state.masks['kernel'].sum()) for _, state in history]
  assert counts == [8, 8, 8]
  for params, _ in history:
    assert np.count_nonzero(params['kernel']) == 8


def _revived_in_numpy(start, schedule, steps, rate=0.1, momentum=0.9):
  """Masks of dense weights, which momentum SGD trains at masked gradients."""
  rng = np.random.default_rng(0)
  dense, trace = start.copy(), np.zeros_like(start)
  mask, made_for, history = np.ones_like(start, bool), 0.0, []
  for step in range(steps):
    gradient = rng.normal(size=start.shape).astype('f')
    if schedule[step] != made_for:
      made_for = schedule[step]
      keep = start.size - round(made_for * start.size)
      mask = top([np.abs(dense)], keep)[0]
    trace = momentum * trace + gradient
    dense = dense - rate * trace
    history.append((np.where(mask, dense, 0), mask, dense))
  return history


def test_gradients_bring_weights_back():
  levels = [0.5, 0.5, 0.6, 0.5, 0.5, 0.6, 0.6]
  rng = np.random.default_rng(1)
  start = rng.normal(size=(4, 5)).astype('f')
  want = _revived_in_numpy(start, levels, 7)
  tx = prune.prune(
    optax.sgd(0.1, momentum=0.9),
    lambda step: jnp.asarray(levels)[step],
    ALL,
    revive='gradient',
  )
  params = {'w': jnp.asarray(start)}
  state, rng, came_back = tx.init(params), np.random.default_rng(0), 0
  update = jax.jit(tx.update)
  for masked, mask, dense in want:
    gradient = rng.normal(size=start.shape).astype('f')
    before = np.asarray(state.masks['w'])
    updates, state = update({'w': jnp.asarray(gradient)}, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(state.masks['w'], mask)
    np.testing.assert_allclose(params['w'], masked, rtol=1e-5)
    np.testing.assert_allclose(state.dense['w'], dense, rtol=1e-5)
    np.testing.assert_array_equal(params['w'] == 0, ~mask)
    came_back += np.sum(mask & ~before)
  assert came_back > 0


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_with_revival_pruned_weights_are_exactly_zero_too(name):
  schedule = prune.linear(0.8, begin=1, end=9, every=2)
  tx = prune.prune(
    _optimizer(**OPTIMIZERS[name]),
    schedule,
    [('kernel', True)],
    revive='gradient',
  )
  for step, (params, state) in enumerate(_train(tx)):
    mask = np.asarray(state.masks['kernel'])
    assert mask.sum() == 30 - round(30 * float(schedule(step)))
    kernel = np.asarray(params['kernel'])
    np.testing.assert_array_equal(kernel[~mask], 0.0)
    np.testing.assert_allclose(
      kernel[mask], state.dense['kernel'][mask], rtol=1e-5, atol=1e-7
    )


def test_weights_that_were_changed_from_outside_are_what_is_trained():
  """Only the values of pruned weights are the state's own."""
  tx = prune.prune(optax.sgd(1.0), prune.constant(0.5), ALL, revive='gradient')
  params = {'w': jnp.array([1.0, 2.0, 3.0, 4.0])}
  zero = {'w': jnp.zeros(4)}
  updates, state = tx.update(zero, tx.init(params), params)
  params = optax.apply_updates(params, updates)
  params = {'w': params['w'].at[3].set(7.0)}
  updates, state = tx.update(zero, state, params)
  params = optax.apply_updates(params, updates)
  assert params['w'].tolist() == [0, 0, 3, 7]
  assert state.dense['w'].tolist() == [1, 2, 3, 7]


def test_unknown_ways_to_revive_are_named():
  with pytest.raises(ValueError, match="Unknown revive 'always'.*gradient"):
    prune.prune(optax.sgd(0.1), prune.constant(0.5), ALL, revive='always')


def test_nan_keeps_the_masks_until_it_is_gone():
  """Neither kept nor pruned: the target is not taken as reached either."""
  params = {'w': jnp.array([1.0, 2.0, 3.0, 4.0])}
  tx = prune.prune(optax.sgd(1.0), prune.steps(0.25, every=1, times=3), ALL)
  zero, state = {'w': jnp.zeros(4)}, tx.init(params)
  update = jax.jit(tx.update)
  for w, count, sparsity in (
    (params['w'], 3, 0.25),
    (params['w'].at[3].set(jnp.nan), 3, 0.25),
    (params['w'], 2, 1 - 0.75**3),
  ):
    _, state = update(zero, state, {'w': w})
    assert int(state.masks['w'].sum()) == count
    assert float(state.sparsity) == pytest.approx(sparsity)


def test_infinite_scores_order_as_numbers_do():
  fixed = prune.magnitude()._replace(
    value=lambda state, weights: {
      'w': jnp.array([-jnp.inf, jnp.inf, 0.0, -1.0])
    }
  )
  tx = prune.prune(optax.sgd(1.0), prune.constant(0.5), ALL, score=fixed)
  params = {'w': jnp.ones(4)}
  _, state = tx.update(params, tx.init(params), params)
  assert state.masks['w'].tolist() == [False, True, True, False]


def test_a_structure_may_mask_more_than_has_scores():
  """A bias goes with its channel, and comes back with it only if allowed."""

  def structure(scores, sparsity, scope):
    [kept] = prune.channels()(scores, sparsity, scope).values()
    return {'a/kernel': kept, 'a/bias': kept[0], 'not/there': kept}

  params = {'a': {'kernel': jnp.array([[1.0, 3.0], [1.0, 3.0]])}}
  params['a']['bias'] = jnp.ones(2)
  for revive in ('never', 'gradient'):
    tx = prune.prune(
      optax.adam(0.1),
      prune.constant(0.5),
      [('a/kernel', True)],
      structure=structure,
      revive=revive,
    )
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(params, state, params)
    new = optax.apply_updates(params, updates)
    assert set(state.masks) == {'a/kernel', 'a/bias'}
    assert (new['a']['bias'] != 0).tolist() == [False, True]
    assert (new['a']['kernel'] != 0).tolist() == [[False, True]] * 2
  tx = prune.prune(
    optax.adam(0.1),
    prune.constant(0.5),
    [('a/kernel', True)],
    structure=lambda scores, *_: {'not/there': scores['a/kernel']},
  )
  with pytest.raises(ValueError, match="masks no parameter, only 'not/there'"):
    tx.init(params)


def test_two_rounds_of_a_lottery_with_rewinding():
  """Weights and momentum go back, masks stay, and the schedule goes on."""
  rules = [('kernel', True)]
  tx = prune.prune(
    _optimizer('momentum', average=0.5),
    prune.steps(0.5, every=4, times=2, begin=4),
    rules,
  )
  rng = np.random.default_rng(0)
  params = {'kernel': jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)}
  params['bias'] = jnp.ones(5)
  update = jax.jit(tx.update)

  def train(state, steps):
    params, opt_state = state
    for _ in range(steps):
      grads = jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params
      )
      updates, opt_state = update(grads, opt_state, params)
      params = optax.apply_updates(params, updates)
    return params, opt_state

  # Rewinding to step 2, not to the start.
  early = state = train((params, tx.init(params)), 2)
  state = train(state, 2)
  for keep in (15, 8):
    state = train(state, 1)  # The step that prunes.
    trained, masks = state[0], prune.masks_of(state[1])
    assert int(masks['kernel'].sum()) == keep
    state = prune.rewind(state, early, masks)
    np.testing.assert_array_equal(
      state[0]['kernel'], np.where(masks['kernel'], early[0]['kernel'], 0)
    )
    np.testing.assert_array_equal(state[0]['bias'], early[0]['bias'])
    assert not np.array_equal(trained['bias'], early[0]['bias'])
    for name in ('trace', 'average'):
      got = optax.tree.get(state[1], name)['kernel']
      past = optax.tree.get(early[1], name)['kernel']
      np.testing.assert_array_equal(got, np.where(masks['kernel'], past, 0))
    assert int(state[1].step) == {15: 5, 8: 9}[keep]
    if keep == 15:
      state = train(state, 3)
      np.testing.assert_array_equal(
        prune.masks_of(state[1])['kernel'], masks['kernel']
      )
  state = train(state, 3)
  np.testing.assert_array_equal(
    prune.masks_of(state[1])['kernel'], masks['kernel']
  )
  np.testing.assert_array_equal(state[0]['kernel'] != 0, masks['kernel'])


def test_parameters_alone_are_rewound_too():
  initial, trained = make_tree(0), make_tree(1)
  masks = prune.magnitude_masks(trained, 0.5, KERNELS)
  ticket = prune.rewind(trained, initial, masks)
  want = prune.apply_masks(initial, masks)
  for got, leaf in zip(
    jax.tree.leaves(ticket), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_array_equal(got, leaf)
    assert got.dtype == leaf.dtype
  with pytest.raises(ValueError, match='rewind: the trees differ'):
    prune.rewind({'a': 1}, {'b': 1}, {})


def test_straight_through_masks_the_forward_and_not_the_gradient():
  """Against SGD in NumPy, where pruned weights move and come back."""
  schedule = prune.linear(0.5, begin=1, end=3)
  params_fn = prune.straight_through(schedule, [('w', True)])
  rng = np.random.default_rng(0)
  target = rng.normal(size=8).astype('f')
  params = {'w': jnp.asarray(rng.normal(size=8), jnp.float32)}
  dense, seen = np.asarray(params['w']), []

  @jax.jit
  def gradient(params, step):
    def loss(p):
      return jnp.square(params_fn(p, step)['w'] - target).sum() / 2

    return jax.grad(loss)(params), params_fn(params, step)

  for step in range(20):
    grads, masked = gradient(params, step)
    keep = 8 - round(8 * float(schedule(step)))
    mask = top([np.abs(dense)], keep)[0]
    np.testing.assert_array_equal(masked['w'], np.where(mask, params['w'], 0))
    dense = dense - np.float32(0.3) * (np.where(mask, dense, 0) - target)
    params = {'w': params['w'] - 0.3 * grads['w']}
    np.testing.assert_allclose(params['w'], dense, rtol=1e-4, atol=1e-6)
    seen.append(mask)
  assert any((b & ~a).any() for a, b in itertools.pairwise(seen[3:]))


def test_straight_through_refuses_scores_that_have_seen_nothing():
  params_fn = prune.straight_through(
    prune.constant(0.5), KERNELS, score=prune.taylor()
  )
  with pytest.raises(ValueError, match='its score is magnitude, lamp or'):
    params_fn(make_tree(), 0)


def test_straight_through_with_all_kinds_of_leaves_and_choices():
  params_fn = prune.straight_through(
    prune.constant(0.5),
    KERNELS,
    score=prune.random(1),
    scope='layer',
    structure=prune.n_m(2, 4),
  )
  tree = make_tree()
  masked = jax.jit(params_fn)(tree, 3)
  assert jax.tree.structure(masked) == jax.tree.structure(tree)
  for row in prune.sparsity_report(masked, KERNELS):
    assert row.sparsity >= 0.5
  np.testing.assert_array_equal(masked['norm']['bias'], tree['norm']['bias'])

  def total(tree):
    leaves = jax.tree.leaves(params_fn(tree, 0))
    return sum(x.astype(jnp.float32).sum() for x in leaves)

  grads = jax.jit(jax.grad(total))(tree)
  for g, p in zip(jax.tree.leaves(grads), jax.tree.leaves(tree), strict=True):
    assert g.dtype == p.dtype
    np.testing.assert_array_equal(g, 1)


def test_the_wrapper_works_under_scan_and_vmap():
  tx = prune.prune(
    optax.sgd(0.1, momentum=0.9), prune.linear(0.5, begin=0, end=3), ALL
  )
  rng = np.random.default_rng(0)
  start = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
  grads = jnp.asarray(rng.normal(size=(5, 8)), jnp.float32)

  def run(w):
    def body(carry, g):
      params, state = carry
      updates, state = tx.update({'w': g}, state, params)
      return (optax.apply_updates(params, updates), state), state.masks['w']

    params = {'w': w}
    return jax.lax.scan(body, (params, tx.init(params)), grads)

  (params, state), masks = jax.jit(jax.vmap(run))(start)
  np.testing.assert_array_equal((params['w'] != 0).sum(1), 4)
  for i, w in enumerate(start):
    (alone, _), alone_masks = jax.jit(run)(w)
    np.testing.assert_allclose(params['w'][i], alone['w'], rtol=1e-6)
    np.testing.assert_array_equal(masks[i], alone_masks)


def test_zeros_are_preserved_whatever_the_optimizer_adds():
  """Noise, or a momentum of before: no update reaches a weight at zero."""
  noisy = optax.stateless(lambda u, p: jax.tree.map(lambda x: x + 1, u))
  tx = prune.preserve(noisy, [('w', True)])
  params = {'w': jnp.array([0.0, 2.0, 0.0]), 'b': jnp.zeros(2)}
  state = tx.init(params)
  assert state.sparsity == pytest.approx(2 / 3)
  for _ in range(2):
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  assert params['w'].tolist() == [0, 6, 0] and params['b'].tolist() == [4, 4]
  with pytest.raises(ValueError, match='update needs the parameters'):
    tx.update(params, state)
  with pytest.raises(ValueError, match="pruning rule 'v'"):
    prune.preserve(noisy, [('v', True)]).init(params)
