"""The loop on the host: batches, steps, evaluation, checkpoints, signals.

`loop` is the loop itself, `feed` brings batches one ahead, `profiling` says
where the time goes and `compile_cache` keeps programs for the next run. Owns
neither the step, which comes compiled, nor what is trained for.
"""

from kd_jax.train.loop import Trained as Trained
from kd_jax.train.loop import train as train
