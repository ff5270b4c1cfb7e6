"""What a shrunk model goes on to do: train, fold, run on integers, export."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from shrunk_models import unit_masks

from kd_jax import adapters, deploy, models, objectives, prune, step
from kd_jax.export import export_stablehlo, load_stablehlo, onnx
from kd_jax.models import layers
from kd_jax.storage import weights

pytestmark = pytest.mark.once


class Net(nn.Module):
  """A residual stream, a depthwise convolution and BatchNorm."""

  @nn.compact
  def __call__(self, x, train=False):
    conv_norm = functools.partial(
      layers.conv_norm, train=train, dtype='float32'
    )
    x = nn.relu(conv_norm(x, 'stem', 'stem_norm', 8, 3))
    y = nn.relu(conv_norm(x, 'conv1', 'norm1', 12, 1))
    y = conv_norm(y, 'conv2', 'norm2', 12, 3, groups=12)
    y = conv_norm(nn.relu(y), 'conv3', 'norm3', 8, 1)
    x = nn.relu(layers.Add(name='add')(x, y))
    x = layers.GlobalAveragePool(name='pool')(x)
    return nn.Dense(5, name='head')(x)


def _batch():
  rng = np.random.default_rng(0)
  return {
    'image': rng.normal(size=(16, 6, 6, 1)).astype('f'),
    'label': (np.arange(16) % 5).astype('i4'),
  }


@functools.cache
def _setup():
  """Model, forward, variables with trained-looking statistics, and a plan."""
  model, batch = Net(), _batch()
  forward = adapters.from_linen(model)
  variables = adapters.init_linen(model, jax.random.key(0), batch)
  rng = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda x: x + 0.2 * np.abs(rng.normal(size=x.shape)).astype('f'), variables
  )
  return model, forward, variables, prune.find_groups(forward, variables, batch)


def _kept(plan, variables):
  names = {
    path.removeprefix('params/')
    for path in plan.shapes
    if path.startswith('params/')
  }
  params = jax.tree_util.tree_leaves_with_path(variables['params'])
  scores = {
    jax.tree_util.keystr(path, simple=True, separator='/'): jnp.abs(w)
    for path, w in params
  }
  assert set(scores) == names
  return prune.choose_units(plan, scores, 0.5)


def _masked(plan, kept, variables):
  masks = unit_masks(plan, kept)
  return {
    **variables,
    'params': prune.apply_masks(variables['params'], masks),
  }


def test_a_step_of_the_shrunk_state_is_the_masked_step():
  _, forward, variables, plan = _setup()
  kept, batch = _kept(plan, variables), _batch()
  objective = objectives.weighted_sum({'ce': (1.0, objectives.hard_labels())})
  tx = prune.prune(
    optax.adamw(1e-2, weight_decay=0.1), prune.constant(0.5), [('.*', True)]
  )
  variables = _masked(plan, kept, variables)
  state = step.init_state(forward, objective, tx, variables, batch)
  # As after pruning: masks of whole units, made for this sparsity.
  masks = state.opt_state.masks | unit_masks(plan, kept)
  masks = {k: jnp.asarray(v) for k, v in masks.items()}
  state = state.replace(
    opt_state=state.opt_state._replace(masks=masks, sparsity=jnp.float32(0.5)),
    teacher=variables,
  )
  assert prune.kept_from_masks(plan, masks).keys() == kept.keys()

  def run(forward, state):
    train_step = jax.jit(step.make_train_step(forward, objective, tx))
    losses = []
    for _ in range(2):
      state, metrics = train_step(state, batch, jax.random.key(0))
      losses.append(metrics['loss/total'])
    return state, losses

  small = prune.shrink(plan, state, kept)
  # The teacher has the same paths, and is another network.
  assert small.teacher is state.teacher
  whole, whole_losses = run(forward, state)
  small, small_losses = run(prune.shrunk_forward(forward, plan, kept), small)
  np.testing.assert_allclose(small_losses, whole_losses, rtol=1e-4)
  cut = prune.shrink(plan, whole, kept)
  compared = ('params', 'model_state', 'opt_state')
  for name in compared:
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-5),
      getattr(small, name),
      getattr(cut, name),
    )
  moments = optax.tree.get(small.opt_state, 'mu')['conv2']['kernel']
  assert moments.shape[-1] == len(kept['conv1']) < 12


def _interceptors(plan, kept):
  return (prune.resized(plan.overrides(kept)),)


def test_the_shrunk_model_folds_and_runs_on_integers_as_the_masked_one():
  model, forward, variables, plan = _setup()
  kept, batch = _kept(plan, variables), _batch()
  small = prune.shrink(plan, variables, kept)
  masked = _masked(plan, kept, variables)
  given = _interceptors(plan, kept)
  folded = deploy.fold(model, small, batch, interceptors=given)
  assert 'norm1' not in folded['params'] and 'conv1' in folded['params']
  integers = deploy.post_training_quantize(
    model, small, [batch], interceptors=given
  )
  whole = deploy.post_training_quantize(model, masked, [batch])
  assert integers['int8']['conv2']['kernel'].shape == (
    *(3, 3, 1),
    len(kept['conv1']),
  )
  run = jax.jit(deploy.integer_forward(model, interceptors=given))
  found = run(integers, batch).output
  want = jax.jit(deploy.integer_forward(model))(whole, batch).output
  np.testing.assert_allclose(found, want, atol=1e-5)
  floats = jax.jit(prune.shrunk_forward(forward, plan, kept))(
    small, batch
  ).output
  assert np.abs(found - floats).max() < 0.05 * np.abs(floats).max()


def test_the_shrunk_model_is_saved_loaded_and_exported(tmp_path):
  model, forward, variables, plan = _setup()
  kept, batch = _kept(plan, variables), _batch()
  small = prune.shrink(plan, variables, kept)
  want = jax.jit(prune.shrunk_forward(forward, plan, kept))(small, batch).output
  weights.save_weights(tmp_path / 'small.safetensors', small)
  (tmp_path / 'overrides.json').write_text(json.dumps(plan.overrides(kept)))

  loaded = weights.load_weights(tmp_path / 'small.safetensors')
  overrides = json.loads((tmp_path / 'overrides.json').read_text())
  again = adapters.from_linen(model, interceptors=(prune.resized(overrides),))

  def fn(variables, images):
    return again(variables, {'image': images.astype(jnp.float32)}).output

  image = jax.ShapeDtypeStruct((1, 6, 6, 1), jnp.float32)
  directory = export_stablehlo(
    fn,
    loaded,
    image,
    tmp_path / 'stablehlo',
    class_names=list('abcde'),
    golden=batch['image'][:2],
  )
  found = load_stablehlo(directory).predict(batch['image'])
  np.testing.assert_allclose(found, want, atol=1e-5)
  path = onnx.export_onnx(
    functools.partial(fn, loaded), image, tmp_path / 'small.onnx'
  )
  np.testing.assert_allclose(
    onnx.load_onnx(path)(batch['image']), want, atol=1e-5
  )


def test_a_transformer_without_heads_is_exported(tmp_path):
  model = models.ViT(5, patch_size=3, width=12, depth=1, heads=3)
  batch = _batch()
  forward = adapters.from_linen(model)
  variables = adapters.init_linen(model, jax.random.key(0), batch)
  plan = prune.find_groups(forward, variables, batch)
  kept = {'block1/attention/query:heads': [0, 2], 'patch': range(0, 12, 2)}
  small = prune.shrink(plan, variables, kept)
  run = prune.shrunk_forward(forward, plan, kept)
  want = jax.jit(run)(small, batch).output
  directory = export_stablehlo(
    lambda variables, images: run(variables, {'image': images}).output,
    small,
    jax.ShapeDtypeStruct((1, 6, 6, 1), jnp.float32),
    tmp_path / 'vit',
    class_names=list('abcde'),
    golden=batch['image'][:2],
  )
  found = load_stablehlo(directory).predict(batch['image'])
  np.testing.assert_allclose(found, want, atol=1e-5)


def test_taps_axis_names_and_interceptors_stay_with_a_shrunk_forward():
  model, _, variables, plan = _setup()
  kept, batch = _kept(plan, variables), _batch()
  seen = []

  def note(next_fun, args, kwargs, context):
    if context.method_name == '__call__':
      seen.append(('/'.join(context.module.path), args[0].shape[-1]))
    return next_fun(*args, **kwargs)

  forward = adapters.from_linen(
    model, taps=('pool',), interceptors=(note,), axis_name=None
  )
  small = prune.shrink(plan, variables, kept)
  out = jax.eval_shape(prune.shrunk_forward(forward, plan, kept), small, batch)
  assert out.features['pool'].shape == (16, len(kept['stem']))
  assert ('conv3', len(kept['conv1'])) in seen


def test_wrong_overrides_are_named():
  model, batch = Net(), _batch()
  _, _, variables, _ = _setup()
  forward = adapters.from_linen(
    model, interceptors=(prune.resized({'stem': {'feature': 3}}),)
  )
  with pytest.raises(ValueError, match="attribute of Conv 'feature': did you"):
    jax.eval_shape(forward, variables, batch)
  plan = prune.Plan(
    (
      prune.Group(
        *('g', 2, 1, ()),
        attributes=(prune.Attribute('a', 'heads', 2, ((0,), (1,))),),
      ),
    ),
    {},
    {},
  )
  with pytest.raises(ValueError, match='not from adapters.from_linen'):
    prune.shrunk_forward(lambda v, b: b, plan, {'g': [0]})
