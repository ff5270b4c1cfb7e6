"""Losses on logits and regression values, with and without a label."""

import functools

import numpy as np

from kd_jax import losses
from loss_cases.case import Case

CLASSES = 5


def log_softmax(z):
  z = np.asarray(z, np.float64)
  z = z - z.max(axis=-1, keepdims=True)
  return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def kl(log_p, log_q):
  return np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)


def kl_divergence(student, teacher, *, temperature, convention='canonical'):
  each = kl(
    log_softmax(teacher / temperature), log_softmax(student / temperature)
  )
  factor = {
    'canonical': temperature**2,
    'no_t2': 1.0,
    'element_mean': temperature**2 / student.shape[-1],
  }
  return factor[convention] * each


def reverse_kl_divergence(student, teacher, *, temperature):
  return kl_divergence(teacher, student, temperature=temperature)


def _mixture(log_p, log_q, share):
  with np.errstate(divide='ignore'):
    return np.log(share * np.exp(log_p) + (1 - share) * np.exp(log_q))


def jensen_shannon(student, teacher, *, beta, temperature):
  log_s = log_softmax(student / temperature)
  log_t = log_softmax(teacher / temperature)
  if beta == 0:
    return kl(log_t, log_s)
  if beta == 1:
    return kl(log_s, log_t)
  # A class without mass in the mixture has none in either part.
  log_m = np.maximum(_mixture(log_t, log_s, beta), -1e300)
  return beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)


def skew_kl_divergence(student, teacher, *, alpha, temperature=1.0):
  log_s = log_softmax(student / temperature)
  log_t = log_softmax(teacher / temperature)
  if alpha == 0:
    return kl(log_t, log_s)
  return kl(log_t, np.maximum(_mixture(log_t, log_s, alpha), -1e300))


def _standardized(z):
  deviation = z.std(axis=-1, ddof=1, keepdims=True)
  return (z - z.mean(axis=-1, keepdims=True)) / (1e-7 + deviation)


def standardized_kl_divergence(student, teacher, *, temperature):
  return kl_divergence(
    _standardized(student), _standardized(teacher), temperature=temperature
  )


def cross_entropy(student, label, *, label_smoothing=0.0):
  classes = student.shape[-1]
  target = (1 - label_smoothing) * np.eye(classes)[label]
  return -np.sum(
    (target + label_smoothing / classes) * log_softmax(student), -1
  )


def hard_distillation(student, teacher, *, label_smoothing=0.0):
  label = teacher.argmax(axis=-1)
  return cross_entropy(student, label, label_smoothing=label_smoothing)


def squared_error(student, teacher):
  return np.mean((student - teacher) ** 2, axis=-1)


def huber(student, teacher, *, delta):
  r = np.abs(student - teacher)
  each = np.where(r <= delta, 0.5 * r**2, delta * (r - 0.5 * delta))
  return each.mean(axis=-1)


def _without(z, label):
  """The logits of the other classes, `[..., C - 1]`."""
  others = np.arange(z.shape[-1]) != label[..., None]
  return z[others].reshape(*z.shape[:-1], z.shape[-1] - 1)


def _log_binary(z, label):
  log_p = log_softmax(z)
  others = _without(log_p, label)
  largest = others.max(axis=-1, keepdims=True)
  rest = np.log(np.exp(others - largest).sum(axis=-1)) + largest[..., 0]
  picked = np.take_along_axis(log_p, label[..., None], axis=-1)[..., 0]
  return np.stack([picked, rest], axis=-1)


def decoupled_kd(student, teacher, label, *, alpha, beta, temperature):
  s, t = student / temperature, teacher / temperature
  target = kl(_log_binary(t, label), _log_binary(s, label))
  others = kl(log_softmax(_without(t, label)), log_softmax(_without(s, label)))
  return temperature**2 * (alpha * target + beta * others)


def normalized_kd(student, teacher, label, *, gamma, temperature):
  log_s, log_t = log_softmax(student), log_softmax(teacher)
  of_label = (np.eye(student.shape[-1])[label] * np.exp(log_t) * log_s).sum(-1)
  q = np.exp(log_softmax(_without(teacher, label) / temperature))
  log_q = log_softmax(_without(student, label) / temperature)
  return -of_label - gamma * temperature**2 * (q * log_q).sum(axis=-1)


def teacher_free_kd(student, label, *, correct_probability, temperature):
  classes = student.shape[-1]
  correct = np.eye(classes)[label]
  rest = (1 - correct_probability) / (classes - 1)
  p = (correct * correct_probability + (1 - correct) * rest) ** (
    1 / temperature
  )
  p /= p.sum(axis=-1, keepdims=True)
  return temperature**2 * kl(np.log(p), log_softmax(student / temperature))


def top_k_kl_divergence(student, teacher, index, *, temperature, tail):
  """One example at a time; `teacher` holds the top probabilities."""
  value = np.zeros(student.shape[:-1])
  for i in np.ndindex(value.shape):
    z, p, top = student[i] / temperature, teacher[i], index[i]
    if tail == 'renormalize':
      z, p = z[top], p / p.sum()
    else:
      full = np.full(len(z), (1 - p.sum()) / (len(z) - len(p)))
      full[top] = p
      p = full
    value[i] = np.sum(p * (np.log(p) - log_softmax(z)))
  return temperature**2 * value


