"""Models: published sizes, numbers, taps, initial values, messages, dtypes."""

import functools
import json
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import adapters, deploy, models, quantize
from kd_jax.models import layers
from kd_jax.report import measure

DIRECTORY = pathlib.Path(
  os.environ.get('KD_JAX_ORACLES')
  or pathlib.Path(__file__).parent / 'data' / 'oracles'
)
PUBLISHED = json.loads((DIRECTORY / 'cifar_models.json').read_text())
# A small model of every class.
SMALL = {
  'mlp': {'hidden': (8, 6)},
  'cnn': {'widths': (4, 6, 8)},
  'resnet': {'depth': 8, 'width': 4, 'stem_width': 3},
  'resnet50_cifar': {'blocks': (1, 2, 1, 1), 'width': 4},
  'wrn': {'depth': 10, 'widen_factor': 2},
  'vgg': {'depth': 11, 'width': 4},
  'mobilenet_v2_cifar': {'width': 0.125},
  'shufflenet_v1_cifar': {'widths': (36, 48, 60), 'blocks': (2, 3, 2)},
  'shufflenet_v2_cifar': {
    'widths': (8, 12, 16),
    'blocks': (2, 1, 3),
    'last_width': 12,
  },
}
CONVOLUTIONAL = [name for name in SMALL if name != 'mlp']
# What the classes' docstrings say.
NAMED = {
  'mlp': ['dense1', 'dense2', 'relu1', 'relu2', 'head'],
  'cnn': [f'{n}{i}' for i in (1, 2, 3) for n in ('conv', 'norm', 'relu')]
  + ['pool', 'head'],
  'resnet': [f'stage{s}_block1' for s in (1, 2, 3)] + ['stem', 'pool', 'head'],
  'resnet50_cifar': ['stem', 'stage1_block1', 'pool', 'head'],
  'wrn': ['stem', 'stage1_block1', 'last_norm', 'pool', 'head'],
  'vgg': ['stage1', 'stage5', 'stage1/conv1', 'pool', 'head'],
  'mobilenet_v2_cifar': [
    'stem',
    'stage1_block1',
    'stage7_block1',
    'last',
    'pool',
    'head',
  ],
  'shufflenet_v1_cifar': ['stem', 'stage1_block1', 'pool', 'head'],
  'shufflenet_v2_cifar': ['stem', 'stage1_block1', 'last', 'pool', 'head'],
}
# (resolution, channels) of the published features but the first and the last.
STAGES = {
  r'resnet\d+': [(32, 16), (16, 32), (8, 64)],
  r'resnet\d+x4': [(32, 64), (16, 128), (8, 256)],
  'ResNet50': [(32, 256), (16, 512), (8, 1024), (4, 2048)],
  r'wrn_\d+_1': [(32, 16), (16, 32), (8, 64)],
  r'wrn_\d+_2': [(32, 32), (16, 64), (8, 128)],
  r'vgg\d+': [(16, 128), (8, 256), (4, 512), (4, 512)],
  'MobileNetV2': [(16, 12), (8, 16), (4, 48), (2, 160)],
  'ShuffleV1': [(16, 240), (8, 480), (4, 960)],
  'ShuffleV2': [(16, 116), (8, 232), (4, 464)],
}
# Logits of the first image that the published PyTorch networks give with the
# widths of SMALL and the weights of `_filled`.
LOGITS = {
  'resnet': [-0.583585, 0.10999, 0.46842],
  'resnet50_cifar': [5.81814, 1.10748, -14.2189],
  'wrn': [5.80657, -3.04418, 0.568837],
  'vgg': [-0.465545, -1.80957, -1.77848],
  'mobilenet_v2_cifar': [-59.0586, 93.1746, -135.377],
  'shufflenet_v1_cifar': [0.19433, -0.169052, 0.50021],
  'shufflenet_v2_cifar': [-5.88842, 2.73735, 7.52596],
}

# These programs run once: to compile them is what takes time.
_jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def _shapes(model, channels=1, size=8):
  x = jnp.zeros((2, size, size, channels))
  return jax.eval_shape(lambda: model.init(jax.random.key(0), x))


def _small(name, **options):
  return models.make_model(name, num_classes=3, **SMALL[name], **options)


def _all_taps(model):
  taps = model.taps
  named = {*taps.stages, *taps.preactivations, *taps.norms}
  return sorted(named | {taps.embedding, taps.head} - {''})


