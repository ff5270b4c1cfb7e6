"""Optimizers and schedules against optax's own and against the formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax import optim

RATE = 0.05
ALIASES = {
  'sgd': optax.sgd(RATE),
  'momentum': optax.sgd(RATE, momentum=0.8),
  'nesterov': optax.sgd(RATE, momentum=0.8, nesterov=True),
  'adagrad': optax.adagrad(RATE, eps=1e-6),
  'rmsprop': optax.rmsprop(RATE, eps=1e-6, momentum=0.8),
  'adam': optax.adam(RATE, b1=0.7, b2=0.9, eps=1e-6),
  'adamw': optax.adamw(RATE, b1=0.7, b2=0.9, eps=1e-6, weight_decay=0.1),
  'lion': optax.lion(RATE, b1=0.7, b2=0.9, weight_decay=0.1),
  'lamb': optax.lamb(RATE, b1=0.7, b2=0.9, eps=1e-6, weight_decay=0.1),
}
_MOMENTS = ('b1', 'b2', 'eps')
TAKES = {
  'sgd': (),
  'momentum': ('momentum',),
  'nesterov': ('momentum',),
  'adagrad': ('eps',),
  'rmsprop': ('momentum', 'eps'),
  'adam': _MOMENTS,
  'adamw': _MOMENTS,
  'lion': ('b1', 'b2'),
  'lamb': _MOMENTS,
}
OPTIONS = {'momentum': 0.8, 'b1': 0.7, 'b2': 0.9, 'eps': 1e-6}


def _params():
  rng = np.random.default_rng(0)
  return {
    'dense': {
      'kernel': jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
      'bias': jnp.asarray(rng.normal(size=4), jnp.float32),
    }
  }


def _gradients(count, seed=1):
  rng = np.random.default_rng(seed)
  return [
    jax.tree.map(
      lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), _params()
    )
    for _ in range(count)
  ]


def _run(tx, gradients):
  params = _params()
  state, update = tx.init(params), jax.jit(tx.update)
  for g in gradients:
    updates, state = update(g, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def _close(got, want, **tolerance):
  tolerance = tolerance or {'rtol': 1e-6, 'atol': 1e-7}
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, want
  )


def test_every_optimizer_is_compared():
  assert set(ALIASES) == set(optim.OPTIMIZERS)


@pytest.mark.parametrize('name', ALIASES)
def test_optimizer_equals_optaxs_own(name):
  decays = name in ('adamw', 'lion', 'lamb')
  tx = optim.make_optimizer(
    name,
    learning_rate=RATE,
    l2=0.1 if decays else 0.0,
    decayed='.*',
    **{k: v for k, v in OPTIONS.items() if k in TAKES[name]},
  )
  gradients = _gradients(5)
  _close(_run(tx, gradients)[0], _run(ALIASES[name], gradients)[0])


@pytest.mark.parametrize('decoupled', [True, False])
def test_penalties_reach_the_kernels_only(decoupled):
  """SGD: coupled and decoupled agree, w <- w - rate (g + l1 sign w + l2 w)."""
  tx = optim.make_optimizer(
    'sgd', learning_rate=RATE, l1=0.3, l2=0.2, decoupled=decoupled
  )
  [g] = _gradients(1)
  got = _run(tx, [g])[0]['dense']
  old, g = _params()['dense'], g['dense']
  w = old['kernel']
  penalty = 0.3 * np.sign(w) + 0.2 * w
  _close(got['kernel'], w - RATE * (g['kernel'] + penalty))
  _close(got['bias'], old['bias'] - RATE * g['bias'])


def _rss(g):
  """What AdaGrad's first step makes of a gradient."""
  return g / np.sqrt(0.1 + g**2 + OPTIONS['eps'])


