"""Objectives and terms: what a student is trained for.

Owns terms, their sums, and what they train or remember beside the student.
`on_outputs`, `on_features`, `on_batch` and `on_tokens` make a term of any loss
of `losses`; the other terms own parameters or state, or run a network again.
Terms by the words of a configuration are in `kd_jax.terms`.
"""

from kd_jax.objectives.base import Objective as Objective
from kd_jax.objectives.base import TapNames as TapNames
from kd_jax.objectives.base import term as term
from kd_jax.objectives.base import value_at as value_at
from kd_jax.objectives.base import weighted_sum as weighted_sum
from kd_jax.objectives.classifiers import class_attention as class_attention
from kd_jax.objectives.classifiers import norm_direction as norm_direction
from kd_jax.objectives.classifiers import self_distillation as self_distillation
from kd_jax.objectives.classifiers import (
  softmax_regression as softmax_regression,
)
from kd_jax.objectives.contrastive import contrastive as contrastive
from kd_jax.objectives.feature_networks import (
  factor_transfer as factor_transfer,
)
from kd_jax.objectives.feature_networks import (
  masked_generation as masked_generation,
)
from kd_jax.objectives.feature_networks import review as review
from kd_jax.objectives.features import (
  activation_boundary as activation_boundary,
)
from kd_jax.objectives.features import flow as flow
from kd_jax.objectives.features import hints as hints
from kd_jax.objectives.features import on_features as on_features
from kd_jax.objectives.features import overhaul as overhaul
from kd_jax.objectives.features import (
  variational_information as variational_information,
)
from kd_jax.objectives.gradients import input_gradients as input_gradients
from kd_jax.objectives.gradients import jacobians as jacobians
from kd_jax.objectives.gradients import sobolev as sobolev
from kd_jax.objectives.inputs import Inputs as Inputs
from kd_jax.objectives.inputs import mean as mean
from kd_jax.objectives.outputs import distillation_token as distillation_token
from kd_jax.objectives.outputs import hard_labels as hard_labels
from kd_jax.objectives.outputs import on_outputs as on_outputs
from kd_jax.objectives.outputs import regression as regression
from kd_jax.objectives.outputs import schedule as schedule
from kd_jax.objectives.outputs import soft_targets as soft_targets
from kd_jax.objectives.outputs import teacher_free as teacher_free
from kd_jax.objectives.outputs import top_k_targets as top_k_targets
from kd_jax.objectives.relations import (
  correlation_congruence as correlation_congruence,
)
from kd_jax.objectives.relations import on_batch as on_batch
from kd_jax.objectives.relations import relational as relational
from kd_jax.objectives.schemes import each_student as each_student
from kd_jax.objectives.schemes import each_teacher as each_teacher
from kd_jax.objectives.schemes import ema_teacher as ema_teacher
from kd_jax.objectives.schemes import mutual as mutual
from kd_jax.objectives.tokens import on_tokens as on_tokens
from kd_jax.objectives.tokens import patient as patient