@functools.cache
def _filled(name):
  """A small model, variables unlike those of a new model, and a batch."""
  model, rng = _small(name), np.random.default_rng(0)
  batch = {'image': rng.normal(size=(2, 16, 16, 3)).astype('f')}

  def fill(path, x):
    noise = rng.normal(size=x.shape).astype('f')
    if path[-1].key == 'kernel':
      return noise * np.sqrt(2 / np.prod(x.shape[:-1]), dtype='f')
    if path[-1].key == 'var':
      return np.exp(0.5 * noise)
    return 0.3 * noise + (path[-1].key == 'scale')

  variables = jax.tree_util.tree_map_with_path(fill, _shapes(model, 3, 16))
  return model, variables, batch


@functools.cache
def _tapped(name):
  """The output and all taps of `_filled`."""
  model, variables, batch = _filled(name)
  forward = adapters.from_linen(model, taps=_all_taps(model))
  return jax.device_get(_jit(forward)(variables, batch))


# --- the published networks


def test_the_published_names_are_there():
  assert set(models.CIFAR_MODELS) == set(PUBLISHED)
  assert set(SMALL) | set(PUBLISHED) <= set(models.MODELS)
  assert set(SMALL) == set(NAMED)
  # No class is there by a published name only.
  classes = {type(_small(name)) for name in SMALL}
  assert {c.func for c in models.CIFAR_MODELS.values()} <= classes


@pytest.mark.parametrize('name', PUBLISHED)
def test_sizes_are_the_published_ones(name):
  model = models.make_model(name, num_classes=100)
  batch = {'image': jnp.zeros((1, 32, 32, 3))}
  variables = jax.eval_shape(model.init, jax.random.key(0), batch['image'])
  count = sum(x.size for x in jax.tree.leaves(variables['params']))
  assert count == PUBLISHED[name]['params']

  forward = adapters.from_linen(model, taps=_all_taps(model))
  features = {}

  def run(variables):
    out = forward(variables, batch)
    features.update({k: x.shape for k, x in out.features.items()})
    return out.output

  macs = measure.multiply_accumulates(run, variables)
  assert macs == PUBLISHED[name]['macs_32x32']

  [stages] = [s for p, s in STAGES.items() if re.fullmatch(p, name)]
  want = [(1, size, size, width) for size, width in stages]
  assert [features[t] for t in model.taps.stages] == want
  assert [features[t] for t in model.taps.preactivations] == want
  norms = [_at(variables['params'], norm) for norm in model.taps.norms]
  widths = [] if name == 'ShuffleV2' else [width for _, width in stages]
  assert [norm['scale'].shape for norm in norms] == [(w,) for w in widths]


def _at(tree, path):
  return functools.reduce(lambda node, key: node[key], path.split('/'), tree)


@pytest.mark.parametrize('name', LOGITS)
def test_outputs_are_those_of_the_published_code(name):
  got = _tapped(name).output[0]
  np.testing.assert_allclose(got, LOGITS[name], rtol=1e-4)


def test_images_of_64_pixels_are_pooled_once_more_in_vgg():
  model = models.VGG(num_classes=0, depth=8, width=2)
  for size, want in ((32, 4), (64, 4), (16, 2)):
    variables = _shapes(model, 3, size)
    x = jnp.zeros((1, size, size, 3))
    out = jax.eval_shape(model.apply, variables, x)
    assert out.shape == (1, want, want, 16)


def test_channel_shuffle_takes_from_the_groups_in_turns():
  x = jnp.array([[10, 11, 12, 13, 20, 21, 22, 23]])
  got = layers.ChannelShuffle(2).apply({}, x)
  assert got.tolist() == [[10, 20, 11, 21, 12, 22, 13, 23]]
  got = layers.ChannelShuffle(4).apply({}, x)
  assert got.tolist() == [[10, 12, 20, 22, 11, 13, 21, 23]]


# --- taps


@pytest.mark.parametrize('name', SMALL)
def test_documented_taps_exist(name):
  model = _small(name)
  batch = {'image': jnp.zeros((2, 8, 8, 1))}
  forward = adapters.from_linen(model, taps=NAMED[name])
  features = jax.eval_shape(forward, _shapes(model), batch).features
  assert set(features) == set(NAMED[name])
  assert features['head'].shape == (2, 3)
  named = set(re.findall(r'`([a-z_0-9/]+)`', type(model).__doc__))
  assert {t for t in named if t in NAMED[name]}, 'the docstring names no tap'


