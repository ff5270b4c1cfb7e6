"""Schemes of distillation through a run: who teaches whom, and how it runs."""

import functools
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
import safetensors.numpy

from kd_jax import (
  adapters,
  cli,
  data,
  defaults,
  losses,
  methods,
  models,
  networks,
  objectives,
  step,
  tasks,
)
from kd_jax.recipe import (
  assess,
  compare,
  evaluation,
  protocol,
  schemes,
  stages,
)
from kd_jax.recipe.run import Run
from kd_jax.report import comparison
from kd_jax.storage import weights
from kd_jax.storage.workdir import Workdir
from kd_jax.types import Forward

ROOT = pathlib.Path(__file__).parent.parent
X = jnp.array([[1.0, -2.0, 0.5], [0.0, 1.0, 3.0]])


def _scaled(factor):
  """A network without parameters whose logits are its input times a factor."""

  def forward(variables, batch, rng=None, *, train=False):
    logits = factor * batch['image'] * variables['params']['w']
    return Forward(logits, {'tap': logits + 1}, {'seen': variables['seen'] + 1})

  return forward


NETWORKS = {'a': _scaled(1.0), 'b': _scaled(3.0)}
VARIABLES_OF = {
  'a': {'params': {'w': jnp.float32(1)}, 'seen': jnp.int32(0)},
  'b': {'params': {'w': jnp.float32(2)}, 'seen': jnp.int32(5)},
}
VARIABLES = networks.combine_variables(VARIABLES_OF)


@pytest.mark.parametrize('shares', [None, {'a': 3.0, 'b': 1.0}])
# Of tokens, and as many sequences as networks, which must not be taken for one.
@pytest.mark.parametrize('shape', [(2, 3), (2, 1, 3), (1, 2, 3), (1, 1, 2, 3)])
def test_an_ensemble_averages_logits_or_probabilities(shares, shape):
  x = X.reshape(shape)
  a, b = x, 6 * x
  w = 0.5 if shares is None else 0.75
  make = functools.partial(networks.combine, NETWORKS, weights=shares)
  out = make(space='logits')(VARIABLES, {'image': x})
  np.testing.assert_allclose(out.output, w * a + (1 - w) * b, rtol=1e-6)
  mixed = make(space='probabilities')(VARIABLES, {'image': x})
  want = w * jax.nn.softmax(a) + (1 - w) * jax.nn.softmax(b)
  np.testing.assert_allclose(jax.nn.softmax(mixed.output), want, rtol=1e-5)
  first = make(space='first')(VARIABLES, {'image': x})
  np.testing.assert_array_equal(first.output, a)
  assert set(out.features) == {'a/output', 'a/tap', 'b/output', 'b/tap'}
  assert jax.device_get(out.model_state) == {'seen': {'a': 1, 'b': 6}}


def test_an_ensemble_of_losses_is_the_mean_of_the_losses():
  kd = objectives.soft_targets(temperature=2.0)
  tap = objectives.on_features(losses.hint, student='output', teacher='tap')
  each = objectives.each_teacher(
    {'a': kd, 'b': tap}, weights={'a': 1.0, 'b': 3.0}
  )
  assert each.taps.teacher == ('b/tap',)
  teacher = networks.combine(NETWORKS)(VARIABLES, {'image': X})
  student = 0.1 * X
  inputs = objectives.Inputs(
    Forward(student),
    teacher,
    {},
    jnp.int32(0),
    jax.random.key(0),
    teacher_variables=VARIABLES,
  )
  loss, _, _ = each.apply(*each.init(inputs), inputs)
  want = losses.kl_divergence(student, X, temperature=2.0).mean()
  want = (want + 3 * losses.hint(student, 6 * X + 1).mean()) / 4
  np.testing.assert_allclose(loss, want, rtol=1e-6)


GRADIENT_TERMS = {
  'input_gradients': objectives.input_gradients(),
  'sobolev': objectives.sobolev(projections=2),
}


