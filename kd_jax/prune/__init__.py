"""Pruning: scores, structures, schedules, and wrappers that keep zeros zero.

Owns which weights become zero (`scores`, `scopes`, `structures`, `schedules`),
how they stay so in training (`transform`, `sparse_training`, `forward_masks`),
what can leave a model whole, found in its jaxpr (`groups`, `residual`), and
the smaller arrays (`selection`, `shrink`, `resize`). How a run prunes is
`recipe`'s.
"""

from kd_jax.prune.costs import LayerCost as LayerCost
from kd_jax.prune.costs import layer_costs as layer_costs
from kd_jax.prune.forward_masks import (
  straight_through as straight_through,
)
from kd_jax.prune.groups import check_shrunk as check_shrunk
from kd_jax.prune.groups import find_groups as find_groups
from kd_jax.prune.masks import apply_masks as apply_masks
from kd_jax.prune.masks import magnitude_masks as magnitude_masks
from kd_jax.prune.plan import Attribute as Attribute
from kd_jax.prune.plan import Group as Group
from kd_jax.prune.plan import Member as Member
from kd_jax.prune.plan import Plan as Plan
from kd_jax.prune.report import LayerSparsity as LayerSparsity
from kd_jax.prune.report import sparsity_report as sparsity_report
from kd_jax.prune.report import total as total
from kd_jax.prune.residual import ResidualBlocks as ResidualBlocks
from kd_jax.prune.residual import residual_blocks as residual_blocks
from kd_jax.prune.residual import without_blocks as without_blocks
from kd_jax.prune.residual_search import (
  find_residual_blocks as find_residual_blocks,
)
from kd_jax.prune.resize import Overrides as Overrides
from kd_jax.prune.resize import resized as resized
from kd_jax.prune.schedules import constant as constant
from kd_jax.prune.schedules import cubic as cubic
from kd_jax.prune.schedules import linear as linear
from kd_jax.prune.schedules import steps as steps
from kd_jax.prune.scopes import erk as erk
from kd_jax.prune.scopes import erk_densities as erk_densities
from kd_jax.prune.scopes import kept_count as kept_count
from kd_jax.prune.scores import Score as Score
from kd_jax.prune.scores import accumulate as accumulate
from kd_jax.prune.scores import fisher as fisher
from kd_jax.prune.scores import lamp as lamp
from kd_jax.prune.scores import magnitude as magnitude
from kd_jax.prune.scores import magnitudes as magnitudes
from kd_jax.prune.scores import movement as movement
from kd_jax.prune.scores import random as random
from kd_jax.prune.scores import snip as snip
from kd_jax.prune.scores import taylor as taylor
from kd_jax.prune.selection import choose_units as choose_units
from kd_jax.prune.selection import kept_from_masks as kept_from_masks
from kd_jax.prune.selection import neurons as neurons
from kd_jax.prune.selection import unit_scores as unit_scores
from kd_jax.prune.shrink import shrink as shrink
from kd_jax.prune.shrink import shrunk_forward as shrunk_forward
from kd_jax.prune.sparse_training import sparse_train as sparse_train
from kd_jax.prune.state import PruneState as PruneState
from kd_jax.prune.state import find_state as find_state
from kd_jax.prune.state import masks_of as masks_of
from kd_jax.prune.state import rewind as rewind
from kd_jax.prune.structures import Structure as Structure
from kd_jax.prune.structures import block as block
from kd_jax.prune.structures import channels as channels
from kd_jax.prune.structures import heads as heads
from kd_jax.prune.structures import masks_from as masks_from
from kd_jax.prune.structures import n_m as n_m
from kd_jax.prune.structures import units as units
from kd_jax.prune.structures import unstructured as unstructured
from kd_jax.prune.thresholds import largest as largest
from kd_jax.prune.transform import preserve as preserve
from kd_jax.prune.transform import prune as prune
