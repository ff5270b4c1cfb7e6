"""Folding BatchNorm into the convolution or dense layer before it.

Owns which BatchNorm follows which layer (found by running the model once,
abstractly), the folding, and its simulation in training. Weights are rounded
by `fake_quant`.

gamma * (conv(x, w) + b - mean) / sqrt(var + eps) + beta is a convolution with
w * g and bias (b - mean) * g + beta, where g = gamma / sqrt(var + eps) per
output channel.

With symmetric scales that no two output channels share, rounding before
folding is rounding after it: the scale of w * g is |g| times that of w, so the
codes are the same but for the sign of g, and Q(w * g) / g = Q(w). Training
needs to simulate nothing. With a scale for several output channels, or affine
codes, it is not so: see `simulate_folding`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from kd_jax import rules as rules_lib
from kd_jax.quantize import learned
from kd_jax.quantize.fake_quant import fake_quant_params
from kd_jax.quantize.inputs import kind
from kd_jax.quantize.specs import QuantSpec, per_channel
from kd_jax.types import Batch, Variables


class FoldableNorm(NamedTuple):
  """A BatchNorm that directly follows a linear layer.

  Attributes:
    norm: path of the BatchNorm.
    epsilon: its epsilon.
  """

  norm: str
  epsilon: float


def foldable_batch_norms(
  make_forward: Callable[..., Callable[..., Any]],
  variables: Variables,
  batch: Batch,
) -> dict[str, FoldableNorm]:
  """Finds the BatchNorms whose input is exactly one layer's output.

  Args:
    make_forward: `(interceptor) -> forward`, such as
      `lambda i: from_linen(model, interceptors=(i,))`.
    variables: the model's variables.
    batch: one batch; only its shapes and dtypes matter.

  Returns:
    path of a Conv or Dense layer -> the BatchNorm that follows it. Layers and
    norms that are called more than once are left out, and layers whose output
    another module reads too, such as a residual sum. A second reader that is no
    module cannot be told from here: compare the folded model with the original.

  Example:
    >>> from flax import linen as nn
    >>> from kd_jax import adapters
    >>> class Net(nn.Module):
    ...   @nn.compact
    ...   def __call__(self, x, train=False):
    ...     x = nn.Dense(3, name='dense')(x)
    ...     return nn.BatchNorm(not train, name='norm')(x)
    >>> x = jnp.ones((1, 2))
    >>> variables = jax.eval_shape(Net().init, jax.random.key(0), x)
    >>> make_forward = lambda i: adapters.from_linen(Net(), interceptors=[i])
    >>> foldable_batch_norms(make_forward, variables, {'image': x})
    {'dense': FoldableNorm(norm='norm', epsilon=1e-05)}
  """
  producers: dict[int, str] = {}
  calls: dict[str, int] = {}
  found: dict[str, FoldableNorm] = {}
  readers: dict[str, set[str]] = {}
  outputs = []  # keeps outputs alive, so that no id is used twice

  def record(next_fun, args, kwargs, context):
    module = context.module
    if context.method_name != '__call__':
      return next_fun(*args, **kwargs)
    path = '/'.join(module.path)
    calls[path] = calls.get(path, 0) + 1
    for x in jax.tree.leaves((args, kwargs)):
      if id(x) in producers:
        readers.setdefault(producers[id(x)], set()).add(path)
    if kind(module, {'BatchNorm'}):
      x = _normalized(args, kwargs)
      if id(x) in producers and module.axis in (-1, x.ndim - 1):
        norm = FoldableNorm(path, float(module.epsilon))
        found.setdefault(producers[id(x)], norm)
    out = next_fun(*args, **kwargs)
    if kind(module, {'Conv', 'Dense'}):
      producers[id(out)] = path
      outputs.append(out)
    return out

  forward = make_forward(record)
  jax.eval_shape(
    lambda v, b: forward(v, b, None, train=False), dict(variables), dict(batch)
  )
  return {
    layer: f
    for layer, f in found.items()
    if calls[layer] == 1
    and calls[f.norm] == 1
    and _innermost(readers[layer]) == {f.norm}
  }


def _innermost(paths: set[str]) -> set[str]:
  """Without the modules that only hand their input to one inside."""
  return {p for p in paths if not any(q.startswith(f'{p}/') for q in paths)}


def fold_batch_norm(
  variables: Variables, norms: Mapping[str, FoldableNorm]
) -> dict[str, Any]:
  """Folds BatchNorms with their running statistics into the layers before.

  Run the result with `skip_folded_batch_norms` among the interceptors.

  Args:
    variables: `{'params': ..., 'batch_stats': ..., ...}` of a linen model.
    norms: from `foldable_batch_norms`.

  Returns:
    New variables: each folded layer has a kernel scaled per output channel
    and a bias; the folded BatchNorms' variables are gone. Steps that LSQ
    learned for the kernels are scaled with them.

  Raises:
    ValueError: if a kernel to scale has one learned step for all channels.

  Example:
    >>> variables = {
    ...   'params': {'dense': {'kernel': jnp.array([[3.0]])}},
    ...   'batch_stats': {
    ...     'norm': {'mean': jnp.ones(1), 'var': 4 * jnp.ones(1)}},
    ... }
    >>> norms = {'dense': FoldableNorm('norm', epsilon=0.0)}
    >>> folded = fold_batch_norm(variables, norms)
    >>> dense = folded['params']['dense']
    >>> sorted(folded), float(dense['kernel'][0, 0]), float(dense['bias'][0])
    (['params'], 1.5, -0.5)

  References:
    Jacob et al., 2017, arXiv:1712.05877, section 3.2.
  """
  flat = {
    collection: dict(traverse_util.flatten_dict(tree, sep='/'))
    for collection, tree in variables.items()
  }
  params, stats = flat['params'], flat.get('batch_stats', {})
  for layer, (norm, epsilon) in norms.items():
    mean = stats.pop(f'{norm}/mean')
    variance = stats.pop(f'{norm}/var')
    gain = params.pop(f'{norm}/scale', jnp.ones_like(mean))
    gain = gain * jax.lax.rsqrt(variance + epsilon)
    shift = params.pop(f'{norm}/bias', jnp.zeros_like(mean))
    stats.pop(f'{norm}/steps', None)
    bias = params.get(f'{layer}/bias', jnp.zeros_like(mean))
    kernel = params[f'{layer}/kernel']
    params[f'{layer}/kernel'] = kernel * per_channel(gain, kernel)
    params[f'{layer}/bias'] = (bias - mean) * gain + shift
    _fold_step(params, layer, kernel, gain)
  return {
    collection: traverse_util.unflatten_dict(tree, sep='/')
    for collection, tree in flat.items()
    if tree
  }


def _fold_step(
  params: dict[str, Any], layer: str, kernel: jax.Array, gain: jax.Array
) -> None:
  """A step that LSQ learned is scaled as its kernel is."""
  path = f'{learned.STEPS}/{layer}/kernel_step'
  step = params.get(path)
  if step is None:
    return
  if step.shape[-1] != kernel.shape[-1]:
    raise ValueError(
      f'{layer}: its kernel has one learned step for all output channels, '
      'which a BatchNorm scales by a factor each; learn one per channel '
      '(axis=-1).'
    )
  params[path] = step * jnp.abs(per_channel(gain, step))


def simulate_folding(
  variables: Variables,
  norms: Mapping[str, FoldableNorm],
  rules: rules_lib.Rules[QuantSpec],
) -> dict[str, Any]:
  """Fake-quantizes weights as if BatchNorm had been folded into them.

  Kernels that a BatchNorm follows become Q(w * g) / g with the running
  variance in g; the BatchNorm stays and normalises with the batch's
  statistics. Folding then gives Q(w * g), the weights that training saw. The
  other parameters that rules choose become Q(w). No gradient reaches g; the
  kernels get the straight-through gradient.

  Use it in place of `fake_quant_params` where output channels share a scale,
  per tensor or per group without `axis=-1`, inside of the student function,
  as it needs the statistics:

      def folding_fn(variables, batch, rng, *, train):
        variables = quantize.simulate_folding(variables, norms, rules)
        return student_fn(variables, batch, rng, train=train)

  Args:
    variables: `{'params': ..., 'batch_stats': ..., ...}` of a linen model.
    norms: from `foldable_batch_norms`.
    rules: `(pattern, QuantSpec or None)` pairs on parameter paths.

  Returns:
    The variables with other `params`. A channel with g = 0, which its
    BatchNorm cancels, keeps its weights.

  Raises:
    ValueError: if a rule matches nothing, or a spec does not fit its kernel.

  Example:
    >>> kernel = jnp.array([[1.4, 0.048]])
    >>> variables = {
    ...   'params': {'dense': {'kernel': kernel}},
    ...   'batch_stats': {
    ...     'norm': {'mean': jnp.zeros(2), 'var': jnp.array([4.0, 0.04])}},
    ... }
    >>> norms = {'dense': FoldableNorm('norm', epsilon=0.0)}
    >>> rules = [('.*/kernel', QuantSpec(bits=4))]
    >>> rounded = simulate_folding(variables, norms, rules)
    >>> [round(w, 3) for w in rounded['params']['dense']['kernel'][0].tolist()]
    [1.4, 0.04]

  References:
    Jacob et al., 2017, arXiv:1712.05877, section 3.2; Krishnamoorthi, 2018,
    arXiv:1806.08342, section 3.2.2.
  """
  params = dict(traverse_util.flatten_dict(variables['params'], sep='/'))
  stats = traverse_util.flatten_dict(variables.get('batch_stats', {}), sep='/')
  chosen = rules_lib.match(rules, [*params], kind='weight rule')
  gains = {}
  for layer, (norm, epsilon) in norms.items():
    kernel = f'{layer}/kernel'
    if kernel in chosen:
      gain = jax.lax.rsqrt(stats[f'{norm}/var'] + epsilon)
      gain = gain * params.get(f'{norm}/scale', jnp.ones_like(gain))
      gains[kernel] = per_channel(jax.lax.stop_gradient(gain), params[kernel])
  scaled = params | {k: params[k] * g for k, g in gains.items()}
  rounded = fake_quant_params(
    traverse_util.unflatten_dict(scaled, sep='/'), rules
  )
  rounded = dict(traverse_util.flatten_dict(rounded, sep='/'))
  for kernel, gain in gains.items():
    unscaled = rounded[kernel] / jnp.where(gain == 0, 1, gain)
    kept = jnp.where(gain == 0, params[kernel], unscaled)
    rounded[kernel] = kept.astype(params[kernel].dtype)
  return {
    **variables,
    'params': traverse_util.unflatten_dict(rounded, sep='/'),
  }


def skip_folded_batch_norms(
  next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any
) -> Any:
  """Interceptor: a BatchNorm without running statistics was folded away.

  It also adds the bias that folding gave to a layer built without one.

  Args:
    next_fun: the rest of the call, as `flax.linen.intercept_methods` gives it,
      and so are the others.
    args: positional arguments of the module.
    kwargs: keyword arguments.
    context: which module, and which of its methods.

  Returns:
    What the method returns; of a folded BatchNorm its input.

  Example:
    >>> from flax import linen as nn
    >>> params = {'kernel': jnp.ones((2, 1)), 'bias': jnp.array([10.0])}
    >>> with nn.intercept_methods(skip_folded_batch_norms):
    ...   y = nn.Dense(1, use_bias=False).apply(
    ...     {'params': params}, jnp.ones((1, 2)))
    >>> float(y[0, 0])
    12.0
  """
  module = context.module
  if context.method_name != '__call__':
    return next_fun(*args, **kwargs)
  if kind(module, {'BatchNorm'}):
    folded = not module.scope.has_variable('batch_stats', 'mean')
    return _normalized(args, kwargs) if folded else next_fun(*args, **kwargs)
  out = next_fun(*args, **kwargs)
  bare = kind(module, {'Conv', 'Dense'}) and not module.use_bias
  if bare and module.scope.has_variable('params', 'bias'):
    bias = module.scope.get_variable('params', 'bias')
    out = out + per_channel(bias, out)
  return out


def _normalized(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
  """What a BatchNorm reads."""
  return args[0] if args else kwargs['x']
