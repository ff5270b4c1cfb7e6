"""Variables as one safetensors file: nothing is executed when it is read.

Owns names and dtypes of arrays in the file; states of training are
`checkpoint`'s.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.flax
from flax import traverse_util

from kd_jax import quantize
from kd_jax.storage import files

FORMAT = 'kd_jax.variables.2'
# The format of before, which has no digest.
_UNSEALED = 'kd_jax.variables.1'


def save_weights(path: Path, variables: Mapping[str, Any]) -> None:
  """Writes nested dicts of arrays to a file, whole or not at all.

  The file holds the SHA-256 of its arrays, which `load_weights` verifies.

  Args:
    path: the file, conventionally `*.safetensors`.
    variables: nested dicts of arrays; keys must not contain '/'.

  Raises:
    OSError: if the file cannot be written; one that was there stays.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   path = Path(directory, 'a.safetensors')
    ...   save_weights(path, {'params': {'head': {'bias': np.ones(2, 'f')}}})
    ...   with safetensors.safe_open(path, framework='numpy') as file:
    ...     list(file.keys())
    ['params/head/bias']
  """
  flat = traverse_util.flatten_dict(variables, sep='/')
  flat = {k: jax.numpy.asarray(v) for k, v in flat.items()}
  # One entry alone: safetensors writes several in a random order.
  about = {'format': f'{FORMAT}/{_digest(flat)}'}
  files.write(path, safetensors.flax.save(flat, metadata=about))


def load_weights(path: Path) -> dict[str, Any]:
  """Reads what `save_weights` wrote.

  Args:
    path: the file.

  Returns:
    Nested dicts of `jax.Array`, of the dtypes that were saved.

  Raises:
    ValueError: if the file is missing, damaged, or not written by kd_jax.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   path = Path(directory, 'a.safetensors')
    ...   save_weights(path, {'params': {'w': np.array([1, -2], np.int8)}})
    ...   w = load_weights(path)['params']['w']
    ...   _ = path.write_bytes(path.read_bytes()[:-1] + bytes([7]))
    ...   try:
    ...     load_weights(path)
    ...   except ValueError as e:
    ...     print(str(e).partition(' is ')[2])
    damaged: its arrays are not what was written, by their SHA-256.
    >>> w.tolist(), w.dtype.name
    ([1, -2], 'int8')
  """
  name, digest = _format_of(path)
  if name not in (FORMAT, _UNSEALED):
    raise ValueError(f'{path} holds {name!r}, not {FORMAT!r}.')
  try:
    flat = safetensors.flax.load_file(path)
  except (OSError, safetensors.SafetensorError) as e:
    raise ValueError(f'{path} cannot be read as weights: {e}') from e
  if name != _UNSEALED and digest != _digest(flat):
    raise ValueError(
      f'{path} is damaged: its arrays are not what was written, by their '
      'SHA-256.'
    )
  return traverse_util.unflatten_dict(flat, sep='/')


def is_ours(path: Path) -> bool:
  """Whether a file says that `save_weights` wrote it, damaged or not.

  Raises:
    ValueError: if it is no safetensors file.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   path = Path(directory, 'a.safetensors')
    ...   safetensors.flax.save_file({'w': jax.numpy.ones(2)}, path)
    ...   is_ours(path)
    False
  """
  return _format_of(path)[0] in (FORMAT, _UNSEALED)


def _format_of(path: Path) -> tuple[str, str]:
  """A file's format and digest, empty where it says none."""
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      written = (file.metadata() or {}).get('format') or ''
  except (OSError, safetensors.SafetensorError) as e:
    raise ValueError(f'{path} cannot be read as weights: {e}') from e
  name, _, digest = written.partition('/')
  return name, digest


def _digest(flat: Mapping[str, jax.Array]) -> str:
  """The SHA-256 of arrays and their names, shapes and dtypes."""
  digest = hashlib.sha256()
  for name, array in sorted(flat.items()):
    values = np.ascontiguousarray(array)
    digest.update(f'{name} {values.dtype} {values.shape}\n'.encode())
    digest.update(values.reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def count(variables: Mapping[str, Any]) -> tuple[int, int]:
  """The number of parameters, and of those that are not zero.

  Counts kernels, biases and BatchNorm's scale and bias, in float or integer
  form; running statistics, scales and zero points are not parameters.

  Args:
    variables: with `params`, and `int8` after `quantize.convert`; two codes of
      4 bits in a byte are two parameters.

  Returns:
    `(all, nonzero)`.

  Example:
    >>> count({'params': {'w': np.array([[0.0, 1.0, 2.0]])}})
    (3, 2)
  """
  params = quantize.dequantize_params(variables)['params']
  leaves = jax.tree.leaves(params)
  return (
    sum(int(leaf.size) for leaf in leaves),
    sum(int(np.count_nonzero(leaf)) for leaf in leaves),
  )
