"""What the layers of a linen model are given, kept beside their outputs.

Owns the interceptor that records; what becomes of the numbers is in `layers`.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from kd_jax.quantize import inputs, products


def recorder(taps: Iterable[str], multiplying: set[str]) -> Callable[..., Any]:
  """An interceptor that keeps the inputs of layers beside their outputs.

  It adds to `multiplying` the layers that multiply their inputs.
  """
  wanted = frozenset(taps)

  def interceptor(next_fun, args, kwargs, context):
    module = context.module
    called = context.method_name == '__call__'
    if called and _multiplies_inside(module, wanted):
      with inputs.replaced_products(module, _recorded(module, multiplying)):
        return next_fun(*args, **kwargs)
    if called and '/'.join(module.path) in wanted:
      if products.is_attention_product(module):
        multiplying.add('/'.join(module.path))
      values, _ = products.arguments(module, args, kwargs)
      for i, x in enumerate(values):
        if products.is_input(x):
          name = inputs.input_name(i)
          module.scope.put_variable('intermediates', name, (x,))
    return next_fun(*args, **kwargs)

  return interceptor


def _multiplies_inside(module: Any, wanted: Collection[str]) -> bool:
  """Whether products of linen's attention are among the layers."""
  return inputs.is_attention(module) and any(
    '/'.join((*module.path, product)) in wanted for product in inputs.PRODUCTS
  )


def _recorded(module: Any, multiplying: set[str]) -> Callable[..., Any]:
  """Computes a product of linen's attention, and keeps what it was given."""

  def compute(product, einsum, equation, *operands):
    multiplying.add('/'.join((*module.path, product)))
    y = einsum(equation, *operands)
    kept = {inputs.input_name(i): (x,) for i, x in enumerate(operands)}
    kept['__call__'] = (y,)
    module.scope.put_variable('intermediates', product, kept)
    return y

  return compute
