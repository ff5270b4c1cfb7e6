"""Every loss against NumPy in float64, through one common suite.

A new loss is one row of the cases of its module in `loss_cases`.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from loss_cases import (
  contrastive,
  features,
  gradients,
  outputs,
  relations,
  tokens,
)

from kd_jax import losses, sharding
from kd_jax.sharding.layout import BATCH

MODULES = contrastive, features, gradients, outputs, relations, tokens
CASES = {name: case for m in MODULES for name, case in m.CASES.items()}
PER_EXAMPLE = [name for name, case in CASES.items() if case.per_example]
# Public, but no losses; those that use them are cases.
HELPERS = ('batch_norm_margin', 'standardize_logits')
B = 8


def _inputs(name, seed=0):
  return dict(CASES[name].inputs(np.random.default_rng(seed)))


WITH_TEACHER = [name for name in CASES if 'teacher' in _inputs(name)]
EQUAL = [name for name in WITH_TEACHER if CASES[name].minimum is not None]


def _batch(name, inputs, change):
  """The inputs with another batch axis; those without one as they are."""
  shared = CASES[name].shared
  return {
    key: value if key in shared else jax.tree.map(change, value)
    for key, value in inputs.items()
  }


def _double(inputs):
  def double(x):
    x = np.asarray(x)
    return x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x

  return jax.tree.map(double, inputs)


def _vector(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def _plus(tree, step):
  """A tree of arrays plus a vector of all its elements."""
  leaves, structure = jax.tree.flatten(tree)
  ends = np.cumsum([x.size for x in leaves])[:-1]
  return structure.unflatten(
    [
      x + s.reshape(x.shape)
      for x, s in zip(leaves, np.split(step, ends), strict=True)
    ]
  )


def _fill(tree, value):
  """One value for all; scores that exclude something, -inf, go on to do so."""
  return jax.tree.map(
    lambda x: np.where(np.isinf(x), x, x.dtype.type(value)), tree
  )


def _scale(x):
  return np.max(np.abs(x))


def _signs(tree):
  """A direction in which every element counts, and no two cancel by chance."""
  return np.random.default_rng(1).choice([-1.0, 1.0], _vector(tree).size)


def _total(name, trained, others):
  loss = CASES[name].loss(**trained, **others)
  return jnp.sum(loss), loss


@functools.cache
def _compiled(name):
  """inputs -> loss and gradients of its sum; and a list of its traces.

  What most tests need is compiled together, and once.
  """
  traces = []

  def evaluate(trained, others, tangent):
    traces.append(name)
    total = functools.partial(_total, name, others=others)
    (_, loss), gradient = jax.value_and_grad(total, has_aux=True)(trained)
    _, slope = jax.jvp(
      lambda student: total({**trained, 'student': student})[0],
      [trained['student']],
      [tangent],
    )
    return loss, gradient, slope

  return jax.jit(evaluate), traces


def _evaluate(name, inputs):
  """The loss; vectors of its gradient; and its slope along `_signs`."""
  trained = {k: v for k, v in inputs.items() if k in ('student', 'teacher')}
  others = {k: v for k, v in inputs.items() if k not in trained}
  student = jax.tree.map(np.asarray, trained['student'])
  zeros = jax.tree.map(lambda x: np.zeros(x.shape), student)
  tangent = jax.tree.map(np.float32, _plus(zeros, _signs(student)))
  loss, gradient, slope = _compiled(name)[0](trained, others, tangent)
  return np.asarray(loss), {
    'slope': np.asarray(slope),
    **{k: _vector(v) for k, v in gradient.items()},
  }


def test_every_public_loss_has_a_case():
  public = {name for name, f in vars(losses).items() if callable(f)}
  assert {name.split('/')[0] for name in CASES} | {*HELPERS} == public
  assert len(CASES) == sum(len(m.CASES) for m in MODULES)


@pytest.mark.parametrize('name', CASES)
def test_value_is_the_papers_formula(name):
  inputs = _inputs(name)
  loss, _ = _evaluate(name, inputs)
  want = CASES[name].value(**_double(inputs))
  assert loss.dtype == np.float32
  assert loss.shape == ((B,) if CASES[name].per_example else ())
  np.testing.assert_allclose(loss, want, rtol=1e-5, atol=1e-5 * _scale(want))


@pytest.mark.parametrize('name', CASES)
def test_gradient_is_that_of_the_papers_formula(name):
  """By central differences in float64, of some elements and of all at once."""
  inputs = _inputs(name)
  _, gradient = _evaluate(name, inputs)
  gradient = gradient['student']
  exact = _double(inputs)

  def slope(direction, eps=1e-6):
    ends = [
      np.sum(
        CASES[name].value(
          **{**exact, 'student': _plus(exact['student'], step * direction)}
        )
      )
      for step in (eps, -eps)
    ]
    return (ends[0] - ends[1]) / (2 * eps)

  rng = np.random.default_rng(2)
  size = gradient.size
  tolerance = 1e-4 * _scale(gradient)
  for i in rng.permutation(size)[:40]:
    np.testing.assert_allclose(
      gradient[i], slope(np.eye(1, size, i)[0]), rtol=0, atol=tolerance
    )
  for signs in rng.choice([-1.0, 1.0], (4, size)):
    np.testing.assert_allclose(
      gradient @ signs, slope(signs), rtol=0, atol=tolerance * size**0.5
    )


@pytest.mark.parametrize('name', CASES)
def test_forward_mode_agrees_with_reverse_mode(name):
  inputs = _inputs(name)
  _, gradient = _evaluate(name, inputs)
  np.testing.assert_allclose(
    gradient['slope'],
    gradient['student'] @ _signs(inputs['student']),
    rtol=1e-4,
    atol=1e-5 * np.abs(gradient['student']).sum(),
  )


@pytest.mark.parametrize('name', EQUAL)
def test_minimum_is_where_student_equals_teacher(name):
  case, inputs = CASES[name], _inputs(name)
  loss, gradient = _evaluate(name, inputs)
  equal = inputs | {'student': inputs['teacher']}
  minimum = case.minimum
  if callable(minimum):
    minimum = minimum(_double(equal))
  value, at_minimum = _evaluate(name, equal)
  np.testing.assert_allclose(value, minimum, rtol=0, atol=2e-5 * _scale(loss))
  tolerance = 1e-4 * _scale(gradient['student'])
  np.testing.assert_allclose(at_minimum['student'], 0.0, atol=tolerance)
  # And it is a minimum, not only a stationary point.
  assert np.all(loss >= minimum) and np.any(loss > minimum)


@pytest.mark.parametrize('name', WITH_TEACHER)
def test_no_gradient_reaches_the_teacher(name):
  _, gradient = _evaluate(name, _inputs(name))
  np.testing.assert_array_equal(gradient['teacher'], 0.0)
  assert np.any(gradient['student'] != 0)


@pytest.mark.parametrize('name', CASES)
def test_gradient_is_finite_where_inputs_are_degenerate(name):
  inputs = _inputs(name)
  student, teacher = inputs['student'], inputs.get('teacher')
  if CASES[name].zero_ok:
    students = [_fill(student, value) for value in (0.0, 7.0, 0.1)]
  else:
    students = [_fill(student, value) for value in (7.0, 0.1)]
  # One example in place of all.
  students.append(jax.tree.map(lambda x: x[:1].repeat(B, axis=0), student))
  pairs = [(s, teacher) for s in students]
  if teacher is not None:
    pairs.append((student, _fill(teacher, 0.0)))
  if name in EQUAL:
    pairs.append((teacher, teacher))
    pairs += [(_fill(teacher, v), _fill(teacher, v)) for v in (0.0, 7.0)]
  for s, t in pairs:
    changed = inputs | {'student': s} | ({} if t is None else {'teacher': t})
    loss, gradient = _evaluate(name, changed)
    assert np.isfinite(loss).all()
    assert np.isfinite(gradient['student']).all()


@pytest.mark.parametrize('name', CASES)
def test_bfloat16_and_eager_equal_float32_and_compiled(name):
  """To float32's precision: only the inputs were rounded."""

  def rounded(dtype):
    inputs = _inputs(name)
    for key in {'student', 'teacher'} & inputs.keys():
      inputs[key] = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16).astype(dtype), inputs[key]
      )
    return inputs

  loss, inputs = CASES[name].loss, rounded(jnp.bfloat16)
  value = loss(**inputs)
  assert value.dtype == jnp.float32
  want, _ = _evaluate(name, rounded(np.float32))
  np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-5 * _scale(want))
  student = inputs.pop('student')
  gradient = jax.eval_shape(
    jax.grad(lambda s: jnp.sum(loss(student=s, **inputs))), student
  )
  assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize('name', CASES)
