"""The report's own measurements."""

import json
import os
import pathlib
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from kd_jax import adapters, models
from kd_jax.report import measure
from kd_jax.storage import weights

ORACLES = pathlib.Path(
  os.environ.get(
    'KD_JAX_ORACLES', pathlib.Path(__file__).parent / 'data' / 'oracles'
  )
)


@pytest.mark.parametrize('depth', [8, 20, 56])
def test_multiply_accumulates_of_published_networks(depth):
  published = json.loads((ORACLES / 'cifar_models.json').read_text())
  model = models.CifarResNet(num_classes=100, depth=depth)
  forward = adapters.from_linen(model)
  batch = {'image': np.zeros((1, 32, 32, 3), np.float32)}
  variables = jax.eval_shape(model.init, jax.random.key(0), batch['image'])
  found = measure.multiply_accumulates(
    lambda v: forward(v, batch).output, variables
  )
  assert found == published[f'resnet{depth}']['macs_32x32']


def test_grouped_convolutions_count_their_group_only():
  def fn(x, w):
    return jax.lax.conv_general_dilated(
      x,
      w,
      (1, 1),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=4,
    )

  x, w = np.zeros((2, 5, 5, 8), np.float32), np.zeros((3, 3, 2, 12), np.float32)
  assert measure.multiply_accumulates(fn, x, w) == 2 * 5 * 5 * 12 * 9 * 2


def test_latencies_tell_a_slow_function_from_a_fast_one():
  found = measure.latencies(
    {'slow': lambda x: time.sleep(0.02), 'fast': lambda x: None},
    np.zeros(1),
    runs=5,
  )
  assert found['slow']['median_ms'] > 15 > found['fast']['median_ms']
  assert found['slow']['runs'] == 5
  assert found['slow']['low_ms'] <= found['slow']['high_ms']


def test_latencies_draw_the_order_of_every_round():
  called = []
  applies = {n: lambda x, n=n: called.append(n) for n in 'abc'}
  measure.latencies(applies, np.zeros(1), runs=20)
  rounds = [tuple(called[i : i + 3]) for i in range(0, len(called), 3)]
  assert all(sorted(r) == ['a', 'b', 'c'] for r in rounds)
  # Each goes first, in the middle and last.
  assert all(len(set(place)) == 3 for place in zip(*rounds, strict=True))


def test_weights_round_trip_and_refuse_foreign_files(tmp_path):
  path = tmp_path / 'weights.safetensors'
  variables = {
    'params': {'dense': {'kernel': jax.numpy.ones((2, 3), 'bfloat16')}},
    'int8': {
      'conv': {
        'kernel': np.array([0, 3], np.int8),
        'kernel_scale': np.ones(1, np.float32),
      },
      'packed': {
        # Two codes of 4 bits in the first byte, one in the other.
        'kernel': np.array([[0x0F, 0x07]], np.uint8),
        'kernel_scale': np.ones((1, 3), np.float32),
      },
    },
  }
  weights.save_weights(path, variables)
  loaded = weights.load_weights(path)
  assert loaded['params']['dense']['kernel'].dtype == 'bfloat16'
  np.testing.assert_array_equal(loaded['int8']['conv']['kernel'], [0, 3])
  assert weights.count(loaded) == (11, 9)

  path.write_bytes(path.read_bytes()[:20])
  with pytest.raises(ValueError, match='cannot be read as weights'):
    weights.load_weights(path)
  save_file({'x': np.zeros(1)}, path)
  with pytest.raises(ValueError, match="not 'kd_jax.variables.2'"):
    weights.load_weights(path)
