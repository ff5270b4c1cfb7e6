"""AdaRound: learns whether each weight is rounded up or down.

Owns the way through a model, layer by layer, each for the inputs that it has
with all earlier ones rounded; one layer is rounded in `layer_rounding`. Scales
stay those of `fake_quant_params`, so that a kernel rounded here is on the grid
that training, conversion and exports use.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from kd_jax import rules as rules_lib
from kd_jax.quantize import record
from kd_jax.quantize.activations import quantize_activations
from kd_jax.quantize.calibration import frozen
from kd_jax.quantize.fake_quant import fake_quant_params, weight_scale
from kd_jax.quantize.layer_rounding import Problem, Rounding, round_layer
from kd_jax.quantize.observers import Observer
from kd_jax.quantize.specs import QuantSpec, per_group
from kd_jax.types import Batch, Variables


def adaround(
  make_forward: record.MakeForward,
  variables: Variables,
  batches: Iterable[Batch],
  rules: rules_lib.Rules[QuantSpec],
  activation_rules: rules_lib.Rules[QuantSpec] = (),
  *,
  target: str = 'teacher',
  teacher: Variables | None = None,
  steps: int = 1000,
  batch_size: int = 32,
  learning_rate: float = 3e-2,
  regularization: float = 1.0,
  warm_start: float = 0.2,
  beta: tuple[float, float] = (20.0, 2.0),
  rng: jax.Array | None = None,
  observer: Observer | None = None,
) -> dict[str, Any]:
  """Rounds kernels so that the layers' outputs, not the weights, stay close.

  W~ = s clip(floor(W / s) + h(V), qmin, qmax) with
  h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1), and V minimises
    ||Y - W~ x~||^2 / ||Y - Wn x~||^2 + regularization * mean(1 - |2h - 1|^beta)
  where Wn is W rounded to nearest, and x~ the layer's input with all earlier
  layers rounded already. The paper has no denominator and sums over weights:
  in units of the error to be beaten, the regularization means the same in
  every layer. Layers are rounded in the order of the computation, each by Adam,
  with one compiled step. beta falls from `beta[0]` to `beta[1]` along a cosine,
  after a share `warm_start` of the steps without regularization. A layer keeps
  nearest rounding if the learned one is no better on all batches together.
  Weights with the largest code are rounded to nearest: they set the scale.

  Args:
    make_forward: `(*interceptors) -> forward` in evaluation mode; see `record`.
    variables: float variables with BatchNorm folded, and `quant_stats` if
      there are activation rules.
    batches: pre-processed batches; the inputs of one layer on all of them must
      fit into memory.
    rules: weight rules on parameter paths; symmetric specs. Kernels of
      modules are rounded here, other parameters to nearest.
    activation_rules: on layer paths, to round for quantized inputs.
    target: 'teacher' for the output that the float model has in the same
      place, Y = W x, so that each layer also makes up for those before it; or
      'layer' for Y = W x~.
    teacher: variables of the float model; `variables` when None.
    steps: of each layer.
    batch_size: examples of a step, drawn with replacement.
    learning_rate: of Adam.
    regularization: weight of the pull towards 0 and 1.
    warm_start: share of the steps without it, in [0, 1).
    beta: its first and last exponent.
    rng: key of the draws; `jax.random.key(0)` when None.
    observer: the observer calibrated with.

  Returns:
    New variables whose chosen kernels are on their grid: `fake_quant_params`
    with the same rules leaves them unchanged. Scanned layers are rounded
    together, each for its own inputs with the others as they were.

  Raises:
    ValueError: without any batch, for a rule that matches nothing, an affine
      spec or an unknown target.

  References:
    Nagel et al., "Up or Down? Adaptive Rounding for Post-Training
    Quantization", 2020, arXiv:2004.10568.

  Example:
    >>> from flax import linen as nn
    >>> from kd_jax import adapters
    >>> model = nn.Sequential([nn.Dense(1)])
    >>> make_forward = lambda *given: adapters.from_linen(
    ...   model, interceptors=given, train_argument=None)
    >>> kernel = jnp.array([[7.0], [1.4], [1.3], [1.45]])
    >>> layer = {'kernel': kernel, 'bias': jnp.zeros(1)}
    >>> variables = {'params': {'layers_0': layer}}
    >>> rules = [('.*/kernel', QuantSpec(bits=4, axis=-1))]
    >>> batch = {'image': jnp.ones((8, 4))}
    >>> got = adaround(make_forward, variables, [batch], rules, steps=200)
    >>> nearest = fake_quant_params(variables['params'], rules)
    >>> [float(p['layers_0']['kernel'].sum()) for p in (nearest, got['params'])]
    [10.0, 11.0]
  """
  from_teacher = rules_lib.choose(
    'target', target, {'layer': False, 'teacher': True}
  )
  batches = list(batches)
  if not batches:
    raise ValueError('There is no batch to round with.')
  specs = _symmetric_specs(variables, rules)
  layers = {
    name: layer
    for name, layer in _layers(make_forward, variables, batches[0]).items()
    if f'{name}/kernel' in specs
  }
  inputs = _captured(
    make_forward,
    layers,
    lambda module, x, y: x,
    quantize_activations(activation_rules, observer=frozen(observer)),
  )
  outputs = _captured(make_forward, layers, lambda module, x, y: y)
  teacher = dict(variables if teacher is None else teacher)
  rng = jax.random.key(0) if rng is None else rng
  params = traverse_util.flatten_dict(variables['params'], sep='/')
  for i, (name, layer) in enumerate(layers.items()):
    own = {k: params[f'{name}/{k}'] for k in layer.params}
    spec, stack = specs[f'{name}/kernel'], own['kernel'].ndim - layer.rank
    now = {**variables, 'params': traverse_util.unflatten_dict(params, sep='/')}
    x = _joined(inputs, now, batches, name, stack)
    y = None
    if from_teacher:
      y = _joined(outputs, teacher, batches, name, stack)
    params[f'{name}/kernel'] = round_layer(
      Rounding(layer.module, spec, stack, steps, batch_size, warm_start, beta),
      _problem(own, spec, x, y),
      jax.random.fold_in(rng, i),
      learning_rate,
      regularization,
    )
  tree = traverse_util.unflatten_dict(params, sep='/')
  return {**variables, 'params': fake_quant_params(tree, rules)}


def _symmetric_specs(
  variables: Variables, rules: rules_lib.Rules[QuantSpec]
) -> dict[str, QuantSpec]:
  names = rules_lib.leaf_names(variables['params'])
  specs = rules_lib.match(rules, names, kind='weight rule')
  for name, spec in specs.items():
    if not spec.symmetric:
      raise ValueError(f'{name}: AdaRound needs a symmetric quantizer.')
  return specs


class _Layer(NamedTuple):
  """A module apart from its model, the names of its parameters, its rank."""

  module: Any
  params: tuple[str, ...]
  rank: int


def _problem(
  params: dict[str, jax.Array],
  spec: QuantSpec,
  x: jax.Array,
  y: jax.Array | None,
) -> Problem:
  """The arrays of a layer, on the grid that its kernel has now."""
  kernel = params['kernel']
  scale = per_group(weight_scale(kernel, spec)[0], kernel)
  return Problem(params, jnp.broadcast_to(scale, kernel.shape), x, y)


def _layers(
  make_forward: record.MakeForward, variables: Variables, batch: Batch
) -> dict[str, _Layer]:
  """The layers of a model by path, in the order in which they are called."""
  found = {}

  def look(module, path, x, y):
    own = module.variables['params']
    alone = module.clone(parent=None, name=None)
    found[path] = _Layer(alone, tuple(sorted(own)), own['kernel'].ndim)

  forward = make_forward(record.record('layer', look))
  jax.eval_shape(
    lambda v, b: forward(v, b, None, train=True), dict(variables), dict(batch)
  )
  return found


def _captured(
  make_forward: record.MakeForward,
  layers: Mapping[str, Any],
  choose: Callable[..., Any],
  *outer: Callable[..., Any],
) -> Callable[..., Any]:
  """A compiled `(variables, batch) -> {layer: what was chosen}`."""

  def value(module, path, x, y):
    return choose(module, x, y) if path in layers else None

  interceptor = record.record('captured', value)
  for other in outer:
    interceptor = record.chain(other, interceptor)
  forward = make_forward(interceptor)
  return jax.jit(lambda v, b: record.measure(forward, v, b, 'captured'))


def _joined(
  captured: Callable[..., Any],
  variables: Mapping[str, Any],
  batches: Sequence[Batch],
  layer: str,
  axis: int,
) -> jax.Array:
  """What was captured of a layer on all batches, side by side."""
  arrays = [captured(variables, batch)[layer] for batch in batches]
  return jnp.concatenate(arrays, axis=axis)