@pytest.mark.parametrize('name', GRADIENT_TERMS)
@pytest.mark.parametrize('role', ['student', 'teacher'])
def test_terms_that_run_a_network_again_run_the_member(name, role):
  term, batch = GRADIENT_TERMS[name], {'image': X, 'label': jnp.array([0, 1])}
  other = 'teacher' if role == 'student' else 'student'
  single, alone = _scaled(2.0), VARIABLES_OF['b']

  def inputs_of(network, variables):
    made = {
      role: network(variables, batch),
      f'{role}_fn': network,
      f'{role}_variables': variables,
      other: single(alone, batch),
      f'{other}_fn': single,
      f'{other}_variables': alone,
    }
    key = jax.random.key(0)
    return objectives.Inputs(batch=batch, step=jnp.int32(0), rng=key, **made)

  make = getattr(objectives, f'each_{role}')
  inputs = inputs_of(networks.combine(NETWORKS), VARIABLES)
  for member in NETWORKS:
    each = make({member: term})
    loss, _, _ = each.apply(*each.init(inputs), inputs)
    own = inputs_of(NETWORKS[member], VARIABLES_OF[member])
    own = own._replace(rng=jax.random.fold_in(own.rng, 0))
    want, _, _ = term.apply(*term.init(own), own)
    np.testing.assert_allclose(loss, want.mean(), rtol=1e-5)
    assert want.mean() > 0


def test_a_member_of_a_cohort_may_have_an_average_for_a_teacher():
  own = objectives.ema_teacher(objectives.regression(to='teacher'), decay=0.5)
  each, network = (
    objectives.each_student({'b': own}),
    networks.combine(NETWORKS),
  )
  batch = {'image': X}
  inputs = objectives.Inputs(
    network(VARIABLES, batch),
    None,
    batch,
    jnp.int32(0),
    jax.random.key(0),
    student_fn=network,
    student_variables=VARIABLES,
  )
  loss, state, _ = each.apply(*each.init(inputs), inputs)
  assert float(state['b']['average']['w']) == 2.0 and float(loss) == 0.0


@pytest.mark.parametrize('step', [0, 5])
def test_a_mean_whose_weights_all_begin_at_zero_is_finite(step):
  rising = objectives.schedule(end=1.0, until=10)
  each = objectives.each_teacher(
    dict.fromkeys('ab', objectives.soft_targets()),
    weights=dict.fromkeys('ab', rising),
  )
  teacher = networks.combine(NETWORKS)(VARIABLES, {'image': X})
  inputs = objectives.Inputs(
    Forward(0.1 * X),
    teacher,
    {},
    jnp.int32(step),
    jax.random.key(0),
    teacher_variables=VARIABLES,
  )
  loss, _, _ = each.apply(*each.init(inputs), inputs)
  assert (loss > 0) if step else (loss == 0)


def test_mistakes_in_ensembles_are_named():
  kd = objectives.soft_targets()
  for weights_ in ({'a': 0.0, 'b': 0.0}, {'a': 1.0, 'b': -1.0}):
    with pytest.raises(ValueError, match='positive sum'):
      objectives.each_teacher({'a': kd, 'b': kd}, weights=weights_)

  with pytest.raises(ValueError, match="space='mean' is not one of logits"):
    networks.combine(NETWORKS, space='mean')
  with pytest.raises(ValueError, match='weights for a, but the networks'):
    networks.combine(NETWORKS, weights={'a': 1.0})
  with pytest.raises(ValueError, match='no networks to combine'):
    networks.combine({})
  with pytest.raises(ValueError, match='positive sum'):
    networks.combine(NETWORKS, weights={'a': 0.0, 'b': 0.0})
  with pytest.raises(ValueError, match="There is no network 'c'"):
    forward = networks.combine(NETWORKS)(VARIABLES, {'image': X})
    kd = objectives.each_student({'c': objectives.hard_labels()})
    kd.init(
      objectives.Inputs(forward, None, {}, jnp.int32(0), jax.random.key(0))
    )
  with pytest.raises(ValueError, match='two students at least'):
    objectives.mutual(['a'])


