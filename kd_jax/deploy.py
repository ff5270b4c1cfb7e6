"""What a trained student becomes: folded, converted, wrapped with its input.

Owns the path from trained variables to a function of raw inputs; nothing
about files, which is `export`.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from kd_jax import adapters, quantize
from kd_jax import rules as rules_lib
from kd_jax.adapters.plain import names_of
from kd_jax.quantize.stored import COLLECTION
from kd_jax.types import Batch, Reads, StudentFn, Variables

Rules = rules_lib.Rules[quantize.QuantSpec]
WEIGHT_RULES: Rules = (('.*/kernel', quantize.INT8_WEIGHTS),)
ACTIVATION_RULES: Rules = (('.*', quantize.INT8_ACTIVATIONS),)
Preprocess = Callable[..., Batch]


def integer_forward(
  model: adapters.LinenModule,
  *,
  simulate: bool = False,
  dynamic: Rules = (),
  convolution: str = 'auto',
  taps: Sequence[str] = (),
  axis_name: str | None = None,
  interceptors: Sequence[adapters.Interceptor] = (),
  train_argument: str | None = 'train',
) -> StudentFn:
  """The forward of a linen model whose layers `quantize.convert` replaced.

  Args:
    model: the module that was trained; it is not edited.
    simulate: runs the same values in float32, for runtimes that read
      quantize -> dequantize -> layer; see `quantize.execute_integers`.
    dynamic: activation rules, of which the dynamic ones find their ranges in
      the batch at hand.
    convolution: how integer convolutions run, see `execute_integers`.
    taps: '/'-joined paths of submodules, as for `adapters.from_linen`.
    axis_name: the mapped axis under `shard_map` or `pmap`.
    interceptors: others, which go first, such as `prune.resized(...)` for a
      shrunk model.
    train_argument: the boolean argument of its `__call__` that turns training
      on, or None if it has none.

  Returns:
    The forward, see `adapters.from_linen`; its variables are those of
    `quantize.convert` or `post_training_quantize`.

  Raises:
    ValueError: for an unknown `convolution`, or a class in place of a module;
      when called, for variables without integers.

  Example:
    >>> import jax.numpy as jnp
    >>> from kd_jax import models
    >>> model = models.make_model('mlp', num_classes=2, hidden=())
    >>> params = {'head': {
    ...   'kernel': jnp.array([[3.0, 1.0], [2.0, 1.0]]), 'bias': jnp.zeros(2)}}
    >>> variables = quantize.convert({'params': params}, WEIGHT_RULES, ())
    >>> batch = {'image': jnp.array([[0.0, 127.0]])}
    >>> output = integer_forward(model)(variables, batch).output
    >>> [round(y, 3) for y in output[0].tolist()]
    [255.0, 127.0]
  """
  run = adapters.from_linen(
    model,
    taps=taps,
    interceptors=(
      *interceptors,
      quantize.skip_folded_batch_norms,
      quantize.execute_integers(
        simulate=simulate, dynamic=dynamic, convolution=convolution
      ),
    ),
    axis_name=axis_name,
    train_argument=train_argument,
  )

  def forward(variables, batch, rng=None, *, train=False):
    if COLLECTION not in variables:
      raise ValueError(
        'These variables hold no integers: integer_forward runs those that '
        'quantize.convert or post_training_quantize returned.'
      )
    return run(variables, batch, rng, train=train)

  return forward


def evaluation(
  model: adapters.LinenModule,
  *,
  interceptors: Sequence[adapters.Interceptor] = (),
  train_argument: str | None = 'train',
) -> Callable[..., StudentFn]:
  """The `make_forward` that post-training algorithms take, of a linen model.

  Args:
    model: the module; folded BatchNorms are left out when it runs. It sees
      the entries of a batch that its attribute `reads` names, or 'image'.
    interceptors: others, as for `integer_forward`.
    train_argument: the boolean argument of its `__call__` that turns training
      on, or None if it has none.

  Returns:
    `(*interceptors) -> forward`. The model stays in evaluation mode, also when
    `train=True` tells observers to learn.

  Raises:
    ValueError: when called, for a class in place of a module.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax import linen as nn
    >>> model = nn.Sequential([nn.Dense(1)])
    >>> forward = evaluation(model, train_argument=None)()
    >>> kernel, bias = jnp.array([[2.0], [3.0]]), jnp.ones(1)
    >>> variables = {'params': {'layers_0': {'kernel': kernel, 'bias': bias}}}
    >>> forward(variables, {'image': jnp.array([[1.0, 5.0]])}).output.tolist()
    [[18.0]]
  """

  def make_forward(*others: adapters.Interceptor) -> StudentFn:
    return adapters.from_linen(
      model,
      interceptors=(
        _untrained(train_argument),
        *interceptors,
        quantize.skip_folded_batch_norms,
        *others,
      ),
      train_argument=train_argument,
    )

  return make_forward


def _untrained(train_argument: str | None) -> adapters.Interceptor:
  """Runs the model as in evaluation when its observers are in training."""

  def interceptor(next_fun, args, kwargs, context):
    if train_argument in kwargs and not context.module.path:
      kwargs = {**kwargs, train_argument: False}
    return next_fun(*args, **kwargs)

  return interceptor


def calibrated(
  model: adapters.LinenModule,
  variables: Variables,
  batches: Iterable[Batch],
  *,
  weight_rules: Rules = WEIGHT_RULES,
  activation_rules: Rules = ACTIVATION_RULES,
  observer: quantize.Observer | None = None,
  weight_observer: quantize.Observer | None = None,
  equalize: bool = False,
  smooth: float | None = None,
  rounding: str = 'nearest',
  adaround_steps: int = 1000,
  correct: bool = False,
  interceptors: Sequence[adapters.Interceptor] = (),
  train_argument: str | None = 'train',
) -> dict[str, Any]:
  """A trained linen model prepared for integers, in float.

  The options run in the order of the arguments, after BatchNorm is folded;
  `correct` comes last because it removes the mean of what rounding left. For
  other settings call the functions of `quantize` with `evaluation(model)`.

  Args:
    model: the module.
    variables: its trained variables.
    batches: pre-processed batches to calibrate with; a few are enough.
    weight_rules: `(pattern, QuantSpec or None)` pairs on parameter paths.
    activation_rules: the same on layer paths.
    observer: how the ranges of activations are learned; `ema_min_max()` when
      None.
    weight_observer: how those of weights are chosen, see `fake_quant_params`.
    equalize: whether channels are rescaled, see `quantize.equalize`.
    smooth: alpha of `quantize.smooth`, or None to leave it out.
    rounding: 'nearest' or 'adaround', see `quantize.adaround`.
    adaround_steps: of each layer.
    correct: whether biases are corrected, see `quantize.correct_biases`.
    interceptors: others, as for `integer_forward`.
    train_argument: as for `evaluation`.

  Returns:
    What `quantize.convert` turns into integers and `parity.check_parity`
    compares them with: folded `params`, and `quant_stats` if there are
    activation rules.

  Raises:
    ValueError: without any batch, for an unknown rounding, or for 'adaround'
      with a `weight_observer`.

  Example:
    >>> import jax.numpy as jnp
    >>> from kd_jax import models
    >>> model = models.make_model('mlp', num_classes=1, hidden=())
    >>> layer = {'kernel': jnp.ones((2, 1)), 'bias': jnp.zeros(1)}
    >>> batches = [{'image': jnp.array([[-1.0, 3.0]])}]
    >>> ready = calibrated(model, {'params': {'head': layer}}, batches)
    >>> seen = ready['quant_stats']['head']['input0']
    >>> float(seen['low']), float(seen['high'])
    (-1.0, 3.0)
  """
  learn = _learns_rounding(rounding, weight_observer)
  example, batches = _first_and_all(batches)
  if learn or correct or smooth is not None:
    batches = list(batches)
  make_forward = evaluation(
    model, interceptors=interceptors, train_argument=train_argument
  )
  rules = weight_rules, activation_rules
  variables = fold(
    model,
    variables,
    example,
    interceptors=interceptors,
    train_argument=train_argument,
  )
  if equalize:
    variables = quantize.equalize(make_forward(), variables, example)
  if smooth is not None:
    variables = quantize.smooth(make_forward, variables, batches, alpha=smooth)
  if activation_rules:
    stats = quantize.calibrate(
      make_forward, variables, batches, activation_rules, observer=observer
    )
    variables = {**variables, 'quant_stats': stats}
  rounded = variables
  if learn:
    rounded = quantize.adaround(
      make_forward,
      variables,
      batches,
      *rules,
      observer=observer,
      steps=adaround_steps,
    )
  if correct:
    rounded = quantize.correct_biases(
      make_forward,
      variables,
      batches,
      *rules,
      rounded=rounded,
      observer=observer,
      weight_observer=weight_observer,
    )
  return rounded


def _learns_rounding(
  rounding: str, weight_observer: quantize.Observer | None
) -> bool:
  """Whether AdaRound is asked for; an error if it cannot be had."""
  learn = rules_lib.choose(
    'rounding', rounding, {'nearest': False, 'adaround': True}
  )
  if learn and weight_observer is not None:
    raise ValueError(
      "rounding='adaround' learns on the grid of the extremes; it takes no "
      'weight_observer.'
    )
  return learn


def _first_and_all(
  batches: Iterable[Batch],
) -> tuple[Batch, Iterable[Batch]]:
  """The first batch, and all of them; each is made once."""
  batches = iter(batches)
  first = next(batches, None)
  if first is None:
    raise ValueError('There is no batch to calibrate with.')
  return first, itertools.chain([first], batches)


def post_training_quantize(
  model: adapters.LinenModule,
  variables: Variables,
  batches: Iterable[Batch],
  *,
  weight_rules: Rules = WEIGHT_RULES,
  activation_rules: Rules = ACTIVATION_RULES,
  observer: quantize.Observer | None = None,
  weight_observer: quantize.Observer | None = None,
  **options: Any,
) -> dict[str, Any]:
  """A trained linen model on integers, without further training.

  Static, with the default rules: weights int8 per output channel, and the
  range of every layer's input learned from the batches in evaluation mode.
  Dynamic, with activation specs that are `dynamic`: ranges are found in each
  batch at hand; give the same rules to `integer_forward(dynamic=...)`.
  Weight-only, without activation rules.

  Args:
    model: as for `calibrated`, and so are the others.
    variables: the trained variables.
    batches: pre-processed batches to calibrate with.
    weight_rules: on parameter paths.
    activation_rules: on layer paths.
    observer: of the ranges of activations.
    weight_observer: of those of weights.
    **options: `equalize`, `smooth`, `rounding`, `adaround_steps`,
      `correct`, `interceptors` and `train_argument` of `calibrated`.

  Returns:
    What `integer_forward` runs with.

  Raises:
    ValueError: as `calibrated`.

  Example:
    >>> import jax.numpy as jnp
    >>> from kd_jax import models
    >>> model = models.make_model('mlp', num_classes=1, hidden=())
    >>> layer = {'kernel': jnp.array([[1.27], [0.5]]), 'bias': jnp.zeros(1)}
    >>> batches = [{'image': jnp.ones((1, 2))}]
    >>> variables = post_training_quantize(
    ...   model, {'params': {'head': layer}}, batches, activation_rules=())
    >>> variables['int8']['head']['kernel'].tolist()
    [[127], [50]]
  """
  ready = calibrated(
    model,
    variables,
    batches,
    weight_rules=weight_rules,
    activation_rules=activation_rules,
    observer=observer,
    weight_observer=weight_observer,
    **options,
  )
  return quantize.convert(
    ready,
    weight_rules,
    activation_rules,
    observer=observer,
    weight_observer=weight_observer,
  )


def fold(
  model: adapters.LinenModule,
  variables: Variables,
  batch: Batch,
  *,
  interceptors: Sequence[adapters.Interceptor] = (),
  train_argument: str | None = 'train',
) -> dict[str, Any]:
  """Folds every BatchNorm that directly follows a layer of a linen model.

  Args:
    model: the module.
    variables: its variables.
    batch: one batch; only its shapes and dtypes matter.
    interceptors: others, as for `integer_forward`.
    train_argument: as for `evaluation`.

  Returns:
    The variables without these BatchNorms; `evaluation` and `integer_forward`
    run with them.

  Raises:
    ValueError: for a class in place of a module, or what
      `quantize.fold_batch_norm` raises.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax import linen as nn
    >>> class Net(nn.Module):
    ...   @nn.compact
    ...   def __call__(self, x, train=False):
    ...     x = nn.Dense(1, name='dense')(x)
    ...     return nn.BatchNorm(not train, epsilon=0, name='norm')(x)
    >>> variables = {
    ...   'params': {
    ...     'dense': {'kernel': jnp.array([[3.0]]), 'bias': jnp.zeros(1)},
    ...     'norm': {'scale': jnp.ones(1), 'bias': jnp.zeros(1)},
    ...   },
    ...   'batch_stats': {
    ...     'norm': {'mean': jnp.ones(1), 'var': 4 * jnp.ones(1)}},
    ... }
    >>> folded = fold(Net(), variables, {'image': jnp.ones((1, 1))})
    >>> dense = folded['params']['dense']
    >>> float(dense['kernel'][0, 0]), float(dense['bias'][0])
    (1.5, -0.5)
  """

  def make_forward(interceptor):
    return adapters.from_linen(
      model,
      interceptors=(*interceptors, interceptor),
      train_argument=train_argument,
    )

  norms = quantize.foldable_batch_norms(make_forward, variables, batch)
  return quantize.fold_batch_norm(variables, norms)


def from_raw(
  forward: StudentFn, preprocess: Preprocess, *, reads: Reads = 'image'
) -> Callable[..., jax.Array]:
  """`(variables, *raw inputs) -> output`, pre-processing included.

  Args:
    forward: a student or teacher function.
    preprocess: `(batch, *, train) -> batch`, see `data.make_preprocess`.
    reads: the entry of a batch that is the input, such as uint8 images, or the
      entries in the order of the inputs.

  Returns:
    The function, which takes one array for each entry of `reads`.

  Example:
    >>> import jax.numpy as jnp
    >>> from kd_jax.types import Forward
    >>> forward = lambda variables, batch: Forward(variables['w'] * batch['x'])
    >>> half = lambda batch, *, train: {'x': batch['x'] / 2}
    >>> fn = from_raw(forward, half, reads='x')
    >>> fn({'w': jnp.array(3.0)}, jnp.array([2.0, 4.0])).tolist()
    [3.0, 6.0]
  """

  names = names_of(reads)

  def fn(variables: Mapping[str, Any], *raw: jax.Array) -> jax.Array:
    batch = preprocess(dict(zip(names, raw, strict=True)), train=False)
    return forward(variables, batch).output

  return fn
