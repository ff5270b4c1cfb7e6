"""A run's networks on its data: as functions of raw inputs, and measured.

Owns how outputs are computed and counted for the report and for validation;
what is measured where, and under which name, is `assess`.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from kd_jax import data, deploy, metrics, rules, sharding, tasks
from kd_jax.recipe.network import Network
from kd_jax.recipe.run import Run
from kd_jax.report import measure
from kd_jax.sharding import layout
from kd_jax.step import make_eval_step
from kd_jax.types import Batch, Forward

# raw input `[B, ...]` -> output `[B, ..., C]`
Apply = Callable[[Any], Any]


def apply(run: Run, network: Network) -> Apply:
  """A network, compiled.

  It runs where its input lies: on the first device, or on all of those that
  `batches` splits it over.
  """
  fn = jax.jit(from_raw(run, network))
  everywhere = functools.cache(
    lambda: sharding.replicate(network.variables, run.own_mesh)
  )

  def apply(raw):
    split = isinstance(raw, jax.Array) and len(raw.devices()) > 1
    return fn(everywhere() if split else network.variables, raw)

  return apply


def from_raw(run: Run, network: Network) -> Callable[..., jax.Array]:
  """`(variables, raw input) -> output` of a network, not compiled."""
  return deploy.from_raw(network.forward, run.preprocess, reads=run.task.reads)


def raw(run: Run, split: str, count: int) -> np.ndarray:
  """The first raw inputs of a split, repeated where it has not as many."""
  found = run.splits[split]
  first = found.read(np.arange(min(count, len(found))))[run.task.reads]
  return np.resize(first, (count, *first.shape[1:]))


def multiply_accumulates(run: Run, network: Network) -> int:
  """Of one example, from its raw input on."""
  spec = run.splits['train'].input
  return measure.multiply_accumulates(
    from_raw(run, network),
    network.variables,
    np.zeros((1, *spec.shape), spec.dtype),
  )


def batches(
  run: Run, split: str, mesh: jax.sharding.Mesh | None = None
) -> Iterator[Batch]:
  """The raw batches of a split, in order, the last one padded.

  Args:
    split: 'train', 'validation' or 'test'.
    mesh: over whose devices each batch is split, all processes of which read
      it; `own_mesh` when None. With one device they stay host arrays.
  """
  examples = rules.choose('split of this run', split, run.splits)
  mesh = run.own_mesh if mesh is None else mesh
  devices = layout.batch_parts(mesh)
  part, parts = sharding.readers(mesh)
  batches = data.eval_batches(
    examples,
    batch_size=-(-run.config.eval_batch_size // devices) * devices,
    part=part,
    parts=parts,
  )
  if mesh.devices.size == 1:
    return batches
  return (sharding.shard_batch(batch, mesh) for batch in batches)


def evaluate(
  run: Run,
  apply: Apply,
  split: str,
  *,
  teacher: Apply | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> dict[str, float]:
  """The metrics of anything that maps raw inputs to outputs.

  Args:
    apply: `apply(run, network)`, or a runtime outside of JAX.
    split: 'train', 'validation' or 'test'.
    teacher: the same for the teacher; adds what compares with it.
    mesh: as for `batches`.
  """
  mesh = run.own_mesh if mesh is None else mesh
  measured, eval_step = _measurement(
    mesh, run.config.data.task, with_teacher=teacher is not None
  )

  def measure_batch(batch):
    raw = batch[run.task.reads]
    outputs = {'output': apply(raw)}
    if teacher is not None:
      outputs['teacher'] = teacher(raw)
    return eval_step({'params': {}}, None, run.known(batch) | outputs)

  return metrics.evaluate(measure_batch, batches(run, split, mesh), measured)


def quality(run: Run, network: Network, split: str) -> float:
  """How good a network is, by the metric that decides."""
  return evaluate(run, apply(run, network), split)[run.task.quality]


@functools.cache
def _measurement(
  mesh: jax.sharding.Mesh, task: str, *, with_teacher: bool
) -> tuple[dict[str, metrics.Metric], Callable[..., Any]]:
  """The metrics, and the compiled step that takes outputs as its batch."""
  measured = tasks.TASKS[task].measured(with_teacher=with_teacher)

  def teacher_fn(variables, batch):
    return Forward(batch['teacher'])

  eval_step = make_eval_step(
    lambda variables, batch, rng, *, train: Forward(batch['output']),
    measured,
    teacher_fn=teacher_fn if with_teacher else None,
  )
  everywhere = (
    jax.NamedSharding(mesh, jax.P()) if mesh.devices.size > 1 else None
  )
  return measured, jax.jit(eval_step, out_shardings=everywhere)
