"""ONNX files: the numbers of JAX, on integer kernels."""

import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import optax
import pytest
from flax import linen as nn
from sklearn import datasets

from kd_jax import adapters, models, objectives, quantize, step
from kd_jax.export import onnx as onnx_lib
from kd_jax.models.layers import GlobalAveragePool
from kd_jax.quantize import stored

IMAGE = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.uint8)
WEIGHTS = [('.*/kernel', quantize.INT8_WEIGHTS)]
ACTIVATIONS = [('.*', quantize.INT8_ACTIVATIONS)]
OPTIONS = {
  'mlp': {'hidden': (32, 16)},
  'cnn': {'widths': (8, 8, 16)},
  'resnet': {'depth': 8, 'width': 8},
}
LAYERS = {
  'mlp': {'QGemm': 3},
  'cnn': {'QLinearConv': 3, 'QLinearGlobalAveragePool': 1, 'QGemm': 1},
  'resnet': {
    'QLinearConv': 9,
    'QLinearAdd': 3,
    'QLinearGlobalAveragePool': 1,
    'QGemm': 1,
  },
}


@functools.cache
def _digits():
  digits = datasets.load_digits()
  images = (digits.images * 15).astype(np.uint8)[..., None]
  return images, digits.target.astype(np.int32)


def _preprocess(image):
  return (image.astype(jnp.float32) / 255.0 - 0.3) / 0.35


def _forward(model, *interceptors, train_argument='train'):
  return adapters.from_linen(
    model, interceptors=interceptors, train_argument=train_argument
  )


@functools.cache
def _trained(name):
  """A model after 30 steps of quantization-aware training on digits."""
  model = models.make_model(name, num_classes=10, **OPTIONS[name])
  images, labels = _digits()
  rows = np.random.default_rng(0).permutation(1024).reshape(-1, 64)
  batches = [
    {'image': _preprocess(jnp.asarray(images[r])), 'label': labels[r]}
    for r in rows
  ]
  forward = _forward(model, quantize.quantize_activations(ACTIVATIONS))
  variables = adapters.init_linen(model, jax.random.key(0), batches[0])
  variables['quant_stats'] = quantize.init_quant_stats(
    forward, variables, batches[0], ACTIVATIONS
  )
  objective = objectives.weighted_sum({'ce': (1.0, objectives.hard_labels())})
  tx = optax.adam(1e-2)
  train_step = jax.jit(
    step.make_train_step(
      forward,
      objective,
      tx,
      params_fn=lambda p: quantize.fake_quant_params(p, WEIGHTS),
    )
  )
  state = step.init_state(forward, objective, tx, variables, batches[0])
  for i in range(30):
    state, _ = train_step(state, batches[i % len(batches)], jax.random.key(0))
  return model, {'params': state.params, **state.model_state}, batches[0]


@functools.cache
def _integer_functions(name):
  """`(simulated, integers)`: image uint8 -> logits, of a trained model."""
  model, variables, batch = _trained(name)
  norms = quantize.foldable_batch_norms(
    lambda i: _forward(model, i), variables, batch
  )
  converted = quantize.convert(
    quantize.fold_batch_norm(variables, norms), WEIGHTS, ACTIVATIONS
  )

  def function(simulate):
    forward = _forward(
      model,
      quantize.skip_folded_batch_norms,
      quantize.execute_integers(simulate=simulate),
    )
    return lambda image: (
      forward(converted, {'image': _preprocess(image)}).output
    )

  return function(True), function(False)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('onnx')


@pytest.fixture(scope='module')
def integer_file(folder):
  def export(name):
    path = folder / f'{name}.onnx'
    if not path.exists():
      onnx_lib.export_onnx(_integer_functions(name)[0], IMAGE, path)
    return path

  return export


def _assert_same_numbers(fn, image, path, tolerance=1e-5):
  """Exports fn for a batch of 1 and compares it on the whole batch."""
  spec = jax.ShapeDtypeStruct((1, *image.shape[1:]), image.dtype)
  onnx_lib.export_onnx(fn, spec, path)
  out = onnx_lib.load_onnx(path)(image)
  expected = np.asarray(jax.jit(fn)(image))
  assert out.dtype == expected.dtype and out.shape == expected.shape
  np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('name', OPTIONS)
def test_every_layer_runs_on_integers(integer_file, name):
  kernels = onnx_lib.integer_kernels(integer_file(name))
  assert {k: kernels[k] for k in LAYERS[name]} == LAYERS[name]
  for operator in ('Conv', 'FusedConv', 'Gemm', 'FusedGemm', 'MatMul', 'Add'):
    assert kernels[operator] == 0