def test_permuting_the_batch_permutes_or_keeps_the_loss(name):
  case, inputs = CASES[name], _inputs(name)
  order = np.random.default_rng(1).permutation(B)
  loss, _ = _evaluate(name, inputs)
  permuted, _ = _evaluate(name, _batch(name, inputs, lambda x: x[order]))
  tolerance = 1e-6 * _scale(loss)
  if not case.permutation:
    assert np.any(np.abs(permuted - loss) > tolerance)
    return
  want = loss[order] if case.per_example else loss
  np.testing.assert_allclose(permuted, want, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize('name', CASES)
def test_other_values_are_not_traced_again(name):
  _evaluate(name, _inputs(name))
  traces = _compiled(name)[1]
  count = len(traces)
  _evaluate(name, _inputs(name, seed=1))
  assert len(traces) == count


@pytest.mark.parametrize('name', CASES)
def test_eight_devices_equal_one(name):
  inputs = _inputs(name)
  loss, gradient = _evaluate(name, inputs)
  mesh = sharding.make_mesh()
  assert mesh.size == B
  placed = {
    key: jax.device_put(
      value,
      NamedSharding(mesh, P() if key in CASES[name].shared else BATCH),
    )
    for key, value in inputs.items()
  }
  student = {'student': placed.pop('student')}
  of_student = jax.value_and_grad(_total, argnums=1, has_aux=True)
  (_, on_eight), slope = jax.jit(of_student, static_argnums=0)(
    name, student, placed
  )
  for got, want in (
    (on_eight, loss),
    (_vector(slope), gradient['student']),
  ):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * _scale(want))


