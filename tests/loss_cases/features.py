"""Cases of `losses.features` and `losses.maps`: features and maps."""

import functools
import math

import jax.numpy as jnp
import numpy as np

from kd_jax import losses
from loss_cases.case import Case

B, H, W, D = 8, 4, 4, 3


def _normal(rng, *shape):
  return rng.normal(size=shape).astype(np.float32)


def _maps(rng, height=H, width=W, channels=D):
  return _normal(rng, B, height, width, channels)


def _pair(rng):
  return {'student': _maps(rng), 'teacher': _maps(rng)}


def _odd_pair(rng):
  """A larger student whose sides the teacher's do not divide."""
  return {'student': _maps(rng, 5, 6), 'teacher': _maps(rng, 4, 4, 2)}


def _average(x, height, width):
  """Adaptive average pooling, bin by bin."""
  out = np.zeros((len(x), height, width, x.shape[-1]))
  for i in range(height):
    rows = slice(
      math.floor(i * x.shape[1] / height),
      math.ceil((i + 1) * x.shape[1] / height),
    )
    for j in range(width):
      columns = slice(
        math.floor(j * x.shape[2] / width),
        math.ceil((j + 1) * x.shape[2] / width),
      )
      out[:, i, j] = x[:, rows, columns].mean(axis=(1, 2))
  return out


def _to_smaller(a, b):
  size = [min(m, n) for m, n in zip(a.shape[1:3], b.shape[1:3], strict=True)]
  return _average(a, *size), _average(b, *size)


def _hint(student, teacher):
  return ((student - teacher) ** 2).reshape(B, -1).mean(axis=1)


def _masked_generation(student, teacher):
  return ((student - teacher) ** 2).reshape(B, -1).sum(axis=1)


def _vid(student, teacher, variance):
  error = (student - teacher) ** 2
  log_likelihood = -0.5 * error / variance - 0.5 * np.log(variance)
  return -log_likelihood.reshape(B, -1).mean(axis=1)


def _vid_inputs(rng):
  variance = rng.uniform(0.5, 3.0, D).astype(np.float32)
  return {**_pair(rng), 'variance': variance}


def _trained_vid(student, teacher, mean):
  """The student is the variances' logarithm, which trains as well."""
  variance = jnp.exp(jnp.mean(student.astype(jnp.float32), axis=0))
  return jnp.mean(losses.variational_information(mean, teacher, variance))


def _trained_vid_value(student, teacher, mean):
  return _vid(mean, teacher, np.exp(student.mean(axis=0))).mean()


def _trained_vid_inputs(rng):
  return {
    'student': _normal(rng, B, D),
    'teacher': _maps(rng),
    'mean': _maps(rng),
  }


def _hierarchical(student, teacher, levels):
  total, weights = _hint(student, teacher), 1.0
  for k, side in enumerate(levels, 1):
    pooled = [_average(x, side, side) for x in (student, teacher)]
    total = total + 2.0**-k * _hint(*pooled)
    weights += 2.0**-k
  return total / weights


def _activation_boundary(student, teacher, margin):
  low = (student + margin) ** 2 * ((student > -margin) & (teacher <= 0))
  high = (student - margin) ** 2 * ((student <= margin) & (teacher > 0))
  return (low + high).reshape(B, -1).sum(axis=1)


def _overhaul(student, teacher, margin):
  margin = np.broadcast_to(margin, student.shape)
  below = (student > margin) & (teacher <= margin)
  between = (student > teacher) & (teacher > margin) & (teacher <= 0)
  loss = below * (student - margin) ** 2
  loss += (between | (teacher > 0)) * (student - teacher) ** 2
  return loss.reshape(B, -1).sum(axis=1)


def _overhaul_inputs(rng):
  return {**_pair(rng), 'margin': np.float32([-0.5, -1.0, 0.0])}


# Common, rare and certain negative values, and channels that are constant.
SCALE = [1.0, -0.5, 0.2, 0.2, 0.0, 0.0]
BIAS = [0.3, 0.0, 1.0, -1.0, -0.4, 0.3]


