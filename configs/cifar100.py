"""CIFAR-100 as published distillation results are obtained; no run by itself.

Shared by `cifar100_<teacher>_<student>.py`, which name two networks of the
benchmark of Tian et al., "Contrastive Representation Distillation", 2020,
arXiv:1910.10699. Teacher, student alone and distilled student follow one
protocol, `crd2020` of `kd_jax.methods`: 240 epochs of SGD in batches of 64, a
rate of 0.05 (0.01 for MobileNet and ShuffleNet students) that falls to a tenth
after 150, 180 and 210, momentum 0.9, L2 5e-4 on every parameter, shifts by up
to 4 pixels and mirroring, the published mean and deviation, last epoch.

Variants, after a colon: none for the protocol's KD with weights 0.1 and 0.9 at
T = 4; a method of `kd_jax.methods.METHODS`, such as `crd`, for its published
terms, with the pair's own weights where its authors chose some; `tiny` for
smaller networks of the same families and one epoch, or `tiny,crd`. Each needs
a work directory of its own, in which it trains its own teacher.

As published, all 50,000 images are for training: nothing is measured before
the test at the end, unless `--config.data.validation=0.1` holds images out.
What differs from the published runs: an epoch is 781 full batches and leaves
16 images out; classifiers' biases start at 0; weights and crops are drawn by
another generator. `ab` trains 30 epochs more, before the labels count, as
published; `fsp` and `ft`, which have such epochs there too, and `mlkd`, which
has 480, follow the protocol. A run is one seed; published numbers are means
of several or single runs.

The tables need `--stages=teacher,alone,distill` and `kd-jax evaluate`. The
other stages, which are ours, prune the distilled student to 20 % and make it
int8 in 60 more epochs.

Data: TFDS `cifar100`; `--config.data.data_dir=DIR` names a directory that
holds it prepared, otherwise TFDS downloads it (`kd_jax[tfds]`).
"""

import pathlib
import runpy
from collections.abc import Mapping
from typing import Any

import ml_collections

from kd_jax import methods

_DIGITS = pathlib.Path(__file__).with_name('digits.py')


def read_variant(variant: str) -> tuple[bool, str]:
  """Whether the variant has the word 'tiny', and the method that it names.

  Raises:
    ValueError: for other words, a word twice, or two methods.
  """
  words = variant.split(',') if variant else []
  named = [word for word in words if word != 'tiny']
  known = set(named) <= set(methods.METHODS)
  if not known or len(named) > 1 or words.count('tiny') > 1:
    raise ValueError(
      f"There is no variant {variant!r}: use 'tiny', a method, or both with a "
      f'comma between; the methods are {", ".join(methods.METHODS)}.'
    )
  return 'tiny' in words, named[0] if named else ''


def recipe(
  variant: str,
  *,
  teacher: Mapping[str, Any],
  student: Mapping[str, Any],
  tiny_teacher: Mapping[str, Any],
  tiny_student: Mapping[str, Any],
  accuracies: tuple[float, float],
  rate: float | None = None,
  own_weights: Mapping[str, Mapping[str, Any]],
  protocol: str = 'crd2020',
) -> ml_collections.ConfigDict:
  """The recipe of one pair.

  Args:
    variant: see above.
    teacher: the model, as words of `models.make_model`.
    student: the model.
    tiny_teacher: the model of 'tiny'.
    tiny_student: the model of 'tiny'.
    accuracies: published top-1 of the teacher and of plain KD, in percent.
    rate: the student's learning rate; the protocol's when None.
    own_weights: method -> options of its terms that its authors chose for this
      pair.
    protocol: of `methods.PROTOCOLS`.
  """
  tiny, method = read_variant(variant)
  published = methods.protocol(protocol)
  config = runpy.run_path(str(_DIGITS))['get_config']('tiny' if tiny else '')

  config.data.update(published.data)
  config.data.name = 'cifar100'
  config.data.validation = 0.0
  config.data.max_examples = 64 if tiny else 0
  config.eval_batch_size = 32 if tiny else 500

  config.teacher.model = tiny_teacher if tiny else teacher
  config.student.model = tiny_student if tiny else student
  for stage in ('teacher', 'alone', 'distill', 'compress'):
    config[stage].train.update(published.train)
    # Where checkpoints are written.
    config[stage].train.evaluate_every_epochs = 10
  if rate is not None:
    config.alone.train.learning_rate = rate
    config.distill.train.learning_rate = rate
  # Ours: fine-tuning, from a fifth or less of the published rates.
  config.compress.train.update(
    {'epochs': 60, 'learning_rate': 0.01, 'schedule': 'cosine'}
  )
  config.compress.prune.every = 100

  config.distill.terms = published.terms
  config.compress.terms = published.terms
  # Plain KD is the protocol's, whose weights are not everywhere the same.
  if method not in ('', 'kd'):
    _use(method, config.distill, own_weights.get(method, {}))
  if tiny:
    for stage in ('teacher', 'alone', 'distill', 'compress'):
      config[stage].train.update({'epochs': 1, 'batch_size': 16})

  goal, kd = accuracies
  config.aims.update(
    {
      # Half a point and a point are left to chance and to compression.
      'teacher_accuracy': round(goal / 100 - 0.005, 4),
      'accuracy_drop': round((goal - kd) / 100 + 0.01, 4),
      'parameter_share': 0.5,
      'size_share': 0.125,
    }
  )
  return config


def _use(
  method: str,
  distill: ml_collections.ConfigDict,
  own_weights: Mapping[str, Any],
) -> None:
  """Distils by a method instead of the protocol's KD."""
  distill.terms = methods.METHODS[method].terms
  distill.terms.update(own_weights)
  distill.scheme.update(methods.METHODS[method].scheme)
  if method == 'ab':
    # The 30 epochs before the labels count come on top of the protocol's.
    before, train = 30, distill.train
    train.boundaries = tuple(
      (before + share * train.epochs) / (before + train.epochs)
      for share in train.boundaries
    )
    train.epochs += before
