"""CRD: contrastive representation distillation with memory banks on device.

Owns the banks, the draws and the constants; the formula is in `losses`. Two
banks hold one embedding per training example, of student and teacher. A student
embedding is scored against the teacher's bank, its own example's row and rows
of other classes, and the other way round. Negatives are drawn on the device,
and the banks never leave it. Which examples they are drawn from is a choice:
`scope='global'` takes all training examples, `scope='local'` those of the
device's own share of them.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import losses
from kd_jax.losses import numerics
from kd_jax.objectives import base, connectors
from kd_jax.objectives.base import Objective
from kd_jax.objectives.inputs import Inputs
from kd_jax.objectives.scopes import check_scope, local_parts

# Rows are padded to a multiple of this, so that they divide over devices.
ROWS = 128


class OtherClasses:
  """Uniform draws of examples of any class but one.

  Args:
    labels: `[N]` class of every row of the banks; -1 for rows without an
      example, which are never drawn.
    num_classes: how many classes a batch may have; those of `labels` if None.

  Raises:
    ValueError: if there are fewer than two classes.
  """

  def __init__(
    self,
    labels: Sequence[int] | np.ndarray,
    num_classes: int | None = None,
  ):
    labels = np.asarray(labels)
    present = labels[labels >= 0]
    if len(np.unique(present)) < 2:
      raise ValueError('CRD draws negatives from other classes: two at least.')
    order = np.argsort(labels, kind='stable')[len(labels) - len(present) :]
    counts = np.bincount(present, minlength=num_classes or 0)
    self.order = order.astype(np.int32)
    self.starts = (np.cumsum(counts) - counts).astype(np.int32)
    self.counts = counts.astype(np.int32)

  def draw(self, key: jax.Array, label: jax.Array, count: int) -> jax.Array:
    """`[B]` labels -> `[B, count]` rows, with replacement."""
    start = jnp.asarray(self.starts)[label][:, None]
    own = jnp.asarray(self.counts)[label][:, None]
    others = len(self.order) - own
    draws = jax.random.uniform(key, (label.shape[0], count))
    position = jnp.minimum((draws * others).astype(jnp.int32), others - 1)
    # Examples are sorted by class: skip the block of the class itself.
    position = jnp.where(position >= start, position + own, position)
    return jnp.asarray(self.order)[position]


def _shares(labels: np.ndarray, count: int) -> list[OtherClasses]:
  """The draws within each of `count` equal shares of the examples, by id."""
  examples = np.flatnonzero(labels >= 0)
  shares = []
  for own in np.array_split(examples, count):
    kept = np.full_like(labels, -1)
    kept[own] = labels[own]
    if len(np.unique(labels[own])) < 2:
      raise ValueError(
        f"contrastive: scope='local' over {count} devices leaves one of them "
        "examples of fewer than two classes; use scope='global'."
      )
    shares.append(OtherClasses(kept, int(labels.max()) + 1))
  return shares


def _draw_global(
  others: OtherClasses, label: jax.Array, count: int, inputs: Inputs
) -> tuple[jax.Array, int]:
  """Negatives from all examples, other ones on every device: one share."""
  key = inputs.rng
  if inputs.axis_name is not None:
    key = jax.random.fold_in(key, jax.lax.axis_index(inputs.axis_name))
  return others.draw(key, label, count), 1


def _draw_local(
  labels: np.ndarray, label: jax.Array, count: int, inputs: Inputs
) -> tuple[jax.Array, int]:
  """Negatives from the share of each example's device, and how many shares."""
  axis, key = inputs.axis_name, inputs.rng
  parts = local_parts(inputs) if axis is None else jax.lax.axis_size(axis)
  shares = _shares(labels, parts)
  draws = [
    functools.partial(share.draw, jax.random.fold_in(key, i), count=count)
    for i, share in enumerate(shares)
  ]
  if axis is not None:
    return jax.lax.switch(jax.lax.axis_index(axis), draws, label), parts
  if label.shape[0] % parts:
    raise ValueError(
      f'A batch of {label.shape[0]} has no {parts} equal local parts.'
    )
  own = zip(draws, jnp.split(label, parts), strict=True)
  return jnp.concatenate([draw(part) for draw, part in own]), parts


