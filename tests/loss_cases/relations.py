"""Losses that relate classes or examples: predictions, then embeddings."""

import functools

import numpy as np

from kd_jax import losses
from loss_cases import outputs
from loss_cases.case import Case


def _softmax(z, temperature):
  return np.exp(outputs.log_softmax(z / temperature))


def inter_class_relation(student, teacher, *, temperature):
  p, q = _softmax(student, temperature), _softmax(teacher, temperature)
  r = [np.corrcoef(p[i], q[i])[0, 1] for i in range(len(p))]
  return temperature**2 * (1 - np.array(r))


def intra_class_relation(student, teacher, *, temperature):
  p, q = _softmax(student, temperature).T, _softmax(teacher, temperature).T
  r = [np.corrcoef(p[c], q[c])[0, 1] for c in range(len(p))]
  return temperature**2 * (1 - np.mean(r))


def dist(student, teacher, *, beta, gamma, temperature):
  inter = inter_class_relation(student, teacher, temperature=temperature)
  intra = intra_class_relation(student, teacher, temperature=temperature)
  return beta * inter.mean() + gamma * intra


def batch_relation(student, teacher, *, temperature):
  p, q = _softmax(student, temperature), _softmax(teacher, temperature)
  return np.sum((p @ p.T - q @ q.T) ** 2) / p.shape[0]


def class_relation(student, teacher, *, temperature):
  p, q = _softmax(student, temperature), _softmax(teacher, temperature)
  return np.sum((p.T @ p - q.T @ q) ** 2) / p.shape[1]


def multi_level(student, teacher, *, temperatures):
  return sum(
    outputs.kl_divergence(student, teacher, temperature=t).mean()
    + batch_relation(student, teacher, temperature=t)
    + class_relation(student, teacher, temperature=t)
    for t in temperatures
  )


def _flat(x):
  return x.reshape(len(x), -1)


def _smooth_l1(a, b):
  r = np.abs(a - b)
  return np.where(r < 1, 0.5 * r**2, r - 0.5)


def _relative_distances(x):
  x = _flat(x)
  d = np.linalg.norm(x[:, None] - x[None], axis=-1)
  return d / d[d > 0].mean()


def relational_distance(student, teacher):
  return _smooth_l1(
    _relative_distances(student), _relative_distances(teacher)
  ).mean()


def _angles(x):
  """The cosines `[vertex, i, k]`."""
  x = _flat(x)
  e = x[None] - x[:, None]
  n = np.linalg.norm(e, axis=-1, keepdims=True)
  e = np.divide(e, n, out=np.zeros_like(e), where=n > 0)
  return e @ e.transpose(0, 2, 1)


def relational_angle(student, teacher):
  return _smooth_l1(_angles(student), _angles(teacher)).mean()


def similarity_preserving(student, teacher):
  def similarity(x):
    g = _flat(x) @ _flat(x).T
    return g / np.linalg.norm(g, axis=1, keepdims=True)

  return np.sum((similarity(student) - similarity(teacher)) ** 2) / (
    len(student) ** 2
  )


def probabilistic_transfer(student, teacher):
  def probabilities(x):
    x = _flat(x)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    k = (x @ x.T + 1) / 2
    return k / k.sum(axis=1, keepdims=True)

  k_s, k_t = probabilities(student), probabilities(teacher)
  return np.mean(k_t * np.log((k_t + 1e-7) / (k_s + 1e-7)))


def correlation_congruence(student, teacher):
  d = np.abs(_flat(student) - _flat(teacher))
  return np.mean([d[i] @ d[i + 1] for i in range(len(d) - 1)])


def _logits(rng):
  pair = rng.normal(scale=2.0, size=(2, 8, 5)).astype(np.float32)
  return {'student': pair[0], 'teacher': pair[1]}


def _embeddings(rng):
  pair = rng.normal(size=(2, 8, 6)).astype(np.float32)
  return {'student': pair[0], 'teacher': pair[1]}


def _maps(rng):
  """Of other sizes, so the two can never be equal."""
  return {
    'student': rng.normal(size=(8, 2, 2, 3)).astype(np.float32),
    'teacher': rng.normal(size=(8, 3, 3, 4)).astype(np.float32),
  }


def _case(loss, value, inputs, *, minimum=0.0, permutation=True, **options):
  return Case(
    loss=lambda student, teacher: loss(student, teacher, **options),
    value=functools.partial(value, **options),
    inputs=inputs,
    per_example=loss is losses.inter_class_relation,
    minimum=minimum,
    permutation=permutation,
  )


CASES = {
  'inter_class_relation': _case(
    losses.inter_class_relation, inter_class_relation, _logits, temperature=2.0
  ),
  'intra_class_relation': _case(
    losses.intra_class_relation, intra_class_relation, _logits, temperature=2.0
  ),
  'dist': _case(
    losses.dist, dist, _logits, beta=2.0, gamma=0.5, temperature=4.0
  ),
  'batch_relation': _case(
    losses.batch_relation, batch_relation, _logits, temperature=2.0
  ),
  'class_relation': _case(
    losses.class_relation, class_relation, _logits, temperature=2.0
  ),
  'multi_level': _case(
    losses.multi_level, multi_level, _logits, temperatures=(2.0, 5.0)
  ),
  'correlation_congruence': _case(
    losses.correlation_congruence,
    correlation_congruence,
    _embeddings,
    permutation=False,
  ),
}
for loss, value in (
  (losses.relational_distance, relational_distance),
  (losses.relational_angle, relational_angle),
  (losses.similarity_preserving, similarity_preserving),
  (losses.probabilistic_transfer, probabilistic_transfer),
):
  CASES[loss.__name__] = _case(loss, value, _embeddings)
  CASES[f'{loss.__name__}/maps'] = _case(loss, value, _maps, minimum=None)
