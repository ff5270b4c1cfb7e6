"""A network made smaller, on disk: its variables, and what runs them.

Owns the two files that `kd-jax compress` and `kd-jax shrink` write for JAX,
`weights.safetensors` and a JSON file of what the model's code does not say.
What becomes smaller is `search` and `shrunk`; files for servers are `export`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_jax import adapters, deploy, prune, quantize, rules
from kd_jax.quantize.stored import COLLECTION
from kd_jax.recipe.words import SPECS
from kd_jax.storage import mirror
from kd_jax.storage.weights import load_weights, save_weights
from kd_jax.storage.workdir import read_json, write_json
from kd_jax.types import StudentFn, Variables

COMPRESSED, SHRUNK = 'kd_jax.compressed.1', 'kd_jax.shrink.1'
_WEIGHTS = 'weights.safetensors'
_FILES = {COMPRESSED: 'compressed.json', SHRUNK: 'shrink.json'}


def save(
  directory: Path, variables: Variables, about: Mapping[str, Any], format: str
) -> None:
  """Writes a network.

  Args:
    directory: where to; it exists.
    variables: of the network.
    about: JSON values. `overrides` are for `prune.resized`; of a compressed
      network several, one after the other, and `activations` its rules.
    format: `COMPRESSED`, on integers, or `SHRUNK`, in float.
  """
  save_weights(directory / _WEIGHTS, variables)
  write_json(directory / _FILES[format], {'format': format, **about})


def exists(directory: Path) -> bool:
  """Whether a directory holds such a network."""
  return any((directory / name).exists() for name in _FILES.values())


def load_artefact(
  directory: str | os.PathLike[str], model: adapters.LinenModule, **options: Any
) -> tuple[StudentFn, dict[str, Any]]:
  """A smaller network, to run in JAX.

  Args:
    directory: `artefact` of what `kd-jax compress` wrote, or `shrink` of what
      `kd-jax shrink` did; also 'gs://...'.
    model: the module that became smaller, as it is written.
    **options: others of `deploy.integer_forward` for a compressed network, and
      of `adapters.from_linen` for a shrunk one, which may be trained on.

  Returns:
    `(forward, variables)`.

  Raises:
    ValueError: if the files are missing or were not written by kd_jax.

  Example:
    >>> import tempfile
    >>> import numpy as np
    >>> from kd_jax import models
    >>> model = models.MLP(num_classes=1, hidden=(4,), reads='x')
    >>> dense = {'kernel': np.ones((3, 2), 'f'), 'bias': np.zeros(2, 'f')}
    >>> head = {'kernel': np.ones((2, 1), 'f'), 'bias': np.zeros(1, 'f')}
    >>> variables = {'params': {'dense1': dense, 'head': head}}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   save(Path(directory), variables, {'overrides': {}}, SHRUNK)
    ...   forward, variables = load_artefact(directory, model)
    >>> forward(variables, {'x': np.ones((1, 3), 'f')}).output.tolist()
    [[6.0]]
  """
  path = mirror.resolve(directory)
  if not exists(path):
    raise ValueError(
      f'{path} cannot be read: it has neither {" nor ".join(_FILES.values())}, '
      'of kd-jax compress and kd-jax shrink.'
    )
  format = next(f for f, name in _FILES.items() if (path / name).exists())
  about = read_json(path / _FILES[format])
  if about.get('format') != format:
    raise ValueError(
      f'{path / _FILES[format]} holds {about.get("format")!r}, not {format!r}.'
    )
  variables = load_weights(path / _WEIGHTS)
  if format == SHRUNK:
    forward = adapters.from_linen(model, **options)
    return forward.intercepted(prune.resized(about['overrides'])), variables
  dynamic = [
    (p, rules.choose('quantize.activations', name, SPECS['activations']))
    for p, name in about['activations']
  ]
  interceptors = [prune.resized(overrides) for overrides in about['overrides']]
  if COLLECTION not in variables:
    # Its recipe quantized nothing.
    ways = ('simulate', 'convolution')
    forward = adapters.from_linen(
      model,
      interceptors=(*interceptors, quantize.skip_folded_batch_norms),
      **{k: v for k, v in options.items() if k not in ways},
    )
    return forward, variables
  integers = deploy.integer_forward(
    model, interceptors=interceptors, dynamic=dynamic, **options
  )
  return integers, variables
