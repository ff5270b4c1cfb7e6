"""kd_jax: distil, prune and quantize JAX models in one compiled train step."""

__version__ = '0.1.0'
