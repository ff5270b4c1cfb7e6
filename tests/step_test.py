"""The train step: what it trains, what it leaves alone, how often it traces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from kd_jax import adapters, models, objectives, optim, prune, sharding, step
from kd_jax.types import Forward

EXAMPLES, CLASSES = 16, 4


def _batch():
  rng = np.random.default_rng(0)
  return {
    'image': rng.normal(size=(EXAMPLES, 4, 4, 1)).astype('f'),
    'label': (np.arange(EXAMPLES) % CLASSES).astype('i4'),
  }


@functools.cache
def _linen():
  model = models.MLP(CLASSES, hidden=(32,), dropout=0.1)
  variables = adapters.init_linen(model, jax.random.key(0), _batch())
  return adapters.from_linen(model), variables


@functools.cache
def _linen_norm():
  model = models.CNN(CLASSES, widths=(8, 8))
  variables = adapters.init_linen(model, jax.random.key(0), _batch())
  return adapters.from_linen(model), variables


class _NnxNet(nnx.Module):
  """Dense, BatchNorm, Dropout, Dense, in the way of nnx."""

  def __init__(self, rngs):
    self.first = nnx.Linear(16, 32, rngs=rngs)
    self.norm = nnx.BatchNorm(32, rngs=rngs)
    self.drop = nnx.Dropout(0.1, rngs=rngs)
    self.last = nnx.Linear(32, CLASSES, rngs=rngs)

  def __call__(self, x):
    x = self.norm(self.first(x.reshape(len(x), -1)))
    return self.last(self.drop(nnx.relu(x)))


def _nnx():
  return adapters.from_nnx(_NnxNet(nnx.Rngs(0)))


def _plain():
  keys = jax.random.split(jax.random.key(0))
  params = {
    'first': 0.3 * jax.random.normal(keys[0], (16, 32)),
    'last': 0.3 * jax.random.normal(keys[1], (32, CLASSES)),
  }

  def apply(params, x):
    return jnp.tanh(x.reshape(len(x), -1) @ params['first']) @ params['last']

  return adapters.from_apply(apply), {'params': params}


STUDENTS = {
  'linen': _linen,
  'linen_norm': _linen_norm,
  'nnx': _nnx,
  'plain': _plain,
}


@functools.cache
def _teacher(classes=CLASSES):
  model = models.MLP(classes, hidden=(8,))
  variables = adapters.init_linen(model, jax.random.key(9), _batch())
  return adapters.from_linen(model), variables


def _distillation():
  return objectives.weighted_sum(
    {
      'kd': (0.5, objectives.soft_targets(temperature=2.0)),
      'ce': (0.5, objectives.hard_labels()),
    }
  )


def _setup(student, objective, tx, *, teacher=None, params_fn=lambda p: p):
  student_fn, variables = student
  options = {}
  if teacher is not None:
    options = {'teacher_fn': teacher[0]}
  train_step = step.make_train_step(
    student_fn, objective, tx, params_fn=params_fn, **options
  )
  if teacher is not None:
    options['teacher'] = teacher[1]
  state = step.init_state(
    student_fn, objective, tx, variables, _batch(), **options
  )
  return train_step, state


def _equal(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('name', STUDENTS)
def test_every_kind_of_student_overfits_sixteen_examples(name):
  student = STUDENTS[name]()
  train_step, state = _setup(
    student,
    objectives.hard_labels(),
    optim.make_optimizer('adam', learning_rate=0.02),
  )
  train_step = jax.jit(train_step)
  rng = jax.random.key(0)
  for _ in range(100):
    state, metrics = train_step(state, _batch(), rng)
  assert float(metrics['loss/total']) < 0.1
  assert float(metrics['accuracy']) == 1.0
  assert int(state.step) == 100
  # And it has learned in evaluation mode too.
  variables = {'params': state.params, **state.model_state}
  out = jax.jit(student[0])(variables, _batch())
  assert np.mean(out.output.argmax(-1) == _batch()['label']) == 1.0


def test_distillation_brings_the_student_to_the_teacher():
  objective = objectives.weighted_sum(
    {'kd': (1.0, objectives.soft_targets(temperature=2.0))}
  )
  teacher = _teacher()
  train_step, state = _setup(
    _plain(), objective, optax.adam(0.02), teacher=teacher
  )
  train_step = jax.jit(train_step)
  for _ in range(150):
    state, metrics = train_step(state, _batch(), jax.random.key(0))
  assert float(metrics['loss/kd']) < 0.01
  want = teacher[0](teacher[1], _batch()).output.argmax(-1)
  got = _plain()[0]({'params': state.params}, _batch()).output.argmax(-1)
  np.testing.assert_array_equal(got, want)


def test_regression_learns_real_values():
  rng = np.random.default_rng(1)
  x = rng.normal(size=(64, 5)).astype('f')
  w = rng.normal(size=(5, 2)).astype('f')
  batch = {'image': x, 'target': x @ w}
  model = nn.Dense(2)
  variables = model.init(jax.random.key(0), x)
  forward = adapters.from_linen(model, train_argument=None)
  objective, tx = objectives.regression(), optax.sgd(0.5)
  state = step.init_state(forward, objective, tx, variables, batch)
  train_step = jax.jit(step.make_train_step(forward, objective, tx))
  for _ in range(100):
    state, metrics = train_step(state, batch, jax.random.key(0))
  assert float(metrics['loss/total']) < 1e-6
  np.testing.assert_allclose(state.params['kernel'], w, atol=1e-3)


@pytest.mark.parametrize('donate', [True, False])
def test_the_teacher_stays_as_it_was_and_is_not_donated(donate):
  student_fn, teacher = _teacher()
  before = jax.tree.map(np.array, teacher)
  train_step, state = _setup(
    _linen(), _distillation(), optax.adam(0.1), teacher=(student_fn, teacher)
  )
  compiled = sharding.compile_step(
    train_step, sharding.make_mesh(jax.devices()[:1]), donate=donate
  )
  inside = state.teacher
  for _ in range(2):
    state, _ = compiled(state, _batch(), jax.random.key(0))
  _equal(state.teacher, before)
  _equal(teacher, before)
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(inside))


@pytest.mark.parametrize('with_mesh', [True, False])
def test_the_callers_variables_survive_a_donating_step(with_mesh):
  """One initialisation trains two students: alone and distilled."""
  student, teacher = _linen(), _teacher()
  # Copies: a NumPy view of a buffer would keep it from being donated.
  before = jax.tree.map(np.array, (student[1], teacher[1]))
  for taught in (True, False):
    train_step, state = _setup(
      student,
      _distillation() if taught else objectives.hard_labels(),
      optax.sgd(0.1),
      teacher=teacher if taught else None,
    )
    if with_mesh:
      mesh = sharding.make_mesh(jax.devices()[:1])
      compiled = sharding.compile_step(train_step, mesh)
      state = sharding.place_state(state, mesh)
    else:
      compiled = jax.jit(train_step, donate_argnums=0)
    compiled(state, _batch(), jax.random.key(0))
    _equal((student[1], teacher[1]), before)


def test_no_gradient_reaches_the_teacher():
  """Even for a term that does not think of it."""
  objective = objectives.term(lambda i: i.student.output * i.teacher.output)
  teacher_fn, teacher = _teacher()
  train_step, state = _setup(
    _plain(), objective, optax.sgd(1.0), teacher=(teacher_fn, teacher)
  )

  def sum_of_new_params(variables):
    new, _ = train_step(
      state.replace(teacher=variables), _batch(), jax.random.key(0)
    )
    return sum(x.sum() for x in jax.tree.leaves(new.params))

  for leaf in jax.tree.leaves(jax.jit(jax.grad(sum_of_new_params))(teacher)):
    np.testing.assert_array_equal(leaf, 0.0)


def test_the_teacher_is_not_in_the_optimizer():
  tx = optax.adam(0.1)
  _, alone = _setup(_linen(), objectives.hard_labels(), tx)
  _, taught = _setup(_linen(), _distillation(), tx, teacher=_teacher())
  shapes = [
    [x.shape for x in jax.tree.leaves(s.opt_state)] for s in (alone, taught)
  ]
  assert shapes[0] == shapes[1]


def test_many_steps_trace_once():
  traces = []
  train_step, state = _setup(
    _linen_norm(),
    _distillation(),
    prune.prune(
      optax.adam(0.01), prune.cubic(0.5, begin=1, end=4), [('.*/kernel', True)]
    ),
    teacher=_teacher(),
  )

  def counted(*args):
    traces.append(1)
    return train_step(*args)

  compiled = jax.jit(counted)
  for seed in range(6):
    state, _ = compiled(state, _batch(), jax.random.key(seed))
  assert len(traces) == 1


def test_runs_with_the_same_key_are_equal_and_with_another_differ():
  train_step, start = _setup(_linen(), objectives.hard_labels(), optax.sgd(0.1))
  train_step = jax.jit(train_step)

  def run(seed):
    state = start
    for _ in range(3):
      state, metrics = train_step(state, _batch(), jax.random.key(seed))
    return state.params, metrics

  _equal(run(0), run(0))
  with pytest.raises(AssertionError):
    _equal(run(0), run(1))


def test_every_step_draws_its_own_randomness():
  seen = []

  def student_fn(variables, batch, rng, *, train):
    seen.append(jax.random.uniform(rng))
    return Forward(variables['params'] * batch['x'])

  objective = objectives.term(lambda i: i.student.output.sum())
  tx, batch = optax.sgd(0.1), {'x': jnp.ones((1, 1))}
  variables = {'params': jnp.float32(1)}
  train_step = step.make_train_step(student_fn, objective, tx)
  state = step.init_state(student_fn, objective, tx, variables, batch)
  seen.clear()
  for _ in range(3):
    state, _ = train_step(state, batch, jax.random.key(0))
  assert len({float(jax.lax.stop_gradient(x)) for x in seen}) == 3


def test_the_pure_step_equals_the_compiled_one():
  train_step, state = _setup(
    _linen(), _distillation(), optax.sgd(0.1), teacher=_teacher()
  )
  args = (state, _batch(), jax.random.key(0))
  eager, compiled = train_step(*args), jax.jit(train_step)(*args)
  for x, y in zip(
    jax.tree.leaves(eager), jax.tree.leaves(compiled), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_params_fn_is_differentiated_through_and_its_input_is_trained():
  objective = objectives.term(lambda i: i.student.output)

  def apply(v, batch, rng, *, train):
    return Forward(v['params'] * batch['x'])

  tx, batch = optax.sgd(0.1), {'x': jnp.ones(1)}
  state = step.init_state(
    apply, objective, tx, {'params': jnp.float32(1)}, batch
  )
  train_step = step.make_train_step(
    apply, objective, tx, params_fn=lambda p: 3 * p
  )
  state, metrics = train_step(state, batch, jax.random.key(0))
  assert float(metrics['loss/total']) == 3.0
  assert float(state.params) == pytest.approx(1 - 0.1 * 3)


class _Doubled:
  def __call__(self, params, step):
    return 2 * params + 0 * step

  def at(self, params, step):
    return params * (step + 1)


# How a params_fn may be written -> what it makes of 1 at steps 0 and 1.
PARAMS_FNS = {
  'one argument': (lambda params: 3 * params, (3, 3)),
  'two arguments': (lambda params, step: params * (step + 2), (2, 3)),
  'another name': (lambda p, t: p * (t + 2), (2, 3)),
  'a default': (lambda params, k=5: params * k, (5, 5)),
  'a step at the end': (lambda p, k=3, step=5: p * k * step, (0, 3)),
  'a default step': (lambda params, step=5: params * (step + 2), (2, 3)),
  'bound': (functools.partial(lambda p, step: p * step, step=7), (7, 7)),
  'bound before': (functools.partial(lambda k, p, t: k * p + t, 4), (4, 5)),
  'keywords': (functools.partial(lambda p, *, k: p * k, k=6), (6, 6)),
  'callable': (_Doubled(), (2, 2)),
  'method': (_Doubled().at, (1, 2)),
  'builtin': (dict, None),
}


@pytest.mark.parametrize('name', PARAMS_FNS)
def test_params_fn_may_take_the_step(name):
  params_fn, want = PARAMS_FNS[name]
  objective = objectives.term(lambda i: i.student.output)

  def apply(v, batch, rng, *, train):
    p = v['params']
    return Forward((p['w'] if isinstance(p, dict) else p) * batch['x'])

  params = jnp.float32(1) if want else {'w': jnp.float32(1)}
  tx, batch = optax.sgd(0.0), {'x': jnp.ones(1)}
  state = step.init_state(apply, objective, tx, {'params': params}, batch)
  train_step = jax.jit(
    step.make_train_step(apply, objective, tx, params_fn=params_fn)
  )
  for value_at_step in want or (1, 1):
    state, metrics = train_step(state, batch, jax.random.key(0))
    assert float(metrics['loss/total']) == value_at_step


@pytest.mark.parametrize('compiler', list(sharding.COMPILERS))
def test_straight_through_pruning_trains_dense_weights(compiler):
  """With every compiler; the step's schedule is that of the state."""
  params_fn = prune.straight_through(
    prune.linear(0.5, begin=0, end=2), [('.*/kernel', True)]
  )
  student_fn, variables = _linen()
  objective, tx = objectives.hard_labels(), optax.sgd(0.5)
  state = step.init_state(student_fn, objective, tx, variables, _batch())
  mesh = sharding.make_mesh()
  compiled = sharding.compile_step(
    step.make_train_step(
      student_fn,
      objective,
      tx,
      params_fn=params_fn,
      axis_name=sharding.axis_name(compiler),
    ),
    mesh,
    compiler,
  )
  state, losses = sharding.place_state(state, mesh, compiler), []
  for _ in range(4):
    state, metrics = compiled(
      state, sharding.shard_batch(_batch(), mesh), jax.random.key(0)
    )
    losses.append(float(metrics['loss/total']))
  assert losses[-1] < losses[0]
  rows = [('.*/kernel', True)]
  dense = prune.total(prune.sparsity_report(state.params, rows))
  assert dense.nonzero > 0.95 * dense.size
  masked = jax.jit(params_fn)(state.params, state.step)
  served = prune.total(prune.sparsity_report(masked, rows))
  assert served.nonzero == int(prune.kept_count(served.size, 0.5))


