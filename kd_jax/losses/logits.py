"""Losses on logits and regression values: one formula, one paper, one function.

Every loss is pure, computed in float32 whatever the inputs' dtype, unreduced
over the leading axes (`[..., C] -> [...]`), and takes its hyper-parameters by
keyword. Owns no weights, no schedules and no batch mean: see `objectives`.
Losses that need the label or a part of the classes are in `targets`.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import numerics
from kd_jax.types import check_same_shape

_SAME_CLASSES = 'teacher and student must have the same classes'


def _pair(
  student_logits: ArrayLike, teacher_logits: ArrayLike
) -> tuple[jax.Array, jax.Array]:
  """Both as float32, the teacher's as a constant."""
  student_logits = numerics.float32(student_logits)
  teacher_logits = numerics.constant(teacher_logits)
  check_same_shape(
    _SAME_CLASSES, student_logits=student_logits, teacher_logits=teacher_logits
  )
  return student_logits, teacher_logits


def kl_divergence(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  temperature: ArrayLike = 4.0,
  convention: str = 'canonical',
) -> jax.Array:
  """Knowledge distillation: KL(teacher || student) of softened softmaxes.

  With p(T) = softmax(logits / T) the loss of one example is
    T**2 * sum_c p_teacher(T)[c] * log(p_teacher(T)[c] / p_student(T)[c]),
  summed over classes. Its mean over a batch is the canonical convention of
  this library; T**2 keeps the gradient's size independent of T. The other
  conventions are those of code whose published weights assume them.

  Args:
    student_logits: `[..., C]` unnormalised scores, any float dtype.
    teacher_logits: `[..., C]`, treated as constant.
    temperature: softmax temperature T > 0, a float or a scalar array.
    convention: 'canonical' as above; 'no_t2' without the factor T**2;
      'element_mean' with the mean over classes in place of their sum, C times
      smaller.

  Returns:
    `[...]` float32, 0 when the two softmaxes agree and else positive, up to
    rounding of about 2e-7 * T**2.

  Raises:
    ValueError: if the shapes differ, as they do when teacher and student were
      built for other classes, or the convention is unknown.

  Example:
    >>> logits = jnp.array([[2.0, -1.0, 0.5]])
    >>> kl_divergence(logits, logits).tolist()
    [0.0]

  References:
    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network",
    2015, arXiv:1503.02531.
  """
  student_logits, teacher_logits = _pair(student_logits, teacher_logits)
  kl = numerics.kl(
    jax.nn.log_softmax(teacher_logits / temperature),
    jax.nn.log_softmax(student_logits / temperature),
  )
  if convention == 'canonical':
    return kl * temperature**2
  if convention == 'no_t2':
    return kl
  if convention == 'element_mean':
    return kl * temperature**2 / student_logits.shape[-1]
  raise ValueError(
    f'Unknown convention {convention!r} of kl_divergence: valid: canonical, '
    'element_mean, no_t2.'
  )


def reverse_kl_divergence(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  temperature: ArrayLike = 1.0,
) -> jax.Array:
  """KL(student || teacher) of softened softmaxes, times T**2.

  It seeks the teacher's modes, where `kl_divergence` covers them all. The
  paper estimates it from samples of the student; this is its exact value for
  the distribution over one token or class.

  Args:
    student_logits: `[..., C]` unnormalised scores, any float dtype.
    teacher_logits: `[..., C]`, treated as constant. Where it is -inf the loss
      is infinite, unless the student gives that class no mass either.
    temperature: softmax temperature T > 0, a float or a scalar array.

  Returns:
    `[...]` float32, 0 when the two softmaxes agree and else positive, up to
    rounding.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> logits = jnp.array([[2.0, -1.0, 0.5]])
    >>> reverse_kl_divergence(logits, logits).tolist()
    [0.0]

  References:
    Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models",
    2023, arXiv:2306.08543.
  """
  student_logits, teacher_logits = _pair(student_logits, teacher_logits)
  kl = numerics.kl(
    jax.nn.log_softmax(student_logits / temperature),
    jax.nn.log_softmax(teacher_logits / temperature),
  )
  return kl * temperature**2


