"""Objectives: sums, schedules, messages, and terms that own parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax import losses, objectives, step
from kd_jax.types import Forward

LOGITS = jnp.array([[1.0, 2.0, -1.0], [0.5, 0.0, 0.0]])
TEACHER = jnp.array([[0.0, 3.0, 1.0], [1.0, 1.0, -2.0]])
LABEL = jnp.array([1, 2])


def _inputs(*, teacher=TEACHER, batch=None, at=0, student=LOGITS):
  return objectives.Inputs(
    Forward(student),
    None if teacher is None else Forward(teacher),
    {'label': LABEL} if batch is None else batch,
    jnp.int32(at),
    jax.random.key(0),
  )


def _apply(objective, inputs):
  params, state = objective.init(inputs)
  loss, _, metrics = objective.apply(params, state, inputs)
  return loss, metrics


@pytest.mark.parametrize(
  'objective, needed',
  [
    (objectives.sobolev(), 'student_fn'),
    (objectives.ema_teacher(objectives.soft_targets()), 'student_fn'),
    (objectives.input_gradients(), 'teacher_fn'),
  ],
)
def test_terms_that_run_a_network_say_that_they_need_it(objective, needed):
  inputs = _inputs(batch={'label': LABEL, 'image': LOGITS})
  if needed == 'teacher_fn':
    inputs = inputs._replace(student_fn=lambda *_, train: Forward(LOGITS))
  inputs = inputs._replace(student_variables={'params': {}})
  with pytest.raises(ValueError, match=f'give Inputs its {needed}'):
    _apply(objective, inputs)


def test_weighted_sum_adds_the_means_of_its_terms():
  objective = objectives.weighted_sum(
    {
      'kd': (0.9, objectives.soft_targets(temperature=3.0)),
      'ce': (0.1, objectives.hard_labels()),
      'mse': (2.0, objectives.regression(to='teacher')),
    }
  )
  loss, metrics = _apply(objective, _inputs())
  kd = losses.kl_divergence(LOGITS, TEACHER, temperature=3.0).mean()
  ce = losses.cross_entropy(LOGITS, LABEL).mean()
  mse = losses.squared_error(LOGITS, TEACHER).mean()
  np.testing.assert_allclose(loss, 0.9 * kd + 0.1 * ce + 2 * mse, rtol=1e-6)
  assert set(metrics) == {
    'loss/kd',
    'loss/ce',
    'loss/mse',
    'loss/total',
    'accuracy',
  }
  # Reported without their weights, so that runs can be compared.
  np.testing.assert_allclose(metrics['loss/kd'], kd, rtol=1e-6)
  np.testing.assert_allclose(metrics['loss/ce'], ce, rtol=1e-6)
  np.testing.assert_allclose(metrics['loss/mse'], mse, rtol=1e-6)
  np.testing.assert_allclose(metrics['loss/total'], loss)
  assert float(metrics['accuracy']) == 0.5


def test_weights_and_temperature_may_be_schedules():
  objective = objectives.weighted_sum(
    {
      'kd': (
        optax.linear_schedule(0.0, 1.0, 10),
        objectives.soft_targets(temperature=lambda step: 1.0 + step),
      ),
    }
  )
  apply = jax.jit(lambda at: _apply(objective, _inputs(at=at))[0])
  for at, weight, temperature in ((0, 0.0, 1.0), (3, 0.3, 4.0), (20, 1, 21.0)):
    kd = losses.kl_divergence(LOGITS, TEACHER, temperature=temperature)
    np.testing.assert_allclose(apply(at), weight * kd.mean(), rtol=1e-5)


def test_label_smoothing_reaches_the_loss():
  loss, _ = _apply(objectives.hard_labels(label_smoothing=0.2), _inputs())
  want = losses.cross_entropy(LOGITS, LABEL, label_smoothing=0.2)
  np.testing.assert_allclose(loss, want)


def test_regression_is_to_the_target_or_to_the_teacher():
  target = LOGITS + 2.0
  inputs = _inputs(batch={'target': target})
  loss, _ = _apply(objectives.regression(), inputs)
  np.testing.assert_allclose(loss, 4.0)
  loss, _ = _apply(objectives.regression(to='teacher'), inputs)
  np.testing.assert_allclose(loss, losses.squared_error(LOGITS, TEACHER))


@pytest.mark.parametrize(
  'objective',
  [objectives.soft_targets(), objectives.regression(to='teacher')],
  ids=['soft_targets', 'regression'],
)
def test_a_missing_teacher_is_named(objective):
  with pytest.raises(ValueError, match='needs a teacher: give make_train_step'):
    _apply(objective, _inputs(teacher=None))


def test_labels_that_are_no_integers_are_refused():
  batch = {'label': LABEL.astype('float32')}
  with pytest.raises(ValueError, match='Labels are integers, not float32'):
    _apply(objectives.hard_labels(), _inputs(batch=batch))


def test_a_missing_label_names_what_the_batch_has():
  inputs = _inputs(batch={'image': LOGITS, 'labels': LABEL})
  with pytest.raises(ValueError, match=r"batch\['label'\].*'image', 'labels'"):
    _apply(objectives.hard_labels(), inputs)
  with pytest.raises(ValueError, match=r"batch\['target'\]"):
    _apply(objectives.regression(), inputs)


def test_bad_arguments_are_named():
  with pytest.raises(ValueError, match="to='student' is not"):
    objectives.regression(to='student')
  with pytest.raises(ValueError, match='at least one term'):
    objectives.weighted_sum({})
  with pytest.raises(ValueError, match='temperature=0.0 is not > 0'):
    objectives.soft_targets(temperature=0.0)


@pytest.mark.parametrize(
  'make',
  [
    objectives.soft_targets,
    objectives.teacher_free,
    functools.partial(objectives.top_k_targets, k=2),
    functools.partial(objectives.distillation_token, hard=False),
    functools.partial(objectives.mutual, ['a', 'b']),
    functools.partial(
      objectives.on_outputs, losses.decoupled_kd, with_label=True
    ),
  ],
)
def test_a_temperature_of_zero_is_refused(make):
  with pytest.raises(ValueError, match='temperature=0 is not > 0'):
    make(temperature=0)


def test_a_term_may_return_metrics_of_its_own():
  objective = objectives.weighted_sum(
    {'l1': (1.0, objectives.term(lambda i: (jnp.abs(LOGITS), {'m': 3.0})))}
  )
  loss, metrics = _apply(objective, _inputs())
  np.testing.assert_allclose(loss, jnp.abs(LOGITS).mean())
  assert metrics['m'] == 3.0


def test_weighted_sums_nest():
  inner = objectives.weighted_sum({'ce': (0.5, objectives.hard_labels())})
  outer = objectives.weighted_sum({'inner': (2.0, inner)})
  loss, metrics = _apply(outer, _inputs())
  np.testing.assert_allclose(metrics['loss/inner'], loss / 2)
  np.testing.assert_allclose(loss, metrics['loss/ce'])


def test_terms_draw_from_keys_of_their_own():
  seen = []

  def draw(inputs):
    seen.append(float(jax.random.uniform(inputs.rng)))
    return jnp.float32(0)

  terms = {name: (1.0, objectives.term(draw)) for name in 'ab'}
  _apply(objectives.weighted_sum(terms), _inputs())
  assert len(set(seen)) == 2


def _hint():
  """Regression of a feature to the teacher's, with a trained projection.

  Its state is a running mean of the teacher's features.
  """

  def init(inputs):
    width = inputs.student.features['hidden'].shape[-1]
    wide = inputs.teacher.features['hidden'].shape[-1]
    w = 0.1 * jax.random.normal(inputs.rng, (width, wide))
    return {'projection': w}, {'mean': jnp.zeros(wide), 'count': jnp.int32(0)}

  def apply(params, state, inputs):
    got = inputs.student.features['hidden'] @ params['projection']
    want = inputs.teacher.features['hidden']
    rate = 0.5 * (want.mean(axis=0) - state['mean'])
    state = {'mean': state['mean'] + rate, 'count': state['count'] + 1}
    return losses.squared_error(got, want), state, {}

  return objectives.Objective(init, apply)


def _two_layers(variables, batch, rng=None, *, train=False):
  params = variables['params']
  hidden = jnp.tanh(batch['image'] @ params['first'])
  return Forward(hidden @ params['last'], {'hidden': hidden}, {})


def test_a_terms_parameters_train_beside_the_student_and_its_state_updates():
  keys = jax.random.split(jax.random.key(1), 5)
  student = {
    'first': jax.random.normal(keys[0], (4, 3)),
    'last': jax.random.normal(keys[1], (3, 2)),
  }
  teacher = {
    'params': {
      'first': jax.random.normal(keys[2], (4, 5)),
      'last': jax.random.normal(keys[3], (5, 2)),
    }
  }
  batch = {'image': jax.random.normal(keys[4], (8, 4))}
  objective = objectives.weighted_sum({'hint': (1.0, _hint())})
  tx, objective_tx = optax.sgd(0.1), optax.adam(0.05)
  options = {'teacher_fn': _two_layers, 'objective_tx': objective_tx}
  state = step.init_state(
    _two_layers,
    objective,
    tx,
    {'params': student},
    batch,
    teacher=teacher,
    **options,
  )
  train_step = jax.jit(
    step.make_train_step(_two_layers, objective, tx, **options)
  )
  first = state
  history = []
  for _ in range(60):
    state, metrics = train_step(state, batch, jax.random.key(0))
    history.append(float(metrics['loss/hint']))
  assert history[-1] < 0.2 * history[0]
  moved = jnp.abs(
    state.objective.params['hint']['projection']
    - first.objective.params['hint']['projection']
  )
  assert moved.max() > 0.1
  assert jnp.abs(state.params['first'] - student['first']).max() > 0.01
  # No gradient of the hint reaches the layer behind the hidden one.
  np.testing.assert_array_equal(state.params['last'], student['last'])
  memory = state.objective.state['hint']
  want = _two_layers(teacher, batch).features['hidden'].mean(axis=0)
  assert int(memory['count']) == 60
  np.testing.assert_allclose(memory['mean'], want, rtol=1e-5)
  # The term's optimizer is its own: Adam's state, not that of SGD.
  assert len(jax.tree.leaves(state.objective.opt_state)) == 3
  assert set(state.params) == {'first', 'last'}
