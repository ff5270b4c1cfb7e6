"""The fields of a configuration, and their values unless it sets others.

A configuration is a file with a function `get_config` that takes these fields
and sets what is its own, see `configs/digits.py`. Owns neither names of models,
terms and methods nor what any stage does.
"""

import ml_collections

from kd_jax import methods

# The stages that train.
TRAINED = ('teacher', 'alone', 'distill', 'compress')


def training(epochs: int, learning_rate: float) -> ml_collections.ConfigDict:
  """One training run: how long, and with which optimizer.

  Args:
    epochs: how often the train split is seen.
    learning_rate: the rate after the warm-up.

  Example:
    >>> fields = training(20, 3e-3)
    >>> fields.epochs, fields.learning_rate, fields.optimizer.name
    (20, 0.003, 'adamw')
  """
  return ml_collections.ConfigDict(
    {
      'epochs': epochs,
      'batch_size': 64,
      'learning_rate': learning_rate,
      'schedule': 'cosine',
      # Of the schedule 'step': where the rate falls, in shares of the steps.
      'boundaries': (0.6, 0.75, 0.9),
      # Share of the steps over which the rate rises from 0.
      'warmup': 0.1,
      'optimizer': {'name': 'adamw', 'l2': 1e-2},
      # Decay of an average of the parameters to evaluate with; 0 for none.
      'average': 0.0,
      # Checkpoints are written as often.
      'evaluate_every_epochs': 5,
      # Into how many parts a batch is divided, whose gradients are averaged.
      'accumulate': 1,
      # What the backward pass computes again to save memory: none; blocks, all
      # inside of residual blocks and stages; dots, all but matrix products and
      # convolutions.
      'remat': 'none',
    }
  )


def kd() -> dict[str, dict]:
  """The terms of plain KD; `kd_jax.methods` has those of other methods.

  Example:
    >>> {name: term['weight'] for name, term in kd().items()}
    {'kd': 0.9, 'ce': 0.1}
  """
  return {
    'kd': {'name': 'soft_targets', 'weight': 0.9, 'temperature': 4.0},
    'ce': {'name': 'hard_labels', 'weight': 0.1},
  }


def scheme() -> dict:
  """Who learns from whom: by default the student from the teacher.

  Example:
    >>> fields = scheme()
    >>> fields['generations'], fields['cohort'], fields['reuse_head']
    (1, 1, False)
  """
  return {
    # Networks between teacher and student, name -> model, in this order.
    'assistants': {},
    # Students in a row, each taught by the one before it.
    'generations': 1,
    # Students that also learn from each other, and how much.
    'cohort': 1,
    'mutual_weight': 1.0,
    'mutual_temperature': 1.0,
    # Decay of an average of the student that teaches instead; 0 for none.
    'ema': 0.0,
    # The teacher's classifier behind a trained projector (SimKD).
    'reuse_head': False,
  }


def data() -> dict:
  """What is learned from: `data.load_images` and augmentation.

  Example:
    >>> fields = data()
    >>> fields['name'], fields['validation'], fields['transfer']['name']
    ('digits', 0.1, '')
  """
  return {
    'name': 'digits',
    # What kind of problem it is: one of `kd_jax.tasks.TASKS`. Without another
    # of your own, all below is for images.
    'task': 'image_classification',
    # Directory of TFDS; '' for its default.
    'data_dir': '',
    # Share of the train split that is kept for validation.
    'validation': 0.1,
    # Random shifts by up to so many pixels, and mirroring, on the device.
    'crop_padding': 1,
    'flip': False,
    # Mixes pairs of images by shares from Beta(mixup, mixup); 0 for none.
    'mixup': 0.0,
    # Of the normalisation, per channel; () for those of the train split.
    'mean': (),
    'std': (),
    # How many examples are read of every split; 0 for all.
    'max_examples': 0,
    # And of the train split, if other than `max_examples`; 0 for as many.
    'train_examples': 0,
    # Side of crops that are streamed from disk; 0 decodes all into memory.
    'image_size': 0,
    # Where images in memory lie while training: device, host, or auto, which
    # is device if they take an eighth of an accelerator's memory at most.
    'placement': 'auto',
    # Processes that read streamed images; 0 for threads of this one.
    'num_workers': 0,
    # A data set on whose images, without labels, students learn from their
    # teacher; '' for the train split.
    'transfer': {'name': '', 'max_examples': 0},
  }


