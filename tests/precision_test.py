"""Computation in bfloat16, and recomputation in the backward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax import adapters, models, objectives, prune, quantize, step

pytestmark = pytest.mark.once

# A small model of every class, and the side of its images.
SMALL = {
  'mlp': ({'hidden': (8, 6)}, 8),
  'cnn': ({'widths': (4, 6)}, 8),
  'resnet': ({'depth': 8, 'width': 4}, 8),
  'resnet50_cifar': ({'blocks': (1, 2), 'width': 4}, 8),
  'wrn': ({'depth': 10, 'widen_factor': 1}, 8),
  'vgg': ({'depth': 8, 'width': 4}, 16),
  'mobilenet_v2_cifar': ({'width': 0.125}, 16),
  'shufflenet_v1_cifar': ({'widths': (36, 48), 'blocks': (2, 2)}, 8),
  'shufflenet_v2_cifar': (
    {'widths': (8, 12), 'blocks': (2, 1), 'last_width': 12},
    8,
  ),
  'resnet_imagenet': ({'blocks': (1, 1), 'width': 4}, 16),
  'mobilenet_v1': ({'width': 0.125}, 32),
  'mobilenet_v2': ({'width': 0.25}, 32),
  'vit': (
    {
      'patch_size': 4,
      'width': 8,
      'depth': 2,
      'heads': 2,
      'distilled': True,
      'dropout': 0.2,
      'drop_path': 0.2,
    },
    8,
  ),
  'convnext': ({'blocks': (1, 1), 'widths': (4, 8), 'drop_path': 0.2}, 16),
}
INPUTS = [('.*', quantize.INT8_ACTIVATIONS)]


def test_every_class_is_here():
  made = {type(_model(name)) for name in SMALL}
  assert made == {
    type(models.make_model(name, num_classes=3)) for name in models.MODELS
  }


def _model(name, **options):
  return models.make_model(name, num_classes=3, **SMALL[name][0], **options)


def _batch(name, count=4):
  side = SMALL[name][1]
  image = np.random.default_rng(0).normal(size=(count, side, side, 3))
  return {'image': image.astype('f'), 'label': np.arange(count) % 3}


def _equations(jaxpr):
  def is_jaxpr(param):
    return hasattr(param, 'eqns') or hasattr(param, 'jaxpr')

  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
      if is_jaxpr(inner):
        yield from _equations(getattr(inner, 'jaxpr', inner))


def _products(jaxpr):
  """Input dtypes of all convolutions and matrix products."""
  names = ('dot_general', 'conv_general_dilated')
  return [
    tuple(str(x.aval.dtype) for x in equation.invars)
    for equation in _equations(jaxpr)
    if equation.primitive.name in names
  ]


def _dtypes(tree):
  return {str(x.dtype) for x in jax.tree.leaves(tree)}


@pytest.mark.parametrize('by', ['adapter', 'model'])
@pytest.mark.parametrize('name', SMALL)
def test_products_are_in_bfloat16_and_what_is_kept_in_float32(name, by):
  """Forward and backward; the model's own `dtype` does the same."""
  batch = _batch(name)
  model = _model(name, **({'dtype': 'bfloat16'} if by == 'model' else {}))
  dtype = 'bfloat16' if by == 'adapter' else None
  forward = adapters.from_linen(model, dtype=dtype)
  variables = jax.eval_shape(
    lambda: model.init(jax.random.key(0), batch['image'])
  )

  def loss(params, rest):
    variables = {'params': params, **rest}
    out = forward(variables, batch, jax.random.key(1), train=True)
    return out.output.astype('f').sum(), out

  gradients = jax.grad(loss, has_aux=True)
  params, rest = variables['params'], {**variables}
  rest.pop('params')
  traced = jax.make_jaxpr(gradients, return_shape=True)
  jaxpr, (grads, out) = traced(params, rest)
  found = _products(jaxpr.jaxpr)
  assert len(found) > 4 and set(found) == {('bfloat16', 'bfloat16')}
  assert out.output.dtype == jnp.bfloat16
  assert _dtypes((variables, grads, out.model_state)) == {'float32'}


