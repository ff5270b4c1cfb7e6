"""Calibration, corrected biases and AdaRound."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import ptq_cases as cases
import pytest
from flax import linen as nn

from kd_jax import adapters, deploy, quantize
from kd_jax.losses import logits

pytestmark = pytest.mark.once


@functools.cache
def _network(name='cnn'):
  """A trained, folded network, batches, a test batch and its float output."""
  model, variables = cases.trained(name)
  test = cases.images(512, seed=5)
  variables = deploy.fold(model, variables, test)
  output = cases.run(model, variables, test)
  return model, variables, cases.calibration(), test, output


def _rounded(variables, rules):
  params = quantize.fake_quant_params(variables['params'], rules)
  return {**variables, 'params': params}


def _kl(model, variables, test, want):
  got = cases.run(model, variables, test)
  return float(logits.kl_divergence(got, want, temperature=1.0).mean())


# --- calibration


@pytest.mark.parametrize('default', [False, True])
def test_calibration_observes_every_batch_in_evaluation_mode(default):
  """BatchNorm and Dropout are in the model; ranges are of its real inputs."""

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=default):
      x = nn.BatchNorm(not train, name='norm')(nn.Dense(4, name='first')(x))
      x = nn.Dropout(0.5, deterministic=not train)(x)
      return nn.Dense(3, name='second')(x)

  rng = np.random.default_rng(0)
  batches = [{'image': rng.normal(size=(8, 5)).astype('f')} for _ in range(3)]
  variables = Net().init(jax.random.key(0), batches[0]['image'])
  variables['batch_stats']['norm']['mean'] += 0.5
  rules = [('first|second', quantize.INT8_ACTIVATIONS)]
  stats = quantize.calibrate(
    deploy.evaluation(Net()), variables, iter(batches), rules
  )
  assert float(stats['first']['input0']['count']) == 3
  low, high = (f(batches[0]['image']) for f in (np.min, np.max))
  for batch in batches[1:]:
    low += 0.01 * (batch['image'].min() - low)
    high += 0.01 * (batch['image'].max() - high)
  seen = stats['first']['input0']
  np.testing.assert_allclose(
    (seen['low'], seen['high']), (low, high), rtol=1e-5
  )
  # The input of the second is that of evaluation, up to the first's rounding.
  forward = adapters.from_linen(Net(), taps=['norm'])
  x = forward(variables, batches[0]).features['norm']
  seen = stats['second']['input0']
  np.testing.assert_allclose(seen['high'], x.max(), rtol=0.05)
  with pytest.raises(ValueError, match='no batch to calibrate'):
    quantize.calibrate(deploy.evaluation(Net()), variables, [], rules)
  wrong = [('frist', quantize.INT8_ACTIVATIONS)]
  with pytest.raises(ValueError, match='No layer of the model is quantized'):
    quantize.calibrate(deploy.evaluation(Net()), variables, batches, wrong)


def test_calibration_uses_the_given_observer():
  model, variables, batch = cases.random_variables('stack')
  observer = quantize.ema_min_max(decay=0.0)
  batches = [batch, {'image': 3 * batch['image']}]
  stats = quantize.calibrate(
    deploy.evaluation(model),
    variables,
    batches,
    cases.INPUTS,
    observer=observer,
  )
  seen = stats['first']['input0']
  np.testing.assert_allclose(seen['high'], 3 * batch['image'].max(), rtol=1e-6)
  assert stats['blocks']['dense1']['input0']['low'].shape == (3,)


# --- corrected biases


def _means(model, variables, batches, layers):
  """Mean output of layers by channel, over all batches."""
  forward = adapters.from_linen(
    model,
    taps=layers,
    interceptors=[quantize.skip_folded_batch_norms],
  )
  batch = {'image': np.concatenate([b['image'] for b in batches])}
  features = jax.jit(lambda v: forward(v, batch).features)(variables)
  return {
    name: np.asarray(features[name]).mean(tuple(range(features[name].ndim - 1)))
    for name in layers
  }


@pytest.mark.parametrize(
  'rules', [cases.INT4, [('head/kernel', cases.INT4[0][1])]]
)
def test_corrected_biases_give_the_float_means(rules):
  model, variables, batches, _, _ = _network()
  # One batch: the means of later layers are exact as well.
  batches = batches[:1]
  make_forward = deploy.evaluation(model)
  corrected = quantize.correct_biases(make_forward, variables, batches, rules)
  layers = ('conv1', 'conv2', 'head')

  want, plain, got = (
    _means(model, v, batches, layers)
    for v in (
      variables,
      _rounded(variables, rules),
      _rounded(corrected, rules),
    )
  )
  for name in layers:
    np.testing.assert_allclose(got[name], want[name], atol=1e-5)
  assert np.abs(plain['head'] - want['head']).max() > 1e-3
  for name in layers:
    kernels = [v['params'][name]['kernel'] for v in (variables, corrected)]
    np.testing.assert_array_equal(*kernels)
  if len(rules[0][0]) == len('head/kernel'):
    same = [v['params']['conv1']['bias'] for v in (variables, corrected)]
    np.testing.assert_array_equal(*same)


def test_batches_count_by_their_size():
  """A linear layer: the correction is that of all examples at once."""
  rng = np.random.default_rng(0)
  model = nn.Sequential([nn.Dense(4, use_bias=False)])
  x = rng.normal(size=(30, 6)).astype('f') + 1
  variables = model.init(jax.random.key(0), x)
  make_forward = deploy.evaluation(model, train_argument=None)
  batches = [{'image': x[:4]}, {'image': x[4:]}]
  got = quantize.correct_biases(make_forward, variables, batches, cases.INT4)
  w = variables['params']['layers_0']['kernel']
  rounded = _rounded(variables, cases.INT4)['params']['layers_0']['kernel']
  want = -(x @ (rounded - w)).mean(0)
  np.testing.assert_allclose(got['params']['layers_0']['bias'], want, atol=1e-6)
  assert np.abs(want).max() > 1e-3


@pytest.mark.parametrize('name', ['cnn', 'stack'])
def test_corrected_biases_bring_the_output_closer(name):
  if name == 'cnn':
    model, variables, batches, test, want = _network()
  else:
    model, variables, test = cases.random_variables('stack')
    want, batches = cases.run(model, variables, test), [test]
  corrected = quantize.correct_biases(
    deploy.evaluation(model), variables, batches, cases.INT4
  )
  plain, better = (
    float(
      jnp.square(cases.run(model, _rounded(v, cases.INT4), test) - want).mean()
    )
    for v in (variables, corrected)
  )
  assert better < 0.8 * plain
  if name == 'stack':
    assert corrected['params']['blocks']['dense1']['bias'].shape == (3, 10)


def test_biases_are_corrected_for_rounded_inputs():
  """Ranges far too small clip the inputs: the mean is off, and put right."""
  model, variables, batches, _, _ = _network()
  make_forward = deploy.evaluation(model)
  stats = quantize.calibrate(make_forward, variables, batches, cases.INPUTS)
  stats = jax.tree.map(lambda x: x, stats)
  stats['head']['input0']['high'] *= 0.3
  known = {**variables, 'quant_stats': stats}
  corrected = quantize.correct_biases(
    make_forward,
    variables,
    batches[:1],
    cases.INT8,
    cases.INPUTS,
    rounded=known,
  )
  jax.tree.map(np.testing.assert_array_equal, corrected['quant_stats'], stats)
  forward = make_forward(quantize.quantize_activations(cases.INPUTS))
  run = jax.jit(lambda v: forward(v, batches[0]).output.mean(0))
  want = cases.run(model, variables, batches[0]).mean(0)
  before, after = (run(_rounded(v, cases.INT8)) for v in (known, corrected))
  assert jnp.abs(before - want).max() > 0.1
  np.testing.assert_allclose(after, want, atol=1e-4)


def test_a_layer_that_gets_no_bias_is_not_corrected():
  class Heads(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      x = nn.DenseGeneral((2, 3), use_bias=False, name='heads')(inputs=x)
      return nn.Dense(2, use_bias=False, name='head')(x)

  model, x = Heads(), {'image': cases.images(8, seed=0)['image'].reshape(8, -1)}
  variables = model.init(jax.random.key(0), x['image'])
  corrected = quantize.correct_biases(
    deploy.evaluation(model), variables, [x], cases.INT4
  )
  assert set(corrected['params']['heads']) == {'kernel'}
  assert set(corrected['params']['head']) == {'kernel', 'bias'}


def test_adaround_knows_groups():
  model, x = nn.Sequential([nn.Dense(3)]), np.ones((16, 8), 'f')
  x += np.random.default_rng(0).normal(size=x.shape)
  variables = model.init(jax.random.key(0), x)
  rules = [('.*/kernel', quantize.QuantSpec(bits=4, axis=-1, group_size=4))]
  make_forward = deploy.evaluation(model, train_argument=None)
  rounded = quantize.adaround(
    make_forward, variables, [{'image': x}], rules, steps=20
  )
  scale, _ = quantize.weight_scale(
    variables['params']['layers_0']['kernel'], rules[0][1]
  )
  codes = rounded['params']['layers_0']['kernel'] / np.repeat(scale, 4, 0)
  np.testing.assert_allclose(codes, np.round(codes), atol=1e-4)


def test_a_correction_needs_a_batch():
  model, variables, *_ = _network()
  with pytest.raises(ValueError, match='no batch to correct'):
    quantize.correct_biases(deploy.evaluation(model), variables, [], cases.INT8)


# --- AdaRound


@functools.cache
def _adarounded(target='teacher'):
  model, variables, batches, _, _ = _network()
  return quantize.adaround(
    deploy.evaluation(model),
    variables,
    batches,
    cases.INT4,
    target=target,
    steps=400,
  )


def _codes(params, name, like):
  """Codes of a 4-bit kernel, by the scale of the float one."""
  scale = (
    np.abs(like[name]['kernel']).max((0, 1, 2)[: like[name]['kernel'].ndim - 1])
    / 7
  )
  return np.asarray(params[name]['kernel']) / scale, np.asarray(
    like[name]['kernel']
  ) / scale


def test_adaround_beats_nearest_rounding_at_four_bits():
  model, variables, _, test, want = _network()
  nearest = _kl(model, _rounded(variables, cases.INT4), test, want)
  learned = _kl(model, _adarounded(), test, want)
  assert nearest > 1e-3
  assert learned < 0.5 * nearest


def test_adarounded_weights_are_on_the_grid_of_nearest_rounding():
  """Each is rounded up or down, some other than to nearest."""
  _, variables, _, _, _ = _network()
  got = _adarounded()['params']
  again = quantize.fake_quant_params(got, cases.INT4)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6), again, got
  )
  moved = 0
  for name in ('conv1', 'conv2', 'head'):
    codes, w = _codes(got, name, variables['params'])
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-4)
    assert np.abs(codes - w).max() < 1 + 1e-4
    moved += (np.abs(codes - w) > 0.501).sum()
    np.testing.assert_array_equal(
      got[name]['bias'], variables['params'][name]['bias']
    )
  assert moved > 10


def test_adaround_minimises_the_error_of_a_layer():
  """Every rounding of a small layer is tried: the learned one is near best."""
  rng = np.random.default_rng(3)
  model = nn.Sequential([nn.Dense(2)])
  # Correlated inputs: errors of the weights can cancel.
  x = (rng.normal(size=(64, 2)) @ rng.normal(size=(2, 7)) + 0.5).astype('f')
  w = rng.uniform(-1, 1, size=(7, 2)).astype('f')
  w[0] = 1
  variables = {
    'params': {'layers_0': {'kernel': jnp.asarray(w), 'bias': jnp.ones(2)}}
  }
  got = quantize.adaround(
    deploy.evaluation(model, train_argument=None),
    variables,
    [{'image': x}],
    cases.INT4,
    steps=600,
    batch_size=64,
  )['params']['layers_0']['kernel']

  def error(kernel):
    return np.square(x @ (kernel - w)).sum(0)

  nearest = error(np.round(w * 7) / 7)
  best = np.full(2, np.inf)
  for ups in np.ndindex(*(2,) * 6):
    kernel = np.concatenate(
      [w[:1], (np.floor(w[1:] * 7) + np.array(ups)[:, None]) / 7]
    )
    best = np.minimum(best, error(np.clip(kernel, -1, 1)))
  got = error(np.asarray(got)).sum()
  assert got < 0.5 * nearest.sum()
  assert got < best.sum() + 0.2 * (nearest.sum() - best.sum())


def test_adaround_is_never_worse_than_nearest_on_its_batches():
  """No step at all, and steps that are far too large."""
  model, variables, batches, _, _ = _network()
  x = np.concatenate([b['image'] for b in batches])
  conv = nn.Conv(8, (3, 3), padding=1, use_bias=False)

  @jax.jit
  def run(params):
    return conv.apply({'params': {'kernel': params['conv1']['kernel']}}, x)

  for options in ({'steps': 0}, {'steps': 20, 'learning_rate': 100.0}):
    got = quantize.adaround(
      deploy.evaluation(model),
      variables,
      batches,
      [('conv1/kernel', cases.INT4[0][1])],
      target='layer',
      **options,
    )
    nearest = _rounded(variables, [('conv1/kernel', cases.INT4[0][1])])
    want = run(variables['params'])
    errors = [
      float(jnp.square(run(v['params']) - want).sum()) for v in (got, nearest)
    ]
    assert errors[0] <= errors[1] * (1 + 1e-6)


def test_targets_differ_and_mistakes_are_named():
  model, variables, batches, test, want = _network()
  layer, teacher = _adarounded('layer'), _adarounded('teacher')
  errors = [_kl(model, v, test, want) for v in (layer, teacher)]
  # Only the teacher's features show what earlier layers have done wrong.
  assert errors[1] < errors[0]
  adaround = functools.partial(
    quantize.adaround, deploy.evaluation(model), variables
  )
  with pytest.raises(ValueError, match="Unknown target 'techer'.*teacher"):
    adaround(batches, cases.INT4, target='techer')
  with pytest.raises(ValueError, match='no batch to round'):
    adaround([], cases.INT4)
  affine = [('head/kernel', quantize.QuantSpec(symmetric=False))]
  with pytest.raises(ValueError, match='head/kernel: .* symmetric'):
    adaround(batches, affine)


def test_scanned_layers_are_adarounded():
  dtype = 'bfloat16'
  model, variables, batch = cases.random_variables('stack', dtype=dtype)
  # A whole layer is pruned, and one block's.
  kernel = variables['params']['blocks']['dense2']['kernel']
  variables['params']['blocks']['dense2']['kernel'] = kernel.at[1].set(0)
  variables['params']['head']['kernel'] *= 0
  got = quantize.adaround(
    deploy.evaluation(model), variables, [batch, batch], cases.INT4, steps=100
  )['params']
  new, old = (
    got['blocks']['dense1']['kernel'],
    variables['params']['blocks']['dense1']['kernel'],
  )
  assert new.dtype == dtype and new.shape == (3, 8, 10)
  scale = np.abs(np.asarray(old, 'f')).max((0, 1)) / 7
  off = np.abs(np.asarray(new, 'f') - np.asarray(old, 'f')) / scale
  assert off.max() < 1.05 and (off > 0.55).any()
  assert not got['head']['kernel'].any()
  assert not got['blocks']['dense2']['kernel'][1].any()


def test_the_weight_that_sets_the_scale_keeps_its_code():
  """Though another teacher's is smaller by one: the grid would be another."""
  w = np.linspace(1, 2, 999).astype('f')
  # Its code is 7 but for an error of rounding, which could take it down to 6.
  w = w[w / (w / np.float32(7)) < 7][0]
  model = nn.Sequential([nn.Dense(1)])

  def variables(*codes):
    kernel = jnp.array(codes)[:, None] * w / 7
    return {'params': {'layers_0': {'kernel': kernel, 'bias': jnp.zeros(1)}}}

  got = quantize.adaround(
    deploy.evaluation(model, train_argument=None),
    variables(7.0, 2.0),
    [{'image': np.ones((8, 2), 'f')}],
    cases.INT4,
    teacher=variables(6.0, 2.0),
    steps=200,
  )
  codes = np.asarray(got['params']['layers_0']['kernel']) * 7 / w
  np.testing.assert_allclose(codes[0], 7, rtol=1e-6)
  np.testing.assert_allclose(codes, np.round(codes), atol=1e-5)