def test_both_optimizers_go_on_from_their_states():
  """With momentum 1/2 and gradients of 1 they move by 1, 1.5 and 1.75."""
  objective = objectives.Objective(
    lambda inputs: ({'bias': jnp.float32(0)}, {'calls': jnp.int32(0)}),
    lambda params, state, inputs: (
      inputs.student.output.sum() + params['bias'],
      {'calls': state['calls'] + 1},
      {},
    ),
  )
  student_fn = adapters.from_apply(lambda params, x: x * params)
  batch = {'image': jnp.ones((1, 1))}
  tx = optax.sgd(0.1, momentum=0.5)
  variables = {'params': jnp.float32(1)}
  state = step.init_state(
    student_fn, objective, tx, variables, batch, objective_tx=tx
  )
  train_step = step.make_train_step(student_fn, objective, tx, objective_tx=tx)
  for calls, moved in enumerate((0.1, 0.25, 0.425), start=1):
    state, _ = train_step(state, batch, jax.random.key(0))
    np.testing.assert_allclose(state.params, 1 - moved, rtol=1e-6)
    bias = state.objective.params['bias']
    np.testing.assert_allclose(bias, -moved, rtol=1e-6)
    assert int(state.objective.state['calls']) == int(state.step) == calls


@pytest.mark.parametrize('with_teacher', [True, False])
def test_an_objective_sees_all_that_the_step_has(with_teacher):
  seen = []
  batch = {'image': jnp.full((2, 1), 3.0), 'teacher/logits': jnp.ones((2, 1))}
  other = {'image': jnp.ones((2, 1)), 'teacher/logits': jnp.full((2, 1), 2.0)}

  def student_fn(variables, batch, rng, *, train):
    return Forward(variables['params'] * batch['image'])

  def teacher_fn(variables, batch):
    return Forward(variables['params'] * batch['teacher/logits'])

  def look(inputs):
    """Runs both networks again, on other images."""
    seen.append(inputs)
    again = inputs.student_fn(inputs.student_variables, other, None, train=True)
    outputs = {'student': again.output.mean()}
    if inputs.teacher_fn is not None:
      again = inputs.teacher_fn(inputs.teacher_variables, other)
      outputs['teacher'] = again.output.mean()
    return outputs

  objective = objectives.Objective(
    lambda inputs: ({}, look(inputs)),
    lambda params, state, inputs: (
      inputs.student.output.sum(),
      state,
      look(inputs),
    ),
  )
  taught = {'teacher_fn': teacher_fn} if with_teacher else {}
  variables = {'params': jnp.ones((1, 1))}
  teacher = {'teacher': {'params': jnp.full((1, 1), 5.0)}}
  tx, rng = optax.sgd(0.1), jax.random.key(0)
  state = step.init_state(
    student_fn,
    objective,
    tx,
    variables,
    batch,
    **taught,
    **(teacher if with_teacher else {}),
  )
  train_step = step.make_train_step(
    student_fn,
    objective,
    tx,
    params_fn=lambda params: 2 * params,
    num_shards=2,
    **taught,
  )
  start = state.objective.state
  _, metrics = train_step(state.replace(step=jnp.int32(4)), batch, rng)
  # What was stored for these images does not hold for others.
  assert [set(inputs.batch) for inputs in seen] == [{'image'}] * 2
  assert (float(start['student']), float(metrics['student'])) == (1.0, 2.0)
  inputs = seen[1]
  assert (int(inputs.step), int(inputs.part)) == (4, 0)
  assert (inputs.num_shards, inputs.axis_name) == (2, None)
  assert inputs.rng == jax.random.fold_in(rng, 4)
  if with_teacher:
    np.testing.assert_array_equal(inputs.teacher.output, 5.0)
    assert float(start['teacher']) == float(metrics['teacher']) == 10.0
  else:
    assert inputs.teacher is inputs.teacher_fn is None
    assert inputs.teacher_variables is None


