"""Meshes of data, fsdp and tensor: the same numbers, and where arrays lie."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax import (
  adapters,
  guard,
  models,
  objectives,
  prune,
  quantize,
  sharding,
)
from kd_jax.plan import hlo
from kd_jax.sharding import layout
from kd_jax.step import init_state, make_train_step

MESHES = {
  'data': {},
  'fsdp': {'fsdp': 8},
  'tensor': {'tensor': 4},
  'all three': {'fsdp': 2, 'tensor': 2},
}
MODELS = {
  'cnn': {'name': 'resnet', 'depth': 8, 'width': 8},
  'vit': {'name': 'vit', 'width': 16, 'depth': 2, 'heads': 4, 'patch_size': 4},
}
SMALL = layout.DEFAULT._replace(least=64)


@functools.cache
def _parts(name):
  """A taught, pruned and fake-quantized student: step, state, batch."""
  options = {**MODELS[name], 'num_classes': 4}
  student = models.make_model(**options)
  teacher = models.make_model(**options)
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.normal(size=(16, 8, 8, 1)).astype('f'),
    'label': np.arange(16) % 4,
  }
  # Inputs are rounded from the second step on: a sum in another order may move
  # a code over an edge.
  rounded = quantize.quantize_activations(
    [('.*', quantize.INT8_ACTIVATIONS)], begin=1
  )
  forward = adapters.from_linen(student, interceptors=[rounded])
  variables, taught = (
    adapters.init_linen(m, jax.random.key(i), batch)
    for i, m in enumerate((student, teacher))
  )
  variables = dict(variables)
  variables['quant_stats'] = quantize.init_quant_stats(
    forward, variables, batch
  )
  objective = objectives.weighted_sum(
    {
      'kd': (0.9, objectives.soft_targets(temperature=4.0)),
      'ce': (0.1, objectives.hard_labels()),
    }
  )
  schedule = prune.linear(0.8, begin=0, end=2)
  tx = prune.prune(
    optax.sgd(0.02, momentum=0.9), schedule, [('.*/kernel', True)]
  )
  teacher_fn = adapters.from_linen(teacher)
  weights = [('.*/kernel', quantize.INT8_WEIGHTS)]
  step = make_train_step(
    forward,
    objective,
    tx,
    teacher_fn=teacher_fn,
    params_fn=functools.partial(quantize.fake_quant_params, rules=weights),
  )
  state = init_state(
    forward,
    objective,
    tx,
    variables,
    batch,
    teacher_fn=teacher_fn,
    teacher=taught,
  )
  return guard.drop_nonfinite(step), state, batch


def _train(name, mesh, rules=SMALL, steps=3):
  """The state after the first step and after the last, and all losses."""
  step, state, batch = _parts(name)
  compiled = sharding.compile_step(step, mesh, donate=False, layout=rules)
  state = sharding.place_state(state, mesh, layout=rules)
  losses, states = [], []
  for _ in range(steps):
    state, metrics = compiled(
      state, sharding.shard_batch(batch, mesh), jax.random.key(0)
    )
    losses.append(float(metrics['loss/total']))
    states.append(state)
  return states[0], states[-1], losses


@functools.cache
def _alone(name):
  return _train(name, sharding.make_mesh(jax.devices()[:1]))


@pytest.mark.parametrize(
  'name, kind', [*(('cnn', kind) for kind in MESHES), ('vit', 'all three')]
)
def test_every_mesh_has_the_numbers_of_one_device(name, kind):
  mesh = sharding.make_mesh(**MESHES[kind])
  rules = SMALL._replace(teacher=('fsdp', 'tensor'))
  first, state, losses = _train(name, mesh, rules)
  first_alone, want, expected = _alone(name)
  # SGD: Adam divides by noise where gradients are nil.
  np.testing.assert_allclose(losses[0], expected[0], rtol=1e-5)
  for p, q in zip(
    jax.tree.leaves(first), jax.tree.leaves(first_alone), strict=True
  ):
    np.testing.assert_allclose(p, q, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(losses, expected, rtol=5e-3)
  masks, alone = (prune.masks_of(s.opt_state) for s in (state, want))
  for path, mask in alone.items():
    differs = np.mean(np.asarray(masks[path]) != np.asarray(mask))
    assert differs <= 0.02, path
  # State stays where it was put, and what mirrors a parameter lies with it.
  placed = layout.state_shardings(state.replace(teacher=None), mesh, rules)
  for leaf, where in zip(
    jax.tree.leaves(state.replace(teacher=None)),
    jax.tree.leaves(placed),
    strict=True,
  ):
    assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
  moments = prune.find_state(state.opt_state).inner[0].trace
  split = 0
  for p, m in zip(
    jax.tree.leaves(state.params), jax.tree.leaves(moments), strict=True
  ):
    assert p.sharding.is_equivalent_to(m.sharding, p.ndim)
    split += not p.sharding.is_fully_replicated
  assert (split > 0) == (kind != 'data')


@functools.cache
def _collectives(name, kind):
  """Collectives and their owners' bytes, on eight CPUs."""
  step, state, batch = _parts(name)
  mesh = sharding.make_mesh(**MESHES[kind])
  call = sharding.compile_step(step, mesh, donate=False, layout=SMALL)
  shapes = jax.eval_shape(lambda: (state, batch, jax.random.key(0)))
  text = call.lower(*shapes).compile().as_text()
  student = state.replace(teacher=None)
  placed = layout.state_shardings(student, mesh, SMALL).params
  entries = [
    (math.prod(where.shard_shape(p.shape)), p.size)
    for p, where in zip(
      jax.tree.leaves(state.params), jax.tree.leaves(placed), strict=True
    )
  ]
  return hlo.owned(hlo.collectives(text), entries)


