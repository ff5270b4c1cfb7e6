"""Every method of distillation on the digits, over five seeds.

  kd-jax compare --config configs/compare_digits.py --workdir runs/compare

Data: scikit-learn's digits as in `digits.py`, but teacher and students see 256
of the training images: with all of them every student is as good as its
teacher, and there is nothing to compare. Weights are those of the papers, of
their authors' code for CIFAR-100, or ours, times 1, 0.1 or 0.01 as the
validation split of the first seed prefers. Cost and result:
`benchmarks/results/compare_digits.md`.
FSP is missing, which needs equal widths of teacher and student.
`configs/compare_digits.py:tiny` takes seconds and three methods.
"""

import ml_collections

from kd_jax import defaults


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The comparison; `variant` is '' or 'tiny'."""
  tiny = defaults.is_tiny(variant)
  config = defaults.comparison(tiny=tiny)
  config.teacher.model = ml_collections.ConfigDict(
    {'name': 'cnn', 'widths': (8, 8) if tiny else (32, 64, 128)}
  )
  config.student.model = ml_collections.ConfigDict(
    {'name': 'cnn', 'widths': (2, 4) if tiny else (8, 16, 32)}
  )
  # With all 1294 images every student is as good as its teacher.
  config.data.train_examples = 64 if tiny else 256
  for part in (config.teacher, config.distill):
    part.train.epochs = 1 if tiny else 100
    part.train.evaluate_every_epochs = 100
  config.distill.train.batch_size = 32
  config.teacher.train.batch_size = 32
  config.method_options = ml_collections.ConfigDict(
    {
      # 16384 negatives are for 50000 images.
      'crd': {'contrastive': {'negatives': 256}},
      'crd_kd': {'contrastive': {'negatives': 256}},
    }
  )
  return config
