"""Recipes of compression: words, phases, one train step, and the integers."""

import importlib.util
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quantized_models import trained

from kd_jax import objectives, prune
from kd_jax.recipe.compression import Compression, Phase
from kd_jax.recipe.words import Training, Uncompressed
from kd_jax.step import init_state, make_train_step

CONFIG = pathlib.Path(__file__).parent.parent / 'configs' / 'digits.py'
STEPS, EPOCH = 8, 2
pytestmark = pytest.mark.once


def _recipe(**changes):
  spec = importlib.util.spec_from_file_location('digits', CONFIG)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  recipe = module.get_config('tiny').compress
  recipe.prune.update(every=1, sparsity=0.5)
  for key, value in changes.items():
    part, field = key.split('__')
    recipe[part][field] = value
  return recipe


def _compression(name='cnn', variables=None, **changes):
  model, start, batch = trained(name)
  variables = start if variables is None else variables
  network = Uncompressed(model, variables, batch)
  made = Compression(_recipe(**changes), network, Training(STEPS, EPOCH))
  return made, batch


def _train(made, batch):
  """Trains in one compiled step; the state after every step."""
  labels = np.arange(len(batch['image'])) % 3
  batch = {**batch, 'label': labels}
  tx = made.wrap(optax.adam(0.01))
  objective = objectives.hard_labels()
  step = jax.jit(
    make_train_step(made.make(), objective, tx, params_fn=made.params_fn)
  )
  states = [init_state(made.make(), objective, tx, made.start(), batch)]
  for _ in range(STEPS):
    state, metrics = step(states[-1], batch, jax.random.key(0))
    assert np.isfinite(metrics['loss/total'])
    states.append(state)
  assert step._cache_size() == 1
  return states


def _variables(state):
  params = prune.apply_masks(state.params, prune.masks_of(state.opt_state))
  return {'params': params, **state.model_state}


def _run(forward, variables, batch):
  return jax.jit(lambda v, b: forward(v, b).output)(variables, batch)


def _zeros(params):
  kernels = [
    np.asarray(w)
    for path, w in jax.tree_util.tree_leaves_with_path(params)
    if path[-1].key == 'kernel'
  ]
  return sum((w == 0).sum() for w in kernels), sum(w.size for w in kernels)


FLOAT = (('.*', 'float'),)
VARIANTS = {
  'default': {},
  'taylor and erk': {'prune__score': 'taylor', 'prune__scope': 'erk'},
  'once, by layer': {'prune__schedule': 'once', 'prune__scope': 'layer'},
  'blocks': {'prune__structure': '2x2', 'prune__schedule': 'linear'},
  'revived': {'prune__revive': 'gradient', 'prune__score': 'fisher'},
  'sparse': {'prune__method': 'sparse', 'prune__grow': 'random'},
  'straight through': {'prune__method': 'straight_through'},
  'int4': {'quantize__weights': (('.*/kernel', 'int4'),)},
  'observers': {
    'quantize__observer': 'percentile',
    'quantize__weight_observer': 'octav',
  },
  'late and frozen': {'quantize__begin': '25%', 'quantize__freeze': '3 epochs'},
  'lsq': {'quantize__ranges': 'lsq'},
  'pact': {'quantize__ranges': 'pact'},
  'dynamic': {'quantize__activations': (('.*', 'int8_dynamic'),)},
  'weights alone': {'quantize__activations': FLOAT},
  'float': {'quantize__activations': FLOAT, 'quantize__weights': FLOAT},
}


@pytest.mark.parametrize('name', VARIANTS)
def test_a_recipe_trains_in_one_step_and_becomes_integers(name):
  made, batch = _compression(**VARIANTS[name])
  states = _train(made, batch)
  variables = made.finish(_variables(states[-1]))
  zeros, size = _zeros(variables['params'])
  assert zeros >= (size * 0.49 if name == 'blocks' else round(size * 0.5))
  want = _run(made.make(), made.simulated(variables), batch)
  converted = made.convert(variables)
  forward = made.integer_forward(converted.overrides)
  got = _run(forward, converted.variables, batch)
  # Half a step of the bias; and of few outputs, codes on an edge.
  scale, errors = np.ptp(want), np.abs(got - want)
  assert np.quantile(errors, 0.8) <= 0.01 * scale
  assert errors.max() <= 0.06 * scale
  codes = [w.dtype for w in jax.tree.leaves(converted.variables.get('int8'))]
  kind = {'int4': 'uint8', 'float': None}.get(name, 'int8')
  assert (jnp.dtype(kind) in codes) if kind else not codes
  plain = _run(made.make(), variables, batch)
  if name not in ('float', 'lsq'):
    assert np.abs(plain - want).max() > 1e-4 * scale


