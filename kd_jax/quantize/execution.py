"""Execution of converted models: int8 x int8 -> int32 in place of products.

One interceptor runs what `convert` stored: layers with quantized inputs on
integers, others with their weights dequantized in the product. Arithmetic is
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
from kd_jax.quantize import convolutions, inputs, packing, products
from kd_jax.quantize.activations import dynamic_scale
from kd_jax.quantize.fake_quant import (
  QuantSpec,
  dequantize,
  fake_quant,
  per_channel,
  quantize,
)
from kd_jax.quantize.products import Codes
from kd_jax.types import Variables

COLLECTION = 'int8'
_CODES = QuantSpec(symmetric=False, narrow=False)
# Parameters that convert stores as codes.
CODED = ('kernel', 'embedding')


@jax.jit
def quantize_linear(
  x: jax.Array, scale: jax.Array, zero_point: jax.Array
) -> jax.Array:
  """int8 codes of an activation. Exporters know it by its name."""
  return quantize(x, scale, zero_point.astype(jnp.float32), _CODES)


@jax.jit
def dequantize_linear(
  code: jax.Array, scale: jax.Array, zero_point: jax.Array
) -> jax.Array:
  """float32 values of codes. Exporters know it by its name."""
  zero_point = zero_point.astype(jnp.float32)
  return dequantize(code, per_channel(scale, code), zero_point)


def weight_codes(stored: jax.Array, scale: jax.Array) -> Codes:
  """A stored weight as int8 codes.

  Args:
    stored: int8 codes, or uint8 with two 4-bit codes in a byte.
    scale: with the rank of the weight, or of its last axes; where its last
      axis is 1, packed codes are even in number.
  """
  if stored.dtype == jnp.uint8:
    size = scale.shape[-1]
    size = size if size > 1 else 2 * stored.shape[-1]
    stored = packing.unpack_int4(stored, size)
  return Codes(stored, per_channel(scale, stored))


def weight_values(codes: Codes) -> jax.Array:
  """The real values of a weight, float32."""
  code, scale = codes.code, codes.scale
  if code.ndim < 2 or scale.shape[-2] in (1, code.shape[-2]):
    return dequantize_linear(code, scale, jnp.int8(0))
  # One scale for each group of neighbours along axis -2.
  groups = scale.shape[-2]
  split = code.reshape(*code.shape[:-2], groups, -1, code.shape[-1])
  values = dequantize_linear(split, jnp.expand_dims(scale, -2), jnp.int8(0))
  return values.reshape(code.shape)


def dequantize_params(variables: Variables) -> dict[str, Any]:
  """The variables of a converted model without integers: codes become floats.

  What a model of any framework runs with on the weights that `convert` rounded.
  Grids of activations are dropped.

  Args:
    variables: from `convert`.

  Returns:
    `params` float32 and whatever else there was, but for `int8`.

  Example:
    >>> from kd_jax.quantize import INT8_WEIGHTS, convert
    >>> params = {'dense': {'kernel': jnp.array([[1.0], [0.301]])}}
    >>> int8 = convert({'params': params}, [('.*/kernel', INT8_WEIGHTS)], [])
    >>> kernel = dequantize_params(int8)['params']['dense']['kernel']
    >>> [round(v, 4) for v in kernel[:, 0].tolist()]
    [1.0, 0.2992]
  """

  def merged(params, integers):
    params = dict(params)
    for name, value in integers.items():
      if isinstance(value, dict) and not name.startswith('input'):
        inner = merged(params.get(name, {}), value)
        # A layer without parameters has stored inputs only.
        params |= {name: inner} if inner else {}
      elif name in CODED:
        codes = weight_codes(value, integers[f'{name}_scale'])
        params[name] = weight_values(codes)
    if 'kernel' in integers and 'bias' in integers:
      bias, grid = integers['bias'], integers['input0']
      codes = weight_codes(integers['kernel'], integers['kernel_scale'])
      params['bias'] = bias * bias_scale(grid['scale'], codes.scale, bias)
    return params

  rest = {k: v for k, v in variables.items() if k != COLLECTION}
  params = merged(rest.get('params', {}), variables.get(COLLECTION, {}))
  return rest | {'params': params}


def bias_scale(
  input_scale: jax.Array, kernel_scale: jax.Array, bias: jax.Array
) -> jax.Array:
  """The step of an int32 bias: input scale * kernel scale.

  Args:
    input_scale: `[]`, or `[L]` in a stack of L layers.
    kernel_scale: with the rank of the kernel; its last axes are the bias's.
    bias: anything of the bias's shape.
  """
  lead = input_scale.ndim
  own = bias.ndim - lead
  last = kernel_scale.shape[kernel_scale.ndim - own :]
  kernel_scale = kernel_scale.reshape(*kernel_scale.shape[:lead], *last)
  return input_scale.reshape(*input_scale.shape, *(1,) * own) * kernel_scale


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
      'auto', the fastest on this backend, see `convolutions.fastest`.

  Returns:
    An interceptor for `flax.linen.intercept_methods`; the variables are those
    of `convert`.

  Raises:
    ValueError: for an unknown way; when called, for a layer that has no integer
      execution.
  """
  convolutions.check_way(convolution)

  def interceptor(next_fun, args, kwargs, context):
    module, method = context.module, context.method_name
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
    grids = _grids(functools.partial(_stored, module), values, spec)
    if kernel is not None:
      kernel = weight_codes(kernel, _stored(module, 'kernel_scale'))
      if not grids or not products.has_kernel(module):
        return _weight_only(module, values, options, kernel)
      return _product(
        module,
        values,
        grids[0],
        kernel,
        simulate=simulate,
        convolution=convolution,
      )
    if len(grids) == 2 and products.is_attention(module):
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


