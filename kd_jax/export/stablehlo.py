"""StableHLO artefacts: a model as programs, weights, a test and a manifest.

The program is what `jax.export` writes, for CPU, GPU and TPU at once; it takes
the weights as arguments, so they are stored once for both of its forms. Such a
directory needs no model code, and not even this library:

  raw = pathlib.Path('model.stablehlo').read_bytes()
  weights = safetensors.flax.load_file('weights.safetensors')
  model = jax.jit(jax.export.deserialize(bytearray(raw)).call)
  logits = model([weights[name] for name in sorted(weights)], images)

`load_stablehlo` does the same after verifying all of it, because a program
runs whatever it says: load only artefacts that you trust. Owns no file
handling: that is in `manifest`.
"""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
from jax import export

from kd_jax import rules
from kd_jax.export import manifest as manifest_lib
from kd_jax.export.manifest import ArtefactError

_PLATFORMS = ('cpu', 'cuda', 'tpu')
_PACKAGES = ('kd_jax', 'jax', 'jaxlib', 'flax')
# Other machines round floats in another order; that moves an int8 activation
# by a step here and there, and bfloat16 products by up to a percent.
_TOLERANCE = 0.02
# As safetensors names them. Its own reader of bytes knows no bfloat16.
_DTYPES = {
  'BOOL': 'bool',
  'I8': 'int8',
  'U8': 'uint8',
  'I16': 'int16',
  'U16': 'uint16',
  'I32': 'int32',
  'U32': 'uint32',
  'I64': 'int64',
  'U64': 'uint64',
  'F8_E4M3': 'float8_e4m3fn',
  'F8_E5M2': 'float8_e5m2',
  'F16': 'float16',
  'BF16': 'bfloat16',
  'F32': 'float32',
  'F64': 'float64',
}


