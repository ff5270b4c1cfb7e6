"""Divergences of two softmaxes: one formula, one paper, one function.

Every loss is pure, computed in float32 whatever the inputs' dtype, unreduced
over the leading axes (`[..., C] -> [...]`), and takes its hyper-parameters by
keyword. Owns no weights, no schedules and no batch mean: see `objectives`.
Losses that learn one class are in `labels`, those that treat the label's class
apart or know a part of the classes in `targets`.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd_jax.losses import numerics


def _log_softmaxes(
  student_logits: ArrayLike, teacher_logits: ArrayLike, temperature: ArrayLike
) -> tuple[jax.Array, jax.Array]:
  """Both networks' log-probabilities; the teacher's are constant."""
  student, teacher = numerics.softened(
    student_logits, teacher_logits, temperature
  )
  return jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)


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
    The teacher's (2/3, 1/3) and the student's (1/4, 3/4) at T = 2 give
    4 (2/3 log(8/3) + 1/3 log(4/9)):
    >>> student = 2 * jnp.log(jnp.array([[1.0, 3.0]]))
    >>> teacher = 2 * jnp.log(jnp.array([[2.0, 1.0]]))
    >>> loss = kl_divergence(student, teacher, temperature=2.0)
    >>> round(loss.item(), 4)
    1.5343

  References:
    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network",
    2015, arXiv:1503.02531.
  """
  log_student, log_teacher = _log_softmaxes(
    student_logits, teacher_logits, temperature
  )
  kl = numerics.kl(log_teacher, log_student)
  if convention == 'canonical':
    return kl * temperature**2
  if convention == 'no_t2':
    return kl
  if convention == 'element_mean':
    return kl * temperature**2 / log_student.shape[-1]
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
    The teacher's (2/3, 1/3) and the student's (1/4, 3/4) at T = 2 give
    4 (1/4 log(3/8) + 3/4 log(9/4)):
    >>> student = 2 * jnp.log(jnp.array([[1.0, 3.0]]))
    >>> teacher = 2 * jnp.log(jnp.array([[2.0, 1.0]]))
    >>> loss = reverse_kl_divergence(student, teacher, temperature=2.0)
    >>> round(loss.item(), 4)
    1.452

  References:
    Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models",
    2023, arXiv:2306.08543.
  """
  log_student, log_teacher = _log_softmaxes(
    student_logits, teacher_logits, temperature
  )
  return numerics.kl(log_student, log_teacher) * temperature**2


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
    ValueError: if the shapes differ, or `beta` is a schedule or outside [0, 1].

  Example:
    The mixture of 1/5 (2/3, 1/3) and 4/5 (1/4, 3/4) is m = (1/3, 2/3):
    >>> student = 2 * jnp.log(jnp.array([[1.0, 3.0]]))
    >>> teacher = 2 * jnp.log(jnp.array([[2.0, 1.0]]))
    >>> loss = jensen_shannon(student, teacher, beta=0.2, temperature=2.0)
    >>> round(loss.item(), 4)
    0.0593

  References:
    Agarwal et al., "On-Policy Distillation of Language Models: Learning from
    Self-Generated Mistakes", 2023, arXiv:2306.13649.
  """
  _check_share('jensen_shannon: beta', beta, ']')
  log_student, log_teacher = _log_softmaxes(
    student_logits, teacher_logits, temperature
  )
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
    ValueError: if the shapes differ, or `alpha` is a schedule or outside
      [0, 1).

  Example:
    KL((2/3, 1/3) || (1/3, 2/3)) = log(2) / 3, the student being (1/4, 3/4):
    >>> student = 2 * jnp.log(jnp.array([[1.0, 3.0]]))
    >>> teacher = 2 * jnp.log(jnp.array([[2.0, 1.0]]))
    >>> loss = skew_kl_divergence(student, teacher, alpha=0.2, temperature=2.0)
    >>> round(loss.item(), 3)
    0.231

  References:
    Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language
    Models", 2024, arXiv:2402.03898.
  """
  _check_share('skew_kl_divergence: alpha', alpha, ')')
  log_student, log_teacher = _log_softmaxes(
    student_logits, teacher_logits, temperature
  )
  if alpha == 0:
    return numerics.kl(log_teacher, log_student)
  return numerics.kl(log_teacher, _log_mixture(log_teacher, log_student, alpha))


def _check_share(what: str, share: float, end: str) -> None:
  try:
    inside = 0 <= share <= 1 and (share < 1 or end == ']')
  except jax.errors.TracerBoolConversionError:
    raise ValueError(f'{what} is a number, not a schedule.') from None
  if not inside:
    raise ValueError(f'{what} must be in [0, 1{end}, not {share}.')


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
  varies = numerics.varies(logits, centred)
  centred = jnp.where(varies, centred, 0.0)
  deviation = numerics.norm(centred, keepdims=True) / math.sqrt(classes - 1)
  # 1 / eps is no gradient to train with.
  return jnp.where(varies, centred / (eps + deviation), 0.0)


def standardized_kl_divergence(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  temperature: ArrayLike = 2.0,
  convention: str = 'canonical',
) -> jax.Array:
  """`kl_divergence` of the `standardize_logits` of both sides.

  The student then follows the teacher's order and proportions of logits, not
  their size, so the loss ignores a positive factor on either side.

  Args:
    student_logits: `[..., C]` unnormalised scores with C >= 2, any float
      dtype.
    teacher_logits: `[..., C]`, treated as constant.
    temperature: softmax temperature T > 0, a float or a scalar array.
    convention: see `kl_divergence`.

  Returns:
    `[...]` float32, 0 when the standardized logits agree and else positive,
    up to rounding; times T**2.

  Raises:
    ValueError: if the shapes differ, there is only one class, or the convention
      is unknown.

  Example:
    As `kl_divergence` of (1, -1, 0) and (-1, 0, 1), whatever the scale:
    >>> student = jnp.array([[30.0, 10.0, 20.0]])
    >>> teacher = jnp.array([[1.0, 2.0, 3.0]])
    >>> loss = standardized_kl_divergence(student, teacher, temperature=2.0)
    >>> round(loss.item(), 3)
    0.882

  References:
    Sun et al., "Logit Standardization in Knowledge Distillation", 2024,
    arXiv:2403.01427.
  """
  student, teacher = numerics.logits_pair(student_logits, teacher_logits)
  return kl_divergence(
    standardize_logits(student),
    standardize_logits(teacher),
    temperature=temperature,
    convention=convention,
  )