@pytest.mark.parametrize('name', SMALL)
def test_the_head_reads_the_embedding(name):
  model, variables, _ = _filled(name)
  out = _tapped(name)
  head = variables['params'][model.taps.head]
  embedding = out.features[model.taps.embedding]
  assert embedding.ndim == 2
  np.testing.assert_array_equal(out.features[model.taps.head], out.output)
  got = embedding @ head['kernel'] + head['bias'][None]
  np.testing.assert_allclose(got, out.output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', SMALL)
def test_stages_are_activated_preactivations(name):
  model, variables, _ = _filled(name)
  taps, features = model.taps, _tapped(name).features
  assert len(taps.stages) == len(taps.preactivations) > 1
  for i, (stage, before) in enumerate(
    zip(taps.stages, taps.preactivations, strict=True)
  ):
    x, y = features[stage], features[before]
    if name == 'wrn':  # A norm comes first, as the docstring says.
      norm, stats = (
        _at(variables[collection], taps.norms[i])
        for collection in ('params', 'batch_stats')
      )
      scale = norm['scale'] / np.sqrt(stats['var'] + 1e-5)
      want = (x - stats['mean']) * scale + norm['bias']
      np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
    elif name in ('mlp', 'mobilenet_v2_cifar'):
      assert stage == before and x.min() < 0
    else:
      assert y.min() < 0
      # Where the ReLU is computed again, with another fusion, to rounding.
      np.testing.assert_allclose(x, np.maximum(y, 0), rtol=1e-5, atol=1e-6)


NORMS = {
  'mlp': (),
  'cnn': ('norm1', 'norm2', 'norm3'),
  'resnet': tuple(f'stage{s}_block1/norm2' for s in (1, 2, 3)),
  'resnet50_cifar': (
    'stage1_block1/norm3',
    'stage2_block2/norm3',
    'stage3_block1/norm3',
    'stage4_block1/norm3',
  ),
  'wrn': ('stage2_block1/norm1', 'stage3_block1/norm1', 'last_norm'),
  'vgg': ('stage2/norm1', 'stage3/norm2', 'stage4/norm2', 'stage5/norm2'),
  'mobilenet_v2_cifar': (
    'stage2_block2/norm3',
    'stage3_block3/norm3',
    'stage5_block3/norm3',
    'stage7_block1/norm3',
  ),
  'shufflenet_v1_cifar': tuple(
    f'stage{s}_block{n}/norm3' for s, n in ((1, 2), (2, 3), (3, 2))
  ),
  'shufflenet_v2_cifar': (),
}


@pytest.mark.parametrize('name', SMALL)
def test_norms_are_the_last_ones_before_the_preactivations(name):
  assert _small(name).taps.norms == NORMS[name]


@pytest.mark.parametrize('name', CONVOLUTIONAL)
def test_no_classes_returns_what_the_pooling_reads(name):
  model, variables, batch = _filled(name)
  backbone = model.clone(num_classes=0)
  taps = backbone.taps
  assert (taps.embedding, taps.head) == ('', '')
  assert taps.stages == model.taps.stages
  shapes = _shapes(backbone, 3, 16)
  assert set(variables['params']) - set(shapes['params']) == {'head'}
  without = {k: v for k, v in variables['params'].items() if k != 'head'}
  forward = adapters.from_linen(backbone, taps=_all_taps(backbone))
  out = _jit(forward)({**variables, 'params': without}, batch)
  assert out.output.ndim == 4
  pooled = _tapped(name).features[model.taps.embedding]
  np.testing.assert_allclose(
    out.output.mean((1, 2)), pooled, rtol=1e-5, atol=1e-5
  )


def test_a_linear_model_has_no_embedding():
  taps = models.MLP(3, hidden=()).taps
  assert taps == layers.Taps((), (), (), '', 'head')


# --- what training, folding and rounding need


@pytest.mark.parametrize('name', SMALL)
def test_bfloat16_computes_in_it_and_keeps_float32_parameters(name):
  model = _small(name, dtype='bfloat16')
  variables = _shapes(model)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  batch = {'image': jnp.zeros((2, 8, 8, 1))}
  forward = adapters.from_linen(model, taps=_all_taps(model))
  out = jax.eval_shape(forward, variables, batch)
  dtypes = {x.dtype for x in (out.output, *out.features.values())}
  assert dtypes == {jnp.dtype('bfloat16')}
  jaxpr = str(jax.make_jaxpr(lambda v: forward(v, batch).output)(variables))
  products = re.findall(r':(\w+)\[[\d,]*\] = (?:conv_general|dot_gen)', jaxpr)
  assert set(products) == {'bf16'}


@pytest.mark.parametrize('name', SMALL)
def test_dropout_acts_in_training_only(name):
  model = _small(name, dropout=0.9)
  batch, rng = {'image': jnp.zeros((2, 8, 8, 1))}, jax.random.key(0)
  forward = adapters.from_linen(model)

  def text(train):
    run = functools.partial(forward, batch=batch, rng=rng, train=train)
    return str(jax.make_jaxpr(run)(_shapes(model)))

  assert 'random_bits' in text(True)
  assert 'random_bits' not in text(False)


@pytest.mark.parametrize('name', CONVOLUTIONAL)
def test_every_norm_learns_statistics_in_training_only(name):
  model, variables, batch = _filled(name)
  forward = _jit(adapters.from_linen(model), static_argnames='train')

  def run(train):
    out = forward(variables, batch, jax.random.key(0), train=train)
    return jax.device_get(out.model_state)

  before = jax.tree.leaves(variables['batch_stats'])
  moved = [
    bool((old != new).any())
    for old, new in zip(
      before, jax.tree.leaves(run(True)['batch_stats']), strict=True
    )
  ]
  assert len(moved) == len(before) and all(moved)
  kept = jax.tree.leaves(run(False)['batch_stats'])
  assert all((old == new).all() for old, new in zip(before, kept, strict=True))


@pytest.mark.parametrize(
  'name', ['resnet', 'wrn', 'vgg', 'mobilenet_v2_cifar', 'shufflenet_v2_cifar']
)
def test_folding_norms_keeps_the_output(name):
  model, variables, batch = _filled(name)
  folded = deploy.fold(model, variables, batch)
  left = sum('mean' in p for p in _paths(folded.get('batch_stats', {})))
  # In a pre-activation network, norms after a sum stay.
  assert left == (3 if name == 'wrn' else 0)
  skipping = adapters.from_linen(
    model, interceptors=[quantize.skip_folded_batch_norms]
  )
  got = _jit(skipping)(folded, batch).output
  want = _tapped(name).output
  tolerance = 1e-5 * np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=tolerance)


