"""The formats in which the integer student leaves a run, by name.

Owns which there are, the names of their files, and how each is written, read
back, sized and described. What is inside of a file is `export`'s; comparing and
measuring what was read back is `recipe`'s and `assess`'.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from kd_jax.export import (
  artefact_bytes,
  export_stablehlo,
  load_stablehlo,
  onnx,
)
from kd_jax.types import Variables

Predict = Callable[[np.ndarray], np.ndarray]


class Model(NamedTuple):
  """What is exported.

  Attributes:
    integer: `(variables, inputs) -> output`, such as uint8 `[B, H, W, C]` to
      float32 `[B, classes]`, on integers, pre-processing included.
    simulated: the same numbers with codes that are rounded again before every
      layer, for formats whose runtime makes integers of that.
    variables: of both.
    input: shape `[1, ...]` and dtype of inputs; the 1 stands for any batch.
    golden: `[N, ...]`, a few real inputs.
    class_names: one per output; may be empty.
    metadata: what a file may say of where it comes from.
    reads: what the network calls its input.
  """

  integer: Callable[[Variables, jax.Array], jax.Array]
  simulated: Callable[[Variables, jax.Array], jax.Array]
  variables: Variables
  input: jax.ShapeDtypeStruct
  golden: np.ndarray
  class_names: Sequence[str]
  metadata: Mapping[str, str]
  reads: str = 'image'


def _file_size(path: Path) -> int:
  return path.stat().st_size


class Exporter(NamedTuple):
  """One format.

  Attributes:
    file: name of its file or directory.
    write: `(model, path)`, whole or not at all; replaces what is there.
    load: `path -> (inputs -> output)`, after checking what it reads.
    size: `path -> bytes` of what a server needs.
    note: `path -> str`, said beside its row of the report.
    extra: of kd_jax, which installs `packages`.
    packages: modules without which it is left out.
  """

  file: str
  write: Callable[[Model, Path], object]
  load: Callable[[Path], Predict]
  size: Callable[[Path], int] = _file_size
  note: Callable[[Path], str] = lambda path: ''
  extra: str = ''
  packages: tuple[str, ...] = ()

  @property
  def installed(self) -> bool:
    """Whether its packages are there."""
    return all(find_spec(name) for name in self.packages)


def _write_stablehlo(model: Model, path: Path) -> None:
  export_stablehlo(
    model.integer,
    model.variables,
    model.input,
    path,
    reads=model.reads,
    class_names=model.class_names,
    golden=model.golden,
    metadata=model.metadata,
    overwrite=True,
  )


def _load_stablehlo(path: Path) -> Predict:
  predict = load_stablehlo(path).predict
  # The program is for one device, whatever the inputs lie on.
  return lambda inputs: predict(np.asarray(inputs))


def _write_onnx(model: Model, path: Path) -> None:
  onnx.export_onnx(
    functools.partial(model.simulated, model.variables),
    model.input,
    path,
    reads=model.reads,
    class_names=model.class_names,
    metadata=model.metadata,
  )


def _kernels(path: Path) -> str:
  """The integer layers that onnxruntime really runs."""
  return ', '.join(
    f'{n} {kernel}'
    for kernel, n in sorted(onnx.integer_kernels(path).items())
    if n and kernel.startswith(('QLinear', 'QGemm'))
  )


EXPORTERS: dict[str, Exporter] = {
  'integer (StableHLO)': Exporter(
    'stablehlo',
    _write_stablehlo,
    _load_stablehlo,
    artefact_bytes,
    lambda path: 'file: both modules, weights and manifest',
  ),
  'integer (ONNX)': Exporter(
    'student.onnx',
    _write_onnx,
    onnx.load_onnx,
    note=_kernels,
    extra='onnx',
    packages=('onnx', 'onnxruntime'),
  ),
}


def write(model: Model, directory: Path) -> dict[str, dict[str, int | str]]:
  """Writes every format whose packages are installed.

  Args:
    model: what to write.
    directory: where to; it exists.

  Returns:
    name -> its `bytes` and `note`, of those that were written.
  """
  found: dict[str, dict[str, int | str]] = {}
  for name, exporter in EXPORTERS.items():
    if exporter.installed:
      path = directory / exporter.file
      exporter.write(model, path)
      found[name] = {'bytes': exporter.size(path), 'note': exporter.note(path)}
  return found


def left_out() -> str:
  """What to install for the formats that `write` leaves out; empty if none."""
  return ''.join(
    f', without {name}: pip install "kd_jax[{exporter.extra}]"'
    for name, exporter in EXPORTERS.items()
    if not exporter.installed
  )


def load(directory: Path) -> dict[str, Predict]:
  """What `write` wrote, by name, as functions of raw inputs.

  Args:
    directory: as for `write`.
  """
  return {
    name: exporter.load(directory / exporter.file)
    for name, exporter in EXPORTERS.items()
    if exporter.installed and (directory / exporter.file).exists()
  }
