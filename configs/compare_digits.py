"""Every method of distillation on the digits, over five seeds.

  kd-jax compare --config configs/compare_digits.py --workdir runs/compare

Data: scikit-learn's digits as in `digits.py`, but the students see a small
part of the training images: with all of them every student is as good as its
teacher, and there is nothing to compare. Weights are those of the papers or of
their authors' code for CIFAR-100, not tuned for this data, except where
`overrides` says so. Cost and result: `benchmarks/results/compare_digits.md`.
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
    {'name': 'resnet', 'depth': 8, 'width': 8 if tiny else 24}
  )
  config.student.model = ml_collections.ConfigDict(
    {'name': 'resnet', 'depth': 8, 'width': 2 if tiny else 4}
  )
  config.distill.train.epochs = 1 if tiny else 30
  config.distill.train.evaluate_every_epochs = 30
  config.teacher.train.evaluate_every_epochs = 20
  config.methods = ('alone', 'kd', 'at') if tiny else METHODS
  config.seeds = 2 if tiny else 5
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
