"""Variables as one safetensors file: nothing is executed when it is read."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.flax
from flax import traverse_util

from kd_jax import quantize

FORMAT = 'kd_jax.variables.1'


def save_weights(path: Path, variables: Mapping[str, Any]) -> None:
  """Writes nested dicts of arrays to a file, whole or not at all.

  Args:
    path: the file, conventionally `*.safetensors`.
    variables: nested dicts of arrays; keys must not contain '/'.
  """
  flat = traverse_util.flatten_dict(variables, sep='/')
  flat = {k: jax.numpy.asarray(v) for k, v in flat.items()}
  data = safetensors.flax.save(flat, metadata={'format': FORMAT})
  half = path.with_name(path.name + '.tmp')
  half.write_bytes(data)
  os.replace(half, path)


def load_weights(path: Path) -> dict[str, Any]:
  """Reads what `save_weights` wrote.

  Returns:
    Nested dicts of `jax.Array`.

  Raises:
    ValueError: if the file is missing, damaged, or not written by kd_jax.
  """
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      written = (file.metadata() or {}).get('format')
    if written != FORMAT:
      raise ValueError(f'{path} holds {written!r}, not {FORMAT!r}.')
    flat = safetensors.flax.load_file(path)
  except (OSError, safetensors.SafetensorError) as e:
    raise ValueError(f'{path} cannot be read as weights: {e}') from e
  return traverse_util.unflatten_dict(flat, sep='/')


def count(variables: Mapping[str, Any]) -> tuple[int, int]:
  """The number of parameters, and of those that are not zero.

  Counts kernels, biases and BatchNorm's scale and bias, in float or integer
  form; running statistics, scales and zero points are not parameters.

  Args:
    variables: with `params`, and `int8` after `quantize.convert`; two codes of
      4 bits in a byte are two parameters.
  """
  params = quantize.dequantize_params(variables)['params']
  leaves = jax.tree.leaves(params)
  return (
    sum(int(leaf.size) for leaf in leaves),
    sum(int(np.count_nonzero(leaf)) for leaf in leaves),
  )
