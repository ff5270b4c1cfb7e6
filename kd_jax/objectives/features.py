"""Terms on intermediate features, with the connectors that they train.

Owns the terms for which one connector a pair is enough; those that train more
are in `feature_networks`. Every term takes tap names, `student` and `teacher`,
one or as many of one as of the other; its loss is the sum over the pairs. Where
two features differ, a term adapts them itself: another number of channels by a
trained connector, another resolution or length by averaging the larger to the
smaller.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.losses import numerics
from kd_jax.objectives import base, connectors
from kd_jax.objectives.base import Objective
from kd_jax.types import names_of

Names = str | Sequence[str]


def on_features(
  loss: Callable[..., jax.Array],
  *,
  student: Names,
  teacher: Names,
  connector: str = 'identity',
  **options: Any,
) -> Objective:
  """A term from any loss of one student and one teacher feature.

  Args:
    loss: `(student, teacher, **options) -> [B]`.
    student: tap names; 'output' stands for the output.
    teacher: as many.
    connector: adapts the student's channels, see
      `connectors.make_connector`.
    **options: of the loss; a callable among them is a schedule.

  Raises:
    ValueError: for an unknown connector, or if there are not as many taps of
      one as of the other.

  Example:
    Two pairs, the second of maps whose attention is elsewhere:

    >>> from kd_jax.types import Forward
    >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 2, 1)
    >>> inputs = base.Inputs(
    ...   Forward(None, {'s1': x, 's2': x}),
    ...   Forward(None, {'t1': 7 * x, 't2': x[:, :, ::-1]}), {}, jnp.int32(0),
    ...   jax.random.key(0))
    >>> at = on_features(
    ...   losses.attention_transfer, student=('s1', 's2'), teacher=('t1', 't2'))
    >>> at.taps.student, at.apply(*at.init(inputs), inputs)[0].tolist()
    (('s1', 's2'), [1.0])
  """

  def compare(inputs, s, t, i):
    return loss(s, t, **base.values_at(options, inputs.step))

  return _over_adapted(student, teacher, connector, compare)


def over_pairs(
  student: Names,
  teacher: Names,
  init_pair: Callable[..., Any],
  compare: Callable[..., jax.Array],
) -> Objective:
  """The sum of a loss over pairs of a student and a teacher feature.

  Args:
    student: tap names.
    teacher: as many.
    init_pair: `(key, student_shape, teacher_shape) -> params` of one pair.
    compare: `(params, inputs, s, t, index) -> [B]` of one pair.

  Example:
    >>> from kd_jax.types import Forward
    >>> features = {'a': jnp.ones((2, 3)), 'b': jnp.ones((2, 5))}
    >>> student, teacher = Forward(jnp.zeros(2), features), Forward(jnp.ones(2))
    >>> inputs = base.Inputs(
    ...   student, teacher, {}, jnp.int32(0), jax.random.key(0))
    >>> objective = over_pairs(
    ...   ('a', 'b'), ('output', 'output'),
    ...   lambda key, student_shape, teacher_shape: jnp.float32(3.0),
    ...   lambda scale, inputs, s, t, index: scale * index * s[:, 0] * t)
    >>> objective.apply(*objective.init(inputs), inputs)[0].tolist()
    [3.0, 3.0]
  """
  matched = base.pairs(student, teacher)

  def features(inputs, s, t):
    return base.student_feature(inputs, s), base.teacher_feature(inputs, t)

  def init(inputs):
    params = {}
    for i, (s, t) in enumerate(matched):
      a, b = features(inputs, s, t)
      key = jax.random.fold_in(inputs.rng, i)
      params[str(i)] = init_pair(key, a.shape, b.shape)
    return params, {}

  def apply(params, state, inputs):
    total: jax.Array | float = 0.0
    for i, (s, t) in enumerate(matched):
      a, b = features(inputs, s, t)
      total += compare(params[str(i)], inputs, a, b, i)
    return total, state, {}

  return Objective(init, apply, base.read_taps(student, teacher))


def _over_adapted(
  student: Names,
  teacher: Names,
  connector: str,
  compare: Callable[..., jax.Array],
) -> Objective:
  """`over_pairs` of features that a connector gave one shape.

  Args:
    student: tap names.
    teacher: as many.
    connector: see `connectors.make_connector`.
    compare: `(inputs, s, t, index) -> [B]` of one pair.
  """
  connect = connectors.make_connector(connector)

  def compare_adapted(params, inputs, s, t, i):
    s = connect.apply(params, s, inputs.axis_name)
    s, t = connectors.same_places(s, numerics.float32(t))
    return compare(inputs, s, t, i)

  return over_pairs(student, teacher, connect.init, compare_adapted)


def hints(
  *, student: Names, teacher: Names, connector: str = 'norm_relu'
) -> Objective:
  """FitNets: the student regresses the teacher's features, `losses.hint`.

  Args:
    student: tap names.
    teacher: as many.
    connector: 'norm_relu' fits features that follow a ReLU.

  Raises:
    ValueError: as `on_features`.

  References:
    Romero et al., "FitNets: Hints for Thin Deep Nets", 2014, arXiv:1412.6550.

  Example:
    With parameters of 1 the student's features become 0 and 2:

    >>> from kd_jax.types import Forward
    >>> student = Forward(None, {'s': jnp.array([[0.0], [100.0]])})
    >>> teacher = Forward(None, {'t': jnp.array([[1.0], [5.0]])})
    >>> inputs = base.Inputs(
    ...   student, teacher, {}, jnp.int32(0), jax.random.key(0))
    >>> objective = hints(student='s', teacher='t')
    >>> params, state = objective.init(inputs)
    >>> ones = jax.tree.map(jnp.ones_like, params)
    >>> [round(x, 2) for x in objective.apply(ones, state, inputs)[0].tolist()]
    [1.0, 9.0]
  """
  return on_features(
    losses.hint, student=student, teacher=teacher, connector=connector
  )


def flow(*, student: Sequence[str], teacher: Sequence[str]) -> Objective:
  """FSP: Gram matrices between consecutive stages, summed.

  Both networks need the same channels in every stage.

  Args:
    student: at least two tap names, shallow to deep.
    teacher: as many.

  Raises:
    ValueError: for fewer than two stages, or not as many of both.

  References:
    Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network
    Minimization and Transfer Learning", 2017 (CVPR).

  Example:
    >>> from kd_jax.types import Forward
    >>> one = jnp.ones((1, 2, 2, 1))
    >>> student = Forward(jnp.zeros(1), {'s1': one, 's2': one})
    >>> teacher = Forward(jnp.zeros(1), {'t1': one, 't2': 3 * one})
    >>> inputs = base.Inputs(student, teacher, {}, jnp.int32(0), None)
    >>> objective = flow(student=('s1', 's2'), teacher=('t1', 't2'))
    >>> objective.apply({}, {}, inputs)[0].tolist()
    [4.0]
  """
  matched = base.pairs(student, teacher)
  if len(matched) < 2:
    raise ValueError('flow compares consecutive stages: give at least two.')

  def loss_fn(inputs):
    total: jax.Array | float = 0.0
    s, t = base.student_feature, base.teacher_feature
    for (s1, t1), (s2, t2) in itertools.pairwise(matched):
      total += losses.flow_of_solution(
        (s(inputs, s1), s(inputs, s2)), (t(inputs, t1), t(inputs, t2))
      )
    return total

  return base.term(loss_fn, taps=base.read_taps(student, teacher))


def variational_information(
  *, student: Names, teacher: Names, init_variance: float = 5.0
) -> Objective:
  """VID: a regressor's Gaussian likelihood, a trained variance per channel.

  The variance is softplus(s) + 1e-5, and s trains: public code exists that
  leaves it out of the optimizer.

  Args:
    student: tap names.
    teacher: as many.
    init_variance: the variance at the start, > 1e-5.

  Raises:
    ValueError: if there are not as many taps of one as of the other.

  References:
    Ahn et al., "Variational Information Distillation for Knowledge Transfer",
    2019, arXiv:1904.05835.

  Example:
    The mean is 0, so this is (3**2 / 5 + log 5) / 2:

    >>> from kd_jax.types import Forward
    >>> student = Forward(None, {'s': jnp.zeros((1, 4, 4, 3))})
    >>> teacher = Forward(None, {'t': jnp.full((1, 4, 4, 5), 3.0)})
    >>> inputs = base.Inputs(
    ...   student, teacher, {}, jnp.int32(0), jax.random.key(0))
    >>> objective = variational_information(student='s', teacher='t')
    >>> params, state = objective.init(inputs)
    >>> params['0']['variance'].shape
    (5,)
    >>> round(float(objective.apply(params, state, inputs)[0][0]), 4)
    1.7047
  """
  connect = connectors.make_connector('bottleneck')
  start = math.log(math.expm1(init_variance - 1e-5))

  def init_pair(key, s, t):
    scale = jnp.full(t[-1], start, jnp.float32)
    return {'mean': connect.init(key, s, t), 'variance': scale}

  def compare(params, inputs, s, t, i):
    mean = connect.apply(params['mean'], s)
    mean, t = connectors.same_places(mean, numerics.float32(t))
    variance = jax.nn.softplus(params['variance']) + 1e-5
    return losses.variational_information(mean, t, variance)

  return over_pairs(student, teacher, init_pair, compare)


def activation_boundary(
  *, student: Names, teacher: Names, margin: float = 1.0
) -> Objective:
  """AB: signs of pre-activations; deeper pairs count twice as much.

  Pair i of n has the weight 2**(i - n + 1) / 1000, the deepest 1 / 1000. The
  paper trains with this loss alone first, and with the labels afterwards: give
  both weights a schedule of shape 'step'.

  Args:
    student: tap names of pre-activations, shallow to deep.
    teacher: as many.
    margin: see `losses.activation_boundary`.

  Raises:
    ValueError: if there are not as many taps of one as of the other.

  References:
    Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries
    Formed by Hidden Neurons", 2018, arXiv:1811.03233.

  Example:
    >>> from kd_jax.types import Forward
    >>> x = jnp.array([[-2.0], [2.0]])
    >>> student, teacher = Forward(x, {'s': x}), Forward(x, {'t': -x})
    >>> inputs = base.Inputs(
    ...   student, teacher, {}, jnp.int32(0), jax.random.key(0))
    >>> objective = activation_boundary(student='s', teacher='t')
    >>> params, state = objective.init(inputs)
    >>> params['0']['kernel'] = jnp.ones((1, 1))
    >>> loss, _, _ = objective.apply(params, state, inputs)
    >>> [round(v, 4) for v in loss.tolist()]
    [0.004, 0.004]
  """
  count = len(names_of(student))

  def compare(inputs, s, t, i):
    loss = losses.activation_boundary(s, t, margin=margin)
    return 2.0 ** (i - count + 1) * loss / 1000

  return _over_adapted(student, teacher, 'norm', compare)


def overhaul(*, student: Names, teacher: Names, norms: Names) -> Objective:
  """Feature overhaul: a partial distance with margins from the teacher's norms.

  Pair i of n has the weight 2**(i - n + 1) / 1000, the deepest 1 / 1000.

  Args:
    student: tap names of pre-activations, shallow to deep.
    teacher: as many.
    norms: for each of `teacher`, the path of the BatchNorm in the teacher's
      parameters whose scale and bias give the margins.

  Raises:
    ValueError: if there are not as many taps of one as of the other, or not as
      many norms; when applied, for a norm that the teacher does not have.

  References:
    Heo et al., "A Comprehensive Overhaul of Feature Distillation", 2019,
    arXiv:1904.01866.

  Example:
    With parameters of 1 the student's features become 0 and 2. The targets are
    the margin -0.7979 and 1, and the squared errors are divided by 1000:

    >>> from kd_jax.types import Forward
    >>> student = Forward(None, {'s': jnp.array([[0.0], [100.0]])})
    >>> teacher = Forward(None, {'t': jnp.array([[-3.0], [1.0]])})
    >>> norm = {'scale': jnp.ones(1), 'bias': jnp.zeros(1)}
    >>> inputs = base.Inputs(
    ...   student, teacher, {}, jnp.int32(0), jax.random.key(0),
    ...   teacher_variables={'params': {'stage1': {'norm': norm}}})
    >>> objective = overhaul(student='s', teacher='t', norms='stage1/norm')
    >>> params, state = objective.init(inputs)
    >>> ones = jax.tree.map(jnp.ones_like, params)
    >>> loss, _, _ = objective.apply(ones, state, inputs)
    >>> [round(1000 * x, 3) for x in loss.tolist()]
    [0.637, 1.0]
  """
  norms = names_of(norms)
  base.pairs(teacher, norms)
  count = len(norms)

  def compare(inputs, s, t, i):
    norm = base.teacher_params(inputs, norms[i])
    margin = losses.batch_norm_margin(norm['scale'], norm['bias'])
    return 2.0 ** (i - count + 1) * losses.overhaul(s, t, margin) / 1000

  return _over_adapted(student, teacher, 'norm', compare)
