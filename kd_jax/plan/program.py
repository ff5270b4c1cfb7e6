"""A compiled train step as numbers: memory by owner, work, collectives, bounds.

Owns what the compiler of XLA says of one program and what a chip's published
figures make of it. Which programs are compiled is `estimate`'s.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from kd_jax import sharding
from kd_jax.plan import chips, hlo
from kd_jax.plan.memory import memory_of, placed
from kd_jax.plan.steps import Step
from kd_jax.sharding import layout

_USED = re.compile(r'(?:Used |\()([\d.]+)([KMGT]?)\)? (?:of|exceeds)')
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Program:
  """One train step on one device of a mesh.

  Attributes:
    how: 'compiled', 'estimated', or 'impossible'.
    why: what an estimate assumes, or what is in the way; '' if compiled.
    memory: owner, in the order of the page, -> bytes; empty if it does not
      fit.
    bytes: their sum, or what the compiler asked for.
    fits: whether that is what a device has; None if that is not known.
    flops: floating-point operations of a step, as the compiler counts.
    hbm_bytes: read and written by all operations of a step, likewise; what
      stays in the chip's fast memory counts too.
    collectives: rows of `kind`, `owner`, `count`, `bytes`.
    ici_bytes: that a device sends to others in a step.
    bounds: 'compute', 'memory', 'network' -> seconds of a step that none can
      be faster than at published peaks; empty without such figures.
    batch_size: examples of a step, over all devices.
    total_steps: of the stage.
  """

  how: str
  why: str = ''
  memory: Mapping[str, int] = dataclasses.field(default_factory=dict)
  bytes: int | None = None
  fits: bool | None = None
  flops: float | None = None
  hbm_bytes: float | None = None
  collectives: Sequence[Mapping[str, Any]] = ()
  ici_bytes: float | None = None
  bounds: Mapping[str, float] = dataclasses.field(default_factory=dict)
  batch_size: int = 0
  total_steps: int = 0

  @property
  def bound(self) -> str:
    """The bound that holds, '' without any."""
    return max(self.bounds, key=self.bounds.__getitem__, default='')

  @property
  def seconds(self) -> float | None:
    """The roofline estimate of a step."""
    return max(self.bounds.values()) if self.bounds else None

  @property
  def examples_per_second(self) -> float | None:
    """Of all devices, by the same estimate."""
    return self.batch_size / self.seconds if self.seconds else None

  @property
  def hours(self) -> float | None:
    """Of the whole stage's steps, without evaluation and input."""
    return self.total_steps * self.seconds / 3600 if self.seconds else None

  def as_dict(self) -> dict[str, Any]:
    """All of it, as JSON values."""
    names = ('bound', 'seconds', 'examples_per_second', 'hours')
    derived = {name: getattr(self, name) for name in names}
    return dataclasses.asdict(self) | derived


def bounds(
  topology: chips.Topology,
  *,
  flops: float,
  hbm_bytes: float,
  ici_bytes: float,
  dtype: str = 'float32',
) -> dict[str, float]:
  """Seconds that a device needs at least for each kind of its work.

  The roofline of Williams et al., "Roofline: An Insightful Visual Performance
  Model", 2009, with the network as a third roof.

  Args:
    topology: of which every link of a chip is taken to be busy.
    flops: of a device.
    hbm_bytes: likewise.
    ici_bytes: that a device sends.
    dtype: in which products are computed, 'float32' or 'bfloat16'.

  Returns:
    'compute', 'memory', and 'network' where there is one; nothing if the chip
    is not known.
  """
  chip, parts = topology.chip, topology.devices_per_chip
  if chip is None:
    return {}
  peak = chip.bfloat16 if dtype == 'bfloat16' else chip.float32
  found = {
    'compute': flops * parts / peak,
    'memory': hbm_bytes * parts / chip.hbm_bandwidth,
  }
  if topology.links:
    rate = chip.link_bandwidth * topology.links
    found['network'] = ici_bytes * parts / rate
  return found