@pytest.mark.parametrize('name', PER_EXAMPLE)
def test_vmap_equals_the_batch_at_once(name):
  """Over two batches of four; a loss without a mask sees no other example."""
  case, inputs = CASES[name], _inputs(name)
  loss, _ = _evaluate(name, inputs)
  halves = _batch(name, inputs, lambda x: x.reshape(2, 4, *x.shape[1:]))
  axes = {key: None if key in case.shared else 0 for key in inputs}
  loss_of = jax.vmap(lambda inputs: case.loss(**inputs), in_axes=(axes,))
  value = jax.jit(loss_of)(halves)
  np.testing.assert_allclose(
    value.reshape(B), loss, rtol=1e-5, atol=1e-6 * _scale(loss)
  )


@pytest.mark.parametrize('name', outputs.CASES)
def test_losses_on_outputs_take_any_leading_axes(name):
  case, inputs = CASES[name], _inputs(name)
  loss, _ = _evaluate(name, inputs)
  tokens = _batch(name, inputs, lambda x: x.reshape(2, 4, *x.shape[1:]))
  one = _batch(name, inputs, lambda x: x[0])
  of_tokens, of_one = jax.jit(
    lambda tokens, one: (case.loss(**tokens), case.loss(**one))
  )(tokens, one)
  tolerance = {'rtol': 1e-5, 'atol': 1e-6 * _scale(loss)}
  np.testing.assert_allclose(of_tokens, loss.reshape(2, 4), **tolerance)
  np.testing.assert_allclose(of_one, loss[0], **tolerance)


@pytest.mark.parametrize('name', outputs.LOGITS)
def test_extreme_logits_give_finite_values_and_gradients(name):
  inputs = _inputs(name)
  extreme = 1e4 * np.sign(inputs['student'])
  teachers = [inputs.get('teacher')]
  if 'teacher' in inputs:
    teachers += [extreme, -extreme]
  for teacher in teachers:
    changed = inputs | {'student': extreme}
    if teacher is not None:
      changed['teacher'] = teacher
    loss, gradient = _evaluate(name, changed)
    want = CASES[name].value(**_double(changed))
    np.testing.assert_allclose(loss, want, rtol=1e-5, atol=1e-5)
    assert np.isfinite(gradient['student']).all()


