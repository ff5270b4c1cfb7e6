"""Free scales of channels, equalisation, SmoothQuant: the function stays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import ptq_cases as cases
import pytest
from flax import linen as nn
from flax import nnx

from kd_jax import adapters, deploy, quantize
from kd_jax.quantize import channel_views, equalization

pytestmark = pytest.mark.once

PER_TENSOR = [('.*/kernel', quantize.QuantSpec())]


def _scales(model, variables, batch):
  return quantize.free_scales(cases.forward_of(model), variables, batch)


def _chains(found):
  """`layer -> readers` of the scales, without collection and leaf."""

  def short(name):
    return name.split('/', 1)[1].rpartition('/')[0]

  return {
    short(next(iter(f.multiplied))): sorted(map(short, f.divided))
    for f in found
  }


def _shuffle(variables, found):
  """Rescales all channels by random factors."""
  rng = np.random.default_rng(1)
  leaves = equalization._leaves(variables, found)
  for scale in found:
    stack = leaves[next(iter(scale.multiplied))].shape[: scale.stacked]
    factor = np.exp(rng.normal(size=(*stack, scale.size)))
    leaves = equalization.rescale(leaves, scale, jnp.asarray(factor, 'f'))
  return equalization._replace(variables, leaves)


COUNTS = {  # free scales: before BatchNorm is folded
  'cnn': 2,
  'resnet': 3,
  'mlp': 2,
  'vit': 3,
  'depthwise': 3,
  'stack': 2,
}


@pytest.mark.parametrize('folded', [False, True])
@pytest.mark.parametrize('name', COUNTS)
def test_any_scales_leave_the_function_unchanged(name, folded):
  model, variables, batch = cases.random_variables(name)
  if folded:
    variables = deploy.fold(model, variables, batch)
  found = _scales(model, variables, batch)
  assert len(found) == COUNTS[name]
  changed = _shuffle(variables, found)
  want = cases.run(model, variables, batch)
  got = cases.run(model, changed, batch)
  size = np.abs(want).max()
  assert size > 0.01
  np.testing.assert_allclose(got / size, want / size, atol=1e-5)
  for scale in found:
    for leaf in (*scale.multiplied, *scale.divided):
      before, after = (
        equalization._leaves(v, found)[leaf] for v in (variables, changed)
      )
      assert jnp.abs(before - after).max() > 1e-3


def test_scales_of_known_networks():
  found = _scales(*cases.random_variables('vit'))
  qkv = [f'block1/attention/{n}' for n in ('key', 'query', 'value')]
  assert _chains(found) == {
    'block1/norm1': qkv,
    'block1/norm2': ['block1/mlp/dense1'],
    'norm': ['head'],
  }
  found = _scales(*cases.random_variables('depthwise'))
  assert _chains(found) == {
    'wide': ['depthwise'],
    'depthwise': ['grouped'],
    'grouped': ['head'],
  }
  found = _scales(*cases.random_variables('stack'))
  assert _chains(found) == {
    'blocks/norm': ['blocks/dense1'],
    'blocks/dense1': ['blocks/dense2'],
  }
  assert all(scale.stacked == 1 for scale in found)


BETWEEN = {
  'nothing': (lambda x, w: x, True),
  'relu': (lambda x, w: nn.relu(x), True),
  'leaky_relu': (lambda x, w: nn.leaky_relu(x), True),
  'minimum': (lambda x, w: jnp.minimum(x, 0), True),
  'abs': (lambda x, w: jnp.abs(-x), True),
  'relu_by_where': (lambda x, w: jnp.where(x > 0, x, 0.0), True),
  'times_a_constant': (lambda x, w: 3 * x / 2, True),
  'dropout': (lambda x, w: nn.Dropout(0.5, deterministic=True)(x), True),
  'bfloat16': (lambda x, w: x.astype('bfloat16').astype('float32'), True),
  'half_of_the_channels': (lambda x, w: x[:, ::2], True),
  'squeezed': (lambda x, w: x[:, None].squeeze(1), True),
  'a_branch_and_its_sum': (lambda x, w: x + nn.relu(x), True),
  'stretched': (lambda x, w: jnp.maximum(x[:, :1], jnp.zeros((1, 8))), False),
  'relu6': (lambda x, w: nn.relu6(x), False),
  'gelu': (lambda x, w: nn.gelu(x), False),
  'softmax': (lambda x, w: nn.softmax(x), False),
  'softplus': (lambda x, w: nn.softplus(x), False),
  'square': (lambda x, w: x * x, False),
  'norm_over_channels': (lambda x, w: x / jnp.sum(x, -1, keepdims=True), False),
  'plus_one': (lambda x, w: x + 1, False),
  'greater_than_one': (lambda x, w: jnp.where(x > 1, x, 0.0), False),
  'reversed_sum': (lambda x, w: x + x[:, ::-1], False),
  'sum_over_channels': (lambda x, w: x - x.sum(-1, keepdims=True), False),
  'inverse': (lambda x, w: 1 / (1 + x * x), False),
  'sorted': (lambda x, w: jnp.sort(x, -1), False),
  'read_twice_by_one_kernel': (lambda x, w: x + x @ w, False),
  'loop': (
    lambda x, w: jax.lax.fori_loop(0, 2, lambda i, x: nn.relu(x), x),
    False,
  ),
}


class _Pair(nn.Module):
  """Two dense layers and something between them."""

  between: str

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(8, name='first')(x)
    w = self.param('w', nn.initializers.normal(), (8, 8))
    x = BETWEEN[self.between][0](x, w)
    return nn.Dense(3, name='second')(x)


@pytest.mark.parametrize('name', BETWEEN)
def test_what_may_lie_between_two_layers(name):
  model, rng = _Pair(name), np.random.default_rng(0)
  x = {'image': rng.normal(size=(6, 5)).astype('f')}
  variables = model.init(jax.random.key(0), x['image'])
  variables = jax.tree.map(
    lambda v: jnp.asarray(rng.normal(size=v.shape), 'f'), variables
  )
  found = _scales(model, variables, x)
  first = [s for s in found if 'params/first/kernel' in s.multiplied]
  assert bool(first) == BETWEEN[name][1]
  want = cases.run(model, variables, x)
  got = cases.run(model, _shuffle(variables, found), x)
  # A rounding to bfloat16 is of another value then.
  rtol = 0.05 if name == 'bfloat16' else 1e-4
  np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol)


def test_a_bias_may_be_a_row():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Dense(8, use_bias=False, name='first')(x)
      x = nn.relu(x + self.param('row', nn.initializers.normal(), (1, 8)))
      return nn.Dense(3, name='second')(x)

  x = {'image': np.random.default_rng(0).normal(size=(6, 5)).astype('f')}
  variables = Net().init(jax.random.key(0), x['image'])
  found = _scales(Net(), variables, x)
  assert [set(s.multiplied) for s in found] == [
    {'params/first/kernel', 'params/row'}
  ]
  got = cases.run(Net(), _shuffle(variables, found), x)
  np.testing.assert_allclose(got, cases.run(Net(), variables, x), rtol=1e-4)


def _two_layers(x, kernels):
  """The body of a scan that also returns what is inside."""
  a, b = kernels
  x = x @ a
  return x @ b, x


def _plain(apply):
  return adapters.from_apply(lambda p, x: apply(p, x))


@pytest.mark.parametrize(
  'apply',
  [
    lambda p, x: nn.relu(nn.relu(x @ p['a']) @ p['a']) @ p['b'],
    lambda p, x: (x @ p['a']) @ p['b'] + 0 * p['a'].sum(),
    lambda p, x: (x @ p['a'], (x @ p['a']) @ p['b'])[1],
    lambda p, x: x @ (p['a'] * 2.0) @ p['b'] @ p['b'],
    lambda p, x: nn.relu(x @ p['a'] + p['c'][None]) @ p['b'] * p['c'][None],
    lambda p, x: jnp.concatenate([x @ p['a'], x], -1)[:, :4] @ p['b'],
    lambda p, x: (lambda h: (h, h @ p['b'])[0])(x @ p['a']),
    lambda p, x: jax.lax.scan(_two_layers, x, (p['as'], p['bs']))[1],
  ],
)
def test_weights_with_another_use_are_left_alone(apply):
  params = {'a': jnp.ones((4, 4)), 'b': jnp.ones((4, 4)), 'c': jnp.ones(4)}
  params |= {'as': jnp.ones((3, 4, 4)), 'bs': jnp.ones((3, 4, 4))}
  found = quantize.free_scales(
    _plain(apply), {'params': params}, {'image': jnp.ones((2, 4))}
  )
  assert found == []


def test_scales_in_nnx_and_beside_none():
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.first = nnx.Linear(5, 4, rngs=rngs)
      self.second = nnx.Linear(4, 3, use_bias=False, rngs=rngs)

    def __call__(self, x):
      return self.second(nnx.relu(self.first(x)))

  forward, variables = adapters.from_nnx(Net(nnx.Rngs(0)))
  x = {'image': jnp.ones((2, 5))}
  assert len(quantize.free_scales(forward, variables, x)) == 1
  params = {'a': jnp.ones((5, 4)), 'none': None, 'b': jnp.ones((4, 3))}
  plain = _plain(lambda p, x: nn.relu(x @ p['a']) @ p['b'])
  got = quantize.equalize(plain, {'params': params, 'other': None}, x)
  assert got['params']['none'] is None and got['other'] is None


@pytest.mark.parametrize(
  'before, after, axis, want',
  [
    ((2, 3, 4), (2, 12), 2, (1, [0, 1, 2, 3] * 3)),
    ((2, 3, 4), (2, 12), 1, (1, [0] * 4 + [1] * 4 + [2] * 4)),
    ((2, 3, 4), (6, 4), 2, (1, [0, 1, 2, 3])),
    ((2, 12), (2, 3, 4), 1, None),
    ((2, 12), (2, 1, 12, 1), 1, (2, list(range(12)))),
    ((3,), (1, 1, 3), 0, (2, [0, 1, 2])),
    ((1, 3, 1), (3,), 1, (0, [0, 1, 2])),
    ((2, 1, 3), (2, 3), 2, (1, [0, 1, 2])),
  ],
)
def test_reshapes_are_followed(before, after, axis, want):
  index = np.arange(before[axis])
  got = channel_views.reshaped_index(before, after, axis, index)
  if want is None:
    assert got is None
  else:
    assert (got[0], got[1].tolist()) == want
    # The definition: reshape an array that holds each entry's channel.
    shape = [-1 if i == axis else 1 for i in range(len(before))]
    full = np.broadcast_to(index.reshape(shape), before).reshape(after)
    shape = [-1 if i == got[0] else 1 for i in range(len(after))]
    assert (full == got[1].reshape(shape)).all()


# --- equalisation


def _dense_pair(a, b, bias=None):
  model = nn.Sequential([nn.Dense(a.shape[1]), nn.relu, nn.Dense(b.shape[1])])
  params = {
    'layers_0': {
      'kernel': jnp.asarray(a),
      'bias': jnp.zeros(a.shape[1], a.dtype) if bias is None else bias,
    },
    'layers_2': {
      'kernel': jnp.asarray(b),
      'bias': jnp.zeros(b.shape[1], b.dtype),
    },
  }
  return model, {'params': params}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_equalised_ranges_are_the_geometric_mean(dtype):
  rng = np.random.default_rng(0)
  a = (rng.normal(size=(5, 6)) * np.exp(rng.normal(size=6))).astype('f')
  b = rng.normal(size=(6, 3)).astype('f')
  a[:, 2], b[4], bias = 0, 0, jnp.arange(6.0)
  a, b = jnp.asarray(a, dtype), jnp.asarray(b, dtype)
  model, variables = _dense_pair(a, b, bias)
  x = {'image': jnp.ones((1, 5))}
  got = quantize.equalize(cases.forward_of(model), variables, x)['params']
  r1 = np.abs(np.asarray(a, 'f')).max(0)
  r2 = np.abs(np.asarray(b, 'f')).max(1)
  alive = (r1 > 0) & (r2 > 0)
  s = np.where(alive, np.sqrt(r1 * r2) / np.where(r2 > 0, r2, 1), 1)
  rtol = 1e-5 if dtype == 'float32' else 1e-2
  close = functools.partial(np.testing.assert_allclose, rtol=rtol)
  first, second = got['layers_0'], got['layers_2']
  assert first['kernel'].dtype == dtype and second['kernel'].dtype == dtype
  close(first['kernel'].astype('f'), np.asarray(a, 'f') / s[None])
  close(first['bias'], np.arange(6) / s)
  close(second['kernel'].astype('f'), np.asarray(b, 'f') * s[:, None])
  # Dead channels, on either side, are as they were.
  np.testing.assert_array_equal(second['kernel'][2], b[2])
  np.testing.assert_array_equal(first['kernel'][:, 4], a[:, 4])


def test_all_ranges_of_a_chain_meet():
  model, variables, batch = cases.random_variables('depthwise')
  got = quantize.equalize(cases.forward_of(model), variables, batch)['params']
  wide, depthwise = (
    np.abs(got[n]['kernel']).max((0, 1, 2)) for n in ('wide', 'depthwise')
  )
  np.testing.assert_allclose(wide, depthwise, rtol=1e-2)
  assert not np.allclose(
    *(
      np.abs(variables['params'][n]['kernel']).max((0, 1, 2))
      for n in ('wide', 'depthwise')
    ),
    rtol=0.5,
  )
  # Two input channels are read by each of four groups of three outputs.
  grouped = np.abs(got['grouped']['kernel'])
  read = grouped.reshape(3, 3, 2, 4, 3).max((0, 1, 4)).T.reshape(-1)
  np.testing.assert_allclose(read, depthwise, rtol=1e-2)


def test_equalisation_saves_int8_per_tensor():
  """Channels whose scales spread over e**(-3 .. 3), as folding makes them."""
  model, variables = cases.trained('cnn')
  batch = cases.images(512, seed=5)
  variables = deploy.fold(model, variables, batch)
  found = _scales(model, variables, batch)
  leaves = equalization._leaves(variables, found)
  rng = np.random.default_rng(0)
  for scale in found:
    factor = np.exp(rng.uniform(-3, 3, size=scale.size))
    leaves = equalization.rescale(leaves, scale, jnp.asarray(factor, 'f'))
  bad = equalization._replace(variables, leaves)
  want = cases.run(model, variables, batch)
  good = quantize.equalize(cases.forward_of(model), bad, batch)
  got = cases.run(model, good, batch)
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())

  def agreement(variables):
    params = quantize.fake_quant_params(variables['params'], PER_TENSOR)
    output = cases.run(model, {**variables, 'params': params}, batch)
    return float((output.argmax(-1) == want.argmax(-1)).mean())

  assert agreement(bad) < 0.95
  assert agreement(good) > 0.99


def test_equalisation_without_pairs_changes_nothing():
  model = nn.Dense(3)
  variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
  x = {'image': jnp.ones((1, 4))}
  got = quantize.equalize(cases.forward_of(model), variables, x)
  np.testing.assert_array_equal(
    got['params']['kernel'], variables['params']['kernel']
  )


# --- SmoothQuant


@pytest.mark.parametrize('alpha', [0.5, 0.8])
def test_smoothing_follows_the_formula(alpha):
  model, variables, batch = cases.random_variables('vit')
  batches = [batch, {'image': 2 * batch['image'][::-1]}]
  got = quantize.smooth(
    deploy.evaluation(model), variables, batches, alpha=alpha
  )['params']['block1']
  old = variables['params']['block1']
  forward = adapters.from_linen(model, taps=['block1/norm1'])
  x = [forward(variables, b).features['block1/norm1'] for b in batches]
  x = np.abs(np.concatenate(x)).max((0, 1))
  names = ('query', 'key', 'value')
  w = np.max([np.abs(old['attention'][n]['kernel']).max(1) for n in names], 0)
  t = np.maximum(x**alpha / np.maximum(w, 1e-5) ** (1 - alpha), 1e-5)
  for leaf in ('scale', 'bias'):
    np.testing.assert_allclose(
      got['norm1'][leaf], old['norm1'][leaf] / t, rtol=1e-4
    )
  for name in names:
    np.testing.assert_allclose(
      got['attention'][name]['kernel'],
      old['attention'][name]['kernel'] * t[:, None],
      rtol=1e-4,
    )
  np.testing.assert_array_equal(
    got['mlp']['dense2']['kernel'], old['mlp']['dense2']['kernel']
  )


@pytest.mark.parametrize('name', ['vit', 'stack', 'cnn', 'depthwise'])
def test_smoothing_leaves_the_function_unchanged(name):
  model, variables, batch = cases.random_variables(name)
  got = quantize.smooth(deploy.evaluation(model), variables, [batch])
  changed = jax.tree.map(
    lambda a, b: jnp.abs(a - b).max() > 1e-3, got, variables
  )
  assert any(jax.tree.leaves(changed))
  want = cases.run(model, variables, batch)
  size = np.abs(want).max()
  np.testing.assert_allclose(
    cases.run(model, got, batch) / size, want / size, atol=1e-5
  )


def test_scanned_blocks_are_smoothed_one_by_one():
  model, variables, batch = cases.random_variables('stack')
  got = quantize.smooth(deploy.evaluation(model), variables, [batch])
  old, new = (v['params']['blocks'] for v in (variables, got))
  t = old['norm']['scale'] / new['norm']['scale']
  # What the kernel writes is smoothed too: dense2 reads it through a ReLU.
  u = old['dense1']['bias'] / new['dense1']['bias']
  assert t.shape == (3, 8) and u.shape == (3, 10)
  np.testing.assert_allclose(
    new['dense1']['kernel'],
    old['dense1']['kernel'] * t[..., None] / u[:, None],
    rtol=1e-4,
  )
  # The input of the first block is known.
  first = variables['params']['first']
  x = nn.Dense(8).apply({'params': first}, batch['image'].reshape(4, -1, 8))
  x = nn.LayerNorm().apply(
    {'params': jax.tree.map(lambda v: v[0], old['norm'])}, x
  )
  x = jnp.abs(x).max((0, 1))
  w = np.maximum(np.abs(old['dense1']['kernel'][0]).max(1), 1e-5)
  np.testing.assert_allclose(t[0], (x / w) ** 0.5, rtol=1e-3)


def test_smoothing_helps_inputs_with_outliers():
  model, variables = cases.trained('vit')
  batch = cases.images(512, seed=5)
  params = jax.tree.map(lambda x: x, variables['params'])
  found = _scales(model, variables, batch)
  leaves = equalization._leaves(variables, found)
  # A few channels of the norms are a hundred times larger.
  for scale in found:
    factor = np.where(np.arange(scale.size) % 8 == 3, 100, 1)
    leaves = equalization.rescale(leaves, scale, jnp.asarray(factor, 'f'))
  bad = equalization._replace({'params': params}, leaves)
  make_forward = deploy.evaluation(model)
  batches = cases.calibration(2)
  good = quantize.smooth(make_forward, bad, batches)
  want = cases.run(model, variables, batch)

  def error(variables):
    stats = quantize.calibrate(make_forward, variables, batches, cases.INPUTS)
    forward = make_forward(quantize.quantize_activations(cases.INPUTS))
    variables = {
      'params': quantize.fake_quant_params(variables['params'], cases.INT8),
      'quant_stats': stats,
    }
    got = jax.jit(lambda v, b: forward(v, b).output)(variables, batch)
    return float(jnp.square(got - want).mean())

  assert error(good) < 0.1 * error(bad)


def test_mistakes_of_smoothing_are_named():
  model, variables, batch = cases.random_variables('mlp')
  make_forward = deploy.evaluation(model)
  with pytest.raises(ValueError, match=r'alpha is in \[0, 1\], not 2'):
    quantize.smooth(make_forward, variables, [batch], alpha=2)
  with pytest.raises(ValueError, match='no batch to smooth'):
    quantize.smooth(make_forward, variables, [])