@pytest.mark.parametrize('name', OPTIONS)
def test_integers_give_the_answers_of_jax(integer_file, name):
  images, labels = _digits()
  images, labels = images[1024:], labels[1024:]
  out = onnx_lib.load_onnx(integer_file(name))(images)
  expected = np.asarray(jax.jit(_integer_functions(name)[1])(images))
  # Chance is 0.1: agreement of an untrained model would mean little.
  assert (expected.argmax(-1) == labels).mean() > 0.6
  assert (out.argmax(-1) == expected.argmax(-1)).mean() >= 0.995
  assert np.abs(out - expected).max() <= 2 * np.ptp(expected) / 255


@pytest.mark.parametrize('name', OPTIONS)
def test_a_float_model_with_batch_norm_gives_the_numbers_of_jax(folder, name):
  model, variables, _ = _trained(name)
  variables = {k: v for k, v in variables.items() if k != 'quant_stats'}
  forward = _forward(model)
  images, _ = _digits()
  _assert_same_numbers(
    lambda x: forward(variables, {'image': _preprocess(x)}).output,
    images[:64],
    folder / f'float_{name}.onnx',
  )


def test_the_batch_is_symbolic(integer_file):
  path = integer_file('cnn')
  graph = onnx.load(path).graph
  for value in (graph.input[0], graph.output[0]):
    assert value.type.tensor_type.shape.dim[0].dim_param == 'batch'
  run = onnx_lib.load_onnx(path)
  images, _ = _digits()
  five = run(images[:5])
  assert five.shape == (5, 10)
  for i in range(5):
    np.testing.assert_array_equal(run(images[i : i + 1])[0], five[i])


def test_one_tensor_is_quantized_once(integer_file):
  nodes = onnx.load(integer_file('resnet')).graph.node
  quantized = [n.input[0] for n in nodes if n.op_type == 'QuantizeLinear']
  # A block's input feeds two or three quantized layers.
  assert len(quantized) == len(set(quantized)) == 14


def test_grids_that_differ_by_rounding_are_one(folder):
  zero = jnp.int8(-128)

  def quantizers(scales):
    def fn(x):
      codes = [stored.quantize_linear(x, s, zero) for s in scales]
      return sum(
        stored.dequantize_linear(c, s, zero)
        for c, s in zip(codes, scales, strict=True)
      )

    path = folder / 'grids.onnx'
    spec = jax.ShapeDtypeStruct((1, 4), jnp.float32)
    nodes = onnx.load(onnx_lib.export_onnx(fn, spec, path)).graph.node
    return [n.op_type for n in nodes].count('QuantizeLinear')

  scale = np.float32(0.1)
  assert quantizers([scale, np.nextafter(scale, np.float32(1))]) == 1
  assert quantizers([scale, scale * np.float32(1.01)]) == 2


def test_padding_belongs_to_the_convolutions(integer_file):
  nodes = onnx.load(integer_file('cnn')).graph.node
  assert 'Pad' not in [node.op_type for node in nodes]
  convolutions = [node for node in nodes if node.op_type == 'Conv']
  assert len(convolutions) == 3
  for node in convolutions:
    attributes = {a.name: list(a.ints) for a in node.attribute}
    assert attributes['pads'] == [1, 1, 1, 1]


def test_layouts_cost_one_transpose_of_the_image(folder):
  model = models.make_model('resnet', num_classes=10, depth=8, width=4)
  batch = {'image': jnp.zeros((1, 8, 8, 3))}
  shapes = jax.eval_shape(model.init, jax.random.key(0), batch['image'])
  variables = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes)
  path = onnx_lib.export_onnx(
    lambda x: _forward(model)(variables, {'image': _preprocess(x)}).output,
    jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.uint8),
    folder / 'transpose.onnx',
    reads='pixels',
  )
  nodes = onnx.load(path).graph.node
  transposes = [n for n in nodes if n.op_type == 'Transpose']
  # Of its bytes, before they become floats.
  assert [list(n.input) for n in transposes] == [['pixels']]


class Depthwise(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(8, (3, 3), padding=1)(x))
    x = nn.Conv(16, (3, 3), strides=2, feature_group_count=8)(x)
    x = nn.relu(x)
    x = nn.Conv(8, (3, 3), kernel_dilation=2, feature_group_count=4)(x)
    return nn.Dense(5)(GlobalAveragePool()(nn.relu6(x)))


