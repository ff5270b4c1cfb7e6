"""Runs on Cloud TPU: a TPU VM, a queued resource, or a JobSet on GKE.

`launches` is the way from a plan of commands to a run that is followed,
`gcloud` writes the commands and `jobset` the workload files.
"""

from kd_jax.launch.launches import PLACES as PLACES
from kd_jax.launch.launches import File as File
from kd_jax.launch.launches import Launch as Launch
from kd_jax.launch.launches import LaunchError as LaunchError
from kd_jax.launch.launches import Plan as Plan
from kd_jax.launch.launches import launch as launch
from kd_jax.launch.launches import plan as plan
