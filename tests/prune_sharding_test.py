"""Sharded parameters: masks lie where they do, by all-reduces only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax import prune

ALL = [('.*', True)]
SPECS = {'conv': P(None, None, None, 'd'), 'w': P('d', None)}
# Units that lie within a device: for others an axis has to be gathered.
STRUCTURES = {
  'unstructured': prune.unstructured(),
  'n_m': prune.n_m(2, 4),
  'inputs': prune.channels(-2),
  'outputs': prune.channels(),
  'heads': prune.heads(8, -1),
  'block': prune.block(4, 2),
}
COLLECTIVES = ('all-gather', 'all-to-all', 'collective-permute', 'sort')


def _params():
  rng = np.random.default_rng(0)
  return {
    'conv': rng.normal(size=(3, 3, 4, 16)).astype('f'),
    'w': np.round(rng.normal(size=(64, 24)).astype('f'), 1),
  }


def _sharded(kind):
  mesh = jax.make_mesh((8,), ('d',), axis_types=(AxisType[kind],))
  shardings = {n: NamedSharding(mesh, s) for n, s in SPECS.items()}
  return jax.device_put(_params(), shardings)


def _check_collectives(text):
  assert 'all-reduce' in text
  for word in COLLECTIVES:
    assert word not in text, word


def _check_masks(masks, want, params):
  for name, mask in masks.items():
    sharding = params[name].sharding
    assert mask.sharding.is_equivalent_to(sharding, mask.ndim), name
    np.testing.assert_array_equal(mask, want[name])


@pytest.mark.parametrize('kind', ['Auto', 'Explicit'])
def test_every_structure_and_scope_without_a_gather(kind):
  params = _sharded(kind)

  def run(params):
    scores = prune.magnitude().value((), params)
    masks = {n: s(scores, 0.5, 'global') for n, s in STRUCTURES.items()}
    for scope in ('layer', 'erk'):
      masks[scope] = prune.unstructured()(scores, 0.5, scope)
      masks[f'channels by {scope}'] = prune.channels()(scores, 0.5, scope)
    return masks

  compiled = jax.jit(run).lower(params).compile()
  _check_collectives(compiled.as_text())
  alone = jax.jit(run)(_params())
  for name, masks in compiled(params).items():
    _check_masks(masks, alone[name], params)


@pytest.mark.parametrize('kind', ['Auto', 'Explicit'])
def test_units_that_lie_across_devices_are_right_too(kind):
  params = _sharded(kind)
  structures = [prune.heads(4, -1), prune.block(12, 10)]
  run = jax.jit(
    lambda params: [
      prune.masks_from(prune.lamp().value((), params), 0.5, structure=s)
      for s in structures
    ]
  )
  for masks, want in zip(run(params), run(_params()), strict=True):
    _check_masks(masks, want, params)


def _never():
  schedule = prune.linear(0.8, begin=0, end=3)
  return prune.prune(optax.adam(0.1), schedule, ALL, score=prune.taylor())


def _gradient():
  return prune.prune(
    optax.adam(0.1),
    prune.linear(0.8, begin=0, end=3),
    ALL,
    scope='erk',
    structure=prune.channels(),
    revive='gradient',
  )


WRAPPERS = {
  'never': _never,
  'gradient': _gradient,
  'rigl': lambda: prune.sparse_train(
    optax.adam(0.1), 0.8, ALL, stop=9, every=2
  ),
}


@functools.cache
def _train(name, kind):
  """Parameters and state after four steps, and the compiled step's text."""
  tx = WRAPPERS[name]()
  params = _params() if kind is None else _sharded(kind)
  params = jax.tree.map(jnp.asarray, params)

  @jax.jit
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state, text = tx.init(params), ''
  for i in range(4):
    grads = jax.tree.map(lambda p, i=i: jnp.cos(7 * p + i), params)
    text = text or step.lower(params, state, grads).compile().as_text()
    params, state = step(params, state, grads)
  return params, state, text


@pytest.mark.parametrize('kind', ['Auto', 'Explicit'])
@pytest.mark.parametrize('name', WRAPPERS)
def test_training_equals_that_of_one_device(name, kind):
  params, state, text = _train(name, kind)
  want, alone, _ = _train(name, None)
  _check_collectives(text)
  _check_masks(state.masks, alone.masks, params)
  for key, leaf in params.items():
    sharding = _sharded(kind)[key].sharding
    assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), key
    np.testing.assert_allclose(leaf, want[key], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(leaf == 0, ~np.asarray(state.masks[key]))
    if name == 'gradient':
      assert state.dense[key].sharding.is_equivalent_to(
        leaf.sharding, leaf.ndim
      )