def test_depthwise_and_grouped_convolutions_run_on_integers(folder, rng):
  model = Depthwise()
  image = np.asarray(jax.random.normal(rng, (64, 9, 9, 3)))
  batch = {'image': image}
  variables = dict(jax.jit(model.init)(rng, image))
  forward = functools.partial(_forward, model, train_argument=None)
  _assert_same_numbers(
    lambda x: model.apply(variables, x), image, folder / 'depthwise_float.onnx'
  )
  observed = forward(quantize.quantize_activations(ACTIVATIONS))
  stats = quantize.init_quant_stats(observed, variables, batch, ACTIVATIONS)
  variables['quant_stats'] = stats
  observe = jax.jit(lambda v: observed(v, batch, train=True).model_state)
  variables['quant_stats'] = observe(variables)['quant_stats']
  converted = quantize.convert(variables, WEIGHTS, ACTIVATIONS)

  def function(simulate):
    execute = quantize.execute_integers(simulate=simulate)
    return lambda x: forward(execute)(converted, {'image': x}).output

  path = folder / 'depthwise.onnx'
  spec = jax.ShapeDtypeStruct((1, 9, 9, 3), jnp.float32)
  onnx_lib.export_onnx(function(True), spec, path)
  kernels = onnx_lib.integer_kernels(path)
  assert (kernels['QLinearConv'], kernels['QGemm']) == (3, 1)
  assert kernels['Conv'] == kernels['FusedConv'] == 0
  out = onnx_lib.load_onnx(path)(image)
  expected = np.asarray(jax.jit(function(False))(image))
  assert np.abs(out - expected).max() <= 2 * np.ptp(expected) / 255


class Attention(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (2, 2), strides=2)(x)
    x = x.reshape(x.shape[0], -1, 8)
    token = self.param('token', nn.initializers.normal(1.0), (1, 1, 8))
    token = jnp.broadcast_to(token, (x.shape[0], 1, 8))
    x = jnp.concatenate([token, x], axis=1)
    x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
    x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
    return nn.log_softmax(nn.Dense(3)(x.mean(1)))


