"""What accelerators can do, and TPU slices that need not be there.

Owns the published figures of chips and the descriptions of topologies that the
TPU compiler, libtpu, compiles for on any x86 Linux machine. Compiles nothing.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from kd_jax import rules

_GIB = 2**30


class Chip(NamedTuple):
  """Published figures of one chip; vendors' peaks, which programs stay below.

  Attributes:
    name: as in a topology, such as 'v5e'.
    hbm_bytes: of its own memory.
    hbm_bandwidth: bytes per second between it and that memory.
    bfloat16: floating-point operations per second on bfloat16.
    float32: the same on float32 at the precision that JAX uses by default:
      one bfloat16 pass on TPUs, TF32 on GPUs.
    int8: operations per second on int8; None where nothing is published.
    link_bandwidth: bytes per second of one link to a neighbour, in one
      direction.
    links: of one chip.
    source: where these figures are published.
  """

  name: str
  hbm_bytes: int
  hbm_bandwidth: float
  bfloat16: float
  float32: float
  int8: float | None
  link_bandwidth: float
  links: int
  source: str


def _tpu(
  name: str,
  gib: int,
  gigabytes: float,
  tera: float,
  int8: float | None,
  link: float,
  links: int,
) -> Chip:
  source = f'https://docs.cloud.google.com/tpu/docs/{name}'
  flops = tera * 1e12
  return Chip(
    name,
    gib * _GIB,
    gigabytes * 1e9,
    flops,
    flops,
    None if int8 is None else int8 * 1e12,
    link * 1e9,
    links,
    source,
  )


def _gpu(
  name: str,
  gigabytes: float,
  bandwidth: float,
  bf16: float,
  tf32: float,
  int8: float,
  nvlink: float,
  source: str,
) -> Chip:
  return Chip(
    name,
    int(gigabytes * 1e9),
    bandwidth * 1e9,
    bf16 * 1e12,
    tf32 * 1e12,
    int8 * 1e12,
    nvlink * 1e9,
    1,
    f'https://www.nvidia.com/en-us/data-center/{source}/',
  )


# Google publishes the bandwidth of all links of a chip in both directions: a
# link has that over twice their number. v5p's 95 are GiB; v4's 2400 Gbps of
# links are those of the older pages.
_TPUS = (
  _tpu('v4', 32, 1200, 275, 275, 50, 6),
  _tpu('v5e', 16, 819, 197, 393, 50, 4),
  _tpu('v5p', 95, 2765, 459, 918, 100, 6),
  _tpu('v6e', 32, 1638, 918, 1836, 100, 4),
  _tpu('tpu7x', 192, 7380, 2307, None, 100, 6),
)
_GPUS = (
  _gpu('A100-80GB', 80, 2039, 312, 156, 624, 300, 'a100'),
  _gpu('H100', 80, 3350, 989, 494, 1979, 450, 'h100'),
  _gpu('H200', 141, 4800, 989, 494, 1979, 450, 'h200'),
)
CHIPS = {chip.name: chip for chip in (*_TPUS, *_GPUS)}
# Part of `jax.Device.device_kind` -> chip; the first that is found.
_KINDS = (
  ('TPU v5 lite', 'v5e'),
  ('TPU v5e', 'v5e'),
  ('TPU v5', 'v5p'),
  ('TPU v6', 'v6e'),
  ('TPU v4 lite', None),
  ('TPU v4', 'v4'),
  ('TPU7x', 'tpu7x'),
  ('A100-SXM4-80GB', 'A100-80GB'),
  ('H100', 'H100'),
  ('H200', 'H200'),
)
_FORM = re.compile(r'(\w+):(\d+(?:x\d+){1,2})')
_FLAT = ('v5e', 'v6e')
# What libtpu would otherwise ask Google's metadata server, and print.
_ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  # Its lock is for the chips, which compiling does not touch.
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


class Topology(NamedTuple):
  """Devices to compile for.

  Attributes:
    name: as it was asked for; the kind of device for those that are there.
    devices: as many as JAX sees; two for a chip of some kinds.
    chip: the figures of one chip; None if none are known.
    shape: chips along the axes of the network between them; () if unknown.
  """

  name: str
  devices: Sequence[Any]
  chip: Chip | None
  shape: tuple[int, ...]

  @property
  def devices_per_chip(self) -> int:
    """JAX's devices on one chip."""
    # TPUs that are there say where their chip is; GPUs are a chip each.
    places = {tuple(getattr(d, 'coords', None) or ()) for d in self.devices}
    known = () not in places
    chips = math.prod(self.shape) if self.shape else len(places) * known
    return max(1, len(self.devices) // (chips or len(self.devices)))

  @property
  def links(self) -> int:
    """Links of a chip that lead somewhere in this topology."""
    if not self.shape:
      return self.chip.links if self.chip and len(self.devices) > 1 else 0
    return sum(2 if n > 2 else n - 1 for n in self.shape)


def chip_of(device_kind: str) -> Chip | None:
  """The figures of a kind of device, or None.

  Args:
    device_kind: of a `jax.Device`.

  Example:
    >>> chip_of('TPU v5 lite').name, chip_of('cpu')
    ('v5e', None)
  """
  for part, name in _KINDS:
    if part in device_kind:
      return None if name is None else CHIPS[name]
  return None


def present() -> Topology:
  """The devices of this process."""
  devices = jax.devices()
  kind = devices[0].device_kind
  return Topology(kind, devices, chip_of(kind), ())


def topology(name: str) -> Topology:
  """A TPU slice by name; there need not be any TPU.

  Args:
    name: chip and chips along each axis, such as 'v5e:16x16' or 'v5p:4x4x8'.

  Raises:
    ImportError: without libtpu.
    ValueError: for another form, another chip, or a shape that libtpu does not
      know.
  """
  match = _FORM.fullmatch(name)
  tpus = {chip.name: chip for chip in _TPUS}
  if not match:
    raise ValueError(
      f'There is no topology {name!r}: give a chip and a shape, such as '
      f"'v5e:16x16' or 'v5p:4x4x8'; the chips are {', '.join(tpus)}."
    )
  chip = rules.choose('chip of the topology', match[1], tpus)
  shape = tuple(map(int, match[2].split('x')))
  axes = 2 if chip.name in _FLAT else 3
  if len(shape) != axes:
    example = '16x16' if axes == 2 else '4x4x8'
    raise ValueError(
      f'Topology {name!r} has {len(shape)} axes, but {chip.name} is connected '
      f'along {axes}, such as {chip.name}:{example}.'
    )
  if importlib.util.find_spec('libtpu') is None:
    raise ImportError(
      f'Compiling for {name} needs libtpu: pip install "kd_jax[tpu]".'
    )
  return Topology(name, _devices(name, chip.name, shape), chip, shape)


def _devices(name: str, chip: str, shape: Sequence[int]) -> Sequence[Any]:
  for key, value in _ENVIRONMENT.items():
    os.environ.setdefault(key, value)
  host = (*(min(2, n) for n in shape[:2]), 1)
  options: dict[str, Any] = {'chips_per_host_bounds': host}
  if chip == 'v4':
    # Else its two cores are devices of their own, which they are to no one.
    options['chip_config_name'] = 'megacore'
  try:
    return topologies.get_topology_desc(name, platform='tpu', **options).devices
  except jax.errors.JaxRuntimeError as e:
    raise ValueError(
      f'libtpu has no topology {name!r}: '
      f'{str(e).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")}.'
    ) from e