def teacher() -> dict:
  """Who teaches, and how it is trained and run.

  Example:
    >>> fields = teacher()
    >>> fields['model']['depth'], fields['train'].epochs, fields['precision']
    (8, 20, 'float32')
  """
  return {
    'model': {'name': 'resnet', 'depth': 8, 'width': 48},
    'train': training(20, 3e-3),
    # A safetensors file to load instead of training.
    'pretrained': '',
    # How it runs while it teaches: float32, bfloat16 or int8.
    'precision': 'float32',
    # Axes of the mesh that split its parameters: fsdp, tensor or both; ()
    # puts a copy on every device.
    'shard': (),
    # A directory of kd-jax cache-teacher, which students then learn from
    # without running the teacher; '' for none.
    'cache': '',
    # The normalisation and resolution that it sees; those of the student
    # where they are empty.
    'input': {'size': 0, 'mean': (), 'std': ()},
    # Further teachers, name -> model, and how all of them are averaged:
    # logits, probabilities or losses, by weights of 'teacher' and the names.
    'others': {},
    'space': 'logits',
    'weights': {},
  }


def prune() -> dict:
  """Which weights become zero or leave, and when; see `kd_jax.prune`.

  Example:
    >>> fields = prune()
    >>> fields['structure'], fields['sparsity'], fields['end']
    ('weights', 0.8, '50%')
  """
  return {
    # gradual; sparse (SET, RigL); straight_through (dense weights behind
    # masks); preserve (what is zero at the start stays so).
    'method': 'gradual',
    # Share of zeros at the end; 0 for no pruning.
    'sparsity': 0.8,
    # magnitude, taylor, fisher, snip, movement, lamp or random.
    'score': 'magnitude',
    # global, layer or erk.
    'scope': 'global',
    # weights; neurons or residual_blocks, which are removed at the end;
    # channels of each layer; N:M such as '2:4'; blocks such as '8x128'.
    'structure': 'weights',
    'rules': (('.*/kernel', True),),
    # Patterns of groups and parameters of which no neuron leaves, or of
    # modules that stay.
    'keep': (),
    # cubic, linear or once.
    'schedule': 'cubic',
    'begin': '0%',
    'end': '50%',
    # Steps between two prunings.
    'every': 5,
    # Whether a weight may come back: never, or gradient.
    'revive': 'never',
    # How sparse training grows weights: gradient (RigL) or random (SET).
    'grow': 'gradient',
  }


def quantize() -> dict:
  """What is rounded, how and when; see `kd_jax.quantize`.

  Example:
    >>> fields = quantize()
    >>> fields['weights'], fields['freeze']
    ((('.*/kernel', 'int8'),), '100%')
  """
  return {
    # int8, int4 or float, by parameter path.
    'weights': (('.*/kernel', 'int8'),),
    # int8, int8_symmetric, int8_dynamic or float, by layer path.
    'activations': (('.*', 'int8'),),
    # observed, or learned by gradients: lsq (weights too) or pact.
    'ranges': 'observed',
    # ema, min_max, percentile, mse, entropy or octav.
    'observer': 'ema',
    'observer_decay': 0.99,
    # Of weights: extremes, percentile, mse or octav.
    'weight_observer': 'extremes',
    # When values are rounded, and when observers and BatchNorm stop.
    'begin': '0%',
    'freeze': '100%',
  }


