"""Terms on features that train small networks of their own beside the student.

Owns FT's paraphraser and translator, ReviewKD's fusion of stages, and MGD's
generator. They are dropped with the objective; terms that need no more than a
connector are in `features`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.losses import numerics
from kd_jax.objectives import base, connectors
from kd_jax.objectives.base import Objective
from kd_jax.objectives.features import Names, over_pairs
from kd_jax.objectives.scopes import draw_global


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

  Example:
    Of a teacher that is 0 the paraphraser has nothing to rebuild. Its factor
    is 0 and the student's has length 1, which counts from step 5 on:

    >>> from kd_jax.types import Forward
    >>> student = Forward(None, {'s': jnp.ones((1, 1, 1, 3))})
    >>> teacher = Forward(None, {'t': jnp.zeros((1, 1, 1, 6))})
    >>> inputs = base.Inputs(
    ...   student, teacher, {}, jnp.int32(4), jax.random.key(0))
    >>> objective = factor_transfer(student='s', teacher='t', pretrain_steps=5)
    >>> params, state = objective.init(inputs)
    >>> params['0']['translator'][0]['kernel'].shape
    (3, 3, 3, 3)
    >>> objective.apply(params, state, inputs)[0].tolist()
    [0.0]
    >>> inputs = inputs._replace(step=jnp.int32(5))
    >>> objective.apply(params, state, inputs)[0].tolist()
    [1.0]
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

  Raises:
    ValueError: if there are not as many taps of one as of the other.

  References:
    Chen et al., "Distilling Knowledge via Knowledge Review", 2021,
    arXiv:2104.09044.

  Example:
    Both stages end in a normalisation, to -1 and 1 for a batch of two:

    >>> from kd_jax.types import Forward
    >>> x = jnp.array([0.0, 100.0]).reshape(2, 1, 1, 1)
    >>> student = Forward(None, {'s1': x, 's2': x})
    >>> teacher = Forward(None, {'t1': 0 * x, 't2': 0 * x})
    >>> inputs = base.Inputs(
    ...   student, teacher, {}, jnp.int32(0), jax.random.key(0))
    >>> objective = review(student=('s1', 's2'), teacher=('t1', 't2'), width=4)
    >>> params, state = objective.init(inputs)
    >>> params['0']['reduce']['kernel'].shape, 'gate' in params['1']
    ((1, 1, 1, 4), False)
    >>> loss, _, _ = objective.apply(params, state, inputs)
    >>> [round(v, 2) for v in loss.tolist()]
    [2.0, 2.0]
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
      key = jax.random.fold_in(inputs.rng, i)
      params[str(i)] = _fusion_params(
        key, s.shape[-1], middle, t.shape[-1], deepest=i + 1 == len(found)
      )
    return params, {}

  def apply(params, state, inputs):
    total: jax.Array | float = 0.0
    fused = None
    for i, (s, t) in reversed(list(enumerate(features(inputs)))):
      fused, y = _fuse(params[str(i)], s, fused, inputs.axis_name)
      y, t = connectors.same_places(y, numerics.float32(t))
      total += losses.hierarchical_context(y, t)
    return total, state, {}

  return Objective(init, apply, base.read_taps(student, teacher))


def _fusion_params(
  key: jax.Array, inner: int, width: int, outer: int, *, deepest: bool
) -> dict[str, Any]:
  """What one stage trains; the deepest has nothing to be joined with."""
  reduce, gate, out = jax.random.split(key, 3)
  params = {
    'reduce': connectors.conv_params(reduce, 1, inner, width),
    'reduce_norm': connectors.norm_params(width),
    'out': connectors.conv_params(out, 3, width, outer),
    'out_norm': connectors.norm_params(outer),
  }
  if not deepest:
    params['gate'] = connectors.dense_params(gate, 2 * width, 2)
  return params


def _fuse(
  params: Any, x: jax.Array, deeper: jax.Array | None, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
  """A stage fused with the deeper ones, and that in the teacher's channels."""
  x = connectors.conv(params['reduce'], x)
  x = connectors.batch_norm(params['reduce_norm'], x, axis_name)
  if deeper is not None:
    deeper = connectors.upsample(deeper, x.shape[1:3])
    gate = jax.nn.sigmoid(_joint(params['gate'], x, deeper))
    x = x * gate[..., :1] + deeper * gate[..., 1:]
  y = connectors.conv(params['out'], x)
  return x, connectors.batch_norm(params['out_norm'], y, axis_name)


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

  Raises:
    ValueError: if there are not as many taps of one as of the other.

  References:
    Yang et al., "Masked Generative Distillation", 2022, arXiv:2205.01529.

  Example:
    With convolutions that change nothing, the error is 1 where the mask is 0,
    at about a quarter of 400 positions:

    >>> from kd_jax.types import Forward
    >>> x = jnp.ones((1, 20, 20, 1))
    >>> inputs = base.Inputs(
    ...   Forward(None, {'s': x}), Forward(None, {'t': x}), {}, jnp.int32(0),
    ...   jax.random.key(0))
    >>> objective = masked_generation(
    ...   student='s', teacher='t', mask_ratio=0.25)
    >>> params, state = objective.init(inputs)
    >>> same = {'kernel': jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)}
    >>> params['0']['generate'] = [same, same]
    >>> params['0']['align']['kernel'] = jnp.ones((1, 1))
    >>> loss, _, _ = objective.apply(params, state, inputs)
    >>> 80 < float(loss[0]) < 120
    True
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
    shape = (*s.shape[:3], 1)
    kept = draw_global(jax.random.uniform, key, shape, inputs.axis_name)
    s = jnp.where(kept >= mask_ratio, s, 0.0)
    first, second = params['generate']
    s = connectors.conv(second, jax.nn.relu(connectors.conv(first, s)))
    return losses.masked_generation(s, t)

  return over_pairs(student, teacher, init_pair, compare)
