"""When quantization begins and when statistics stop, inside one compiled step.

Owns the traced choices: observers that freeze, BatchNorm that freezes, and
weights that are rounded from a step on. How many batches an observer sees
before activations are rounded is the `begin` of
`activations.quantize_activations`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from kd_jax import rules as rules_lib
from kd_jax.quantize import inputs
from kd_jax.quantize.observers import Observer
from kd_jax.types import Params, Variables

_STATS = 'batch_stats'
_COUNT = 'steps'


def freeze_observer(observer: Observer, after: int) -> Observer:
  """An observer that learns from its first batches only.

  Its `count` goes on: it is the number of batches seen, not of those used.

  Args:
    observer: any observer.
    after: number of batches that it learns from.

  Raises:
    ValueError: if it is not positive: such an observer never had a range.

  Example:
    >>> from kd_jax.quantize.observers import min_max
    >>> observer = freeze_observer(min_max(), after=1)
    >>> stats = observer.update(observer.init(), jnp.array([2.0]), None)
    >>> stats = observer.update(stats, jnp.array([9.0]), None)
    >>> float(stats['high']), float(stats['count'])
    (2.0, 2.0)
  """
  if after < 1:
    raise ValueError(f'freeze_observer: after={after} is not positive.')

  def update(stats, x, axis_name):
    new = observer.update(stats, x, axis_name)
    learns = stats['count'] < after
    kept = jax.tree.map(lambda a, b: jnp.where(learns, a, b), new, stats)
    return kept | {'count': new['count']}

  return observer._replace(update=update)


def delayed(
  params_fn: Callable[[Params], Params], begin: int
) -> Callable[[Params, jax.Array], Params]:
  """A map of parameters that starts at a step, such as fake-quant.

  Args:
    params_fn: `params -> params`, such as `fake_quant_params` with its rules.
      It may drop entries, but adds none.
    begin: the first step, counted from 0, at which it is used.

  Returns:
    `(params, step) -> params`: before `begin` the parameters as they are.

  Example:
    >>> double = delayed(lambda params: {'w': 2 * params['w']}, begin=10)
    >>> [int(double({'w': 1}, step)['w']) for step in (9, 10)]
    [1, 2]
  """

  def delayed_fn(params: Params, step: jax.Array) -> Params:
    before = rules_lib.named_leaves(params)
    after = params_fn(params)
    leaves, structure = jax.tree.flatten(after)
    chosen = [
      leaf
      if leaf is before[name]
      else jnp.where(step >= begin, leaf, before[name])
      for name, leaf in zip(rules_lib.leaf_names(after), leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, chosen)

  return delayed_fn


def init_batch_norm_steps(variables: Variables) -> dict[str, Any]:
  """Adds to every BatchNorm the counter that `freeze_batch_norm` needs.

  Args:
    variables: of a linen model, with `batch_stats`.

  Returns:
    The variables; beside every running mean in `batch_stats` there is
    `steps`, int32, one number, or one for each block of a scanned stack.

  Raises:
    ValueError: if there is no running mean.

  Example:
    >>> stats = {'norm': {'mean': jnp.zeros((3, 8)), 'var': jnp.ones((3, 8))}}
    >>> variables = init_batch_norm_steps({'batch_stats': stats})
    >>> variables['batch_stats']['norm']['steps'].tolist()
    [0, 0, 0]
  """
  flat = traverse_util.flatten_dict(variables.get(_STATS, {}), sep='/')
  means = {n: v for n, v in flat.items() if n.split('/')[-1] == 'mean'}
  if not means:
    raise ValueError('init_batch_norm_steps: the model has no BatchNorm.')
  counts = {
    '/'.join([*name.split('/')[:-1], _COUNT]): jnp.zeros(
      mean.shape[:-1], jnp.int32
    )
    for name, mean in means.items()
  }
  stats = traverse_util.unflatten_dict({**flat, **counts}, sep='/')
  return {**variables, _STATS: stats}


def freeze_batch_norm(after: int) -> Callable[..., Any]:
  """An interceptor after which BatchNorm stops learning its statistics.

  In its first training forwards a BatchNorm does what it did. After them it
  normalises with the running statistics, in training too, and leaves them
  unchanged; its scale and bias keep training. This is a traced choice: the
  step is compiled once. Quantized networks are trained so at the end, with
  the statistics that folding will use.

  Args:
    after: number of training forwards before.

  Returns:
    An interceptor for `flax.linen.intercept_methods`; it needs variables
    from `init_batch_norm_steps`.

  Raises:
    ValueError: when run in training, for a BatchNorm without the counter.

  Example:
    >>> from flax import linen as nn
    >>> norm = nn.BatchNorm(use_running_average=False, momentum=0.5)
    >>> variables = {
    ...   'params': {'scale': jnp.ones(1), 'bias': jnp.zeros(1)},
    ...   'batch_stats': {'mean': jnp.zeros(1), 'var': jnp.ones(1)},
    ... }
    >>> variables, means = init_batch_norm_steps(variables), []
    >>> with nn.intercept_methods(freeze_batch_norm(after=2)):
    ...   for _ in range(3):
    ...     _, new = norm.apply(
    ...       variables, jnp.full((2, 1), 8.0), mutable=['batch_stats'])
    ...     variables = variables | new
    ...     means.append(float(new['batch_stats']['mean'][0]))
    >>> means
    [4.0, 6.0, 6.0]

  References:
    Krishnamoorthi, "Quantizing deep convolutional networks for efficient
    inference", 2018, arXiv:1806.08342, section 3.2.2.
  """

  def interceptor(next_fun, args, kwargs, context):
    module = context.module
    is_norm = inputs.kind(module, {'BatchNorm'}) is not None
    scope = module.scope
    if context.method_name != '__call__' or not is_norm:
      return next_fun(*args, **kwargs)
    # Not in evaluation, nor while the model is initialised.
    known = scope.has_variable(_STATS, 'mean')
    if not (known and scope.is_mutable_collection(_STATS)):
      return next_fun(*args, **kwargs)
    if not scope.has_variable(_STATS, _COUNT):
      raise ValueError(
        f'{"/".join(module.path)}: it has no counter of steps; make it with '
        'init_batch_norm_steps.'
      )
    with inputs.outermost(module, interceptor) as first:
      if not first:
        return next_fun(*args, **kwargs)
      return _freeze(after, next_fun, args, kwargs, module)

  return interceptor


def _freeze(
  after: int,
  next_fun: Callable[..., Any],
  args: Sequence[Any],
  kwargs: Mapping[str, Any],
  module: Any,
) -> jax.Array:
  scope = module.scope
  steps = scope.get_variable(_STATS, _COUNT)
  frozen = jnp.max(steps) >= after
  before = {k: scope.get_variable(_STATS, k) for k in ('mean', 'var')}
  out = next_fun(*args, **kwargs)
  x = args[0] if args else kwargs['x']
  for name, value in before.items():
    new = scope.get_variable(_STATS, name)
    scope.put_variable(_STATS, name, jnp.where(frozen, value, new))
  scope.put_variable(_STATS, _COUNT, steps + 1)
  running = _normalise(module, scope, x, **before)
  return jnp.where(frozen, running.astype(out.dtype), out)


def _normalise(
  module: Any, scope: Any, x: jax.Array, mean: jax.Array, var: jax.Array
) -> jax.Array:
  axes = module.axis if isinstance(module.axis, tuple) else (module.axis,)
  features = {axis % x.ndim for axis in axes}
  shape = [n if i in features else 1 for i, n in enumerate(x.shape)]
  gain = jax.lax.rsqrt(var + module.epsilon)
  if scope.has_variable('params', 'scale'):
    gain = gain * scope.get_variable('params', 'scale')
  y = (x - mean.reshape(shape)) * gain.reshape(shape)
  if scope.has_variable('params', 'bias'):
    y = y + scope.get_variable('params', 'bias').reshape(shape)
  return y
