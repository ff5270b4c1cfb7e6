"""Dependency groups of models nobody foresaw: random ones, odd ones, others'.

A seeded generator makes small networks of everything that convolutional
networks are made of, and what is exact has to be so for random units.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shrunk_models import difference, random_units

from kd_jax import adapters, prune

pytestmark = pytest.mark.once


def _filled(shapes, seed=0):
  rng = np.random.default_rng(seed)

  def fill(path, x):
    noise = rng.normal(size=x.shape).astype('f')
    name = path[-1].key
    if name in ('kernel', 'embedding') or name.startswith('w'):
      noise *= np.sqrt(2 / max(1, np.prod(x.shape[:-1])))
    elif name == 'var':
      noise = np.exp(0.5 * noise)
    else:
      noise = 0.3 * noise + (name == 'scale')
    return jnp.asarray(noise, x.dtype)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def _setup(model, x):
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x))
  forward = adapters.from_linen(model, train_argument=None)
  return forward, _filled(dict(shapes)), {'image': x}


class RandomNet(nn.Module):
  """A few blocks, drawn by a seed, from images `[B, 8, 8, 3]`."""

  seed: int

  @nn.compact
  def __call__(self, x):
    rng = np.random.default_rng(self.seed)
    x = nn.Conv(12, (3, 3), name='stem')(x)
    for i in range(4):
      block = str(rng.choice(list(BLOCKS)))
      x = BLOCKS[block](self, x, rng, f'{i}_{block}')
    if rng.random() < 0.5:
      x = nn.max_pool(x, (2, 2), strides=(2, 2))
      x = x.reshape(x.shape[0], -1)
    else:
      x = x.mean(axis=(1, 2))
    x = nn.relu(nn.Dense(7, name='dense')(x))
    return nn.Dense(3, name='head')(x)

  def norm(self, x, rng, name):
    kinds = {
      'batch': lambda: nn.BatchNorm(use_running_average=True, name=name)(x),
      'group': lambda: nn.GroupNorm(num_groups=3, name=name)(x),
      'none': lambda: x,
    }
    return nn.relu(kinds[rng.choice(list(kinds), p=[0.6, 0.2, 0.2])]())

  def residual(self, x, rng, name):
    inner = 6 * int(rng.integers(1, 3))
    y = nn.Conv(inner, (3, 3), name=f'{name}_in')(x)
    y = self.norm(y, rng, f'{name}_norm')
    return x + nn.Conv(x.shape[-1], (1, 1), name=f'{name}_out')(y)

  def concatenate(self, x, rng, name):
    y = nn.Conv(6, (3, 3), name=name)(x)
    return jnp.concatenate([x, self.norm(y, rng, f'{name}_norm')], axis=-1)

  def depthwise(self, x, rng, name):
    factor = int(rng.integers(1, 3))
    width = x.shape[-1]
    x = nn.Conv(width * factor, (3, 3), feature_group_count=width, name=name)(x)
    return nn.swish(nn.Conv(12, (1, 1), name=f'{name}_point')(x))

  def grouped(self, x, rng, name):
    x = nn.Conv(12, (1, 1), name=f'{name}_in')(x)
    x = self.norm(x, rng, f'{name}_norm')
    return nn.Conv(
      18, (3, 3), feature_group_count=3, use_bias=False, name=name
    )(x)

  def pooled(self, x, rng, name):
    pool = nn.max_pool if rng.random() < 0.5 else nn.avg_pool
    x = pool(x, (2, 2), strides=(1, 1), padding='SAME')
    return self.norm(nn.Conv(12, (3, 3), name=name)(x), rng, f'{name}_norm')

  def excited(self, x, rng, name):
    """Squeeze and excitation: gates of the channels from their means."""
    gates = nn.relu(nn.Dense(4, name=f'{name}_in')(x.mean(axis=(1, 2))))
    gates = nn.sigmoid(nn.Dense(x.shape[-1], name=f'{name}_out')(gates))
    return x * gates[:, None, None]


BLOCKS = {
  name: getattr(RandomNet, name)
  for name in (
    *('residual', 'concatenate', 'depthwise', 'grouped', 'pooled'),
    'excited',
  )
}


def _check_random(seed, draw):
  """Exact for units removed where that is promised; and it fits for all."""
  x = np.random.default_rng(seed).normal(size=(2, 8, 8, 3)).astype('f')
  forward, variables, batch = _setup(RandomNet(seed), x)
  plan = prune.find_groups(forward, variables, batch)
  exact = [g for g in plan.groups if g.exact]
  assert exact and not any('not understood' in w for w in plan.frozen.values())
  for group in plan.groups:
    assert group.exact or 'norm' in group.reason
  kept = random_units(exact, draw)
  assert difference(plan, kept, forward, variables, batch) < 1e-5
  # All of them together: the numbers may differ, the structure may not.
  prune.check_shrunk(plan, random_units(plan.groups), forward, variables, batch)


@pytest.mark.parametrize('seed', range(8))
def test_random_networks_shrink_exactly(seed):
  _check_random(seed, seed)


@settings(
  derandomize=True,
  database=None,
  deadline=None,
  max_examples=4,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(8, 2**31), draw=st.integers(0, 2**31))
def test_drawn_networks_shrink_exactly(seed, draw):
  _check_random(seed, draw)


def test_the_generator_draws_every_block():
  drawn = set()
  for seed in range(8):
    init, x = RandomNet(seed).init, jnp.zeros((1, 8, 8, 3))
    params = jax.eval_shape(init, jax.random.key(0), x)['params']
    drawn |= {name.split('_')[1] for name in params if name[0].isdigit()}
  assert drawn >= set(BLOCKS) - {'excited'}


class Normed(nn.Module):
  groups: int | None = 3
  size: int | None = None

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(12, (3, 3), name='conv')(x)
    x = nn.GroupNorm(self.groups, self.size, name='norm')(x)
    return nn.Dense(3, name='head')(nn.relu(x).mean(axis=(1, 2)))


def test_whole_normalisation_groups_leave_exactly():
  x = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype('f')
  forward, variables, batch = _setup(Normed(), x)
  plan = prune.find_groups(forward, variables, batch)
  assert {g.name: (g.size, g.exact) for g in plan.groups} == {
    'conv:num_groups': (3, True),
    'conv:within': (4, False),
  }
  assert 'norm' in plan.group('conv:within').reason
  kept = {'conv:num_groups': [0, 2]}
  assert plan.overrides(kept) == {'norm': {'num_groups': 2}}
  assert difference(plan, kept, forward, variables, batch) < 1e-5
  within = {'conv:within': [0, 2]}
  assert plan.overrides(within) == {}
  assert difference(plan, within, forward, variables, batch) > 1e-3


class Grouped(nn.Module):
  """Numbers of groups that are written down, depthwise and of three."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(12, (1, 1), name='first')(x))
    x = nn.Conv(12, (3, 3), feature_group_count=12, name='depthwise')(x)
    x = nn.relu(nn.Conv(6, (1, 1), name='point')(x))
    x = nn.Conv(9, (3, 3), feature_group_count=3, name='grouped')(x)
    return nn.Dense(3, name='head')(x.mean(axis=(1, 2)))


