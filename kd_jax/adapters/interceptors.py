"""What `from_linen` does inside a module that it may not edit.

Owns the functions for `nn.intercept_methods` that change how submodules
compute: their dtype, what of them is stored for the backward pass, and
statistics and masks of the global batch. Those that quantize or prune are in
`quantize` and `prune`.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn

# (next_fun, args, kwargs, context) -> what the method returns
Interceptor = Callable[..., Any]


@contextlib.contextmanager
def intercepting(interceptors: Sequence[Interceptor]) -> Iterator[None]:
  """`nn.intercept_methods` of several functions, the first outermost.

  Args:
    interceptors: `(next_fun, args, kwargs, context) -> result`.

  Example:
    >>> def adding(next_fun, args, kwargs, context):
    ...   return 1 + next_fun(*args, **kwargs)
    >>> def doubling(next_fun, args, kwargs, context):
    ...   return 2 * next_fun(*args, **kwargs)
    >>> layer, x = nn.Dense(1, use_bias=False), jax.numpy.ones((1, 1))
    >>> with intercepting([adding, doubling]):
    ...   layer.apply({'params': {'kernel': x}}, x).tolist()
    [[3.0]]
  """
  with contextlib.ExitStack() as stack:
    for interceptor in interceptors:
      stack.enter_context(nn.intercept_methods(interceptor))
    yield


def computing_in(dtype: str) -> Interceptor:
  """Every submodule with an attribute `dtype` computes in this one.

  Args:
    dtype: such as 'bfloat16'. Parameters keep theirs.

  Example:
    >>> layer, x = nn.Dense(1, use_bias=False), jax.numpy.ones((1, 1))
    >>> with intercepting([computing_in('bfloat16')]):
    ...   layer.apply({'params': {'kernel': x}}, x).dtype.name
    'bfloat16'
  """

  def interceptor(next_fun, args, kwargs, context):
    module = context.module
    if context.method_name == '__call__' and hasattr(module, 'dtype'):
      # As in `global_batch`, a bound copy that lives for this one forward.
      object.__setattr__(module, 'dtype', dtype)
    return next_fun(*args, **kwargs)

  return interceptor


def recomputing(pattern: str, found: set[str]) -> Interceptor:
  """Computes modules again in the backward pass, not those inside of them.

  Args:
    pattern: of their paths, matched whole.
    found: the paths that matched are added here.

  Example:
    >>> model, x = nn.Sequential([nn.Dense(2), nn.Dense(2)]), jax.numpy.eye(2)
    >>> found = set()
    >>> with intercepting([recomputing('layers_1', found)]):
    ...   variables = model.init(jax.random.key(0), x)
    >>> found
    {'layers_1'}
  """
  inside: list[str] = []

  def interceptor(next_fun, args, kwargs, context):
    module, path = context.module, '/'.join(context.module.path)
    chosen = re.fullmatch(pattern, path) and not inside
    if context.method_name != '__call__' or not chosen:
      return next_fun(*args, **kwargs)
    found.add(path)
    leaves, structure = jax.tree.flatten((args, kwargs))
    traced = [isinstance(leaf, jax.Array) for leaf in leaves]

    def call(module, *arrays):
      given = iter(arrays)
      filled = [
        next(given) if t else x for t, x in zip(traced, leaves, strict=True)
      ]
      args, kwargs = jax.tree.unflatten(structure, filled)
      return module(*args, **kwargs)

    inside.append(path)
    try:
      arrays = [x for t, x in zip(traced, leaves, strict=True) if t]
      return nn.remat(call)(module, *arrays)
    finally:
      inside.pop()

  return interceptor


def store_inputs(
  next_fun: Callable[..., Any],
  args: Sequence[Any],
  kwargs: Mapping[str, Any],
  context: Any,
) -> Any:
  """Makes XLA:CPU store what a convolution reads.

  The gradient of a kernel reads it again, in another order. XLA:CPU would fuse
  that with all that led there since the convolution before, or through several
  residual blocks, and compute it anew, each value at its slowest.
  """
  called = context.method_name == '__call__' and args
  if not called or not isinstance(context.module, nn.Conv):
    return next_fun(*args, **kwargs)
  x, *rest = args
  x = jax.lax.platform_dependent(
    x, cpu=jax.lax.optimization_barrier, default=lambda x: x
  )
  return next_fun(x, *rest, **kwargs)


def global_batch(axis_name: str) -> Interceptor:
  """BatchNorm and Dropout see the global batch of a mapped axis.

  Args:
    axis_name: of the axis under `shard_map` or `pmap`.

  Example:
    The mean over both halves of a batch, not of each:

    >>> norm, x = nn.BatchNorm(False), jax.numpy.array([[[0.0]], [[4.0]]])
    >>> variables = norm.init(jax.random.key(0), x[0])
    >>> def mean(x):
    ...   with intercepting([global_batch('i')]):
    ...     _, new = norm.apply(variables, x, mutable='batch_stats')
    ...   return new['batch_stats']['mean']
    >>> [round(float(m[0]), 4) for m in jax.vmap(mean, axis_name='i')(x)]
    [0.02, 0.02]
  """

  def interceptor(next_fun, args, kwargs, context):
    module = context.module
    if context.method_name != '__call__':
      return next_fun(*args, **kwargs)
    if isinstance(module, nn.BatchNorm):
      # Modules are frozen to guard against state that hides in them; this is
      # a bound copy that lives for this one forward.
      object.__setattr__(module, 'axis_name', axis_name)
    if isinstance(module, nn.Dropout):
      return _global_dropout(module, axis_name, *args, **kwargs)
    return next_fun(*args, **kwargs)

  return interceptor


def _global_dropout(
  module: Any,
  axis_name: str,
  inputs: jax.Array,
  deterministic: bool | None = None,
  rng: jax.Array | None = None,
) -> jax.Array:
  deterministic = nn.merge_param(
    'deterministic', module.deterministic, deterministic
  )
  if module.rate == 0.0 or deterministic:
    return inputs
  if module.rate == 1.0:
    return jax.numpy.zeros_like(inputs)
  rng = module.make_rng(module.rng_collection) if rng is None else rng
  keep = 1.0 - module.rate
  devices = jax.lax.axis_size(axis_name)
  shape = [inputs.shape[0] * devices, *inputs.shape[1:]]
  for axis in module.broadcast_dims:
    shape[axis] = 1
  mask = jax.random.bernoulli(rng, p=keep, shape=shape)
  if shape[0] > 1 or devices == 1:
    # XLA computes the slice alone: each random bit depends on its index only.
    start = jax.lax.axis_index(axis_name) * inputs.shape[0]
    mask = jax.lax.dynamic_slice_in_dim(mask, start, inputs.shape[0])
  mask = jax.numpy.broadcast_to(mask, inputs.shape)
  return jax.lax.select(mask, inputs / keep, jax.numpy.zeros_like(inputs))
