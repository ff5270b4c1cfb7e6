"""Whole residual blocks: found, pruned in training, and removed."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from quantized_models import values
from untrained_run import config_of, finish_distill

from kd_jax import adapters, cli, models, objectives, prune
from kd_jax.recipe import load_artefact, shrunk
from kd_jax.step import init_state, make_train_step
from kd_jax.storage.workdir import Workdir

pytestmark = pytest.mark.once
RESNET = ('stage1_block1', 'stage1_block2', 'stage2_block2', 'stage3_block2')
OPTIONS = {
  'resnet': {'name': 'resnet', 'depth': 14, 'width': 4},
  'vit': {'name': 'vit', 'width': 8, 'depth': 3, 'heads': 2, 'patch_size': 4},
}


@functools.cache
def _network(name):
  model = models.make_model(**OPTIONS[name], num_classes=5)
  rng = np.random.default_rng(0)
  batch = {'image': jnp.asarray(rng.normal(size=(4, 8, 8, 1)), jnp.float32)}
  shapes = jax.eval_shape(
    lambda: adapters.init_linen(model, jax.random.key(0), batch)
  )
  return model, values(shapes, rng), batch


@functools.cache
def _found(name):
  model, variables, batch = _network(name)
  return prune.find_residual_blocks(
    adapters.from_linen(model), variables, batch
  )


def test_blocks_are_found_and_others_named():
  blocks = _found('resnet')
  assert blocks.names == RESNET
  assert {*blocks.frozen} == set()
  assert _found('vit').names == ('block1', 'block2', 'block3')
  text = str(blocks)
  assert text.count('\n') == 3 and 'stage1_block1  304 parameters' in text
  json.dumps(blocks._asdict())


class Inner(nn.Module):
  """Residual or not, as its name says."""

  skip: bool

  @nn.compact
  def __call__(self, x, _=None):
    y = nn.Dense(x.shape[-1], name='dense')(x)
    return (x + y) if self.skip else nn.relu(y)


class Mixed(nn.Module):
  """A plain module, residual ones within and without remat, a scanned stack."""

  @nn.compact
  def __call__(self, x):
    x = Inner(False, name='plain')(x)
    x = nn.remat(Inner)(True, name='remat')(x)
    x = Inner(True, name='shared')(Inner(True, name='shared2')(x))

    class Step(nn.Module):
      @nn.compact
      def __call__(self, x, _):
        return Inner(True, name='inner')(x), None

    scan = nn.scan(
      Step, variable_axes={'params': 0}, split_rngs={'params': True}, length=2
    )
    return nn.Dense(3, name='head')(scan(name='stack')(x, None)[0])


def test_what_is_no_identity_or_scanned_stays():
  batch = {'image': jax.random.normal(jax.random.key(0), (4, 6))}
  model = Mixed()
  variables = model.init(jax.random.key(1), batch['image'])
  forward = adapters.from_linen(model, train_argument=None)
  find = functools.partial(
    prune.find_residual_blocks, forward, variables, batch
  )
  blocks = find()
  assert blocks.names == ('remat', 'shared2', 'shared')
  assert blocks.frozen == {
    'plain': 'at zero it does not return what it is given',
    'stack/inner': 'it is scanned',
  }
  kept = find(keep=['shared.*'])
  assert kept.names == ('remat',)
  assert kept.frozen['shared'] == 'kept as asked'
  with pytest.raises(ValueError, match="'shred' matches nothing"):
    find(keep=['shred'])
  with pytest.raises(ValueError, match='not from adapters.from_linen'):
    prune.find_residual_blocks(lambda v, b: b['image'], variables, batch)
  for patterns, left in ((['.*'], 'none'), (['shared.*'], 'remat')):
    with pytest.raises(ValueError, match=f'the model has {left}'):
      prune.residual_blocks(find(keep=patterns))
  # What is kept holds what it is in.
  inner = find(keep=['remat/dense'])
  assert inner.names == ('shared2', 'shared')
  assert inner.frozen['remat'] == 'it holds remat/dense, kept as asked'
  with pytest.raises(ValueError, match="Unknown residual block 'plain'"):
    blocks.overrides(['plain'])


@pytest.mark.parametrize(
  ('name', 'gone'),
  [
    ('resnet', ['stage1_block1']),
    ('resnet', ['stage1_block2', 'stage3_block2']),
    ('vit', ['block2', 'block3']),
  ],
)
def test_a_model_without_blocks_is_the_model_with_them_at_zero(name, gone):
  model, variables, batch = _network(name)
  blocks = _found(name)
  shapes = {
    p: blocks.shapes[f'params/{p}'] for n in gone for p in blocks.params(n)
  }
  masks = {path: jnp.zeros(shape, bool) for path, shape in shapes.items()}
  assert blocks.gone(masks) == gone
  forward = adapters.from_linen(model)
  small = prune.without_blocks(blocks, variables, gone)
  smaller = forward.intercepted(prune.resized(blocks.overrides(gone)))
  assert len(jax.tree.leaves(small)) < len(jax.tree.leaves(variables))
  masked = prune.apply_masks(variables['params'], masks)

  def loss(run, variables, params, train):
    out = run({**variables, 'params': params}, batch, None, train=train)
    return jnp.sum(jnp.sin(out.output)), out.output

  for train in (False, True):
    runs = [
      jax.jit(
        jax.grad(functools.partial(loss, run, tree, train=train), has_aux=True)
      )(params)
      for run, tree, params in (
        (forward, variables, masked),
        (smaller, small, small['params']),
      )
    ]
    (grads, want), (small_grads, got) = runs
    assert float(jnp.abs(want).max()) > 0.1
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    grads = prune.without_blocks(blocks, grads, gone)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    for a, b in zip(
      jax.tree.leaves(grads), jax.tree.leaves(small_grads), strict=True
    ):
      np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * scale)


def test_training_masks_whole_blocks_and_goes_on_without_them():
  model, variables, batch = _network('resnet')
  blocks, forward = _found('resnet'), adapters.from_linen(model)
  batch = {**batch, 'label': jnp.arange(4)}
  objective, rng = objectives.hard_labels(), jax.random.key(0)
  structure = prune.residual_blocks(blocks)
  rules = [('.*/kernel', True)]
  adam = optax.adam(1e-3)
  tx = prune.prune(
    adam, lambda step: jnp.minimum(step / 4, 0.75), rules, structure=structure
  )
  step = jax.jit(make_train_step(forward, objective, tx))
  state = init_state(forward, objective, tx, variables, batch)
  counts = []
  for _ in range(5):
    state, _ = step(state, batch, rng)
    counts.append(len(blocks.gone(prune.masks_of(state.opt_state))))
  # Sparsity 0, 0.25, 0.5, 0.75: of four blocks; one stays.
  assert counts == [0, 1, 2, 3, 3]
  gone = blocks.gone(prune.masks_of(state.opt_state))
  for name in gone:
    for path in blocks.params(name):
      leaf = functools.reduce(lambda t, k: t[k], path.split('/'), state.params)
      assert not np.any(leaf)
  # What is left has trained, its norms too.
  (left,) = {*blocks.names} - {*gone}
  before = variables['params'][left]['norm1']['scale']
  assert np.any(state.params[left]['norm1']['scale'] != before)

  small = prune.without_blocks(blocks, state, gone)
  masks = prune.masks_of(small.opt_state)
  assert not any(path.startswith(tuple(gone)) for path in masks)
  assert not {*gone} & {*small.params, *small.model_state['batch_stats']}
  smaller = forward.intercepted(prune.resized(blocks.overrides(gone)))
  plain = small.replace(opt_state=prune.find_state(small.opt_state).inner)
  on = jax.jit(make_train_step(smaller, objective, adam))
  dense = state.replace(opt_state=prune.find_state(state.opt_state).inner)
  with_zeros = jax.jit(make_train_step(forward, objective, adam))
  after, metrics = on(plain, batch, rng)
  whole, expected = with_zeros(dense, batch, rng)
  np.testing.assert_allclose(
    metrics['loss/total'], expected['loss/total'], rtol=1e-5
  )
  # Adam goes on from moments that are those of what is left.
  want = prune.without_blocks(blocks, whole.params, gone)
  for a, b in zip(
    jax.tree.leaves(after.params), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


class Tower(nn.Module):
  """Blocks in a container, one of them by keyword, and a head of zeros."""

  zeros: bool = False

  @nn.compact
  def __call__(self, x):
    class Encoder(nn.Module):
      @nn.compact
      def __call__(self, x):
        for i in (1, 2):
          x = Inner(True, name=f'block{i}')(x)
        return x

    x = Encoder(name='tower')(Inner(True, name='block1')(x))
    twice = Inner(True, name='twice')
    x = twice(x=twice(x))
    init = nn.initializers.zeros if self.zeros else nn.initializers.ones
    return nn.Dense(3, name='head', kernel_init=init)(x)


def _tower(**options):
  batch = {'image': jax.random.normal(jax.random.key(0), (4, 6))}
  model = Tower(**options)
  variables = model.init(jax.random.key(1), batch['image'])
  forward = adapters.from_linen(model, train_argument=None)
  return forward, variables, batch


def test_blocks_in_a_container_leave_one_by_one():
  forward, variables, batch = _tower()
  blocks = prune.find_residual_blocks(forward, variables, batch)
  assert blocks.names == ('block1', 'tower/block1', 'tower/block2')
  zeros = prune.find_residual_blocks(*_tower(zeros=True))
  assert zeros.names == () and zeros.frozen['block1'] == (
    'the output does not depend on it'
  )
  # The outer one does not take what has its name inside another with it.
  small = prune.without_blocks(
    blocks, {**variables, 'quant_stats': variables['params']}, ['block1']
  )
  for tree in small.values():
    assert {*tree} == {'tower', 'twice', 'head'} and len(tree['tower']) == 2


def test_optimizers_with_states_in_dicts_lose_blocks_too():
  forward, variables, batch = _tower()
  blocks = prune.find_residual_blocks(forward, variables, batch)
  params = variables['params']
  gone = ['tower/block1', 'tower/block2']
  for tx in (
    optax.multi_transform(
      {'all': optax.adam(0.1)}, lambda p: jax.tree.map(lambda _: 'all', p)
    ),
    optax.chain(optax.trace(0.9), optax.masked(optax.adam(0.1), True)),
  ):
    small = prune.without_blocks(blocks, tx.init(params), gone)
    left = prune.without_blocks(blocks, params, gone)
    assert 'tower' not in left
    want = jax.tree.map(jnp.shape, tx.init(left))
    assert jax.tree.leaves(jax.tree.map(jnp.shape, small)) == (
      jax.tree.leaves(want)
    )
    if not hasattr(small, 'inner_states'):
      updates, _ = tx.update(left, small, left)
      assert jax.tree.structure(updates) == jax.tree.structure(left)


def test_boxed_parameters_are_looked_into():
  class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
      init = nn.with_partitioning(nn.initializers.ones, (None, 'model'))
      for i in (1, 2):

        class Block(nn.Module):
          @nn.compact
          def __call__(self, x):
            return x + nn.Dense(6, kernel_init=init, name='dense')(x)

        x = Block(name=f'block{i}')(x)
      return x.sum(-1, keepdims=True)

  batch = {'image': jnp.ones((2, 6))}
  variables = Boxed().init(jax.random.key(0), batch['image'])
  forward = adapters.from_linen(Boxed(), train_argument=None)
  blocks = prune.find_residual_blocks(forward, variables, batch)
  assert blocks.names == ('block1', 'block2')
  small = prune.without_blocks(blocks, variables, ['block2'])
  smaller = forward.intercepted(prune.resized(blocks.overrides(['block2'])))
  np.testing.assert_array_equal(
    smaller(small, batch).output, 42 * np.ones((2, 1))
  )


def test_what_has_no_scores_stays():
  shapes = {f'params/{n}/w': (2,) for n in 'abc'}
  blocks = prune.ResidualBlocks(('a', 'b', 'c'), {}, shapes)
  scores = {'a/w': jnp.ones(2), 'b/w': jnp.full(2, 0.5)}
  masks = prune.residual_blocks(blocks)(scores, 0.5, 'global')
  assert blocks.gone(masks) == ['b'] and 'c/w' not in masks
  with pytest.raises(ValueError, match="Unknown scope 'bogus'"):
    prune.masks_from(
      scores, 0.5, scope='bogus', structure=prune.residual_blocks(blocks)
    )
  # Likewise groups of channels, of which 'one' alone has scores.
  params = {n: jnp.ones((4, 4)) for n in ('one', 'two', 'three')}
  forward = adapters.from_apply(
    lambda p, x: jax.nn.relu(jax.nn.relu(x @ p['one']) @ p['two']) @ p['three']
  )
  plan = prune.find_groups(
    forward, {'params': params}, {'image': jnp.ones((2, 4))}
  )
  scores = {'one': jnp.arange(16.0).reshape(4, 4)}
  assert {g.name for g in plan.groups} == {'one', 'two'}
  kept = prune.choose_units(plan, scores, 0.5)
  assert {n: k.tolist() for n, k in kept.items()} == {'one': [2, 3]}
  masks = prune.neurons(plan)(scores, 0.5, 'global')
  assert 'three' not in masks and masks['two'].sum() == 8


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize('revive', ['never', 'gradient'])
def test_sharded_blocks_are_pruned_as_on_one_device(kind, revive):
  mesh = jax.make_mesh((8,), ('d',), axis_types=(kind,))
  sharding = NamedSharding(mesh, PartitionSpec('d', None))
  rng = np.random.default_rng(0)
  params = {n: {'w': rng.normal(size=(16, 4)).astype('f')} for n in 'abc'}
  shapes = {f'params/{n}/w': (16, 4) for n in 'abc'}
  blocks = prune.ResidualBlocks(('a', 'b', 'c'), {}, shapes)
  tx = prune.prune(
    optax.adam(0.1),
    prune.linear(0.67, begin=0, end=2),
    [('.*', True)],
    structure=prune.residual_blocks(blocks),
    revive=revive,
  )

  @jax.jit
  def step(params, state):
    grads = jax.tree.map(jnp.cos, params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  ends = []
  for start in (jax.device_put(params, sharding), params):
    now = jax.tree.map(jnp.asarray, start)
    state = tx.init(now)
    for _ in range(4):
      now, state = step(now, state)
    ends.append((now, state.masks))
  (sharded, masks), (alone, want) = ends
  assert len(blocks.gone(masks)) == 2
  for name in 'abc':
    assert masks[f'{name}/w'].sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(masks[f'{name}/w'], want[f'{name}/w'])
    np.testing.assert_allclose(
      sharded[name]['w'], alone[name]['w'], rtol=1e-5, atol=1e-6
    )


def test_pools_rank_blocks_by_mean_or_sum():
  shapes = {'params/a/w': (4,), 'params/b/w': (1,)}
  blocks = prune.ResidualBlocks(('a', 'b'), {}, shapes)
  scores = {'a/w': jnp.ones(4), 'b/w': jnp.full(1, 2.0), 'head/w': jnp.zeros(2)}
  gone = {
    pool: blocks.gone(
      prune.residual_blocks(blocks, pool=pool)(scores, 0.5, 'layer')
    )
    for pool in ('mean', 'sum')
  }
  assert gone == {'mean': ['a'], 'sum': ['b']}
  everything = prune.residual_blocks(blocks)(scores, 1.0, 'global')
  assert blocks.gone(everything) == ['a'] and everything['head/w'].all()
  with pytest.raises(ValueError, match="Unknown pool 'max'"):
    prune.residual_blocks(blocks, pool='max')


def test_the_command_removes_blocks(data_dir, tmp_path, capsys):
  config = config_of(data_dir, (8, 6))
  config.student.model = {'name': 'resnet', 'depth': 14, 'width': 4}
  directory = finish_distill(config, tmp_path / 'run')
  words = ['shrink', f'--workdir={directory}', '--structure=residual_blocks']
  assert cli.main([*words, '--keep=stage3.*']) == 0
  printed = capsys.readouterr().out
  assert 'stage1_block1  ' in printed and 'stage3_block2 stays' in printed
  about = json.loads((directory / 'shrink' / 'shrink.json').read_text())
  assert about['kept'] == {'blocks': [1, 3]}
  assert {*about['overrides'].values()} == {None}
  run = shrunk.Run(config, Workdir(directory, config.to_dict()))
  model = run.model('student')
  forward, variables = load_artefact(directory / 'shrink', model)
  assert not {*about['overrides']} & {*variables['params']}
  assert forward(variables, run.example).output.shape == (1, 10)
  assert '2 of 3 residual blocks gone' in printed
  for flags, sentence in (
    (['--structure=block'], "Unknown structure 'block'"),
    ([words[2], '--sparsity=2'], 'A sparsity is a share in [0, 1), not 2.0.'),
    ([words[2], '--multiple_of=8'], "are of structure='neurons'"),
    ([words[2], '--keep=stage[12].*'], 'two are needed that could leave'),
  ):
    assert cli.main([*words[:2], *flags]) == 2
    assert sentence in capsys.readouterr().err
