"""One configuration in one work directory: its data, models and networks.

Owns how a configuration becomes objects of the library; nothing is trained
here. What networks compute on the data is `evaluation`, and the stages that
train and export are `stages`.
"""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from kd_jax import (
  adapters,
  data,
  deploy,
  metrics,
  models,
  networks,
  rules,
  sharding,
  tasks,
)
from kd_jax.recipe import fields
from kd_jax.recipe.compression import Compression
from kd_jax.recipe.network import TEACHER, Network, ensemble
from kd_jax.recipe.words import Training, Uncompressed
from kd_jax.report import names
from kd_jax.report.looks import Look, looks_of
from kd_jax.sharding import layout
from kd_jax.storage.weights import load_weights
from kd_jax.storage.workdir import Workdir
from kd_jax.types import Batch, StudentFn, Variables


def _layout(shard: Sequence[str]) -> layout.Layout:
  """How parameters are split over the mesh, the teacher's too."""
  for axis in shard:
    axes = dict.fromkeys((layout.FSDP, layout.TENSOR))
    rules.choose('axis of teacher.shard', axis, axes)
  return layout.DEFAULT._replace(teacher=tuple(shard))


# Stages whose networks start from the same random weights share a number.
_RNG = {'teacher': 0, 'alone': 1, 'distill': 1, 'compress': 2}
_PRECISIONS = dict.fromkeys(('float32', 'bfloat16', 'int8'))


