"""`python -m kd_jax` is `kd-jax`."""

import sys

from kd_jax.cli import main

sys.exit(main())
