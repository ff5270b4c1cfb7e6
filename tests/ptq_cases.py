"""Networks for the tests of post-training quantization."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from kd_jax import adapters, deploy, models, quantize

INT8 = [('.*/kernel', quantize.INT8_WEIGHTS)]
INT4 = [('.*/kernel', quantize.QuantSpec(bits=4, axis=-1))]
INPUTS = [('.*', quantize.INT8_ACTIVATIONS)]
CLASSES, SIZE = 6, 12


class Depthwise(nn.Module):
  """Pointwise, depthwise and grouped convolutions; pooled, flattened."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(nn.Conv(8, (1, 1), name='wide')(x))
    x = nn.Conv(8, (3, 3), feature_group_count=8, name='depthwise')(x)
    x = nn.leaky_relu(x, 0.1)
    x = nn.Conv(12, (3, 3), feature_group_count=4, name='grouped')(x)
    x = nn.max_pool(nn.PReLU(name='prelu')(x), (2, 2), (2, 2))
    x = nn.avg_pool(x, (2, 2), (1, 1))
    return nn.Dense(CLASSES, name='head')(x.reshape(x.shape[0], -1))


class Block(nn.Module):
  """The body of a scan: a pre-norm block with ReLU."""

  @nn.compact
  def __call__(self, x, _):
    y = nn.LayerNorm(name='norm')(x)
    y = nn.relu(nn.Dense(10, name='dense1')(y))
    return x + nn.Dense(8, name='dense2')(y), None


class Stack(nn.Module):
  """Three scanned, rematerialised blocks between two dense layers."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(8, name='first')(x.reshape(x.shape[0], -1, 8))
    blocks = nn.scan(
      nn.remat(Block),
      variable_axes={'params': 0, 'quant_stats': 0},
      split_rngs={'params': True},
      length=3,
    )
    x, _ = blocks(name='blocks')(x, None)
    return nn.Dense(CLASSES, name='head')(x.mean(1))


MODELS = {
  'cnn': models.CNN(CLASSES, widths=(8, 16)),
  'resnet': models.CifarResNet(CLASSES, depth=8, width=3),
  'mlp': models.MLP(CLASSES, hidden=(11, 7)),
  'vit': models.ViT(
    CLASSES, patch_size=4, width=24, depth=1, heads=2, mlp_ratio=2
  ),
  'depthwise': Depthwise(),
  'stack': Stack(),
}


def random_variables(name, *, dtype='float32'):
  """Variables that are not those of a new model, and a batch."""
  model, rng = MODELS[name], np.random.default_rng(0)
  batch = {'image': rng.normal(size=(4, SIZE, SIZE, 1)).astype('f') + 0.3}
  shapes = jax.eval_shape(
    lambda: adapters.init_linen(model, jax.random.key(0), batch)
  )

  def fill(path, x):
    noise = rng.normal(size=x.shape).astype('f')
    if path[-1].key == 'kernel':
      fan_in = x.size / x.shape[-1]
      noise = noise * np.exp(rng.normal(size=x.shape[-1])) / np.sqrt(fan_in)
    elif path[-1].key == 'var':
      noise = np.exp(0.5 * noise)
    else:
      noise = 0.3 * noise + (path[-1].key == 'scale')
    return jnp.asarray(noise, dtype)

  return model, jax.tree_util.tree_map_with_path(fill, shapes), batch


def forward_of(model):
  """The forward of a model in evaluation mode, folded BatchNorms left out."""
  return deploy.evaluation(model, train_argument=None)()


@functools.cache
def _compiled(model):
  forward = forward_of(model)
  return jax.jit(lambda v, b: forward(v, b).output)


def run(model, variables, batch):
  """The output of that forward."""
  return _compiled(model)(variables, {'image': batch['image']})


def images(count, seed):
  """Smooth patterns, one for each class, under noise."""
  prototypes = np.random.default_rng(7).normal(size=(CLASSES, 3, 3, 1))
  prototypes = prototypes.repeat(4, axis=1).repeat(4, axis=2)
  rng = np.random.default_rng(seed)
  label = rng.integers(CLASSES, size=count)
  noise = rng.normal(size=(count, SIZE, SIZE, 1))
  image = prototypes[label] * rng.uniform(0.5, 1.5, size=(count, 1, 1, 1))
  return {'image': (image + noise).astype('f'), 'label': label}


@functools.cache
def trained(name):
  """A network trained for some steps: the model and its variables."""
  model = MODELS[name]
  forward = adapters.from_linen(model)
  data = images(4096, seed=0)
  variables = adapters.init_linen(model, jax.random.key(0), data)
  tx = optax.adam(1e-2)

  @jax.jit
  def train(variables, data):
    def step(state, rows):
      variables, opt_state = state

      def loss_fn(params):
        batch = jax.tree.map(lambda x: x[rows], data)
        out = forward({**variables, 'params': params}, batch, train=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(
          out.output, batch['label']
        )
        return loss.mean(), out.model_state

      params = variables['params']
      grads, new = jax.grad(loss_fn, has_aux=True)(params)
      updates, opt_state = tx.update(grads, opt_state)
      params = optax.apply_updates(params, updates)
      return ({**new, 'params': params}, opt_state), None

    rows = jax.random.randint(jax.random.key(1), (200, 64), 0, 4096)
    return jax.lax.scan(step, (variables, tx.init(variables['params'])), rows)

  (variables, _), _ = train(variables, jax.tree.map(jnp.asarray, data))
  return model, variables


def calibration(count=4, size=64):
  """Batches to calibrate with."""
  return [images(size, seed=100 + i) for i in range(count)]
