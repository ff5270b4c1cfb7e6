"""Whole models on integers: against fake-quant, and layer by layer."""

import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from small_models import INPUTS, MODELS, WEIGHTS, calibrated

from kd_jax import adapters, deploy, parity, quantize
from kd_jax.quantize import QuantSpec

DYNAMIC = [('.*', QuantSpec(symmetric=False, narrow=False, dynamic=True))]
pytestmark = pytest.mark.once


@functools.cache
def _report(name):
  model, variables, batch = calibrated(name)
  integers = quantize.convert(variables, WEIGHTS, INPUTS)
  # Biases on their grid: the one rounding that training has not.
  rounded = quantize.dequantize_params(integers)['params']
  report = parity.check_parity(
    model,
    {**variables, 'params': rounded},
    integers,
    batch,
    weight_rules=WEIGHTS,
    activation_rules=INPUTS,
  )
  return integers, report


@pytest.mark.parametrize('name', MODELS)
def test_integers_compute_what_fake_quant_computed(name):
  """A code on the edge may flip; then the rest is off by a part of a step."""
  integers, report = _report(name)
  assert report.exact.agreement == 1.0 and report.exact.sqnr_db > 45
  errors = [row.sqnr_db for row in report.layers]
  assert np.median(errors) > 100 and max(errors) > 120
  # Nothing else explains the error against float.
  assert abs(report.integer.sqnr_db - report.fake.sqnr_db) < 0.5
  assert report.fake.sqnr_db < 45
  assert 'quant_stats' not in integers


@pytest.mark.parametrize('name', MODELS)
def test_every_layer_runs_on_integers(name):
  """All products; no float kernel is left."""
  integers, report = _report(name)
  products = [row for row in report.layers if row.dead_weights is not None]
  kernels = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(integers['int8'])
    if path[-1].key == 'kernel'
  ]
  assert len(products) == len(kernels) > 0
  assert {row.execution for row in products} == {'static'}
  attention = [row for row in report.layers if 'attention/' in row.layer]
  assert {row.execution for row in attention} <= {'static'}
  assert {k.dtype for k in kernels} == {jnp.dtype('int8')}
  left = jax.tree_util.tree_leaves_with_path(integers['params'])
  assert not [path for path, _ in left if path[-1].key == 'kernel']
  others = {row.layer.rpartition('/')[2] for row in report.layers}
  others -= {row.layer.rpartition('/')[2] for row in products}
  expected = {
    'vit': {'scores', 'context', 'add1', 'add2'},
    'shufflenet': {'concatenate', 'pool'},
    'resnet': {'add', 'pool'},
  }
  assert others == expected.get(name, others)


@pytest.mark.parametrize('name', ['cnn', 'vit'])
def test_the_ways_of_a_model(name):
  model, variables, batch = calibrated(name)
  integers, report = _report(name)
  forwards = [
    deploy.integer_forward(model, convolution='direct'),
    deploy.integer_forward(model, convolution='im2col'),
    deploy.integer_forward(model, simulate=True),
  ]
  direct, im2col, simulated = jax.jit(
    lambda v, b: [f(v, b).output for f in forwards]
  )(integers, batch)
  np.testing.assert_array_equal(im2col, direct)
  spread = np.ptp(direct)
  assert np.median(np.abs(simulated - direct)) < 1e-4 * spread
  assert np.abs(simulated - direct).max() < 0.02 * spread


def test_four_bits_and_dynamic_ranges():
  model, variables, batch = calibrated('cnn')
  rules = [
    ('head/kernel', QuantSpec(axis=-1)),
    ('.*/kernel', QuantSpec(bits=4, axis=-1)),
  ]
  plain = {k: v for k, v in variables.items() if k != 'quant_stats'}
  integers = quantize.convert(plain, rules, DYNAMIC)
  report = parity.check_parity(
    model,
    plain,
    integers,
    batch,
    weight_rules=rules,
    activation_rules=DYNAMIC,
  )
  assert report.exact.sqnr_db > 90 and report.fake.sqnr_db < 40
  assert {row.execution for row in report.layers} == {'dynamic'}
  by_name = {row.layer: row for row in report.layers}
  assert by_name['conv2'].dead_weights <= 15 < by_name['head'].dead_weights
  assert by_name['conv2'].saturation is None
  assert by_name['conv2'].dead_inputs > 0
  weights = parity.check_parity(
    model, plain, integers, batch, weight_rules=rules
  )
  assert {row.execution for row in weights.layers} == {'weights'}
  assert weights.exact.sqnr_db > 90