def test_mutual_learning_moves_every_student_towards_its_peers():
  objective = objectives.mutual(['a', 'b'], temperature=2.0)

  def loss(variables):
    forward = networks.combine(NETWORKS)(variables, {'image': X})
    inputs = objectives.Inputs(forward, None, {}, jnp.int32(0), None)
    return jnp.mean(objective.apply({}, {}, inputs)[0])

  value, grads = jax.value_and_grad(loss, allow_int=True)(VARIABLES)
  both = losses.kl_divergence(X, 6 * X, temperature=2.0).mean()
  both += losses.kl_divergence(6 * X, X, temperature=2.0).mean()
  np.testing.assert_allclose(value, both / 2, rtol=1e-6)
  # The peer is constant: only the own KL reaches a student.
  for name, other in (('a', 6 * X), ('b', X)):
    own = jax.grad(
      lambda w, name=name, other=other: losses.kl_divergence(
        {'a': 1.0, 'b': 3.0}[name] * w * X, other, temperature=2.0
      ).mean()
    )(VARIABLES['params'][name]['w'])
    np.testing.assert_allclose(grads['params'][name]['w'], own / 2, rtol=1e-5)


def test_ema_teacher_is_the_average_of_the_students_parameters():
  def student(v, b, rng=None, *, train=False):
    return Forward(jnp.einsum('bi,ij->bj', b['image'], v['params']['w']))

  batch = {'image': X, 'label': jnp.array([0, 2])}
  objective = objectives.weighted_sum(
    {
      'ce': (1.0, objectives.hard_labels()),
      'ema': (
        1.0,
        objectives.ema_teacher(objectives.soft_targets(), decay=0.75),
      ),
    }
  )
  tx = optax.sgd(0.3)
  train_step = jax.jit(step.make_train_step(student, objective, tx))
  state = step.init_state(
    student, objective, tx, {'params': {'w': jnp.eye(3)}}, batch
  )
  average = np.eye(3)
  for _ in range(4):
    before = np.asarray(state.params['w'])
    average = 0.75 * average + 0.25 * before
    state, metrics = train_step(state, batch, jax.random.key(0))
    got = state.objective.state['ema']['average']['w']
    np.testing.assert_allclose(got, average, rtol=1e-5)
    want = losses.kl_divergence(X @ before, X @ average.astype('f')).mean()
    np.testing.assert_allclose(metrics['loss/ema'], want, rtol=1e-3, atol=1e-6)


def test_a_teacher_sees_its_own_normalisation_and_resolution():
  def network(v, b, rng=None, *, train=False):
    return Forward(b['image'])

  image = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
  renormalize = functools.partial(
    data.renormalize, mean=mean, std=std, to_mean=(0.5,) * 3, to_std=(1.0,) * 3
  )
  out = networks.with_input(network, renormalize)({}, {'image': image}).output
  pixels = image * jnp.array(std).reshape(1, 1, 1, 3)
  pixels += jnp.array(mean).reshape(1, 1, 1, 3)
  np.testing.assert_allclose(out, pixels - 0.5, atol=1e-6)
  larger = networks.with_input(network, functools.partial(data.resize, size=16))
  assert larger({}, {'image': image}).output.shape == (2, 16, 16, 3)


def test_cast_params_leaves_statistics_and_integers():
  variables = {
    'params': {'w': jnp.ones(2), 'n': jnp.ones(2, jnp.int32)},
    'batch_stats': {'mean': jnp.ones(2)},
  }
  cast = networks.cast_params(variables, 'bfloat16')
  assert cast['params']['w'].dtype == jnp.bfloat16
  assert cast['params']['n'].dtype == jnp.int32
  assert cast['batch_stats']['mean'].dtype == jnp.float32


