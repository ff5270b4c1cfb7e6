"""Terms on intermediate features, with the connectors that they train.

Every term takes tap names, `student` and `teacher`, one or as many of one as
of the other; its loss is the sum over the pairs. Where two features differ, a
term adapts them itself: another number of channels by a trained connector,
another resolution or length by averaging the larger to the smaller.
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

  Example:
    >>> at = on_features(
    ...   losses.attention_transfer, student=('s1', 's2'), teacher=('t1', 't2'))
    >>> at.taps.student
    ('s1', 's2')
  """
  connect = connectors.make_connector(connector)

  def compare(params, inputs, s, t, i):
    s = connect.apply(params, s, inputs.axis_name)
    s, t = connectors.same_places(s, numerics.float32(t))
    return loss(s, t, **base.values_at(options, inputs.step))

  return over_pairs(student, teacher, connect.init, compare)


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


def hints(
  *, student: Names, teacher: Names, connector: str = 'norm_relu'
) -> Objective:
  """FitNets: the student regresses the teacher's features, `losses.hint`.

  Args:
    student: tap names.
    teacher: as many.
    connector: 'norm_relu' fits features that follow a ReLU.
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

  Pair i of n has the weight 2**(i - n + 1), the deepest 1. The paper trains
  with this loss alone first, and with the labels afterwards: give both
  weights a schedule of shape 'step'.

  Args:
    student: tap names of pre-activations, shallow to deep.
    teacher: as many.
    margin: see `losses.activation_boundary`.
  """
  count = len(base.names(student))
  connect = connectors.make_connector('norm')

  def compare(params, inputs, s, t, i):
    s = connect.apply(params, s, inputs.axis_name)
    s, t = connectors.same_places(s, numerics.float32(t))
    loss = losses.activation_boundary(s, t, margin=margin)
    return 2.0 ** (i - count + 1) * loss / 1000

  return over_pairs(student, teacher, connect.init, compare)


def overhaul(*, student: Names, teacher: Names, norms: Names) -> Objective:
  """Feature overhaul: a partial distance with margins from the teacher's norms.

  Pair i of n has the weight 2**(i - n + 1) / 1000, the deepest 1 / 1000.

  Args:
    student: tap names of pre-activations, shallow to deep.
    teacher: as many.
    norms: for each of `teacher`, the path of the BatchNorm in the teacher's
      parameters whose scale and bias give the margins.

  References:
    Heo et al., "A Comprehensive Overhaul of Feature Distillation", 2019,
    arXiv:1904.01866.
  """
  norms = base.names(norms)
  base.pairs(teacher, norms)
  count = len(norms)
  connect = connectors.make_connector('norm')

  def compare(params, inputs, s, t, i):
    norm = base.teacher_params(inputs, norms[i])
    margin = losses.batch_norm_margin(norm['scale'], norm['bias'])
    s = connect.apply(params, s, inputs.axis_name)
    s, t = connectors.same_places(s, numerics.float32(t))
    return 2.0 ** (i - count + 1) * losses.overhaul(s, t, margin) / 1000

  return over_pairs(student, teacher, connect.init, compare)


def factor_transfer(
  *,
  student: str,
  teacher: str,
  rate: float = 0.5,
  pretrain_steps: int = 0,
) -> Objective:
  """FT: the student's translator learns factors of the teacher's paraphraser.

  The paraphraser is an autoencoder of the teacher's features. Here it trains
  in the same run, by its reconstruction alone: no gradient of the comparison
  reaches it. Until `pretrain_steps` nothing else is trained by this term,
  which stands for the paper's separate first stage.

  Args:
    student: one tap name.
    teacher: one tap name.
    rate: channels of the factor per channel of the teacher.
    pretrain_steps: steps before the student takes part.

  References:
    Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via
    Factor Transfer", 2018, arXiv:1802.04977.
  """

  def init_pair(key, s, t):
    factors = max(1, round(rate * t[-1]))
    k1, k2, k3, k4, k5 = jax.random.split(key, 5)
    return {
      'encoder': _conv_stack_params(k1, k2, t[-1], factors),
      'decoder': connectors.conv_params(k3, 3, factors, t[-1]),
      'translator': _conv_stack_params(k4, k5, s[-1], factors),
    }

  def compare(params, inputs, s, t, i):
    t = numerics.float32(t)
    factor = _conv_stack(params['encoder'], t)
    rebuilt = connectors.conv(params['decoder'], factor)
    rebuild = losses.hint(rebuilt, t)
    s, factor = connectors.same_places(
      _conv_stack(params['translator'], s), factor
    )
    transfer = losses.factor_transfer(s, factor)
    return rebuild + jnp.where(inputs.step >= pretrain_steps, transfer, 0.0)

  return over_pairs(student, teacher, init_pair, compare)


def _conv_stack_params(
  first: jax.Array, second: jax.Array, inner: int, outer: int
) -> list[Any]:
  return [
    connectors.conv_params(first, 3, inner, outer),
    connectors.conv_params(second, 3, outer, outer),
  ]