@pytest.mark.parametrize('name', outputs.LOGITS)
def test_the_loss_ignores_an_offset_of_the_logits(name):
  inputs = _inputs(name)
  loss, _ = _evaluate(name, inputs)
  moved, _ = _evaluate(name, inputs | {'student': inputs['student'] + 5.0})
  np.testing.assert_allclose(moved, loss, rtol=1e-4)


EXCLUDING = [
  name
  for name in outputs.LOGITS
  if name.startswith(('kl_', 'jensen', 'skew', 'decoupled', 'normalized'))
  and name != 'jensen_shannon/1'
]


@pytest.mark.parametrize('name', EXCLUDING)
def test_a_class_without_teacher_mass_is_the_limit_of_little_mass(name):
  inputs = _inputs(name)
  if 'label' in inputs:
    inputs['label'] = np.where(inputs['label'] == 1, 2, inputs['label'])
  # Numbers that NumPy computes without a NaN.
  teacher = inputs['teacher'].copy()
  teacher[:, 1] = -1e4
  want = _evaluate(name, inputs | {'teacher': teacher})
  teacher[:, 1] = -np.inf
  got = _evaluate(name, inputs | {'teacher': teacher})
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  np.testing.assert_allclose(
    got[1]['student'], want[1]['student'], rtol=1e-4, atol=1e-6
  )
  # Both sides may exclude a class, as masked vocabularies do.
  student = inputs['student'].copy()
  student[:, 1] = -np.inf
  loss, gradient = _evaluate(
    name, inputs | {'student': student, 'teacher': teacher}
  )
  assert np.isfinite(loss).all()
  assert np.isfinite(gradient['student']).all()


def test_reverse_kl_is_infinite_only_for_mass_that_the_teacher_excludes():
  inputs = _inputs('reverse_kl_divergence')
  inputs['teacher'][:, 1] = -np.inf
  loss, _ = _evaluate('reverse_kl_divergence', inputs)
  np.testing.assert_array_equal(loss, np.inf)
  for no_mass in (-np.inf, -1e4):
    inputs['student'][:, 1] = no_mass
    loss, gradient = _evaluate('reverse_kl_divergence', inputs)
    assert np.isfinite(loss).all() and np.isfinite(gradient['student']).all()


def test_temperature_may_be_traced():
  inputs = _inputs('kl_divergence/T4')
  loss = jax.jit(
    lambda t: losses.kl_divergence(**_named(inputs), temperature=t)
  )
  want = outputs.kl_divergence(**_double(inputs), temperature=3.0)
  np.testing.assert_allclose(loss(3.0), want, rtol=1e-5, atol=1e-5)


def _named(inputs):
  return {f'{side}_logits': inputs[side] for side in ('student', 'teacher')}


@pytest.mark.parametrize(
  'loss, share',
  [(losses.jensen_shannon, 'beta'), (losses.skew_kl_divergence, 'alpha')],
)
def test_the_share_of_a_mixture_has_no_schedule(loss, share):
  logits = jnp.ones((2, 3))
  with pytest.raises(ValueError, match=f'{share} is a number, not a schedule'):
    jax.jit(lambda value: loss(logits, logits, **{share: value}))(0.5)


def test_skewing_bounds_the_divergence():
  student = np.float32([[1e4, -1e4]])
  loss = losses.skew_kl_divergence(student, -student, alpha=0.1)
  np.testing.assert_allclose(loss, -np.log(0.1), rtol=1e-6)


def test_two_logits_are_standardized_to_their_order():
  got = losses.standardize_logits(jnp.array([[3.0, 1.0], [-2.0, 5.0]]))
  want = np.array([[1.0, -1.0], [-1.0, 1.0]]) / math.sqrt(2)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_equal_logits_are_standardized_to_zero_without_a_gradient():
  logits = jnp.array([[0.1] * 5, [3.0, 1.0, 2.0, 1.0, 0.0]])
  value = losses.standardize_logits(logits)
  np.testing.assert_array_equal(value[0], 0.0)
  np.testing.assert_allclose(np.std(value[1], ddof=1), 1.0, rtol=1e-5)
  weights = np.arange(5.0, dtype=np.float32)
  gradient = jax.grad(
    lambda z: jnp.sum(losses.standardize_logits(z) @ weights)
  )(logits)
  np.testing.assert_array_equal(gradient[0], 0.0)
  assert np.all(np.isfinite(gradient)) and np.any(gradient[1] != 0)


