"""What a configuration file may add names to, as the README's "Extend it" does.

Owns the list of those registries; each belongs to its own module.
"""

from collections.abc import Mapping
from typing import Any

from kd_jax import methods, models, optim, tasks, terms
from kd_jax.export import exporters
from kd_jax.recipe import words

REGISTRIES: dict[str, Mapping[str, Any]] = {
  'model': models.MODELS,
  'term': terms.TERMS,
  'method': methods.METHODS,
  'task': tasks.TASKS,
  'optimizer': optim.OPTIMIZERS,
  'schedule': optim.SCHEDULES,
  'score': words.SCORES,
  'observer': words.OBSERVERS,
  'observer of weights': words.WEIGHT_OBSERVERS,
  'exporter': exporters.EXPORTERS,
}


def entries() -> dict[str, Any]:
  """All that is registered now: kind and name -> the entry."""
  return {
    f'{kind} {name!r}': value
    for kind, registry in REGISTRIES.items()
    for name, value in registry.items()
  }