class SqueezeExcite(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.silu(nn.Conv(8, (3, 2), padding='VALID')(x))
    gate = nn.sigmoid(nn.Dense(8)(x.mean((1, 2))))
    x = nn.GroupNorm(2)(x * gate[:, None, None, :])
    # Rows of the kernel are in the order of NHWC.
    return nn.softmax(nn.Dense(3)(x.reshape(x.shape[0], -1)))


def _sums(x):
  total = x.sum((1, 2))
  return total / 49.0 + total / 48.0 + x.max((1, 2)) - x.min((1, 2))


def _halves(x):
  first, second, _ = jnp.split(x, (1, 2), axis=-1)
  return first - 2 * second


PLAIN = {
  'max_pool': lambda x: nn.max_pool(x, (2, 3), (2, 1), 'SAME'),
  'avg_pool': lambda x: nn.avg_pool(x, (3, 3), (2, 2), 'SAME'),
  'avg_pool_valid_pixels': lambda x: nn.avg_pool(
    x, (3, 3), (2, 2), 'SAME', count_include_pad=False
  ),
  'sums_that_are_no_means': _sums,
  'pad_with_a_value': lambda x: jnp.pad(
    x, ((0, 0), (1, 2), (0, 3), (0, 0)), constant_values=2.0
  ),
  'channels_first_flatten': lambda x: x.transpose(0, 3, 1, 2).reshape(
    x.shape[0], -1
  ),
  'split': lambda x: jnp.concatenate(jnp.split(x, (2, 5), 2)[::-1], 2),
  'split_channels': lambda x: _halves(nn.max_pool(x, (2, 2))),
  'slices': lambda x: jax.lax.slice_in_dim(x[:, 1:], 0, 5, 2, axis=2),
  'windows': lambda x: x[:, 1:, :-2, :2] * x[:, -1:, 2:, 1:],
  'joined_constants': lambda x: jnp.concatenate(
    [jnp.full((x.shape[0], 1), 2.0), jnp.full((x.shape[0], 2), 3.0)], 1
  ),
  'gelu': lambda x: nn.gelu(x, approximate=False) + nn.gelu(x),
  'choices': lambda x: jnp.where(x > 0.1, jnp.clip(x, -0.5, 0.5) ** 3, -x),
  'roots': lambda x: jax.lax.rsqrt(jnp.square(x) + 1) / jnp.sqrt(2 + x * x),
  'constant': lambda x: jnp.zeros((x.shape[0], 2)) + jnp.arange(2.0)[None],
  'softplus_free_functions': lambda x: jnp.log(1 + jnp.exp(-jnp.tanh(x))),
}


@pytest.mark.parametrize('name', PLAIN)
def test_primitives_give_the_numbers_of_jax(folder, rng, name):
  image = np.asarray(jax.random.normal(rng, (5, 7, 7, 3)))
  _assert_same_numbers(PLAIN[name], image, folder / f'{name}.onnx')


@pytest.mark.parametrize('model', [Attention(), SqueezeExcite()])
def test_other_models_give_the_numbers_of_jax(folder, rng, model):
  image = np.asarray(jax.random.normal(rng, (5, 6, 6, 3)))
  variables = jax.jit(model.init)(rng, image)
  _assert_same_numbers(
    lambda x: model.apply(variables, x), image, folder / 'model.onnx'
  )


def test_an_unknown_primitive_is_named(tmp_path):
  with pytest.raises(ValueError, match="primitive 'sort' has no ONNX form"):
    onnx_lib.export_onnx(lambda x: jnp.sort(x), IMAGE, tmp_path / 'm.onnx')
  assert not list(tmp_path.iterdir())


def test_other_functions_that_cannot_be_exported_say_why(tmp_path):
  path = tmp_path / 'm.onnx'
  with pytest.raises(ValueError, match='simulate=True'):
    onnx_lib.export_onnx(_integer_functions('mlp')[1], IMAGE, path)
  with pytest.raises(ValueError, match='2 arrays, not one'):
    onnx_lib.export_onnx(lambda x: (x, x), IMAGE, path)
  with pytest.raises(ValueError, match='random numbers'):
    onnx_lib.export_onnx(
      lambda x: x * jax.random.normal(jax.random.key(0), (1, 8, 8, 1)),
      IMAGE,
      path,
    )
  with pytest.raises(ValueError, match='int64 is int32 in JAX'):
    onnx_lib.export_onnx(jnp.sum, jax.ShapeDtypeStruct((1, 5), 'int64'), path)
  with pytest.raises(
    ValueError, match="bfloat16: make the model with dtype='f"
  ):
    onnx_lib.export_onnx(lambda x: x.astype(jnp.bfloat16) * 2, IMAGE, path)
  with pytest.raises(ValueError, match='gather .*has no ONNX form'):
    onnx_lib.export_onnx(lambda x: x[1:], IMAGE, path)
  with pytest.raises(ValueError, match='split with sizes that depend'):
    onnx_lib.export_onnx(lambda x: jnp.split(x, (1,))[0], IMAGE, path)
  with pytest.raises(ValueError, match="'dim_as_value'"):
    onnx_lib.export_onnx(lambda x: x.mean(0, jnp.float32), IMAGE, path)


def test_the_file_says_what_it_is(tmp_path):
  def export(names):
    return onnx_lib.export_onnx(
      lambda x: x.astype(jnp.float32).sum((1, 2)) @ jnp.ones((1, 2)),
      IMAGE,
      str(tmp_path / 'below' / 'm.onnx'),
      class_names=names,
      metadata={'accuracy': '0.98'},
    )

  model = onnx.load(export(('cat', 'dög')))
  onnx.checker.check_model(model, full_check=True)
  properties = {p.key: p.value for p in model.metadata_props}
  assert properties == {
    'class_names': '["cat", "d\\u00f6g"]',
    'accuracy': '0.98',
  }
  assert model.producer_name == 'kd_jax' and model.producer_version
  assert [opset.version for opset in model.opset_import] == [20]
  with pytest.raises(ValueError, match='3 class names'):
    export(('a', 'b', 'c'))


def test_a_failed_export_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'm.onnx'
  path.write_bytes(b'old')

  def fail(*args):
    raise OSError('disk full')

  monkeypatch.setattr(os, 'replace', fail)
  with pytest.raises(OSError, match='disk full'):
    onnx_lib.export_onnx(lambda x: x, IMAGE, path)
  assert path.read_bytes() == b'old' and len(list(tmp_path.iterdir())) == 1


def test_a_damaged_file_is_named(tmp_path):
  path = tmp_path / 'm.onnx'
  path.write_bytes(b'no model')
  with pytest.raises(ValueError, match=r'm\.onnx is damaged, or no ONNX file'):
    onnx_lib.load_onnx(path)


def test_weights_outside_the_file_are_refused(integer_file, tmp_path):
  path = tmp_path / 'm.onnx'
  onnx.save(
    onnx.load(integer_file('mlp')),
    path,
    save_as_external_data=True,
    location='weights.bin',
    size_threshold=0,
  )
  for function in (onnx_lib.load_onnx, onnx_lib.integer_kernels):
    with pytest.raises(ValueError, match='external data'):
      function(path)


def test_kernels_that_saturate_are_avoided(integer_file, monkeypatch):
  """As on x86 without VNNI; here the option must only change no number."""
  images, _ = _digits()
  path = integer_file('resnet')
  expected = onnx_lib.load_onnx(path)(images[:32])
  monkeypatch.setattr(onnx_lib, '_saturates', lambda: True)
  np.testing.assert_array_equal(onnx_lib.load_onnx(path)(images[:32]), expected)


@pytest.mark.parametrize('package', ['onnx', 'onnxruntime'])
def test_a_missing_package_is_named(integer_file, monkeypatch, package):
  path = integer_file('mlp')
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(ImportError, match=rf'{package} .*"kd_jax\[onnx\]"'):
    onnx_lib.load_onnx(path)
