"""Integer execution: conversion, products on codes, every kind of layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from kd_jax import adapters, deploy, models, quantize
from kd_jax.models import layers
from kd_jax.quantize import QuantSpec, execution
from kd_jax.models.vit import Context, Scores

WEIGHTS = [('.*/(kernel|embedding)', quantize.INT8_WEIGHTS)]
INPUTS = [('.*', quantize.INT8_ACTIVATIONS)]
INT4 = QuantSpec(bits=4, axis=-1)
pytestmark = pytest.mark.usefixtures('quick_compilation')
WAYS = ('direct', 'im2col', 'float32')


def _rng(seed=0):
  return np.random.default_rng(seed)


class _One(nn.Module):
  """One layer with a path."""

  layer: nn.Module

  def __call__(self, *args, **kwargs):
    return self.layer(*args, **kwargs)


class _Call(nn.Module):
  """One layer called in a way of its own."""

  layer: nn.Module
  call: object

  def __call__(self, x):
    return self.call(self.layer, x)


def _forward(model, *interceptors):
  return adapters.from_linen(
    model, interceptors=interceptors, train_argument=None
  )


def _walk(jaxpr):
  """Every equation, those of inner jaxprs included."""
  for eqn in jaxpr.eqns:
    yield eqn
    for value in eqn.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          yield from _walk(inner)


def _products(fn, *args):
  """The equations that multiply arrays."""
  names = ('dot_general', 'conv_general_dilated')
  jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
  return [e for e in _walk(jaxpr) if e.primitive.name in names]


# --- packing


@pytest.mark.parametrize('shape', [(1,), (6,), (7,), (3, 4), (2, 3, 5)])
def test_packed_codes_come_back_and_take_half_the_bytes(shape):
  codes = _rng().integers(-8, 8, shape).astype(np.int8)
  packed = jax.jit(quantize.pack_int4)(codes)
  assert packed.dtype == jnp.uint8
  assert packed.shape == (*shape[:-1], -(-shape[-1] // 2))
  unpack = jax.jit(quantize.unpack_int4, static_argnums=1)
  np.testing.assert_array_equal(unpack(packed, shape[-1]), codes)
  with pytest.raises(ValueError, match='do not fill'):
    quantize.unpack_int4(packed, shape[-1] + 2)


def test_the_layout_of_a_byte():
  """The lower index in the lower half, two's complement."""
  packed = quantize.pack_int4(jnp.array([[1, -2], [-8, 7]], jnp.int8))
  np.testing.assert_array_equal(packed, [[0xE1], [0x78]])


# --- one layer: integers against fake-quant


def _calibrated(model, variables, x, weights, inputs):
  """Converted variables with observed ranges, and fake-quant's output."""
  forward = _forward(model, quantize.quantize_activations(inputs))

  @jax.jit
  def observe(variables, x):
    return forward(variables, {'image': x}, train=True).model_state

  @jax.jit
  def run(variables, x):
    rounded = quantize.fake_quant_params(variables['params'], weights)
    return forward({**variables, 'params': rounded}, {'image': x}).output

  variables = {**variables, **observe(variables, x)}
  converted = quantize.convert(variables, weights, inputs)
  return converted, run(variables, x)


def _run(model, converted, x, *options):
  """The output of each way to execute, from one compiled program."""

  @jax.jit
  def run(converted, x):
    return [
      _forward(model, quantize.execute_integers(**o))(
        converted, {'image': x}
      ).output
      for o in options or ({},)
    ]

  outputs = run(converted, x)
  return outputs if options else outputs[0]


def _filled(model, x, seed=0):
  """Variables that are not those of a new model."""
  rng = _rng(seed)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x))
  return jax.tree.map(
    lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), dict(shapes)
  )


def _steps(converted):
  """The largest error of a bias that was rounded to its grid."""
  steps = [0.0]
  for layer in converted['int8'].values():
    if 'bias' in layer:
      scale = layer['input0']['scale'] * layer['kernel_scale']
      steps.append(float(scale.max()) / 2)
  return max(steps)


def _assert_equal(got, want, slack=0.0):
  want = np.asarray(want, np.float64)
  np.testing.assert_allclose(
    np.asarray(got, np.float64), want, atol=1e-5 * np.abs(want).max() + slack
  )