def export_stablehlo(
  fn: Callable[[Any, jax.Array], jax.Array],
  variables: Mapping[str, Any],
  image: jax.ShapeDtypeStruct,
  directory: str | os.PathLike[str],
  *,
  class_names: Sequence[str],
  golden_images: jax.typing.ArrayLike,
  metadata: Mapping[str, Any] | None = None,
  overwrite: bool = False,
) -> pathlib.Path:
  """Writes a model as a directory that `load_stablehlo` reads.

  `model.stablehlo` takes batches of any size. What a newer JAX writes there an
  older one may not read, so `model.batch1.stablehlo` is there for the long
  term: the same model for one image, in operations that hardly change.

  Args:
    fn: `(variables, images) -> logits`, pure, in evaluation mode,
      pre-processing included. Arrays that it closes over are stored in both
      programs; what is large belongs in `variables`.
    variables: a tree of arrays of any dtype that safetensors has.
    image: `[1, H, W, C]`, conventionally uint8; the 1 stands for any batch.
    directory: where to write; a local path, whose parents are made.
    class_names: one name per logit; may be empty.
    golden_images: `[N, H, W, C]`, N > 0, a few real images. They are stored
      with the logits that the compiled function gives for them here, and every
      load has to reproduce these.
    metadata: JSON values to keep in the manifest; nothing secret.
    overwrite: replace an artefact that is there. Nothing else is replaced.

  Returns:
    The directory, which is complete or, after any error, as it was.

  Raises:
    ArtefactError: if the directory exists (without `overwrite`), or holds
      other files.
    ValueError: if a leaf cannot be stored, the function does not return one
      array `[batch, C]`, or class names, golden images or metadata do not fit.

  Example:
    >>> import tempfile
    >>> def fn(variables, images):
    ...   x = images.reshape(images.shape[0], -1) / 255
    ...   return x @ variables['kernel']
    >>> directory = export_stablehlo(
    ...   fn,
    ...   {'kernel': jnp.eye(4)[:, :2]},
    ...   jax.ShapeDtypeStruct((1, 2, 2, 1), jnp.uint8),
    ...   tempfile.mkdtemp() + '/model',
    ...   class_names=['left', 'right'],
    ...   golden_images=np.full((1, 2, 2, 1), 255, np.uint8),
    ... )
    >>> model = load_stablehlo(directory)
    >>> images = np.array([[0, 255, 9, 9]], np.uint8).reshape(1, 2, 2, 1)
    >>> model.predict(images).tolist()
    [[0.0, 1.0]]
  """
  directory = pathlib.Path(directory)
  manifest_lib.check_target(directory, overwrite=overwrite)
  names, weights, restore = _named_leaves(variables)

  def model(weights, images):
    return fn(restore(weights), images)

  golden = np.asarray(golden_images)
  _check_golden(golden, image)
  (batch,) = export.symbolic_shape('batch')
  symbolic = _export(model, weights, (batch, *image.shape[1:]), image.dtype)
  fixed = _export(model, weights, (1, *image.shape[1:]), image.dtype)
  classes = _check_output(symbolic.out_avals, batch, class_names)
  logits = np.asarray(jax.jit(model)(weights, golden))
  if not np.isfinite(logits).all():
    raise ValueError(
      'export_stablehlo: logits of golden images are not finite.'
    )
  about = {
    'versions': {name: _version(name) for name in _PACKAGES},
    'stablehlo': _stablehlo_version(symbolic),
    'calling_convention': symbolic.calling_convention_version,
    'platforms': list(symbolic.platforms),
    'signature': (
      'logits = model(weights, images); weights is a list of the arrays in '
      f'{manifest_lib.WEIGHTS}, sorted by name'
    ),
    'input': _input_spec(image),
    'output': {
      'name': 'logits',
      'shape': ['batch', classes],
      'dtype': logits.dtype.name,
    },
    'class_names': [str(name) for name in class_names],
    'golden': {
      'images': len(golden),
      'tolerance': _TOLERANCE * float(np.abs(logits).max()),
    },
    'metadata': _as_json(metadata or {}),
  }
  files = {
    manifest_lib.SYMBOLIC: bytes(symbolic.serialize()),
    manifest_lib.FIXED: bytes(fixed.serialize()),
    manifest_lib.WEIGHTS: safetensors.flax.save(
      dict(zip(names, weights, strict=True))
    ),
    manifest_lib.GOLDEN: safetensors.flax.save(
      {'images': jnp.asarray(golden), 'logits': jnp.asarray(logits)}
    ),
  }
  manifest_lib.write(directory, files, about, overwrite=overwrite)
  return directory


class Artefact:
  """A model read from its files; `load_stablehlo` makes it.

  Attributes:
    manifest: what `manifest.json` says: `input`, `output`, `versions`,
      `metadata` and more.
    class_names: one name per logit, or empty.
  """

  def __init__(
    self,
    manifest: dict[str, Any],
    call: Callable[[list[jax.Array], jax.Array], jax.Array],
    weights: list[jax.Array],
  ):
    self.manifest = manifest
    self.class_names = tuple(manifest['class_names'])
    self._call = jax.jit(call)
    self._weights = weights

  def predict(self, images: jax.typing.ArrayLike) -> np.ndarray:
    """The logits of a batch; compiles once per batch size.

    Args:
      images: `[B, H, W, C]`, B > 0, of the shape and dtype in
        `manifest['input']`.

    Returns:
      `[B, C]` logits.

    Raises:
      ValueError: for images of another shape or dtype.
    """
    if not isinstance(images, jax.Array):
      images = np.asarray(images)
    self._check(images)
    return np.asarray(self._call(self._weights, images))

  def classify(self, images: jax.typing.ArrayLike) -> list[tuple[str, float]]:
    """The most likely class of each image, and its probability.

    Args:
      images: as in `predict`.

    Returns:
      `(class name, softmax probability)` per image.

    Raises:
      ValueError: as in `predict`, or if the artefact has no class names.
    """
    if not self.class_names:
      raise ValueError('classify: this artefact was exported without names.')
    logits = self.predict(images).astype(np.float64)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = odds / odds.sum(-1, keepdims=True)
    best = probabilities.argmax(-1)
    return [
      (self.class_names[i], float(p[i]))
      for i, p in zip(best, probabilities, strict=True)
    ]

  def _check(self, images: np.ndarray | jax.Array) -> None:
    spec = self.manifest['input']
    shape = tuple(spec['shape'][1:])
    fits = images.ndim > 0 and images.shape[0] > 0
    if fits and images.shape[1:] == shape and images.dtype == spec['dtype']:
      return
    hint = ''
    if tuple(images.shape) == shape:
      hint = '; a single image needs a batch axis, image[None]'
    raise ValueError(
      f'predict: expected images {_text(spec["dtype"], spec["shape"])}'
      f'{_range_text(spec["range"])} but was given '
      f'{_text(images.dtype, images.shape)}{hint}.'
    )