def _conv_stack(layers: Sequence[Any], x: jax.Array) -> jax.Array:
  for layer in layers:
    x = jax.nn.leaky_relu(connectors.conv(layer, x), 0.1)
  return x


def review(
  *, student: Sequence[str], teacher: Sequence[str], width: int | None = None
) -> Objective:
  """ReviewKD: the student's stages, fused from deep to shallow, learn all.

  Attention-based fusion: every stage becomes `width` channels, is joined with
  the fused deeper stage by two attention maps, and a 3x3 convolution gives it
  the teacher's channels; `losses.hierarchical_context` compares.

  Args:
    student: tap names, shallow to deep, maps `[B, H, W, D]`.
    teacher: as many.
    width: channels of the fusion; those of the widest student stage if None.

  References:
    Chen et al., "Distilling Knowledge via Knowledge Review", 2021,
    arXiv:2104.09044.
  """
  matched = base.pairs(student, teacher)

  def features(inputs):
    return [
      (base.student_feature(inputs, s), base.teacher_feature(inputs, t))
      for s, t in matched
    ]

  def init(inputs):
    found = features(inputs)
    middle = width or max(s.shape[-1] for s, _ in found)
    params = {}
    for i, (s, t) in enumerate(found):
      reduce, gate, out = jax.random.split(jax.random.fold_in(inputs.rng, i), 3)
      params[str(i)] = {
        'reduce': connectors.conv_params(reduce, 1, s.shape[-1], middle),
        'reduce_norm': connectors.norm_params(middle),
        'out': connectors.conv_params(out, 3, middle, t.shape[-1]),
        'out_norm': connectors.norm_params(t.shape[-1]),
      }
      if i + 1 < len(found):
        params[str(i)]['gate'] = connectors.dense_params(gate, 2 * middle, 2)
    return params, {}

  def apply(params, state, inputs):
    total: jax.Array | float = 0.0
    deeper = None
    for i, (s, t) in reversed(list(enumerate(features(inputs)))):
      p = params[str(i)]
      x = connectors.conv(p['reduce'], s)
      x = connectors.batch_norm(p['reduce_norm'], x, inputs.axis_name)
      if deeper is not None:
        deeper = connectors.upsample(deeper, x.shape[1:3])
        gate = jax.nn.sigmoid(_joint(p['gate'], x, deeper))
        x = x * gate[..., :1] + deeper * gate[..., 1:]
      deeper = x
      y = connectors.conv(p['out'], x)
      y = connectors.batch_norm(p['out_norm'], y, inputs.axis_name)
      y, t = connectors.same_places(y, numerics.float32(t))
      total += losses.hierarchical_context(y, t)
    return total, state, {}

  return Objective(init, apply, base.read_taps(student, teacher))


def _joint(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
  """`connectors.dense` of two maps side by side, which are never joined."""
  first, second = jnp.split(params['kernel'], [x.shape[-1]])
  gate = connectors.dense({'kernel': first, 'bias': params['bias']}, x)
  return gate + jnp.einsum('...i,io->...o', y, second)


def masked_generation(
  *, student: Names, teacher: Names, mask_ratio: float = 0.5
) -> Objective:
  """MGD: the student's features, partly masked, generate the teacher's.

  Two 3x3 convolutions fill in what a random mask over positions removed.

  Args:
    student: tap names of maps `[B, H, W, D]`.
    teacher: as many.
    mask_ratio: share of the positions that are set to zero, in [0, 1).

  References:
    Yang et al., "Masked Generative Distillation", 2022, arXiv:2205.01529.
  """
  align = connectors.make_connector('linear')

  def init_pair(key, s, t):
    k1, k2, k3 = jax.random.split(key, 3)
    return {
      'align': align.init(k1, s, t),
      'generate': [
        connectors.conv_params(k2, 3, t[-1], t[-1]),
        connectors.conv_params(k3, 3, t[-1], t[-1]),
      ],
    }

  def compare(params, inputs, s, t, i):
    s = align.apply(params['align'], s)
    s, t = connectors.same_places(s, numerics.float32(t))
    key = jax.random.fold_in(inputs.rng, i)
    kept = _global_uniform(key, (*s.shape[:3], 1), inputs.axis_name)
    s = jnp.where(kept >= mask_ratio, s, 0.0)
    first, second = params['generate']
    s = connectors.conv(second, jax.nn.relu(connectors.conv(first, s)))
    return losses.masked_generation(s, t)

  return over_pairs(student, teacher, init_pair, compare)


def _global_uniform(
  key: jax.Array, shape: tuple[int, ...], axis_name: str | None
) -> jax.Array:
  """Uniform draws for this device's part of a global batch."""
  if axis_name is None:
    return jax.random.uniform(key, shape)
  whole = (shape[0] * jax.lax.axis_size(axis_name), *shape[1:])
  start = jax.lax.axis_index(axis_name) * shape[0]
  draws = jax.random.uniform(key, whole)
  return jax.lax.dynamic_slice_in_dim(draws, start, shape[0])