def jensen_shannon(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  beta: float = 0.5,
  temperature: ArrayLike = 1.0,
) -> jax.Array:
  """The generalised Jensen-Shannon divergence of GKD, between the two KLs.

  With the mixture m = beta * p_teacher + (1 - beta) * p_student it is
    beta * KL(p_teacher || m) + (1 - beta) * KL(p_student || m),
  without a factor T**2. That vanishes at both ends, so there it is replaced:
  beta = 0 is KL(teacher || student), beta = 1 is KL(student || teacher), as
  the paper's own comparison has them. Near the ends the formula is as small
  as min(beta, 1 - beta) times those.

  Args:
    student_logits: `[..., C]` unnormalised scores, any float dtype.
    teacher_logits: `[..., C]`, treated as constant.
    beta: the teacher's share of the mixture, in [0, 1].
    temperature: softmax temperature T > 0 of both, a float or a scalar array.

  Returns:
    `[...]` float32, 0 when the two softmaxes agree and else positive, up to
    rounding.

  Raises:
    ValueError: if the shapes differ or `beta` is outside [0, 1].

  Example:
    >>> logits = jnp.array([[2.0, -1.0, 0.5]])
    >>> abs(round(float(jensen_shannon(logits, logits)[0]), 6))
    0.0

  References:
    Agarwal et al., "On-Policy Distillation of Language Models: Learning from
    Self-Generated Mistakes", 2023, arXiv:2306.13649.
  """
  if not 0 <= beta <= 1:
    raise ValueError(f'jensen_shannon: beta must be in [0, 1], not {beta}.')
  student_logits, teacher_logits = _pair(student_logits, teacher_logits)
  log_student = jax.nn.log_softmax(student_logits / temperature)
  log_teacher = jax.nn.log_softmax(teacher_logits / temperature)
  if beta == 0:
    return numerics.kl(log_teacher, log_student)
  if beta == 1:
    return numerics.kl(log_student, log_teacher)
  log_mixture = _log_mixture(log_teacher, log_student, beta)
  from_teacher = numerics.kl(log_teacher, log_mixture)
  from_student = numerics.kl(log_student, log_mixture)
  return beta * from_teacher + (1 - beta) * from_student


def skew_kl_divergence(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  alpha: float = 0.1,
  temperature: ArrayLike = 1.0,
) -> jax.Array:
  """KL(teacher || alpha * teacher + (1 - alpha) * student), as in DistiLLM.

  The teacher's share bounds the loss by -log(alpha), and with it the gradient
  where the student gives a class of the teacher next to no mass. There is no
  factor T**2.

  Args:
    student_logits: `[..., C]` unnormalised scores, any float dtype.
    teacher_logits: `[..., C]`, treated as constant.
    alpha: the teacher's share of the mixture, in [0, 1); 0 is the KL itself.
    temperature: softmax temperature T > 0 of both, a float or a scalar array.

  Returns:
    `[...]` float32, 0 when the two softmaxes agree and else positive, up to
    rounding.

  Raises:
    ValueError: if the shapes differ or `alpha` is outside [0, 1).

  Example:
    >>> logits = jnp.array([[2.0, -1.0, 0.5]])
    >>> abs(round(float(skew_kl_divergence(logits, logits)[0]), 6))
    0.0

  References:
    Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language
    Models", 2024, arXiv:2402.03898.
  """
  if not 0 <= alpha < 1:
    raise ValueError(
      f'skew_kl_divergence: alpha must be in [0, 1), not {alpha}.'
    )
  student_logits, teacher_logits = _pair(student_logits, teacher_logits)
  log_student = jax.nn.log_softmax(student_logits / temperature)
  log_teacher = jax.nn.log_softmax(teacher_logits / temperature)
  if alpha == 0:
    return numerics.kl(log_teacher, log_student)
  return numerics.kl(log_teacher, _log_mixture(log_teacher, log_student, alpha))


def _log_mixture(log_p: jax.Array, log_q: jax.Array, share: float) -> jax.Array:
  """log(share * p + (1 - share) * q) for a share in (0, 1)."""
  # Where neither has mass the derivative of logaddexp is NaN.
  possible = jnp.maximum(log_p, log_q) > -jnp.inf
  log_p, log_q = (jnp.where(possible, x, 0.0) for x in (log_p, log_q))
  mixture = jnp.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
  return jnp.where(possible, mixture, -jnp.inf)


def standardize_logits(logits: ArrayLike, *, eps: float = 1e-7) -> jax.Array:
  """The z-score of each example's logits: (z - mean) / (eps + std).

  The standard deviation is the unbiased one, of C - 1 degrees of freedom, as
  in the published code.

  Args:
    logits: `[..., C]` with C >= 2, any float dtype.
    eps: added to the standard deviation.

  Returns:
    `[..., C]` float32; zeros, with gradient 0, where all logits are equal.

  Raises:
    ValueError: if there is only one class.

  Example:
    >>> standardize_logits(jnp.array([1.0, 2.0, 3.0])).round(4).tolist()
    [-1.0, 0.0, 1.0]

  References:
    Sun et al., "Logit Standardization in Knowledge Distillation", 2024,
    arXiv:2403.01427.
  """
  logits = numerics.float32(logits)
  classes = logits.shape[-1]
  if classes < 2:
    raise ValueError('standardize_logits: one class has no deviation.')
  centred = logits - jnp.mean(logits, axis=-1, keepdims=True)
  deviation = numerics.norm(centred, keepdims=True) / math.sqrt(classes - 1)
  # 1 / eps is no gradient to train with.
  return jnp.where(deviation > 0, centred / (eps + deviation), 0.0)


