"""From a traced function to an ONNX model: the walk over its equations.

Owns the model around the graph, and what is computed at export because it
depends on constants alone. What one equation becomes is in `onnx_primitives`.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import onnx
from onnx import helper

from kd_jax.export.onnx_elementwise import ELEMENTWISE
from kd_jax.export.onnx_graph import Graph
from kd_jax.export.onnx_primitives import FUNCTIONS, PRIMITIVES
from kd_jax.export.onnx_values import (
  Codes,
  Const,
  Tensor,
  Value,
  identity,
)
from kd_jax.export.onnx_views import VIEWS

# Opset 21 and its IR know output_dtype, with which onnxruntime refuses
# quantized graphs that it runs well at 20.
OPSET, IR_VERSION = 20, 9

# Primitives that call a jaxpr, and the parameter that holds it.
_CALLS = {
  'jit': 'jaxpr',
  'pjit': 'jaxpr',
  'closed_call': 'call_jaxpr',
  'remat': 'jaxpr',
  'remat2': 'jaxpr',
  'checkpoint': 'jaxpr',
  'custom_jvp_call': 'call_jaxpr',
  'custom_vjp_call': 'call_jaxpr',
}


def interpret(
  graph: Graph, jaxpr: Any, consts: Sequence[Value], args: Sequence[Value]
) -> list[Value]:
  """Writes a jaxpr's equations into the graph; returns its outputs."""
  values: dict[Any, Value] = {}

  def read(atom):
    if hasattr(atom, 'val'):
      return Const(np.asarray(atom.val, atom.aval.dtype))
    return values[atom]

  values.update(zip(jaxpr.constvars, consts, strict=True))
  values.update(zip(jaxpr.invars, args, strict=True))
  for eqn in jaxpr.eqns:
    outputs = _equation(graph, eqn, [read(v) for v in eqn.invars])
    values.update(zip(eqn.outvars, outputs, strict=True))
  return [read(v) for v in jaxpr.outvars]


def _equation(graph: Graph, eqn: Any, inputs: list[Value]) -> list[Value]:
  name = eqn.primitive.name
  if name in _CALLS:
    known = FUNCTIONS.get(eqn.params.get('name'))
    output = known(graph, eqn, *inputs) if known else None
    if output is not None:
      return [output]
    return interpret(graph, *_inner(eqn.params[_CALLS[name]]), inputs)
  if all(isinstance(v, (Const, Codes)) for v in inputs):
    constants = _evaluate(eqn, inputs)
    if constants is not None:
      return constants
  if any(v.aval.dtype == jax.numpy.bfloat16 for v in eqn.outvars):
    raise ValueError(
      'export_onnx: onnxruntime does not compute in bfloat16: make the model '
      "with dtype='float32'."
    )
  handler = PRIMITIVES.get(name)
  if handler is None:
    raise ValueError(
      f'export_onnx: the primitive {name!r} has no ONNX form here. Known: '
      f'{", ".join(sorted(PRIMITIVES))}.'
    )
  made = handler(graph, eqn, *inputs)
  return made if isinstance(made, list) else [made]


def _inner(jaxpr: Any) -> tuple[Any, list[Const]]:
  """A jaxpr and its constants, which ClosedJaxpr carries and Jaxpr has not."""
  consts = [_const(c) for c in getattr(jaxpr, 'consts', ())]
  return getattr(jaxpr, 'jaxpr', jaxpr), consts


def _const(array: Any) -> Const:
  if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
    raise ValueError(
      'export_onnx: fn draws random numbers; export the model in evaluation '
      'mode.'
    )
  return Const(np.asarray(array))


def _evaluate(eqn: Any, inputs: list[Any]) -> list[Value] | None:
  """The equation's outputs as constants, or None where only a handler can."""
  # dim_as_value is the batch size, which has no value at export.
  if eqn.primitive.name in (*VIEWS, 'dim_as_value'):
    return None
  shapes = [v.aval.shape for v in eqn.invars]
  arrays = [np.asarray(v.array) for v in inputs]
  if eqn.primitive.name in ELEMENTWISE:
    arrays = list(np.broadcast_arrays(*arrays))
  else:
    sizes = itertools.chain(*shapes, *(v.aval.shape for v in eqn.outvars))
    if not all(isinstance(size, int) for size in sizes):
      return None
    arrays = [
      np.broadcast_to(a, s) for a, s in zip(arrays, shapes, strict=True)
    ]
  outputs = eqn.primitive.bind(*map(jax.numpy.asarray, arrays), **eqn.params)
  outputs = outputs if eqn.primitive.multiple_results else [outputs]
  return [_const(output) for output in outputs]


def _image_layout(jaxpr: Any, rank: int) -> tuple[int, ...]:
  """The layout that the first convolution wants, for the input to have it."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'conv_general_dilated':
      spec = tuple(eqn.params['dimension_numbers'].lhs_spec)
      return spec if len(spec) == rank else identity(rank)
    if eqn.primitive.name in _CALLS:
      inner, _ = _inner(eqn.params[_CALLS[eqn.primitive.name]])
      layout = _image_layout(inner, rank)
      if layout != identity(rank):
        return layout
  return identity(rank)


def to_model(
  traced: Any, reads: str, metadata: Mapping[str, str], version: str
) -> onnx.ModelProto:
  """An ONNX model of a traced function of one array.

  Args:
    traced: a ClosedJaxpr with one input `[batch, ...]` and one output.
    reads: name of the input.
    metadata: the model's metadata_props.
    version: of the producer, kd_jax.

  Returns:
    The checked model; its output is named `output`.

  Raises:
    ValueError: for a primitive that has no ONNX form here.
  """
  jaxpr, consts = _inner(traced)
  (input,), (output,) = traced.in_avals, traced.out_avals
  graph = Graph(reads, input.shape[0] if input.shape else None)
  rank = len(input.shape)
  x = Tensor(reads, input.shape, identity(rank))
  x = graph.align(x, _image_layout(jaxpr, rank))
  (y,) = interpret(graph, jaxpr, consts, [x])
  y = graph.full(graph.real(y), output.shape)
  y = graph.align(y, identity(len(output.shape)))
  graph.nodes.append(helper.make_node('Identity', [y.name], ['output']))
  nodes = _needed(graph.nodes)
  read = {name for node in nodes for name in node.input}
  model = helper.make_model(
    helper.make_graph(
      nodes,
      'kd_jax',
      [_value_info(reads, input)],
      [_value_info('output', output)],
      [t for name, t in graph.initializers.items() if name in read],
    ),
    opset_imports=[helper.make_opsetid('', OPSET)],
    ir_version=IR_VERSION,
    producer_name='kd_jax',
    producer_version=version,
  )
  helper.set_model_props(model, dict(metadata))
  onnx.checker.check_model(model, full_check=True)
  return model


def _needed(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
  """The nodes that the last one reads, directly or not."""
  wanted = set(nodes[-1].output)
  kept = []
  for node in reversed(nodes):
    if wanted.intersection(node.output):
      wanted.update(node.input)
      kept.append(node)
  return kept[::-1]


def _value_info(name: str, aval: Any) -> onnx.ValueInfoProto:
  kind = helper.np_dtype_to_tensor_dtype(np.dtype(aval.dtype))
  sizes = [size if isinstance(size, int) else str(size) for size in aval.shape]
  return helper.make_tensor_value_info(name, kind, sizes)
