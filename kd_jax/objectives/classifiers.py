"""Terms that read a network's classifier, or give it one.

Owns the terms for which the weights of a linear head, or one more head, are
needed. As in `features`, the taps are named, and connectors adapt what differs.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.losses import numerics
from kd_jax.objectives import base, connectors
from kd_jax.objectives.base import Objective, Scalar
from kd_jax.objectives.features import over_pairs
from kd_jax.types import names_of


def softmax_regression(
  *,
  student: str,
  teacher: str,
  head: str = 'head',
  feature_weight: Scalar = 1.0,
  logits_weight: Scalar = 1.0,
) -> Objective:
  """SRRL: the student's last features, adapted, pass the teacher's classifier.

  Args:
    student: tap of the last maps `[B, H, W, D]`, or of pooled features.
    teacher: the teacher's.
    head: path of the teacher's linear classifier.
    feature_weight: of the squared error of the pooled features.
    logits_weight: of the squared error of the teacher's logits.

  References:
    Yang et al., "Knowledge Distillation via Softmax Regression Representation
    Learning", 2021 (ICLR).

  Example:
    After normalisation the student's feature is -1 and 1. The head makes logits
    of -3 and 3 of it, so the errors are 1 and 9:

    >>> from kd_jax.types import Forward
    >>> student = Forward(jnp.zeros((2, 1)), {'s': jnp.array([[0.0], [100.0]])})
    >>> teacher = Forward(jnp.zeros((2, 1)), {'t': jnp.zeros((2, 1))})
    >>> head = {'kernel': jnp.array([[3.0]]), 'bias': jnp.zeros(1)}
    >>> inputs = base.Inputs(
    ...   student, teacher, {}, jnp.int32(0), jax.random.key(0),
    ...   teacher_variables={'params': {'head': head}})
    >>> objective = softmax_regression(student='s', teacher='t')
    >>> loss, _, _ = objective.apply(*objective.init(inputs), inputs)
    >>> [round(x, 2) for x in loss.tolist()]
    [10.0, 10.0]
  """
  connect = connectors.make_connector('norm')

  def compare(params, inputs, s, t, i):
    s = _pooled(connect.apply(params, s, inputs.axis_name))
    classifier = base.teacher_params(inputs, head)
    logits = connectors.dense(classifier, s)
    target = base.teacher_of(inputs, 'softmax_regression').output
    feature = losses.hint(s, _pooled(numerics.float32(t)))
    weights = base.values_at(
      {'feature': feature_weight, 'logits': logits_weight}, inputs.step
    )
    matched = losses.squared_error(logits, target)
    return weights['feature'] * feature + weights['logits'] * matched

  return over_pairs(student, teacher, connect.init, compare)


def _pooled(x: jax.Array) -> jax.Array:
  return jnp.mean(x, axis=tuple(range(1, x.ndim - 1))) if x.ndim > 2 else x


def class_attention(
  *,
  student: str,
  teacher: str,
  student_head: str = 'head',
  teacher_head: str = 'head',
  size: int = 2,
  normalize: bool = True,
) -> Objective:
  """CAT-KD: class-activation maps, each network's maps through its own head.

  Args:
    student: tap of the last maps `[B, H, W, D]`.
    teacher: the teacher's.
    student_head: path of the student's linear classifier.
    teacher_head: path of the teacher's.
    size: side to which the maps are averaged.
    normalize: whether each map is scaled to unit length.

  References:
    Guo et al., "Class Attention Transfer Based Knowledge Distillation", 2023,
    arXiv:2304.12777.

  Example:
    The maps of class 0, (0.6, 0.8, 0, 0) and (0, 1, 0, 0), differ by 0.4 in
    all. The student's head negates that of class 1, where they differ by 3.6:

    >>> from kd_jax.types import Forward
    >>> s = jnp.array([3.0, 4.0, 0.0, 0.0]).reshape(1, 2, 2, 1)
    >>> t = jnp.array([0.0, 5.0, 0.0, 0.0]).reshape(1, 2, 2, 1)
    >>> heads = [
    ...   {'params': {'head': {'kernel': jnp.array(k), 'bias': jnp.zeros(2)}}}
    ...   for k in ([[1.0, -1.0]], [[1.0, 1.0]])]
    >>> inputs = base.Inputs(
    ...   Forward(None, {'s': s}), Forward(None, {'t': t}), {}, jnp.int32(0),
    ...   jax.random.key(0), student_variables=heads[0],
    ...   teacher_variables=heads[1])
    >>> objective = class_attention(student='s', teacher='t')
    >>> loss, _, _ = objective.apply(*objective.init(inputs), inputs)
    >>> [round(x, 4) for x in loss.tolist()]
    [0.5]
  """

  def compare(params, inputs, s, t, i):
    s = connectors.dense(base.student_params(inputs, student_head), s)
    t = connectors.dense(base.teacher_params(inputs, teacher_head), t)
    return losses.class_attention(s, t, size=size, normalize=normalize)

  return over_pairs(student, teacher, lambda *shapes: {}, compare)


def norm_direction(
  *, student: str, teacher: str, num_classes: int
) -> Objective:
  """KD++: embeddings point to the teacher's class means and grow in norm.

  The class means are those of all teacher features seen so far, the batch at
  hand included: a running sum in the state, where the paper makes a pass over
  the training set first.

  Args:
    student: tap of an embedding `[B, D]`.
    teacher: the teacher's.
    num_classes: C.

  References:
    Wang et al., "Improving Knowledge Distillation via Regularizing Feature
    Norm and Direction", 2023, arXiv:2305.17007.

  Example:
    The mean of class 1 is (2, 2):

    >>> from kd_jax.types import Forward
    >>> x = jnp.array([[3.0, 4.0], [1.0, 0.0]])
    >>> student, teacher = Forward(x, {'s': x}), Forward(x, {'t': x})
    >>> batch = {'label': jnp.array([1, 1])}
    >>> inputs = base.Inputs(
    ...   student, teacher, batch, jnp.int32(0), jax.random.key(0))
    >>> objective = norm_direction(student='s', teacher='t', num_classes=3)
    >>> params, state = objective.init(inputs)
    >>> params['kernel'] = jnp.eye(2)
    >>> loss, state, _ = objective.apply(params, state, inputs)
    >>> state['count'].tolist(), [round(v, 4) for v in loss.tolist()]
    ([0.0, 2.0, 0.0], [0.0101, 0.2929])
  """
  connect = connectors.make_connector('linear')

  def init(inputs):
    s = base.student_feature(inputs, student)
    t = base.teacher_feature(inputs, teacher)
    state = {
      'sum': jnp.zeros((num_classes, t.shape[-1])),
      'count': jnp.zeros(num_classes),
    }
    return connect.init(inputs.rng, s.shape, t.shape), state

  def apply(params, state, inputs):
    s = connect.apply(params, base.student_feature(inputs, student))
    t = numerics.constant(base.teacher_feature(inputs, teacher))
    member = base.of_labels(
      lambda label: jax.nn.one_hot(label, num_classes), inputs
    )
    seen = {
      'sum': jnp.einsum('bc,bd->cd', member, t, precision=numerics.HIGHEST),
      'count': jnp.sum(member, axis=0),
    }
    if inputs.axis_name is not None:
      seen = jax.lax.psum(seen, inputs.axis_name)
    state = jax.tree.map(jnp.add, state, seen)
    means = state['sum'] / jnp.maximum(state['count'], 1.0)[:, None]
    loss = base.of_labels(
      lambda label: losses.norm_direction(s, t, means, label), inputs
    )
    return loss, state, {}

  return Objective(init, apply, base.read_taps(student, teacher))


def self_distillation(
  *,
  student: Sequence[str],
  deepest: str,
  num_classes: int,
  temperature: float = 3.0,
  label_weight: float = 0.7,
  soft_weight: float = 0.3,
  hint_weight: float = 0.03,
) -> Objective:
  """Be your own teacher: shallow classifiers learn from the deepest one.

  Every stage gets a classifier of its own, which is dropped after training: a
  hidden layer with normalisation on the pooled maps. It learns the labels, the
  network's own output, and its last features.

  Args:
    student: tap names of the shallow stages, maps `[B, H, W, D]`.
    deepest: tap of the last embedding `[B, D]`, a constant target.
    num_classes: C.
    temperature: of the soft targets.
    label_weight: of the labels, for the shallow classifiers.
    soft_weight: of the soft targets.
    hint_weight: of the features.

  References:
    Zhang et al., "Be Your Own Teacher", 2019, arXiv:1905.08094.

  Example:
    With parameters of 1 the shallow classifier's hidden features are 0 and 2,
    and the deepest features are 3:

    >>> from kd_jax.types import Forward
    >>> maps = jnp.array([0.0, 100.0]).reshape(2, 1, 1, 1)
    >>> features = {'stage1': maps, 'pool': jnp.full((2, 1), 3.0)}
    >>> student = Forward(jnp.zeros((2, 4)), features)
    >>> batch = {'label': jnp.array([0, 1])}
    >>> inputs = base.Inputs(
    ...   student, None, batch, jnp.int32(0), jax.random.key(0))
    >>> objective = self_distillation(
    ...   student=['stage1'], deepest='pool', num_classes=4, label_weight=0.0,
    ...   soft_weight=0.0, hint_weight=1.0)
    >>> params, state = objective.init(inputs)
    >>> params['0']['head']['kernel'].shape
    (1, 4)
    >>> ones = jax.tree.map(jnp.ones_like, params)
    >>> [round(x, 2) for x in objective.apply(ones, state, inputs)[0].tolist()]
    [9.0, 1.0]
  """
  taps = names_of(student)

  def init(inputs):
    width = base.student_feature(inputs, deepest).shape[-1]
    params = {}
    for i, name in enumerate(taps):
      inner = base.student_feature(inputs, name).shape[-1]
      k1, k2 = jax.random.split(jax.random.fold_in(inputs.rng, i))
      params[str(i)] = {
        'bottleneck': connectors.dense_params(k1, inner, width),
        'norm': connectors.norm_params(width),
        'head': connectors.dense_params(k2, width, num_classes),
      }
    return params, {}

  def apply(params, state, inputs):
    target = base.student_feature(inputs, deepest)
    total: jax.Array | float = 0.0
    for i, name in enumerate(taps):
      p = params[str(i)]
      # Pooled first: a linear map of the mean is the mean of the map.
      x = _pooled(numerics.float32(base.student_feature(inputs, name)))
      x = connectors.dense(p['bottleneck'], x)
      x = connectors.batch_norm(p['norm'], x, inputs.axis_name)
      x = jax.nn.relu(x)
      logits = connectors.dense(p['head'], x)
      soft = losses.kl_divergence(
        logits, inputs.student.output, temperature=temperature
      )
      labels = base.of_labels(
        functools.partial(losses.cross_entropy, logits), inputs
      )
      total += label_weight * labels
      total += soft_weight * soft + hint_weight * losses.hint(x, target)
    return total, state, {}

  return Objective(init, apply, base.TapNames((*taps, deepest), ()))
