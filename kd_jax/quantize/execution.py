"""Execution of converted models: int8 x int8 -> int32 in place of products.

Owns the interceptor that runs what `convert` stored: layers with quantized
inputs on integers, others with their weights dequantized in the product. What
is stored is read in `stored`, inputs become codes in `grids`, and arithmetic is
in `products` and `convolutions`. Between two layers XLA fuses dequantization,
ReLU and quantization into one pass over the accumulator, so nothing is fused
by hand here.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kd_jax import rules as rules_lib
from kd_jax.quantize import convolutions, inputs, products
from kd_jax.quantize.convolution_ways import check_way
from kd_jax.quantize.grids import Grid, StoredGrid, grids_of
from kd_jax.quantize.products import Codes
from kd_jax.quantize.specs import QuantSpec, per_channel
from kd_jax.quantize.stored import (
  COLLECTION,
  bias_scale,
  dequantize_linear,
  weight_codes,
  weight_values,
)


def execute_integers(
  *,
  simulate: bool = False,
  dynamic: rules_lib.Rules[QuantSpec] = (),
  convolution: str = 'auto',
) -> Callable[..., Any]:
  """An interceptor that runs converted layers on their integers.

  A layer whose inputs have stored grids multiplies int8 by int8 into int32; so
  does one that a rule of `dynamic` matches, with the range of the batch at
  hand. A layer of which only the weights were converted dequantizes them.
  Weights of 4 bits are unpacked first. In a scanned stack the collection
  `int8` must be among its `variable_axes`.

  Args:
    simulate: runs the same quantized values in float32, quantize -> dequantize
      -> layer, which is the form that ONNX runtimes read.
    dynamic: `(pattern, QuantSpec or None)` pairs on layer paths, such as the
      activation rules trained with. Specs without `dynamic` are left to the
      stored grids.
    convolution: how integer convolutions run, all to the same integers:
      'direct', XLA's own, which GPUs have not; 'im2col', one int8 matrix
      product of all windows, or where a channel sees itself alone their sum;
      'float32', the float convolution where it is exact, below 1033 products a
      sum and without algorithms such as Winograd's, and im2col elsewhere;
      'auto', the fastest on this backend, see `convolution_ways.fastest`.

  Returns:
    An interceptor for `flax.linen.intercept_methods`; the variables are those
    of `convert`.

  Raises:
    ValueError: for an unknown way; when called, for a layer that has no integer
      execution.

  Example:
    >>> from flax import linen as nn
    >>> from kd_jax.quantize import INT8_ACTIVATIONS, INT8_WEIGHTS, convert
    >>> params = {'kernel': jnp.array([[3.0], [2.0]]), 'bias': jnp.zeros(1)}
    >>> x = jnp.array([[0.0, 127.0]])
    >>> rules = [('kernel', INT8_WEIGHTS)]
    >>> variables = convert({'params': params}, rules, [])
    >>> with nn.intercept_methods(execute_integers()):
    ...   y = nn.Dense(1).apply(variables, x)
    >>> round(float(y[0, 0]), 3)
    255.0
  """
  check_way(convolution)
  # Layers that run on their own: not to be taken for one of the rules' again.
  alone: list[Any] = []

  def interceptor(next_fun, args, kwargs, context):
    module, method = context.module, context.method_name
    if alone:
      return next_fun(*args, **kwargs)
    if _stored(module, 'embedding') is not None:
      return _embed(module, method, args, kwargs, simulate)
    kernel = _stored(module, 'kernel')
    if method != '__call__':
      return next_fun(*args, **kwargs)
    if inputs.is_attention(module) and inputs.has_products(module):
      compute = _inner_product(module, dynamic, simulate)
      with inputs.replaced_products(module, compute):
        return next_fun(*args, **kwargs)
    if kernel is None and not inputs.is_quantizable(module):
      return next_fun(*args, **kwargs)
    values, options = products.arguments(module, args, kwargs)
    spec = rules_lib.first(dynamic, '/'.join(module.path))
    grids = grids_of(functools.partial(_stored, module), values, spec)
    if kernel is not None:
      kernel = weight_codes(kernel, _stored(module, 'kernel_scale'))
      if not grids or not products.has_kernel(module):
        alone.append(module)
        try:
          return _weight_only(module, values, options, kernel)
        finally:
          alone.pop()
      return _product(
        module,
        values,
        grids[0],
        kernel,
        simulate=simulate,
        convolution=convolution,
      )
    if len(grids) == 2 and products.is_attention_product(module):
      return _attention(module, values, grids, simulate)
    for i, grid in grids.items():
      values[i] = grid.round(values[i])
    return next_fun(*values, **options)

  return interceptor


def _stored(module: Any, name: str) -> Any:
  scope = module.scope
  if scope is None or not scope.has_variable(COLLECTION, name):
    return None
  return scope.get_variable(COLLECTION, name)


def _product(
  module: Any,
  values: Sequence[Any],
  grid: Grid,
  kernel: Codes,
  *,
  simulate: bool,
  convolution: str,
) -> jax.Array:
  """The layer on codes, or on the values that they stand for."""
  x, bias = values[0], _bias(module, grid, kernel)
  if products.is_convolution(module):
    way = None if simulate else convolution
    y = _convolution(module, x, grid, kernel, bias, way)
  else:
    y = _dense(module, values, grid, kernel, bias, simulate)
  return y.astype(module.dtype or jnp.promote_types(x.dtype, jnp.float32))


class _Bias(NamedTuple):
  """A layer's bias.

  Attributes:
    stored: int32 in steps, or float32; None without one.
    step: of what is stored, or None for 1.
  """

  stored: jax.Array | None
  step: jax.Array | None = None

  def real(self) -> jax.Array | None:
    """Its values, float32."""
    if self.stored is None or self.step is None:
      return self.stored
    return dequantize_linear(self.stored, self.step, jnp.int8(0))


def _bias(module: Any, grid: Grid, kernel: Codes) -> _Bias:
  bias = _stored(module, 'bias')
  if bias is None and module.use_bias:
    bias = module.scope.get_variable('params', 'bias').astype(jnp.float32)
  # `convert` rounds a bias beside a stored grid only.
  rounded = bias is not None and bias.dtype == jnp.int32
  if not rounded or not isinstance(grid, StoredGrid):
    return _Bias(bias)
  return _Bias(bias, bias_scale(grid.scale, kernel.scale, bias))


def _dense(
  module: Any,
  values: Sequence[Any],
  grid: Grid,
  kernel: Codes,
  bias: _Bias,
  simulate: bool,
) -> jax.Array:
  eq = products.equation(module, values)
  if not simulate:
    # A bias of other axes than the kernel's last has no common step.
    exact = bias.stored if eq.w.endswith(eq.bias) else bias.real()
    codes = grid.codes(values[0])
    return _contract('/'.join(module.path), eq, codes, kernel, exact)
  real, w = bias.real(), weight_values(kernel)
  y = products.multiply(eq, grid.round(values[0]).astype(jnp.float32), w)
  return y if real is None else y + products.arrange(real, eq.bias, eq.out)


def _convolution(
  module: Any,
  x: jax.Array,
  grid: Grid,
  kernel: Codes,
  bias: _Bias,
  way: str | None,
) -> jax.Array:
  """A convolution of codes in one of the ways, or of real values without."""
  convolutions.check(module)
  batch, x = convolutions.one_batch(module, x)
  if way is not None:
    codes = _padded(module, x, grid)
    y = convolutions.product(module, codes, kernel, bias.stored, way=way)
  else:
    x = grid.round(x).astype(jnp.float32)
    x = convolutions.pad(module, x, jnp.float32(0))
    y = convolutions.of_layer(module, x, weight_values(kernel))
    real = bias.real()
    y = y if real is None else y + per_channel(real, y)
  return y.reshape(*batch, *y.shape[1:])


def _padded(module: Any, x: jax.Array, grid: Grid) -> Codes:
  """The codes of a convolution's input and its padding."""
  if isinstance(grid, StoredGrid):
    code, scale, zero_point = grid.codes(x)
    code = convolutions.pad(module, code, grid.zero_point)
    return Codes(code, scale, zero_point)
  # Real zeros have the code of 0, whatever the zero points are.
  return grid.codes(convolutions.pad(module, x, x.dtype.type(0)))


