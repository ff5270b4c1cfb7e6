"""Dependency groups: what leaves together, what stays and why, and exactness.

Everywhere the shrunk model is compared with the whole one whose units are at
zero. Hand-written plans of small networks say what the groups must be.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from shrunk_models import difference, random_units, unit_masks

from kd_jax import adapters, models, prune, quantize
from kd_jax.prune.tags import ALWAYS, Tags

FAMILIES = {
  'mlp': models.MLP(3, hidden=(8, 6)),
  'cnn': models.CNN(3, widths=(4, 6)),
  'resnet': models.CifarResNet(3, depth=8, width=4, stem_width=3),
  'resnet50_cifar': models.CifarBottleneckResNet(3, blocks=(2, 1), width=2),
  'wrn': models.WideResNet(3, depth=10, widen_factor=1),
  'vgg': models.VGG(3, depth=8, width=4),
  'mobilenet_v2_cifar': models.CifarMobileNetV2(3, width=0.125, expansion=2),
  'shufflenet_v1': models.ShuffleNetV1(3, widths=(36, 48), blocks=(2, 2)),
  'shufflenet_v2': models.ShuffleNetV2(
    3, widths=(8, 16), blocks=(2, 1), last_width=12
  ),
  'imagenet_resnet': models.ImageNetResNet(3, blocks=(1, 2), width=4),
  'imagenet_bottleneck': models.ImageNetResNet(
    3, blocks=(2, 1), bottleneck=True, width=2
  ),
  'mobilenet_v1': models.MobileNetV1(3, width=0.25),
  'mobilenet_v2': models.MobileNetV2(3, width=0.125),
  'vit': models.ViT(3, patch_size=8, width=12, depth=1, heads=3),
  'deit': models.ViT(
    3, patch_size=8, width=12, depth=1, heads=3, distilled=True
  ),
  'convnext': models.ConvNeXt(3, blocks=(1, 1), widths=(4, 8)),
}
# Families whose numbers are compared too, the others' shapes only: these have
# every kind of layer, and the others compile for long.
NUMBERS = {
  *('mlp', 'cnn', 'resnet', 'resnet50_cifar', 'vgg', 'shufflenet_v1'),
  *('shufflenet_v2', 'vit', 'deit', 'convnext'),
}


def _filled(model, batch, seed=0):
  """Variables unlike those of a new model: no zeros, no ones."""
  rng = np.random.default_rng(seed)

  def fill(path, x):
    noise = rng.normal(size=x.shape).astype('f')
    if path[-1].key in ('kernel', 'embedding'):
      noise *= np.sqrt(2 / max(1, np.prod(x.shape[:-1])))
    elif path[-1].key == 'var':
      noise = np.exp(0.5 * noise)
    else:
      noise = 0.3 * noise + (path[-1].key in ('scale', 'gamma'))
    return jnp.asarray(noise, x.dtype)

  shapes = jax.eval_shape(
    lambda: adapters.init_linen(model, jax.random.key(0), batch)
  )
  return jax.tree_util.tree_map_with_path(fill, shapes)


def _images(size=16, channels=3):
  rng = np.random.default_rng(0)
  return {'image': rng.normal(size=(2, size, size, channels)).astype('f')}


def _linen(model, batch, **options):
  return adapters.from_linen(model, train_argument=None, **options), _filled(
    model, batch
  )


def _names(plan):
  return {g.name: g.size for g in plan.groups}


def _members(plan, name):
  return {
    f'{m.path.removeprefix("params/")}[{m.axis}]'
    for m in plan.group(name).members
  }


# --- tags


def test_tied_tags_leave_together_and_fixed_ones_stay():
  tags = Tags()
  a, b, c = tags.fresh(3), tags.fresh(3), tags.fresh(1)
  tags.tie(a, b, 'why')
  tags.tie(b[1:2], c, 'why')
  tags.fix(c, 'returned')
  assert [bool(tags.free_atoms(t)) for t in a] == [True, False, True]
  assert tags.find(a[0]) == tags.find(b[0]) != tags.find(b[2])
  tags.tie(a[:1], np.array([ALWAYS]), 'fixed beside')
  assert tags.fixed[tags.find(b[0])] == 'fixed beside'


def test_a_split_axis_stays_a_grid():
  tags = Tags()
  axis = tags.fresh(6)
  heads, within = tags.factor(axis, 2, 'heads', 'no')
  # Position 4 is head 1, place 1: it stays where both do.
  assert set(tags.atoms(axis[4])) == {*tags.atoms(heads[1]), within[1]}
  again = tags.factor(axis, 2, 'heads', 'no')
  assert [tags.atoms(t) for t in again[0]] == [(h,) for h in heads]
  # Tied with an axis of its own, position by position.
  other = tags.fresh(6)
  tags.tie(other, axis, 'read')
  assert set(tags.atoms(other[5])) == {heads[1], within[2]}


def test_a_product_that_has_to_be_one_of_its_factors_fixes_the_other():
  tags = Tags()
  axis = tags.fresh(4)
  heads, within = tags.factor(axis, 2, 'heads', 'no')
  tags.tie(axis, np.repeat(heads, 2), 'averaged')
  assert not any(tags.free_atoms(t) for t in within)
  assert tags.free_atoms(heads[0]) and tags.free_atoms(axis[3])
  assert tags.find(heads[0]) != tags.find(heads[1])


def test_joined_axes_count_the_first_as_the_major_one():
  tags = Tags()
  a, b = tags.fresh(2), tags.fresh(3)
  assert tags.merge([None, b], [2, 3]).tolist() == [*b, *b]
  assert tags.merge([a, None], [2, 3]).tolist() == [*np.repeat(a, 3)]
  both = tags.merge([a, b], [2, 3])
  assert tags.atoms(both[4]) == (a[1], b[1])


def test_a_split_axis_whose_parts_cannot_leave_is_uniform():
  tags = Tags()
  axis = tags.fresh(6)
  reason, within = tags.factor(axis, 2, None, 'two parts')
  assert reason == 'two parts' and within.shape == (3,)
  assert tags.find(axis[0]) == tags.find(axis[3]) != tags.find(axis[1])


# --- the library's models


@pytest.mark.parametrize('name', FAMILIES)
def test_every_family_shrinks(name):
  model = FAMILIES[name]
  batch = _images(8 if name in ('mlp', 'cnn', 'vgg') else 16)
  forward, variables = adapters.from_linen(model), _filled(model, batch)
  plan = prune.find_groups(forward, variables, batch)
  assert plan.groups
  transformer = name in ('vit', 'deit', 'convnext')
  assert transformer != all(g.exact for g in plan.groups)
  if name in NUMBERS:
    exact = random_units([g for g in plan.groups if g.exact])
    assert difference(plan, exact, forward, variables, batch) < 1e-5
  if transformer:
    every = random_units(plan.groups)
    prune.check_shrunk(plan, every, forward, variables, batch)


def test_a_residual_stream_is_one_group_of_all_its_layers():
  model = models.CifarResNet(3, depth=14, width=4)
  batch = _images()
  forward, variables = adapters.from_linen(model), _filled(model, batch)
  plan = prune.find_groups(forward, variables, batch)
  stream = _members(plan, 'stem')
  made = {'stem', 'stage1_block1/conv2', 'stage1_block2/conv2'}
  assert {f'{layer}/kernel[3]' for layer in made} <= stream
  read = {'stage1_block1/conv1', 'stage2_block1/conv_shortcut'}
  assert {f'{layer}/kernel[2]' for layer in read} <= stream
  assert {'batch_stats/stem_norm/mean[0]', 'stem_norm/scale[0]'} <= stream
  inside = {'conv1/kernel[3]', 'conv2/kernel[2]', 'norm1/bias[0]'}
  inside = {f'stage1_block1/{n}' for n in inside}
  assert inside < _members(plan, 'stage1_block1/conv1')
  assert not inside & stream
  assert plan.frozen['params/head/kernel[1]'] == 'the output'
  assert 'the input' in plan.frozen['params/stem/kernel[2]']


def test_the_plan_is_plain_data_and_a_table():
  model, batch = FAMILIES['vit'], _images()
  forward, variables = adapters.from_linen(model), _filled(model, batch)
  plan = prune.find_groups(forward, variables, batch)
  assert json.loads(json.dumps(plan._asdict()))['shapes']
  text = str(plan)
  assert text == plan.table()
  for word in (
    'block1/attention/query:heads',
    'in block1/norm1 ',
    'is not exact',
  ):
    assert word in text
  assert 'head/kernel[1]: the output' in text


# --- attention


class Transformer(nn.Module):
  """One block with flax's attention."""

  heads: int = 4
  qkv: int | None = None

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(12, name='patch')(x.reshape(x.shape[0], -1, 12))
    y = nn.MultiHeadDotProductAttention(
      self.heads, qkv_features=self.qkv, name='attention'
    )(x)
    x = x + y
    y = nn.gelu(nn.Dense(16, name='dense1')(x))
    x = x + nn.Dense(12, name='dense2')(y)
    return nn.Dense(3, name='head')(x.mean(1))


