"""One configuration in one work directory: its data, models and networks.

Owns how a configuration becomes objects of the library; nothing is trained
here. The stages that train and export are in `recipe`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from kd_jax import (
  adapters,
  data,
  deploy,
  metrics,
  models,
  quantize,
  rules,
  sharding,
)
from kd_jax.step import make_eval_step
from kd_jax.types import Batch, Forward, StudentFn, Variables
from kd_jax.weights import load_weights
from kd_jax.workdir import Workdir

SPECS = {
  'weights': {
    'int8': quantize.INT8_WEIGHTS,
    'int4': dataclasses.replace(quantize.INT8_WEIGHTS, bits=4),
    'float': None,
  },
  'activations': {'int8': quantize.INT8_ACTIVATIONS, 'float': None},
}
# Stages whose networks start from the same random weights share a number.
_RNG = {'teacher': 0, 'alone': 1, 'distill': 1, 'compress': 2}


@dataclasses.dataclass(frozen=True)
class Network:
  """A trained network in evaluation mode.

  Attributes:
    name: as the report calls it.
    forward: a student function that takes pre-processed batches.
    variables: what to run it with.
  """

  name: str
  forward: StudentFn
  variables: Variables


class Run:
  """What the stages of one run share.

  Args:
    config: see `configs/digits.py` for the fields.
    workdir: opened for that configuration.
  """

  def __init__(self, config: ml_collections.ConfigDict, workdir: Workdir):
    self.config = config
    self.workdir = workdir
    self.mesh = sharding.make_mesh()
    self.axis_name = sharding.axis_name(config.compiler)

  @functools.cached_property
  def splits(self) -> dict[str, data.ImageData]:
    """The images of the three splits, in memory."""
    c = self.config.data
    return {
      split: data.load_images(
        c.name,
        split,
        data_dir=c.data_dir or None,
        validation=c.validation,
        max_examples=c.max_examples or None,
      )
      for split in ('train', 'validation', 'test')
    }

  @functools.cached_property
  def preprocess(self) -> deploy.Preprocess:
    """Normalisation by the train split's statistics, and augmentation."""
    c = self.config.data
    mean, std = data.channel_statistics(self.splits['train'])
    return data.make_preprocess(
      mean=mean,
      std=std,
      crop_padding=c.crop_padding,
      flip=c.flip,
      seed=self.config.seed,
    )

  @functools.cached_property
  def example(self) -> Batch:
    """A pre-processed batch of one image, for shapes."""
    train = self.splits['train']
    batch = {'image': train.image[:1], 'label': train.label[:1]}
    return self.preprocess(batch, train=False)

  def rng(self, stage: str) -> jax.Array:
    """The key of a stage; student alone and distilled start alike."""
    return jax.random.fold_in(jax.random.key(self.config.seed), _RNG[stage])

  def model(self, part: str) -> adapters.LinenModule:
    """The linen module of 'teacher' or 'student'."""
    options = self.config[part].model.to_dict()
    return models.make_model(
      options.pop('name'),
      num_classes=self.splits['train'].num_classes,
      **options,
    )

  def rules(self, kind: str) -> list[tuple[str, Any]]:
    """The quantization rules of 'weights' or 'activations'."""
    return [
      (pattern, rules.choose(f'{kind} format', name, SPECS[kind]))
      for pattern, name in self.config.compress.quantize[kind]
    ]

  def observer(self) -> quantize.Observer:
    """The observer of activations."""
    decay = self.config.compress.quantize.observer_decay
    return quantize.ema_min_max(decay=decay)

  def fake_quant(self, params: Any) -> Any:
    """Weights rounded to their grids; the `params_fn` of compression."""
    return quantize.fake_quant_params(params, self.rules('weights'))

  def forward(self, part: str, *, axis_name: str | None = None) -> StudentFn:
    """The float forward of 'teacher' or 'student'."""
    return adapters.from_linen(self.model(part), axis_name=axis_name)

  def fake_quant_forward(self, *, axis_name: str | None = None) -> StudentFn:
    """The student with its activations rounded to their grids."""
    interceptor = quantize.quantize_activations(
      self.rules('activations'), observer=self.observer(), axis_name=axis_name
    )
    return adapters.from_linen(
      self.model('student'), interceptors=(interceptor,), axis_name=axis_name
    )

  def teacher(self) -> Network:
    """The trained teacher."""
    weights = load_weights(self.workdir.weights('teacher'))
    return Network('teacher', self.forward('teacher'), weights)

  def student(self, stage: str) -> Network:
    """The float student that 'alone' or 'distill' trained."""
    name = {'alone': 'student alone', 'distill': 'distilled'}[stage]
    weights = load_weights(self.workdir.weights(stage))
    return Network(name, self.forward('student'), weights)

  def compressed(self) -> Network:
    """The pruned student, fake-quantized."""
    variables = load_weights(self.workdir.weights('compress'))
    variables['params'] = self.fake_quant(variables['params'])
    return Network(
      'pruned + int8 fake-quant', self.fake_quant_forward(), variables
    )

  def integer(self, *, simulate: bool = False) -> Network:
    """The pruned student on integers."""
    forward = deploy.integer_forward(self.model('student'), simulate=simulate)
    weights = load_weights(self.workdir.weights('convert'))
    return Network('integer (JAX)', forward, weights)

  def apply(self, network: Network) -> Callable[[Batch], jax.Array]:
    """`(raw batch) -> output` of a network, compiled."""
    fn = jax.jit(deploy.from_images(network.forward, self.preprocess))
    return lambda batch: fn(network.variables, batch['image'])

  def batches(self, split: str):
    """The raw batches of a split, in order, the last one padded."""
    return data.eval_batches(
      self.splits[split], batch_size=self.config.eval_batch_size
    )

  def evaluate(
    self,
    apply: Callable[[Batch], Any],
    split: str,
    *,
    teacher: Callable[[Batch], Any] | None = None,
  ) -> dict[str, float]:
    """The metrics of anything that maps raw batches to outputs.

    Args:
      apply: `(raw batch) -> [B, C]`: `self.apply(network)`, or a runtime
        outside of JAX.
      split: 'train', 'validation' or 'test'.
      teacher: the same for the teacher; adds agreement and KL.
    """
    measured, eval_step = _measurement(with_teacher=teacher is not None)

    def run(batch):
      outputs = {'output': apply(batch)}
      if teacher is not None:
        outputs['teacher'] = teacher(batch)
      labels = {k: batch[k] for k in ('label', 'mask')}
      return eval_step({'params': {}}, None, labels | outputs)

    return metrics.evaluate(run, self.batches(split), measured)


@functools.cache
def _measurement(*, with_teacher: bool):
  """The metrics, and the compiled step that takes outputs as its batch."""
  measured = metrics.classification(with_teacher=with_teacher)
  teacher_fn = lambda variables, batch: Forward(batch['teacher'])
  eval_step = make_eval_step(
    lambda variables, batch, rng, *, train: Forward(batch['output']),
    measured,
    teacher_fn=teacher_fn if with_teacher else None,
  )
  return measured, jax.jit(eval_step)
