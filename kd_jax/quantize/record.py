"""Measurements inside a linen model: what goes into its layers and comes out.

Owns one interceptor that writes what a function measures at each layer into
`quant_stats`, from where a jitted forward returns it, also out of scanned and
rematerialised blocks. Knows no algorithm. A layer is a module with a kernel.

`make_forward` here and in the post-training algorithms is a function
`(*interceptors) -> forward` that builds the model in evaluation mode, such as
`lambda *given: from_linen(model, interceptors=given, train_argument=None)`. The
forward is called with `train=True`, which lets it return `quant_stats`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import traverse_util

from kd_jax.quantize.activations import COLLECTION
from kd_jax.types import Batch, Variables

Interceptor = Callable[..., Any]
MakeForward = Callable[..., Callable[..., Any]]


def chain(outer: Interceptor, inner: Interceptor) -> Interceptor:
  """Two interceptors as one; `inner` sees the inputs that `outer` passes on."""

  def interceptor(next_fun, args, kwargs, context):
    def inside(*args, **kwargs):
      return inner(next_fun, args, kwargs, context)

    return outer(inside, args, kwargs, context)

  return interceptor


def is_layer(context: Any) -> bool:
  """Whether an intercepted call is that of a module with a kernel."""
  return context.method_name == '__call__' and context.module.has_variable(
    'params', 'kernel'
  )


def record(name: str, measure: Callable[..., jax.Array | None]) -> Interceptor:
  """An interceptor that measures every layer.

  Args:
    name: of the measurement, in `quant_stats`.
    measure: `(module, path, input, output) -> array`, or None for nothing.
      Of a layer that is called more than once, the last call counts.
  """

  def interceptor(next_fun, args, kwargs, context):
    output = next_fun(*args, **kwargs)
    if is_layer(context):
      module = context.module
      x = args[0] if args else kwargs['inputs']
      value = measure(module, '/'.join(module.path), x, output)
      if value is not None:
        module.put_variable(COLLECTION, name, value)
    return output

  return interceptor


def measure(
  forward: Callable[..., Any], variables: Variables, batch: Batch, name: str
) -> dict[str, jax.Array]:
  """Runs a forward and returns what an interceptor measured.

  Args:
    forward: built with `record(name, ...)` among its interceptors.
    variables: the model's variables.
    batch: one batch.
    name: of the measurement.

  Returns:
    layer path -> measurement, with leading axes where layers are scanned.
  """
  state = forward(variables, batch, None, train=True).model_state
  return select(state.get(COLLECTION, {}), name)


def select(stats: Mapping[str, Any], name: str) -> dict[str, jax.Array]:
  """layer path -> the measurements of one name in a `quant_stats`."""
  flat = traverse_util.flatten_dict(stats)
  return {'/'.join(k[:-1]): v for k, v in flat.items() if k[-1] == name}
