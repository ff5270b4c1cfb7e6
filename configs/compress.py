"""Compresses a trained network under a budget of bytes, FLOPs or milliseconds.

  kd-jax compress --model runs/digits --recipe configs/compress.py \
      --budget '8 KB' --workdir runs/digits_8kb

`--model` is a work directory of `kd-jax run`, whose data and student are taken,
or a safetensors file of the network that `student.model` names, for the data of
`data`. Candidates have fewer channels and fewer bits; those that fit are
trained with the uncompressed network as their teacher. Cost: `search.finalists`
trainings of `compress.train`. `configs/compress.py:tiny` learns nothing.
"""

import importlib.util
import pathlib

import ml_collections


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The recipe; `variant` is '' or 'tiny'."""
  path = pathlib.Path(__file__).parent / 'digits.py'
  spec = importlib.util.spec_from_file_location('digits', path)
  digits = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(digits)
  config = digits.get_config(variant)
  tiny = variant == 'tiny'
  config.compress.teacher = 'student'
  config.compress.prune.sparsity = 0.0
  config.compress.quantize.freeze = '80%'
  config.search = ml_collections.ConfigDict(
    {
      # Set by --model, --stage and --budget.
      'model': '',
      'stage': 'distill',
      'budget': '',
      # Shares of the units to remove.
      'channels': (0.0, 0.5) if tiny else (0.0, 0.25, 0.5, 0.75),
      # Rounds the channels that a layer keeps up to a multiple.
      'multiple_of': 1,
      # Formats of the weights; mixed gives each kernel 8 or 4 bits.
      'weights': ('int8', 'mixed', 'int4'),
      # How many candidates are trained.
      'finalists': 1 if tiny else 3,
      # Batches to quantize with before training, and to measure with.
      'calibration_batches': 2 if tiny else 8,
      # Images a call, where latency is measured.
      'latency_batch': 1,
    }
  )
  return config