@pytest.mark.parametrize('qkv', [None, 8])
def test_heads_of_flax_attention_leave_whole_or_uniformly(qkv):
  batch = _images(8)
  forward, variables = _linen(Transformer(qkv=qkv), batch)
  plan = prune.find_groups(forward, variables, batch)
  width = (qkv or 12) // 4
  assert _names(plan) == {
    'patch': 12,
    'attention/query': 4,
    'attention/query#2': width,
    'attention/value': width,
    'dense1': 16,
  }
  heads = {
    f'{n}/{k}'
    for n in ('query', 'key', 'value')
    for k in ('kernel[1]', 'bias[0]')
  } | {'out/kernel[0]'}
  assert _members(plan, 'attention/query') == {f'attention/{n}' for n in heads}
  exact = random_units([g for g in plan.groups if g.exact])
  assert difference(plan, exact, forward, variables, batch) < 1e-5
  inner = plan.group('attention/query#2')
  assert not inner.exact and 'scale' in inner.reason


def test_the_scale_of_the_scores_is_all_that_is_not_exact_within_heads():
  model, batch = FAMILIES['vit'], _images()
  forward, variables = adapters.from_linen(model), _filled(model, batch)
  plan = prune.find_groups(forward, variables, batch)
  name = 'block1/attention/query:within'
  assert plan.group(name).size == 4
  kept = {name: np.array([0, 2])}
  assert difference(plan, kept, forward, variables, batch) > 1e-4
  # d ** -0.5 is 4 ** -0.5 in the whole model and 2 ** -0.5 in the shrunk one.
  masks = unit_masks(plan, kept)
  params = prune.apply_masks(variables['params'], masks)
  masked = jax.jit(forward)({**variables, 'params': params}, batch).output
  small = prune.shrink(plan, variables, kept)
  query = small['params']['block1']['attention']['query']
  query.update({k: v * 0.5**0.5 for k, v in query.items()})
  shrunk = jax.jit(prune.shrunk_forward(forward, plan, kept))(small, batch)
  np.testing.assert_allclose(shrunk.output, masked, atol=1e-5)


