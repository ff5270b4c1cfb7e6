"""Compresses a trained network under a budget of bytes, FLOPs or milliseconds.

  kd-jax compress --model runs/digits --recipe configs/compress.py \
      --budget '8 KB' --workdir runs/digits_8kb

`--model` is a work directory of `kd-jax run`, whose data and student are taken,
or a safetensors file of the network that `student.model` names, for the data of
`data`. Candidates have fewer channels and fewer bits; those that fit are
trained with the uncompressed network as their teacher. Cost: `search.finalists`
trainings of `compress.train`. `configs/compress.py:tiny` learns nothing.
"""

import ml_collections

from kd_jax import defaults


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The recipe; `variant` is '' or 'tiny'."""
  tiny = defaults.is_tiny(variant)
  config = defaults.search(tiny=tiny)
  # Of a network that is read from a file.
  widths = (8,) if tiny else (16, 32, 64)
  config.student.model = {'name': 'cnn', 'widths': widths}
  return config