@pytest.mark.parametrize('decoupled', [True, False])
def test_coupled_penalties_are_scaled_and_decoupled_ones_are_not(decoupled):
  tx = optim.make_optimizer(
    'adagrad',
    learning_rate=RATE,
    l1=0.3,
    l2=0.2,
    decoupled=decoupled,
    eps=OPTIONS['eps'],
  )
  [g] = _gradients(1)
  got = _run(tx, [g])[0]['dense']['kernel']
  w, g = _params()['dense']['kernel'], g['dense']['kernel']
  penalty = 0.3 * np.sign(w) + 0.2 * w
  step = _rss(g) + penalty if decoupled else _rss(g + penalty)
  _close(got, w - RATE * step, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', ['adam', 'adamw'])
def test_only_adamw_and_its_kin_decouple_by_default(name):
  made = {
    d: optim.make_optimizer(name, learning_rate=RATE, l2=0.5, decoupled=d)
    for d in (None, True, False)
  }
  g = _gradients(3)
  got = {d: _run(tx, g)[0] for d, tx in made.items()}
  _close(got[None], got[name == 'adamw'])
  apart = np.abs(got[True]['dense']['kernel'] - got[False]['dense']['kernel'])
  assert apart.max() > 1e-3


def test_decay_chooses_other_parameters_by_path():
  tx = optim.make_optimizer('sgd', learning_rate=1.0, l2=0.5, decayed='.*/bias')
  zeros = jax.tree.map(jnp.zeros_like, _params())
  got = _run(tx, [zeros])[0]['dense']
  _close(got['bias'], 0.5 * _params()['dense']['bias'])
  _close(got['kernel'], _params()['dense']['kernel'])


def test_gradients_are_clipped_by_value_after_norm():
  [g] = _gradients(1)
  norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(g)))

  def moved(**options):
    tx = optim.make_optimizer('sgd', learning_rate=1.0, **options)
    new = _run(tx, [g])[0]
    return jax.tree.map(lambda a, b: a - b, _params(), new)

  _close(
    moved(clip_norm=0.5),
    jax.tree.map(lambda x: x * 0.5 / norm, g),
    rtol=1e-5,
    atol=1e-6,
  )
  _close(moved(clip_norm=norm * 2), g, rtol=1e-5, atol=1e-6)
  _close(
    moved(clip_value=0.3),
    jax.tree.map(lambda x: np.clip(x, -0.3, 0.3), g),
    rtol=1e-5,
    atol=1e-6,
  )
  both = jax.tree.map(lambda x: np.clip(x * 2 / norm, -0.3, 0.3), g)
  _close(moved(clip_norm=2.0, clip_value=0.3), both, rtol=1e-5, atol=1e-6)


def test_penalties_are_not_clipped():
  tx = optim.make_optimizer('sgd', learning_rate=1.0, l2=1.0, clip_norm=1e-6)
  new = _run(tx, _gradients(1))[0]
  np.testing.assert_allclose(new['dense']['kernel'], 0.0, atol=1e-5)


def test_average_is_exponential_from_the_initial_parameters():
  tx = optim.average_params(optax.sgd(0.1, momentum=0.9), decay=0.8)
  gradients = _gradients(4)
  average = _params()
  for count in range(1, 5):
    params, _ = _run(optax.sgd(0.1, momentum=0.9), gradients[:count])
    average = jax.tree.map(lambda a, p: 0.8 * a + 0.2 * p, average, params)
  got, state = _run(tx, gradients)
  _close(got, params)
  _close(optim.averaged_params(state), average, rtol=1e-5, atol=1e-6)


def test_an_average_of_bfloat16_moves():
  tx = optim.average_params(optax.sgd(1.0), decay=0.999)
  params = jnp.ones(2, jnp.bfloat16)
  state = tx.init(params)
  params = jnp.full(2, 2.0, jnp.bfloat16)
  update = jax.jit(lambda s: tx.update(jnp.zeros_like(params), s, params)[1])
  for _ in range(100):
    state = update(state)
  want = 2 - 0.999**100
  np.testing.assert_allclose(optim.averaged_params(state), want, rtol=1e-4)


def test_average_is_found_in_any_chain_and_absent_without_one():
  tx = optax.chain(
    optax.clip(1.0), optim.average_params(optax.adam(0.1), decay=0.5)
  )
  params = _params()
  _close(optim.averaged_params(tx.init(params)), params)
  assert optim.averaged_params(optax.adam(0.1).init(params)) is None


@pytest.mark.parametrize('decay', [0.0, 1.0, -1.0])
def test_average_decay_out_of_range_is_named(decay):
  with pytest.raises(ValueError, match='in \\(0, 1\\)'):
    optim.average_params(optax.sgd(0.1), decay=decay)


SHAPES = {
  'constant': lambda share: 1.0,
  'cosine': lambda share: 0.5 * (1 + np.cos(np.pi * share)),
  'linear': lambda share: 1 - share,
}


