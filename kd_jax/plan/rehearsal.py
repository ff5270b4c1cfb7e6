"""A run without data and without weights: shapes of everything, no values.

Owns what stands in for data sets and trained networks. The train steps that are
made with them are `steps`'.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from kd_jax import adapters, data, deploy
from kd_jax.recipe import distillation
from kd_jax.recipe.run import Run
from kd_jax.types import Batch, Variables

# Images of the train split, for sets that are not prepared here.
_TRAIN = {
  'cifar10': 50_000,
  'cifar100': 50_000,
  'digits': 1_438,
  'fashion_mnist': 60_000,
  'imagenet2012': 1_281_167,
  'mnist': 60_000,
}


class _Unread(data.StreamedImages):
  """Streamed images of which none is read."""

  def read(
    self,
    rows: Sequence[int] | np.ndarray,
    *,
    key: tuple[int, int] | None = None,
  ) -> dict[str, np.ndarray]:
    del key
    shape = (len(rows), *self.image_shape)
    batch = {
      'image': np.zeros(shape, np.uint8),
      'id': self.id[np.asarray(rows)],
    }
    return batch | {'label': np.zeros(len(rows), np.int32)}


class Rehearsal(Run):
  """A run that reads no data set and no file.

  Images are black, trained networks have the weights that they start with: make
  both under `jax.eval_shape`, and they cost nothing. A teacher cache of the
  configuration need not be there.

  Args:
    config: as for `Run`.
    devices: of the mesh; all of them when None.
    examples: images of the train split; 0 for as many as are known to be there.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    devices: Sequence[Any] | None = None,
    *,
    examples: int = 0,
  ) -> None:
    config = config.copy_and_resolve_references()
    self.cached = bool(config.teacher.cache)
    config.teacher.cache = ''
    super().__init__(config, None, devices=devices)
    self._examples = examples

  @functools.cached_property
  def splits(self) -> dict[str, data.Images]:
    """The train split alone, black."""
    c = self.config.data
    return {'train': self._images(c.name, self._limit('train'), c.validation)}

  @functools.cached_property
  def transfer(self) -> data.Images:
    """The images to learn from a teacher on, black."""
    c = self.config.data.transfer
    if not c.name:
      return self.splits['train']
    return self._images(c.name, c.max_examples, 0.0)

  def _images(self, name: str, limit: int, validation: float) -> data.Images:
    c = self.config.data
    known = data.describe(name, data_dir=c.data_dir or None)
    total = self._examples or known.train_examples or _TRAIN.get(name)
    if total is None:
      raise ValueError(
        f'{name!r} is not prepared here, and how many images it has is not '
        'known: give --examples.'
      )
    left = total - round(total * validation)
    ids = np.arange(min(left, limit or left), dtype=np.int32)
    if c.image_size:
      return _Unread((), ids, known.class_names, c.image_size)
    shape = [n for n in known.image_shape if n is not None]
    if len(shape) < len(known.image_shape):
      raise ValueError(
        f'The images of {name!r} differ in shape: give data.image_size.'
      )
    black = np.zeros((), np.uint8)
    return data.ImageData(
      image=np.broadcast_to(black, (len(ids), *shape)),
      label=ids % len(known.class_names),
      id=ids,
      class_names=known.class_names,
    )

  @functools.cached_property
  def statistics(self) -> tuple[Sequence[float], Sequence[float]]:
    """Those of the configuration, or others: the step costs the same."""
    c = self.config.data
    channels = self.splits['train'].image_shape[-1]
    return tuple(c.mean) or (0.0,) * channels, tuple(c.std) or (1.0,) * channels

  @functools.cached_property
  def example(self) -> Batch:
    """A batch of one black image, pre-processed."""
    batch = self.splits['train'].read([0])
    batch['image'] = batch['image'].astype(np.float32)
    # Kept for later: no value of what is traced now.
    with jax.ensure_compile_time_eval():
      return jax.tree.map(jax.numpy.asarray, batch)

  def again(self) -> 'Rehearsal':
    """The same run, which has made nothing yet."""
    devices = list(self.mesh.devices.flat)
    return Rehearsal(self.config, devices, examples=self._examples)

  def trained(
    self, where: str, model: adapters.LinenModule, precision: str = 'float32'
  ) -> Variables:
    """Variables as they start, on integers if that is asked for."""
    example = self.example
    if where.split('/')[0] == 'teacher':
      example = distillation.example_for_teacher(self)
    if precision != 'int8':
      return adapters.init_linen(model, jax.random.key(0), example)
    # Conversion looks at values.
    with jax.ensure_compile_time_eval():
      variables = adapters.init_linen(model, jax.random.key(0), example)
      return deploy.post_training_quantize(model, variables, [example])
