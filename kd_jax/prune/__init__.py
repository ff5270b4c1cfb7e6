"""Pruning: schedules, masks, and the optax wrapper that keeps zeros zero."""

from kd_jax.prune.groups import check_shrunk as check_shrunk
from kd_jax.prune.groups import find_groups as find_groups
from kd_jax.prune.masks import apply_masks as apply_masks
from kd_jax.prune.masks import kept_count as kept_count
from kd_jax.prune.masks import largest as largest
from kd_jax.prune.masks import magnitude_masks as magnitude_masks
from kd_jax.prune.plan import Attribute as Attribute
from kd_jax.prune.plan import Group as Group
from kd_jax.prune.plan import Member as Member
from kd_jax.prune.plan import Plan as Plan
from kd_jax.prune.report import LayerSparsity as LayerSparsity
from kd_jax.prune.report import sparsity_report as sparsity_report
from kd_jax.prune.resize import resized as resized
from kd_jax.prune.schedules import constant as constant
from kd_jax.prune.schedules import cubic as cubic
from kd_jax.prune.shrink import shrink as shrink
from kd_jax.prune.shrink import shrunk_forward as shrunk_forward
from kd_jax.prune.shrink import unit_masks as unit_masks
from kd_jax.prune.transform import PruneState as PruneState
from kd_jax.prune.transform import find_state as find_state
from kd_jax.prune.transform import masks_of as masks_of
from kd_jax.prune.transform import prune as prune