@functools.cache
def _trained(dtype, remat=''):
  """A step with everything on: its start, result and metrics."""
  model, batch = _model('resnet'), _batch('resnet', 16)
  plain = adapters.from_linen(
    model,
    taps=['stage1_block1', 'pool'],
    interceptors=[quantize.quantize_activations(INPUTS)],
    dtype=dtype,
  )
  forward = adapters.from_linen(
    model,
    taps=['stage1_block1', 'pool'],
    interceptors=[quantize.quantize_activations(INPUTS)],
    dtype=dtype,
    remat=remat,
  )
  variables = adapters.init_linen(model, jax.random.key(0), batch)
  variables['quant_stats'] = quantize.init_quant_stats(
    plain, variables, batch, INPUTS
  )
  teacher_fn = adapters.from_linen(model, taps=['pool'])
  objective = objectives.weighted_sum(
    {
      'kd': (0.9, objectives.soft_targets()),
      'ce': (0.1, objectives.hard_labels()),
      'rkd': (0.1, objectives.relational(student='pool', teacher='pool')),
    }
  )
  schedule = prune.constant(0.5, begin=0)
  tx = prune.prune(optax.adamw(0.01), schedule, [('.*/kernel', True)])
  int8 = functools.partial(
    quantize.fake_quant_params, rules=[('.*/kernel', quantize.INT8_WEIGHTS)]
  )
  options = {'teacher_fn': teacher_fn}
  teacher = adapters.init_linen(model, jax.random.key(1), batch)
  state = step.init_state(
    plain, objective, tx, variables, batch, teacher=teacher, **options
  )
  pure = step.make_train_step(forward, objective, tx, params_fn=int8, **options)
  quick = {'xla_backend_optimization_level': 0}
  run = jax.jit(pure, compiler_options=quick)
  new, metrics = run(state, batch, jax.random.key(0))
  return state, new, metrics


def test_a_step_in_bfloat16_keeps_every_dtype_and_is_near_float32():
  _, want, numbers = _trained(None)
  start, state, metrics = _trained('bfloat16')
  before, after = (
    [x.dtype for x in jax.tree.leaves(s)] for s in (start, state)
  )
  assert before == after
  assert _dtypes((state.params, state.model_state, metrics)) == {'float32'}
  assert _dtypes(state.opt_state) <= {'float32', 'int32', 'bool'}
  for name in ('loss/total', 'loss/kd', 'loss/ce', 'grad_norm'):
    np.testing.assert_allclose(metrics[name], numbers[name], rtol=0.05)
    assert metrics[name] != numbers[name]
  stats = [s.model_state for s in (state, want)]
  for a, b in zip(*map(jax.tree.leaves, stats), strict=True):
    np.testing.assert_allclose(a, b, rtol=0.05, atol=0.02)


@pytest.mark.parametrize('remat', [models.BLOCKS, 'dots'])
def test_recomputation_changes_no_number(remat):
  """With taps, rounded weights and activations, observers and pruning."""
  _, want, numbers = _trained(None)
  _, state, metrics = _trained(None, remat)
  for got, other in ((metrics, numbers), (state, want)):
    for a, b in zip(*map(jax.tree.leaves, (got, other)), strict=True):
      if jnp.issubdtype(a.dtype, jnp.inexact):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['resnet', 'vit', 'vgg'])
def test_recomputation_keeps_less_and_draws_the_same_dropout(name):
  """What the forward pass hands to the backward pass, in bytes."""
  model, batch = _model(name), _batch(name)
  variables = adapters.init_linen(model, jax.random.key(0), batch)
  params = variables.pop('params')

  def output(remat, params):
    forward = adapters.from_linen(model, remat=remat)
    variables_ = {'params': params, **variables}
    return forward(variables_, batch, jax.random.key(1), train=True).output

  def kept(remat):
    fn = functools.partial(output, remat)
    residuals = jax.eval_shape(lambda p: jax.vjp(fn, p)[1], params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(residuals))

  assert kept(models.BLOCKS) < 0.7 * kept('')
  assert kept('dots') < 0.9 * kept('')
  want = jax.jit(functools.partial(output, ''))(params)
  for remat in (models.BLOCKS, 'dots'):
    got = jax.jit(functools.partial(output, remat))(params)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_pattern_of_no_submodule_is_named():
  forward = adapters.from_linen(_model('cnn'), remat='blok1')
  variables = adapters.init_linen(
    _model('cnn'), jax.random.key(0), _batch('cnn')
  )
  with pytest.raises(ValueError, match="remat='blok1' matches no submodule"):
    forward(variables, _batch('cnn'), train=True)
  forward(variables, _batch('cnn'))  # evaluation keeps nothing anyway