def _batch_norm_inputs(rng):
  return {
    'student': _maps(rng, channels=len(SCALE)),
    'teacher': _maps(rng, channels=len(SCALE)),
    'scale': np.float32(SCALE),
    'bias': np.float32(BIAS),
  }


def _overhaul_batch_norm(student, teacher, scale, bias):
  margin = losses.batch_norm_margin(scale, bias)
  return losses.overhaul(student, teacher, margin)


def _overhaul_batch_norm_value(student, teacher, scale, bias):
  return _overhaul(
    student,
    teacher,
    [_negative_mean(abs(s), m) for s, m in zip(scale, bias, strict=True)],
  )


def _negative_mean(std, mean):
  """E[x | x < 0] of a normal x, by the integral over its density."""
  if std == 0:
    return min(mean, 0.0)
  x, step = np.linspace(-12 * std + min(mean, 0.0), 0.0, 200_001, retstep=True)
  density = np.exp(-(((x - mean) / std) ** 2) / 2) / (
    std * math.sqrt(2 * math.pi)
  )
  ends = np.ones_like(x)
  ends[[0, -1]] = 0.5
  mass = (density * ends).sum() * step
  return (x * density * ends).sum() * step / mass if mass > 1e-3 else -3 * std


def _norm_direction(student, teacher, class_means, label):
  loss = np.zeros(B)
  for i in range(B):
    mean = class_means[label[i]]
    along = student[i] @ mean / np.linalg.norm(mean)
    norms = np.linalg.norm(student[i]), np.linalg.norm(teacher[i])
    loss[i] = 1 - along / max(norms)
  return loss