# --- through a run


def _tiny(name):
  path = ROOT / 'configs' / f'{name}.py'
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config('tiny')


def _config():
  config = _tiny('digits')
  config.data.max_examples = 64
  config.eval_batch_size = 32
  for part in (config.teacher, config.alone, config.distill, config.compress):
    part.train.batch_size = 32
  config.teacher.model = {'name': 'cnn', 'widths': (6, 8)}
  config.student.model = {'name': 'cnn', 'widths': (3, 4)}
  return ml_collections.ConfigDict(config.to_dict())


def _run(tmp_path, data_dir, change=lambda config: None, then=('distill',)):
  config = _config()
  config.data.data_dir = str(data_dir)
  with config.unlocked():
    change(config)
  run = Run(config, Workdir(tmp_path / 'run', config.to_dict()))
  stages.run_stages(run, ['teacher', *then], say=lambda line: None)
  return run


def _changed(run, where='distill'):
  """Whether training moved the weights away from where they started."""
  model = run.model('student')
  start = adapters.init_linen(model, run.rng(where), run.example)['params']
  end = weights.load_weights(run.workdir.weights(where))['params']
  return {
    name: bool(np.any(np.asarray(a) != np.asarray(b)))
    for (name, a), b in zip(_flat(start), jax.tree.leaves(end), strict=True)
  }


def _flat(tree):
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield jax.tree_util.keystr(path, simple=True, separator='/'), leaf


@pytest.mark.once
@pytest.mark.slow
def test_an_assistant_and_a_generation_teach_the_next(tmp_path, data_dir):
  def change(config):
    scheme = config.distill.scheme
    scheme.assistants = {'middle': {'name': 'cnn', 'widths': (4, 6)}}
    scheme.generations = 2

  run = _run(tmp_path, data_dir, change)
  for where in ('distill/middle', 'distill/generation1', 'distill'):
    result = run.workdir.result(where)
    assert result['steps'] == 2
    assert all('loss/kd' in row for row in result['history'])
  middle = weights.load_weights(run.workdir.weights('distill/middle'))
  assert middle['params']['conv1']['kernel'].shape[-1] == 4
  first, last = (
    weights.load_weights(run.workdir.weights(w))['params']['conv1']['kernel']
    for w in ('distill/generation1', 'distill')
  )
  assert np.any(np.asarray(first) != np.asarray(last))


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize('space', ['logits', 'probabilities', 'losses'])
def test_an_ensemble_of_two_architectures_teaches(tmp_path, data_dir, space):
  def change(config):
    config.teacher.others = {'mlp': {'name': 'mlp', 'hidden': (8,)}}
    config.teacher.space = space
    config.teacher.weights = {'teacher': 2.0, 'mlp': 1.0}
    if space == 'losses':
      config.distill.terms.rkd = {'name': 'relational', 'weight': 0.1}

  run = _run(tmp_path, data_dir, change)
  assert run.workdir.done('teacher/mlp') and all(_changed(run).values())
  trained = {row['name']: row['steps'] for row in assess.dropped(run)}
  assert trained == {'teacher (mlp)': 2, 'teacher': 2, 'distilled': 2}
  each = [run.workdir.result(w) for w in ('teacher', 'teacher/mlp')]
  seconds = assess.train_seconds(run, 'teacher')
  assert seconds == sum(result['train_seconds'] for result in each)
  files = [run.workdir.weights(w) for w in ('teacher', 'teacher/mlp')]
  stored = assess.stored_bytes(run, 'teacher')
  assert stored == sum(path.stat().st_size for path in files)
  teacher = run.teacher()
  both = teacher.forward(teacher.variables, run.example)
  parts = [both.features[f'{n}/output'] for n in ('teacher', 'mlp')]
  if space != 'probabilities':
    want = (2 * parts[0] + parts[1]) / 3
    np.testing.assert_allclose(both.output, want, rtol=1e-5, atol=1e-5)
  rows = run.workdir.result('distill')['history']
  assert ('loss/rkd' in rows[0]) == (space == 'losses')


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize('precision', ['bfloat16', 'int8'])
def test_a_teacher_of_lower_precision_says_nearly_the_same(
  tmp_path, data_dir, precision
):
  run = _run(
    tmp_path,
    data_dir,
    lambda config: config.teacher.update({'precision': precision}),
  )
  teacher = run.teacher()
  variables = weights.load_weights(run.workdir.weights('teacher'))
  exact = run.network('teacher', run.model('teacher'), variables)
  batch = run.preprocess(run.splits['test'].read(np.arange(32)), train=False)
  want = np.asarray(exact.forward(exact.variables, batch).output)
  got = np.asarray(teacher.forward(teacher.variables, batch).output, 'f')
  assert np.any(got != want)
  assert np.abs(got - want).max() < 0.1 * np.abs(want).max()
  dtypes = {x.dtype.name for x in jax.tree.leaves(teacher.variables)}
  assert precision in dtypes
  # The products of integers that are counted are those of the float network.
  macs = [
    evaluation.multiply_accumulates(run, network)
    for network in (run.teacher(simulate=True), exact)
  ]
  assert macs[0] == macs[1]
  assert all(_changed(run).values())


