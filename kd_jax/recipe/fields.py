"""Which fields a configuration has, and the bounds of its numbers.

Owns what can be refused before a directory is claimed and anything is made.
What words mean is looked up where they are read.
"""

import functools
import re
from typing import Any

import ml_collections

from kd_jax import defaults, rules
from kd_jax.data.resident import PLACEMENTS
from kd_jax.storage.workdir import flatten

# What is in them is the business of models, terms, optimizers and methods; a
# task of one's own has its options in a dictionary of `data`.
_OPEN = re.compile(
  r'((teacher|student)\.model|.*\.terms|.*\.train\.optimizer|teacher\.others'
  r'|teacher\.weights|distill\.scheme\.assistants|method_options'
  r'|data\.(?!transfer\.)\w+)\..*'
)
_LEAST = {
  r'eval_batch_size|steps_per_dispatch|seeds|timing\.runs': 1,
  r'.*\.train\.(epochs|batch_size|evaluate_every_epochs|accumulate)': 1,
  r'distill\.scheme\.(cohort|generations)': 1,
  r'search\.(calibration_batches|latency_batch|finalists|multiple_of)': 1,
  r'seed|data\.(num_workers|max_examples|train_examples|image_size)': 0,
}


@functools.cache
def _known() -> tuple[frozenset[str], frozenset[str]]:
  """The fields of `kd-jax run`, and those of all commands."""
  own, *others = (
    frozenset(flatten(make().to_dict()))
    for make in (defaults.get_config, defaults.comparison, defaults.search)
  )
  return own, own.union(*others)


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses fields that nothing reads, missing ones, and numbers out of bounds.

  Args:
    config: see `kd_jax.defaults`.

  Raises:
    ValueError: naming the field and the nearest ones that there are, or its
      bound.

  Example:
    >>> config = defaults.get_config()
    >>> config.data.patients = {'test': 80}
    >>> check(config)
    >>> config.data.nme = 'digits'
    >>> check(config)
    Traceback (most recent call last):
    ...
    ValueError: Nothing reads the field 'data.nme': did you mean data.name \
or data.mean or data.num_workers?
  """
  given = flatten(config.to_dict())
  needed, known = _known()
  for field in given:
    if field not in known and not _OPEN.fullmatch(field):
      near = rules.near_misses(field, sorted(known))
      raise ValueError(f'Nothing reads the field {field!r}: {near}')
  for field in sorted(needed):
    if field not in given and not _OPEN.fullmatch(field):
      raise ValueError(
        f'The configuration has no field {field!r}. New ones begin with '
        'kd_jax.defaults.get_config(); a work directory of an earlier kd_jax '
        'is read by that one.'
      )
  for field, value in given.items():
    _check_least(field, value)
  rules.choose(
    'data.placement', config.data.placement, dict.fromkeys(PLACEMENTS)
  )


def _check_least(field: str, value: Any) -> None:
  for pattern, least in _LEAST.items():
    if re.fullmatch(pattern, field) and value < least:
      raise ValueError(f'{field}={value} is not a number from {least} on.')
