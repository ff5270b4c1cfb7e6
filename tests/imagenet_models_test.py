"""ImageNet models: published sizes, numbers and taps; weights by their names.

Equality with PyTorch is in pretrained_test.py, which needs torch.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy

from kd_jax import adapters, models, quantize
from kd_jax.models import convnext, mobilenet
from kd_jax.report import measure

# Parameters, and multiply-accumulates in 1e9 at 224x224 to the digits given.
# Sources: torchvision's table of weights (resnet, mobilenet_v2, convnext_t;
# vit_b16 without its token), timm's results (other vit and deit) and Howard et
# al., table 8 (mobilenet_v1, "569 million"; parameters as in timm, there 4.2
# million). All count both products of the attention.
PUBLISHED = {
  'resnet18': (11_689_512, '1.814'),
  'resnet34': (21_797_672, '3.664'),
  'resnet50': (25_557_032, '4.089'),
  'mobilenet_v1': (4_231_976, '0.569'),
  'mobilenet_v2': (3_504_872, '0.301'),
  'vit_ti16': (5_717_416, '1.25'),
  'vit_s16': (22_050_664, '4.6'),
  'vit_b16': (86_567_656, '17.564'),
  'deit_ti16': (5_717_416, '1.25'),
  'deit_s16': (22_050_664, '4.6'),
  'deit_b16': (86_567_656, '17.564'),
  'deit_ti16_distilled': (5_910_800, '1.3'),
  'deit_s16_distilled': (22_436_432, '4.6'),
  'deit_b16_distilled': (87_338_192, '17.7'),
  'convnext_t': (28_589_128, '4.456'),
}
# A small model of every class.
SMALL = {
  'resnet': models.ImageNetResNet(3, blocks=(1, 2, 1, 1), width=4),
  'bottleneck': models.ImageNetResNet(
    3, blocks=(1, 1, 1, 1), bottleneck=True, width=4
  ),
  'mobilenet_v1': models.MobileNetV1(3, width=0.25),
  'mobilenet_v2': models.MobileNetV2(3, width=0.25),
  'vit': models.ViT(3, patch_size=8, width=12, depth=4, heads=3),
  'deit': models.ViT(
    3, patch_size=8, width=12, depth=4, heads=3, distilled=True
  ),
  'convnext': models.ConvNeXt(3, blocks=(1, 1, 2, 1), widths=(4, 8, 12, 16)),
}
TRANSFORMERS = ('vit', 'deit')
# What is returned without classes, or what is before its activation.
LAST = {
  **dict.fromkeys(SMALL, ['stage4_block1']),
  **dict.fromkeys(TRANSFORMERS, ['norm']),
  'mobilenet_v1': ['stage5_block2'],
  'mobilenet_v2': ['last_norm'],
}
ATTENTION = ('query', 'queries', 'keys', 'values')
ATTENTION += ('scores', 'probabilities', 'context', 'out')
# Logits of the first image that the PyTorch twins of pretrained_test.py (V1
# with ReLU in place of ReLU6) give with the weights of `_filled`.
LOGITS = {
  'resnet': [-18.9286, -10.5147, 15.1561],
  'bottleneck': [5.30841, 11.7361, -2.1773],
  'mobilenet_v1': [0.323166, 0.675061, -0.579186],
  'mobilenet_v2': [4.3151, -0.504842, 2.11218],
  'vit': [2.2926, -1.00762, 0.14381],
  'deit': [0.885134, -0.0493655, 0.964479],
  'convnext': [-1.00033, -3.99662, -1.79254],
}
# These programs run once: to compile them is what takes time.
_jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def _shapes(model, size=32):
  x = jnp.zeros((2, size, size, 3))
  return jax.eval_shape(model.init, jax.random.key(0), x)


@functools.cache
def _filled(name):
  """Variables unlike those of a new model, and a batch."""
  rng = np.random.default_rng(0)
  batch = {'image': rng.normal(size=(2, 32, 32, 3)).astype('f')}

  def fill(path, x):
    noise = rng.normal(size=x.shape).astype('f')
    if path[-1].key == 'kernel':
      return noise * np.sqrt(2 / np.prod(x.shape[:-1]), dtype='f')
    if path[-1].key == 'var':
      return np.exp(0.5 * noise)
    return 0.3 * noise + (path[-1].key in ('scale', 'gamma'))

  return jax.tree_util.tree_map_with_path(fill, _shapes(SMALL[name])), batch


def _taps(name):
  """All that the tests look at."""
  model = SMALL[name]
  taps = {*model.taps.stages, *model.taps.preactivations, *LAST[name]}
  if name in TRANSFORMERS:
    taps |= {'tokens', 'block1', 'block1/attention', 'block1/mlp'}
    taps |= {f'block2/attention/{tap}' for tap in ATTENTION}
  if name == 'deit':
    taps |= {'distillation_token', 'head_dist'}
  return sorted(taps | {model.taps.embedding, model.taps.head})


@functools.cache
def _tapped(name, train=False):
  """Output and features of `_filled`, on the host."""
  forward = adapters.from_linen(SMALL[name], taps=_taps(name))
  run = _jit(functools.partial(forward, train=train))
  return jax.device_get(run(*_filled(name), jax.random.key(0)))


# --- sizes


@functools.cache
def _measured(name):
  model = models.make_model(name, num_classes=1000)
  x = jnp.zeros((1, 224, 224, 3))
  variables = _shapes(model, 224)
  parameters = sum(x.size for x in jax.tree.leaves(variables['params']))
  return parameters, measure.multiply_accumulates(model.apply, variables, x)


def test_the_published_names_are_there():
  assert set(models.IMAGENET_MODELS) == set(PUBLISHED) <= set(models.MODELS)
  assert models.MODELS['resnet50'] is not models.MODELS['ResNet50']


@pytest.mark.parametrize('name', PUBLISHED)
def test_sizes_are_the_published_ones(name):
  parameters, macs = _measured(name)
  published, giga = PUBLISHED[name]
  assert parameters == published
  digits = len(giga.split('.')[1])
  assert f'{macs / 1e9:.{digits}f}' == giga


@pytest.mark.parametrize('name', [n for n in PUBLISHED if '16' in n])
def test_the_sizes_of_transformers_by_hand(name):
  d = {'ti': 192, 's': 384, 'b': 768}[re.match('(vit|deit)_(.*?)16', name)[2]]
  extra = 1 + name.endswith('distilled')
  length = 14 * 14 + extra
  heads = extra * 1000
  # Four projections and two layers of four times the width: 12 d**2.
  block = 12 * d**2 + (4 + 4 + 1) * d + 2 * 2 * d
  patch = 16 * 16 * 3 * d
  parameters = patch + d + (extra + length) * d + 12 * block
  parameters += 2 * d + heads * (d + 1)
  macs = 196 * patch + 12 * (length * 12 * d**2 + 2 * length**2 * d)
  assert _measured(name) == (parameters, macs + heads * d)


def test_the_multiply_accumulates_of_resnet18_by_hand():
  stem = 112**2 * 7 * 7 * 3 * 64
  # Every stage costs the same but for its first block, whose first 3x3 reads
  # half the channels; the first stage has four full ones and no projection.
  full = 56**2 * 9 * 64 * 64
  stage = 3 * full + full // 2
  projection = 28**2 * 64 * 128
  expected = stem + 4 * full + 3 * (stage + projection) + 512 * 1000
  assert _measured('resnet18')[1] == expected


def test_the_multiply_accumulates_of_mobilenet_v1_by_hand():
  expected, side, inputs = 112**2 * 27 * 32, 112, 32
  for outputs, stride in [
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
  ]:
    side //= stride
    expected += side**2 * inputs * (9 + outputs)
    inputs = outputs
  assert _measured('mobilenet_v1')[1] == expected + 1024 * 1000


@pytest.mark.parametrize(
  'channels, expected',
  [(16, 16), (24, 24), (4, 8), (12, 16), (11, 16), (18, 24)],
)
def test_channels_become_multiples_of_8_never_10_percent_lower(
  channels, expected
):
  assert mobilenet.make_divisible(channels) == expected


def test_options_that_a_name_stands_for_are_not_open():
  model = models.make_model('resnet18', num_classes=7, dropout=0.1)
  assert (model.num_classes, model.dropout) == (7, 0.1)
  with pytest.raises(ValueError, match="'vit_ti16'.*'distilled'"):
    models.make_model('vit_ti16', num_classes=7, distilled=True)
  assert models.make_model('vit', num_classes=7, distilled=True).distilled


# --- numbers


@pytest.mark.parametrize('name', SMALL)
def test_logits_are_those_of_the_published_networks(name):
  np.testing.assert_allclose(_tapped(name).output[0], LOGITS[name], rtol=1e-4)


@pytest.mark.parametrize('name', SMALL)
def test_features_are_where_taps_says(name):
  model, variables = SMALL[name], _filled(name)[0]
  taps = model.taps
  out = _tapped(name)
  f = out.features
  for stage, pre in zip(taps.stages, taps.preactivations, strict=True):
    if stage != pre:
      # Where the ReLU is computed again, with another fusion, to rounding.
      activated = np.maximum(f[pre], 0)
      np.testing.assert_allclose(f[stage], activated, rtol=1e-5, atol=1e-6)
  # Some networks have no BatchNorm to name; others one for each.
  assert len(taps.norms) in (0, len(taps.preactivations))
  for pre, norm in zip(taps.preactivations, taps.norms, strict=False):
    layer = variables['params']
    for part in norm.split('/'):
      layer = layer[part]
    assert layer['scale'].shape == f[pre].shape[-1:]
  head = variables['params'][taps.head]
  logits = f[taps.embedding] @ head['kernel'] + head['bias']
  np.testing.assert_allclose(f[taps.head], logits, rtol=1e-4, atol=1e-4)
  if name != 'deit':
    np.testing.assert_array_equal(f[taps.head], out.output)
  assert len(taps.stages) == 4
  if name in TRANSFORMERS:
    length = 4 * 4 + 1 + (name == 'deit')
    assert {f[s].shape for s in taps.stages} == {(2, length, 12)}
  else:
    assert [f[s].shape[1] for s in taps.stages] == [8, 4, 2, 1]
    assert bool(taps.norms) == (name != 'convnext')


@pytest.mark.parametrize('name', SMALL)
def test_without_classes_the_last_features_come_out(name):
  model = SMALL[name].clone(num_classes=0)
  full, batch = _filled(name)
  variables = {
    k: {p: v for p, v in full[k].items() if p in shapes}
    for k, shapes in _shapes(model).items()
  }
  assert not any(p.startswith('head') for p in variables['params'])
  out = _jit(adapters.from_linen(model))(variables, batch).output
  [last] = LAST[name]
  expected = _tapped(name).features[last]
  if name == 'mobilenet_v2':
    assert out.shape == (2, 1, 1, 1280)
    expected = np.clip(expected, 0, 6)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
  assert model.taps.embedding == model.taps.head == ''


def test_attention_can_be_tapped_from_projections_to_output():
  features = _tapped('vit').features
  f = {name: features[f'block2/attention/{name}'] for name in ATTENTION}
  assert f['query'].shape == (2, 17, 12)
  assert f['keys'].shape == f['values'].shape == (2, 17, 3, 4)
  np.testing.assert_array_equal(f['queries'].reshape(2, 17, 12), f['query'])
  for n in range(3):
    q, k, v = (f[x][:, :, n] for x in ('queries', 'keys', 'values'))
    scores = q @ k.swapaxes(1, 2) / math.sqrt(4)
    np.testing.assert_allclose(f['scores'][:, n], scores, rtol=1e-4, atol=1e-5)
    p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(
      f['probabilities'][:, n], p, rtol=1e-4, atol=1e-5
    )
    context = f['context'][:, :, 4 * n : 4 * n + 4]
    np.testing.assert_allclose(context, p @ v, rtol=1e-4, atol=1e-5)


def test_hidden_states_add_up():
  f = _tapped('deit').features
  total = f['tokens'] + f['block1/attention'] + f['block1/mlp']
  np.testing.assert_allclose(f['block1'], total, rtol=1e-4, atol=1e-5)
  assert f['norm'].shape == f['block4'].shape == (2, 18, 12)


@pytest.mark.parametrize('train', [False, True])
def test_a_distilled_model_returns_the_average_of_its_heads(train):
  out = _tapped('deit', train)
  average = (out.features['head'] + out.features['head_dist']) / 2
  np.testing.assert_allclose(out.output, average, rtol=1e-6)
  assert np.abs(out.features['head'] - out.features['head_dist']).max() > 0.1
  np.testing.assert_array_equal(
    out.features['distillation_token'], out.features['norm'][:, 1]
  )


def test_shallow_transformers_have_fewer_stages():
  assert models.ViT(depth=2).taps.stages == ('block1', 'block2')
  assert models.ViT(depth=6).taps.stages[:2] == ('block2', 'block3')


# --- options


@pytest.mark.parametrize('name', SMALL)
def test_bfloat16_computes_in_it_and_keeps_float32_parameters(name):
  model = SMALL[name].clone(dtype='bfloat16')
  shapes = _shapes(model)
  assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}
  stages = model.taps.stages
  forward = adapters.from_linen(model, taps=stages)
  out = jax.eval_shape(forward, shapes, _filled(name)[1])
  dtypes = {x.dtype for x in (out.output, *out.features.values())}
  assert dtypes == {jnp.dtype('bfloat16')}


RATES = [(name, 'dropout') for name in SMALL]
RATES += [('vit', 'attention_dropout'), ('vit', 'drop_path')]
RATES += [('convnext', 'drop_path')]


@pytest.mark.parametrize('name, rate', RATES)
def test_rates_act_in_training_only(name, rate):
  model = SMALL[name].clone(**{rate: 0.5})
  forward = adapters.from_linen(model)
  variables, batch = _filled(name)

  def text(train):
    run = functools.partial(forward, train=train)
    return str(jax.make_jaxpr(run)(variables, batch, jax.random.key(0)))

  assert 'random_bits' in text(True)
  assert 'random_bits' not in text(False)


def test_a_layer_scale_is_a_module_of_its_own():
  scale, x = convnext.LayerScale(0.5), jnp.ones((2, 3))
  variables = scale.init(jax.random.key(0), x)
  np.testing.assert_array_equal(scale.apply(variables, x), 0.5 * x)


@pytest.mark.parametrize('name', ['vit', 'convnext'])
def test_a_dropped_path_leaves_whole_examples(name):
  model = SMALL[name].clone(drop_path=0.5)
  last = model.taps.stages[-1]
  taps = ['block3', last] if name == 'vit' else ['downsample4', last]
  forward = adapters.from_linen(model, taps=taps)
  variables, batch = _filled(name)
  batch = {'image': np.repeat(batch['image'], 16, axis=0)}
  run = _jit(functools.partial(forward, train=True))
  f = run(variables, batch, jax.random.key(0)).features
  change = np.abs(f[last] - f[taps[0]]).max(axis=tuple(range(1, f[last].ndim)))
  if name == 'convnext':
    # One branch, dropped or not.
    assert 0 < (change == 0).sum() < 32
  else:
    # Two branches, of which both were dropped for some.
    assert 0 < (change == 0).sum() < 24


@pytest.mark.parametrize(
  'model, message',
  [
    (models.ImageNetResNet(blocks=(2, 0)), r'ImageNetResNet: blocks=\(2, 0\)'),
    (models.ConvNeXt(blocks=(1, 1)), r'ConvNeXt: blocks=\(1, 1\), widths'),
    (models.ViT(patch_size=7), 'patch_size=7 do not tile images of 32x32'),
    (models.ViT(width=10, heads=4), 'heads=4 does not divide width=10'),
  ],
)
def test_options_that_do_not_fit_are_named(model, message):
  with pytest.raises(ValueError, match=message):
    _shapes(model)


# Residual sums; at this width, MobileNetV2's first block has one too.
SUMS = {
  'resnet': 5,
  'bottleneck': 4,
  'mobilenet_v1': 0,
  'mobilenet_v2': 11,
  'convnext': 5,
}


@pytest.mark.parametrize('name', SMALL)
def test_layers_can_be_quantized(name):
  model, (variables, batch) = SMALL[name], _filled(name)
  spec = quantize.QuantSpec(symmetric=False, narrow=False)
  observe = quantize.quantize_activations([('.*', spec)])
  forward = adapters.from_linen(model, interceptors=[observe])
  stats = quantize.init_quant_stats(forward, variables, batch)
  if name in TRANSFORMERS:
    projections = {'query', 'key', 'value', 'out'}
    products = {'scores', 'context'}
    assert set(stats['block1']['attention']) == projections | products
    assert {'mlp', 'add1', 'add2'} <= set(stats['block1'])
  else:
    assert 'pool' in stats
    assert sum('add' in layer for layer in stats.values()) == SUMS[name]
  assert 'head' in stats


@pytest.mark.parametrize('name', [n for n in SMALL if SMALL[n].taps.norms])
def test_every_batch_norm_can_be_folded(name):
  variables, batch = _filled(name)
  norms = quantize.foldable_batch_norms(
    lambda i: adapters.from_linen(SMALL[name], interceptors=(i,)),
    variables,
    batch,
  )
  means = [
    p
    for p, _ in jax.tree_util.tree_leaves_with_path(variables['batch_stats'])
    if p[-1].key == 'mean'
  ]
  assert len(norms) == len(means)


# --- weights by their names


def _write(path, shapes, dtype='f'):
  """Random arrays of these shapes as a file; returns them."""
  rng = np.random.default_rng(0)
  arrays = {
    k: np.asarray(rng.normal(size=shape), dtype) for k, shape in shapes.items()
  }
  safetensors.numpy.save_file(arrays, path)
  return arrays


def _norm(name, width):
  leaves = ('weight', 'bias', 'running_mean', 'running_var')
  return {f'{name}.{leaf}': (width,) for leaf in leaves}


RESNET = {
  'conv1.weight': (4, 3, 7, 7),
  **_norm('bn1', 4),
  'layer1.0.conv1.weight': (4, 4, 1, 1),
  **_norm('layer1.0.bn1', 4),
  'layer1.0.conv2.weight': (4, 4, 3, 3),
  **_norm('layer1.0.bn2', 4),
  'layer1.0.conv3.weight': (16, 4, 1, 1),
  **_norm('layer1.0.bn3', 16),
  'layer1.0.downsample.0.weight': (16, 4, 1, 1),
  **_norm('layer1.0.downsample.1', 16),
  'fc.weight': (3, 16),
  'fc.bias': (3,),
}
RESNET_MODEL = models.ImageNetResNet(3, blocks=(1,), bottleneck=True, width=4)
VIT = {
  'cls_token': (1, 1, 6),
  'dist_token': (1, 1, 6),
  'pos_embed': (1, 6, 6),
  'patch_embed.proj.weight': (6, 3, 8, 8),
  'patch_embed.proj.bias': (6,),
  'blocks.0.norm1.weight': (6,),
  'blocks.0.norm1.bias': (6,),
  'blocks.0.attn.qkv.weight': (18, 6),
  'blocks.0.attn.qkv.bias': (18,),
  'blocks.0.attn.proj.weight': (6, 6),
  'blocks.0.attn.proj.bias': (6,),
  'blocks.0.norm2.weight': (6,),
  'blocks.0.norm2.bias': (6,),
  'blocks.0.mlp.fc1.weight': (24, 6),
  'blocks.0.mlp.fc1.bias': (24,),
  'blocks.0.mlp.fc2.weight': (6, 24),
  'blocks.0.mlp.fc2.bias': (6,),
  'norm.weight': (6,),
  'norm.bias': (6,),
  'head.weight': (3, 6),
  'head.bias': (3,),
  'head_dist.weight': (3, 6),
  'head_dist.bias': (3,),
}
VIT_MODEL = models.ViT(
  3, patch_size=8, width=6, depth=1, heads=2, distilled=True
)


def _load(tmp_path, shapes, model, **options):
  path = tmp_path / 'weights.safetensors'
  arrays = _write(path, shapes)
  options = {'input_shape': (16, 16, 3), **options}
  return arrays, models.load_pretrained(path, model, **options)


def test_convolutions_and_batch_norms_find_their_places(tmp_path):
  tracked = {'bn1.num_batches_tracked': ()}
  arrays, loaded = _load(tmp_path, RESNET | tracked, RESNET_MODEL)
  init = _shapes(RESNET_MODEL, 16)
  assert jax.tree.structure(loaded) == jax.tree.structure(init)
  block = loaded['params']['stage1_block1']
  conv = arrays['layer1.0.conv2.weight']
  assert block['conv2']['kernel'][2, 0, 3, 1] == conv[1, 3, 2, 0]
  np.testing.assert_array_equal(
    block['norm_shortcut']['scale'], arrays['layer1.0.downsample.1.weight']
  )
  stats = loaded['batch_stats']
  for ours, theirs in {'mean': 'running_mean', 'var': 'running_var'}.items():
    np.testing.assert_array_equal(
      stats['stem_norm'][ours], arrays[f'bn1.{theirs}']
    )
  np.testing.assert_array_equal(
    loaded['params']['head']['kernel'], arrays['fc.weight'].T
  )


def test_fused_projections_are_split_and_tokens_kept(tmp_path):
  arrays, loaded = _load(tmp_path, VIT, VIT_MODEL)
  assert set(loaded) == {'params'}
  attention = loaded['params']['block1']['attention']
  for i, name in enumerate(('query', 'key', 'value')):
    third = slice(6 * i, 6 * i + 6)
    kernel = arrays['blocks.0.attn.qkv.weight'][third].T
    np.testing.assert_array_equal(attention[name]['kernel'], kernel)
    bias = arrays['blocks.0.attn.qkv.bias'][third]
    np.testing.assert_array_equal(attention[name]['bias'], bias)
  for name in ('cls_token', 'dist_token', 'pos_embed'):
    np.testing.assert_array_equal(
      loaded['params']['tokens'][name], arrays[name]
    )


def test_depthwise_kernels_and_layer_scales_find_their_places(tmp_path):
  """Both namings of ConvNeXt, told apart by the names."""
  model = models.ConvNeXt(3, blocks=(1,), widths=(4,))
  block = {
    'weight': (4, 1, 7, 7),
    'bias': (4,),
  }
  timm = {
    'stem.0.weight': (4, 3, 4, 4),
    'stem.0.bias': (4,),
    'stem.1.weight': (4,),
    'stem.1.bias': (4,),
    **{f'stages.0.blocks.0.conv_dw.{k}': v for k, v in block.items()},
    'stages.0.blocks.0.norm.weight': (4,),
    'stages.0.blocks.0.norm.bias': (4,),
    'stages.0.blocks.0.mlp.fc1.weight': (16, 4),
    'stages.0.blocks.0.mlp.fc1.bias': (16,),
    'stages.0.blocks.0.mlp.fc2.weight': (4, 16),
    'stages.0.blocks.0.mlp.fc2.bias': (4,),
    'stages.0.blocks.0.gamma': (4,),
    'head.norm.weight': (4,),
    'head.norm.bias': (4,),
    'head.fc.weight': (3, 4),
    'head.fc.bias': (3,),
  }
  renamed = {
    'stem': 'features.0',
    'stages.0.blocks.0.conv_dw': 'features.1.0.block.0',
    'stages.0.blocks.0.norm': 'features.1.0.block.2',
    'stages.0.blocks.0.mlp.fc1': 'features.1.0.block.3',
    'stages.0.blocks.0.mlp.fc2': 'features.1.0.block.5',
    'stages.0.blocks.0.gamma': 'features.1.0.layer_scale',
    'head.norm': 'classifier.0',
    'head.fc': 'classifier.2',
  }
  torchvision = {}
  for name, shape in timm.items():
    [prefix] = [p for p in renamed if name.startswith(p)]
    shape = (4, 1, 1) if name.endswith('gamma') else shape
    torchvision[name.replace(prefix, renamed[prefix])] = shape
  arrays, loaded = _load(tmp_path, timm, model)
  block = loaded['params']['stage1_block1']
  kernel = arrays['stages.0.blocks.0.conv_dw.weight'].transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(block['conv']['kernel'], kernel)
  gamma = arrays['stages.0.blocks.0.gamma']
  np.testing.assert_array_equal(block['scale']['gamma'], gamma)
  # The same random values in the same order.
  other = _load(tmp_path, torchvision, model)[1]
  jax.tree.map(np.testing.assert_array_equal, loaded, other)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_half_precision_becomes_float32(dtype, tmp_path):
  path = tmp_path / 'weights.safetensors'
  arrays = {k: jnp.full(s, 1.5, dtype) for k, s in RESNET.items()}
  safetensors.flax.save_file(arrays, path)
  loaded = models.load_pretrained(path, RESNET_MODEL, input_shape=(16, 16, 3))
  for x in jax.tree.leaves(loaded):
    assert x.dtype == jnp.float32 and (x == 1.5).all()


def test_a_fresh_head_is_drawn_from_the_key(tmp_path):
  model, key = RESNET_MODEL.clone(num_classes=5), jax.random.key(3)
  arrays, loaded = _load(tmp_path, RESNET, model, head=False, key=key)
  images = jnp.zeros((1, 16, 16, 3))
  init = _jit(model.init)(key, images)['params']['head']
  jax.tree.map(np.testing.assert_array_equal, loaded['params']['head'], init)
  stem = arrays['conv1.weight'].transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(loaded['params']['stem']['kernel'], stem)
  with pytest.raises(ValueError, match='head=False needs a key'):
    _load(tmp_path, RESNET, model, head=False)
  # A file without a head will do as well.
  headless = {k: v for k, v in RESNET.items() if not k.startswith('fc')}
  again = _load(tmp_path, headless, model, head=False, key=key)[1]
  jax.tree.map(np.testing.assert_array_equal, loaded['params'], again['params'])


def test_both_heads_of_a_distilled_model_can_be_fresh(tmp_path):
  model = VIT_MODEL.clone(num_classes=5)
  options = {'head': False, 'key': jax.random.key(0)}
  params = _load(tmp_path, VIT, model, **options)[1]['params']
  assert params['head']['kernel'].shape == (6, 5)
  assert params['head_dist']['kernel'].shape == (6, 5)


def test_a_backbone_needs_neither_head_nor_key(tmp_path):
  model = RESNET_MODEL.clone(num_classes=0)
  params = _load(tmp_path, RESNET, model, head=False)[1]['params']
  assert set(params) == {'stem', 'stem_norm', 'stage1_block1'}
  with pytest.raises(ValueError, match="has 'fc.bias'"):
    _load(tmp_path, RESNET, model)


def test_the_features_of_the_large_vgg_load_without_its_dense_layers(tmp_path):
  model, shapes, inputs = models.VGG(5, depth=11, width=1), {}, 3
  for i, outputs in {
    0: 1,
    4: 2,
    8: 4,
    11: 4,
    15: 8,
    18: 8,
    22: 8,
    25: 8,
  }.items():
    shapes[f'features.{i}.weight'] = (outputs, inputs, 3, 3)
    shapes[f'features.{i}.bias'] = (outputs,)
    shapes |= _norm(f'features.{i + 1}', outputs)
    inputs = outputs
  dense = {f'classifier.{i}.weight': (9, 9) for i in (0, 3, 6)}
  options = {'head': False, 'key': jax.random.key(0)}
  arrays, loaded = _load(tmp_path, shapes | dense, model, **options)
  np.testing.assert_array_equal(
    loaded['params']['stage5']['conv2']['kernel'],
    arrays['features.25.weight'].transpose(2, 3, 1, 0),
  )


@pytest.mark.parametrize(
  'change, message',
  [
    ({'bn1.bias': None}, "lacks 'bn1.bias' for ImageNetResNet"),
    ({'conv1.weight': None, 'conv1.wieght': (4, 3, 7, 7)}, 'mean conv1.wieght'),
    ({'layer1.1.conv1.weight': (4, 4, 1, 1)}, "has 'layer1.1.conv1.weight'"),
    (
      {'conv1.weight': (4, 3, 3, 3)},
      r"'conv1.weight' has shape \(4, 3, 3, 3\)",
    ),
    ({'fc.weight': (4, 16), 'fc.bias': (4,)}, 'Load with head=False'),
    # The other way round it would have the right number of elements.
    ({'fc.weight': (16, 3)}, r'needs \(3, 16\)'),
  ],
)
def test_arrays_that_do_not_fit_are_named(change, message, tmp_path):
  shapes = {k: v for k, v in (RESNET | change).items() if v is not None}
  with pytest.raises(ValueError, match=message):
    _load(tmp_path, shapes, RESNET_MODEL)


def test_other_files_models_and_dtypes_are_refused(tmp_path):
  path = tmp_path / 'weights.safetensors'
  _write(path, RESNET, 'int8')
  with pytest.raises(ValueError, match="'.*' is int8, not a float"):
    models.load_pretrained(path, RESNET_MODEL, input_shape=(16, 16, 3))
  with pytest.raises(ValueError, match='no names for CNN; valid: .*ViT'):
    models.load_pretrained(path, models.CNN(3))
  path.write_bytes(b'\x80\x04K\x01.')  # a pickle
  with pytest.raises(ValueError, match='cannot be read as safetensors'):
    models.load_pretrained(path, RESNET_MODEL)
  with pytest.raises(ValueError, match='nothing.safetensors cannot be read'):
    models.load_pretrained(tmp_path / 'nothing.safetensors', RESNET_MODEL)


def test_a_distilled_file_does_not_fit_a_plain_transformer(tmp_path):
  with pytest.raises(ValueError, match="has 'dist_token', .* ViT"):
    _load(tmp_path, VIT, VIT_MODEL.clone(distilled=False))