def test_metrics_hold_the_loss_and_the_gradients_norm():
  train_step, state = _setup(_plain(), objectives.hard_labels(), optax.sgd(1.0))
  new, metrics = jax.jit(train_step)(state, _batch(), jax.random.key(0))
  assert set(metrics) == {'loss/total', 'accuracy', 'grad_norm'}
  moved = jax.tree.map(lambda a, b: a - b, state.params, new.params)
  np.testing.assert_allclose(
    metrics['grad_norm'], optax.tree.norm(moved), rtol=1e-5
  )


@pytest.mark.parametrize('to', ['soft_targets', 'regression'])
def test_a_teacher_of_other_classes_is_named(to):
  objective = {
    'soft_targets': objectives.soft_targets(),
    'regression': objectives.regression(to='teacher'),
  }[to]
  train_step, state = _setup(
    _linen(), objective, optax.sgd(0.1), teacher=_teacher(CLASSES + 1)
  )
  with pytest.raises(ValueError, match=r'\(16, 4\).*\(16, 5\)'):
    jax.jit(train_step)(state, _batch(), jax.random.key(0))


def test_teacher_function_and_variables_come_together():
  teacher_fn, teacher = _teacher()
  student_fn, variables = _linen()
  args = (student_fn, _distillation(), optax.sgd(0.1), variables, _batch())
  for options in ({'teacher_fn': teacher_fn}, {'teacher': teacher}):
    with pytest.raises(ValueError, match='come together'):
      step.init_state(*args, **options)