def test_groups_of_convolutions_leave_whole_or_uniformly():
  x = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype('f')
  forward, variables, batch = _setup(Grouped(), x)
  plan = prune.find_groups(forward, variables, batch)
  assert {g.name: (g.size, g.width) for g in plan.groups} == {
    'first': (12, 1),
    'point:groups': (3, 2),
    'point:within': (2, 3),
    'grouped:within': (3, 3),
  }
  # The kernel of a grouped convolution has the places of one group only.
  (inner,) = [
    m
    for m in plan.group('point:within').members
    if m.path == 'params/grouped/kernel'
  ]
  assert (inner.axis, inner.positions) == (2, ((0,), (1,)))
  kept = random_units(plan.groups)
  assert plan.overrides(kept) == {}
  assert difference(plan, kept, forward, variables, batch) < 1e-5


def test_a_group_size_that_is_written_down_freezes_its_channels():
  x = np.zeros((2, 6, 6, 3), 'f')
  forward, variables, batch = _setup(Normed(None, 4), x)
  plan = prune.find_groups(forward, variables, batch)
  assert plan.groups == ()
  assert 'group size' in plan.frozen['params/conv/kernel[3]']


# --- operations that are not understood, and those that pick


def _function(apply, shapes, x):
  rng = np.random.default_rng(0)
  params = {k: rng.normal(size=s).astype('f') for k, s in shapes.items()}
  return adapters.from_apply(apply), {'params': params}, {'image': x}


ODD = {
  'fft': lambda x: jnp.abs(jnp.fft.fft(x)),
  'sort': lambda x: jnp.sort(x, axis=-1),
  'cumsum': lambda x: jnp.cumsum(x, axis=-1),
  'rev': lambda x: x[:, ::-1],
  'slice': lambda x: x[:, :4],
  'gather': lambda x: x[:, jnp.array([0, 3, 3, 1])],
  'argmax': lambda x: jax.nn.one_hot(jnp.argmax(x, -1), 4),
  'iota': lambda x: x * jnp.arange(x.shape[-1], dtype='f')[None],
  'constant': lambda x: x + np.arange(8, dtype='f')[None],
  'parts': lambda x: sum(jnp.split(x, [3], axis=-1)[1:]),
}


