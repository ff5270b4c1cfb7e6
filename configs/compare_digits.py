"""Every method of distillation on the digits, over five seeds.

  kd-jax compare --config configs/compare_digits.py --workdir runs/compare

Data: scikit-learn's digits as in `digits.py`, but teacher and students see 256
of the training images: with all of them every student is as good as its
teacher, and there is nothing to compare. Weights are those of the papers or of
their authors' code for CIFAR-100, times 1, 0.1 or 0.01 as the validation split
of the first seed prefers. Cost and result:
`benchmarks/results/compare_digits.md`.
FSP is missing, which needs equal widths of teacher and student.
`configs/compare_digits.py:tiny` takes seconds and three methods.
"""

import importlib.util
import pathlib

import ml_collections


def _digits():
  # Configurations are files, not modules of a package.
  path = pathlib.Path(__file__).with_name('digits.py')
  spec = importlib.util.spec_from_file_location('digits', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


METHODS = (
  'alone',
  'label_smoothing',
  'teacher_free',
  'kd',
  'logit_mse',
  'logit_huber',
  'reverse_kl',
  'jensen_shannon',
  'skew_kl',
  'hard',
  'top_k',
  'dkd',
  'nkd',
  'dist',
  'logit_standardization',
  'mlkd',
  'fitnet',
  'at',
  'nst',
  'vid',
  'ab',
  'ft',
  'ofd',
  'review',
  'mgd',
  'srrl',
  'cat',
  'kdpp',
  'simkd',
  'rkd',
  'sp',
  'pkt',
  'cc',
  'crd',
  'crd_kd',
  'saliency',
  'sobolev',
  'jacobian',
  'self',
  'mean_teacher',
  'dml',
  'born_again',
  'label_free',
)


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The comparison; `variant` is '' or 'tiny'."""
  config = _digits().get_config(variant)
  tiny = variant == 'tiny'
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
  config.methods = ('alone', 'kd', 'at') if tiny else METHODS
  config.seeds = 2 if tiny else 5
  # Factors of a method's published weights, of which the one with the best
  # accuracy on the validation split of the first seed is used.
  config.scales = (1.0,) if tiny else (1.0, 0.1, 0.01)
  # Options of a method's terms that differ from the published ones:
  # method -> term -> options.
  config.overrides = ml_collections.ConfigDict(
    {
      # 16384 negatives are for 50000 images.
      'crd': {'contrastive': {'negatives': 256}},
      'crd_kd': {'contrastive': {'negatives': 256}},
    }
  )
  # Steps whose time is measured, of every method in turns.
  config.timing = ml_collections.ConfigDict({'runs': 2 if tiny else 30})
  return config