def test_adaround_weighs_its_loss_alike_however_many_examples_there_are():
  """Equal examples: what a step draws of them says the same."""
  x = np.random.default_rng(0).normal(size=(1, 12)).astype('f')
  model = nn.Sequential([nn.Dense(16)])
  variables = model.init(jax.random.key(0), x)
  few, many = (
    quantize.adaround(
      deploy.evaluation(model, train_argument=None),
      variables,
      [{'image': np.repeat(x, count, axis=0)}],
      cases.INT4,
      steps=100,
      batch_size=4,
    )['params']['layers_0']['kernel']
    for count in (4, 400)
  )
  np.testing.assert_array_equal(few, many)
  nearest = quantize.fake_quant_params(variables['params'], cases.INT4)
  assert (few != nearest['layers_0']['kernel']).any()


def test_adaround_draws_by_its_key():
  rng = np.random.default_rng(0)
  model = nn.Sequential([nn.Dense(16)])
  batch = {
    'image': rng.normal(size=(40, 3)).astype('f')
    @ rng.normal(size=(3, 12)).astype('f')
  }
  variables = model.init(jax.random.key(0), batch['image'])
  run = functools.partial(
    quantize.adaround,
    deploy.evaluation(model, train_argument=None),
    variables,
    [batch],
    cases.INT4,
    steps=40,
    batch_size=4,
    regularization=0.1,
  )
  first, same, other = (
    run(rng=jax.random.key(seed))['params']['layers_0']['kernel']
    for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, same)
  assert (first != other).any()