class _Two(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    return nn.Dense(2, use_bias=False, name='second')(
      nn.relu(nn.Dense(2, use_bias=False, name='first')(x))
    )


def test_the_numbers_of_a_layer_by_hand():
  eye = np.eye(2, dtype='f')
  ranges = {'low': 0.0, 'high': 2.55, 'count': 1.0}
  variables = {
    'params': {'first': {'kernel': eye}, 'second': {'kernel': 127 * eye}},
    'quant_stats': {
      name: {'input0': jax.tree.map(jnp.float32, ranges)}
      for name in ('first', 'second')
    },
  }
  # Steps of 0.01 from 0: one value is halfway, one is beyond the end.
  x = np.array([[0.0, 0.004], [2.55, 5.1]], 'f')
  options = {'weight_rules': WEIGHTS, 'activation_rules': INPUTS}
  integers = quantize.convert(variables, WEIGHTS, INPUTS)
  report = parity.check_parity(
    _Two(), variables, integers, {'image': x}, **options
  )
  first, second = report.layers
  assert (first.layer, first.execution) == ('first', 'static')
  assert first.saturation == 1 / 4 and second.saturation == 0
  # Codes 0 and 255 of 256; weights 0 and 127 of 255.
  assert (first.dead_inputs, first.dead_weights) == (254, 253)
  error = np.square([0.004, 5.1 - 2.55]).sum()
  decibels = 10 * np.log10(np.square(x).sum() / error)
  assert first.fake_sqnr_db == pytest.approx(decibels, rel=1e-4)
  assert first.integer_sqnr_db == pytest.approx(decibels, rel=1e-4)
  assert report.fake.max_abs_error == pytest.approx(127 * 2.55, rel=1e-5)
  assert second.max_error < 1e-3 and second.sqnr_db > 100
  # A tie each after rounding, which the first class wins.
  assert report.fake.agreement == 0.0 and report.exact.agreement == 1.0


class _Attending(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.MultiHeadDotProductAttention(2, qkv_features=8, name='attention')(x)
    return nn.Dense(3, name='head')(x.mean(1))


def test_the_products_inside_of_linens_attention_are_layers():
  x = np.random.default_rng(0).normal(size=(4, 5, 6)).astype('f')
  model, batch = _Attending(), {'image': x}
  variables = dict(model.init(jax.random.key(0), x))
  observed = adapters.from_linen(
    model, interceptors=[quantize.quantize_activations(INPUTS)]
  )
  variables |= observed(
    variables, batch, jax.random.key(0), train=True
  ).model_state
  integers = quantize.convert(variables, WEIGHTS, INPUTS)
  report = parity.check_parity(
    model,
    variables,
    integers,
    batch,
    weight_rules=WEIGHTS,
    activation_rules=INPUTS,
  )
  rows = {row.layer: row for row in report.layers}
  projections = {f'attention/{n}' for n in ('query', 'key', 'value', 'out')}
  inner = {'attention/scores', 'attention/context'}
  assert set(rows) == {'head', *projections, *inner}
  assert {row.execution for row in rows.values()} == {'static'}
  assert min(row.sqnr_db for row in rows.values()) > 60
  for layer in inner:
    assert rows[layer].dead_weights is None and rows[layer].fake_sqnr_db > 20
    assert rows[layer].saturation == 0 and rows[layer].dead_inputs > 0


def test_a_wrong_integer_is_seen_in_its_layer():
  model, variables, batch = calibrated('cnn')
  integers, _ = _report('cnn')
  kernel = integers['int8']['conv2']['kernel']
  broken = jax.tree.map(lambda v: v, integers)
  broken['int8']['conv2']['kernel'] = kernel.at[..., 0].add(9)
  report = parity.check_parity(
    model,
    variables,
    broken,
    batch,
    weight_rules=WEIGHTS,
    activation_rules=INPUTS,
  )
  errors = {row.layer: row.sqnr_db for row in report.layers}
  assert errors['conv2'] < 30 < 60 < errors['conv1']


def test_a_report_is_rows_and_a_table():
  _, report = _report('vit')
  rows = report.rows()
  assert json.loads(json.dumps(rows)) == rows
  text = io.StringIO()
  parity.print_parity(report, text)
  lines = text.getvalue().splitlines()
  assert len(lines) == 1 + len(rows) + 3
  assert lines[0].split()[0] == 'layer'
  for line, row in zip(lines[1 : 1 + len(rows)], rows, strict=True):
    assert line.startswith(f'{row["layer"]} ')
  assert len({len(line) for line in lines[: 1 + len(rows)]}) == 1
