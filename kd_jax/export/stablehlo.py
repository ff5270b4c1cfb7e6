"""StableHLO artefacts: a model as programs, weights, a test and a manifest.

The program is what `jax.export` writes, for CPU, GPU and TPU at once; it takes
the weights as arguments, so they are stored once for both of its forms. Such a
directory needs no model code, and not even this library:

  raw = pathlib.Path('model.stablehlo').read_bytes()
  weights = safetensors.flax.load_file('weights.safetensors')
  model = jax.jit(jax.export.deserialize(bytearray(raw)).call)
  outputs = model([weights[name] for name in sorted(weights)], inputs)

Owns what stands in the programs, the weights and the manifest. `artefact` reads
them again, and `manifest` handles the files.
"""

import contextlib
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax
from jax import export

from kd_jax import rules
from kd_jax.export import manifest as manifest_lib
from kd_jax.export.artefact import DTYPES, as_text
from kd_jax.export.inputs import check_one_input
from kd_jax.storage.files import as_json, version

_PLATFORMS = ('cpu', 'cuda', 'tpu')
_PACKAGES = ('kd_jax', 'jax', 'jaxlib', 'flax')
# Other machines round floats in another order; that moves an int8 activation
# by a step here and there, and bfloat16 products by up to a percent.
_TOLERANCE = 0.02


def export_stablehlo(
  fn: Callable[[Any, jax.Array], jax.Array],
  variables: Mapping[str, Any],
  input: jax.ShapeDtypeStruct,
  directory: str | os.PathLike[str],
  *,
  reads: str = 'image',
  class_names: Sequence[str],
  golden: jax.typing.ArrayLike,
  metadata: Mapping[str, Any] | None = None,
  overwrite: bool = False,
) -> pathlib.Path:
  """Writes a model as a directory that `load_stablehlo` reads.

  `model.stablehlo` takes batches of any size. What a newer JAX writes there an
  older one may not read, so `model.batch1.stablehlo` is there for the long
  term: the same model for one example, in operations that hardly change.

  Args:
    fn: `(variables, inputs) -> outputs`, pure, in evaluation mode,
      pre-processing included. Arrays that it closes over are stored in both
      programs; what is large belongs in `variables`.
    variables: a tree of arrays of any dtype that safetensors has.
    input: `[1, ...]`, such as uint8 `[1, H, W, C]`; the 1 stands for any batch.
    directory: where to write; a local path, whose parents are made.
    reads: what the network calls its input, and so does the manifest.
    class_names: one name per entry of the last axis of outputs; may be empty.
    golden: `[N, ...]`, N > 0, a few real inputs. They are stored with the
      outputs that the compiled function gives for them here, and every
      load has to reproduce these.
    metadata: JSON values to keep in the manifest; nothing secret.
    overwrite: replace an artefact that is there. Nothing else is replaced.

  Returns:
    The directory, which is complete or, after any error, as it was.

  Raises:
    ArtefactError: if the directory exists (without `overwrite`), or holds
      other files.
    ValueError: if a leaf cannot be stored, there is more than one input, the
      function does not return one array `[batch, ..., C]`, or class names,
      golden inputs or metadata do not fit.

  Example:
    >>> import tempfile
    >>> from kd_jax.export import load_stablehlo
    >>> def fn(variables, images):
    ...   x = images.reshape(images.shape[0], -1) / 255
    ...   return x @ variables['kernel']
    >>> directory = export_stablehlo(
    ...   fn,
    ...   {'kernel': jnp.eye(4)[:, :2]},
    ...   jax.ShapeDtypeStruct((1, 2, 2, 1), jnp.uint8),
    ...   tempfile.mkdtemp() + '/model',
    ...   class_names=['left', 'right'],
    ...   golden=np.full((1, 2, 2, 1), 255, np.uint8),
    ... )
    >>> model = load_stablehlo(directory)
    >>> images = np.array([[0, 255, 9, 9]], np.uint8).reshape(1, 2, 2, 1)
    >>> model.predict(images).tolist()
    [[0.0, 1.0]]
  """
  check_one_input('export_stablehlo', input)
  directory = pathlib.Path(directory)
  manifest_lib.check_target(directory, overwrite=overwrite)
  names, weights, restore = _named_leaves(variables)

  def model(weights, inputs):
    return fn(restore(weights), inputs)

  given = np.asarray(golden)
  _check_golden(given, input)
  (batch,) = export.symbolic_shape('batch')
  symbolic = _export(model, weights, (batch, *input.shape[1:]), input.dtype)
  fixed = _export(model, weights, (1, *input.shape[1:]), input.dtype)
  _check_output(symbolic.out_avals, batch, class_names)
  outputs = np.asarray(jax.jit(model)(weights, given))
  if not np.isfinite(outputs).all():
    raise ValueError(
      'export_stablehlo: outputs of golden inputs are not finite.'
    )
  about = {
    **_about(symbolic),
    'input': _input_spec(reads, input),
    'output': {
      'name': 'outputs',
      'shape': ['batch', *outputs.shape[1:]],
      'dtype': outputs.dtype.name,
    },
    'class_names': [str(name) for name in class_names],
    'golden': {
      'inputs': len(given),
      'tolerance': _TOLERANCE * float(np.abs(outputs).max()),
    },
    'metadata': as_json(
      dict(metadata or {}), 'export_stablehlo: metadata', allow_nan=False
    ),
  }
  files = {
    manifest_lib.SYMBOLIC: bytes(symbolic.serialize()),
    manifest_lib.FIXED: bytes(fixed.serialize()),
    manifest_lib.WEIGHTS: safetensors.flax.save(
      dict(zip(names, weights, strict=True))
    ),
    manifest_lib.GOLDEN: safetensors.flax.save(
      {'inputs': jnp.asarray(given), 'outputs': jnp.asarray(outputs)}
    ),
  }
  manifest_lib.write(directory, files, about, overwrite=overwrite)
  return directory


