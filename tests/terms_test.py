"""Every term that a configuration can name, on small plain functions.

A new term is one entry of `terms.TERMS`; this suite finds it there.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax import data, losses, objectives, sharding, step, terms
from kd_jax.data import cache_form
from kd_jax.models import Taps
from kd_jax.objectives.contrastive import OtherClasses
from kd_jax.types import Forward

CLASSES, BATCH, TOKENS = 5, 16, 6
IDS = 24


def _pool(x):
  b, h, w, d = x.shape
  return x.reshape(b, h // 2, 2, w // 2, 2, d).mean((2, 4))


def _network(variables, batch, rng=None, *, train=False):
  """Two stages of maps, an embedding and a head; no randomness, no state."""
  p, x = variables['params'], batch['image']
  features = {}
  for name in ('stage1', 'stage2'):
    x = jnp.einsum('bhwi,io->bhwo', x, p[name]['kernel'])
    norm = p[f'{name}_norm']
    x = x * norm['scale'].reshape(1, 1, 1, -1)
    x = x + norm['bias'].reshape(1, 1, 1, -1)
    features[f'{name}/pre'] = x
    features[name] = x = jax.nn.relu(x)
    x = _pool(x)
  features['stage2'] = features['stage2']
  features['pool'] = x = features['stage2'].mean((1, 2))
  features['tokens'] = jnp.einsum('bli,io->blo', batch['tokens'], p['tokens'])
  scores = jnp.einsum('bld,bmd->blm', *2 * [features['tokens']])
  features['scores'] = jnp.stack([scores, -scores], axis=1)
  head = p['head']
  logits = jnp.einsum('bi,io->bo', x, head['kernel']) + head['bias'][None]
  features['head'] = features['head_dist'] = logits
  return Forward(logits, features, {})


def _params(seed, widths, hidden):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return rng.normal(scale=0.6, size=shape).astype('f')

  shapes = itertools.pairwise((3, *widths))
  params = {
    f'stage{i}': {'kernel': normal(*s)} for i, s in enumerate(shapes, 1)
  }
  for i, width in enumerate(widths, 1):
    params[f'stage{i}_norm'] = {
      'scale': 1 + normal(width) / 4,
      'bias': normal(width),
    }
  return params | {
    'head': {'kernel': normal(widths[-1], CLASSES), 'bias': normal(CLASSES)},
    'tokens': normal(4, hidden),
  }


STUDENT = {'params': _params(0, (4, 6), 3)}
TEACHER = {'params': _params(1, (7, 8), 5)}
# The terms that need as many channels in both.
ALIKE = {'params': _params(2, (4, 6), 3)}
EQUAL_WIDTH = {'features', 'flow', 'patient'}
TAPS = Taps(
  stages=('stage1', 'stage2'),
  preactivations=('stage1/pre', 'stage2/pre'),
  norms=('stage1_norm', 'stage2_norm'),
  embedding='pool',
  head='head',
)
OPTIONS = {
  'top_k': {'k': 3},
  'contrastive': {'negatives': 7, 'size': 8},
  'correlation_congruence': {'size': 8},
  'hidden_states': {'student': 'tokens', 'teacher': 'tokens'},
  'hidden_cosine': {'student': 'tokens', 'teacher': 'tokens'},
  'attention_maps': {'student': 'scores', 'teacher': 'scores'},
  'attention_cross_entropy': {'student': 'scores', 'teacher': 'scores'},
  'token_relations': {'student': 'tokens', 'teacher': 'tokens', 'heads': 1},
  'patient': {'student': 'tokens', 'teacher': 'tokens'},
}
# The terms with parameters of their own.
TRAINED = {
  'hints',
  'variational_information',
  'activation_boundary',
  'overhaul',
  'factor_transfer',
  'review',
  'masked_generation',
  'softmax_regression',
  'norm_direction',
  'self_distillation',
  'correlation_congruence',
  'contrastive',
  'hidden_states',
  'hidden_cosine',
}
# Weights of terms whose gradient would vanish beside the parameters.
WEIGHTS = {'probabilistic_transfer': 1e4}
# The terms that relate examples, with `scope`.
SCOPED = {
  'dist',
  'multi_level',
  'relational',
  'similarity_preserving',
  'probabilistic_transfer',
  'correlation_congruence',
}
# Their teacher learns as well, or there is none.
NO_TEACHER = {'hard_labels', 'regression', 'teacher_free', 'self_distillation'}


@functools.cache
def _batch():
  rng = np.random.default_rng(3)
  mask = np.arange(TOKENS)[None] < rng.integers(1, TOKENS + 1, (BATCH, 1))
  return {
    'image': rng.normal(size=(BATCH, 8, 8, 3)).astype('f'),
    'tokens': rng.normal(size=(BATCH, TOKENS, 4)).astype('f'),
    'attention_mask': mask.astype('f'),
    'label': (np.arange(BATCH) % CLASSES).astype('i4'),
    'target': rng.normal(size=(BATCH, CLASSES)).astype('f'),
    'id': rng.permutation(IDS)[:BATCH].astype('i4'),
  }


def _teacher(name):
  return ALIKE if name in EQUAL_WIDTH else TEACHER


def _term(name, **options):
  facts = terms.Facts(
    student=TAPS,
    teacher=TAPS,
    num_classes=CLASSES,
    total_steps=10,
    labels=np.arange(IDS) % CLASSES,
  )
  return terms.make_term(name, facts, **(OPTIONS.get(name, {}) | options))


def _run(name, *, devices=1, compiler='jit', steps=2, **options):
  """Metrics and state after some steps, and the number of traces."""
  objective = objectives.weighted_sum(
    {'term': (WEIGHTS.get(name, 1.0), _term(name, **options))}
  )
  tx, traces = optax.sgd(0.05), []
  pure = step.make_train_step(
    _network,
    objective,
    tx,
    teacher_fn=_network,
    axis_name=sharding.axis_name(compiler),
    num_shards=devices,
    objective_tx=tx,
  )

  def counted(*args):
    traces.append(1)
    return pure(*args)

  state = step.init_state(
    _network,
    objective,
    tx,
    STUDENT,
    _batch(),
    teacher_fn=_network,
    teacher=_teacher(name),
    objective_tx=tx,
  )
  mesh = sharding.make_mesh(jax.devices()[:devices])
  compiled = sharding.compile_step(counted, mesh, compiler, donate=False)
  state, start = sharding.place_state(state, mesh, compiler), state
  batch, history = sharding.shard_batch(_batch(), mesh), []
  for _ in range(steps):
    state, metrics = compiled(state, batch, jax.random.key(7))
    history.append(metrics['loss/term'])
  return jax.device_get(history), state, start, len(traces)


@functools.cache
def _one_device(name):
  return _run(name)


def _moved(before, after):
  return any(
    np.any(np.asarray(a) != np.asarray(b))
    for a, b in zip(
      jax.tree.leaves(before), jax.tree.leaves(after), strict=True
    )
  )


@pytest.mark.parametrize('name', terms.TERMS)
def test_term_trains_the_student_and_what_it_owns(name):
  history, state, start, traces = _one_device(name)
  assert np.isfinite(history).all() and history[0] > 0
  assert traces == 1
  assert all(
    np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(state.params)
  )
  assert _moved(start.params, state.params)
  own = jax.tree.leaves(start.objective.params)
  assert bool(own) == (name in TRAINED)
  if own:
    # Every array: a variance or an embedding left out would not move.
    for (path, a), b in zip(
      jax.tree_util.tree_leaves_with_path(start.objective.params),
      jax.tree.leaves(state.objective.params),
      strict=True,
    ):
      assert np.any(np.asarray(a) != np.asarray(b)), path


@pytest.mark.parametrize('name', terms.TERMS)
def test_terms_parameters_follow_from_shapes_alone(name):
  """`init` under eval_shape: nothing is computed, nothing is read."""
  term = _term(name)

  def init(batch, rng):
    forward = [_network(v, batch) for v in (STUDENT, _teacher(name))]
    inputs = objectives.Inputs(
      *forward,
      batch,
      jnp.int32(0),
      rng,
      student_fn=_network,
      student_variables=STUDENT,
      teacher_fn=_network,
      teacher_variables=_teacher(name),
    )
    return term.init(inputs)

  params, _ = jax.eval_shape(init, _batch(), jax.random.key(0))
  assert bool(jax.tree.leaves(params)) == (name in TRAINED)
  assert {x.dtype for x in jax.tree.leaves(params)} <= {np.dtype('f')}


def _close(got, want, name):
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    scale = max(1.0, float(np.abs(b).max())) if np.size(b) else 1.0
    np.testing.assert_allclose(
      np.asarray(a),
      np.asarray(b),
      rtol=2e-5,
      atol=2e-5 * scale,
      err_msg=f'{name} {jax.tree_util.keystr(path)}',
    )


# CRD draws other negatives on every device of a mapped step.
SAME_NUMBERS = [n for n in terms.TERMS if n != 'contrastive']


@pytest.mark.parametrize('name', terms.TERMS)
def test_eight_devices_equal_one_under_jit(name):
  history, state, _, _ = _one_device(name)
  sharded, sharded_state, _, traces = _run(name, devices=8)
  assert traces == 1
  np.testing.assert_allclose(sharded, history, rtol=2e-5, atol=1e-6)
  _close(sharded_state.params, state.params, name)
  _close(sharded_state.objective.params, state.objective.params, name)


@pytest.mark.parametrize('name', SAME_NUMBERS)
def test_eight_devices_equal_one_under_shard_map(name):
  history, state, _, _ = _one_device(name)
  sharded, sharded_state, _, _ = _run(name, devices=8, compiler='shard_map')
  np.testing.assert_allclose(sharded, history, rtol=2e-5, atol=1e-6)
  _close(sharded_state.params, state.params, name)
  _close(sharded_state.objective.params, state.objective.params, name)


@pytest.mark.parametrize('name', sorted(SCOPED))
def test_local_scope_is_the_mean_over_devices_of_their_own_batches(name):
  """Global relates all examples of the step; local those of one device."""
  whole, _, _, _ = _one_device(name)
  parts = {
    compiler: _run(name, devices=4, compiler=compiler, steps=1, scope='local')[
      0
    ][0]
    for compiler in ('jit', 'shard_map')
  }
  close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-8)
  close(parts['jit'], parts['shard_map'])
  assert abs(parts['jit'] - whole[0]) > 1e-4 * abs(whole[0])
  alone = _run(name, devices=1, steps=1, scope='local')[0][0]
  close(alone, whole[0])


def test_sets_of_names_are_those_of_the_terms():
  assert set(OPTIONS) | TRAINED | SCOPED | EQUAL_WIDTH | NO_TEACHER <= set(
    terms.TERMS
  )
  for name, term in terms.TERMS.items():
    assert term.teacher == (name not in NO_TEACHER)


@pytest.mark.parametrize('name', sorted(set(terms.TERMS) - NO_TEACHER))
def test_term_without_a_teacher_is_refused(name):
  facts = terms.Facts(TAPS, None, CLASSES, 10, np.arange(IDS) % CLASSES)
  with pytest.raises(ValueError, match='needs a teacher'):
    term = terms.make_term(name, facts, **OPTIONS.get(name, {}))
    inputs = objectives.Inputs(
      _network(STUDENT, _batch()),
      None,
      _batch(),
      jnp.int32(0),
      jax.random.key(0),
      student_fn=_network,
      student_variables=STUDENT,
    )
    params, state = term.init(inputs)
    term.apply(params, state, inputs)


def test_an_unknown_scope_is_named():
  with pytest.raises(ValueError, match="scope='batch'.*'global' or 'local'"):
    _run('similarity_preserving', scope='batch')


def test_vid_variances_start_where_they_are_told_and_train():
  _, state, start, _ = _run('variational_information', init_variance=2.0)
  scale = start.objective.params['term']['0']['variance']
  np.testing.assert_allclose(jax.nn.softplus(scale) + 1e-5, 2.0, rtol=1e-5)
  assert _moved(scale, state.objective.params['term']['0']['variance'])


def test_crd_banks_are_sharded_and_updated_by_rows():
  _, state, start, _ = _run('contrastive', devices=8, steps=1)
  own, before = (s.objective.state['term'] for s in (state, start))
  for name in ('bank_student', 'bank_teacher'):
    assert own[name].shape == (128, 8)
    shards = {s.data.shape for s in own[name].addressable_shards}
    assert shards == {(16, 8)}
    changed = np.any(np.asarray(own[name]) != np.asarray(before[name]), axis=1)
    assert set(np.flatnonzero(changed)) == set(_batch()['id'].tolist())
    rows = np.asarray(own[name])[_batch()['id']]
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, rtol=1e-5)
  assert float(own['z_student']) > 0 and float(own['z_teacher']) > 0


def test_crd_constants_are_set_once():
  first = _run('contrastive', steps=1)[1].objective.state['term']
  later = _run('contrastive', steps=3)[1].objective.state['term']
  assert float(first['z_student']) == float(later['z_student'])


def test_crd_negatives_are_uniform_over_the_other_classes():
  labels = np.array([0, 1, 2, 1, -1, 2, 2, 0])
  draws = OtherClasses(labels).draw(
    jax.random.key(0), jnp.array([0, 1, 2]), 6000
  )
  for own, rows in enumerate(np.asarray(draws)):
    others = np.flatnonzero((labels != own) & (labels >= 0))
    counts = np.bincount(rows, minlength=len(labels))
    assert counts[others].sum() == 6000
    np.testing.assert_allclose(counts[others] * len(others) / 6000, 1, atol=0.1)


def test_crd_negatives_are_those_of_all_devices_or_of_the_own_one():
  # Six ids for each of four devices, and four examples of the batch.
  batch = _batch() | {
    'id': np.array([6 * p + i for p in range(4) for i in range(4)], 'i4')
  }
  batch['label'] = batch['id'] % CLASSES
  forward = [_network(v, batch) for v in (STUDENT, TEACHER)]
  inputs = objectives.Inputs(
    *forward, batch, jnp.int32(0), jax.random.key(1), num_shards=4
  )
  reached = {}
  for scope in ('global', 'local'):
    term = _term('contrastive', negatives=100, scope=scope)
    params, state = term.init(inputs)
    state = jax.tree.map(
      lambda x: jnp.ones_like(x) if x.ndim == 0 else x, state
    )
    for bank in ('bank_student', 'bank_teacher'):
      # Rows of the last device's share, which an example touches or not.
      state[bank] = state[bank].at[18:24].set(jnp.nan)
    loss = term.apply(params, state, inputs)[0]
    reached[scope] = np.isnan(np.asarray(loss)).reshape(4, 4).all(axis=1)
  assert reached['global'].tolist() == [True] * 4
  assert reached['local'].tolist() == [False, False, False, True]


def test_crd_draws_the_same_locally_however_the_step_is_compiled():
  parts = [
    _run('contrastive', devices=4, compiler=compiler, scope='local')[0]
    for compiler in ('jit', 'shard_map')
  ]
  np.testing.assert_allclose(*parts, rtol=2e-5)
  alone = _run('contrastive', devices=4, compiler='jit')[0]
  assert not np.allclose(parts[0], alone, rtol=1e-3)


def test_crd_needs_two_classes_on_every_device():
  facts = terms.Facts(TAPS, TAPS, CLASSES, 10, np.sort(np.arange(20) % CLASSES))
  options = OPTIONS['contrastive'] | {'scope': 'local'}
  term = terms.make_term('contrastive', facts, **options)
  forward = [_network(v, _batch()) for v in (STUDENT, TEACHER)]
  inputs = objectives.Inputs(
    *forward, _batch(), jnp.int32(0), jax.random.key(1), num_shards=5
  )
  params, state = term.init(inputs)
  with pytest.raises(ValueError, match="over 5 devices.*scope='global'"):
    term.apply(params, state, inputs)
  with pytest.raises(ValueError, match="scope='batch'"):
    terms.make_term('contrastive', facts, scope='batch')


def test_crd_follows_the_papers_formula():
  """One step, with the embeddings, scores and banks of the term in NumPy."""
  term = _term('contrastive')
  batch = _batch()
  forward = [_network(v, batch) for v in (STUDENT, TEACHER)]
  inputs = objectives.Inputs(*forward, batch, jnp.int32(0), jax.random.key(1))
  params, state = term.init(inputs)
  loss, _, _ = term.apply(params, state, inputs)
  others = OtherClasses(np.arange(IDS) % CLASSES)
  rows = np.concatenate(
    [batch['id'][:, None], others.draw(inputs.rng, batch['label'], 7)], axis=1
  )
  want = 0.0
  for i, (side, other) in enumerate(
    [('student', 'teacher'), ('teacher', 'student')]
  ):
    x = np.asarray(forward[i].features['pool'], np.float64)
    e = x @ np.asarray(params[side]['kernel']) + np.asarray(
      params[side]['bias']
    )
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    bank = np.asarray(state[f'bank_{other}'], np.float64)
    scores = np.exp(np.einsum('bd,bkd->bk', e, bank[rows]) / 0.07)
    p = scores / (scores.mean() * IDS)
    noise = 7 / IDS
    eps = 1e-7
    want += -np.log(p[:, 0] / (p[:, 0] + noise + eps)) - np.log(
      noise / (p[:, 1:] + noise + eps)
    ).sum(1)
  np.testing.assert_allclose(loss, want, rtol=1e-4)


def test_a_class_mean_is_that_of_the_features_seen():
  _, state, _, _ = _run('norm_direction', steps=1)
  own = state.objective.state['term']
  pool = np.asarray(_network(TEACHER, _batch()).features['pool'])
  label = _batch()['label']
  want = np.stack([pool[label == c].sum(0) for c in range(CLASSES)])
  np.testing.assert_allclose(own['sum'], want, rtol=1e-5)


def test_paraphraser_learns_its_reconstruction_alone_at_first():
  first = _run('factor_transfer', steps=1, pretrain_steps=1)[1]
  assert not _moved(first.params, STUDENT['params'])
  assert _moved(
    _run('factor_transfer', steps=2, pretrain_steps=1)[1].params,
    STUDENT['params'],
  )


def test_features_of_other_ranks_are_refused():
  with pytest.raises(ValueError, match='choose taps of one rank'):
    _run('hints', student='stage1', teacher='pool')


def test_numbers_of_taps_must_agree():
  with pytest.raises(ValueError, match='Every student tap needs one teacher'):
    _term('attention_transfer', student=('stage1', 'stage2'), teacher='stage1')


def test_a_feature_that_is_not_tapped_is_named():
  def bare(v, b, rng=None, *, train=False):
    features = {'stag1': jnp.ones((BATCH, 4, 4, 2))}
    return _network(v, b)._replace(features=features)

  objective, tx = (
    _term('attention_transfer', student='stage1', teacher='stage1'),
    optax.sgd(1.0),
  )
  with pytest.raises(ValueError, match="no feature 'stage1'.*mean stag1.*taps"):
    step.init_state(
      bare,
      objectives.weighted_sum({'at': (1.0, objective)}),
      tx,
      STUDENT,
      _batch(),
      teacher_fn=bare,
      teacher=TEACHER,
      objective_tx=tx,
    )


LABELLED = (
  'hard_labels',
  'teacher_free',
  'decoupled_kd',
  'normalized_kd',
  'norm_direction',
  'self_distillation',
  'input_gradients',
)


@pytest.mark.parametrize('name', LABELLED)
def test_labels_of_mixed_images_count_by_their_shares(name):
  term, other = _term(name), (np.arange(BATCH) // 4 + 1).astype('i4')

  def loss(**labels):
    batch = _batch() | labels
    forward = [_network(v, batch) for v in (STUDENT, _teacher(name))]
    inputs = objectives.Inputs(
      *forward,
      batch,
      jnp.int32(0),
      jax.random.key(0),
      student_fn=_network,
      student_variables=STUDENT,
      teacher_fn=_network,
      teacher_variables=_teacher(name),
    )
    return np.mean(term.apply(*term.init(inputs), inputs)[0])

  first, second = loss(), loss(label=other)
  assert abs(first - second) > 2e-4 * abs(first)
  mixed = {
    share: loss(mix_label=other, mix_weight=np.full(BATCH, share, 'f'))
    for share in (1.0, 0.5, 0.0)
  }
  close = functools.partial(np.testing.assert_allclose, rtol=2e-5)
  close([mixed[1.0], mixed[0.0]], [first, second])
  if name not in ('norm_direction', 'input_gradients'):  # linear in the share
    close(mixed[0.5], (first + second) / 2)


def test_every_loss_of_outputs_is_the_mean_that_a_term_reports():
  forward = [_network(v, _batch()) for v in (STUDENT, TEACHER)]
  s, t = (f.output for f in forward)
  label = _batch()['label']
  wanted = {
    'decoupled_kd': losses.decoupled_kd(s, t, label).mean(),
    'dist': losses.dist(s, t),
    'logit_matching': losses.squared_error(s, t).mean(),
    'hard_distillation': losses.hard_distillation(s, t).mean(),
  }
  for name, want in wanted.items():
    np.testing.assert_allclose(_one_device(name)[0][0], want, rtol=1e-5)


def _cached(name, form, **options):
  """The words of one term, checked against what a cache keeps."""
  facts = terms.Facts(
    student=TAPS,
    teacher=TAPS,
    num_classes=CLASSES,
    total_steps=10,
    labels=np.arange(IDS) % CLASSES,
    kept=terms.Kept(form.features, form.top_k, form.temperature),
  )
  words = {'name': name, 'weight': 1.0, **OPTIONS.get(name, {}), **options}
  return terms.make_objective({'mine': words}, facts)


RUN_THE_TEACHER = {'input_gradients', 'sobolev', 'jacobians'}
LIKELIEST = {'top_k', 'hard_distillation', 'distillation_token'}


def _losses(objectives_, forms):
  """name -> the loss with the live teacher, and with what a cache keeps."""

  def losses_of(batch):
    found = {}
    for name, objective in objectives_.items():
      teachers = {'live': _network(_teacher(name), batch)}
      for label, form in forms.items():
        stored = cache_form.pack(teachers['live'], form)
        teachers[label] = cache_form.unpack(stored, classes=CLASSES)
      for label, teacher in teachers.items():
        inputs = objectives.Inputs(
          _network(STUDENT, batch),
          teacher,
          batch,
          jnp.int32(0),
          jax.random.key(0),
          student_fn=_network,
          student_variables=STUDENT,
          teacher_variables=_teacher(name),
        )
        made = objective.init(inputs)
        found[name, label] = objective.apply(*made, inputs)[0]
    return found

  return jax.device_get(jax.jit(losses_of)(_batch()))


@pytest.mark.slow
@pytest.mark.once
def test_a_cached_teacher_gives_every_term_the_loss_of_the_live_one():
  """With all outputs, and with the largest where that is not refused."""
  taps = ('stage1', 'stage2', 'stage1/pre', 'stage2/pre', 'pool', 'tokens')
  full = data.Form('float32', features=(*taps, 'scores'))
  top = data.Form('float32', top_k=3, features=full.features)
  made, refused = {}, set()
  for name in sorted(terms.TERMS.keys() - RUN_THE_TEACHER):
    made[name] = _cached(name, full)
    try:
      _cached(name, top)
    except ValueError as e:
      assert 'reads all outputs of the teacher' in str(e)
      refused.add(name)
  losses_ = _losses(made, {'full': full, 'top': top})
  for name in made:
    labels = ('full',) if name in refused else ('full', 'top')
    for label in labels:
      np.testing.assert_allclose(
        losses_[name, label],
        losses_[name, 'live'],
        rtol=1e-5,
        atol=1e-6,
        err_msg=f'{name} {label}',
      )
    # Nothing is refused that the largest outputs would have sufficed for.
    if name in refused:
      gap = losses_[name, 'top'] - losses_[name, 'live']
      assert np.abs(gap).max() > 1e-5, name
  assert made.keys() - refused >= LIKELIEST


def test_terms_that_a_cache_cannot_serve_are_named():
  outputs, top = data.Form(), data.Form(top_k=2, temperature=4.0)
  for name in RUN_THE_TEACHER:
    with pytest.raises(ValueError, match=f"'mine' .{name}. runs the teacher"):
      _cached(name, outputs)
  with pytest.raises(ValueError, match=r"'mine' .* reads stage1, stage2 of"):
    _cached('attention_transfer', outputs)
  pooled = data.Form(top_k=2, features=('pool',))
  _cached('relational', pooled)
  with pytest.raises(ValueError, match='reads all outputs'):
    _cached('relational', pooled, teacher='output')
  with pytest.raises(ValueError, match='reads all outputs'):
    _cached('regression', top, to='teacher')
  with pytest.raises(ValueError, match='hard=False'):
    _cached('distillation_token', top, hard=False)
  with pytest.raises(ValueError, match='k=3, but the cache holds the 2'):
    _cached('top_k', top, k=3)
  _cached('top_k', top, k=2, temperature=4.0, tail='uniform')
  with pytest.raises(ValueError, match='temperature 2.0, but .* for 4.0'):
    _cached('top_k', top, k=2, temperature=2.0, tail='uniform')


def test_a_temperature_that_begins_at_zero_is_refused():
  facts = terms.Facts(student=None, teacher=None, num_classes=3, total_steps=9)
  rising = {'end': 4.0, 'until': 0.5}
  with pytest.raises(ValueError, match='soft_targets: .* starts at 0.0'):
    terms.make_term('soft_targets', facts, temperature=rising)
  terms.make_term('soft_targets', facts, temperature={**rising, 'start': 1.0})


@pytest.mark.parametrize('share', [{'until': 50}, {'until': '0.5'}])
def test_a_schedule_is_in_shares_of_the_run(share):
  with pytest.raises(ValueError, match='no shares of the run'):
    terms.make_value({'end': 4.0, **share}, 100)
