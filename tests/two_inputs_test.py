"""Networks of two inputs: tokens and a mask, from the adapters to integers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from kd_jax import adapters, deploy, export, objectives, parity, step
from kd_jax.export import onnx

VOCABULARY, LENGTH, CLASSES = 12, 6, 3


class Tagger(nn.Module):
  """Averages the tokens that a mask leaves."""

  reads: tuple[str, ...] = ('ids', 'attention_mask')

  @nn.compact
  def __call__(self, ids, mask, train=False):
    x = nn.Embed(VOCABULARY, 8, name='embed')(ids)
    x = nn.relu(nn.Dense(16, name='mix')(x)) * mask[..., None]
    x = x.sum(1) / mask.sum(1, keepdims=True)
    return nn.Dense(CLASSES, name='head')(x)


def _batch(seed=0, size=32):
  rng = np.random.default_rng(seed)
  ids = rng.integers(VOCABULARY, size=(size, LENGTH)).astype(np.int32)
  lengths = rng.integers(1, LENGTH + 1, size=(size, 1))
  return {
    'ids': ids,
    'attention_mask': (np.arange(LENGTH) < lengths).astype(np.float32),
    # The first token is never masked.
    'label': ids[:, 0] % CLASSES,
  }


BATCH = _batch()
INPUTS = BATCH['ids'], BATCH['attention_mask']


def _variables():
  return adapters.init_linen(Tagger(), jax.random.key(0), BATCH)


def test_the_entries_are_passed_in_the_order_of_their_names():
  model, variables = Tagger(), _variables()
  want = model.apply(variables, *INPUTS)
  forward = adapters.from_linen(model)
  np.testing.assert_array_equal(forward(variables, BATCH).output, want)
  # The names of the call win over those of the module.
  forward = adapters.from_linen(model, reads=('tokens', 'which'))
  batch = dict(zip(('which', 'tokens'), INPUTS[::-1], strict=True))
  np.testing.assert_array_equal(forward(variables, batch).output, want)
  with pytest.raises(ValueError, match="has no 'which'; it has 'tokens'"):
    forward(variables, {'tokens': INPUTS[0]})


def test_first_variables_are_the_modules_own():
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-6),
    _variables(),
    dict(Tagger().init(jax.random.key(0), *INPUTS)),
  )
  batch = {'tokens': INPUTS[0], 'which': INPUTS[1]}
  made = adapters.init_linen(
    Tagger(), jax.random.key(0), batch, reads=('tokens', 'which')
  )
  jax.tree.map(np.testing.assert_array_equal, made, _variables())


def test_inputs_that_do_not_fit_are_named():
  class Joined(nn.Module):
    @nn.compact
    def __call__(self, x, y):
      return nn.Dense(3)(jnp.concatenate([x, y], axis=-1))

  forward = adapters.from_linen(Joined(), reads=('x', 'y'), train_argument=None)
  x = jnp.ones((2, 4))
  variables = Joined().init(jax.random.key(0), x, x)
  with pytest.raises(
    ValueError, match=r"'x'\] of shape \(2, 4\), batch\['y'\] of shape \(2, 5\)"
  ):
    forward(variables, {'x': x, 'y': jnp.ones((2, 5))})


def test_nnx_modules_and_functions_take_several_inputs_too():
  class Scaled(nnx.Module):
    def __init__(self):
      self.w = nnx.Param(jnp.float32(3))

    def __call__(self, x, y):
      return self.w[...] * x - y

  batch = {'x': jnp.float32([5]), 'y': jnp.float32([2])}
  forward, variables = adapters.from_nnx(Scaled(), reads=('x', 'y'))
  assert forward(variables, batch).output.tolist() == [13]
  forward = adapters.from_apply(lambda p, x, y: p * x - y, reads=('y', 'x'))
  assert forward({'params': 3}, batch).output.tolist() == [1]


def _trained():
  """After a few steps of training, in which the loss fell."""
  forward = adapters.from_linen(Tagger())
  objective = objectives.weighted_sum({'ce': (1.0, objectives.hard_labels())})
  tx = optax.adam(0.05)
  state = step.init_state(forward, objective, tx, _variables(), BATCH)
  train_step = jax.jit(step.make_train_step(forward, objective, tx))
  losses = []
  for _ in range(40):
    state, metrics = train_step(state, BATCH, jax.random.key(1))
    losses.append(float(metrics['loss/ce']))
  assert losses[-1] < 0.7 * losses[0]
  return {'params': state.params}


def test_a_step_trains_it_and_it_runs_on_integers():
  model, variables = Tagger(), _trained()
  rules = {'weight_rules': deploy.WEIGHT_RULES}
  ready = deploy.calibrated(model, variables, [BATCH, _batch(1)])
  integers = deploy.post_training_quantize(
    model, variables, [BATCH, _batch(1)], **rules
  )
  for name in ('mix', 'head'):
    assert integers['int8'][name]['kernel'].dtype == jnp.int8
    assert 'input0' in integers['int8'][name]
  batch = _batch(2)
  real, integer = adapters.from_linen(model), deploy.integer_forward(model)
  compared = parity.compare(
    lambda b: integer(integers, b).output,
    lambda b: real(variables, b).output,
    [batch],
  )
  assert compared.agreement > 0.9 and compared.sqnr_db > 25
  report = parity.check_parity(
    model,
    ready,
    integers,
    batch,
    activation_rules=deploy.ACTIVATION_RULES,
    **rules,
  )
  assert [row.layer for row in report.layers] == ['head', 'mix']
  raw = deploy.from_raw(
    integer, lambda batch, *, train: batch, reads=model.reads
  )
  np.testing.assert_array_equal(
    raw(integers, *(batch[name] for name in model.reads)),
    integer(integers, batch).output,
  )


def test_exporters_say_that_a_file_has_one_input(tmp_path):
  specs = jax.eval_shape(lambda *inputs: inputs, *INPUTS)
  message = 'a file has one input, but 2 are given'
  with pytest.raises(ValueError, match=f'export_onnx: {message}'):
    onnx.export_onnx(lambda x, y: x, specs, tmp_path / 'model.onnx')
  with pytest.raises(ValueError, match=f'export_stablehlo: {message}'):
    export.export_stablehlo(
      lambda v, x, y: x,
      {},
      specs,
      tmp_path / 'model',
      class_names=(),
      golden=INPUTS,
    )
  assert not [*tmp_path.iterdir()]