def test_overrides_carry_the_heads_and_nothing_else():
  model, batch = FAMILIES['vit'], _images()
  forward, variables = adapters.from_linen(model), _filled(model, batch)
  plan = prune.find_groups(forward, variables, batch)
  kept = {'block1/attention/query:heads': [1], 'block1/mlp/dense1': [0, 5]}
  paths = [f'block1/attention/{n}' for n in ('queries', 'keys', 'values')]
  assert plan.overrides(kept) == {path: {'heads': 1} for path in paths}
  assert plan.overrides({'block1/mlp/dense1': [0]}) == {}
  head = plan.group('block1/attention/query:heads')
  assert head.width == 4 and head.size == 3
  assert head.members[0].positions[1] == (4, 5, 6, 7)


# --- stacks, calls and interceptors


class Residual(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    y = nn.relu(nn.Dense(6, name='dense1')(x))
    return x + nn.Dense(8, name='dense2')(y), None


class Stack(nn.Module):
  how: str

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(8, name='first')(x.reshape(x.shape[0], -1))
    if self.how == 'scan':
      options = {'variable_axes': {'params': 0}, 'length': 3}
      block = nn.scan(Residual, split_rngs={'params': True}, **options)
      x, _ = block(name='blocks')(x)
    else:
      for i in range(2):
        x, _ = nn.remat(Residual)(name=f'block{i}')(x)
    return nn.Dense(3, name='head')(x)


@pytest.mark.parametrize('how', ['scan', 'remat'])
def test_scanned_and_rematerialised_stacks(how):
  batch = _images(2)
  forward, variables = _linen(Stack(how), batch)
  plan = prune.find_groups(forward, variables, batch)
  inner = 'blocks/dense1' if how == 'scan' else 'block1/dense1'
  assert _names(plan)['first'] == 8 and _names(plan)[inner] == 6
  if how == 'scan':
    # The same units leave every layer of the stack; layers do not.
    assert _members(plan, inner) == {
      *('blocks/dense1/kernel[2]', 'blocks/dense1/bias[1]'),
      'blocks/dense2/kernel[1]',
    }
    assert 'scan' in plan.frozen['params/blocks/dense1/kernel[0]']
  kept = random_units(plan.groups)
  assert difference(plan, kept, forward, variables, batch) < 1e-5


def test_a_scan_that_starts_from_zeros_ties_its_carry():
  """The zeros take any size; only the second pass knows whose."""

  def apply(params, x):
    def body(carry, row):
      return jnp.tanh(carry @ params['u'] + row @ params['w']), None

    carry, _ = jax.lax.scan(body, jnp.zeros((2, params['u'].shape[0])), x)
    return carry @ params['v']

  rng = np.random.default_rng(0)
  shapes = {'u': (6, 6), 'w': (5, 6), 'v': (6, 3)}
  params = {k: rng.normal(size=s).astype('f') for k, s in shapes.items()}
  batch = {'image': rng.normal(size=(4, 2, 5)).astype('f')}
  forward, variables = adapters.from_apply(apply), {'params': params}
  plan = prune.find_groups(forward, variables, batch)
  (group,) = plan.groups
  assert _members(plan, group.name) == {'u[0]', 'u[1]', 'v[0]', 'w[1]'}
  kept = {group.name: np.array([1, 2, 5])}
  assert difference(plan, kept, forward, variables, batch) < 1e-5


def test_loops_and_branches_tie_what_they_carry():
  def apply(params, x):
    x = x @ params['w']
    x = jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x) * params['s'], x)
    _, x = jax.lax.while_loop(
      lambda carry: carry[0] < 3,
      lambda carry: (carry[0] + 1, jnp.sin(carry[1]) * params['t']),
      (1, x),
    )
    x = jax.lax.cond(
      x.sum() > 0, lambda x: x + params['a'], lambda x: x * params['b'], x
    )
    return jax.jit(lambda x: x @ params['v'])(x)

  rng = np.random.default_rng(0)
  shapes = {'w': (5, 6), **dict.fromkeys('stab', (1, 6)), 'v': (6, 3)}
  params = {k: rng.normal(size=s).astype('f') for k, s in shapes.items()}
  batch = {'image': rng.normal(size=(2, 5)).astype('f')}
  plan = prune.find_groups(
    adapters.from_apply(apply), {'params': params}, batch
  )
  (group,) = plan.groups
  assert _members(plan, group.name) == {
    *('w[1]', 's[1]', 't[1]', 'a[1]', 'b[1]', 'v[0]')
  }
  # x.sum() chooses the branch: a unit less may choose the other.
  assert not group.exact and 'reduce_sum' in group.reason


