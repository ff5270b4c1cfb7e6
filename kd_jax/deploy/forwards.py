"""Forwards of a trained linen model: in evaluation, on integers, of raw inputs.

Owns which interceptors run around the model, and no variables: those are made
in `after_training` and by `quantize.convert`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from kd_jax import adapters, quantize
from kd_jax import rules as rules_lib
from kd_jax.quantize.stored import COLLECTION
from kd_jax.types import Batch, Reads, StudentFn, names_of

Rules = rules_lib.Rules[quantize.QuantSpec]
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
    >>> variables = quantize.convert(
    ...   {'params': params}, [('.*/kernel', quantize.INT8_WEIGHTS)], ())
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