def load_stablehlo(directory: str | os.PathLike[str]) -> Artefact:
  """Reads and verifies what `export_stablehlo` wrote.

  Every file is compared with its SHA-256 before it is used, nothing is
  unpickled, and the golden images have to give their logits again. If this JAX
  cannot run the program for any batch size, that for one image takes its place,
  with a warning.

  Args:
    directory: the artefact.

  Raises:
    ArtefactError: if a file is missing, damaged or of a later format, this JAX
      cannot run the programs, or they compute something else here.
  """
  directory = pathlib.Path(directory)
  manifest, files = manifest_lib.read(directory)
  named = _arrays(directory / manifest_lib.WEIGHTS, files)
  weights = [jax.device_put(named[name]) for name in sorted(named)]
  golden = _arrays(directory / manifest_lib.GOLDEN, files)
  artefact, logits = _start(
    directory, manifest, files, weights, golden['images']
  )
  _check_replay(directory, manifest, logits, golden['logits'])
  return artefact


def _start(
  directory: pathlib.Path,
  manifest: dict[str, Any],
  files: Mapping[str, bytes],
  weights: list[jax.Array],
  images: np.ndarray,
) -> tuple[Artefact, np.ndarray]:
  """The artefact that runs here, and its logits of the golden images."""
  versions = (
    f'was written by jax {manifest["versions"]["jax"]} and this is jax '
    f'{jax.__version__}'
  )

  def start(name, form):
    try:
      program = export.deserialize(bytearray(files[name]))
      artefact = Artefact(manifest, form(program), weights)
      return artefact, artefact.predict(images)
    except Exception as e:  # flatbuffers, MLIR and XLA raise all kinds
      raise ArtefactError(
        f'{directory / name} cannot be run: it {versions} ({_brief(e)}).'
      ) from e

  try:
    return start(manifest_lib.SYMBOLIC, _any_batch)
  except ArtefactError as e:
    started = start(manifest_lib.FIXED, _one_by_one)
    warnings.warn(
      f'{e} Using {manifest_lib.FIXED}, one image at a time.', stacklevel=3
    )
    return started


def _any_batch(program: export.Exported) -> Callable[..., jax.Array]:
  return lambda weights, images: program.call(weights, images)


def _one_by_one(program: export.Exported) -> Callable[..., jax.Array]:
  def call(weights, images):
    def one(image):
      return program.call(weights, image[None])[0]

    return jax.lax.map(one, images)

  return call


def _check_replay(
  directory: pathlib.Path,
  manifest: Mapping[str, Any],
  logits: np.ndarray,
  golden: np.ndarray,
) -> None:
  tolerance = manifest['golden']['tolerance']
  logits, golden = logits.astype(np.float64), golden.astype(np.float64)
  error = float(np.abs(logits - golden).max())
  best = np.sort(golden, -1)[:, -2:]
  # Classes that close may swap places between machines.
  clear = best[:, -1] - best[:, 0] > tolerance
  other = clear & (logits.argmax(-1) != golden.argmax(-1))
  # Not `error > tolerance`: NaN has to be refused.
  if other.any() or not error <= tolerance:
    raise ArtefactError(
      f'{directory} computes something else here than where it was exported: '
      f'on {manifest_lib.GOLDEN} its logits differ by up to {error:.3g} '
      f'(allowed: {tolerance:.3g}), and {int(other.sum())} of {len(golden)} '
      'images get another class.'
    )


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
  if dtype is None or dtype.name not in _DTYPES.values():
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
  images = jax.ShapeDtypeStruct(shape, dtype)
  with _without_locations():
    return export.export(jax.jit(model), platforms=_PLATFORMS)(specs, images)


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