def test_parameters_alone_are_no_variables():
  student_fn, variables = _linen()
  args = (_distillation(), optax.sgd(0.1), variables['params'], _batch())
  with pytest.raises(ValueError, match="there is no 'params' among 'dense1'"):
    step.init_state(student_fn, *args)


def test_an_objective_that_needs_a_teacher_says_so():
  train_step, state = _setup(_linen(), _distillation(), optax.sgd(0.1))
  with pytest.raises(ValueError, match='soft_targets needs a teacher'):
    train_step(state, _batch(), jax.random.key(0))


def test_batch_statistics_update_in_training_only():
  student_fn, variables = _linen_norm()
  train_step, state = _setup(
    (student_fn, variables), objectives.hard_labels(), optax.sgd(0.1)
  )
  new, _ = jax.jit(train_step)(state, _batch(), jax.random.key(0))
  mean = new.model_state['batch_stats']['norm1']['mean']
  assert jnp.abs(mean).max() > 0
  evaluate = jax.jit(lambda v: student_fn(v, _batch(), train=False))
  out = evaluate({'params': new.params, **new.model_state})
  _equal(out.model_state, new.model_state)


def test_an_objective_with_parameters_needs_its_own_optimizer():
  regressor = objectives.Objective(
    lambda inputs: ({'kernel': jnp.ones(2)}, {}),
    lambda params, state, inputs: (jnp.sum(params['kernel']), state, {}),
  )
  student_fn = adapters.from_apply(lambda params, x: x @ params)
  arguments = (student_fn, regressor, optax.sgd(0.1), {'params': jnp.ones(2)})
  batch = {'image': jnp.ones((3, 2))}
  with pytest.raises(ValueError, match='give make_train_step and init_state'):
    step.init_state(*arguments, batch)
  step.init_state(*arguments, batch, objective_tx=optax.sgd(0.1))
