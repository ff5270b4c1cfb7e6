"""Image classification: how `config.data` becomes images and their input.

Owns which data set a configuration means, how it is normalised and augmented,
and what stands for it in plans. Reading data sets is `data`'s.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from kd_jax import data, metrics, networks, objectives
from kd_jax.deploy import Preprocess
from kd_jax.tasks.base import Task
from kd_jax.types import StudentFn

# Images of the train split, of sets that are not prepared here.
_TRAIN = {
  'cifar10': 50_000,
  'cifar100': 50_000,
  'digits': 1_438,
  'fashion_mnist': 60_000,
  'imagenet2012': 1_281_167,
  'mnist': 60_000,
}


def _load(c: ml_collections.ConfigDict, split: str) -> data.Split:
  transfer = split == 'transfer'
  return data.load_images(
    c.transfer.name if transfer else c.name,
    'train' if transfer else split,
    data_dir=c.data_dir or None,
    validation=0.0 if transfer else c.validation,
    max_examples=_limit(c, split) or None,
    image_size=c.image_size or None,
    labelled=not transfer,
  )


def _identity(c: ml_collections.ConfigDict) -> dict[str, dict[str, str]]:
  names = filter(None, (c.name, c.transfer.name))
  return {n: data.identity(n, data_dir=c.data_dir or None) for n in names}


def _limit(c: ml_collections.ConfigDict, split: str) -> int:
  if split == 'transfer':
    return c.transfer.max_examples
  own = c.train_examples if split == 'train' else 0
  return own or c.max_examples


def _statistics(
  c: ml_collections.ConfigDict, train: data.Images
) -> dict[str, Any]:
  """Mean and deviation of every channel: the configured, or the split's own."""
  _check_both('data', c)
  mean, std = (c.mean, c.std) if c.mean else train.statistics
  return {'mean': list(mean), 'std': list(std)}


def _check_both(where: str, c: ml_collections.ConfigDict) -> None:
  if bool(c.mean) != bool(c.std):
    raise ValueError(
      f'{where}.mean={c.mean} and {where}.std={c.std} come together.'
    )


def _preprocess(
  config: ml_collections.ConfigDict, statistics: Mapping[str, Any]
) -> Preprocess:
  c = config.data
  return data.make_preprocess(
    **statistics,
    crop_padding=c.crop_padding,
    flip=c.flip,
    mixup=c.mixup,
    seed=config.seed,
  )


def _teacher_input(
  config: ml_collections.ConfigDict,
  statistics: Mapping[str, Any],
  forward: StudentFn,
) -> StudentFn:
  """A teacher behind its own normalisation and resolution."""
  c = config.teacher.input
  _check_both('teacher.input', c)
  if c.mean:
    own = functools.partial(
      data.renormalize, **statistics, to_mean=c.mean, to_std=c.std
    )
    forward = networks.with_input(forward, own)
  if c.size:
    resize = functools.partial(data.resize, size=c.size)
    forward = networks.with_input(forward, resize)
  return forward


class _Black(data.ImageData):
  """Images in memory that take none."""

  @functools.cached_property
  def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Any: a step costs the same."""
    channels = self.image_shape[-1]
    return (0.0,) * channels, (1.0,) * channels


class _Unread(data.StreamedImages):
  """Streamed images of which none is read."""

  statistics = _Black.statistics

  def read(
    self,
    rows: Sequence[int] | np.ndarray,
    *,
    key: tuple[int, int] | None = None,
  ) -> dict[str, np.ndarray]:
    """Black images of the first class."""
    del key
    shape = (len(rows), *self.image_shape)
    batch = {
      'image': np.zeros(shape, np.uint8),
      'id': self.id[np.asarray(rows)],
    }
    if self.labelled:
      batch['label'] = np.zeros(len(rows), np.int32)
    return batch


def _stand_in(
  c: ml_collections.ConfigDict, split: str, count: int
) -> data.Split:
  """Black images, as many and as large as the configuration's."""
  transfer = split == 'transfer'
  name = c.transfer.name if transfer else c.name
  known = data.describe(name, data_dir=c.data_dir or None)
  total = count or known.train_examples or _TRAIN.get(name)
  if total is None:
    raise ValueError(
      f'{name!r} is not prepared here, and how many images it has is not '
      'known: give --examples.'
    )
  left = total - round(total * (0.0 if transfer else c.validation))
  ids = np.arange(min(left, _limit(c, split) or left), dtype=np.int32)
  if c.image_size:
    return _Unread((), ids, known.class_names, c.image_size)
  shape = [n for n in known.image_shape if n is not None]
  if len(shape) < len(known.image_shape):
    raise ValueError(
      f'The images of {name!r} differ in shape: give data.image_size.'
    )
  black = np.zeros((), np.uint8)
  return _Black(
    image=np.broadcast_to(black, (len(ids), *shape)),
    label=ids % len(known.class_names),
    id=ids,
    class_names=known.class_names,
  )


def _labels() -> objectives.Objective:
  return objectives.weighted_sum({'ce': (1.0, objectives.hard_labels())})


CLASSIFICATION = Task(
  reads='image',
  load=_load,
  metrics=metrics.classification(),
  compared=metrics.classification_compared(),
  labels=_labels,
  statistics=_statistics,
  preprocess=_preprocess,
  identity=_identity,
  teacher_input=_teacher_input,
  drawn=('crop_padding', 'flip', 'mixup', 'image_size'),
  stand_in=_stand_in,
)