@pytest.mark.once
@pytest.mark.slow
def test_a_cohort_is_trained_in_one_step_and_the_first_is_kept(
  tmp_path, data_dir
):
  def change(config):
    config.distill.scheme.update(
      {'cohort': 3, 'mutual_weight': 0.5, 'mutual_temperature': 2.0}
    )
    config.distill.terms.at = {'name': 'attention_transfer', 'weight': 1.0}

  run = _run(tmp_path, data_dir, change)
  rows = run.workdir.result('distill')['history']
  assert rows[0]['loss/mutual'] > 0
  total = 3 * rows[0]['loss/own'] + 1.5 * rows[0]['loss/mutual']
  np.testing.assert_allclose(rows[0]['loss/total'], total, rtol=1e-5)
  own = [rows[0][f'accuracy/student{i}'] for i in range(3)]
  np.testing.assert_allclose(rows[0]['accuracy'], np.mean(own), rtol=1e-6)
  assert all(_changed(run).values())


@pytest.mark.parametrize(
  'scheme, message',
  [
    ({'ema': 0.9, 'generations': 3}, 'ema .*generations=1, not 3'),
    ({'ema': 0.9, 'assistants': {'a': {}}}, 'ema .*assistants={}, not'),
    (
      {'reuse_head': True, 'assistants': {'a': {}}},
      'reuse_head .*assistants={}, not',
    ),
  ],
)
def test_schemes_of_which_one_would_be_ignored_are_refused(scheme, message):
  config = defaults.get_config()
  config.distill.scheme.update(scheme)
  with pytest.raises(ValueError, match=message):
    schemes.check(config.distill.scheme)


def test_the_protocol_names_the_scheme_and_other_images():
  config = defaults.get_config()
  config.data.transfer.name = 'cifar100'
  assert 'same batches' not in ' '.join(protocol.compared(config))
  assert protocol.described(config.distill.scheme) == ''
  config.distill.scheme.reuse_head = True
  assert protocol.described(config.distill.scheme) == "; {'reuse_head': True}"


@pytest.mark.parametrize('other', [{'reuse_head': True}, {'ema': 0.9}])
def test_a_cohort_with_another_scheme_is_refused_before_any_training(
  tmp_path, data_dir, other
):
  def change(config):
    config.distill.scheme.update({'cohort': 2, **other})

  (name,) = other
  with pytest.raises(ValueError, match=f'scheme.{name} .*cohort=1, not 2'):
    _run(tmp_path, data_dir, change, then=('teacher',))
  assert not list(tmp_path.rglob('weights.safetensors'))


