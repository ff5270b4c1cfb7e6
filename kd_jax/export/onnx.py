"""Models as ONNX files, and running them in onnxruntime.

This file owns the ONNX file: its metadata, its checks, reading it back. What
becomes of a traced function is in `onnx_trace` and what it imports, which
import the `onnx` package; here it is imported when first needed.
"""

import collections
import functools
import importlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import export

import kd_jax
from kd_jax.export.inputs import check_one_input
from kd_jax.storage import files

# The operators that hold a layer's arithmetic, integer and float; reported by
# `integer_kernels` even when there are none.
_INTEGER_LAYERS = ('QLinearConv', 'QGemm', 'QLinearMatMul', 'QLinearAdd')
_FLOAT_LAYERS = ('Conv', 'FusedConv', 'Gemm', 'FusedGemm', 'MatMul', 'Add')


def export_onnx(
  fn: Callable[[jax.Array], jax.Array],
  input: jax.ShapeDtypeStruct,
  path: str | os.PathLike[str],
  *,
  reads: str = 'image',
  class_names: Sequence[str] = (),
  metadata: Mapping[str, str] | None = None,
) -> pathlib.Path:
  """Writes a function of one array as an ONNX file, opset 20.

  The function is traced and its primitives become ONNX nodes. A model made by
  `quantize.convert` and run with `execute_integers(simulate=True)` becomes
  QuantizeLinear and DequantizeLinear around its layers, which onnxruntime
  executes on integers; `integer_kernels` tells whether it does.

  Args:
    fn: `input -> output`, with the weights closed over: preprocessing and the
      model in evaluation mode.
    input: `[B, ...]`, such as `[B, H, W, C]` uint8 or float32. B is any
      number: the graph's first axis is symbolic and named `batch`.
    path: the file to write; it replaces an older one only when complete.
    reads: what the network calls its input, and so does the graph.
    class_names: one name per output channel, stored as JSON in the metadata.
    metadata: further entries of the model's metadata.

  Returns:
    The path.

  Raises:
    ImportError: if the `onnx` package is missing.
    ValueError: if the function uses a primitive that has no ONNX form here,
      takes or returns anything but one array, or the class names do not fit it.
  """
  check_one_input('export_onnx', input)
  _require('onnx')
  trace = importlib.import_module('kd_jax.export.onnx_trace')
  (batch,) = export.symbolic_shape('batch')
  traced = jax.make_jaxpr(fn)(
    jax.ShapeDtypeStruct((batch, *input.shape[1:]), input.dtype)
  )
  if len(traced.out_avals) != 1:
    raise ValueError(
      f'export_onnx: fn returned {len(traced.out_avals)} arrays, not one.'
    )
  classes = traced.out_avals[0].shape[-1:]
  if class_names and classes != (len(class_names),):
    raise ValueError(
      f'export_onnx: {len(class_names)} class names for an output of shape '
      f'{traced.out_avals[0].shape}.'
    )
  properties = dict(metadata or {})
  if class_names:
    properties['class_names'] = json.dumps(list(class_names))
  model = trace.to_model(traced, reads, properties, kd_jax.__version__)
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write(path, model.SerializeToString())
  return path


def load_onnx(
  path: str | os.PathLike[str],
) -> Callable[[np.ndarray], np.ndarray]:
  """An ONNX file as a function, run by onnxruntime on the CPU.

  Args:
    path: a file with one input and one output, all its weights inside.

  Returns:
    `input -> output`, both `[B, ...]` numpy arrays; B is any number.

  Raises:
    ImportError: if the `onnx` or `onnxruntime` package is missing.
    ValueError: for a damaged file, one that keeps weights in other files, or
      has more than one input or output.
  """
  session = _session(path)
  inputs, outputs = session.get_inputs(), session.get_outputs()
  if (len(inputs), len(outputs)) != (1, 1):
    raise ValueError(
      f'{path}: has {len(inputs)} inputs and {len(outputs)} outputs, '
      'not one of each.'
    )
  names = [outputs[0].name]

  def run(x: np.ndarray) -> np.ndarray:
    return session.run(names, {inputs[0].name: np.asarray(x)})[0]

  return run