@pytest.mark.parametrize('name', ODD)
def test_what_is_not_understood_is_frozen_and_named(name):
  def apply(params, x):
    x = ODD[name](x @ params['w'])
    return jax.nn.relu(x @ params['u'][: x.shape[-1]]) @ params['v']

  size = jax.eval_shape(ODD[name], jnp.zeros((2, 8))).shape[-1]
  shapes = {'w': (5, 8), 'u': (size, 6), 'v': (6, 3)}
  x = np.random.default_rng(0).normal(size=(2, 5)).astype('f')
  forward, variables, batch = _function(apply, shapes, x)
  plan = prune.find_groups(forward, variables, batch)
  assert [g.name for g in plan.groups] == ['u']
  said = {'rev': 'rev', 'iota': 'numbered', 'constant': 'constant'}
  said |= {'parts': 'split'}
  assert said.get(name, name) in plan.frozen['params/w[1]']
  kept = {'u': [1, 4]}
  assert difference(plan, kept, forward, variables, batch) < 1e-5


def test_equal_parts_lose_the_same_places():
  def apply(params, x):
    gate, value = jnp.split(x @ params['w'], 2, axis=-1)
    return (jax.nn.sigmoid(gate) * value) @ params['v']

  x = np.random.default_rng(0).normal(size=(2, 5)).astype('f')
  forward, variables, batch = _function(apply, {'w': (5, 8), 'v': (4, 3)}, x)
  plan = prune.find_groups(forward, variables, batch)
  (group,) = plan.groups
  (w,) = [m for m in group.members if m.path == 'params/w']
  assert w.positions == ((0, 4), (1, 5), (2, 6), (3, 7))
  kept = {'w': [0, 3]}
  assert difference(plan, kept, forward, variables, batch) < 1e-5


def _attention(split, names=('wq', 'wk', 'wv')):
  def apply(params, x):
    q, k, v = (split(x @ params[n]) for n in names)
    p = jax.nn.softmax(jnp.einsum('bqhd,bkhd->bhqk', q, k))
    y = jnp.einsum('bhqk,bkhd->bqhd', p, v)
    return y.reshape(*x.shape[:2], -1) @ params['wo']

  shapes = {n: (5, 16) for n in names} | {'wo': (16, 3)}
  x = np.random.default_rng(0).normal(size=(2, 6, 5)).astype('f')
  return _function(apply, shapes, x)


def test_a_number_of_heads_in_the_code_leaves_uniform_removal():
  forward, variables, batch = _attention(
    lambda x: x.reshape(*x.shape[:2], 4, -1)
  )
  plan = prune.find_groups(forward, variables, batch)
  assert {g.name: (g.size, g.width) for g in plan.groups} == {
    'wq': (4, 4),
    'wv': (4, 4),
  }
  assert plan.group('wv').exact and not plan.group('wq').exact
  kept = {'wv': [1, 2]}
  assert difference(plan, kept, forward, variables, batch) < 1e-5


def test_a_size_of_heads_in_the_code_is_found_by_trying():
  """One place less in each of 4 heads of 4 would run as 3 heads of 4."""
  forward, variables, batch = _attention(
    lambda x: x.reshape(*x.shape[:2], -1, 4), ('w', 'w', 'w')
  )
  plan = prune.find_groups(forward, variables, batch)
  assert plan.groups == ()
  assert 'computes something else' in plan.frozen['params/w[1]']


# --- models that look at their widths


class Compared(nn.Module):
  """A block that asks whether its input has the width it was written for."""

  width: int

  @nn.compact
  def __call__(self, x):
    y = nn.Conv(self.width, (3, 3), name='conv1')(x)
    y = nn.Conv(self.width, (3, 3), name='conv2')(nn.relu(y))
    if x.shape[-1] != self.width:
      x = nn.Conv(self.width, (1, 1), name='shortcut')(x)
    return x + y