def _random_convolution(rng):
  rank = int(rng.integers(1, 3))
  groups = int(rng.choice([1, 1, 2, 4]))
  size = tuple(int(v) for v in rng.integers(1, 4, rank))
  explicit = tuple(tuple(int(v) for v in rng.integers(0, 3, 2)) for _ in size)
  paddings = ['SAME', 'SAME_LOWER', 'VALID', 'CIRCULAR', 'REFLECT', 1, explicit]
  paddings += ['CAUSAL'] if rank == 1 else []
  layer = nn.Conv(
    features=int(rng.choice([4, 8, 12])),
    kernel_size=size,
    strides=tuple(int(v) for v in rng.integers(1, 4, rank)),
    padding=paddings[rng.integers(len(paddings))],
    kernel_dilation=tuple(int(v) for v in rng.integers(1, 3, rank)),
    feature_group_count=groups,
    use_bias=bool(rng.integers(2)),
  )
  batch = ((), (3,), (2, 2))[rng.integers(3)]
  return layer, (*batch, *(int(v) for v in rng.integers(6, 9, rank)), 4)


@pytest.mark.parametrize('seed', range(16))
def test_random_convolutions_on_integers_are_those_of_fake_quant(seed):
  rng = _rng(seed)
  layer, shape = _random_convolution(rng)
  model = _One(layer)
  # Ranges on one side of 0 and on both, so that zero points are everywhere.
  x = (rng.normal(size=shape) + rng.choice([-2, 0, 3])).astype('f')
  weights = [('.*/kernel', QuantSpec(axis=rng.choice([None, -1])))]
  variables = _filled(model, x, seed)
  converted, fake = _calibrated(model, variables, x, weights, INPUTS)
  options = [{'convolution': way} for way in WAYS] + [{'simulate': True}]
  *ways, simulated = _run(model, converted, x, *options)
  _assert_equal(ways[0], fake, _steps(converted))
  _assert_equal(simulated, fake, _steps(converted))
  for way in ways[1:]:
    np.testing.assert_array_equal(way, ways[0])


DENSE = {
  'dense': (nn.Dense(6), (5, 8)),
  'dense without batch': (nn.Dense(6), (8,)),
  'dense of tokens': (nn.Dense(6, use_bias=False), (2, 3, 8)),
  'heads': (nn.DenseGeneral((2, 3)), (2, 5, 8)),
  'heads without bias': (nn.DenseGeneral((2, 3), use_bias=False), (2, 5, 8)),
  'from heads': (nn.DenseGeneral(6, axis=(-2, -1)), (2, 5, 2, 8)),
  'other axes': (nn.DenseGeneral((3, 2), axis=(1, -1)), (2, 3, 4, 5)),
  'batch axes': (nn.DenseGeneral(3, batch_dims=(0,)), (4, 2, 5)),
  'batch axes, square': (nn.DenseGeneral(3, batch_dims=(0,)), (5, 2, 5)),
  'einsum': (nn.Einsum((4, 6), '...i,io->...o'), (2, 3, 4)),
  'einsum of experts': (nn.Einsum((3, 4, 5), 'ebi,eio->ebo'), (3, 2, 4)),
  'einsum, bias turned': (nn.Einsum((4, 3, 3), 'bi,ijk->bkj'), (2, 4)),
  'einsum, output turned': (nn.Einsum((4, 5), 'bi,io->ob'), (3, 4)),
}


@pytest.mark.parametrize('name', DENSE)
@pytest.mark.parametrize('axis', [-1, None])
def test_dense_layers_on_integers_are_those_of_fake_quant(name, axis):
  layer, shape = DENSE[name]
  model = _One(layer)
  x = (_rng().normal(size=shape) + 1).astype('f')
  weights = [('.*/kernel', QuantSpec(axis=axis))]
  variables = _filled(model, x)
  converted, fake = _calibrated(model, variables, x, weights, INPUTS)
  options = ({}, {'simulate': True})
  for got in _run(model, converted, x, *options):
    _assert_equal(got, fake, _steps(converted))
  forward = _forward(model, quantize.execute_integers())
  (product,) = _products(lambda x: forward(converted, {'image': x}).output, x)
  assert {v.aval.dtype for v in product.invars} == {jnp.dtype('int8')}
  assert product.outvars[0].aval.dtype == jnp.int32
