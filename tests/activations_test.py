"""Fake-quantized activations: layers, observers in quant_stats, rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized_models import INPUTS, trained, watching

from kd_jax import adapters, models, quantize


def test_quant_stats_are_created_from_shapes_alone():
  model, variables, batch = trained('cnn')
  forward = watching(model)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (variables, batch)
  )
  stats = quantize.init_quant_stats(forward, *shapes, INPUTS)
  assert set(stats) == {'conv1', 'conv2', 'pool', 'head'}
  assert all(leaf == 0 for leaf in jax.tree.leaves(stats))
  # The first training step has the same structure: no retrace after it.
  out = jax.eval_shape(
    lambda v: forward(v, batch, train=True),
    {**variables, 'quant_stats': stats},
  )
  assert jax.tree.structure(
    out.model_state['quant_stats']
  ) == jax.tree.structure(stats)


def test_quant_stats_update_in_training_only():
  model, variables, batch = trained('cnn')
  forward = watching(model)
  variables['quant_stats'] = quantize.init_quant_stats(
    forward, variables, batch
  )
  run = jax.jit(forward, static_argnames='train')
  plain = jax.jit(adapters.from_linen(model))
  # Before any batch nothing is rounded.
  before = run(variables, batch, train=False)
  np.testing.assert_allclose(
    before.output, plain(variables, batch).output, rtol=1e-5, atol=1e-6
  )
  after_one = run(variables, batch, jax.random.key(0), train=True)
  stats = after_one.model_state['quant_stats']
  seen = stats['conv1']['input0']
  np.testing.assert_allclose(seen['low'], batch['image'].min())
  np.testing.assert_allclose(seen['high'], batch['image'].max())
  after = run({**variables, 'quant_stats': stats}, batch, train=False)
  jax.tree.map(
    np.testing.assert_array_equal, after.model_state['quant_stats'], stats
  )
  assert jnp.abs(after.output - before.output).max() > 1e-5


def test_activation_rules_choose_layers_and_name_mistakes():
  model, variables, batch = trained('cnn')
  spec = quantize.INT8_ACTIVATIONS
  rules = [('conv1', None), ('conv.*|head', spec)]
  stats = quantize.init_quant_stats(
    watching(model, rules), variables, batch, rules
  )
  assert set(stats) == {'conv2', 'head'}
  rules = [('conv.*', spec), ('haed', spec)]
  with pytest.raises(
    ValueError, match="activation rule 'haed' matches nothing"
  ):
    quantize.init_quant_stats(watching(model, rules), variables, batch, rules)
  with pytest.raises(ValueError, match='No layer of the model is quantized'):
    quantize.init_quant_stats(
      watching(model, [('norm1', spec)]), variables, batch
    )


def test_both_inputs_of_a_residual_sum_are_observed():
  model = models.CifarResNet(3, depth=8, width=2)
  batch = {'image': jnp.zeros((2, 8, 8, 1))}
  variables = jax.eval_shape(
    lambda: adapters.init_linen(model, jax.random.key(0), batch)
  )
  stats = quantize.init_quant_stats(watching(model), variables, batch, INPUTS)
  assert set(stats['stage1_block1']['add']) == {'input0', 'input1'}
  assert set(stats['pool']) == {'input0'}
