"""The inputs of linen layers: which are rounded, and what they are called.

Owns the kinds of layers, the names of their inputs, and the one interceptor
that hands these inputs to a function, which `activations` and `learned` write.
linen is not imported: modules are known by the names of their classes.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr

from kd_jax.types import Batch, StudentFn, Variables

# Layers whose inputs are quantized, by the name of their class or of one of
# its bases. Those of `models` are arithmetic as a module: a runtime adds,
# joins, pools and multiplies in integers if all sides of it are quantized.
LAYERS = frozenset(
  {
    *('Conv', 'Dense', 'DenseGeneral', 'Einsum'),
    *('Add', 'Concatenate', 'GlobalAveragePool', 'Scores', 'Context'),
  }
)
# Layers with products inside: the name of each, as of a layer, and the
# argument of the attention function that computes it.
ATTENTION = 'MultiHeadDotProductAttention'
PRODUCTS = {
  'scores': 'qk_attn_weights_einsum',
  'context': 'attn_weights_value_einsum',
}
_ACTIVE = '_kd_jax_active_interceptors'
_MARK = 'kd_jax/quantizable'

# (scope, layer path, names, x) -> x; see `intercept_inputs`.
RoundInput = Callable[[Any, str, tuple[str, ...], jax.Array], jax.Array]


def kind(module: Any, names: Collection[str]) -> str | None:
  """The first of a module's class and its bases that is one of `names`."""
  bases = (base.__name__ for base in type(module).__mro__)
  return next((name for name in bases if name in names), None)


def is_quantizable(module: Any) -> bool:
  """Whether a linen module is of a kind that `LAYERS` names."""
  return kind(module, LAYERS) is not None


def input_name(index: int) -> str:
  """The name of a layer's input by its position among the arguments."""
  return f'input{index}'