def _paths(tree):
  return [
    jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)
  ]


HE = ('resnet', 'resnet50_cifar', 'wrn', 'vgg', 'mobilenet_v2_cifar')


@pytest.mark.parametrize('name', [n for n in CONVOLUTIONAL if n != 'cnn'])
def test_initial_values_are_those_of_the_published_code(name):
  model = _small(name)
  x = jnp.zeros((1, 8, 8, 3))
  params = jax.device_get(_jit(model.init)(jax.random.key(0), x)['params'])
  head = params.pop('head')
  bound = 1 / np.sqrt(head['kernel'].shape[0])
  assert 0.8 * bound < np.abs(head['kernel']).max() <= bound
  assert not head['bias'].any()
  scaled = []
  for path, value in jax.tree_util.tree_leaves_with_path(params):
    leaf = path[-1].key
    if leaf != 'kernel':
      assert (value == (leaf == 'scale')).all(), path
      continue
    size, fan_in = np.prod(value.shape[:2]), np.prod(value.shape[:3])
    variance = 2 / (size * value.shape[3]) if name in HE else 1 / (3 * fan_in)
    scaled.append(value.reshape(-1) / np.sqrt(variance))
  scaled = np.concatenate(scaled)
  assert abs(scaled.std() - 1) < 0.05
  if name in HE:
    assert np.abs(scaled).max() > 2.5
  else:
    assert np.abs(scaled).max() <= np.sqrt(3) * (1 + 1e-6)


def test_resnet_halves_twice_and_widens():
  model = models.CifarResNet(3, depth=8, width=4)
  taps = [f'stage{s}_block1' for s in (1, 2, 3)]
  batch = {'image': jnp.zeros((2, 16, 16, 3))}
  forward = adapters.from_linen(model, taps=taps)
  out = jax.eval_shape(forward, _shapes(model, 3, 16), batch)
  assert [out.features[t].shape[1:] for t in taps] == [
    (16, 16, 4),
    (8, 8, 8),
    (4, 4, 16),
  ]


# --- messages