@pytest.mark.parametrize('name', ['float', 'weights alone'])
def test_integers_compute_in_float32_whatever_a_model_trains_in(name):
  model, variables, batch = trained('cnn')
  network = Uncompressed(model.clone(dtype='bfloat16'), variables, batch)
  recipe = _recipe(**VARIANTS[name])
  made = Compression(recipe, network, Training(STEPS, EPOCH))
  converted = made.convert(variables)
  forward = made.integer_forward(converted.overrides)
  traced = jax.make_jaxpr(lambda v: forward(v, batch).output)
  assert 'bf16' not in str(traced(converted.variables))
  assert 'bf16' in str(jax.make_jaxpr(made.make())(variables, batch))


def test_neurons_are_masked_in_training_and_removed_at_the_end():
  made, batch = _compression(prune__structure='neurons')
  units = sum(group.size for group in made.pruning.plan.groups)
  states = _train(made, batch)
  for step, state in enumerate(states):
    kept = prune.kept_from_masks(
      made.pruning.plan, prune.masks_of(state.opt_state)
    )
    gone = units - sum(map(len, kept.values()))
    assert gone == round(
      units * float(made.pruning.schedule()(max(step - 1, 0)))
    )
  variables = made.finish(_variables(states[-1]))
  want = _run(made.make(), made.simulated(variables), batch)
  converted = made.convert(variables)
  sizes = [
    sum(w.size for w in jax.tree.leaves(tree))
    for tree in (variables['params'], converted.variables['int8'])
  ]
  assert sizes[1] < 0.6 * sizes[0]
  forward = made.integer_forward(converted.overrides)
  got = _run(forward, converted.variables, batch)
  np.testing.assert_allclose(got, want, atol=0.03 * np.ptp(want))


def test_residual_blocks_are_masked_in_training_and_removed_at_the_end():
  made, batch = _compression('vit', prune__structure='residual_blocks')
  states = _train(made, batch)
  gone = made.pruning.blocks.gone(prune.masks_of(states[-1].opt_state))
  assert len(gone) == 1 and len(made.pruning.blocks.names) == 2
  variables = made.finish(_variables(states[-1]))
  want = _run(made.make(), made.simulated(variables), batch)
  converted = made.convert(variables)
  assert converted.overrides == {gone[0]: None}
  for collection in converted.variables.values():
    assert gone[0] not in collection
  forward = made.integer_forward(converted.overrides)
  got = _run(forward, converted.variables, batch)
  np.testing.assert_allclose(got, want, atol=0.03 * np.ptp(want))
  rows = made.parity(converted, batch)
  assert rows and not any(row['layer'].startswith(gone[0]) for row in rows)
  with pytest.raises(ValueError, match='the model has none'):
    _compression('cnn', prune__structure='residual_blocks')[0].wrap(None)


def test_residual_blocks_with_masks_behind_and_rules_for_what_leaves():
  changes = {
    'prune__structure': 'residual_blocks',
    'prune__method': 'straight_through',
    'quantize__weights': (
      ('block1/.*/kernel', 'int4'),
      ('block2/.*/kernel', 'int4'),
      ('.*/kernel', 'int8'),
    ),
  }
  made, batch = _compression('vit', **changes)
  variables = made.finish(_variables(_train(made, batch)[-1]))
  converted = made.convert(variables)
  (gone,) = converted.overrides
  assert gone in ('block1', 'block2') and gone not in converted.folded['params']
  assert made.parity(converted, batch)


def test_what_is_zero_stays_so_while_it_is_quantized():
  _, variables, _ = trained('cnn')
  masks = prune.magnitude_masks(variables['params'], 0.6, [('.*/kernel', True)])
  variables['params'] = prune.apply_masks(variables['params'], masks)
  made, batch = _compression(
    variables=variables, prune__method='preserve', prune__sparsity=0.0
  )
  states = _train(made, batch)
  for before, after in itertools.pairwise(states):
    assert _zeros(before.params) == _zeros(after.params)
  found = prune.masks_of(states[-1].opt_state)
  for name, mask in masks.items():
    np.testing.assert_array_equal(found[name], mask)
  kernel = states[-1].params['conv1']['kernel']
  assert (kernel != variables['params']['conv1']['kernel']).any()


def test_rounding_begins_and_statistics_stop_where_the_recipe_says():
  made, batch = _compression(
    quantize__begin='2 steps', quantize__freeze='50%', prune__sparsity=0.0
  )
  assert made.phases() == [
    Phase('dense', 0, 2),
    Phase('quantize', 2, 4),
    Phase('freeze', 4, 8),
  ]
  states = _train(made, batch)
  for step, state in enumerate(states):
    params = made.params_fn(state.params, state.step)
    same = (params['head']['kernel'] == state.params['head']['kernel']).all()
    assert same == (step < 2)
  ranges = [s.model_state['quant_stats']['head']['input0'] for s in states]
  means = [s.model_state['batch_stats']['norm1']['mean'] for s in states]
  for i in range(1, STEPS):
    moved = bool(ranges[i + 1]['high'] != ranges[i]['high'])
    assert moved == (i < 4)
    assert bool((means[i + 1] != means[i]).any()) == (i < 4)


