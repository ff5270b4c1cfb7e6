"""Adapters: linen, nnx and plain functions as students and teachers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from kd_jax import adapters, models, sharding

BATCH = {'image': np.random.default_rng(0).normal(size=(4, 8, 8, 1))}
BATCH['image'] = BATCH['image'].astype('f')


@functools.cache
def _cnn(dropout=0.0):
  model = models.CNN(3, widths=(4, 5), dropout=dropout)
  return model, adapters.init_linen(model, jax.random.key(0), BATCH)


def _equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_output_is_the_modules_own():
  model, variables = _cnn()
  forward = adapters.from_linen(model)
  out, want = jax.jit(lambda v, b: (forward(v, b), model.apply(v, b['image'])))(
    variables, BATCH
  )
  np.testing.assert_array_equal(out.output, want)
  assert out.features == {}


@pytest.mark.parametrize('train', [True, False])
def test_taps_are_the_outputs_of_submodules(train):
  model, variables = _cnn()
  forward = adapters.from_linen(model, taps=['conv1', 'norm2', 'head'])
  plain = adapters.from_linen(model)
  out, want = jax.jit(
    lambda v, b, rng: (
      forward(v, b, rng, train=train),
      plain(v, b, rng, train=train),
    )
  )(variables, BATCH, jax.random.key(0))
  assert set(out.features) == {'conv1', 'norm2', 'head'}
  assert out.features['conv1'].shape == (4, 8, 8, 4)
  assert out.features['norm2'].shape == (4, 4, 4, 5)
  np.testing.assert_array_equal(out.features['head'], out.output)
  # Taps change nothing, and do not end up in the model's state.
  np.testing.assert_allclose(out.output, want.output, rtol=1e-5, atol=1e-6)
  assert set(out.model_state) == {'batch_stats'}


class _Trained(nn.Module):
  """What has to be told whether it trains, and makes more where it does."""

  @nn.compact
  def __call__(self, x, train):
    return nn.BatchNorm(False)(x) if train else nn.Dense(2)(x)


def test_first_variables_are_those_of_evaluation():
  model = _Trained()
  variables = adapters.init_linen(model, jax.random.key(0), BATCH)
  assert set(variables['params']) == {'Dense_0'}
  out = adapters.from_linen(model)(variables, BATCH).output
  assert out.shape == (4, 8, 8, 2)


class _Named(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    return nn.Conv(2, (3, 3))(inputs=x)


def test_a_convolution_may_be_called_by_the_name_of_its_input():
  model = _Named()
  variables = adapters.init_linen(model, jax.random.key(0), BATCH)
  forward = adapters.from_linen(model)
  out = forward(variables, BATCH, jax.random.key(0), train=True).output
  np.testing.assert_array_equal(out, forward(variables, BATCH).output)


def test_taps_reach_into_blocks():
  model = models.CifarResNet(3, depth=8, width=2)
  variables = jax.eval_shape(
    lambda: adapters.init_linen(model, jax.random.key(0), BATCH)
  )
  taps = ['stage2_block1', 'stage2_block1/conv2']
  forward = adapters.from_linen(model, taps=taps)
  features = jax.eval_shape(forward, variables, BATCH).features
  assert [features[t].shape for t in taps] == [(4, 4, 4, 4)] * 2


@pytest.mark.parametrize('train', [True, False])
def test_an_unknown_tap_lists_near_misses(train):
  # Dropout and an interceptor must not stand in the way of the message.
  model, variables = _cnn(dropout=0.5)
  forward = adapters.from_linen(model, taps=('conv1', 'cnv2'))
  with pytest.raises(ValueError, match="Unknown tap 'cnv2': .*mean conv2"):
    jax.eval_shape(
      lambda: forward(variables, BATCH, jax.random.key(0), train=train)
    )


def test_the_last_call_of_a_shared_layer_is_the_tap():
  class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
      layer = nn.Dense(8, name='layer')
      return layer(layer(x))

  x = {'image': jnp.ones((2, 8))}
  variables = Twice().init(jax.random.key(0), x['image'])
  forward = adapters.from_linen(Twice(), taps=['layer'], train_argument=None)
  out = forward(variables, x)
  np.testing.assert_array_equal(out.features['layer'], out.output)


def test_the_first_interceptor_is_the_outermost():
  order = []

  def named(name):
    def interceptor(next_fun, args, kwargs, context):
      if not isinstance(context.module, nn.Dense):
        return next_fun(*args, **kwargs)
      order.append(f'enter {name}')
      out = next_fun(*args, **kwargs)
      order.append(f'leave {name}')
      return out

    return interceptor

  model = nn.Dense(2)
  x = {'image': jnp.ones((1, 3))}
  variables = model.init(jax.random.key(0), x['image'])
  forward = adapters.from_linen(
    model, interceptors=[named('a'), named('b')], train_argument=None
  )
  forward(variables, x)
  assert order == ['enter a', 'enter b', 'leave b', 'leave a']
  # They are gone after the forward.
  model.apply(variables, x['image'])
  assert len(order) == 4


def test_interceptors_are_gone_after_an_error():
  calls = []

  def interceptor(next_fun, args, kwargs, context):
    calls.append(1)
    return next_fun(*args, **kwargs)

  model, variables = _cnn()
  forward = adapters.from_linen(model, interceptors=[interceptor])
  with pytest.raises(ValueError, match='does not fit the parameters of CNN'):
    forward(variables, {'image': jnp.ones((1, 8, 8, 7))})
  calls.clear()
  jax.eval_shape(lambda: model.apply(variables, BATCH['image']))
  assert not calls


def test_training_updates_state_and_evaluation_returns_it_as_it_was():
  model, variables = _cnn(dropout=0.5)
  forward = adapters.from_linen(model)
  state = {'batch_stats': variables['batch_stats']}
  evaluated = forward(variables, BATCH)
  _equal(evaluated.model_state, state)
  _equal(evaluated, forward(variables, BATCH, jax.random.key(7)))
  trained = forward(variables, BATCH, jax.random.key(0), train=True)
  mean = trained.model_state['batch_stats']['norm1']['mean']
  assert np.abs(mean).max() > 0
  assert set(trained.model_state) == {'batch_stats'}
  assert np.abs(trained.output - evaluated.output).max() > 1e-3


def test_dropout_is_drawn_from_the_key():
  model, variables = _cnn(dropout=0.5)
  forward = jax.jit(adapters.from_linen(model), static_argnames='train')
  out = [
    np.asarray(forward(variables, BATCH, jax.random.key(k), train=True).output)
    for k in (0, 0, 1)
  ]
  np.testing.assert_array_equal(out[0], out[1])
  assert np.abs(out[0] - out[2]).max() > 1e-3


def test_the_input_and_train_arguments_may_have_other_names():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x, is_training):
      x = nn.BatchNorm(use_running_average=not is_training)(x)
      return nn.Dense(2)(x)

  x = {'pixels': jnp.ones((2, 3))}
  variables = Net().init(jax.random.key(0), x['pixels'], False)
  forward = adapters.from_linen(
    Net(), reads='pixels', train_argument='is_training'
  )
  assert forward(variables, x, train=True).output.shape == (2, 2)


@pytest.mark.parametrize(
  'model', [nn.Sequential([nn.Dense(2)]), nn.Dense(2)], ids=['inside', 'itself']
)
def test_a_module_without_the_train_argument_is_named(model):
  variables = model.init(jax.random.key(0), BATCH['image'])
  forward = adapters.from_linen(model)
  name = type(model).__name__
  with pytest.raises(
    ValueError, match=f"{name} takes no argument 'train': tra"
  ):
    forward(variables, BATCH)


def test_another_error_of_type_stays_as_it_is():
  class Wrong(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      return nn.Dense(2, wrong=3)(x)

  with pytest.raises(TypeError, match="argument 'wrong'"):
    adapters.from_linen(Wrong())({}, BATCH)


def test_init_is_in_evaluation_mode_and_keyed():
  model = models.CNN(3, widths=(4,), dropout=0.5)
  made = [
    adapters.init_linen(model, jax.random.key(k), BATCH) for k in (0, 0, 1)
  ]
  _equal(made[0], made[1])
  assert set(made[0]) == {'params', 'batch_stats'}
  np.testing.assert_array_equal(made[0]['batch_stats']['norm1']['mean'], 0.0)
  kernels = [np.asarray(m['params']['conv1']['kernel']) for m in made]
  assert np.abs(kernels[0] - kernels[2]).max() > 0


class _NnxNet(nnx.Module):
  def __init__(self, rngs):
    self.dense = nnx.Linear(64, 6, rngs=rngs)
    self.norm = nnx.BatchNorm(6, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.drop(self.norm(self.dense(x.reshape(len(x), -1))))


def test_nnx_keeps_its_state_in_the_variables():
  model = _NnxNet(nnx.Rngs(0))
  forward, variables = adapters.from_nnx(model)
  forward = jax.jit(forward, static_argnames='train')
  assert set(variables) == {'params', 'model_state'}
  first = forward(variables, BATCH, train=True)
  again = forward(variables, BATCH, train=True)
  np.testing.assert_array_equal(first.output, again.output)
  # Its random stream moves on with its state, and so does BatchNorm.
  after = {'params': variables['params'], **first.model_state}
  second = forward(after, BATCH, train=True)
  assert np.abs(first.output - second.output).max() > 1e-3
  mean = first.model_state['model_state']['norm']['mean']
  assert np.abs(mean).max() > 0
  assert jax.tree.structure(second.model_state) == jax.tree.structure(
    first.model_state
  )


class _Sower(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(3)(x)
    self.sow('losses', 'size', jnp.sum(x))
    return nn.BatchNorm(use_running_average=not train)(x)


class _NnxSower(nnx.Module):
  def __init__(self, rngs):
    self.dense = nnx.Linear(1, 3, rngs=rngs)
    self.norm = nnx.BatchNorm(3, rngs=rngs)

  def __call__(self, x):
    x = self.dense(x)
    self.sow(nnx.Intermediate, 'hidden', x)
    return self.norm(x)


@pytest.mark.parametrize('kind', ['linen', 'nnx'])
def test_what_a_module_sows_does_not_grow(kind):
  if kind == 'linen':
    module = _Sower()
    forward = adapters.from_linen(module)
    variables = adapters.init_linen(module, jax.random.key(0), BATCH)
  else:
    forward, variables = adapters.from_nnx(_NnxSower(nnx.Rngs(0)))
  states = [variables]
  for _ in range(3):
    out = forward(states[-1], BATCH, train=True)
    states.append({'params': variables['params'], **out.model_state})
  before, *after = (jax.tree.structure(state) for state in states)
  assert after[0] == after[1] == after[2] == before


def test_a_tap_may_be_one_name():
  model, variables = _cnn()
  out = adapters.from_linen(model, taps='pool')(variables, BATCH)
  assert list(out.features) == ['pool']


def test_nnx_evaluation_is_the_modules_own_and_changes_nothing():
  model = _NnxNet(nnx.Rngs(0))
  forward, variables = adapters.from_nnx(model)
  out = forward(variables, BATCH)
  _equal(
    out.model_state['model_state']['norm'], variables['model_state']['norm']
  )
  twin = nnx.clone(model)
  twin.eval()
  np.testing.assert_allclose(out.output, twin(BATCH['image']), rtol=1e-6)
  # The caller's module is left in the mode that it was in.
  assert not model.drop.deterministic


def test_nnx_without_state_has_parameters_only():
  forward, variables = adapters.from_nnx(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
  assert set(variables) == {'params'}
  out = forward(variables, {'image': jnp.ones((2, 4))}, train=True)
  assert out.model_state == {}


def test_a_plain_function_passes_its_state_through():
  forward = adapters.from_apply(lambda p, x: x * p, reads='x')
  variables = {'params': jnp.float32(2), 'memory': {'m': jnp.float32(5)}}
  out = forward(variables, {'x': jnp.ones(3)}, jax.random.key(0), train=True)
  np.testing.assert_array_equal(out.output, 2.0)
  assert out.model_state == {'memory': {'m': 5.0}}


def test_a_batch_that_does_not_fit_gets_one_sentence():
  model = nn.Dense(3)
  variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
  forward = adapters.from_linen(model, train_argument=None)
  with pytest.raises(ValueError, match="The batch has no 'image'; it has 'x'"):
    forward(variables, {'x': jnp.ones((1, 4))})
  with pytest.raises(ValueError, match=r'of shape \(1, 5\) does not fit'):
    forward(variables, {'image': jnp.ones((1, 5))})
  with pytest.raises(ValueError, match="a mapping, such as {'image': inputs}"):
    adapters.init_linen(model, jax.random.key(0), jnp.ones((1, 4)))
  with pytest.raises(ValueError, match=r'not the class: Dense\(\.\.\.\)'):
    adapters.from_linen(nn.Dense)


def test_inputs_of_convolutions_are_stored_on_cpus_alone():
  """XLA:CPU would compute them again for the gradient; others need no help."""
  _, variables = _cnn()
  forward = adapters.from_linen(models.CNN(3, widths=(4, 5)))

  def barriers(platform, train):
    fn = jax.jit(lambda v, b: forward(v, b, train=train).output)
    lowered = fn.trace(variables, BATCH).lower(lowering_platforms=(platform,))
    return lowered.as_text().count('optimization_barrier')

  assert barriers('cpu', True) == 2  # the convolutions
  assert barriers('cpu', False) == barriers('tpu', True) == 0
  assert barriers('cuda', True) == 0


def test_initial_variables_do_not_depend_on_how_they_are_compiled():
  """Alone, as a part of another program, split over devices, and in Flax."""
  model = models.CNN(4, widths=(8,))
  batch = {'image': jnp.zeros((1, 8, 8, 1))}

  def init(rng):
    return adapters.init_linen(model, rng, batch)

  mesh = sharding.make_mesh(data=1, fsdp=8)
  split = jax.NamedSharding(mesh, jax.P())
  alone = init(jax.random.key(0))
  for made in (
    jax.jit(init)(jax.random.key(0)),
    jax.jit(init, out_shardings=split)(jax.random.key(0)),
    model.init(jax.random.key(0), batch['image']),
  ):
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-6), alone, made
    )