class Run:
  """What the stages of one run share.

  Args:
    config: see `kd_jax.defaults` for the fields.
    workdir: opened for that configuration; None for a `rehearsal`, which has
      none.
    like: a run of the same data, whose examples in memory are used.
    devices: of the mesh; all of them when None.
    profile: whether trainings measure where their time goes.

  Raises:
    ValueError: for a configuration that `fields.check` refuses, devices that do
      not make its mesh, or an axis of `teacher.shard` that there is not.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: Workdir | None,
    *,
    like: 'Run | None' = None,
    devices: Sequence[jax.Device] | None = None,
    profile: bool = False,
  ):
    fields.check(config)
    self.config, self.profile = config, profile
    self._workdir = workdir
    if like is not None:
      # What the cached properties would make.
      vars(self).update(splits=like.splits, transfer=like.transfer)
    self.mesh = sharding.make_mesh(devices, **config.mesh.to_dict())
    self.axis_name = sharding.axis_name(config.compiler)
    self.layout = _layout(config.teacher.shard)

  @property
  def workdir(self) -> Workdir:
    """Where the run's files are; a ValueError for a run without any."""
    if self._workdir is None:
      raise ValueError('A rehearsal has no work directory.')
    return self._workdir

  def with_config(self, config: ml_collections.ConfigDict) -> 'Run':
    """The same files and examples, with another configuration."""
    return Run(config, self._workdir, like=self)

  @functools.cached_property
  def own_mesh(self) -> jax.sharding.Mesh:
    """The devices of this process, over which evaluation is split."""
    return sharding.own_mesh(self.mesh)

  @functools.cached_property
  def task(self) -> tasks.Task:
    """What kind of problem it is."""
    return rules.choose('data.task', self.config.data.task, tasks.TASKS)

  @property
  def quality(self) -> Look:
    """The metric that decides, and how it is written."""
    return looks_of({'metrics': metrics.describe(self.task.metrics)})[0]

  @functools.cached_property
  def splits(self) -> dict[str, data.Split]:
    """The examples of the splits; no 'validation' where its share is 0."""
    c = self.config.data
    held_out = ('validation',) if c.validation else ()
    return {
      split: self.task.load(c, split) for split in ('train', *held_out, 'test')
    }

  @functools.cached_property
  def transfer(self) -> data.Split:
    """The examples on which students learn from their teacher.

    Those of the train split, or of another data set without its labels.
    """
    c = self.config.data
    if not c.transfer.name:
      return self.splits['train']
    return self.task.load(c, 'transfer')

  @functools.cached_property
  def statistics(self) -> dict[str, Any]:
    """What pre-processing has to know of the train split."""
    return self.task.statistics(self.config.data, self.splits['train'])

  @functools.cached_property
  def preprocess(self) -> deploy.Preprocess:
    """From raw batches to what networks see, with augmentation in training."""
    return self.task.preprocess(self.config, self.statistics)

  @functools.cached_property
  def known(self) -> Callable[[Batch], dict[str, Any]]:
    """Of a raw batch all but the input, as pre-processing makes it, compiled.

    Labels and masks, for metrics; also what pre-processing leaves out, such as
    the mask of examples that pad a batch.
    """

    def known(batch):
      made = {**batch, **self.preprocess(batch, train=False)}
      return {k: v for k, v in made.items() if k != self.task.reads}

    return jax.jit(known)

  @functools.cached_property
  def example(self) -> Batch:
    """A pre-processed batch of one example, for shapes."""
    return self.preprocess(self.splits['train'].read([0]), train=False)

  def rng(self, stage: str) -> jax.Array:
    """The key of a stage; student alone and distilled start alike.

    Args:
      stage: or 'stage/part', which starts otherwise than the stage itself.
    """
    stage, *part = stage.split('/')
    key = jax.random.fold_in(jax.random.key(self.config.seed), _RNG[stage])
    for name in part:
      key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return key

  def make_model(self, options: Mapping[str, Any]) -> adapters.LinenModule:
    """A linen module from its name and options, for the classes at hand."""
    options = dict(options)
    rules.choose('field of a model', 'name', options)
    return models.make_model(
      options.pop('name'),
      num_classes=self.splits['train'].num_classes,
      **options,
    )

  def model(self, part: str) -> adapters.LinenModule:
    """The linen module of 'teacher', 'alone' or 'student'.

    'alone' is the student of the configuration; 'student' is what distillation
    makes of it, which with `reuse_head` also has a projector.
    """
    if part == 'teacher':
      return self.make_model(self.config.teacher.model.to_dict())
    options = self.config.student.model.to_dict()
    if part == 'student' and self.config.distill.scheme.reuse_head:
      return self._with_reused_head(options)
    return self.make_model(options)

  def _with_reused_head(self, options: dict[str, Any]) -> adapters.LinenModule:
    teacher = self.model('teacher')
    width = self._channels(teacher, teacher.taps.stages[-1])
    name = options.pop('name')
    return models.ReusedHead(
      models.make_model(name, num_classes=0, **options),
      width=width,
      num_classes=self.splits['train'].num_classes,
    )

  def _channels(self, model: adapters.LinenModule, tap: str) -> int:
    forward = adapters.from_linen(model, taps=(tap,))
    variables = jax.eval_shape(
      lambda batch: adapters.init_linen(model, jax.random.key(0), batch),
      self.example,
    )
    features = jax.eval_shape(forward, variables, self.example).features
    return features[tap].shape[-1]

  @functools.cached_property
  def compression(self) -> Compression:
    """What `config.compress` makes of the distilled student."""
    c, train = self.config.compress, self.splits['train']
    raw = train.read(np.arange(min(c.train.batch_size, len(train))))
    network = Uncompressed(
      self.model('student'),
      self.student('distill').variables,
      self.preprocess(raw, train=False),
    )
    return Compression(c, network, Training.of(c.train, self.transfer))

  def network(
    self, name: str, model: adapters.LinenModule, variables: Variables
  ) -> Network:
    """A float network of a linen module."""
    make = functools.partial(adapters.from_linen, model)
    return Network(name, make, variables, model.taps)

  def trained(
    self, where: str, model: adapters.LinenModule, precision: str = 'float32'
  ) -> Variables:
    """The variables of a model that a stage, or a part of it, saved."""
    del model  # What runs without files makes them from it.
    return load_weights(self.workdir.weights(where, precision))

  def teacher(self, *, simulate: bool = False) -> Network:
    """The trained teacher, or the ensemble of all teachers.

    Args:
      simulate: runs a teacher on integers in float32, as `integer`.
    """
    c = self.config.teacher
    members = {TEACHER: self._teacher('teacher', c.model.to_dict(), simulate)}
    for name, options in c.others.items():
      where = f'teacher/{name}'
      members[name] = self._teacher(where, options.to_dict(), simulate)
    if len(members) == 1:
      return members[TEACHER]
    make = functools.partial(ensemble, members, c.space, c.weights.to_dict())
    variables = {n: m.variables for n, m in members.items()}
    taps = {n: m.taps for n, m in members.items()}
    return Network(TEACHER, make, networks.combine_variables(variables), taps)

  def _teacher(
    self, where: str, options: Mapping[str, Any], simulate: bool
  ) -> Network:
    c = self.config.teacher
    rules.choose('teacher.precision', c.precision, _PRECISIONS)
    integer = c.precision == 'int8'
    if c.precision == 'bfloat16':
      options = {**options, 'dtype': 'bfloat16'}
    model = self.make_model(options)
    variables = self.trained(where, model, 'int8' if integer else 'float32')
    if c.precision == 'bfloat16':
      variables = networks.cast_params(variables, 'bfloat16')
    build: Callable[..., StudentFn]
    build = functools.partial(adapters.from_linen, model)
    if integer:
      build = functools.partial(
        deploy.integer_forward, model, simulate=simulate
      )
    make = self.behind_teacher_input(build)
    return Network(TEACHER, make, variables, model.taps)

  def teacher_input(self, forward: StudentFn) -> StudentFn:
    """A teacher's function behind an input of its own."""
    return self.task.teacher_input(self.config, self.statistics, forward)

  def behind_teacher_input(
    self, make: Callable[..., StudentFn]
  ) -> Callable[..., StudentFn]:
    """What makes a teacher's function, with `teacher_input` around it."""
    return lambda **options: self.teacher_input(make(**options))

  def student(self, stage: str) -> Network:
    """The float student that 'alone' or 'distill' trained."""
    name = {'alone': names.ALONE, 'distill': names.DISTILLED}[stage]
    part = {'alone': 'alone', 'distill': 'student'}[stage]
    model = self.model(part)
    return self.network(name, model, self.trained(stage, model))

  def compressed(self) -> Network:
    """The student, pruned and fake-quantized as the configuration says."""
    variables = load_weights(self.workdir.weights('compress'))
    return Network(
      names.COMPRESSED,
      self.compression.make,
      self.compression.simulated(variables),
    )

  def integer(self, *, simulate: bool = False) -> Network:
    """The pruned student on integers, without the units that were pruned."""
    overrides = self.workdir.result('convert')['overrides']
    make = functools.partial(
      self.compression.integer_forward, overrides, simulate=simulate
    )
    weights = load_weights(self.workdir.weights('convert'))
    return Network(names.INTEGER, make, weights)