def integer_kernels(path: str | os.PathLike[str]) -> dict[str, int]:
  """Which operators onnxruntime really runs, after its optimizations.

  A quantized layer that could not be fused runs in float32 without a word;
  only the optimized graph shows it.

  Args:
    path: an ONNX file.

  Returns:
    operator -> how many nodes. The operators of layers, integer
    (`QLinearConv`, `QGemm`, ...) and float (`Conv`, `FusedConv`, `Gemm`,
    ...), are there even when their count is 0.

  Raises:
    ImportError: if the `onnx` or `onnxruntime` package is missing.
    ValueError: if the file keeps weights in other files.
  """
  onnx = _require('onnx')
  with tempfile.TemporaryDirectory() as folder:
    optimized = os.path.join(folder, 'optimized.onnx')
    _session(path, optimized)
    nodes = onnx.load(optimized).graph.node
  counts = dict.fromkeys((*_INTEGER_LAYERS, *_FLOAT_LAYERS), 0)
  return counts | collections.Counter(node.op_type for node in nodes)


def _require(package: str) -> Any:
  try:
    return importlib.import_module(package)
  except ModuleNotFoundError as error:
    if error.name != package:
      raise
    raise ImportError(
      f'ONNX needs the {package} package: pip install "kd_jax[onnx]"'
    ) from error


def _session(path: str | os.PathLike, optimized: str | None = None) -> Any:
  onnx, runtime = _require('onnx'), _require('onnxruntime')
  content = pathlib.Path(path).read_bytes()
  try:
    model = onnx.ModelProto.FromString(content)
  except Exception as e:  # of protobuf
    raise ValueError(f'{path} is damaged, or no ONNX file: {e}') from e
  # A path inside the file could point at any file of this machine.
  if any(
    tensor.data_location == onnx.TensorProto.EXTERNAL
    for tensor in _tensors(model, onnx.TensorProto)
  ):
    raise ValueError(
      f'{path}: keeps weights in other files (external data), which is '
      'refused; save it as one file.'
    )
  options = runtime.SessionOptions()
  options.log_severity_level = 3
  if _saturates():
    options.add_session_config_entry('session.x64quantprecision', '1')
  # Where weights alone are quantized onnxruntime would round the inputs too.
  options.add_session_config_entry(
    'session.qdq_matmulnbits_accuracy_level', '1'
  )
  if optimized is not None:
    options.optimized_model_filepath = optimized
  return runtime.InferenceSession(
    content, options, providers=['CPUExecutionProvider']
  )


@functools.cache
def _saturates() -> bool:
  """Whether this CPU's kernels for uint8 times int8 lose bits.

  They do on x86 without VNNI, where sums of two products are kept in 16 bits.
  An option of onnxruntime then buys exactness for speed; where it is not
  needed it would only cost, so ask the kernel itself.
  """
  onnx, runtime = _require('onnx'), _require('onnxruntime')
  kind, helper = onnx.TensorProto, onnx.helper
  codes = np.full((1, 64), 255, np.uint8)
  weights = np.full((64, 16), 127, np.int8)
  graph = helper.make_graph(
    [helper.make_node('MatMulInteger', ['x', 'w'], ['y'])],
    'probe',
    [helper.make_tensor_value_info('x', kind.UINT8, codes.shape)],
    [helper.make_tensor_value_info('y', kind.INT32, (1, 16))],
    [onnx.numpy_helper.from_array(weights, 'w')],
  )
  model = helper.make_model(
    graph, opset_imports=[helper.make_opsetid('', 20)], ir_version=9
  )
  session = runtime.InferenceSession(
    model.SerializeToString(), providers=['CPUExecutionProvider']
  )
  (product,) = session.run(None, {'x': codes})
  return bool((product != 255 * 127 * 64).any())


def _tensors(message: Any, kind: type) -> Iterator[Any]:
  """Every tensor of a protobuf message, however deep."""
  if isinstance(message, kind):
    yield message
    return
  for field, value in message.ListFields():
    if field.message_type is not None:
      repeated = not hasattr(value, 'ListFields')
      for child in value if repeated else (value,):
        yield from _tensors(child, kind)
