"""Mistakes in Python: each gets one sentence that names it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import kd_jax
from kd_jax import (
  data,
  deploy,
  losses,
  metrics,
  models,
  objectives,
  prune,
  quantize,
)

CE = kd_jax.weighted_sum({'ce': (1.0, kd_jax.hard_labels())})
KD = kd_jax.weighted_sum({'kd': (1.0, kd_jax.soft_targets())})
BATCH = {'image': np.ones((4, 3), 'f'), 'label': np.arange(4)}
LINEAR = nn.Dense(5)
VARIABLES = LINEAR.init(jax.random.key(0), BATCH['image'])
TX = optax.sgd(0.1)
CNN = models.CNN(5, widths=(2, 2))
CNN_VARIABLES = CNN.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))


def _fn():
  return kd_jax.from_linen(LINEAR, train_argument=None)


def _state(objective=CE, **options):
  return kd_jax.init_state(_fn(), objective, TX, VARIABLES, BATCH, **options)


def _train(objective=CE, state=None, rng=None, **options):
  step = kd_jax.make_train_step(_fn(), objective, TX, **options)
  rng = jax.random.key(0) if rng is None else rng
  return step(_state() if state is None else state, BATCH, rng)


def _sum(pair):
  return kd_jax.weighted_sum({'ce': pair})


def _compiled(compiler, **options):
  step = kd_jax.make_train_step(_fn(), CE, TX, **options)
  return kd_jax.compile_step(step, kd_jax.make_mesh(), compiler)


def _local(**options):
  term = objectives.on_batch(losses.dist, scope='local')
  objective = kd_jax.weighted_sum({'dist': (1.0, term)})
  taught = {'teacher_fn': _fn(), 'teacher': VARIABLES}
  state = _state(objective, **taught)
  return _train(objective, state, teacher_fn=_fn(), **options)


def _eval(measured, variables=VARIABLES, batch=BATCH):
  return kd_jax.make_eval_step(_fn(), measured)(variables, None, batch)


def _quantized(variables, batches, **options):
  return deploy.post_training_quantize(
    LINEAR,
    variables,
    batches,
    weight_rules=[('kernel', quantize.INT8_WEIGHTS)],
    train_argument=None,
    **options,
  )


def _plan():
  images = {'image': jnp.ones((1, 8, 8, 3))}
  return prune.find_groups(kd_jax.from_linen(CNN), CNN_VARIABLES, images)


def _units(scores):
  return prune.choose_units(_plan(), scores, 0.5)


def _compared():
  step = kd_jax.make_eval_step(_fn(), {'kl': metrics.kl()})
  return step(VARIABLES, None, BATCH)


PAIR = r"'ce' is not \(weight, objective\)"
MISTAKES = {
  'an objective alone': (lambda: _sum(kd_jax.hard_labels()), PAIR),
  'a pair the wrong way': (lambda: _sum((kd_jax.hard_labels(), 1.0)), PAIR),
  'a function of a term': (lambda: _sum((1.0, kd_jax.hard_labels)), PAIR),
  'no weight': (lambda: _sum((None, kd_jax.hard_labels())), PAIR),
  'a weight as text': (lambda: _sum(('1', kd_jax.hard_labels())), PAIR),
  'a list of terms': (
    lambda: kd_jax.weighted_sum([(1.0, kd_jax.hard_labels())]),
    r'terms is name -> \(weight, objective\), not list',
  ),
  'a function as objective': (
    lambda: kd_jax.make_train_step(_fn(), lambda inputs: 0.0, TX),
    'objective is what a function of kd_jax.objectives returns, not function',
  ),
  'a rate as optimizer': (
    lambda: kd_jax.init_state(_fn(), CE, 0.1, VARIABLES, BATCH),
    'tx is an optimizer of optax, not float',
  ),
  'parameters to start': (
    lambda: kd_jax.init_state(_fn(), CE, TX, VARIABLES['params'], BATCH),
    "there is no 'params' among 'kernel', 'bias'",
  ),
  'parameters to measure': (
    lambda: _eval({'top1': metrics.accuracy()}, VARIABLES['params']),
    "there is no 'params' among 'kernel', 'bias'",
  ),
  'names of metrics': (
    lambda: _eval(['accuracy']),
    'metrics is name -> metric, not list',
  ),
  'a function of a metric': (
    lambda: _eval({'top1': metrics.accuracy}),
    r"metrics\['top1'\] is a Metric, such as .*, not function",
  ),
  'parameters to quantize': (
    lambda: _quantized(VARIABLES['params'], [BATCH]),
    "there is no 'params' among 'kernel', 'bias'",
  ),
  'a batch to calibrate with': (
    lambda: _quantized(VARIABLES, BATCH),
    r'batches are several: give \[batch\]',
  ),
  'arrays to calibrate with': (
    lambda: _quantized(VARIABLES, [BATCH['image']]),
    "a batch is name -> array, as {'image': x}, not ndarray",
  ),
  'the name of an observer': (
    lambda: _quantized(VARIABLES, [BATCH], observer='mse'),
    r'observer is as mse\(\) is one, not str',
  ),
  'integers to quantize': (
    lambda: _quantized(_quantized(VARIABLES, [BATCH]), [BATCH]),
    'hold integers already',
  ),
  'labels that are not there': (
    lambda: _eval(
      {'top1': metrics.accuracy()}, batch={'image': BATCH['image']}
    ),
    r"A metric needs batch\['label'\]; the batch has 'image'",
  ),
  'scores of variables': (
    lambda: _units(prune.magnitudes(CNN_VARIABLES)),
    "Unknown parameter 'batch_stats/norm1/mean'",
  ),
  'masks of variables': (
    lambda: prune.kept_from_masks(_plan(), {'params/conv1/kernel': True}),
    "Unknown parameter 'params/conv1/kernel': did you mean conv1/kernel",
  ),
  'ids beyond int32': (
    lambda: data.ArrayData(
      {'x': np.ones(2)}, id=np.array([0, 2**31]), reads='x', num_classes=1
    ),
    'ids are int32, but they go from 0 to 2147483648',
  ),
  'ids that repeat': (
    lambda: data.ArrayData(
      {'x': np.ones(2)}, id=np.zeros(2, int), reads='x', num_classes=1
    ),
    'ids are integers, another for each example',
  ),
  'more than all smoothed': (
    lambda: losses.cross_entropy(
      jnp.ones((2, 3)), jnp.arange(2), label_smoothing=1.5
    ),
    r'label_smoothing=1.5 is not in \[0, 1\)',
  ),
  'a module as student': (
    lambda: kd_jax.make_train_step(LINEAR, CE, TX),
    'student_fn is a module, not a function: kd_jax.from_linen',
  ),
  'a module as teacher': (
    lambda: _train(teacher_fn=LINEAR),
    'teacher_fn is a module, not a function',
  ),
  'a module to start': (
    lambda: kd_jax.init_state(LINEAR, CE, TX, VARIABLES, BATCH),
    'student_fn is a module, not a function',
  ),
  'a state without teacher': (
    lambda: _train(KD, _state(), teacher_fn=_fn()),
    'a teacher_fn and the state no teacher',
  ),
  'a state of other terms': (
    lambda: _train(_sum((1.0, kd_jax.hard_labels())), _state(NAMED)),
    'made for the terms labels, and this objective has ce',
  ),
  'a number as key': (lambda: _train(rng=3), r'jax.random.key\(0\), not 3'),
  'no part': (lambda: _train(accumulate=0), 'accumulate=0 is not a number'),
  'nnx for linen': (
    lambda: kd_jax.from_linen(nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
    'takes a flax.linen module, not Linear: from_nnx',
  ),
  'linen for nnx': (
    lambda: kd_jax.from_nnx(LINEAR),
    'takes an nnx module, not Dense: from_linen',
  ),
  'no comparison without teacher': (_compared, 'give make_eval_step a teacher'),
  'local scope without parts': (_local, r"scope='local' under jit needs"),
  'a step of shard_map under jit': (
    lambda: _compiled('jit', axis_name='data'),
    r"compiler='jit' needs a step .*axis_name=None",
  ),
  'a step of jit under shard_map': (
    lambda: _compiled('shard_map'),
    r"compiler='shard_map' needs a step .*axis_name='data'",
  ),
  'a number as schedule': (
    lambda: prune.prune(TX, 0.5, [('.*', True)]),
    r'takes a schedule, such as constant\(0.5\)',
  ),
  'a pattern as rules': (
    lambda: prune.prune(TX, prune.constant(0.5), '.*/kernel').init(VARIABLES),
    'is a pair of a pattern and a value',
  ),
  'percent as sparsity': (
    lambda: prune.masks_from({'w': jnp.ones(3)}, 80),
    r'share in \[0, 1\), not 80',
  ),
  'float variables on integers': (
    lambda: deploy.integer_forward(models.MLP(5))(VARIABLES, BATCH),
    'These variables hold no integers',
  ),
  'a dictionary as rules': (
    lambda: quantize.fake_quant_params(VARIABLES, {'kernel': 8}),
    'is a pair of a pattern and a value',
  ),
}
NAMED = kd_jax.weighted_sum({'labels': (1.0, kd_jax.hard_labels())})


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_is_named(name):
  run, message = MISTAKES[name]
  with pytest.raises(ValueError, match=message):
    run()


@pytest.mark.parametrize('parts', [1, 2])
def test_local_scope_under_jit_relates_the_examples_of_a_part(parts):
  state, metrics = _local(num_shards=parts)
  assert int(state.step) == 1
  assert np.isfinite(metrics['loss/dist'])


def test_a_wrapped_step_may_be_compiled_for_any_mesh():
  step = kd_jax.make_train_step(_fn(), CE, TX)
  wrapped = functools.partial(step)
  assert kd_jax.compile_step(wrapped, kd_jax.make_mesh(), 'jit').traces == []