@pytest.mark.parametrize('method', ['simkd', 'mean_teacher'])
def test_methods_that_need_one_student_are_not_compared_in_a_cohort(
  tmp_path, data_dir, method
):
  config = _tiny('compare_digits')
  config.data.data_dir = str(data_dir)
  config.distill.scheme.cohort = 2
  config.methods = (method,)
  with pytest.raises(ValueError, match='cohort=1, not 2'):
    compare.compare(config, tmp_path)


@pytest.mark.once
@pytest.mark.slow
def test_a_reused_head_is_the_teachers_and_the_whole_run_goes_on(
  tmp_path, data_dir
):
  def change(config):
    # What teaches is rounded, and the head that is served is not.
    config.teacher.precision = 'bfloat16'
    config.distill.scheme.reuse_head = True
    config.distill.terms = {
      'sim': {'name': 'features', 'weight': 1.0, 'student': 'projector'}
    }

  run = _run(
    tmp_path,
    data_dir,
    change,
    then=('alone', 'distill', 'compress', 'convert'),
  )
  student = weights.load_weights(run.workdir.weights('distill'))
  teacher = weights.load_weights(run.workdir.weights('teacher'))
  for name in ('kernel', 'bias'):
    np.testing.assert_array_equal(
      student['params']['head'][name], teacher['params']['head'][name]
    )
  changed = _changed(run)
  assert all(v for k, v in changed.items() if not k.startswith('head/'))
  assert student['params']['projector']['conv3']['kernel'].shape[-1] == 8


@pytest.mark.once
@pytest.mark.slow
def test_a_mean_teacher_needs_no_other(tmp_path, data_dir):
  run = _run(
    tmp_path,
    data_dir,
    lambda config: config.distill.scheme.update({'ema': 0.9}),
  )
  rows = run.workdir.result('distill')['history']
  assert rows[-1]['loss/kd'] > 0 and all(_changed(run).values())


@pytest.mark.once
@pytest.mark.slow
def test_a_student_learns_from_images_without_labels(tmp_path, data_dir):
  def change(config):
    config.data.transfer = {'name': 'digits', 'max_examples': 96}
    config.distill.terms.ce.weight = 0.0

  run = _run(tmp_path, data_dir, change)
  assert not run.transfer.labelled
  result = run.workdir.result('distill')
  assert result['steps'] == 3
  assert 'loss/ce' not in result['history'][0]
  assert all(_changed(run).values())


@pytest.mark.once
@pytest.mark.slow
def test_labels_that_are_not_there_are_missed(tmp_path, data_dir):
  def change(config):
    config.data.transfer = {'name': 'digits', 'max_examples': 96}

  with pytest.raises(ValueError, match=r"needs batch\['label'\]"):
    _run(tmp_path, data_dir, change)


@pytest.mark.once
@pytest.mark.slow
def test_a_teacher_of_another_resolution_and_mixed_images(tmp_path, data_dir):
  def change(config):
    config.teacher.input = {'size': 12, 'mean': (0.5,), 'std': (0.5,)}
    config.data.mixup = 1.0

  run = _run(tmp_path, data_dir, change)
  assert all(_changed(run).values())


def _as_pytorch(variables):
  """A small CIFAR ResNet under torchvision's names, OIHW."""
  arrays = {}
  for path, x in _flat(variables):
    collection, *names, last = path.split('/')
    place = '.'.join(names)
    for ours, theirs in (
      (r'stem_norm', 'bn1'),
      (r'stem', 'conv1'),
      (r'stage(\d)_block1', r'layer\1.0'),
      (r'layer(\d)\.0', lambda m: f'layer{int(m[1])}.0'),
      (r'conv_shortcut', 'downsample.0'),
      (r'norm_shortcut', 'downsample.1'),
      (r'\bnorm(\d)', r'bn\1'),
      (r'head', 'fc'),
    ):
      place = re.sub(ours, theirs, place)
    x = np.asarray(x)
    if last == 'kernel':
      x = x.transpose((3, 2, 0, 1) if x.ndim == 4 else (1, 0))
    last = {
      'kernel': 'weight',
      'scale': 'weight',
      'mean': 'running_mean',
      'var': 'running_var',
    }.get(last, last)
    arrays[f'{place}.{last}'] = np.ascontiguousarray(x)
  return arrays


