"""Sparsity schedules against their papers, step by step."""

import jax
import numpy as np
import pytest

from kd_jax import prune


def _cubic(step, *, final, begin, end, every, initial):
  if step < begin:
    return 0.0
  held = end if step >= end else begin + (step - begin) // every * every
  left = 1 - (held - begin) / (end - begin)
  return final + (initial - final) * left**3


@pytest.mark.parametrize(
  'options',
  [
    {'final': 0.8, 'begin': 2, 'end': 12, 'every': 1, 'initial': 0.0},
    {'final': 0.9, 'begin': 0, 'end': 10, 'every': 3, 'initial': 0.2},
    {'final': 0.5, 'begin': 5, 'end': 6, 'every': 10, 'initial': 0.1},
  ],
)
def test_cubic_schedule_is_the_papers(options):
  options = dict(options)
  final = options.pop('final')
  schedule = jax.jit(prune.cubic(final, **options))
  for step in range(20):
    want = _cubic(step, final=final, **options)
    assert float(schedule(step)) == pytest.approx(want, abs=1e-6), step
  # Exactly the final one at the end, so that it is reached at all.
  assert schedule(options['end']) == np.float32(final)


def test_bad_schedules_are_named():
  for sparsity in (-0.1, 1.0, 2.0):
    with pytest.raises(ValueError, match=r'in \[0, 1\)'):
      prune.cubic(sparsity, begin=0, end=1)
    with pytest.raises(ValueError, match=r'in \[0, 1\)'):
      prune.constant(sparsity)
  for options in ({'begin': 3, 'end': 3}, {'begin': -1, 'end': 3}):
    with pytest.raises(ValueError, match='begin < end'):
      prune.cubic(0.5, **options)
  with pytest.raises(ValueError, match='every >= 1'):
    prune.cubic(0.5, begin=0, end=3, every=0)


def test_a_linear_schedule_rises_by_the_same_share():
  schedule = jax.jit(prune.linear(0.9, begin=4, end=24, every=5, initial=0.1))
  got = [float(schedule(step)) for step in range(30)]
  want = [0.0] * 4
  for level in (0.1, 0.3, 0.5, 0.7):
    want += [level] * 5
  want += [0.9] * 6
  np.testing.assert_allclose(got, want, atol=1e-6)
  assert schedule(24) == np.float32(0.9)


def test_steps_prune_a_share_of_what_is_left():
  schedule = jax.jit(prune.steps(0.2, every=3, times=4, begin=2))
  left, want = 1.0, []
  for step in range(20):
    if step in (2, 5, 8, 11):
      left *= 0.8
    want.append(1 - left)
  np.testing.assert_allclose([schedule(s) for s in range(20)], want, atol=1e-7)


def test_one_shot_pruning_is_a_jump():
  schedule = jax.jit(prune.constant(0.5, begin=3))
  assert [float(schedule(s)) for s in range(5)] == [0, 0, 0, 0.5, 0.5]


def test_bad_linear_schedules_and_steps_are_named():
  with pytest.raises(ValueError, match='begin < end'):
    prune.linear(0.5, begin=3, end=3)
  with pytest.raises(ValueError, match=r'in \[0, 1\)'):
    prune.steps(1.0, every=1, times=1)
  for options in (
    {'every': 0, 'times': 1},
    {'every': 1, 'times': 0},
    {'every': 1, 'times': 1, 'begin': -1},
  ):
    with pytest.raises(ValueError, match='steps: needs every >= 1'):
      prune.steps(0.5, **options)
