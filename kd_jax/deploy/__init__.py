"""What a trained student becomes: folded, converted, wrapped with its input.

Owns the path from trained variables to a function of raw inputs; nothing
about files, which is `export`.
"""

from kd_jax.deploy.after_training import ACTIVATION_RULES as ACTIVATION_RULES
from kd_jax.deploy.after_training import WEIGHT_RULES as WEIGHT_RULES
from kd_jax.deploy.after_training import calibrated as calibrated
from kd_jax.deploy.after_training import fold as fold
from kd_jax.deploy.after_training import (
  post_training_quantize as post_training_quantize,
)
from kd_jax.deploy.forwards import Preprocess as Preprocess
from kd_jax.deploy.forwards import evaluation as evaluation
from kd_jax.deploy.forwards import from_raw as from_raw
from kd_jax.deploy.forwards import integer_forward as integer_forward