@pytest.mark.once
@pytest.mark.slow
def test_a_pretrained_teacher_is_loaded_and_teaches(tmp_path, data_dir):
  model = models.CifarResNet(10, depth=8, width=4)
  variables = adapters.init_linen(
    model, jax.random.key(9), {'image': jnp.zeros((1, 8, 8, 1))}
  )
  path = tmp_path / 'teacher.safetensors'
  safetensors.numpy.save_file(_as_pytorch(variables), path)

  def change(config):
    config.teacher.model = {'name': 'resnet', 'depth': 8, 'width': 4}
    config.teacher.pretrained = str(path)

  run = _run(tmp_path, data_dir, change)
  assert run.workdir.result('teacher')['steps'] == 0
  stored = weights.load_weights(run.workdir.weights('teacher'))
  for (name, a), (_, b) in zip(_flat(stored), _flat(variables), strict=True):
    np.testing.assert_array_equal(a, b, name)
  assert all(_changed(run).values())


def test_every_link_of_a_chain_needs_a_known_model(tmp_path, data_dir):
  config = _config()
  config.data.data_dir = str(data_dir)
  config.distill.scheme.assistants = {'middle': {'name': 'cn'}}
  run = Run(config, Workdir(tmp_path / 'run', config.to_dict()))
  with pytest.raises(ValueError, match="Unknown model 'cn'"):
    run.make_model(config.distill.scheme.assistants.middle.to_dict())


# --- the comparison


@pytest.fixture(scope='module')
def compared(tmp_path_factory, data_dir):
  """A finished tiny comparison: its directory and the words that made it."""
  path = tmp_path_factory.mktemp('compare')
  words = [
    'compare',
    f'--config={ROOT}/configs/compare_digits.py:tiny',
    f'--workdir={path}',
    f'--config.data.data_dir={data_dir}',
    '--config.scales=(1.0, 0.1)',
  ]
  assert cli.main(words) == 0
  return path, words


@pytest.mark.once
@pytest.mark.slow
def test_comparison_has_every_method_and_seed(compared):
  path, _ = compared
  found = comparison.read(path)
  assert [r['name'] for r in found['rows']] == ['teacher', 'alone', 'kd', 'at']
  for row in found['rows']:
    assert len(row['accuracy']) == 2
    assert all(0 <= v <= 1 for v in row['accuracy'])
    assert row['scale'] in (1.0, 0.1)
    if row['name'] != 'teacher':
      assert row['relative_step'] > 0 and row['parameters'] > 0
  text = (path / 'comparison.md').read_text()
  assert 'that of 1, 0.1 which is best on the validation split' in text
  one = comparison.notes({**found, 'scales': [1.0]})
  assert not any('validation split' in note for note in one)
  assert '| KD |' in text and 'attention_transfer' in text
  assert (path / 'comparison.png').stat().st_size > 5000
  # The scales were searched with the first seed only.
  searched = {p.name for p in (path / 'seed0/methods/at').iterdir()}
  assert searched == {'x1', 'x0.1'}
  assert len(list((path / 'seed1/methods/at').iterdir())) == 1


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize('width', [80, 200])
def test_comparison_is_printed_whole(compared, width, monkeypatch, capsys):
  monkeypatch.setenv('COLUMNS', str(width))
  monkeypatch.setenv('TTY_COMPATIBLE', '1')
  found = comparison.read(compared[0])
  comparison.print_table(found)
  shown = capsys.readouterr().out
  header, rows = comparison.cells(found)
  for row in rows:
    for name, cell in zip(header, row, strict=True):
      assert cell in shown or (
        width == 80 and name in ('KL', 'ECE %', 'parameters')
      )
  assert '…' not in shown