def test_phases_follow_one_another():
  made, _ = _compression(
    prune__begin='1 steps',
    prune__end='2 epochs',
    quantize__begin='75%',
    quantize__freeze='7 steps',
  )
  assert made.phases() == [
    Phase('dense', 0, 1),
    Phase('prune', 1, 4),
    Phase('recover', 4, 6),
    Phase('quantize', 6, 7),
    Phase('freeze', 7, 8),
  ]
  assert _compression(
    quantize__weights=FLOAT, quantize__activations=FLOAT, prune__end='100%'
  )[0].phases() == [Phase('prune', 0, 8)]
  sparse, _ = _compression(
    prune__method='sparse', prune__schedule='once', quantize__begin='50%'
  )
  assert sparse.phases()[0] == Phase('prune', 0, 4)


@pytest.mark.parametrize('schedule', ['cubic', 'linear'])
@pytest.mark.parametrize('every', [1, 3, 100])
def test_an_end_after_all_steps_is_reached_in_the_last(schedule, every):
  made, _ = _compression(
    prune__end='100%', prune__schedule=schedule, prune__every=every
  )
  last = made.pruning.schedule()(STEPS - 1)
  np.testing.assert_allclose(last, made.pruning.recipe.sparsity, rtol=1e-6)


@pytest.mark.parametrize('decay', [0.25, 0.9])
def test_the_average_of_ranges_decays_as_it_is_told(decay):
  made, _ = _compression(quantize__observer_decay=decay)
  observer = made.quantization.observer()
  seen = observer.init()
  for largest in (1.0, 3.0):
    seen = observer.update(seen, jnp.array([0.0, largest]), None)
  _, high = observer.range(seen)
  np.testing.assert_allclose(high, decay * 1 + (1 - decay) * 3, rtol=1e-5)


def test_learned_ranges_are_signed_where_inputs_are():
  lsq, _ = _compression(quantize__ranges='lsq')
  rules = dict(lsq.quantization.rules('activations'))
  assert rules['conv1'].symmetric and not rules['conv2'].symmetric
  pact, _ = _compression(quantize__ranges='pact')
  rules = dict(pact.quantization.rules('activations'))
  assert rules['conv1'] is None and rules['conv2'] is not None


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'prune__score': 'taylr'}, "prune.score 'taylr'.*taylor"),
    ({'prune__method': 'slowly'}, "prune.method 'slowly'"),
    ({'prune__structure': '2-4'}, "prune.structure '2-4'.*2:4"),
    (
      {'prune__structure': '2:4', 'prune__sparsity': 0.8},
      "structure='2:4' prunes a share of 0.5: prune.sparsity=0.8 is more",
    ),
    ({'prune__schedule': 'cubik'}, "prune.schedule 'cubik'.*cubic"),
    (
      {'prune__begin': '3 weeks'},
      "prune.begin='3 weeks' is no point.*12 epochs",
    ),
    ({'prune__begin': '100%'}, "prune.begin='100%' is not before"),
    (
      {'prune__method': 'straight_through', 'prune__begin': '100%'},
      "prune.begin='100%' is not before",
    ),
    (
      {'prune__method': 'sparse', 'prune__begin': '10%'},
      "sparse from the first step: prune.begin must be '0%', not '10%'",
    ),
    (
      {'prune__begin': '60%', 'prune__end': '50%'},
      "prune.end='50%' is before prune.begin='60%'",
    ),
    (
      {
        'quantize__activations': (('.*', 'int8_dynamic'),),
        'quantize__begin': '50%',
      },
      "'int8_dynamic' rounds from the first step on: quantize.begin must be",
    ),
    ({'quantize__ranges': 'lsqq'}, "quantize.ranges 'lsqq'"),
    ({'quantize__observer': 'emma'}, "quantize.observer 'emma'.*ema"),
    ({'quantize__weight_observer': 'ema'}, "quantize.weight_observer 'ema'"),
    ({'quantize__weights': (('.*', 'int7'),)}, "quantize.weights 'int7'"),
    (
      {'quantize__ranges': 'lsq', 'quantize__begin': '10%'},
      "quantize.begin must be '0%'",
    ),
    (
      {'quantize__ranges': 'lsq', 'prune__structure': 'neurons'},
      'needs other ranges',
    ),
    ({'prune__structure': 'neurons', 'prune__keep': ('.*',)}, 'no unit can'),
  ],
)
def test_a_bad_word_gets_one_sentence(changes, message):
  with pytest.raises(ValueError, match=message):
    made, _ = _compression(**changes)
    made.wrap(optax.sgd(0.1))
    made.start()
    made.params_fn(trained('cnn')[1]['params'], 0)


def test_moments_are_rounded_and_end_with_the_training():
  at = Training(steps=10, epoch_steps=3).at
  points = ('33%', '0.5 epochs', '1 step', '99 steps')
  assert [at(point, 'prune.end') for point in points] == [3, 2, 1, 10]