@pytest.mark.parametrize(
  'value, classes', [(0.1, 7), (0.7, 10), (3.3, 100), (1000.1, 7)]
)
def test_equal_logits_whose_mean_rounds_are_standardized_to_zero(
  value, classes
):
  logits = jnp.full((1, classes), value)
  z, gradient = jax.jit(
    jax.value_and_grad(lambda x: losses.standardize_logits(x)[0, 0])
  )(logits)
  assert z == 0 and not gradient.any()


@pytest.mark.parametrize('scale', [1e-12, 1e-5, 1e5, 1e12])
@pytest.mark.parametrize('p', [2, 4])
def test_attention_ignores_the_size_of_maps(p, scale):
  maps = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 3)), 'f')
  loss, gradient = jax.jit(
    jax.value_and_grad(lambda x: losses.attention_transfer(x, maps, p=p).sum())
  )(scale * maps)
  np.testing.assert_allclose(loss, 0, atol=1e-10)
  assert jnp.isfinite(gradient).all()


def test_scores_that_are_masked_add_no_error():
  rng = np.random.default_rng(0)
  student, teacher = (rng.normal(size=(1, 2, 4, 4)).astype('f') for _ in 'ab')
  seen = np.tril(np.ones((4, 4), bool))
  squares = np.where(seen, np.square(student - teacher), 0)
  want = squares.mean()
  for low in (-np.inf, np.finfo('f').min, -1e9):
    hidden = [
      np.where(seen, student, -1e4).astype('f'),
      np.where(seen, teacher, low).astype('f'),
    ]
    loss, gradient = jax.value_and_grad(
      lambda s, t=hidden[1]: losses.attention_squared_error(s, t).sum()
    )(hidden[0])
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert np.isfinite(gradient).all() and not gradient[..., ~seen].any()


def test_opposite_examples_transfer_probabilities_with_a_small_epsilon():
  x = np.random.default_rng(0).normal(size=(64, 8)).astype('f')
  x = np.concatenate([x, -x])
  loss = losses.probabilistic_transfer(x, x[::-1], eps=1e-10)
  assert np.isfinite(loss)


def test_decoupled_kd_with_the_teachers_own_weights_is_kl_divergence():
  inputs = _inputs('decoupled_kd')
  p = np.exp(outputs.log_softmax(inputs['teacher'] / 4.0))
  others = 1 - np.take_along_axis(p, inputs['label'][:, None], axis=1)[:, 0]
  np.testing.assert_allclose(
    losses.decoupled_kd(
      **_named(inputs), label=inputs['label'], beta=others.astype(np.float32)
    ),
    losses.kl_divergence(**_named(inputs)),
    rtol=1e-5,
  )


def test_a_student_that_is_the_virtual_teacher_has_nothing_to_learn():
  p = np.full((2, 5), 0.01 / 4, np.float32)
  p[[0, 1], [3, 0]] = 0.99
  loss = losses.teacher_free_kd(np.log(p), np.array([3, 0]))
  np.testing.assert_allclose(loss, 0.0, atol=1e-4)
  assert np.all(losses.teacher_free_kd(np.log(p), np.array([0, 3])) > 1.0)


@pytest.mark.parametrize('tail', ['renormalize', 'uniform'])
def test_the_top_of_all_classes_is_kl_divergence(tail):
  inputs = _inputs('kl_divergence/T4')
  p = np.exp(outputs.log_softmax(inputs['teacher'] / 4.0)).astype(np.float32)
  index = np.argsort(-p, axis=-1)
  top = np.take_along_axis(p, index, axis=-1)
  loss = functools.partial(
    losses.top_k_kl_divergence, temperature=4.0, tail=tail
  )
  np.testing.assert_allclose(
    loss(inputs['student'], top, index),
    losses.kl_divergence(**_named(inputs)),
    rtol=1e-5,
  )
  # A student that has the teacher's distribution, whatever k is.
  if tail == 'renormalize':
    value = loss(inputs['teacher'], top[:, :2], index[:, :2])
  else:
    student = np.float32([2.0, 1.0, 0.0, 0.0, 0.0])
    p = np.exp(outputs.log_softmax(student / 4.0)).astype(np.float32)
    value = loss(student, p[:2], np.arange(2))
  np.testing.assert_allclose(value, 0.0, atol=1e-5)