class _StoredGrid(NamedTuple):
  """The grid of an input, as `convert` stored it.

  Attributes:
    scale: float32.
    zero_point: int8.
  """

  scale: jax.Array
  zero_point: jax.Array

  def codes(self, x: jax.Array) -> Codes:
    """The codes of an input."""
    code = quantize_linear(x, self.scale, self.zero_point)
    return Codes(code, self.scale, self.zero_point.astype(jnp.int32))

  def round(self, x: jax.Array) -> jax.Array:
    """The values that its codes stand for, in its dtype."""
    code = quantize_linear(x, self.scale, self.zero_point)
    rounded = dequantize_linear(code, self.scale, self.zero_point)
    return rounded.astype(x.dtype)


class _DynamicGrid(NamedTuple):
  """The grid of an input's own range.

  Attributes:
    spec: with which to find it in the batch at hand.
  """

  spec: QuantSpec

  def codes(self, x: jax.Array) -> Codes:
    """The codes of an input."""
    scale, zero_point = dynamic_scale(x, self.spec)
    code = quantize(x, scale, zero_point, self.spec)
    symmetric = self.spec.symmetric
    return Codes(code, scale, None if symmetric else zero_point.astype('int32'))

  def round(self, x: jax.Array) -> jax.Array:
    """The values that its codes stand for, in its dtype."""
    scale, zero_point = dynamic_scale(x, self.spec)
    return fake_quant(x, scale, zero_point, self.spec.qmin, self.spec.qmax)


_Grid = _StoredGrid | _DynamicGrid


def _grids(
  stored_as: Callable[[str], Any],
  values: Sequence[Any],
  spec: QuantSpec | None,
) -> dict[int, _Grid]:
  """The grid of each input that is quantized, by position."""
  spec = spec if spec is not None and spec.dynamic else None
  grids: dict[int, _Grid] = {}
  for i, x in enumerate(values):
    stored = stored_as(inputs.input_name(i))
    if stored is not None:
      grids[i] = _StoredGrid(stored['scale'], stored['zero_point'])
    elif spec is not None and products.is_input(x):
      grids[i] = _DynamicGrid(spec)
  return grids


def _product(
  module: Any,
  values: Sequence[Any],
  grid: _Grid,
  kernel: Codes,
  *,
  simulate: bool,
  convolution: str,
) -> jax.Array:
  """The layer on codes, or on the values that they stand for."""
  x, bias = values[0], _stored(module, 'bias')
  dtype = module.dtype or jnp.promote_types(x.dtype, jnp.float32)
  if bias is None and module.use_bias:
    bias = module.scope.get_variable('params', 'bias').astype(jnp.float32)
  step = None
  # `convert` rounds a bias beside a stored grid only.
  if (
    isinstance(grid, _StoredGrid)
    and bias is not None
    and bias.dtype == jnp.int32
  ):
    step = bias_scale(grid.scale, kernel.scale, bias)
  if products.is_convolution(module):
    run = _convolution if not simulate else _simulated_convolution
    y = run(module, x, grid, kernel, bias, step, convolution)
  else:
    eq = products.equation(module, values)
    if step is not None and (simulate or not eq.w.endswith(eq.bias)):
      bias = dequantize_linear(bias, step, jnp.int8(0))
    if simulate:
      w = weight_values(kernel)
      y = products.multiply(eq, grid.round(x).astype(jnp.float32), w)
      y = y if bias is None else y + products.arrange(bias, eq.bias, eq.out)
    else:
      y = _contract('/'.join(module.path), eq, grid.codes(x), kernel, bias)
  return y.astype(dtype)


def _contract(path: str, eq: products.Equation, *operands: Any) -> jax.Array:
  try:
    return products.contract(eq, *operands)
  except ValueError as e:
    raise ValueError(f'{path}: {e}') from e


def _convolution(
  module: Any,
  x: jax.Array,
  grid: _Grid,
  kernel: Codes,
  bias: jax.Array | None,
  step: jax.Array | None,
  way: str,
) -> jax.Array:
  del step
  convolutions.check(module)
  batch, x = convolutions.one_batch(module, x)
  if isinstance(grid, _StoredGrid):
    code, scale, zero_point = grid.codes(x)
    code = convolutions.pad(module, code, grid.zero_point)
    codes = Codes(code, scale, zero_point)
  else:
    # Real zeros have the code of 0, whatever the zero points are.
    codes = grid.codes(convolutions.pad(module, x, x.dtype.type(0)))
  y = convolutions.product(module, codes, kernel, bias, way=way)
  return y.reshape(*batch, *y.shape[1:])


def _simulated_convolution(
  module: Any,
  x: jax.Array,
  grid: _Grid,
  kernel: Codes,
  bias: jax.Array | None,
  step: jax.Array | None,
  way: str,
) -> jax.Array:
  del way
  convolutions.check(module)
  batch, x = convolutions.one_batch(module, x)
  x = grid.round(x).astype(jnp.float32)
  x = convolutions.pad(module, x, jnp.float32(0))
  y = convolutions.of_layer(module, x, weight_values(kernel))
  if bias is not None:
    bias = bias if step is None else dequantize_linear(bias, step, jnp.int8(0))
    y += per_channel(bias, y)
  return y.reshape(*batch, *y.shape[1:])


def _attention(
  module: Any, values: Sequence[Any], grids: Mapping[int, _Grid], simulate: bool
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
    grids = _grids(stored.get, operands, spec)
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
