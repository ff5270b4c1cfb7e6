"""Models: sizes, documented taps, messages and dtypes."""

import json
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from kd_jax import adapters, models

DIRECTORY = pathlib.Path(
  os.environ.get('KD_JAX_ORACLES')
  or pathlib.Path(__file__).parent / 'data' / 'oracles'
)
SMALL = {
  'mlp': {'hidden': (8, 6)},
  'cnn': {'widths': (4, 6, 8)},
  'resnet': {'depth': 8, 'width': 4},
}
# What the classes' docstrings say.
TAPS = {
  'mlp': ['dense1', 'dense2', 'head'],
  'cnn': [f'{n}{i}' for i in (1, 2, 3) for n in ('conv', 'norm')]
  + ['pool', 'head'],
  'resnet': [f'stage{s}_block1' for s in (1, 2, 3)] + ['stem', 'pool', 'head'],
}


def _shapes(model, channels=1, size=8):
  x = jnp.zeros((2, size, size, channels))
  return jax.eval_shape(lambda: model.init(jax.random.key(0), x))


@pytest.mark.parametrize('depth', [8, 14, 20, 32, 44, 56, 110])
def test_resnet_has_the_published_number_of_parameters(depth):
  published = json.loads((DIRECTORY / 'cifar_models.json').read_text())
  model = models.CifarResNet(100, depth=depth, width=16)
  params = _shapes(model, channels=3, size=32)['params']
  count = sum(x.size for x in jax.tree.leaves(params))
  assert count == published[f'resnet{depth}']['params']


def test_every_model_is_tested():
  assert set(models.MODELS) == set(SMALL) == set(TAPS)


@pytest.mark.parametrize('name', models.MODELS)
def test_documented_taps_exist(name):
  model = models.make_model(name, num_classes=3, **SMALL[name])
  batch = {'image': jnp.zeros((2, 8, 8, 1))}
  forward = adapters.from_linen(model, taps=TAPS[name])
  features = jax.eval_shape(forward, _shapes(model), batch).features
  assert set(features) == set(TAPS[name])
  assert features['head'].shape == (2, 3)
  named = set(re.findall(r'`([a-z_0-9]+)`', type(model).__doc__))
  assert {t for t in named if t in TAPS[name]}, 'the docstring names no tap'


@pytest.mark.parametrize('name', models.MODELS)
def test_bfloat16_computes_in_it_and_keeps_float32_parameters(name):
  model = models.make_model(
    name, num_classes=3, dtype='bfloat16', **SMALL[name]
  )
  variables = _shapes(model)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  batch = {'image': jnp.zeros((2, 8, 8, 1))}
  out = jax.eval_shape(adapters.from_linen(model), variables, batch)
  assert out.output.dtype == jnp.bfloat16


@pytest.mark.parametrize('name', models.MODELS)
def test_dropout_acts_in_training_only(name):
  model = models.make_model(name, num_classes=3, dropout=0.9, **SMALL[name])
  batch, rng = {'image': jnp.zeros((2, 8, 8, 1))}, jax.random.key(0)
  forward = adapters.from_linen(model)

  def text(train):
    run = lambda v: forward(v, batch, rng, train=train).output
    return str(jax.make_jaxpr(run)(_shapes(model)))

  assert 'random_bits' in text(True)
  assert 'random_bits' not in text(False)


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


@pytest.mark.parametrize('depth', [2, 7, 9, 21])
def test_a_depth_that_is_not_6n_plus_2_is_named(depth):
  with pytest.raises(ValueError, match=f'depth={depth} is not 6n'):
    _shapes(models.CifarResNet(3, depth=depth))


def test_unknown_names_and_options_are_named():
  with pytest.raises(ValueError, match="model 'resnt'.*mean resnet"):
    models.make_model('resnt', num_classes=3)
  with pytest.raises(ValueError, match="'resnet'.*'dept'.*depth"):
    models.make_model('resnet', num_classes=3, dept=8)