@pytest.mark.once
@pytest.mark.slow
def test_comparison_goes_on_and_repeats_nothing(compared, capsys):
  path, words = compared
  before = (path / 'seed0/methods/kd/x1/weights.safetensors').stat().st_mtime_ns
  first = comparison.read(path)
  assert cli.main([*words, "--config.methods=('alone', 'kd', 'at', 'sp')"]) == 0
  after = (path / 'seed0/methods/kd/x1/weights.safetensors').stat().st_mtime_ns
  assert before == after
  again = comparison.read(path)
  rows = {r['name']: r for r in again['rows']}
  assert 'sp' in rows
  for row in first['rows']:
    assert rows[row['name']]['accuracy'] == row['accuracy']


@pytest.mark.once
@pytest.mark.slow
def test_a_comparison_of_another_configuration_is_refused(compared, capsys):
  _, words = compared
  assert cli.main([*words, '--config.distill.train.batch_size=16']) == 2
  assert 'belongs to another configuration' in capsys.readouterr().err
  assert cli.main([*words, "--config.methods=('kdd',)"]) == 2
  assert "Unknown entry of methods 'kdd'" in capsys.readouterr().err


def test_gain_over_the_student_alone_is_taken_seed_by_seed():
  measures = ('accuracy', 'agreement', 'kl', 'calibration_error')

  def row(name, values):
    measured = dict.fromkeys(measures, values)
    return {'name': name, 'title': name, 'parameters': 10, **measured}

  table = {
    'rows': [
      row('alone', [0.5, 0.9]),
      row('kd', [0.6, 1.0]),
      row('teacher', [0.4, 0.4]),
    ]
  }
  header, rows = comparison.cells(table)
  assert [r[0] for r in rows] == ['teacher', 'kd', 'alone']
  gain = header.index('vs alone')
  assert rows[1][gain] == '+10.00 ± 0.00'
  assert rows[2][gain] == rows[0][gain] == '-'


def test_scaled_terms_leave_the_labels_alone():
  terms = compare.scaled_terms(methods.METHODS['dkd'].terms, 0.1)
  assert terms['ce']['weight'] == 1.0
  assert terms['decoupled_kd']['weight']['end'] == pytest.approx(0.1)


def test_weights_of_ones_own_are_scaled_too(tmp_path, data_dir):
  config = _tiny('compare_digits')
  config.data.data_dir = str(data_dir)
  (label,) = set(methods.METHODS['kd'].terms) - {'ce'}
  config.method_options = {'kd': {label: {'weight': 7.0}}}
  run = compare.open_run(config, tmp_path, 0)
  terms = compare.with_method(run, 'kd', 0.1).config.distill.terms
  assert terms[label].weight == pytest.approx(0.7)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'kdd': {}}, "Unknown entry of method_options 'kdd'"),
    ({'kd': {'sp': {'weight': 7.0}}}, "term of method_options.kd: 'sp'"),
  ],
)
def test_options_of_no_method_are_refused(tmp_path, options, message):
  config = _tiny('compare_digits')
  config.method_options = options
  with pytest.raises(ValueError, match=message):
    compare.compare(config, tmp_path)


def test_labels_alone_are_cross_entropy():
  objective = tasks.TASKS['image_classification'].labels()
  inputs = objectives.Inputs(
    Forward(X),
    None,
    {'label': jnp.array([0, 2])},
    jnp.int32(0),
    jax.random.key(0),
  )
  loss, _, _ = objective.apply(*objective.init(inputs), inputs)
  want = losses.cross_entropy(X, jnp.array([0, 2])).mean()
  np.testing.assert_allclose(loss, want, rtol=1e-6)