def _norm_direction_inputs(rng):
  return {
    'student': _normal(rng, B, 6),
    # Shorter and longer than the student's.
    'teacher': _normal(rng, B, 6) * np.float32([[0.3], [3.0]] * (B // 2)),
    'class_means': _normal(rng, 4, 6),
    'label': rng.integers(0, 4, B),
  }


def _attention(x, p):
  energy = (np.abs(x) ** p).mean(axis=-1).reshape(B, -1)
  return energy / np.linalg.norm(energy, axis=1, keepdims=True)


def _attention_transfer(student, teacher, p):
  s, t = (_attention(x, p) for x in _to_smaller(student, teacher))
  return ((s - t) ** 2).mean(axis=1)


def _factor_transfer(student, teacher, p1, p2):
  s, t = (_attention(x, p1) for x in _to_smaller(student, teacher))
  return (np.abs(s - t) ** p2).mean(axis=1)


def _neuron_selectivity(student, teacher):
  student, teacher = _to_smaller(student, teacher)

  def kernel(x, y):
    total = 0.0
    for c in range(x.shape[-1]):
      for d in range(y.shape[-1]):
        a, b = x[..., c].ravel(), y[..., d].ravel()
        total += (a @ b / np.linalg.norm(a) / np.linalg.norm(b)) ** 2
    return total / (x.shape[-1] * y.shape[-1])

  return np.array(
    [
      kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)
      for s, t in zip(student, teacher, strict=True)
    ]
  )


def _flow(first, second):
  first, second = _to_smaller(first, second)
  places = first.shape[1] * first.shape[2]
  flat = [x.reshape(B, places, -1) for x in (first, second)]
  return np.stack([a.T @ b / places for a, b in zip(*flat, strict=True)])


def _flow_of_solution(student, teacher):
  return _hint(_flow(*student), _flow(*teacher))


def _flow_inputs(rng):
  return {
    'student': (_maps(rng), _maps(rng, 3, 2, 2)),
    'teacher': (_maps(rng, 2, 2), _maps(rng, 4, 4, 2)),
  }


def _class_attention(student, teacher, size, normalize):
  def summary(x):
    x = _average(x, size, size)
    norm = np.sqrt((x**2).sum(axis=(1, 2), keepdims=True))
    return x / norm if normalize else x

  return _hint(summary(student), summary(teacher))


def _class_maps(rng):
  return {'student': _maps(rng, 5, 4), 'teacher': _maps(rng, 2, 3)}


def _case(loss, value, inputs=_pair, *, options=None, **fields):
  """A case whose hyper-parameters are the same for both."""
  options = options or {}
  return Case(
    functools.partial(loss, **options),
    functools.partial(value, **options),
    inputs,
    per_example=True,
    **fields,
  )


CASES: dict[str, Case] = {
  'hint': _case(losses.hint, _hint),
  'hint/vectors': _case(
    losses.hint,
    _hint,
    lambda rng: {'student': _normal(rng, B, 5), 'teacher': _normal(rng, B, 5)},
  ),
  'masked_generation': _case(
    lambda student, teacher: losses.masked_generation(student, teacher),
    _masked_generation,
  ),
  'variational_information': _case(
    lambda student, **others: losses.variational_information(student, **others),
    _vid,
    _vid_inputs,
    minimum=lambda inputs: 0.5 * np.log(inputs['variance']).mean(),
    shared=('variance',),
  ),
  'variational_information/trained_variance': Case(
    _trained_vid,
    _trained_vid_value,
    _trained_vid_inputs,
    per_example=False,
    minimum=None,
  ),
  'hierarchical_context': _case(
    losses.hierarchical_context, functools.partial(_hierarchical, levels=(2, 1))
  ),
  'hierarchical_context/three_levels': _case(
    losses.hierarchical_context,
    functools.partial(_hierarchical, levels=(4, 2, 1)),
    lambda rng: {'student': _maps(rng, 5, 6), 'teacher': _maps(rng, 5, 6)},
  ),
  'activation_boundary': _case(
    losses.activation_boundary,
    _activation_boundary,
    options={'margin': 1.0},
    minimum=None,
  ),
  'activation_boundary/margin_0.5': _case(
    losses.activation_boundary,
    _activation_boundary,
    options={'margin': 0.5},
    minimum=None,
  ),
  'overhaul': _case(
    losses.overhaul, _overhaul, _overhaul_inputs, shared=('margin',)
  ),
  'batch_norm_margin': _case(
    _overhaul_batch_norm,
    _overhaul_batch_norm_value,
    _batch_norm_inputs,
    shared=('scale', 'bias'),
  ),
  'norm_direction': _case(
    losses.norm_direction,
    _norm_direction,
    _norm_direction_inputs,
    minimum=None,
    shared=('class_means',),
  ),
  'attention_transfer': _case(
    losses.attention_transfer, _attention_transfer, options={'p': 2.0}
  ),
  'attention_transfer/p1': _case(
    losses.attention_transfer, _attention_transfer, options={'p': 1.0}
  ),
  'attention_transfer/p3_pooled': _case(
    losses.attention_transfer,
    _attention_transfer,
    _odd_pair,
    options={'p': 3.0},
  ),
  # No minimum to test: rounding decides the sign of a difference of zero.
  'factor_transfer': _case(
    losses.factor_transfer,
    _factor_transfer,
    options={'p1': 2.0, 'p2': 1.0},
    minimum=None,
  ),
  'factor_transfer/p3_2_pooled': _case(
    losses.factor_transfer,
    _factor_transfer,
    _odd_pair,
    options={'p1': 3.0, 'p2': 2.0},
  ),
  'neuron_selectivity': _case(losses.neuron_selectivity, _neuron_selectivity),
  'neuron_selectivity/pooled': _case(
    losses.neuron_selectivity, _neuron_selectivity, _odd_pair
  ),
  'flow_of_solution': _case(
    losses.flow_of_solution, _flow_of_solution, _flow_inputs
  ),
  'class_attention': _case(
    lambda student, teacher, **options: losses.class_attention(
      student, teacher, **options
    ),
    _class_attention,
    _class_maps,
    options={'size': 2, 'normalize': True},
  ),
  'class_attention/not_normalized': _case(
    lambda student, teacher, **options: losses.class_attention(
      student, teacher, **options
    ),
    _class_attention,
    _class_maps,
    options={'size': 2, 'normalize': False},
  ),
}