def _logits(rng):
  pair = rng.normal(scale=3.0, size=(2, 8, CLASSES)).astype(np.float32)
  return {'student': pair[0], 'teacher': pair[1]}


def _labels(rng):
  return {'label': rng.integers(0, CLASSES, 8)}


def _with_labels(rng):
  return _logits(rng) | _labels(rng)


def _student_and_labels(rng):
  return {'student': _logits(rng)['student']} | _labels(rng)


def _top_k(rng):
  z = _logits(rng)
  p = np.exp(log_softmax(z['teacher']))
  index = np.argsort(-p, axis=-1)[:, :3]
  top = np.take_along_axis(p, index, axis=-1).astype(np.float32)
  return {'student': z['student'], 'teacher': top, 'index': index}


def _positional(loss, **options):
  """The loss with its arrays by the names that the suite has for them."""
  order = 'student', 'teacher', 'label', 'index'
  return lambda **arrays: loss(
    *(arrays[k] for k in order if k in arrays), **options
  )


def _case(loss, value, *, inputs=_logits, minimum=0.0, **options):
  return Case(
    loss=_positional(loss, **options),
    value=functools.partial(value, **options),
    inputs=inputs,
    per_example=True,
    minimum=minimum,
  )


_kl = functools.partial(_case, losses.kl_divergence, kl_divergence)
_js = functools.partial(_case, losses.jensen_shannon, jensen_shannon)
_skew = functools.partial(_case, losses.skew_kl_divergence, skew_kl_divergence)
_dkd = functools.partial(
  _case, losses.decoupled_kd, decoupled_kd, inputs=_with_labels
)
_nkd = functools.partial(
  _case,
  losses.normalized_kd,
  normalized_kd,
  inputs=_with_labels,
  minimum=None,
)
_hard = functools.partial(
  _case, losses.hard_distillation, hard_distillation, minimum=None
)
_label = functools.partial(
  _case, losses.cross_entropy, cross_entropy, inputs=_student_and_labels
)
_tf = functools.partial(
  _case,
  losses.teacher_free_kd,
  teacher_free_kd,
  inputs=_student_and_labels,
)
_top = functools.partial(
  _case,
  losses.top_k_kl_divergence,
  top_k_kl_divergence,
  inputs=_top_k,
  minimum=None,
)

# The student's values, and the teacher's if any, enter through a softmax.
LOGITS = {
  'kl_divergence/T1': _kl(temperature=1.0),
  'kl_divergence/T4': _kl(temperature=4.0),
  'kl_divergence/T20': _kl(temperature=20.0),
  'kl_divergence/no_t2': _kl(temperature=4.0, convention='no_t2'),
  'kl_divergence/element_mean': _kl(temperature=4.0, convention='element_mean'),
  'reverse_kl_divergence': _case(
    losses.reverse_kl_divergence, reverse_kl_divergence, temperature=2.0
  ),
  'jensen_shannon/0': _js(beta=0.0, temperature=1.0),
  'jensen_shannon/0.1': _js(beta=0.1, temperature=1.0),
  'jensen_shannon/0.5_T2': _js(beta=0.5, temperature=2.0),
  'jensen_shannon/1': _js(beta=1.0, temperature=1.0),
  'skew_kl_divergence/0.1': _skew(alpha=0.1),
  'skew_kl_divergence/0': _skew(alpha=0.0),
  'skew_kl_divergence/0.9_T2': _skew(alpha=0.9, temperature=2.0),
  'standardized_kl_divergence': _case(
    losses.standardized_kl_divergence,
    standardized_kl_divergence,
    temperature=2.0,
  ),
  'hard_distillation': _hard(),
  'hard_distillation/smoothed': _hard(label_smoothing=0.1),
  'cross_entropy': _label(),
  'cross_entropy/smoothed': _label(label_smoothing=0.1),
  'decoupled_kd': _dkd(alpha=1.0, beta=8.0, temperature=4.0),
  'decoupled_kd/target': _dkd(alpha=0.5, beta=0.0, temperature=1.0),
  'normalized_kd': _nkd(gamma=1.5, temperature=1.0),
  'normalized_kd/T2': _nkd(gamma=1.0, temperature=2.0),
  'teacher_free_kd': _tf(correct_probability=0.99, temperature=20.0),
  'teacher_free_kd/T1': _tf(correct_probability=0.8, temperature=1.0),
}
CASES = LOGITS | {
  'squared_error': _case(losses.squared_error, squared_error),
  'huber': _case(losses.huber, huber, delta=1.0),
  'huber/2.5': _case(losses.huber, huber, delta=2.5),
  'top_k_kl_divergence': _top(temperature=1.0, tail='renormalize'),
  'top_k_kl_divergence/uniform': _top(temperature=2.0, tail='uniform'),
}