@pytest.mark.parametrize('tail', ['renormalize', 'uniform'])
def test_examples_without_stored_probabilities_give_no_nan(tail):
  inputs = _inputs('top_k_kl_divergence')
  top = inputs['teacher'] * np.float32([[0.0], [1.0]] * 4)
  of_each = jax.vmap(
    jax.value_and_grad(
      lambda s, t, i: losses.top_k_kl_divergence(s, t, i, tail=tail)
    )
  )
  loss, gradient = jax.jit(of_each)(inputs['student'], top, inputs['index'])
  assert np.isfinite(loss).all() and np.isfinite(gradient).all()
  if tail == 'renormalize':
    np.testing.assert_array_equal(loss[::2], 0.0)
    np.testing.assert_array_equal(gradient[::2], 0.0)


def test_relations_of_rkd_ignore_what_they_should():
  inputs = _inputs('relational_distance')
  x, y = inputs['student'], inputs['teacher']
  rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))[0]
  moved = (3 * x @ rotation + 2).astype(np.float32)
  for loss in (losses.relational_distance, losses.relational_angle):
    np.testing.assert_allclose(loss(moved, y), loss(x, y), rtol=1e-4)


def test_two_examples_are_enough_for_their_correlation():
  x = np.array([[0.0, 1.0], [3.0, 4.0]])
  assert float(losses.correlation_congruence(x, x + 2)) == 2 * 2 + 2 * 2


def test_large_maps_are_compared_a_few_examples_at_a_time():
  """More differences than are held at once, and not a whole number of times."""
  rng = np.random.default_rng(0)
  pair = rng.normal(size=(2, 17, 2**16)).astype(np.float32)
  pair *= np.linspace(0.5, 2.0, 17, dtype=np.float32)[:, None]
  got, gradient = jax.jit(jax.value_and_grad(losses.relational_distance))(*pair)
  want = relations.relational_distance(*pair)
  np.testing.assert_allclose(got, want, rtol=1e-4)
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize('name', ['intra_class_relation', 'dist'])
def test_correlations_of_tiny_probabilities_have_finite_gradients(name):
  """Softmaxes whose variances underflow in float32, beside ordinary ones."""
  inputs = _inputs(name)
  certain = np.eye(1, 5, dtype=np.float32)
  for offset in (20.0, 40.0, 60.0, 80.0, 100.0, 400.0):
    student = inputs['student'] + offset * certain
    for teacher in (inputs['teacher'], student):
      value, gradient = _evaluate(
        name, inputs | {'student': student, 'teacher': teacher}
      )
      assert np.isfinite(value).all()
      assert _scale(gradient['student']) < 100


@pytest.mark.parametrize('offset', [40.0, 60.0])
def test_correlations_ignore_the_size_of_the_probabilities(offset):
  """All classes but the certain one, whose probability does not vary."""
  inputs = _inputs('intra_class_relation')
  student = inputs['student'] + offset * np.eye(1, 5, dtype=np.float32)
  loss = losses.intra_class_relation(student, student)
  np.testing.assert_allclose(loss, 1 / 5, rtol=1e-4)


@pytest.mark.parametrize('label', [-100, -1, 3])
def test_a_label_that_is_no_class_has_no_loss(label):
  logits, labels = jnp.zeros((2, 3)), jnp.array([label, 0])
  loss = losses.cross_entropy(logits, labels, label_smoothing=0.1)
  assert np.isnan(loss).tolist() == [True, False]

  def kept(logits):
    loss = losses.cross_entropy(logits, labels)
    return jnp.sum(jnp.where(labels == label, 0.0, loss))

  gradient = jax.grad(kept)(logits)
  assert not gradient[0].any()
  assert gradient[1].any()


