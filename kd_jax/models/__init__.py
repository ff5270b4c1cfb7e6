"""Models by name; every submodule's path is a tap of `adapters.from_linen`."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from kd_jax import rules
from kd_jax.models.cnn import CNN as CNN
from kd_jax.models.mlp import MLP as MLP
from kd_jax.models.resnet import CifarResNet as CifarResNet

MODELS = {'mlp': MLP, 'cnn': CNN, 'resnet': CifarResNet}


def make_model(
  name: str, *, num_classes: int, **options: Mapping[str, Any]
) -> nn.Module:
  """A model by name.

  Args:
    name: one of `MODELS`.
    num_classes: size of the output.
    **options: the model's other attributes.

  Raises:
    ValueError: for an unknown name or option.

  Example:
    >>> make_model('resnet', num_classes=10, depth=8).depth
    8
  """
  constructor = rules.choose('model', name, MODELS)
  for option in options:
    known = set(constructor.__dataclass_fields__) - {'parent', 'name'}
    rules.choose(f'option of model {name!r}:', option, dict.fromkeys(known))
  return constructor(num_classes=num_classes, **options)
