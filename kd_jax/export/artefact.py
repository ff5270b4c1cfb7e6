"""StableHLO artefacts read again: verified, run on a test, and called.

Owns loading; what stands in an artefact and how it is written is `stablehlo`'s,
its files are `manifest`'s. A program runs whatever it says: load only artefacts
that you trust.
"""

import os
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax import export

from kd_jax.export import manifest as manifest_lib
from kd_jax.export.manifest import ArtefactError
from kd_jax.storage.files import brief

# As safetensors names them. Its own reader of bytes knows no bfloat16.
DTYPES = {
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


class Artefact:
  """A model read from its files; `load_stablehlo` makes it.

  Args:
    manifest: as it was read.
    call: `(weights, inputs) -> outputs`, compiled once per shape of inputs.
    weights: what `call` takes first, on the devices.

  Attributes:
    manifest: what `manifest.json` says: `input`, `output`, `versions`,
      `metadata` and more.
    class_names: one name per entry of the last axis of outputs, or empty.

  Example:
    >>> manifest = {'class_names': ['left', 'right'], 'input': {
    ...   'shape': ['batch', 2], 'dtype': 'float32', 'range': None}}
    >>> artefact = Artefact(manifest, lambda w, x: w[0] * x, [jnp.float32(2)])
    >>> inputs = np.array([[1.0, 3.0]], 'f')
    >>> artefact.predict(inputs).tolist()
    [[2.0, 6.0]]
    >>> [(name, round(p, 3)) for name, p in artefact.classify(inputs)]
    [('right', 0.982)]
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

  def predict(self, inputs: jax.typing.ArrayLike) -> np.ndarray:
    """The outputs of a batch; compiles once per batch size.

    Args:
      inputs: `[B, ...]`, B > 0, of the shape and dtype in
        `manifest['input']`, such as uint8 `[B, H, W, C]`.

    Returns:
      `[B, ...]`, such as logits `[B, C]`.

    Raises:
      ValueError: for inputs of another shape or dtype.
    """
    if not isinstance(inputs, jax.Array):
      inputs = np.asarray(inputs)
    self._check(inputs)
    return np.asarray(self._call(self._weights, inputs))

  def classify(self, inputs: jax.typing.ArrayLike) -> list[tuple[str, float]]:
    """The most likely class of each example, and its probability.

    Args:
      inputs: as in `predict`.

    Returns:
      `(class name, softmax probability)` per example.

    Raises:
      ValueError: as in `predict`, or if the artefact has no class names, or
        gives more than one prediction for an example.
    """
    if not self.class_names:
      raise ValueError('classify: this artefact was exported without names.')
    logits = self.predict(inputs).astype(np.float64)
    if logits.ndim != 2:
      raise ValueError(
        f'classify: outputs are {list(logits.shape)}, not [B, C]; use predict.'
      )
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = odds / odds.sum(-1, keepdims=True)
    best = probabilities.argmax(-1)
    return [
      (self.class_names[i], float(p[i]))
      for i, p in zip(best, probabilities, strict=True)
    ]

  def _check(self, inputs: np.ndarray | jax.Array) -> None:
    spec = self.manifest['input']
    shape = tuple(spec['shape'][1:])
    fits = inputs.ndim > 0 and inputs.shape[0] > 0
    if fits and inputs.shape[1:] == shape and inputs.dtype == spec['dtype']:
      return
    hint = ''
    if tuple(inputs.shape) == shape:
      hint = '; a single input needs a batch axis, x[None]'
    raise ValueError(
      f'predict: expected inputs {as_text(spec["dtype"], spec["shape"])}'
      f'{_range_text(spec["range"])} but was given '
      f'{as_text(inputs.dtype, inputs.shape)}{hint}.'
    )


def load_stablehlo(directory: str | os.PathLike[str]) -> Artefact:
  """Reads and verifies what `export_stablehlo` wrote.

  Every file is compared with its SHA-256 before it is used, nothing is
  unpickled, and the golden inputs have to give their outputs again. If this JAX
  cannot run the program for any batch size, that for one example takes its
  place, with a warning.

  Args:
    directory: the artefact.

  Raises:
    ArtefactError: if a file is missing, damaged or of a later format, this JAX
      cannot run the programs, or they compute something else here.

  Example:
    >>> import tempfile
    >>> from kd_jax.export import export_stablehlo
    >>> directory = export_stablehlo(
    ...   lambda variables, x: x @ variables['w'],
    ...   {'w': jnp.array([[1.0, 2.0]])},
    ...   jax.ShapeDtypeStruct((1, 1), jnp.float32),
    ...   pathlib.Path(tempfile.mkdtemp(), 'model'),
    ...   class_names=(),
    ...   golden=np.ones((1, 1), 'f'),
    ... )
    >>> inputs = np.array([[3.0], [0.5]], 'f')
    >>> load_stablehlo(directory).predict(inputs).tolist()
    [[3.0, 6.0], [0.5, 1.0]]
    >>> with open(directory / manifest_lib.WEIGHTS, 'ab') as file:
    ...   _ = file.write(b'0')
    >>> try:
    ...   load_stablehlo(directory)
    ... except ArtefactError as e:
    ...   print(str(e).rpartition(': ')[2])
    the file is damaged or was replaced.
  """
  directory = pathlib.Path(directory)
  manifest, files = manifest_lib.read(directory)
  named = _arrays(directory / manifest_lib.WEIGHTS, files)
  weights = [jax.device_put(named[name]) for name in sorted(named)]
  golden = _arrays(directory / manifest_lib.GOLDEN, files)
  artefact, outputs = _start(
    directory, manifest, files, weights, golden['inputs']
  )
  _check_replay(directory, manifest, outputs, golden['outputs'])
  return artefact


def _start(
  directory: pathlib.Path,
  manifest: dict[str, Any],
  files: Mapping[str, bytes],
  weights: list[jax.Array],
  inputs: np.ndarray,
) -> tuple[Artefact, np.ndarray]:
  """The artefact that runs here, and its outputs of the golden inputs."""
  versions = (
    f'was written by jax {manifest["versions"]["jax"]} and this is jax '
    f'{jax.__version__}'
  )

  def start(name, form):
    try:
      program = export.deserialize(bytearray(files[name]))
      artefact = Artefact(manifest, form(program), weights)
      return artefact, artefact.predict(inputs)
    except Exception as e:  # flatbuffers, MLIR and XLA raise all kinds
      raise ArtefactError(
        f'{directory / name} cannot be run: it {versions} ({brief(e)}).'
      ) from e

  try:
    return start(manifest_lib.SYMBOLIC, _any_batch)
  except ArtefactError as e:
    started = start(manifest_lib.FIXED, _one_by_one)
    warnings.warn(
      f'{e} Using {manifest_lib.FIXED}, one example at a time.', stacklevel=3
    )
    return started


def _any_batch(program: export.Exported) -> Callable[..., jax.Array]:
  return lambda weights, inputs: program.call(weights, inputs)


def _one_by_one(program: export.Exported) -> Callable[..., jax.Array]:
  def call(weights, inputs):
    def one(x):
      return program.call(weights, x[None])[0]

    return jax.lax.map(one, inputs)

  return call


def _check_replay(
  directory: pathlib.Path,
  manifest: Mapping[str, Any],
  outputs: np.ndarray,
  golden: np.ndarray,
) -> None:
  tolerance = manifest['golden']['tolerance']
  outputs, golden = outputs.astype(np.float64), golden.astype(np.float64)
  error = float(np.abs(outputs - golden).max())
  best = np.sort(golden, -1)[..., -2:]
  # Classes that close may swap places between machines.
  clear = best[..., -1] - best[..., 0] > tolerance
  other = clear & (outputs.argmax(-1) != golden.argmax(-1))
  # Not `error > tolerance`: NaN has to be refused.
  if other.any() or not error <= tolerance:
    raise ArtefactError(
      f'{directory} computes something else here than where it was exported: '
      f'on {manifest_lib.GOLDEN} its outputs differ by up to {error:.3g} '
      f'(allowed: {tolerance:.3g}), and {int(other.sum())} of {other.size} '
      'of them get another class.'
    )


def _arrays(
  path: pathlib.Path, files: Mapping[str, bytes]
) -> dict[str, np.ndarray]:
  try:
    return {
      name: np.frombuffer(
        array['data'], jnp.dtype(DTYPES[array['dtype']])
      ).reshape(array['shape'])
      for name, array in safetensors.deserialize(files[path.name])
    }
  except (KeyError, ValueError, safetensors.SafetensorError) as e:
    raise ArtefactError(f'{path} cannot be read: {brief(e)}.') from e


def as_text(dtype: Any, shape: Sequence[Any]) -> str:
  """An array in a message, such as 'uint8 [8, 8, 1]'."""
  return f'{dtype} [{", ".join(map(str, shape))}]'.strip()


def _range_text(bounds: Sequence[int] | None) -> str:
  return f' in {bounds[0]}..{bounds[1]}' if bounds else ''
