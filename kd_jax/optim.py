"""Optimizers and schedules by name, built from optax.

Owns what a name means and the order of one update; pruning wraps the result.
That order is: clip the gradients, add coupled L1 and L2, scale as the optimizer
does, add decoupled L1 and L2, multiply by the learning rate.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kd_jax import networks, rules

Schedule = Callable[[Any], Any]


def _cosine(
  peak: float,
  total_steps: int,
  end: float,
  boundaries: Sequence[float],
  factor: float,
) -> optax.Schedule:
  return optax.cosine_decay_schedule(peak, total_steps, alpha=end / peak)


def _constant(
  peak: float,
  total_steps: int,
  end: float,
  boundaries: Sequence[float],
  factor: float,
) -> optax.Schedule:
  return optax.constant_schedule(peak)


def _step(
  peak: float,
  total_steps: int,
  end: float,
  boundaries: Sequence[float],
  factor: float,
) -> optax.Schedule:
  if not all(0 <= b <= 1 for b in boundaries):
    raise ValueError(
      f'boundaries={tuple(boundaries)} are not shares of the training, in '
      '[0, 1].'
    )
  at: dict[int, float] = {}
  for b in boundaries:
    step = round(b * total_steps)
    at[step] = at.get(step, 1.0) * factor
  return optax.piecewise_constant_schedule(peak, at)


def _linear(
  peak: float,
  total_steps: int,
  end: float,
  boundaries: Sequence[float],
  factor: float,
) -> optax.Schedule:
  return optax.linear_schedule(peak, end, total_steps)


SCHEDULES = {
  'constant': _constant,
  'cosine': _cosine,
  'linear': _linear,
  'step': _step,
}


def make_schedule(
  name: str,
  *,
  peak: float,
  total_steps: int,
  warmup_steps: int = 0,
  end: float = 0.0,
  boundaries: Sequence[float] = (0.6, 0.75, 0.9),
  factor: float = 0.1,
) -> Schedule:
  """A learning-rate schedule by name: constant, cosine, linear or step.

  Args:
    name: one of `SCHEDULES`.
    peak: the rate after the warm-up, > 0.
    total_steps: length of the whole run in steps, warm-up included.
    warmup_steps: steps of linear rise from 0 to `peak`.
    end: last value of 'cosine' and 'linear'.
    boundaries: for 'step', where the rate falls, as shares of the steps that
      follow the warm-up.
    factor: for 'step', what the rate is multiplied by at each boundary.

  Returns:
    `step -> rate`.

  Raises:
    ValueError: for an unknown name, a warm-up longer than the run, or
      boundaries outside of [0, 1].

  Example:
    >>> schedule = make_schedule('cosine', peak=0.1, total_steps=100)
    >>> [round(float(schedule(s)), 3) for s in (0, 50, 100)]
    [0.1, 0.05, 0.0]
  """
  make = rules.choose('schedule', name, SCHEDULES)
  if peak <= 0:
    raise ValueError(f'The peak of a schedule must be > 0, not {peak}.')
  if not 0 <= warmup_steps < max(total_steps, 1):
    raise ValueError(
      f'warmup_steps={warmup_steps} does not fit into {total_steps} steps.'
    )
  after = make(peak, total_steps - warmup_steps, end, boundaries, factor)
  if not warmup_steps:
    return after
  rise = optax.linear_schedule(0.0, peak, warmup_steps)
  return optax.join_schedules([rise, after], [warmup_steps])


def _momentum(momentum: float = 0.9) -> optax.GradientTransformation:
  return optax.trace(momentum) if momentum else optax.identity()


def _adam(
  b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
  return optax.scale_by_adam(b1, b2, eps)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  'sgd': lambda: optax.identity(),
  'momentum': _momentum,
  'nesterov': lambda momentum=0.9: optax.trace(momentum, nesterov=True),
  'adagrad': lambda eps=1e-8: optax.scale_by_rss(
    initial_accumulator_value=0.1, eps=eps
  ),
  'rmsprop': lambda momentum=0.9, eps=1e-8: optax.chain(
    optax.scale_by_rms(decay=0.9, eps=eps), _momentum(momentum)
  ),
  'adam': _adam,
  'adamw': _adam,
  'lion': lambda b1=0.9, b2=0.999: optax.scale_by_lion(b1, b2),
  'lamb': _adam,
}
# Those whose papers decouple weight decay from the gradient.
_DECOUPLED = ('adamw', 'lion', 'lamb')


def make_optimizer(
  name: str,
  *,
  learning_rate: float | Schedule,
  momentum: float | None = None,
  b1: float | None = None,
  b2: float | None = None,
  eps: float | None = None,
  l1: float = 0.0,
  l2: float = 0.0,
  decoupled: bool | None = None,
  decayed: str = '.*/kernel',
  clip_norm: float | None = None,
  clip_value: float | None = None,
) -> optax.GradientTransformation:
  """An optax chain by name.

  Args:
    name: one of `OPTIMIZERS`: sgd, momentum, nesterov, adagrad, rmsprop,
      adam, adamw, lion, lamb.
    learning_rate: a float, or a schedule `step -> rate`.
    momentum: of momentum, nesterov and rmsprop (0 turns it off); 0.9 when
      None.
    b1: decay of the first moment (Adam, Lion, LAMB); 0.9 when None.
    b2: decay of the second moment; 0.999 when None, Lion's paper uses 0.99.
    eps: added to denominators (all but sgd, momentum, nesterov and lion); 1e-8
      when None.
    l1: strength of the L1 penalty l1 * |w|.
    l2: strength of the L2 penalty, l2 / 2 * w**2 when coupled; weight decay
      when decoupled.
    decoupled: False adds the penalties' gradients before the optimizer
      scales them, True after (arXiv:1711.05101); None is True for adamw, lion
      and lamb, False for the rest.
    decayed: `re.fullmatch` pattern of the parameter paths that L1 and L2 reach.
    clip_norm: largest global norm of the gradients.
    clip_value: largest absolute value of a gradient.

  Raises:
    ValueError: for an unknown name, one of the first four options that the
      optimizer has not, or an option that is out of range.

  References:
    Loshchilov, Hutter, "Decoupled Weight Decay Regularization", 2017,
    arXiv:1711.05101 (adamw); Chen et al., "Symbolic Discovery of Optimization
    Algorithms", 2023, arXiv:2302.06675 (lion); You et al., "Large Batch
    Optimization for Deep Learning", 2019, arXiv:1904.00962 (lamb).

  Example:
    >>> params = {'dense': {'kernel': jnp.ones(1), 'bias': jnp.ones(1)}}
    >>> grads = jax.tree.map(jnp.zeros_like, params)
    >>> tx = make_optimizer('adamw', learning_rate=0.5, l2=0.5)
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    >>> {name: x.tolist() for name, x in params['dense'].items()}
    {'bias': [1.0], 'kernel': [0.75]}
  """
  own = {'momentum': momentum, 'b1': b1, 'b2': b2, 'eps': eps}
  scaling = _scaling(name, {k: v for k, v in own.items() if v is not None})
  for option, value in {
    'clip_norm': clip_norm,
    'clip_value': clip_value,
    'l1': l1,
    'l2': l2,
  }.items():
    if value is not None and value < 0:
      raise ValueError(f'{option}={value} must not be negative.')
  if decoupled is None:
    decoupled = name in _DECOUPLED

  def selected(params):
    names = rules.leaf_names(params)
    chosen = rules.match([(decayed, True)], names, kind='decayed')
    return jax.tree.unflatten(
      jax.tree.structure(params), [name in chosen for name in names]
    )

  penalties = []
  if l1 or l2:
    penalties = [optax.masked(_add_penalties(l1, l2), selected)]
  return optax.chain(
    *([optax.clip_by_global_norm(clip_norm)] if clip_norm else []),
    *([optax.clip(clip_value)] if clip_value else []),
    *([] if decoupled else penalties),
    scaling,
    *(penalties if decoupled else []),
    *([optax.scale_by_trust_ratio()] if name == 'lamb' else []),
    optax.scale_by_learning_rate(learning_rate),
  )


def _scaling(
  name: str, options: dict[str, float]
) -> optax.GradientTransformation:
  make = rules.choose('optimizer', name, OPTIMIZERS)
  known = inspect.signature(make).parameters
  for option in options:
    if option not in known:
      raise ValueError(
        f'Optimizer {name!r} has no {option!r}; of these options it has '
        f'{", ".join(known) or "none"}.'
      )
  return make(**options)


def _add_penalties(l1: float, l2: float) -> optax.GradientTransformation:
  def update(updates, state, params):
    added = jax.tree.map(
      lambda u, p: u + l1 * jnp.sign(p) + l2 * p, updates, params
    )
    return added, state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class AverageState(NamedTuple):
  """State of `average_params`.

  Attributes:
    average: of the parameters, in their shapes; float32 at least.
    inner: the state of the wrapped optimizer.

  Example:
    >>> tx = average_params(optax.sgd(1.0), decay=0.9)
    >>> state = tx.init({'w': jnp.ones(2, jnp.bfloat16)})
    >>> state.average['w'].tolist(), state.average['w'].dtype.name
    ([1.0, 1.0], 'float32')
  """

  average: Any
  inner: Any


def freeze(
  tx: optax.GradientTransformation, pattern: str
) -> optax.GradientTransformation:
  """An optimizer that leaves some parameters as they are.

  Args:
    tx: any optimizer.
    pattern: `re.fullmatch` pattern of the frozen parameters' paths.

  Raises:
    ValueError: in `init`, if the pattern matches nothing.

  Example:
    >>> tx = freeze(optax.sgd(1.0), 'head/.*')
    >>> params = {'head': {'kernel': jnp.ones(2)}, 'body': jnp.ones(2)}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> updates['head']['kernel'].tolist(), updates['body'].tolist()
    ([0.0, 0.0], [-1.0, -1.0])
  """

  def init(params):
    rules.match([(pattern, True)], rules.leaf_names(params), kind='frozen path')
    return tx.init(params)

  def update(updates, state, params=None, **extra):
    def still(path, u):
      frozen = re.fullmatch(pattern, rules.path_name(path))
      return jnp.zeros_like(u) if frozen else u

    # Before too: the norm that is clipped is of what trains.
    updates = jax.tree_util.tree_map_with_path(still, updates)
    updates, state = tx.update(updates, state, params, **extra)
    return jax.tree_util.tree_map_with_path(still, updates), state

  return optax.GradientTransformation(init, update)


def average_params(
  tx: optax.GradientTransformation, *, decay: float
) -> optax.GradientTransformation:
  """Wraps an optimizer so that its state holds an average of the parameters.

  After every update average <- decay * average + (1 - decay) * params, from
  the initial parameters on. Read it with `averaged_params(opt_state)`.

  Args:
    tx: the optimizer to wrap. Apply `prune` outside of this; the average
      itself is not pruned, `prune.apply_masks` does that.
    decay: in (0, 1), such as 0.999.

  Raises:
    ValueError: for another decay.

  Example:
    >>> tx = average_params(optax.sgd(1.0), decay=0.5)
    >>> params = jnp.zeros(())
    >>> updates, state = tx.update(jnp.ones(()), tx.init(params), params)
    >>> float(averaged_params(state))
    -0.5
  """
  if not 0 < decay < 1:
    raise ValueError(f'The decay of an average is in (0, 1), not {decay}.')

  def init(params):
    average = jax.tree.map(jnp.array, networks.exact(params))
    return AverageState(average, tx.init(params))

  def update(grads, state, params, **extra):
    updates, inner = optax.with_extra_args_support(tx).update(
      grads, state.inner, params, **extra
    )
    new = optax.apply_updates(params, updates)
    average = jax.tree.map(
      lambda a, p: a + (1 - decay) * (p - a), state.average, new
    )
    return updates, AverageState(average, inner)

  return optax.GradientTransformationExtraArgs(init, update)


def averaged_params(opt_state: Any) -> Any:
  """The averaged parameters inside any optimizer state, or None.

  Args:
    opt_state: such as `TrainState.opt_state`; the average may lie anywhere in
      it, as in that of `prune.transform` around `average_params`.

  Example:
    >>> tx = average_params(optax.adam(0.1), decay=0.9)
    >>> averaged_params(tx.init({'w': jnp.ones(2)}))['w'].tolist()
    [1.0, 1.0]
    >>> averaged_params(optax.adam(0.1).init({'w': jnp.ones(2)})) is None
    True
  """

  def is_average(node):
    return isinstance(node, AverageState)

  found = [
    leaf
    for leaf in jax.tree.leaves(opt_state, is_leaf=is_average)
    if is_average(leaf)
  ]
  return found[0].average if found else None