def test_shapes_that_differ_are_named():
  x = np.zeros
  for f, arrays, message in (
    (losses.kl_divergence, (x((2, 3)), x((2, 4))), r'same classes.*\(2, 4\)'),
    (losses.cross_entropy, (x((2, 3)), x((2, 1), int)), r'label .*\(2, 1\)'),
    (losses.squared_error, (x((2, 1)), x(2)), r'prediction has .*\(2, 1\)'),
    (losses.huber, (x((2, 1)), x(2)), r'prediction has shape \(2, 1\)'),
    (losses.decoupled_kd, (x((2, 3)), x((2, 4)), x(2, int)), 'same classes'),
    (losses.decoupled_kd, (x((2, 3)), x((2, 3)), x(3, int)), 'label has shape'),
    (
      losses.decoupled_kd,
      (x((2, 1)), x((2, 1)), x(2, int)),
      '^decoupled_kd needs at least two classes',
    ),
    (
      losses.normalized_kd,
      (x((2, 1)), x((2, 1)), x(2, int)),
      '^normalized_kd needs at least two classes',
    ),
    (
      losses.teacher_free_kd,
      (x((2, 1)), x(2, int)),
      '^teacher_free_kd needs at least two classes',
    ),
    (losses.standardize_logits, (x((2, 1)),), 'one class'),
    (
      losses.top_k_kl_divergence,
      (x((2, 5)), x((2, 3)), x((2, 2), int)),
      r'top k: top_probabilities has shape \(2, 3\)',
    ),
    (
      losses.top_k_kl_divergence,
      (x((3, 5)), x((2, 3)), x((2, 3), int)),
      r'top_index has shape \(2,\)',
    ),
    (
      losses.top_k_kl_divergence,
      (x((2, 5)), x((2, 6)), x((2, 6), int)),
      'top 6 cannot be of 5 classes',
    ),
    (losses.dist, (x((2, 3)), x((2, 4))), 'same classes'),
    (losses.dist, (x((2, 3, 4)), x((2, 3, 4))), r'need \[B, C\]'),
    (losses.relational_angle, (x((2, 3)), x((3, 3))), r'\(3, 3\)'),
    (losses.similarity_preserving, (x(2), x(2)), r'\[B, ...\]'),
    (
      losses.correlation_congruence,
      (x((2, 3)), x((2, 4))),
      r'^correlation_congruence.*\(2, 4\)',
    ),
    (losses.correlation_congruence, (x((1, 3)), x((1, 3))), 'two examples'),
  ):
    with pytest.raises(ValueError, match=message):
      f(*arrays)


@pytest.mark.parametrize(
  'name', [name for name in WITH_TEACHER if '/' not in name]
)
def test_a_batch_of_other_examples_is_refused(name):
  """Also one example, which would be compared with each of the teacher's."""
  inputs = _inputs(name)
  subject = {
    'batch_norm_margin': 'overhaul',
    'top_k_kl_divergence': 'the top k',
  }.get(name, name)
  for count in (1, B - 1):
    student = jax.tree.map(lambda x, n=count: x[:n], inputs['student'])
    with pytest.raises(
      ValueError, match=rf'^({subject}|teacher and student)\b.*\({count}\b'
    ):
      CASES[name].loss(**inputs | {'student': student})


def test_options_that_do_not_exist_are_named():
  z = np.zeros((2, 3))
  top = z, z.astype(int)
  for f, options, message in (
    (losses.kl_divergence, {'convention': 'mean'}, "'mean'.*canonical, elem"),
    (losses.jensen_shannon, {'beta': 1.5}, r'beta must be in \[0, 1\]'),
    (losses.skew_kl_divergence, {'alpha': 1.0}, r'alpha must be in \[0, 1\)'),
    (losses.multi_level, {'temperatures': ()}, 'at least one temperature'),
  ):
    with pytest.raises(ValueError, match=message):
      f(z, z, **options)
  with pytest.raises(ValueError, match="'none'.*renormalize, uniform"):
    losses.top_k_kl_divergence(z, *top, tail='none')
  with pytest.raises(ValueError, match=r'must be in \(0, 1\), not 1.0'):
    losses.teacher_free_kd(z, np.zeros(2, int), correct_probability=1.0)
