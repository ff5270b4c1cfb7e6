"""The report on pruning: zeros and targets, layer by layer."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from prune_trees import KERNELS, make_tree, train

from kd_jax import prune


def test_the_report_counts_zeros_layer_by_layer():
  params = {
    'a': {'kernel': jnp.array([[0.0, 1.0], [0.0, 2.0]]), 'bias': jnp.ones(2)},
    'b': {'kernel': jnp.zeros(3)},
  }
  rows = prune.sparsity_report(params, [('.*/kernel', True)])
  assert [(r.path, r.size, r.nonzero) for r in rows] == [
    ('a/kernel', 4, 2),
    ('b/kernel', 3, 0),
  ]
  assert [r.sparsity for r in rows] == [0.5, 1.0]
  assert len(prune.sparsity_report(params)) == 3
  with pytest.raises(ValueError, match='matches nothing'):
    prune.sparsity_report(params, [('c/.*', True)])


def test_targets_are_those_of_the_masks_and_zeros_those_of_the_weights():
  tx = prune.prune(optax.sgd(0.1), prune.constant(0.75), KERNELS, scope='layer')
  [(tree, state)] = train(tx, make_tree(), 1)
  rows = prune.sparsity_report(tree, KERNELS, masks=prune.masks_of(state))
  assert [row.path for row in rows] == [
    'blocks/kernel',
    'conv/kernel',
    'dense/kernel',
    'zero/kernel',
  ]
  for row in rows:
    assert row.target == row.sparsity == 0.75
  # A target that was missed shows.
  [row] = prune.sparsity_report(
    {'w': np.ones(10)}, masks={'w': np.arange(10) < 3}
  )
  assert (row.target, row.sparsity) == (pytest.approx(0.7), 0.0)


def test_the_total_adds_rows():
  rows = [
    prune.LayerSparsity('a', 9, 3, 2 / 3),
    prune.LayerSparsity('b', 3, 3),
  ]
  total = prune.total(rows)
  assert (total.size, total.nonzero, total.target) == (12, 6, 0.5)
  assert prune.total(rows[1:]).target is None
  assert prune.total([]).sparsity == 0.0


def test_an_empty_parameter_is_dense():
  [row] = prune.sparsity_report(
    {'w': np.zeros((0, 3))}, masks={'w': np.ones(0)}
  )
  assert (row.size, row.sparsity, row.target) == (0, 0.0, None)
