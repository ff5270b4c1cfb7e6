"""Accelerator types of Cloud TPU, such as 'v5litepod-16', taken apart.

Owns what Google Cloud and Kubernetes call the same slice, and the software that
runs on it. Figures of chips are in `kd_jax.plan.chips`.
"""

import re
from typing import NamedTuple

from kd_jax import rules

# https://cloud.google.com/tpu/docs/runtimes
_RUNTIMES = {
  'v6e': 'v2-alpha-tpuv6e',
  'v5p': 'v2-alpha-tpuv5',
  'v5litepod': 'v2-alpha-tpuv5-lite',
  'v4': 'tpu-ubuntu2204-base',
  'v3': 'tpu-ubuntu2204-base',
  'v2': 'tpu-ubuntu2204-base',
}
# Chips of a slice -> topology. v5p and v4 count two cores a chip.
_FLAT = {
  1: '1x1',
  4: '2x2',
  8: '2x4',
  16: '4x4',
  32: '4x8',
  64: '8x8',
  128: '8x16',
  256: '16x16',
}
_CUBE = {
  4: '2x2x1',
  8: '2x2x2',
  16: '2x2x4',
  32: '2x4x4',
  64: '4x4x4',
  128: '4x4x8',
  256: '4x8x8',
  512: '8x8x8',
}


class _Kind(NamedTuple):
  label: str
  topologies: dict[int, str]
  cores: int
  # Chips of the largest slice that is one machine.
  alone: int


_KINDS = {
  'v6e': _Kind('tpu-v6e-slice', _FLAT, 1, 8),
  'v5litepod': _Kind('tpu-v5-lite-podslice', _FLAT, 1, 8),
  'v5p': _Kind('tpu-v5p-slice', _CUBE, 2, 4),
  'v4': _Kind('tpu-v4-podslice', _CUBE, 2, 4),
}


def runtime_version(accelerator: str) -> str:
  """The TPU software for JAX on a kind of accelerator.

  Raises:
    ValueError: for a text that is no accelerator, such as 'v5e'.

  Example:
    >>> runtime_version('v5litepod-16')
    'v2-alpha-tpuv5-lite'
  """
  kind, _ = _kind_and_size(accelerator)
  return rules.choose('type of --accelerator', kind, _RUNTIMES)


class Slice(NamedTuple):
  """A TPU slice as Kubernetes names it.

  Attributes:
    label: value of the node label `cloud.google.com/gke-tpu-accelerator`.
    topology: such as '4x4'.
    hosts: number of machines.
    chips: of each machine.
  """

  label: str
  topology: str
  hosts: int
  chips: int


def slice_of(accelerator: str) -> Slice:
  """The slice of an accelerator type.

  Raises:
    ValueError: for an unknown type or size.

  Example:
    >>> slice_of('v5litepod-16')
    Slice(label='tpu-v5-lite-podslice', topology='4x4', hosts=4, chips=4)
    >>> slice_of('v5p-8').topology
    '2x2x1'
  """
  name, size = _kind_and_size(accelerator)
  kind = rules.choose('type of --accelerator', name, _KINDS)
  sizes = {str(n * kind.cores): n for n in kind.topologies}
  chips = rules.choose(f'size of {name}', size, sizes)
  hosts = 1 if chips <= kind.alone else chips // 4
  return Slice(kind.label, kind.topologies[chips], hosts, chips // hosts)


def _kind_and_size(accelerator: str) -> tuple[str, str]:
  match = re.fullmatch(r'([a-z0-9]+)-(\d+)', accelerator)
  if match is None:
    raise ValueError(
      f'{accelerator!r} is no accelerator: use a type and a size such as '
      "'v5litepod-16' or 'v6e-8'."
    )
  return match[1], match[2]