class ComparedNet(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(6, (1, 1), name='stem')(x)
    for i, width in enumerate((6, 8, 8)):
      x = Compared(width, name=f'block{i}')(x)
    return nn.Dense(3, name='head')(x.mean(axis=(1, 2)))


def test_attributes_that_are_compared_follow_the_stream():
  x = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype('f')
  forward, variables, batch = _setup(ComparedNet(), x)
  plan = prune.find_groups(forward, variables, batch)
  kept = {'stem': [0, 1, 5], 'block1/conv2': [0, 2, 3, 7]}
  assert set(kept) < {g.name for g in plan.groups}
  assert plan.overrides(kept)['block0'] == {'width': 3}
  assert plan.overrides(kept)['block2'] == {'width': 4}
  assert difference(plan, kept, forward, variables, batch) < 1e-5


def test_widths_that_become_equal_by_accident_are_noticed():
  x = np.zeros((2, 4, 4, 3), 'f')
  forward, variables, batch = _setup(ComparedNet(), x)
  plan = prune.find_groups(forward, variables, batch)
  # block1 projects 6 channels to 8; with 4 and 4 its code would not.
  kept = {'stem': [0, 1, 2, 3], 'block1/conv2': [0, 2, 3, 7]}
  with pytest.raises(ValueError, match='computes something else') as e:
    prune.check_shrunk(plan, kept, forward, variables, batch)
  assert '\n' not in str(e.value)


# --- nnx, embeddings, odd trees


class NnxNet(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.deep = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
    self.hidden = nnx.Linear(8, 6, rngs=rngs)
    self.head = nnx.Linear(6, 3, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.deep(nnx.relu(self.norm(self.conv(x)))))
    return self.head(nnx.relu(self.hidden(x.mean(axis=(1, 2)))))


def test_nnx_modules_shrink_where_shapes_follow_the_parameters():
  forward, variables = adapters.from_nnx(NnxNet(nnx.Rngs(0)))
  x = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype('f')
  batch = {'image': x}
  plan = prune.find_groups(forward, variables, batch)
  assert [g.name for g in plan.groups] == ['hidden']
  # The depthwise convolution's groups are an attribute of the module.
  assert 'does not run' in plan.frozen['params/conv/kernel[3]']
  kept = {'hidden': [0, 2, 5]}
  assert difference(plan, kept, forward, variables, batch) < 1e-5


class Tied(nn.Module):
  """An embedding that is also the classifier, and a vocabulary that stays."""

  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(11, 6, name='embed')
    x = embed(tokens)
    x = x + nn.Dense(6, name='out')(nn.gelu(nn.Dense(9, name='in')(x)))
    return embed.attend(x)


def test_embeddings_lose_features_and_keep_their_vocabulary():
  tokens = np.arange(10).reshape(2, 5) % 11
  forward, variables, batch = _setup(Tied(), tokens)
  plan = prune.find_groups(forward, variables, batch)
  assert {g.name: g.size for g in plan.groups} == {'embed': 6, 'in': 9}
  assert 'params/embed/embedding[0]' in plan.frozen
  kept = {'embed': [0, 1, 5], 'in': [2, 3]}
  assert difference(plan, kept, forward, variables, batch) < 1e-5


def test_what_is_kept_on_request_stays():
  x = np.zeros((2, 6, 6, 3), 'f')
  forward, variables, batch = _setup(Normed(), x)
  plan = prune.find_groups(forward, variables, batch, keep=['.*:within'])
  assert [g.name for g in plan.groups] == ['conv:num_groups']
  assert plan.frozen['params/conv:within'] == 'kept as asked'
  plan = prune.find_groups(
    forward, variables, batch, keep=['params/conv/kernel']
  )
  assert plan.groups == ()
  assert plan.frozen['params/conv/kernel[3]'] == 'kept as asked'
  with pytest.raises(ValueError, match="'covn' matches nothing"):
    prune.find_groups(forward, variables, batch, keep=['covn'])


def test_an_axis_that_stays_in_part_says_so():
  """Dense layers side by side, of which the first is returned too."""

  def apply(params, x):
    y = x @ params['w']
    z = jnp.concatenate([y, x @ params['u']], axis=-1) @ params['v']
    return jnp.concatenate([y, z], axis=-1)

  x = np.random.default_rng(0).normal(size=(2, 5)).astype('f')
  shapes = {'w': (5, 4), 'u': (5, 6), 'v': (10, 3)}
  forward, variables, batch = _function(apply, shapes, x)
  plan = prune.find_groups(forward, variables, batch)
  assert [g.name for g in plan.groups] == ['u']
  assert plan.frozen['params/v[0]'] == 'some of it: the output'
  assert plan.frozen['params/w[1]'] == 'the output'
  kept = {'u': [0, 3, 4]}
  assert difference(plan, kept, forward, variables, batch) < 1e-5


def test_shapes_are_enough():
  x = np.zeros((2, 6, 6, 3), 'f')
  forward, variables, batch = _setup(Normed(), x)
  abstract = jax.eval_shape(lambda v: v, variables)
  shapes = {'image': jax.ShapeDtypeStruct(x.shape, x.dtype)}
  assert prune.find_groups(forward, abstract, shapes) == prune.find_groups(
    forward, variables, batch
  )


def test_a_batch_as_large_as_a_layer_is_no_channel():
  """Equal sizes by accident: the batch, the width and the classes."""

  def apply(params, x):
    return jax.nn.relu(x.reshape(x.shape[0], -1) @ params['w']) @ params['v']

  x = np.random.default_rng(0).normal(size=(4, 2, 2)).astype('f')
  forward, variables, batch = _function(apply, {'w': (4, 4), 'v': (4, 4)}, x)
  (group,) = prune.find_groups(forward, variables, batch).groups
  assert {(m.path, m.axis) for m in group.members} == {
    ('params/w', 1),
    ('params/v', 0),
  }