def get_config(*, tiny: bool = False) -> ml_collections.ConfigDict:
  """Every field that `kd-jax run` reads, with its default.

  Args:
    tiny: whether every training has one epoch, of 256 images at most.

  Example:
    >>> config = get_config()
    >>> config.student.model = {'name': 'resnet', 'depth': 8}
    >>> config.compress.prune.sparsity
    0.8
  """
  fields = {
    'seed': 0,
    # How the step is compiled: jit, shard_map or pmap.
    'compiler': 'jit',
    # What networks compute in while they are trained: float32 or bfloat16.
    # Parameters, statistics and losses are float32, and so is evaluation.
    'precision': 'float32',
    # Steps that one call to the devices makes; more where steps are short.
    'steps_per_dispatch': 1,
    # Devices along the axes of the mesh; -1 is all that are left.
    'mesh': {'data': -1, 'fsdp': 1, 'tensor': 1},
    'data': data(),
    'teacher': teacher(),
    'student': {'model': {'name': 'cnn', 'widths': (16, 32, 64)}},
    # The student without the teacher: what distillation is measured against.
    'alone': {'train': training(60, 5e-3)},
    'distill': {
      'train': training(60, 5e-3),
      'terms': kd(),
      'scheme': scheme(),
    },
    'compress': {
      'train': training(60, 3e-3),
      'terms': kd(),
      # Who teaches: 'teacher', or 'student', the network before compression.
      'teacher': 'teacher',
      # Points in training are '30%' of it, '400 steps' or '12 epochs'.
      'prune': prune(),
      'quantize': quantize(),
    },
    # What the report calls met or not met.
    'aims': {
      # Of the task's first metric, such as accuracy: the teacher's, and how
      # much worse the integer student may be.
      'teacher': 0.98,
      'parameter_share': 0.1,
      'drop': 0.015,
      # Of the classes that an exported file and the integer student choose; an
      # export below it ends the run.
      'export_agreement': 0.995,
      'size_share': 0.05,
    },
    'eval_batch_size': 128,
  }
  config = ml_collections.ConfigDict(fields)
  if tiny:
    config.data.max_examples = 256
    for stage in TRAINED:
      config[stage].train.epochs = 1
  return config


def comparison(*, tiny: bool = False) -> ml_collections.ConfigDict:
  """The fields of `kd-jax compare`, with their defaults.

  Beside its own they are those of `kd-jax run`, so that `plan` and
  `cache-teacher` take the same file. It does not read `seed`, `alone`,
  `compress`, `aims`, and `distill.terms`, which are those of each method.

  Args:
    tiny: see `get_config`; also three methods and two seeds.

  Example:
    >>> comparison(tiny=True).methods, len(comparison().scales)
    (('alone', 'kd', 'at'), 3)
  """
  config = get_config(tiny=tiny)
  # FSP needs teachers and students of equal widths.
  able = tuple(name for name in methods.METHODS if name != 'fsp')
  config.methods = ('alone', 'kd', 'at') if tiny else able
  config.seeds = 2 if tiny else 5
  # Factors of a method's published weights, of which the one with the best
  # accuracy on the validation split of the first seed is used.
  config.scales = (1.0,) if tiny else (1.0, 0.1, 0.01)
  # Options of a method's terms that differ from the published ones:
  # method -> term -> options.
  config.method_options = ml_collections.ConfigDict()
  # Steps whose time is measured, of every method in turns.
  config.timing = {'runs': 2 if tiny else 30}
  return config


def search(*, tiny: bool = False) -> ml_collections.ConfigDict:
  """The fields of `kd-jax compress`, with their defaults.

  Beside its own they are those of `kd-jax run`. It trains by `compress` alone,
  whose teacher is the uncompressed network, and does not read how a `teacher`,
  the student `alone` and `distill` train, nor `aims`. With a work directory as
  `--model`, `data`, `student`, `seed`, `teacher.model` and
  `distill.scheme.reuse_head` are those of that directory.

  Args:
    tiny: see `get_config`; also few candidates.

  Example:
    >>> config = search()
    >>> config.search.finalists, config.compress.teacher
    (3, 'student')
  """
  config = get_config(tiny=tiny)
  config.compress.teacher = 'student'
  config.compress.prune.sparsity = 0.0
  config.compress.quantize.freeze = '80%'
  config.search = {
    # Set by --model, --stage and --budget: `model` is a path, where that of
    # `student` is an architecture.
    'model': '',
    'stage': 'distill',
    'budget': '',
    # Shares of the channels and heads to remove, a candidate of each.
    'neurons': (0.0, 0.5) if tiny else (0.0, 0.25, 0.5, 0.75),
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
  return config


def is_tiny(variant: str) -> bool:
  """Whether the word after a configuration's colon is 'tiny'.

  Args:
    variant: that word, '' without one.

  Raises:
    ValueError: for a word other than 'tiny' or none.

  Example:
    >>> is_tiny(''), is_tiny('tiny')
    (False, True)
  """
  if variant not in ('', 'tiny'):
    raise ValueError(f"There is no variant {variant!r}: use 'tiny' or none.")
  return variant == 'tiny'
