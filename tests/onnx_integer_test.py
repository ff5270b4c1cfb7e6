"""Integer models as ONNX and StableHLO files: the numbers of JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from flax import linen as nn
from small_models import INPUTS, WEIGHTS, calibrated

from kd_jax import adapters, deploy, export, quantize
from kd_jax.export import onnx as onnx_lib
from kd_jax.models import layers
from kd_jax.quantize import QuantSpec

DYNAMIC = [('.*', QuantSpec(symmetric=False, narrow=False, dynamic=True))]
INT4 = QuantSpec(bits=4, axis=-1)
# Operators that onnxruntime runs on integers.
KERNELS = {
  'cnn': {'QLinearConv': 2, 'QLinearGlobalAveragePool': 1, 'QGemm': 1},
  'resnet': {'QLinearConv': 9, 'QLinearAdd': 3, 'QGemm': 1},
  'mobilenet': {'QLinearConv': 7, 'QLinearAdd': 1, 'QGemm': 1},
  # All dense layers, the patches among them; both products of attention.
  'vit': {'QGemm': 14, 'QLinearMatMul': 2, 'MatMulIntegerToFloat': 2},
}
FLOAT = ('Conv', 'FusedConv', 'Gemm', 'FusedGemm', 'MatMul')


@functools.cache
def _integers(name):
  model, variables, batch = calibrated(name)
  return model, quantize.convert(variables, WEIGHTS, INPUTS), batch['image']


def _apply(model, integers, **options):
  forward = deploy.integer_forward(model, **options)
  return lambda x: forward(integers, {'image': x}).output


def _exported(fn, x, path):
  spec = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
  onnx_lib.export_onnx(fn, spec, path)
  return onnx_lib.load_onnx(path)(x)


@pytest.mark.parametrize('name', KERNELS)
def test_onnxruntime_gives_our_integers_to_one_code(name, tmp_path):
  model, integers, x = _integers(name)
  path = tmp_path / 'model.onnx'
  got = _exported(_apply(model, integers, simulate=True), x, path)
  want = np.asarray(jax.jit(_apply(model, integers))(x))
  assert np.abs(got - want).max() <= np.ptp(want) / 255
  np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))
  kernels = onnx_lib.integer_kernels(path)
  assert {k: kernels.get(k) for k in KERNELS[name]} == KERNELS[name]
  assert not any(kernels[operator] for operator in FLOAT)


class _Words(nn.Module):
  """Every dense layer of transformers, on token indices."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Embed(11, 6, name='embed')(x)
    y = nn.DenseGeneral((2, 3), name='heads')(x)
    y = nn.DenseGeneral(6, axis=(-2, -1), name='out')(jnp.tanh(y))
    x = layers.Concatenate(name='concatenate')(x, y)
    x = nn.relu(nn.Einsum((12, 8), '...i,io->...o', name='einsum')(x))
    return nn.Dense(3, name='head')(x.mean(1))


@functools.cache
def _words():
  rng, model = np.random.default_rng(0), _Words()
  x = rng.integers(0, 11, (9, 5)).astype(np.int32)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x))
  variables = jax.tree.map(
    lambda s: rng.normal(size=s.shape).astype('f') / 2, dict(shapes)
  )
  return model, variables, x


def test_words_on_integers(tmp_path):
  model, variables, x = _words()
  observed = adapters.from_linen(
    model,
    interceptors=[quantize.quantize_activations(INPUTS)],
    train_argument=None,
  )
  state = observed(variables, {'image': x}, train=True).model_state
  rules = [('.*/(kernel|embedding)', quantize.INT8_WEIGHTS)]
  integers = quantize.convert({**variables, **state}, rules, INPUTS)
  path = tmp_path / 'words.onnx'
  got = _exported(_apply(model, integers, simulate=True), x, path)
  want = np.asarray(jax.jit(_apply(model, integers))(x))
  assert np.abs(got - want).max() <= np.ptp(want) / 255
  kernels = onnx_lib.integer_kernels(path)
  assert kernels['QGemm'] == 4
  assert not any(kernels[operator] for operator in FLOAT)


FORMS = {
  'weights': (quantize.INT8_WEIGHTS, []),
  'weights of 4 bits': (INT4, []),
  'groups': (QuantSpec(bits=4, axis=-1, group_size=2), []),
  'dynamic': (quantize.INT8_WEIGHTS, DYNAMIC),
  'dynamic, each example': (
    INT4,
    [('.*', QuantSpec(dynamic=True, axis=0))],
  ),
}


@functools.cache
def _other(network, name):
  """A model of which only the weights are stored as codes."""
  spec, dynamic = FORMS[name]
  if network == 'words':
    model, variables, x = _words()
    rules = [('embed/embedding', INT4), ('.*/kernel', spec)]
  else:
    model, variables, batch = calibrated('cnn')
    variables = {k: v for k, v in variables.items() if k != 'quant_stats'}
    # The image has three channels, which do not group.
    first = quantize.INT8_WEIGHTS if spec.group_size else spec
    x = batch['image']
    rules = [
      ('conv1/kernel', first),
      ('head/kernel', INT4),
      ('.*/kernel', spec),
    ]
  return model, quantize.convert(variables, rules, dynamic), x, dynamic


@pytest.mark.parametrize(
  'network, name',
  [*(('cnn', name) for name in FORMS), ('words', 'weights of 4 bits')],
)
def test_weight_only_and_dynamic_models_in_onnxruntime(network, name, tmp_path):
  model, integers, x, dynamic = _other(network, name)
  path = tmp_path / 'model.onnx'
  simulated = _apply(model, integers, simulate=True, dynamic=dynamic)
  got = _exported(simulated, x, path)
  want = jax.jit(_apply(model, integers, dynamic=dynamic))(x)
  np.testing.assert_allclose(got, want, atol=2e-4 * np.ptp(want))
  # The file holds codes, int8 where there were 4 bits, and no float kernels.
  stored = onnx.load(path).graph.initializer
  floats = [t for t in stored if t.data_type == onnx.TensorProto.FLOAT]
  assert max(np.prod(t.dims) for t in floats) < 50
  kinds = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
  assert max(np.prod(t.dims) for t in stored if t.data_type in kinds) >= 60


@pytest.mark.parametrize('name', ['weights of 4 bits', 'dynamic', 'vit'])
def test_stablehlo_carries_the_same_integers(name, tmp_path):
  if name in FORMS:
    model, integers, x, dynamic = _other('cnn', name)
  else:
    (model, integers, x), dynamic = _integers(name), ()
  forward = deploy.integer_forward(model, dynamic=dynamic)

  def fn(v, images):
    return forward(v, {'image': images}).output

  path = export.export_stablehlo(
    fn,
    integers,
    jax.ShapeDtypeStruct((1, *x.shape[1:]), jnp.float32),
    tmp_path / 'model',
    class_names=(),
    golden=x[:3],
  )
  loaded = export.load_stablehlo(path)
  for images in (x, x[:1]):
    want = np.asarray(jax.jit(fn)(integers, images))
    np.testing.assert_array_equal(loaded.predict(images), want)