def _bytes(found, owner):
  return sum(shares.get(owner, 0) for _, shares in found)


@pytest.mark.parametrize('name', MODELS)
def test_the_gradients_are_summed_once_and_together(name):
  """Data parallel: all-reduces of what the student owns, and nothing else."""
  found = _collectives(name, 'data')
  # No resharding, and no gather: parameters and teacher are everywhere.
  assert {c.kind for c, _ in found} == {'all-reduce'}
  assert {c.group for c, _ in found} == {8}
  owners = {owner for _, shares in found for owner in shares}
  assert owners == {'gradients', 'statistics', 'metrics'}
  params = _parts(name)[1].params
  size = sum(p.nbytes for p in jax.tree.leaves(params))
  assert _bytes(found, 'gradients') == size
  # One all-reduce has all gradients but those of BatchNorm's scales and
  # biases, which its backward pass sums where it stands.
  carry = [shares['gradients'] for _, shares in found if 'gradients' in shares]
  norms = sum(
    p.nbytes
    for path, p in jax.tree_util.tree_leaves_with_path(params)
    if 'norm' in jax.tree_util.keystr(path)
  )
  assert max(carry) >= size - norms
  if name == 'vit':
    assert carry == [size]
  # Of the rest, scalars for metrics, and the means of BatchNorm and observers.
  assert _bytes(found, 'metrics') <= 4 * 8
  for collective, shares in found:
    if 'statistics' in shares:
      assert max(len(a.shape) for a in collective.arrays) <= 4
      assert shares['statistics'] <= 2 * norms


@pytest.mark.parametrize('name', MODELS)
def test_fsdp_gathers_parameters_and_leaves_the_teacher_where_it_is(name):
  found = _collectives(name, 'fsdp')
  assert _bytes(found, 'teacher') == 0
  assert _bytes(found, 'parameters') > 0
  size = sum(p.nbytes for p in jax.tree.leaves(_parts(name)[1].params))
  assert _bytes(found, 'gradients') <= size


def test_specs_of_parameters():
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  spec = functools.partial(layout.param_spec, mesh=mesh, layout=SMALL)
  assert spec('block1/attention/query/kernel', (16, 16)) == P('fsdp', 'tensor')
  assert spec('block1/attention/out/kernel', (16, 16)) == P('tensor', 'fsdp')
  assert spec('stage1_block1/conv2/kernel', (3, 3, 8, 8)) == P(
    None, None, 'tensor', 'fsdp'
  )
  # What does not divide, and what is small, stays whole.
  assert spec('block1/mlp/dense1/kernel', (5, 7)) == P(None, None)
  assert spec('head/bias', (4,)) == P(None)
  assert layout.param_spec('head/kernel', (64, 4), mesh) == P(None, None)


def test_a_mesh_that_does_not_fit_gets_one_sentence():
  for options, message in (
    ({'fsdp': 3}, 'does not fit 8 devices'),
    ({'fsdp': -1}, 'one of them may be -1'),
    ({'data': 2, 'fsdp': 2}, 'has 4 devices, but there are 8'),
    ({'data': 0}, 'does not fit 8 devices'),
  ):
    with pytest.raises(ValueError, match=message):
      sharding.make_mesh(**options)
  mesh = sharding.make_mesh(fsdp=2)
  assert dict(mesh.shape) == {'data': 4, 'fsdp': 2, 'tensor': 1}
  for compiler in ('shard_map', 'pmap'):
    with pytest.raises(ValueError, match="compiler='.*' is data parallel"):
      sharding.compile_step(lambda *a: a, mesh, compiler)


def test_a_batch_is_split_over_data_and_fsdp():
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  batch = sharding.shard_batch({'x': np.arange(8.0)}, mesh)
  assert {s.data.shape for s in batch['x'].addressable_shards} == {(2,)}
  assert batch['x'].sharding.is_equivalent_to(
    NamedSharding(mesh, P(('data', 'fsdp'))), 1
  )
  with pytest.raises(ValueError, match='batch of 6 does not divide over 4'):
    sharding.shard_batch({'x': np.arange(6.0)}, mesh)
  assert jnp.sum(batch['x']) == 28
