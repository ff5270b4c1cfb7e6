"""Images, networks and trainings of `compression_accuracy.py`."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import kd_jax
from kd_jax import adapters, data, models, optim

# By data set, so that a run takes minutes on two CPU cores.
DATASETS = {
  'digits': {'resnet': {'width': 16}, 'vit': {'patch_size': 2}},
  'fashion_mnist': {'resnet': {'width': 8}, 'vit': {'patch_size': 4}},
}
MODELS = {
  'resnet': {'name': 'resnet', 'depth': 8},
  'vit': {'name': 'vit', 'width': 48, 'depth': 3, 'heads': 4},
  'tiny': {'name': 'cnn', 'widths': (4, 4)},
}
# Peaks of the learning rate: of what is new or loses weights, and of the rest.
RATES = {'resnet': (5e-3, 2e-3), 'vit': (2e-3, 1e-3), 'tiny': (5e-3, 2e-3)}
BATCH = 64
CALIBRATION = 8
Variables = dict[str, Any]


class Task(NamedTuple):
  """Images and a network for them.

  Attributes:
    model: a linen model.
    train: uint8 `image`, `label` and `id`, on the device.
    test: pre-processed images and their labels.
    preprocess: see `data.make_preprocess`.
    rates: the peaks of `RATES`.
  """

  model: adapters.LinenModule
  train: dict[str, jax.Array]
  test: tuple[jax.Array, np.ndarray]
  preprocess: Callable[..., dict[str, jax.Array]]
  rates: tuple[float, float]

  @property
  def steps(self) -> int:
    """Steps of an epoch; the remainder is dropped."""
    return len(self.train['id']) // BATCH

  @property
  def example(self) -> dict[str, jax.Array]:
    """A pre-processed batch of one image, for shapes."""
    return {'image': self.test[0][:1]}

  def calibration(self) -> Iterator[dict[str, jax.Array]]:
    """The first batches of the train split, without augmentation."""
    for i in range(0, min(CALIBRATION, self.steps) * BATCH, BATCH):
      rows = {k: v[i : i + BATCH] for k, v in self.train.items()}
      yield self.preprocess(rows, train=False)


def make_task(
  dataset: str,
  model: str,
  *,
  data_dir: str | None = None,
  train_examples: int | None = None,
  width: int | None = None,
) -> Task:
  """Reads a data set and builds the network for it.

  Args:
    dataset: a name of `DATASETS`.
    model: a name of `MODELS`.
    data_dir: see `data.load_images`.
    train_examples: how many images of the train split; all when None.
    width: of the network, in place of its own.
  """
  read = functools.partial(
    data.load_images, dataset, data_dir=data_dir, validation=0.0
  )
  train, test = read('train', max_examples=train_examples), read('test')
  mean, std = train.statistics
  preprocess = data.make_preprocess(
    mean=mean,
    std=std,
    crop_padding=1,
    flip=dataset == 'fashion_mnist',
  )
  options = network_options(dataset, model, width)
  images = preprocess({'image': jnp.asarray(test.image)}, train=False)['image']
  return Task(
    models.make_model(**options, num_classes=train.num_classes),
    {k: jnp.asarray(getattr(train, k)) for k in ('image', 'label', 'id')},
    (images, test.label),
    preprocess,
    RATES[model],
  )


def network_options(
  dataset: str, model: str, width: int | None = None
) -> dict[str, Any]:
  """What `models.make_model` takes; see `make_task`."""
  options = MODELS[model] | DATASETS[dataset].get(model, {})
  return options if width is None else options | {'width': width}


class Trained(NamedTuple):
  """A network that can be measured.

  Attributes:
    forward: of pre-processed batches.
    variables: what it runs with, and all that is stored of it.
  """

  forward: Callable[..., Any]
  variables: Variables


def trainer(
  task: Task,
  student_fn: Callable[..., Any],
  *,
  epochs: int,
  taught: bool = True,
  rewound: bool = False,
  wrap: Callable[..., Any] = lambda tx, total: tx,
  params_fn: Callable[..., Any] = lambda params: params,
) -> Callable[..., Variables]:
  """Training of one kind, compiled once for all seeds.

  Args:
    task: the images.
    student_fn: what is trained.
    epochs: over the train split.
    taught: whether by the dense network, or by labels alone.
    rewound: whether with the first of the task's learning rates.
    wrap: `(optimizer, number of steps) -> optimizer`.
    params_fn: see `kd_jax.make_train_step`.

  Returns:
    `(variables, teacher's variables, seed) -> trained variables`, and
    `params_fn` is not applied to them.
  """
  total = epochs * task.steps
  rate = optim.make_schedule(
    'cosine',
    peak=task.rates[0 if rewound else 1],
    total_steps=total,
    warmup_steps=total // 10,
  )
  tx = wrap(optim.make_optimizer('adamw', learning_rate=rate, l2=1e-2), total)
  terms = {'ce': (1.0, kd_jax.hard_labels())}
  if taught:
    terms = {
      'kd': (0.9, kd_jax.soft_targets(temperature=4.0)),
      'ce': (0.1, kd_jax.hard_labels()),
    }
  objective = kd_jax.weighted_sum(terms)
  teacher_fn = adapters.from_linen(task.model) if taught else None
  step = kd_jax.make_train_step(
    student_fn, objective, tx, teacher_fn=teacher_fn, params_fn=params_fn
  )

  # One step, not a scan of them: XLA's loops on CPUs run convolutions slower.
  @functools.partial(jax.jit, donate_argnums=0)
  def one(state, train, rows, number, rng):
    batch = {k: v[rows] for k, v in train.items()}
    batch['epoch'] = jnp.full(BATCH, number)
    return step(state, task.preprocess(batch, train=True), rng)[0]

  def train(variables, teacher, seed):
    batch = next(task.calibration())
    teacher = {'teacher_fn': teacher_fn, 'teacher': teacher} if taught else {}
    state = kd_jax.init_state(
      student_fn, objective, tx, variables, batch, **teacher
    )
    rng, host = jax.random.key(seed), np.random.default_rng(seed)
    for number in range(epochs):
      order = host.permutation(len(task.train['id']))
      for i in range(0, task.steps * BATCH, BATCH):
        rows = order[i : i + BATCH]
        state = one(state, task.train, rows, np.int32(number), rng)
    return {'params': state.params, **state.model_state}

  return train
