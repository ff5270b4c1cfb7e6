"""Pure losses, each usable alone; `objectives` wraps them for training.

Owns formulas: one formula, one paper, one function. Weights, schedules and
whatever trains or is remembered beside a student are not here.
"""

from kd_jax.losses.contrastive import contrastive_nce as contrastive_nce
from kd_jax.losses.correlations import batch_relation as batch_relation
from kd_jax.losses.correlations import class_relation as class_relation
from kd_jax.losses.correlations import dist as dist
from kd_jax.losses.correlations import (
  inter_class_relation as inter_class_relation,
)
from kd_jax.losses.correlations import (
  intra_class_relation as intra_class_relation,
)
from kd_jax.losses.correlations import multi_level as multi_level
from kd_jax.losses.features import activation_boundary as activation_boundary
from kd_jax.losses.features import batch_norm_margin as batch_norm_margin
from kd_jax.losses.features import hierarchical_context as hierarchical_context
from kd_jax.losses.features import hint as hint
from kd_jax.losses.features import masked_generation as masked_generation
from kd_jax.losses.features import norm_direction as norm_direction
from kd_jax.losses.features import overhaul as overhaul
from kd_jax.losses.features import (
  variational_information as variational_information,
)
from kd_jax.losses.gradients import gradient_matching as gradient_matching
from kd_jax.losses.gradients import input_gradient as input_gradient
from kd_jax.losses.gradients import jacobian_matching as jacobian_matching
from kd_jax.losses.gradients import projected_jacobian as projected_jacobian
from kd_jax.losses.labels import cross_entropy as cross_entropy
from kd_jax.losses.labels import hard_distillation as hard_distillation
from kd_jax.losses.logits import jensen_shannon as jensen_shannon
from kd_jax.losses.logits import kl_divergence as kl_divergence
from kd_jax.losses.logits import reverse_kl_divergence as reverse_kl_divergence
from kd_jax.losses.logits import skew_kl_divergence as skew_kl_divergence
from kd_jax.losses.logits import standardize_logits as standardize_logits
from kd_jax.losses.logits import (
  standardized_kl_divergence as standardized_kl_divergence,
)
from kd_jax.losses.maps import attention_transfer as attention_transfer
from kd_jax.losses.maps import class_attention as class_attention
from kd_jax.losses.maps import factor_transfer as factor_transfer
from kd_jax.losses.maps import flow_of_solution as flow_of_solution
from kd_jax.losses.maps import neuron_selectivity as neuron_selectivity
from kd_jax.losses.relations import (
  correlation_congruence as correlation_congruence,
)
from kd_jax.losses.relations import (
  probabilistic_transfer as probabilistic_transfer,
)
from kd_jax.losses.relations import relational_angle as relational_angle
from kd_jax.losses.relations import relational_distance as relational_distance
from kd_jax.losses.relations import (
  similarity_preserving as similarity_preserving,
)
from kd_jax.losses.targets import decoupled_kd as decoupled_kd
from kd_jax.losses.targets import normalized_kd as normalized_kd
from kd_jax.losses.targets import teacher_free_kd as teacher_free_kd
from kd_jax.losses.targets import top_k_kl_divergence as top_k_kl_divergence
from kd_jax.losses.tokens import (
  attention_cross_entropy as attention_cross_entropy,
)
from kd_jax.losses.tokens import (
  attention_squared_error as attention_squared_error,
)
from kd_jax.losses.tokens import hidden_cosine as hidden_cosine
from kd_jax.losses.tokens import hidden_squared_error as hidden_squared_error
from kd_jax.losses.tokens import minilm_relation as minilm_relation
from kd_jax.losses.tokens import patient_kd as patient_kd
from kd_jax.losses.values import huber as huber
from kd_jax.losses.values import squared_error as squared_error