@pytest.mark.parametrize('warmup', [0, 20])
@pytest.mark.parametrize('name', SHAPES)
def test_schedule_rises_to_the_peak_and_falls_to_the_end(name, warmup):
  peak, end, total = 0.4, 0.1, 100
  schedule = jax.jit(
    optim.make_schedule(
      name, peak=peak, total_steps=total, warmup_steps=warmup, end=end
    )
  )
  for at in (0, 1, 10, 19, 20, 21, 50, 99, 100, 150):
    if at < warmup:
      want = peak * at / warmup
    else:
      share = min((at - warmup) / (total - warmup), 1.0)
      low = peak if name == 'constant' else end
      want = low + (peak - low) * SHAPES[name](share)
    assert float(schedule(at)) == pytest.approx(want, rel=1e-5), at


def test_step_schedule_falls_at_its_boundaries():
  schedule = optim.make_schedule(
    'step',
    peak=1.0,
    total_steps=110,
    warmup_steps=10,
    boundaries=(0.5, 0.8),
    factor=0.1,
  )
  steps = (5, 10, 59, 61, 89, 91, 200)
  got = [float(schedule(s)) for s in steps]
  np.testing.assert_allclose(got, [0.5, 1, 1, 0.1, 0.1, 0.01, 0.01], rtol=1e-5)


def test_boundaries_that_meet_both_count_and_are_shares():
  make = functools.partial(
    optim.make_schedule, 'step', peak=1.0, total_steps=3, factor=0.1
  )
  assert float(make()(3)) == pytest.approx(1e-3)
  assert float(make(boundaries=(0.5, 0.5))(3)) == pytest.approx(1e-2)
  with pytest.raises(ValueError, match=r'\(150, 180, 210\) are not shares'):
    make(boundaries=(150, 180, 210))


def test_a_schedule_drives_the_learning_rate():
  schedule = optim.make_schedule('linear', peak=1.0, total_steps=2)
  tx = optim.make_optimizer('sgd', learning_rate=schedule)
  ones = jax.tree.map(jnp.ones_like, _params())
  got = _run(tx, [ones] * 3)[0]
  _close(got, jax.tree.map(lambda p: p - 1.5, _params()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', TAKES)
def test_options_of_other_optimizers_are_refused(name):
  for option, value in OPTIONS.items():
    if option not in TAKES[name]:
      with pytest.raises(ValueError, match=f"{name!r} has no '{option}'"):
        optim.make_optimizer(name, learning_rate=0.1, **{option: value})


def test_what_is_frozen_counts_in_no_norm():
  tx = optim.make_optimizer('sgd', learning_rate=1.0, clip_norm=1.0)
  tx = optim.freeze(tx, 'head/.*')
  params = {'head': {'kernel': jnp.ones(1)}, 'body': jnp.ones(1)}
  grads = {'head': {'kernel': jnp.full(1, 100.0)}, 'body': jnp.ones(1)}
  updates, _ = tx.update(grads, tx.init(params), params)
  _close(updates, {'head': {'kernel': jnp.zeros(1)}, 'body': -jnp.ones(1)})


def test_bad_arguments_are_named():
  with pytest.raises(ValueError, match="optimizer 'adan'.*did you mean adam"):
    optim.make_optimizer('adan', learning_rate=0.1)
  with pytest.raises(ValueError, match="schedule 'cosin'.*mean cosine"):
    optim.make_schedule('cosin', peak=0.1, total_steps=10)
  for warmup in (-1, 10, 11):
    with pytest.raises(ValueError, match=f'warmup_steps={warmup}'):
      optim.make_schedule(
        'cosine', peak=0.1, total_steps=10, warmup_steps=warmup
      )
  tx = optim.make_optimizer('sgd', learning_rate=0.1, l2=0.1, decayed='kernel')
  with pytest.raises(ValueError, match="decayed 'kernel' matches nothing"):
    tx.init(_params())


@pytest.mark.parametrize('option', ['clip_norm', 'clip_value', 'l1', 'l2'])
def test_negative_options_are_refused(option):
  with pytest.raises(ValueError, match=f'{option}=-1.0 must not be negative'):
    optim.make_optimizer('sgd', learning_rate=0.1, **{option: -1.0})


def test_a_schedule_needs_a_positive_peak():
  with pytest.raises(ValueError, match='peak of a schedule must be > 0'):
    optim.make_schedule('cosine', peak=0.0, total_steps=10)
