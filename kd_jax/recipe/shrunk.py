"""A trained student made smaller, in `shrink/` of its work directory.

Owns what leaves a run's student and what that saves. What can leave and how is
in `prune`, the files that it becomes are `artefact`'s.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kd_jax import adapters, prune, rules
from kd_jax.recipe import artefact
from kd_jax.recipe.run import Run
from kd_jax.storage import lock
from kd_jax.types import Batch, StudentFn

DIRECTORY = 'shrink'


class Cost(NamedTuple):
  """The cost of a network.

  Attributes:
    flops: of one example, 2 x its multiply-accumulates.
    parameters: entries.
    bytes: of the parameters.
  """

  flops: int
  parameters: int
  bytes: int


class Shrunk(NamedTuple):
  """What `shrink_student` made.

  Attributes:
    plan: what could leave: units, or residual blocks.
    before: cost of the whole student.
    after: cost of the smaller one.
    kept: group -> how many units stay, and how many there were.
    directory: where its files are.
  """

  plan: prune.Plan | prune.ResidualBlocks
  before: Cost
  after: Cost
  kept: dict[str, list[int]]
  directory: Path


def shrink_student(
  run: Run,
  stage: str = 'distill',
  *,
  sparsity: float = 0.5,
  structure: str = 'neurons',
  scope: str = 'global',
  keep: Sequence[str] = (),
  multiple_of: int = 1,
  overwrite: bool = False,
) -> Shrunk:
  """Removes what has the least magnitude from a trained student.

  Args:
    run: a run whose stage is finished.
    stage: 'distill' or 'alone'.
    sparsity: share of the units or blocks that leave, in [0, 1).
    structure: 'neurons' for channels and heads, 'residual_blocks' for whole
      blocks; of these one always stays.
    scope: of neurons, see `prune.choose_units`, and so is `multiple_of`.
    keep: see `prune.find_groups` and `prune.find_residual_blocks`.
    multiple_of: of the channels that a group keeps.
    overwrite: replaces a smaller student that was made before.

  Returns:
    What could leave, the costs, and the directory with the smaller student.

  Raises:
    ValueError: if the stage is not finished or unknown, nothing can leave, the
      smaller student does not run, there is one, another run uses the
      directory, or for a sparsity outside of [0, 1).
  """
  if not 0 <= sparsity < 1:
    raise ValueError(f'A sparsity is a share in [0, 1), not {sparsity}.')
  parts = {'distill': 'student', 'alone': 'alone'}
  part = rules.choose('stage', stage, parts)
  ways = {'neurons': _without_units, 'residual_blocks': _without_blocks}
  remove = rules.choose('structure', structure, ways)
  variables = run.student(stage).variables
  forward = adapters.from_linen(run.model(part))
  plan, small, overrides, kept = remove(
    forward,
    variables,
    run.example,
    sparsity,
    keep,
    scope=scope,
    multiple_of=multiple_of,
  )
  about = {
    'stage': stage,
    'structure': structure,
    'sparsity': sparsity,
    'scope': scope,
    'kept': kept,
    'overrides': overrides,
  }
  with lock.exclusive(run.workdir.place):
    if artefact.exists(run.workdir.place / DIRECTORY) and not overwrite:
      raise ValueError(
        f'{run.workdir.place / DIRECTORY} has a smaller student: give '
        '--overwrite to replace it.'
      )
    directory = run.workdir.stage(DIRECTORY)
    artefact.save(directory, small, about, artefact.SHRUNK)
    run.workdir.send(DIRECTORY)
  smaller = forward.intercepted(prune.resized(overrides))
  return Shrunk(
    plan,
    _cost(forward, variables, run.example),
    _cost(smaller, small, run.example),
    kept,
    run.workdir.place / DIRECTORY,
  )


# What could leave, the smaller variables, what runs them, and the counts.
Removed = tuple[
  prune.Plan | prune.ResidualBlocks,
  dict[str, Any],
  Mapping[str, Mapping[str, int] | None],
  dict[str, list[int]],
]


def _without_units(
  forward: adapters.LinenForward,
  variables: Mapping[str, Any],
  batch: Batch,
  sparsity: float,
  keep: Sequence[str],
  *,
  scope: str,
  multiple_of: int,
) -> Removed:
  plan = prune.find_groups(forward, variables, batch, keep=keep)
  if not plan.groups:
    raise ValueError('Nothing can leave the student.')
  scores = prune.magnitudes(variables['params'])
  kept = prune.choose_units(
    plan, scores, sparsity, scope=scope, multiple_of=multiple_of
  )
  prune.check_shrunk(plan, kept, forward, variables, batch)
  small = prune.shrink(plan, variables, kept)
  counts = {g.name: [len(kept[g.name]), g.size] for g in plan.groups}
  return plan, small, plan.overrides(kept), counts


def _without_blocks(
  forward: adapters.LinenForward,
  variables: Mapping[str, Any],
  batch: Batch,
  sparsity: float,
  keep: Sequence[str],
  *,
  scope: str,
  multiple_of: int,
) -> Removed:
  if scope != 'global' or multiple_of != 1:
    raise ValueError(
      "scope and multiple_of are of structure='neurons'; residual blocks are "
      'ranked together.'
    )
  blocks = prune.find_residual_blocks(forward, variables, batch, keep=keep)
  scores = prune.magnitudes(variables['params'])
  masks = prune.masks_from(
    scores, sparsity, structure=prune.residual_blocks(blocks)
  )
  gone = blocks.gone(masks)
  small = prune.without_blocks(blocks, variables, gone)
  counts = {'blocks': [len(blocks.names) - len(gone), len(blocks.names)]}
  return blocks, small, blocks.overrides(gone), counts


def _cost(
  forward: StudentFn, variables: Mapping[str, Any], batch: Batch
) -> Cost:
  rows = prune.layer_costs(forward, variables, batch)
  return Cost(
    2 * sum(r.macs for r in rows),
    sum(r.parameters for r in rows),
    sum(r.bytes for r in rows),
  )