@pytest.mark.parametrize(
  'model, message',
  [
    *[
      (models.CifarResNet(3, depth=d), f'depth={d} is not 6n')
      for d in (2, 7, 9, 21)
    ],
    *[
      (models.WideResNet(3, depth=d), f'WideResNet: depth={d} is not 6n')
      for d in (4, 8, 20)
    ],
    (models.VGG(3, depth=12), 'VGG: depth=12 is not one of 8, 11, 13, 16, 19'),
  ],
)
def test_a_depth_that_there_is_not_is_named(model, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    _shapes(model)
  with pytest.raises(ValueError, match=re.escape(message)):
    _ = model.taps


@pytest.mark.parametrize(
  'model, message',
  [
    (
      models.CifarBottleneckResNet(3, blocks=(1, 0)),
      r'blocks=\(1, 0\); every stage needs at least one',
    ),
    (
      models.ShuffleNetV1(3, widths=(36, 48), blocks=(2, 1)),
      r'ShuffleNetV1: blocks=\(2, 1\); every stage needs at least 2',
    ),
    (
      models.ShuffleNetV2(3, widths=(8, 12), blocks=(1, 0)),
      r'ShuffleNetV2: blocks=\(1, 0\); every stage needs at least 1',
    ),
    (
      models.ShuffleNetV2(3, widths=(8, 12), blocks=(1, 1, 1)),
      r'widths=\(8, 12\) name different numbers',
    ),
    (
      models.ShuffleNetV2(3, widths=(8, 11), blocks=(1, 1)),
      r'widths=\(8, 11\) must be even',
    ),
    (
      models.ShuffleNetV1(3, widths=(36, 46), blocks=(2, 2)),
      r'widths=\(36, 46\) do not fit groups=3',
    ),
    (
      models.ShuffleNetV1(3, widths=(24, 48), blocks=(2, 2)),
      'do not fit groups=3: the unit that makes 0 channels',
    ),
    (models.CifarMobileNetV2(3, width=0.05), 'width=0.05 leaves no channel'),
  ],
)
def test_options_that_make_no_network_are_named(model, message):
  with pytest.raises(ValueError, match=message):
    _shapes(model)


def test_unknown_names_and_options_are_named():
  with pytest.raises(ValueError, match="model 'resnt'.*mean resnet"):
    models.make_model('resnt', num_classes=3)
  with pytest.raises(ValueError, match="'resnet'.*'dept'.*depth"):
    models.make_model('resnet', num_classes=3, dept=8)
  with pytest.raises(ValueError, match="'resnet20': 'dropot'.*dropout"):
    models.make_model('resnet20', num_classes=3, dropot=0.1)


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    ('cnn', {'widths': 16}, r"'cnn': widths=16 .*\(16, 32, 64\)"),
    ('mlp', {'hidden': '64'}, "'mlp': hidden='64' "),
    ('resnet', {'depth': '20'}, "'resnet': depth='20' .* 20"),
    ('resnet', {'width': 16.0}, 'width=16.0 '),
    ('vgg', {'dropout': True}, 'dropout=True '),
    ('vit', {'distilled': 1}, 'distilled=1 .* False'),
  ],
)
def test_options_of_another_type_are_named(name, options, message):
  with pytest.raises(ValueError, match=message):
    models.make_model(name, num_classes=3, **options)


def test_options_may_be_lists_and_numbers_of_numpy():
  model = models.make_model(
    'cnn', num_classes=3, widths=[np.int64(4)], dropout=0
  )
  assert model.widths[0] == 4 and model.dropout == 0


def test_a_published_name_keeps_its_structure():
  with pytest.raises(ValueError, match="option of model 'resnet20': 'depth'"):
    models.make_model('resnet20', num_classes=3, depth=8)
  model = models.make_model('resnet8x4', num_classes=7, dtype='bfloat16')
  want = models.CifarResNet(
    num_classes=7, depth=8, width=64, stem_width=32, dtype='bfloat16'
  )
  assert model == want


def test_a_norm_after_a_sum_that_another_layer_reads_is_kept():
  """The stem of a pre-activation network feeds a norm and a residual sum."""
  model = models.WideResNet(3, depth=10, widen_factor=1)
  rng = np.random.default_rng(0)
  batch = {'image': rng.normal(size=(2, 8, 8, 3)).astype('f')}
  variables = jax.tree.map(
    lambda x: np.abs(rng.normal(size=x.shape)).astype('f'), _shapes(model, 3)
  )
  folded = deploy.fold(model, variables, batch)
  skipping = adapters.from_linen(
    model, interceptors=[quantize.skip_folded_batch_norms]
  )
  want = _jit(adapters.from_linen(model))(variables, batch).output
  got = _jit(skipping)(folded, batch).output
  np.testing.assert_allclose(got, want, rtol=1e-4)
