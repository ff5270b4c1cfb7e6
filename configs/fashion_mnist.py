"""Fashion-MNIST: a ResNet-14 teaches a narrow ResNet-8, pruned and int8.

  kd-jax run --config configs/fashion_mnist.py --workdir runs/fashion_mnist

Data: TFDS `fashion_mnist`; `--config.data.data_dir=DIR` names a directory
that holds it prepared, otherwise TFDS downloads it (`kd_jax[tfds]`). The
schedules are short, so that the recipe ends within the hour on two CPU cores;
the README gives the result and the wall time. On an accelerator raise the
four `epochs`. `configs/fashion_mnist.py:tiny` takes seconds.
"""

import ml_collections

from kd_jax import defaults


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The recipe; `variant` is '' or 'tiny'."""
  tiny = defaults.is_tiny(variant)
  config = defaults.get_config(tiny=tiny)
  config.data.name = 'fashion_mnist'
  config.data.crop_padding = 1
  config.data.flip = True
  config.teacher.model = ml_collections.ConfigDict(
    {'name': 'resnet', 'depth': 8 if tiny else 14, 'width': 6 if tiny else 16}
  )
  config.student.model = ml_collections.ConfigDict(
    {'name': 'resnet', 'depth': 8, 'width': 2 if tiny else 6}
  )
  for stage in defaults.TRAINED:
    train = config[stage].train
    epochs = 3 if stage == 'teacher' else 8
    train.epochs = 1 if tiny else epochs
    train.batch_size = 64 if tiny else 128
    train.evaluate_every_epochs = 1
  # Of 1, 2 and 4 the best on the validation split; at the digits' 4 the student
  # learns less than alone.
  for stage in ('distill', 'compress'):
    config[stage].terms.kd.temperature = 2.0
  config.aims.teacher = 0.92
  return config
