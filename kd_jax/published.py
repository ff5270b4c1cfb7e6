"""Published training protocols, and pairs of networks trained by them.

Owns `PROTOCOLS`, which fix optimizer, schedule, augmentation and convention
("KD" alone names no experiment), and what the words after the colon of
`configs/cifar100_*.py` and `configs/imagenet_*.py` mean. The terms of methods
are in `methods`, the fields of a configuration in `defaults`.

A pair is two networks of the benchmark of Tian et al., "Contrastive
Representation Distillation", 2019, arXiv:1910.10699. Teacher, student alone and
distilled student follow one protocol, `crd2020`: 240 epochs of SGD in batches
of 64, a rate of 0.05 (0.01 for MobileNet and ShuffleNet students) that falls to
a tenth after 150, 180 and 210, momentum 0.9, L2 5e-4 on every parameter, shifts
by up to 4 pixels and mirroring, the published mean and deviation, last epoch.

Variants are words after a colon, with commas between:

- none: the protocol's KD with weights 0.1 and 0.9 at T = 4;
- a method of `kd_jax.methods.METHODS`, such as `crd`: its published terms, with
  the pair's own weights where its authors chose some;
- a protocol: `dkd2022` and `dist2022` are the same recipe with a method of
  their own; `funmatch` trains both students for 1200 epochs on mixed images,
  the distilled one without labels, at five times the cost. The teacher keeps
  `crd2020`'s schedule but sees the same mixed images; in the paper it came
  pretrained;
- `tiny`: smaller networks of the same families and one epoch.

`crd`, `funmatch,crd`, `tiny,crd` and so on: each needs a work directory of its
own, in which it trains its own teacher.

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

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from kd_jax import defaults, methods, rules


class Protocol(NamedTuple):
  """A published recipe.

  Attributes:
    title: in words.
    source: paper or code.
    train: fields of a `training` of `kd_jax.defaults`.
    data: fields of `config.data`.
    method: of `methods.METHODS`, the one that the protocol was published with.
    terms: that method as the protocol uses it, for `terms.make_objective`.
  """

  title: str
  source: str
  train: dict[str, Any]
  data: dict[str, Any]
  method: str
  terms: dict[str, dict[str, Any]]


_CIFAR_DATA = {
  'crop_padding': 4,
  'flip': True,
  'mixup': 0.0,
  'mean': (0.5071, 0.4867, 0.4408),
  'std': (0.2675, 0.2565, 0.2761),
}
# 240 epochs of SGD; the rate falls at 150, 180 and 210. L2 reaches every
# parameter, as in the published code, BatchNorm's too.
_CIFAR_TRAIN = {
  'epochs': 240,
  'batch_size': 64,
  'learning_rate': 0.05,
  'schedule': 'step',
  'boundaries': (150 / 240, 180 / 240, 210 / 240),
  'warmup': 0.0,
  'optimizer': {
    'name': 'momentum',
    'momentum': 0.9,
    'l2': 5e-4,
    'decayed': '.*',
  },
}
_IMAGENET_DATA = {
  'crop_padding': 0,
  'flip': True,
  'mixup': 0.0,
  'image_size': 224,
  'mean': (0.485, 0.456, 0.406),
  'std': (0.229, 0.224, 0.225),
}
_IMAGENET_TRAIN = {
  'epochs': 100,
  'batch_size': 256,
  'learning_rate': 0.1,
  'schedule': 'step',
  'boundaries': (0.3, 0.6, 0.9),
  'warmup': 0.0,
  'optimizer': {
    'name': 'momentum',
    'momentum': 0.9,
    'l2': 1e-4,
    'decayed': '.*',
  },
}

PROTOCOLS: dict[str, Protocol] = {
  'crd2020': Protocol(
    'the CIFAR-100 benchmark of CRD: KD with weights 0.1 and 0.9 at T = 4',
    'Tian et al. 2019, arXiv:1910.10699, and its public benchmark; the rate is '
    '0.01 for MobileNet and ShuffleNet students',
    _CIFAR_TRAIN,
    _CIFAR_DATA,
    'kd',
    methods.METHODS['kd'].terms,
  ),
  'dkd2022': Protocol(
    'the same recipe; decoupled KD with a warm-up of 20 epochs',
    'Zhao et al. 2022, arXiv:2203.08679',
    _CIFAR_TRAIN,
    _CIFAR_DATA,
    'dkd',
    methods.METHODS['dkd'].terms,
  ),
  'dist2022': Protocol(
    'the same recipe; correlations of predictions at T = 4',
    'Huang et al. 2022, arXiv:2205.10536',
    _CIFAR_TRAIN,
    _CIFAR_DATA,
    'dist',
    methods.METHODS['dist'].terms,
  ),
  'funmatch': Protocol(
    'consistent and patient teaching: one crop and one mixup for both '
    'networks, KL at T = 1, no labels, a very long schedule',
    'Beyer et al. 2021, arXiv:2106.05237',
    {
      'epochs': 1200,
      'batch_size': 512,
      'learning_rate': 3e-3,
      'schedule': 'cosine',
      'boundaries': (),
      'warmup': 0.04,
      'optimizer': {
        'name': 'adamw',
        # The paper's 3e-4, which is not multiplied by the rate of 3e-3.
        'l2': 0.1,
        'clip_norm': 1.0,
        'decayed': '.*/kernel',
      },
    },
    _CIFAR_DATA | {'mixup': 1.0},
    'label_free',
    methods.METHODS['label_free'].terms,
  ),
  'imagenet': Protocol(
    'ImageNet in 100 epochs: KD with weights 0.5 and 0.5 at T = 1',
    'Zhao et al. 2022, arXiv:2203.08679, and its public code',
    _IMAGENET_TRAIN,
    _IMAGENET_DATA,
    'kd',
    {
      'kd': {'name': 'soft_targets', 'weight': 0.5, 'temperature': 1.0},
      'ce': {'name': 'hard_labels', 'weight': 0.5},
    },
  ),
}


def protocol(name: str) -> Protocol:
  """A published recipe by name.

  Args:
    name: of `PROTOCOLS`, such as 'crd2020'.

  Raises:
    ValueError: for an unknown name.

  Example:
    >>> protocol('crd2020').train['epochs']
    240
  """
  return rules.choose('protocol', name, PROTOCOLS)


class Variant(NamedTuple):
  """What the words of a variant say.

  Attributes:
    protocol: of `PROTOCOLS`, the one that trains the students.
    method: of `methods.METHODS`; the protocol's own unless named.
    tiny: whether to run small.
  """

  protocol: str
  method: str
  tiny: bool


def read_variant(variant: str, protocols: Sequence[str]) -> Variant:
  """Reads the words after the colon.

  Args:
    variant: words with commas between.
    protocols: those that the configuration offers; the first is its own.

  Raises:
    ValueError: for other words, or two of one kind.

  Example:
    >>> read_variant('tiny,crd', ['crd2020', 'funmatch'])
    Variant(protocol='crd2020', method='crd', tiny=True)
    >>> read_variant('funmatch', ['crd2020', 'funmatch']).method
    'label_free'
  """
  words = variant.split(',') if variant else []
  named = [word for word in words if word in methods.METHODS]
  chosen = [word for word in words if word in protocols]
  tiny = [word for word in words if word == 'tiny']
  kinds = (named, chosen, tiny)
  if sum(map(len, kinds)) < len(words) or max(map(len, kinds)) > 1:
    raise ValueError(
      f"There is no variant {variant!r}: use 'tiny', a method, a protocol, or "
      'some of them with commas between; the methods are '
      f'{", ".join(methods.METHODS)}; the protocols are {", ".join(protocols)}.'
    )
  name = chosen[0] if chosen else protocols[0]
  own = protocol(name).method
  return Variant(name, named[0] if named else own, bool(tiny))


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
  protocols: Sequence[str] = ('crd2020', 'dkd2022', 'dist2022', 'funmatch'),
) -> ml_collections.ConfigDict:
  """The recipe of one pair.

  Args:
    variant: see above.
    teacher: the model, as words of `models.make_model`.
    student: the model.
    tiny_teacher: the model of 'tiny'.
    tiny_student: the model of 'tiny'.
    accuracies: published top-1 of the teacher and of plain KD, in percent.
    rate: the students' learning rate where they train with the teacher's
      optimizer; the protocol's when None.
    own_weights: method -> options of its terms that its authors chose for this
      pair.
    protocols: of `PROTOCOLS`; the first is the one that trains the
      teacher, and the students' unless the variant names another.

  Returns:
    A configuration, see `kd_jax.defaults`, of CIFAR-100 until changed.

  Raises:
    ValueError: see `read_variant`.

  Example:
    >>> resnet56 = {'name': 'cifar_resnet', 'depth': 56}
    >>> resnet20 = {'name': 'cifar_resnet', 'depth': 20}
    >>> config = recipe(
    ...   'crd', teacher=resnet56, student=resnet20, tiny_teacher=resnet20,
    ...   tiny_student=resnet20, accuracies=(72.34, 70.66), own_weights={})
    >>> config.distill.train.epochs, config.teacher.model.depth
    (240, 56)
    >>> sorted(config.distill.terms), round(config.aims.drop, 4)
    (['ce', 'contrastive'], 0.0268)
  """
  chosen = read_variant(variant, protocols)
  tiny = chosen.tiny
  students, teachers = protocol(chosen.protocol), protocol(protocols[0])
  config = defaults.get_config(tiny=tiny)

  config.data.update(students.data)
  config.data.name = 'cifar100'
  config.data.validation = 0.0
  config.data.max_examples = 64 if tiny else 0
  config.eval_batch_size = 32 if tiny else 500
  config.teacher.model = tiny_teacher if tiny else teacher
  config.student.model = tiny_student if tiny else student

  _set_training(config, students, teachers, rate)
  _set_terms(config, students, chosen.method, own_weights)
  if chosen.method == 'ab':
    _train_before(config.distill.train, epochs=30)
  if tiny:
    for stage in defaults.TRAINED:
      config[stage].train.update({'epochs': 1, 'batch_size': 16})

  goal, kd = accuracies
  config.aims.update(
    {
      # Half a point and a point are left to chance and to compression.
      'teacher': round(goal / 100 - 0.005, 4),
      'drop': round((goal - kd) / 100 + 0.01, 4),
      'parameter_share': 0.5,
      'size_share': 0.125,
    }
  )
  return config


def _set_training(
  config: ml_collections.ConfigDict,
  students: Protocol,
  teachers: Protocol,
  rate: float | None,
) -> None:
  """Optimizers and schedules of all stages that train."""
  for stage in defaults.TRAINED:
    source = students if stage in ('alone', 'distill') else teachers
    config[stage].train.update(source.train)
    # Where checkpoints are written.
    config[stage].train.evaluate_every_epochs = 10
  if rate is not None and students.train == teachers.train:
    config.alone.train.learning_rate = rate
    config.distill.train.learning_rate = rate
  # Ours: fine-tuning, from a fifth or less of the published rates.
  config.compress.train.update(
    {'epochs': 60, 'learning_rate': 0.01, 'schedule': 'cosine'}
  )
  config.compress.prune.every = 100


def _set_terms(
  config: ml_collections.ConfigDict,
  students: Protocol,
  method: str,
  own_weights: Mapping[str, Mapping[str, Any]],
) -> None:
  """What the students learn from: the method, and then the protocol's own."""
  # The protocol's weights for its own method are not everywhere the usual.
  config.compress.terms = students.terms
  config.compress.terms.update(own_weights.get(students.method, {}))
  if method == students.method:
    terms = config.compress.terms.to_dict()
  else:
    terms = methods.METHODS[method].terms
  config.distill.terms = terms
  config.distill.terms.update(own_weights.get(method, {}))
  config.distill.scheme.update(methods.METHODS[method].scheme)


def _train_before(train: ml_collections.ConfigDict, *, epochs: int) -> None:
  """Puts epochs before those of the protocol; its rate falls so much later."""
  train.boundaries = tuple(
    (epochs + share * train.epochs) / (epochs + train.epochs)
    for share in train.boundaries
  )
  train.epochs += epochs
