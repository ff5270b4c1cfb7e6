"""Every loss in NumPy, one module of cases for each part of `kd_jax.losses`."""
