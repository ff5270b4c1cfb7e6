"""Runs on Cloud TPU: a TPU VM, a queued resource, or a JobSet on GKE.

`places` reads the flags of the command. `plans` puts the commands for a TPU VM
in order, and `launches` gives them until a run has ended; `gcloud` has their
words, `jobset` the workload files, and `accelerators` what a slice is called.
Owns no way to a cloud but those commands, and nothing that runs there.
"""

from kd_jax.launch.launches import Launch as Launch
from kd_jax.launch.launches import LaunchError as LaunchError
from kd_jax.launch.places import PLACES as PLACES
from kd_jax.launch.places import launch as launch
from kd_jax.launch.plans import File as File
from kd_jax.launch.plans import Plan as Plan
from kd_jax.launch.plans import plan as plan
