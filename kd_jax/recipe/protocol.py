"""What a run did and what its numbers mean, in words for its report.

Owns the sentences; the numbers are `assess`'s.
"""

import ml_collections

from kd_jax import defaults, terms
from kd_jax.recipe.run import Run
from kd_jax.report import names

_MEANING = {
  'kl': 'Agreement and KL compare with the teacher, at temperature 1.',
  'calibration_error': 'ECE is the expected calibration error with 15 bins.',
}


def sentences(run: Run) -> list[str]:
  """How the numbers of a report were made, one sentence each."""
  c, test = run.config, len(run.splits['test'])
  curves = 'the validation split'
  if 'validation' not in run.splits:
    curves = 'training batches, as nothing is held out for validation'
  distilled, compressed = (
    terms.describe(part.terms.to_dict()) for part in (c.distill, c.compress)
  )
  named = run.task.measured(with_teacher=True)
  titles = ', '.join(metric.title or name for name, metric in named.items())
  return [
    f'{titles[:1].upper()}{titles[1:]}: test split of {test} examples, last '
    f'step, one seed ({c.seed}). The test split is used for nothing else; '
    f'curves show {curves}.',
    *(_MEANING[name] for name in named if name in _MEANING),
    f'{names.DISTILLED}: {distilled}{described(c.distill.scheme)}.',
    f'{names.COMPRESSED}: {compressed}; from the distilled student.',
    'Every term is a mean over the batch; soft targets are KL(teacher || '
    'student), summed over classes, times T squared, but where a convention is '
    'named.',
    *compared(c),
    'FLOPs: 2 x multiply-accumulates of convolutions and matrix products for '
    'one example; zeros are counted.',
    'Latency: median (quartiles) of 30 calls, all models in turns, from raw '
    'inputs in host memory to outputs.',
    'Size: the file on disk; float32 weights of the teacher and the float '
    'students.',
    'Training time: wall time of the training loop, compilation and '
    'evaluation included.',
  ]


def compared(config: ml_collections.ConfigDict) -> list[str]:
  """What the student alone and the distilled one have in common.

  Args:
    config: the fields of `kd_jax.defaults`.

  Returns:
    One sentence, or none if they are different models.

  Example:
    >>> from kd_jax import defaults
    >>> config = defaults.get_config()
    >>> print(*compared(config))  # doctest: +NORMALIZE_WHITESPACE
    student alone and distilled start from the same weights and see the same
    batches, equally augmented, for as many epochs.
    >>> config.distill.train.update({'epochs': 90, 'batch_size': 32})
    >>> print(*compared(config))  # doctest: +NORMALIZE_WHITESPACE
    student alone and distilled start from the same weights, for 60 and 90
    epochs.
    >>> config.distill.scheme.reuse_head = True
    >>> compared(config)
    []
  """
  if config.distill.scheme.reuse_head:
    return []
  both = config.alone.train, config.distill.train
  said = f'{names.ALONE} and {names.DISTILLED} start from the same weights'
  same = len({train.batch_size for train in both}) == 1
  if same and not config.data.transfer.name:
    said += ' and see the same batches, equally augmented'
  epochs = [train.epochs for train in both]
  if epochs[0] == epochs[1]:
    return [f'{said}, for as many epochs.']
  return [f'{said}, for {epochs[0]} and {epochs[1]} epochs.']


def compression(recipe: ml_collections.ConfigDict) -> str:
  """What a recipe makes of a network, in words.

  Args:
    recipe: the field `compress` of `kd_jax.defaults`.

  Example:
    >>> from kd_jax import defaults
    >>> compression(defaults.get_config().compress)
    '80 % pruned, int8 fake-quant'
  """
  prune = recipe.prune
  pruned = f'{100 * prune.sparsity:g} % pruned' if prune.sparsity else ''
  if pruned and prune.structure != 'weights':
    pruned += f' ({prune.structure.replace("_", " ")})'
  if prune.method == 'preserve':
    pruned = 'zeros preserved'
  formats = {
    kind: '/'.join(dict.fromkeys(n for _, n in recipe.quantize[kind]))
    or 'float'
    for kind in ('weights', 'activations')
  }
  used = set(formats.values())
  if used == {'float'}:
    rounded = 'not quantized: rows called integer compute in float'
  elif len(used) == 1:
    rounded = f'{used.pop()} fake-quant'
  else:
    each = (f'{name} {kind}' for kind, name in formats.items())
    rounded = f'fake-quant of {" and ".join(each)}'
  return f'{pruned or "not pruned"}, {rounded}'


def described(scheme: ml_collections.ConfigDict) -> str:
  """What a scheme has other than by default, in words; empty for nothing."""
  default = defaults.scheme()
  changed = {
    key: value
    for key, value in scheme.to_dict().items()
    if value != default[key] and not key.startswith('mutual')
  }
  return f'; {changed}' if changed else ''
