"""What a teacher's outputs depend on, and what tells data from other data.

Owns digests of variables and examples. Who compares them and what is said then
is up to `teacher_cache` and to a run's `origin`.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from kd_jax import rules
from kd_jax.data.examples import ImageData, Split
from kd_jax.data.streamed import StreamedImages
from kd_jax.storage import files, workdir
from kd_jax.types import Variables

# Encoded images of a streamed set that its digest looks at.
_SAMPLED = 256


def make_fingerprint(
  variables: Variables,
  examples: Split,
  *,
  network: Mapping[str, Any],
  augmentation: Mapping[str, Any],
  order: Any = None,
) -> dict[str, Any]:
  """What a teacher's outputs depend on, as JSON values.

  Args:
    variables: of the teacher; their names, shapes, dtypes and values count.
    examples: their ids and values count, of streamed images the bytes
      of some that are spread evenly.
    network: what else the teacher's function is made from, such as the words
      of its model and its precision.
    augmentation: all that changes what the teacher sees of an image, with the
      seed.
    order: where an example's partners in a batch matter, what decides them,
      such as the seed of the order; None where they do not.

  Returns:
    A nested dict; `differences` names the entries in which two differ.

  Raises:
    ValueError: for values that are not JSON.

  Example:
    >>> from kd_jax.data import ArrayData
    >>> data = ArrayData(
    ...   {'x': np.array([0, 10, 20], 'f')}, id=np.arange(3, dtype=np.int32),
    ...   reads='x', num_classes=1)
    >>> def made(weight, seed):
    ...   return make_fingerprint(
    ...     {'w': np.full(2, weight)}, data, network={'model': 'mlp'},
    ...     augmentation={'seed': seed})
    >>> differences(made(0.5, 0), made(0.5, 1))
    ['augmentation.seed is 0 there and 1 here']
    >>> made(0.5, 0)['teacher'] == made(0.6, 0)['teacher']
    False
  """
  made = {
    'teacher': {
      'weights': _variables_digest(variables),
      'network': dict(network),
      'matmul_precision': jax.config.values['jax_default_matmul_precision'],
    },
    'data': {
      'examples': len(examples),
      'ids': _digest([examples.id]),
      'images': digest(examples),
    },
    'augmentation': dict(augmentation),
    'order': order,
  }
  return files.as_json(made, 'The fingerprint')


def _variables_digest(variables: Variables) -> str:
  parts: list[Any] = []
  leaves = jax.device_get(jax.tree.leaves(variables))
  for name, leaf in zip(rules.leaf_names(variables), leaves, strict=True):
    about = f'{name} {leaf.dtype} {leaf.shape}'
    parts += [about.encode(), leaf]
  return _digest(parts)


def digest(examples: Split) -> str:
  """The SHA-256 of the values of examples, without the labels of images.

  Of streamed images the bytes of some count, which are spread evenly.

  Args:
    examples: of a split.

  Returns:
    64 hexadecimal digits.

  Example:
    >>> from kd_jax.data import ArrayData
    >>> data = ArrayData(
    ...   {'x': np.array([0, 10, 20], 'f')}, id=np.arange(3, dtype=np.int32),
    ...   reads='x', num_classes=1)
    >>> digest(data)[:12]
    'ebe3bd261b19'
  """
  return _digest(_values(examples))


def _values(examples: Split) -> Iterable[Any]:
  if isinstance(examples, ImageData):
    return [str(examples.image.shape).encode(), examples.image]
  if isinstance(examples, StreamedImages):
    count = min(_SAMPLED, len(examples))
    chosen = np.linspace(0, len(examples) - 1, count).astype(int)
    ids = examples.id[chosen].tolist()
    return (examples.records[i]['image'] for i in ids)
  return (
    part
    for name, array in sorted(examples.read(np.arange(len(examples))).items())
    for part in (f'{name} {array.dtype} {array.shape}'.encode(), array)
  )


def _digest(parts: Iterable[Any]) -> str:
  digest = hashlib.sha256()
  for part in parts:
    if isinstance(part, bytes):
      digest.update(part)
    else:
      digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def differences(there: Any, here: Any) -> list[str]:
  """Phrases that name the entries in which two fingerprints differ."""
  return files.differences(
    *(
      {k: json.dumps(v) for k, v in workdir.flatten(values).items()}
      for values in (there, here)
    )
  )
