"""Parity: the numbers by hand, padding ignored, batches weighted by size."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import parity


def compare(found, expected, sizes=None, mask=None):
  """`parity.compare` of two arrays, cut into batches."""
  ends = np.cumsum(sizes or [len(expected)])

  def cut(x):
    return np.split(np.asarray(x), ends[:-1])

  batches = [
    {'f': f, 'r': r} for f, r in zip(cut(found), cut(expected), strict=True)
  ]
  if mask is not None:
    batches = [b | {'mask': m} for b, m in zip(batches, cut(mask), strict=True)]
  return parity.compare(lambda b: b['f'], lambda b: b['r'], batches)


def test_known_values():
  expected = [[3.0, 4.0], [1.0, 0.0], [0.0, -2.0], [1.0, 1.0]]
  found = [[3.0, 2.0], [1.0, 0.0], [0.0, -2.5], [1.0, 1.0]]
  result = compare(found, expected)
  assert result.agreement == 3 / 4
  assert result.max_abs_error == 2.0
  assert result.sqnr_db == pytest.approx(10 * math.log10(32 / 4.25))
  assert result.examples == 4
  assert [type(x) for x in result] == [float, float, float, int]


def test_equal_outputs_have_infinite_sqnr():
  result = compare([[0.0, 1.0]], [[0.0, 1.0]])
  assert result == (1.0, 0.0, math.inf, 1)


def test_error_where_the_reference_is_zero():
  assert compare([[0.0, 1.0]], [[0.0, 0.0]]).sqnr_db == -math.inf


def test_uneven_batches_count_by_their_examples():
  rng = np.random.default_rng(0)
  expected = rng.normal(size=(11, 3))
  found = expected + rng.normal(size=(11, 3))
  whole = compare(found, expected)
  cut = compare(found, expected, sizes=[7, 3, 1])
  np.testing.assert_allclose(cut, whole, rtol=1e-12)
  assert 0 < whole.agreement < 1
  assert cut.agreement == whole.agreement
  assert cut.max_abs_error == np.abs(found - expected).max()


def test_padding_is_ignored_whatever_its_outputs():
  expected = [[1.0, 0.0], [0.0, 1.0], [5.0, 0.0]]
  found = [[1.0, 0.5], [math.nan, math.inf], [0.0, 9.0]]
  result = compare(found, expected, sizes=[2, 1], mask=[1, 0, 0])
  assert result == (1.0, 0.5, 10 * math.log10(1 / 0.25), 1)


def test_tokens_that_only_pad_are_ignored():
  expected = np.eye(4)[None, [[0, 1, 2], [3, 0, 1]]].reshape(2, 3, 4)
  found = expected.copy()
  found[0, 2], found[1, 1] = 1e9, np.nan
  found[1, 2] = [0.0, 0.9, 0.0, 0.0]
  batch = {'attention_mask': np.array([[1, 1, 0], [1, 0, 1]])}
  result = parity.compare(lambda b: found, lambda b: expected, [batch])
  assert (result.agreement, result.examples) == (1.0, 2)
  assert result.max_abs_error == pytest.approx(0.1)
  assert result.sqnr_db == pytest.approx(10 * math.log10(4 / 0.01))
  batch = {'attention_mask': np.ones((2, 4))}
  with pytest.raises(ValueError, match='attention_mask'):
    parity.compare(lambda b: found, lambda b: expected, [batch])


def test_a_nan_disagrees_and_is_not_lost():
  # NaN in the first of two batches: max() of Python would drop it later.
  found = [[math.nan, 0.0], [1.0, 0.0]]
  result = compare(found, [[1.0, 0.0], [1.0, 0.5]], sizes=[1, 1])
  assert result.agreement == 0.5
  assert math.isnan(result.max_abs_error)
  both = compare([[math.nan, 0.0]], [[math.nan, 0.0]])
  assert both.agreement == 0.0


def test_equal_infinities_are_equal():
  result = compare([[-math.inf, 1.0]], [[-math.inf, 1.0]])
  assert (result.agreement, result.max_abs_error) == (1.0, 0.0)


def test_takes_jitted_functions_of_any_dtype():
  batch = {'image': jnp.eye(3, dtype=jnp.bfloat16)}
  fn = jax.jit(lambda b: b['image'] * 2)
  result = parity.compare(fn, lambda b: b['image'] * 3, [batch, batch])
  assert (result.agreement, result.max_abs_error) == (1.0, 1.0)
  assert result.examples == 6


def test_functions_may_take_one_entry_of_a_batch():
  batch = {'image': np.eye(3), 'mask': np.array([1, 1, 0])}
  result = parity.compare(lambda x: x, lambda x: 2 * x, [batch], reads='image')
  assert (result.max_abs_error, result.examples) == (1.0, 2)


@pytest.mark.parametrize(
  'found, expected, mask, message',
  [
    (np.zeros((2, 3)), np.zeros((2, 4)), None, r'fn has shape \(2, 3\)'),
    (np.zeros(2), np.zeros(2), None, r'must be \[B, ..., C\]'),
    (np.zeros((2, 3)), np.zeros((2, 3)), np.ones(1), r'mask has shape \(1,\)'),
    (np.zeros((2, 3)), np.zeros((2, 3)), np.zeros(2), 'no example'),
  ],
)
def test_what_cannot_be_compared_is_an_error(found, expected, mask, message):
  batch = {} if mask is None else {'mask': mask}
  with pytest.raises(ValueError, match=message):
    parity.compare(lambda b: found, lambda b: expected, [batch])


def test_require_passes_at_the_bound_and_raises_below():
  good = parity.Parity(0.995, 0.25, 30.0, 1000)
  parity.require(good, name='StableHLO')
  with pytest.raises(ValueError) as e:
    parity.require(good._replace(agreement=0.994), name='StableHLO')
  assert str(e.value) == (
    'StableHLO agrees with its reference on 99.40% of 1000 examples, but '
    '99.50% are required; largest error 0.25, SQNR 30.0 dB.'
  )
  with pytest.raises(ValueError, match='99.90% are required'):
    parity.require(good, name='ONNX', agreement=0.999)
