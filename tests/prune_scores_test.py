"""Scores against NumPy written from their papers, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from prune_trees import KERNELS, kernels, make_tree, random_like, top, train

from kd_jax import adapters, models, objectives, prune, step

RATE = 0.1


def _taylor(steps, power):
  """Debiased moving average of contributions, decay 0.9."""
  mean, weight = 0.0, 0.0
  for w, g in steps:
    mean = 0.9 * mean + 0.1 * np.abs(w * g) ** power
    weight = 0.9 * weight + 0.1
  return mean / weight


def _fisher(steps):
  mean, weight = 0.0, 0.0
  for _, g in steps:
    mean, weight = 0.99 * mean + 0.01 * g**2, 0.99 * weight + 0.01
  return steps[-1][0] ** 2 * mean / weight / 2


def _lamp(w):
  flat = np.square(w.ravel())
  order = np.argsort(-flat, kind='stable')
  score = np.zeros_like(flat)
  total = np.cumsum(flat[order])
  score[order] = np.divide(flat[order], total, where=total > 0, out=flat * 0)
  return score.reshape(w.shape)


# name -> (the score, its value from the weights and gradients of all steps)
CASES = {
  'magnitude': (prune.magnitude(), lambda steps: np.abs(steps[-1][0])),
  'magnitude_p3': (prune.magnitude(3), lambda s: np.abs(s[-1][0]) ** 3),
  'taylor': (prune.taylor(), lambda steps: _taylor(steps, 1)),
  'taylor_squared': (prune.taylor(squared=True), lambda s: _taylor(s, 2)),
  'taylor_mean': (
    prune.taylor(decay=1),
    lambda steps: np.mean([np.abs(w * g) for w, g in steps], 0),
  ),
  'fisher': (prune.fisher(), _fisher),
  'snip': (prune.snip(), lambda steps: np.abs(steps[0][0] * steps[0][1])),
  'movement': (
    prune.movement(RATE),
    lambda steps: -RATE * sum(w * g for w, g in steps),
  ),
  'lamp': (prune.lamp(), lambda steps: _lamp(steps[-1][0])),
}


def _history(steps=5):
  """Weights and gradients of several steps, by path."""
  start = make_tree()
  trees = [random_like(start, 10 + i) for i in range(steps)]
  grads = [random_like(start, 20 + i) for i in range(steps)]
  for tree in trees:
    tree['zero'] = {'kernel': jnp.zeros((4, 4))}
  return trees, grads


def _jnp(tree):
  return {n: jnp.asarray(w) for n, w in kernels(tree).items()}


@pytest.mark.parametrize('name', CASES)
def test_scores_are_their_papers(name):
  score, paper = CASES[name]
  trees, grads = _history()

  @jax.jit
  def run(trees, grads):
    state = score.init(trees[0])
    for w, g in zip(trees, grads, strict=True):
      state = score.update(state, w, g)
    return score.value(state, trees[-1])

  weights, gradients = [[_jnp(t) for t in ts] for ts in (trees, grads)]
  got = run(weights, gradients)
  assert set(got) == set(weights[0])
  for path, value in got.items():
    steps = [
      (np.asarray(w[path], np.float64), np.asarray(g[path], np.float64))
      for w, g in zip(weights, gradients, strict=True)
    ]
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, paper(steps), rtol=1e-4, atol=1e-7)


def test_lamp_ranks_layers_of_any_scale_and_breaks_ties_by_index():
  w = jnp.array([1.0, 3.0, 2.0, 1.0])
  score = prune.lamp().value((), {'a': w, 'b': 1e3 * w, 'c': jnp.zeros(2)})
  np.testing.assert_allclose(score['a'], [1 / 14, 1, 4 / 13, 1 / 15], rtol=1e-6)
  np.testing.assert_allclose(score['a'], score['b'], rtol=1e-6)
  assert score['c'].tolist() == [0.0, 0.0]


def test_random_scores_depend_on_path_and_seed_alone():
  score = prune.random(3)
  a, b = jnp.zeros((40, 5)), jnp.ones(30)
  one = score.value((), {'x/a': a, 'b': b})
  other = score.value((), {'b': b + 1, 'x/c': a, 'x/a': a})
  np.testing.assert_array_equal(one['x/a'], other['x/a'])
  np.testing.assert_array_equal(one['b'], other['b'])
  assert (np.asarray(other['x/c']) != np.asarray(other['x/a'])).mean() > 0.99
  assert 0.4 < float(one['x/a'].mean()) < 0.6
  different = prune.random(4).value((), {'b': b})['b']
  assert (np.asarray(different) != np.asarray(one['b'])).mean() > 0.9


def test_scores_out_of_range_are_named():
  with pytest.raises(ValueError, match=r'decay of a score is in \[0, 1\]'):
    prune.taylor(decay=1.5)
  with pytest.raises(ValueError, match='p must be > 0, not 0'):
    prune.magnitude(0)


def test_accumulate_averages_over_batches():
  params = {'a': {'kernel': jnp.array([1.0, -2.0]), 'bias': jnp.ones(1)}}
  batches = [np.array([3.0, 1.0], 'f'), np.array([-1.0, 1.0], 'f')]

  def loss(p, x):
    return jnp.sum(p['a']['kernel'] * x) + p['a']['bias'].sum()

  scores = prune.accumulate(
    prune.taylor(decay=1), jax.grad(loss), params, batches, rules=KERNELS
  )
  assert list(scores) == ['a/kernel']
  np.testing.assert_allclose(scores['a/kernel'], [2.0, 2.0])
  both = prune.accumulate(prune.snip(), jax.grad(loss), params, iter(batches))
  np.testing.assert_allclose(both['a/kernel'], [3.0, 2.0])
  np.testing.assert_allclose(both['a/bias'], [1.0])
  with pytest.raises(ValueError, match='no batch'):
    prune.accumulate(prune.snip(), jax.grad(loss), params, [])


@pytest.mark.parametrize('name', ['taylor', 'fisher', 'snip', 'movement'])
def test_a_step_with_an_overflow_is_left_out(name):
  score = CASES[name][0]
  w = {'w': jnp.array([1.0, 2.0])}
  grads = [[3.0, jnp.inf], [1.0, -2.0], [jnp.nan, 1.0], [2.0, 1.0]]
  states = []
  for skipped in (False, True):
    state = score.init(w)
    for g in grads:
      if not skipped or np.isfinite(g).all():
        state = score.update(state, w, {'w': jnp.array(g)})
    states.append(score.value(state, w)['w'])
  np.testing.assert_array_equal(*states)
  assert np.isfinite(states[0]).all() and np.any(states[0])


@pytest.mark.parametrize('name', CASES)
def test_training_prunes_by_every_score(name):
  """The masks are of the scores up to the step that makes them."""
  score, paper = CASES[name]
  tx = prune.prune(
    optax.sgd(0.01), prune.constant(0.5, begin=2), KERNELS, score=score
  )
  start = make_tree()
  history = train(tx, start, 4)
  trees = [start] + [tree for tree, _ in history[:2]]
  grads = [random_like(start, 1 + i) for i in range(3)]
  steps = [
    {n: (w, kernels(g)[n]) for n, w in kernels(t).items()}
    for t, g in zip(trees, grads, strict=True)
  ]
  scores = {n: paper([s[n] for s in steps]) for n in steps[0]}
  masks = prune.masks_of(history[2][1])
  keep = 0
  for path, score in scores.items():
    kept = np.asarray(masks[path])
    keep += kept.sum()
    # But for the one weight that every layer keeps.
    if kept.sum() > 1:
      scores[path] = score[kept].min(), score[~kept].max(initial=-np.inf)
    else:
      scores[path] = np.inf, score[~kept].max()
  assert keep == int(prune.kept_count(sum(m.size for m in masks.values()), 0.5))
  least = min(low for low, _ in scores.values())
  most = max(high for _, high in scores.values())
  assert least >= most - 1e-6 * max(abs(most), 1e-3)
  for path, mask in prune.masks_of(history[3][1]).items():
    np.testing.assert_array_equal(mask, masks[path])


def test_the_score_is_of_the_objective_that_is_trained():
  """Distillation included: |w g| of the step's own gradient."""
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.normal(size=(8, 4, 4, 1)).astype('f'),
    'label': (np.arange(8) % 3).astype('i4'),
  }
  model = models.MLP(3, hidden=(6,))
  student_fn = adapters.from_linen(model)
  start = adapters.init_linen(model, jax.random.key(0), batch)
  teacher = adapters.init_linen(model, jax.random.key(1), batch)
  values = []
  for weight in (1.0, 0.0):
    objective = objectives.weighted_sum(
      {
        'kd': (weight, objectives.soft_targets()),
        'ce': (1.0, objectives.hard_labels()),
      }
    )
    tx = prune.prune(
      optax.sgd(1.0), prune.constant(0.0), KERNELS, score=prune.taylor()
    )
    state = step.init_state(
      student_fn,
      objective,
      tx,
      start,
      batch,
      teacher_fn=student_fn,
      teacher=teacher,
    )
    train_step = jax.jit(
      step.make_train_step(student_fn, objective, tx, teacher_fn=student_fn)
    )
    new, _ = train_step(state, batch, jax.random.key(0))
    memory = prune.find_state(new.opt_state).score.mean
    moved = jax.tree.map(lambda a, b: a - b, state.params, new.params)
    for path, score in memory.items():
      layer = path.split('/')[0]
      g, w = moved[layer]['kernel'], state.params[layer]['kernel']
      np.testing.assert_allclose(score, np.abs(g * w), rtol=1e-3, atol=1e-6)
    values.append(np.concatenate([s.ravel() for s in memory.values()]))
  assert np.abs(values[0] - values[1]).max() > 1e-3


def test_signed_scores_prune_what_moves_to_zero():
  """The largest weight goes first, as it shrinks; pruned ones stay last."""
  params = {'kernel': jnp.array([9.0, 0.5, -0.5, 3.0])}
  rules = [('kernel', True)]
  tx = prune.prune(
    optax.sgd(0.01),
    prune.steps(0.25, every=1, times=2),
    rules,
    score=prune.movement(1.0),
  )
  state = tx.init(params)
  for grads, want in (
    ([1.0, -1.0, 2.0, 0.1], [False, True, True, True]),
    # The pruned weight's score, -9, is above that of the last one now.
    ([0.0, 0.0, 0.0, 99.0], [False, True, True, False]),
  ):
    updates, state = tx.update({'kernel': jnp.array(grads)}, state, params)
    params = optax.apply_updates(params, updates)
    assert state.masks['kernel'].tolist() == want
  assert top([np.array([-9.0, 0.5, 1.0, -297.3])], 2)[0].tolist() == [
    False,
    True,
    True,
    False,
  ]