def _contract(path: str, eq: products.Equation, *operands: Any) -> jax.Array:
  try:
    return products.contract(eq, *operands)
  except ValueError as e:
    raise ValueError(f'{path}: {e}') from e


def _attention(
  module: Any, values: Sequence[Any], grids: Mapping[int, Grid], simulate: bool
) -> jax.Array:
  if simulate:
    y = products.simulated_attention(
      module, *(grids[i].round(values[i]) for i in (0, 1))
    )
  else:
    codes = (grids[i].codes(values[i]) for i in (0, 1))
    y = products.attention(module, *codes)
  return y.astype(values[0].dtype)


def _inner_product(
  module: Any, dynamic: rules_lib.Rules[QuantSpec], simulate: bool
) -> Callable[..., Any]:
  """Computes the products inside of linen's attention, see `inputs`."""

  def compute(product, einsum, text, *operands):
    path = '/'.join((*module.path, product))
    stored = _stored(module, product) or {}
    spec = rules_lib.first(dynamic, path)
    grids = grids_of(stored.get, operands, spec)
    if len(grids) < 2 or simulate:
      rounded = (
        grids[i].round(x) if i in grids else x for i, x in enumerate(operands)
      )
      return einsum(text, *rounded)
    eq = products.parse(path, text, [x.ndim for x in operands])
    codes = (grids[i].codes(x) for i, x in enumerate(operands))
    return _contract(path, eq, *codes).astype(operands[0].dtype)

  return compute


def _weight_only(
  module: Any, values: Sequence[Any], options: Mapping[str, Any], kernel: Codes
) -> jax.Array:
  """The layer on its own, with its kernel dequantized."""
  params = dict(module.variables.get('params', {}))
  if not getattr(module, 'use_bias', True):
    # A folded BatchNorm's, which `skip_folded_batch_norms` adds.
    params.pop('bias', None)
  params['kernel'] = weight_values(kernel)
  alone = module.clone(parent=None, name=None)
  return alone.apply({'params': params}, *values, **options)


def _embed(
  module: Any,
  method: str,
  args: Sequence[Any],
  kwargs: Mapping[str, Any],
  simulate: bool,
) -> jax.Array | None:
  """An Embed layer: rows of codes, dequantized after they are looked up."""
  if method == 'setup':
    return None
  stored = _stored(module, 'embedding')
  scale = _stored(module, 'embedding_scale')
  [x] = [*args, *kwargs.values()]
  if method == 'attend':
    table = weight_values(weight_codes(stored, scale))
    dtype = module.dtype or jnp.promote_types(x.dtype, jnp.float32)
    return jnp.dot(x.astype(dtype), table.T.astype(dtype))
  if simulate:
    # Exporters keep the codes of 4 bits as int8, with no bytes to take apart.
    stored = weight_codes(stored, scale).code
  if stored.shape[0] == 1:
    x = jnp.zeros_like(x)
  codes = jnp.take(stored, x, axis=0)
  scale = jnp.take(scale, x, axis=0) if scale.shape[0] > 1 else scale[0]
  values = dequantize_linear(*weight_codes(codes, scale)[:2], jnp.int8(0))
  return values.astype(module.dtype or jnp.float32)