def compile_program(
  step: Step,
  topology: chips.Topology,
  *,
  dtype: str = 'float32',
) -> Program:
  """Compiles a train step, and reads the result.

  Args:
    step: from `steps.rehearse`, of a run on the topology's devices.
    topology: what it is compiled for.
    dtype: as for `bounds`.

  Raises:
    ValueError: under a compiler of steps that cannot compile without devices,
      or for a batch that does not divide over the mesh.
  """
  run = step.run
  compiler = run.config.compiler
  if compiler == 'pmap':
    raise ValueError(
      "A step under compiler='pmap' cannot be planned: use 'jit' or "
      "'shard_map'."
    )
  devices, parts = run.mesh.devices.size, layout.batch_parts(run.mesh)
  size = len_of(step.batch)
  if size % parts:
    raise ValueError(
      f'A batch of {size} does not divide over {parts} devices: change '
      'train.batch_size of the stage.'
    )
  call = sharding.compile_step(step.step, run.mesh, compiler, layout=run.layout)
  try:
    lowered = call.lower(step.state, step.batch, step.rng)
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    return _too_large(str(e), size, step.total_steps)

  entries = [
    (math.prod(where.shard_shape(leaf.shape)), math.prod(leaf.shape))
    for leaf, where in placed(step, compiler, 'params')
  ]
  found = hlo.owned(hlo.collectives(_text(compiled)), entries)
  cost = compiled.cost_analysis() or {}
  return in_numbers(
    'compiled',
    step,
    topology,
    dtype,
    memory=memory_of(step, compiler, compiled.memory_analysis()),
    flops=float(cost.get('flops', 0)),
    hbm_bytes=float(cost.get('bytes accessed', 0)),
    ici_bytes=sum(c.sent(devices) for c, _ in found),
    collectives=_rows(found),
  )


def in_numbers(
  how: str,
  step: Step,
  topology: chips.Topology,
  dtype: str,
  *,
  memory: Mapping[str, int],
  flops: float,
  hbm_bytes: float,
  ici_bytes: float,
  collectives: Sequence[Mapping[str, Any]] = (),
  why: str = '',
) -> Program:
  """A step that fits the compiler, with all that follows from its work.

  Args:
    how: 'compiled' or 'estimated'.
    step: from `steps.rehearse`.
    topology: what it runs on.
    dtype: as for `bounds`.
    memory: see `Program`, and so are the others.
  """
  total = sum(memory.values())
  return Program(
    how,
    why,
    memory=memory,
    bytes=total,
    fits=fits(total, topology),
    flops=flops,
    hbm_bytes=hbm_bytes,
    collectives=collectives,
    ici_bytes=ici_bytes,
    bounds=bounds(
      topology,
      flops=flops,
      hbm_bytes=hbm_bytes,
      ici_bytes=ici_bytes,
      dtype=dtype,
    ),
    batch_size=len_of(step.batch),
    total_steps=step.total_steps,
  )


def _text(compiled: jax.stages.Compiled) -> str:
  text = compiled.as_text()
  if text is None:
    raise ValueError(
      f'{jax.default_backend()} gives no text of a compiled program, from '
      'which its collectives are read.'
    )
  return text


def len_of(batch: Mapping[str, Any]) -> int:
  """The examples of a batch, of arrays or shapes."""
  return batch['id'].shape[0]


def fits(total: int, topology: chips.Topology) -> bool | None:
  """Whether a device has so many bytes; None if that is not known."""
  if topology.chip is None:
    return None
  return total <= topology.chip.hbm_bytes // topology.devices_per_chip


def _too_large(message: str, batch_size: int, total_steps: int) -> Program:
  used = _USED.search(message)
  total = int(float(used[1]) * _UNITS[used[2]]) if used else None
  why = 'the compiler found no way to fit it'
  return Program(
    'compiled',
    why,
    bytes=total,
    fits=False,
    batch_size=batch_size,
    total_steps=total_steps,
  )


def _rows(
  found: Iterable[tuple[hlo.Collective, Mapping[str, int]]],
) -> list[dict[str, Any]]:
  """Collectives by kind and owner; a combined one has a row for each."""
  rows: dict[tuple[str, str], dict[str, Any]] = collections.OrderedDict()
  for collective, shares in found:
    for owner, size in shares.items():
      key = (collective.kind, owner)
      row = rows.setdefault(
        key, {'kind': key[0], 'owner': owner, 'count': 0, 'bytes': 0}
      )
      row['count'] += 1
      row['bytes'] += size
  return sorted(rows.values(), key=lambda row: -row['bytes'])


def mesh_of(mesh: Mesh) -> dict[str, int]:
  """The sizes of a mesh's axes."""
  return {str(axis): int(size) for axis, size in mesh.shape.items()}