def _check_golden(golden: np.ndarray, image: jax.ShapeDtypeStruct) -> None:
  if (
    golden.dtype != image.dtype
    or golden.ndim != len(image.shape)
    or golden.shape[1:] != tuple(image.shape[1:])
    or not len(golden)
  ):
    expected = _text(image.dtype, ('N > 0', *image.shape[1:]))
    raise ValueError(
      f'export_stablehlo: golden_images must be {expected} but is '
      f'{_text(golden.dtype, golden.shape)}.'
    )


def _check_output(
  outputs: Sequence[Any], batch: Any, class_names: Sequence[str]
) -> int:
  """The number of classes."""
  shapes = [tuple(output.shape) for output in outputs]
  if (
    len(shapes) != 1
    or len(shapes[0]) != 2
    or shapes[0][0] != batch
    or not isinstance(shapes[0][1], int)
  ):
    shown = ', '.join(_text('', shape) for shape in shapes) or 'nothing'
    raise ValueError(
      f'export_stablehlo: fn must return one array [batch, C] but returns '
      f'{shown}.'
    )
  classes = shapes[0][1]
  if class_names and len(class_names) != classes:
    raise ValueError(
      f'export_stablehlo: {len(class_names)} class names for {classes} logits.'
    )
  return classes


def _input_spec(image: jax.ShapeDtypeStruct) -> dict[str, Any]:
  dtype = np.dtype(image.dtype)
  bounds = None
  if np.issubdtype(dtype, np.integer):
    info = np.iinfo(dtype)
    bounds = [int(info.min), int(info.max)]
  return {
    'name': 'images',
    'shape': ['batch', *image.shape[1:]],
    'dtype': dtype.name,
    'layout': 'NHWC' if len(image.shape) == 4 else None,
    'range': bounds,
  }


def _arrays(
  path: pathlib.Path, files: Mapping[str, bytes]
) -> dict[str, np.ndarray]:
  try:
    return {
      name: np.frombuffer(
        array['data'], jnp.dtype(_DTYPES[array['dtype']])
      ).reshape(array['shape'])
      for name, array in safetensors.deserialize(files[path.name])
    }
  except (KeyError, ValueError, safetensors.SafetensorError) as e:
    raise ArtefactError(f'{path} cannot be read: {_brief(e)}.') from e


def _as_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
  try:
    return json.loads(json.dumps(dict(metadata), allow_nan=False))
  except (TypeError, ValueError) as e:
    raise ValueError(f'export_stablehlo: metadata is not JSON: {e}.') from e


def _stablehlo_version(program: export.Exported) -> str | None:
  # The bytecode names its producer; there is no other public way to ask.
  found = re.search(rb'StableHLO_v([\d.]+)', program.mlir_module_serialized)
  return found and found.group(1).decode()


def _version(name: str) -> str | None:
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    return importlib.metadata.version(name)
  return None


def _text(dtype: Any, shape: Sequence[Any]) -> str:
  return f'{dtype} [{", ".join(map(str, shape))}]'.strip()


def _range_text(bounds: Sequence[int] | None) -> str:
  return f' in {bounds[0]}..{bounds[1]}' if bounds else ''


def _brief(e: BaseException) -> str:
  text = f'{type(e).__name__}: {str(e).strip()}'.splitlines()[0]
  return text if len(text) <= 160 else text[:157] + '...'