def map_inputs(
  fn: Callable[[str, jax.Array], jax.Array],
  module: Any,
  args: tuple[Any, ...],
  kwargs: Mapping[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
  """Applies a function to every float array that a layer is called with.

  Args:
    fn: `(name, x) -> x`; a keyword has the name of its position.
    module: the linen module.
    args: positional arguments of its `__call__`.
    kwargs: keyword arguments.

  Returns:
    The new `(args, kwargs)`; what is no float array is left as it is.
  """
  args = tuple(
    fn(input_name(i), jnp.asarray(x)) if _is_float(x) else x
    for i, x in enumerate(args)
  )
  kwargs = dict(kwargs)
  if any(map(_is_float, kwargs.values())):
    parameters = [*inspect.signature(type(module).__call__).parameters][1:]
    for key, x in kwargs.items():
      if _is_float(x) and key in parameters:
        kwargs[key] = fn(input_name(parameters.index(key)), jnp.asarray(x))
  return args, kwargs


def _is_float(x: Any) -> bool:
  is_array = isinstance(x, (jax.Array, np.ndarray))
  return is_array and jnp.issubdtype(x.dtype, jnp.floating)


def intercept_inputs(
  round_input: RoundInput, chosen: Callable[[str], bool]
) -> Callable[..., Any]:
  """An interceptor that hands the inputs of layers to a function.

  Args:
    round_input: `(scope, layer, names, x) -> x` with the layer's scope and
      '/'-joined path, and where in the scope something about this input is
      to be kept, see `read`. The products inside of linen's attention are
      layers of their own, '<attention>/scores' and '<attention>/context'.
    chosen: whether the function does more than mark the inputs of a layer, by
      the layer's path.

  Returns:
    An interceptor for `flax.linen.intercept_methods`.

  Raises:
    ValueError: when run, if a product is chosen in an attention whose
      function does not let it be replaced.
  """

  def rounding(scope, layer, *product):
    return lambda name, x: round_input(scope, layer, (*product, name), x)

  def interceptor(next_fun, args, kwargs, context):
    module = context.module
    attention = is_attention(module)
    if context.method_name != '__call__' or not (
      attention or is_quantizable(module)
    ):
      return next_fun(*args, **kwargs)
    scope, path = module.scope, '/'.join(module.path)
    with outermost(module, interceptor) as first:
      if not first:
        return next_fun(*args, **kwargs)
      if attention:
        layers = {name: f'{path}/{name}'.lstrip('/') for name in PRODUCTS}
        if has_products(module):

          def compute(product, einsum, equation, *operands):
            rounded = (
              round_input(scope, layers[product], (product, input_name(i)), x)
              for i, x in enumerate(operands)
            )
            return einsum(equation, *rounded)

          with replaced_products(module, compute):
            return next_fun(*args, **kwargs)
        if any(map(chosen, layers.values())):
          raise ValueError(
            f'{path}: the products of its attention_fn cannot be quantized, as '
            f'it has no arguments {" and ".join(PRODUCTS.values())}; a rule '
            'with None leaves them out.'
          )
        for product, layer in layers.items():
          rounded = rounding(scope, layer, product)
          args, kwargs = map_inputs(rounded, module, args, kwargs)
        return next_fun(*args, **kwargs)
      args, kwargs = map_inputs(rounding(scope, path), module, args, kwargs)
      return next_fun(*args, **kwargs)

  return interceptor


@contextlib.contextmanager
def outermost(module: Any, interceptor: Any) -> Iterator[bool]:
  """Whether this is an interceptor's outermost call for a module.

  It is not where the `__call__` of a subclass calls that of its base.

  Args:
    module: the linen module.
    interceptor: the interceptor, or anything that stands for it.
  """
  active = vars(module).get(_ACTIVE, ())
  with _set(module, _ACTIVE, (*active, interceptor)):
    yield interceptor not in active


@contextlib.contextmanager
def _set(module: Any, name: str, value: Any) -> Iterator[None]:
  # Modules are frozen to guard against state that hides in them; this is a
  # bound copy that lives for this one forward, and is left as it was.
  attributes = vars(module)
  known, before = name in attributes, attributes.get(name)
  object.__setattr__(module, name, value)
  try:
    yield
  finally:
    if known:
      object.__setattr__(module, name, before)
    else:
      attributes.pop(name, None)


def is_attention(module: Any) -> bool:
  """Whether a linen module is an attention with the products of `PRODUCTS`."""
  return kind(module, {ATTENTION}) is not None


def has_products(module: Any) -> bool:
  """Whether the products of an attention can be replaced."""
  parameters = inspect.signature(module.attention_fn).parameters
  return {*PRODUCTS.values()} <= {*parameters}


@contextlib.contextmanager
def replaced_products(
  module: Any, compute: Callable[..., jax.Array]
) -> Iterator[None]:
  """Computes the products of an attention by another function.

  Args:
    module: the attention, see `has_products`.
    compute: `(product, einsum, equation, *operands) -> array` with one of the
      names of `PRODUCTS` and the function that it takes the place of.
  """
  attention_fn = module.attention_fn

  @functools.wraps(attention_fn)
  def attention(*args, precision=None, **kwargs):
    # It takes either a precision or functions for the products.
    default = functools.partial(jnp.einsum, precision=precision)
    for product, argument in PRODUCTS.items():
      einsum = kwargs.get(argument) or default
      kwargs[argument] = functools.partial(compute, product, einsum)
    return attention_fn(*args, **kwargs)

  with _set(module, 'attention_fn', attention):
    yield


def read(scope: Any, collection: str, names: tuple[str, ...]) -> Any:
  """What a scope keeps under nested names, or None.

  Args:
    scope: a linen scope.
    collection: the collection.
    names: the variable, and the entries of dicts within it.
  """
  if not scope.has_variable(collection, names[0]):
    return None
  value = scope.get_variable(collection, names[0])
  for name in names[1:]:
    if name not in value:
      return None
    value = value[name]
  return value


def write(
  scope: Any, collection: str, names: tuple[str, ...], value: Any
) -> None:
  """Makes a scope keep a value where `read` finds it."""
  for i in range(len(names) - 1, 0, -1):
    value = {**(read(scope, collection, names[:i]) or {}), names[i]: value}
  scope.put_variable(collection, names[0], value)


def mark(x: jax.Array, kind: str, layer: str) -> jax.Array:
  """`x`, with a note in the jaxpr that a layer could be quantized here.

  Args:
    x: an input of the layer.
    kind: a word for what is done with it.
    layer: the layer's path.
  """
  return checkpoint_name(x, f'{_MARK}/{kind}/{layer}')


def marked_layers(
  student_fn: StudentFn, variables: Variables, batch: Batch
) -> tuple[dict[str, set[str]], Any]:
  """The notes of `mark` in a training forward, which is only traced.

  Args:
    student_fn: the forward.
    variables: the model's variables, or their shapes.
    batch: one batch, or its shapes.

  Returns:
    `(kind -> layer paths, shapes of the updated collections)`.
  """
  jaxpr, shapes = jax.make_jaxpr(
    lambda v, b, rng: student_fn(v, b, rng, train=True).model_state,
    return_shape=True,
  )(dict(variables), dict(batch), jax.random.key(0))
  marked: dict[str, set[str]] = {}
  for name in _names(jaxpr.jaxpr):
    if name.startswith(_MARK):
      kind, layer = name.removeprefix(f'{_MARK}/').split('/', 1)
      marked.setdefault(kind, set()).add(layer)
  return marked, shapes


def _names(jaxpr: Jaxpr) -> Iterator[str]:
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'name':
      yield equation.params['name']
    for inner in jax.tree.leaves(
      equation.params, is_leaf=lambda p: isinstance(p, (Jaxpr, ClosedJaxpr))
    ):
      if isinstance(inner, ClosedJaxpr):
        yield from _names(inner.jaxpr)
      elif isinstance(inner, Jaxpr):
        yield from _names(inner)
