"""Digits: a residual teacher, a small student, pruned to 20 % and int8.

  kd-jax run --config configs/digits.py --workdir runs/digits

Data: scikit-learn's 1797 8x8 images, no download; the test split is a
held-out fifth. Cost: see the README's table, which gives wall time and
results over 5 seeds. `configs/digits.py:tiny` runs every stage in seconds and
learns next to nothing. All fields: `kd_jax/defaults.py`.
"""

import ml_collections

from kd_jax import defaults


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The recipe; `variant` is '' or 'tiny'."""
  tiny = defaults.is_tiny(variant)
  config = defaults.get_config(tiny=tiny)
  config.data.name = 'digits'
  width = 8 if tiny else 48
  config.teacher.model = {'name': 'resnet', 'depth': 8, 'width': width}
  widths = (8,) if tiny else (16, 32, 64)
  config.student.model = {'name': 'cnn', 'widths': widths}
  return config