def contrastive(
  *,
  student: str,
  teacher: str,
  labels: Sequence[int] | np.ndarray | None,
  negatives: int = 16384,
  size: int = 128,
  temperature: float = 0.07,
  momentum: float = 0.5,
  scope: str = 'global',
) -> Objective:
  """CRD: contrastive representation distillation.

  The scores exp(<e, m> / temperature) are divided by constants Z that the
  first batch sets, one for each direction: its mean score times N. The batch's
  `id` `[B]` says which rows are its own. Scores come from one product with the
  whole bank, of which 1 + K columns are kept: no row of a bank is gathered,
  and a bank that is sharded over devices stays so.

  Args:
    student: tap of an embedding `[B, D]`.
    teacher: the teacher's.
    labels: `[N]` class of every example by its `id`, -1 for ids of no
      training example; None is refused.
    negatives: K, drawn with replacement, anew in every step; the paper's
      16384 is for data sets of 50000.
    size: of the trained embeddings.
    temperature: of the scores.
    momentum: share of the old row in a bank's update.
    scope: 'global' draws negatives from all N training examples; 'local' from
      the N / n that are the share of the example's device, n devices: the
      i-th n-th of the ids, of which N in the formula is the number then.

  Raises:
    ValueError: without labels, for another scope, or if 'local' leaves a
      device examples of one class.

  References:
    Tian, Krishnan, Isola, "Contrastive Representation Distillation", 2019,
    arXiv:1910.10699.

  Example:
    Both banks are 0 here, so all scores are 1 and both directions lose
    log 5 + 4 log(5 / 4), and the rows of the batch's ids get unit embeddings:

    >>> from kd_jax.types import Forward
    >>> student = Forward(None, {'s': jnp.eye(2)})
    >>> teacher = Forward(None, {'t': jnp.ones((2, 3))})
    >>> batch = {'label': jnp.array([0, 1]), 'id': jnp.array([2, 3])}
    >>> inputs = Inputs(
    ...   student, teacher, batch, jnp.int32(0), jax.random.key(0))
    >>> objective = contrastive(
    ...   student='s', teacher='t', labels=[0, 1, 0, 1], negatives=4, size=8)
    >>> params, state = objective.init(inputs)
    >>> state = jax.tree.map(jnp.zeros_like, state)
    >>> loss, state, _ = objective.apply(params, state, inputs)
    >>> [round(x, 3) for x in loss.tolist()]
    [5.004, 5.004]
    >>> lengths = jnp.linalg.norm(state['bank_student'], axis=1)
    >>> [round(x, 3) for x in lengths[:5].tolist()]
    [0.0, 0.0, 1.0, 1.0, 0.0]
  """
  if labels is None:
    raise ValueError(
      'contrastive needs the labels of all training images by id: images in '
      'memory, not streamed ones, nor those of another data set.'
    )
  check_scope(scope)
  labels = np.asarray(labels)
  others = OtherClasses(labels)
  if scope == 'global':
    draw = functools.partial(_draw_global, others)
  else:
    draw = functools.partial(_draw_local, labels)

  def features(inputs):
    return {
      'student': base.student_feature(inputs, student),
      'teacher': base.teacher_feature(inputs, teacher),
    }

  def init(inputs):
    keys = jax.random.split(inputs.rng, 4)
    params = {
      side: connectors.dense_params(key, x.shape[-1], size)
      for key, (side, x) in zip(keys[:2], features(inputs).items(), strict=True)
    }
    rows = ROWS * math.ceil(len(labels) / ROWS)
    return params, _first_state(keys[2], keys[3], (rows, size))

  def apply(params, state, inputs):
    label, index = base.entry(inputs, 'label'), base.entry(inputs, 'id')
    embed = {
      side: numerics.unit(connectors.dense(params[side], x))
      for side, x in features(inputs).items()
    }
    rows, shares = draw(label, negatives, inputs)
    num_data = len(others.order) / shares
    kept = jnp.concatenate([index[:, None], rows], axis=1)
    total: jax.Array | float = 0.0
    new = {}
    for side, other in (('student', 'teacher'), ('teacher', 'student')):
      scores = _scores(embed[side], state[f'bank_{other}'], kept, temperature)
      z = _constant(state[f'z_{side}'], scores, num_data, inputs)
      new[f'z_{side}'] = z
      total += losses.contrastive_nce(scores / z, num_data=num_data)
    for side, x in embed.items():
      bank = state[f'bank_{side}']
      new[f'bank_{side}'] = _updated(bank, x, index, momentum, inputs)
    return total, new, {}

  return Objective(init, apply, base.read_taps(student, teacher))


def _first_state(
  student: jax.Array, teacher: jax.Array, shape: tuple[int, int]
) -> dict[str, jax.Array]:
  """Random banks `[rows, size]` from two keys, and constants not yet set."""
  # Uniform with the length of a random unit vector, as in the paper's code.
  bound = 1.0 / math.sqrt(shape[1] / 3)
  draw = functools.partial(
    jax.random.uniform, shape=shape, minval=-bound, maxval=bound
  )
  return {
    'bank_student': draw(student),
    'bank_teacher': draw(teacher),
    'z_student': jnp.zeros(()),
    'z_teacher': jnp.zeros(()),
  }


def _scores(
  embedding: jax.Array, bank: jax.Array, kept: jax.Array, temperature: float
) -> jax.Array:
  products = jnp.einsum(
    'bd,nd->bn', embedding, bank, precision=numerics.HIGHEST
  )
  return jnp.exp(jnp.take_along_axis(products, kept, axis=1) / temperature)


def _constant(
  z: jax.Array, scores: jax.Array, num_data: float, inputs: Inputs
) -> jax.Array:
  """Z of earlier steps, or the first batch's mean score times N."""
  mean = jnp.mean(scores)
  if inputs.axis_name is not None:
    mean = jax.lax.pmean(mean, inputs.axis_name)
  return jnp.where(z > 0, z, jax.lax.stop_gradient(mean) * num_data)


def _updated(
  bank: jax.Array,
  embedding: jax.Array,
  index: jax.Array,
  momentum: float,
  inputs: Inputs,
) -> jax.Array:
  """The bank with the batch's rows moved towards their new embeddings."""
  x = jax.lax.stop_gradient(embedding)
  if inputs.axis_name is not None:
    x, index = (
      jax.lax.all_gather(a, inputs.axis_name, tiled=True) for a in (x, index)
    )
  new = numerics.unit(momentum * bank[index] + (1 - momentum) * x)
  return bank.at[index].set(new)
