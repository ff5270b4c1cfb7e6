"""Pure losses, each usable alone; `objectives` wraps them for training."""

from kd_jax.losses.logits import cross_entropy as cross_entropy
from kd_jax.losses.logits import kl_divergence as kl_divergence
from kd_jax.losses.logits import squared_error as squared_error
