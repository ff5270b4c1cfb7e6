"""Tokens that only pad count in no loss, gradient or metric."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax import metrics, objectives, sharding
from kd_jax.step import init_state, make_eval_step, make_train_step
from kd_jax.types import Forward

VOCABULARY, LENGTH, BATCH, WIDTH = 5, 6, 16, 3
OBJECTIVE = objectives.weighted_sum(
  {
    'kd': (0.9, objectives.soft_targets(temperature=2.0)),
    'ce': (0.1, objectives.hard_labels(label_smoothing=0.1)),
  }
)


def _network(variables, batch, rng=None, *, train=False):
  return Forward(batch['states'] @ variables['params'])


def _batch():
  """States, labels and a mask that leaves other numbers of tokens each."""
  rng = np.random.default_rng(0)
  lengths = np.append(rng.integers(0, LENGTH, BATCH - 1), LENGTH)
  mask = np.arange(LENGTH) < lengths[:, None]
  label = rng.integers(0, VOCABULARY, (BATCH, LENGTH))
  return {
    'states': rng.normal(size=(BATCH, LENGTH, WIDTH)).astype('f'),
    'label': np.where(mask, label, -100).astype('i4'),
    'attention_mask': mask.astype('i4'),
  }


def _valid(batch):
  """The tokens that count, as a batch of examples."""
  keep = batch['attention_mask'] != 0
  return {k: batch[k][keep] for k in ('states', 'label')}


def _params(seed):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(WIDTH, VOCABULARY)).astype('f')


def _stepped(batch, devices=1, compiler='jit', accumulate=1):
  """Metrics of one step, and the parameters after it."""
  tx, rng = optax.sgd(1.0), jax.random.key(0)
  variables, teacher = ({'params': jnp.asarray(_params(i))} for i in (0, 1))
  state = init_state(
    _network,
    OBJECTIVE,
    tx,
    variables,
    batch,
    teacher_fn=_network,
    teacher=teacher,
  )
  pure = make_train_step(
    _network,
    OBJECTIVE,
    tx,
    teacher_fn=_network,
    axis_name=sharding.axis_name(compiler),
    accumulate=accumulate,
  )
  mesh = sharding.make_mesh(jax.devices()[:devices])
  train_step = sharding.compile_step(pure, mesh, compiler)
  state = sharding.place_state(state, mesh, compiler)
  state, found = train_step(state, sharding.shard_batch(batch, mesh), rng)
  return jax.device_get((found, state.params))


@pytest.mark.parametrize(
  'devices, compiler', [(1, 'jit'), (8, 'jit'), (8, 'shard_map')]
)
def test_a_step_learns_from_the_tokens_that_count(devices, compiler):
  batch = _batch()
  want = _stepped(_valid(batch))
  for fill in (0.0, 1e30):
    pad = batch['attention_mask'][..., None] == 0
    filled = batch | {'states': np.where(pad, fill, batch['states'])}
    got = _stepped(filled, devices, compiler)
    jax.tree.map(
      lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-5, atol=1e-6),
      got,
      want,
    )


@pytest.mark.parametrize(
  'devices, compiler', [(1, 'jit'), (4, 'jit'), (4, 'shard_map')]
)
def test_parts_of_a_batch_with_other_numbers_of_tokens_are_the_whole(
  devices, compiler
):
  batch = _batch()
  # Every fourth sequence is one token, and these are a part.
  batch['attention_mask'][::4, 1:] = 0
  want = _stepped(batch)
  got = _stepped(batch, devices, compiler, accumulate=4)
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-5, atol=1e-6),
    got,
    want,
  )


def test_a_batch_of_padding_alone_changes_nothing():
  batch = _batch()
  batch['attention_mask'] = np.zeros_like(batch['attention_mask'])
  found, params = _stepped(batch)
  assert found['loss/total'] == 0 and found['grad_norm'] == 0
  np.testing.assert_array_equal(params, _params(0))


def _measured(batch):
  chosen = metrics.classification() | metrics.classification_compared()
  eval_step = jax.jit(make_eval_step(_network, chosen, teacher_fn=_network))
  student, teacher = ({'params': _params(i)} for i in (0, 1))
  return metrics.evaluate(
    lambda b: eval_step(student, teacher, b), [batch], chosen
  )


def test_metrics_count_each_token_once():
  batch = _batch()
  real = np.arange(BATCH) % 3 > 0
  want = _measured(_valid({k: v[real] for k, v in batch.items()}))
  got = _measured(batch | {'mask': real.astype('f')})
  assert want['accuracy'] > 0
  for name, value in want.items():
    assert got[name] == pytest.approx(value, rel=1e-5)


def test_a_mask_of_other_tokens_is_refused():
  batch = _batch()
  batch['attention_mask'] = batch['attention_mask'][:, 1:]
  with pytest.raises(ValueError, match='one mask entry per token'):
    _stepped(batch)
  with pytest.raises(ValueError, match='one mask entry per token'):
    _measured(batch)