def standardized_kl_divergence(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  temperature: ArrayLike = 2.0,
) -> jax.Array:
  """`kl_divergence` of the `standardize_logits` of both sides.

  The student then follows the teacher's order and proportions of logits, not
  their size, so the loss ignores a positive factor on either side.

  Args:
    student_logits: `[..., C]` unnormalised scores with C >= 2, any float
      dtype.
    teacher_logits: `[..., C]`, treated as constant.
    temperature: softmax temperature T > 0, a float or a scalar array.

  Returns:
    `[...]` float32, 0 when the standardized logits agree and else positive,
    up to rounding; times T**2.

  Raises:
    ValueError: if the shapes differ or there is only one class.

  Example:
    >>> logits = jnp.array([[2.0, -1.0, 0.5]])
    >>> standardized_kl_divergence(logits, logits).tolist()
    [0.0]

  References:
    Sun et al., "Logit Standardization in Knowledge Distillation", 2024,
    arXiv:2403.01427.
  """
  student_logits, teacher_logits = _pair(student_logits, teacher_logits)
  return kl_divergence(
    standardize_logits(student_logits),
    standardize_logits(teacher_logits),
    temperature=temperature,
  )


def cross_entropy(
  logits: ArrayLike, label: ArrayLike, *, label_smoothing: float = 0.0
) -> jax.Array:
  """Cross-entropy of logits with integer labels.

  Args:
    logits: `[..., C]` unnormalised scores, any float dtype.
    label: `[...]` integer class ids in [0, C).
    label_smoothing: share of the target spread evenly over all C classes,
      in [0, 1) (Szegedy et al. 2016, arXiv:1512.00567).

  Returns:
    `[...]` float32, >= 0.

  Raises:
    ValueError: if `label` does not have the shape of `logits` without its
      last axis.

  Example:
    >>> round(float(cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))[0]), 4)
    1.3863
  """
  logits, label = numerics.float32(logits), jnp.asarray(label)
  check_same_shape(
    'labels are one integer per prediction',
    label=label,
    prediction=logits[..., 0],
  )
  log_p = jax.nn.log_softmax(logits)
  picked = jnp.take_along_axis(log_p, label[..., None], axis=-1)[..., 0]
  if not label_smoothing:
    return -picked
  uniform = -jnp.mean(log_p, axis=-1)
  return -(1 - label_smoothing) * picked + label_smoothing * uniform


def hard_distillation(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  label_smoothing: float = 0.0,
) -> jax.Array:
  """Cross-entropy with the class that the teacher finds likeliest.

  Args:
    student_logits: `[..., C]` unnormalised scores, any float dtype; in DeiT
      those of the distillation token.
    teacher_logits: `[..., C]`; the first of equal maxima is the label.
    label_smoothing: share of the target spread evenly over all C classes,
      in [0, 1).

  Returns:
    `[...]` float32, >= 0.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> teacher = jnp.array([[2.0, 9.0, 0.5]])
    >>> round(float(hard_distillation(jnp.zeros((1, 3)), teacher)[0]), 4)
    1.0986

  References:
    Touvron et al., "Training data-efficient image transformers & distillation
    through attention", 2020, arXiv:2012.12877.
  """
  student_logits, teacher_logits = _pair(student_logits, teacher_logits)
  return cross_entropy(
    student_logits,
    jnp.argmax(teacher_logits, axis=-1),
    label_smoothing=label_smoothing,
  )


def squared_error(prediction: ArrayLike, target: ArrayLike) -> jax.Array:
  """Mean over the last axis of the squared difference.

  On regression values the ordinary mean squared error; on logits the
  distillation of Ba and Caruana. Averaged over a batch it is the mean over
  all elements.

  Args:
    prediction: `[..., D]`, any float dtype.
    target: `[..., D]`; gradients do not flow into it.

  Returns:
    `[...]` float32.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> squared_error(jnp.array([[1.0, 3.0]]), jnp.zeros((1, 2))).tolist()
    [5.0]

  References:
    Ba, Caruana, "Do Deep Nets Really Need to be Deep?", 2014,
    arXiv:1312.6184.
  """
  prediction, target = numerics.float32(prediction), numerics.constant(target)
  check_same_shape('squared_error', prediction=prediction, target=target)
  return jnp.mean(jnp.square(prediction - target), axis=-1)


def huber(
  prediction: ArrayLike, target: ArrayLike, *, delta: float = 1.0
) -> jax.Array:
  """Mean over the last axis of Huber's function of the difference.

  For a difference r it is r**2 / 2 where |r| <= delta, and from there on the
  straight line delta * (|r| - delta / 2). With delta = 1 it is also known as
  smooth L1.

  Args:
    prediction: `[..., D]`, any float dtype.
    target: `[..., D]`; gradients do not flow into it.
    delta: where the parabola ends, > 0, in the units of the prediction.

  Returns:
    `[...]` float32.

  Raises:
    ValueError: if the shapes differ.

  Example:
    >>> huber(jnp.array([[1.0, 3.0]]), jnp.zeros((1, 2))).tolist()
    [1.5]

  References:
    Huber, "Robust Estimation of a Location Parameter", Annals of Mathematical
    Statistics 35, 1964.
  """
  prediction, target = numerics.float32(prediction), numerics.constant(target)
  check_same_shape('huber', prediction=prediction, target=target)
  residual = prediction - target
  size = jnp.abs(residual)
  inside = jnp.minimum(size, delta)
  return jnp.mean(inside * (size - 0.5 * inside), axis=-1)