def _named_leaves(
  variables: Mapping[str, Any],
) -> tuple[list[str], list[jax.Array], Callable[[list[jax.Array]], Any]]:
  """Names and leaves, sorted by name, and what makes a tree of such leaves."""
  names = rules.leaf_names(variables)
  leaves, treedef = jax.tree.flatten(variables)
  if len(set(names)) != len(names):
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f'export_stablehlo: two leaves have the path {twice!r}.')
  order = sorted(range(len(names)), key=names.__getitem__)

  def restore(weights):
    by_position = dict(zip(order, weights, strict=True))
    return jax.tree.unflatten(treedef, [by_position[i] for i in sorted(order)])

  return (
    [names[i] for i in order],
    [_storable(names[i], leaves[i]) for i in order],
    restore,
  )


def _storable(name: str, leaf: Any) -> jax.Array:
  dtype = getattr(leaf, 'dtype', None)
  if dtype is None or dtype.name not in DTYPES.values():
    what = type(leaf).__name__ if dtype is None else f'array of {dtype}'
    raise ValueError(
      f'export_stablehlo: {name} is {what}, which safetensors cannot store.'
    )
  # By way of the host: the leaves may be spread over a mesh.
  return jnp.asarray(np.asarray(leaf))


def _export(
  model: Callable[..., jax.Array],
  weights: Sequence[jax.Array],
  shape: Sequence[Any],
  dtype: Any,
) -> export.Exported:
  specs = [jax.ShapeDtypeStruct(w.shape, w.dtype) for w in weights]
  inputs = jax.ShapeDtypeStruct(shape, dtype)
  with _without_locations():
    return export.export(jax.jit(model), platforms=_PLATFORMS)(specs, inputs)


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
  """Keeps the paths and lines of source files out of the programs."""
  option = 'jax_traceback_in_locations_limit'
  before = getattr(jax.config, option)
  jax.config.update(option, 0)
  try:
    yield
  finally:
    jax.config.update(option, before)


def _about(program: export.Exported) -> dict[str, Any]:
  """What the manifest says of the programs."""
  # The bytecode names its producer; there is no other public way to ask.
  found = re.search(rb'StableHLO_v([\d.]+)', program.mlir_module_serialized)
  return {
    'versions': {name: version(name) for name in _PACKAGES},
    'stablehlo': found and found.group(1).decode(),
    'calling_convention': program.calling_convention_version,
    'platforms': list(program.platforms),
    'signature': (
      'outputs = model(weights, inputs); weights is a list of the arrays in '
      f'{manifest_lib.WEIGHTS}, sorted by name'
    ),
  }


def _check_golden(golden: np.ndarray, input: jax.ShapeDtypeStruct) -> None:
  if (
    golden.dtype != input.dtype
    or golden.ndim != len(input.shape)
    or golden.shape[1:] != tuple(input.shape[1:])
    or not len(golden)
  ):
    expected = as_text(input.dtype, ('N > 0', *input.shape[1:]))
    raise ValueError(
      f'export_stablehlo: golden must be {expected} but is '
      f'{as_text(golden.dtype, golden.shape)}.'
    )


def _check_output(
  outputs: Sequence[Any], batch: Any, class_names: Sequence[str]
) -> None:
  shapes = [tuple(output.shape) for output in outputs]
  if (
    len(shapes) != 1
    or len(shapes[0]) < 2
    or shapes[0][0] != batch
    or not all(isinstance(size, int) for size in shapes[0][1:])
  ):
    shown = ', '.join(as_text('', shape) for shape in shapes) or 'nothing'
    raise ValueError(
      f'export_stablehlo: fn must return one array [batch, ..., C] but returns '
      f'{shown}.'
    )
  classes = shapes[0][-1]
  if class_names and len(class_names) != classes:
    raise ValueError(
      f'export_stablehlo: {len(class_names)} class names for outputs of '
      f'{classes}.'
    )


def _input_spec(reads: str, input: jax.ShapeDtypeStruct) -> dict[str, Any]:
  dtype = np.dtype(input.dtype)
  bounds = None
  if np.issubdtype(dtype, np.integer):
    info = np.iinfo(dtype)
    bounds = [int(info.min), int(info.max)]
  return {
    'name': reads,
    'shape': ['batch', *input.shape[1:]],
    'dtype': dtype.name,
    'layout': 'NHWC' if len(input.shape) == 4 else None,
    'range': bounds,
  }