def test_fake_quantized_models_shrink_with_their_observers():
  model, batch = FAMILIES['cnn'], _images(8)
  forward = adapters.from_linen(
    model,
    interceptors=(
      quantize.quantize_activations([('.*', quantize.INT8_ACTIVATIONS)]),
    ),
  )
  variables = _filled(model, batch)
  variables['quant_stats'] = quantize.init_quant_stats(
    forward, variables, batch
  )
  state = jax.jit(functools.partial(forward, train=True))(variables, batch)
  variables = {'params': variables['params'], **state.model_state}
  plan = prune.find_groups(forward, variables, batch)
  assert _names(plan) == {'conv1': 4, 'conv2': 6}
  kept = {'conv1': np.array([0, 3]), 'conv2': np.array([1, 2, 5])}
  assert difference(plan, kept, forward, variables, batch) < 1e-5
  small = prune.shrink(plan, variables, kept)
  assert small['quant_stats'] == variables['quant_stats']


def test_fake_quantized_kernels_are_exact_and_normalised_ones_are_not():
  def apply(params, x, change):
    x = jax.nn.relu(x @ change(params['w']))
    return x @ change(params['v'])

  def rounded(w):
    rules = [('w', quantize.INT8_WEIGHTS)]
    return quantize.fake_quant_params({'w': w}, rules)['w']

  def centred(w):
    return w - w.mean(axis=0, keepdims=True)

  rng = np.random.default_rng(0)
  params = {
    k: rng.normal(size=s).astype('f')
    for k, s in {'w': (5, 8), 'v': (8, 3)}.items()
  }
  batch = {'image': rng.normal(size=(2, 5)).astype('f')}
  for change, exact in ((rounded, True), (centred, False)):
    forward = adapters.from_apply(functools.partial(apply, change=change))
    variables = {'params': params}
    plan = prune.find_groups(forward, variables, batch)
    (group,) = plan.groups
    assert group.exact == exact
    kept = {group.name: np.array([0, 3, 4])}
    error = difference(plan, kept, forward, variables, batch)
    assert (error < 1e-5) == exact
