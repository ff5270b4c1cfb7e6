"""Every method of distillation on Fashion-MNIST, over five seeds.

  kd-jax compare --config configs/compare_fashion_mnist.py \\
      --workdir runs/compare_fashion_mnist --config.data.data_dir=DIR

A ResNet-20 teaches a ResNet-8, networks of the CIFAR benchmarks, each for 30
epochs of all images. Data: TFDS `fashion_mnist`; DIR holds it prepared, without
it TFDS downloads (`kd_jax[tfds]`). Weights are chosen as in
`compare_digits.py`, which also says what is missing; FSP is here, as both
networks are equally wide.

Cost: all methods, most of them trained seven times, 30 epochs of 54,000 images
each: for an accelerator. No table was made yet. For an afternoon on a CPU take
fewer of everything: `--config.methods="('alone', 'kd', 'at')"
--config.seeds=3 --config.data.train_examples=2000`.
`configs/compare_fashion_mnist.py:tiny` takes seconds and three methods.
"""

import ml_collections

from kd_jax import defaults


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The comparison; `variant` is '' or 'tiny'."""
  tiny = defaults.is_tiny(variant)
  config = defaults.comparison(tiny=tiny)
  config.data.name = 'fashion_mnist'
  config.data.crop_padding = 2
  config.data.flip = True
  config.data.train_examples = 64 if tiny else 0
  config.method_options = ml_collections.ConfigDict()
  if tiny:
    config.teacher.model = {'name': 'cnn', 'widths': (8, 8)}
    config.student.model = {'name': 'cnn', 'widths': (2, 4)}
  else:
    config.teacher.model = {'name': 'resnet20'}
    config.student.model = {'name': 'resnet8'}
    config.methods = (*config.methods, 'fsp')
  for part in (config.teacher, config.distill):
    part.train.epochs = 1 if tiny else 30
    part.train.batch_size = 32 if tiny else 128
    part.train.evaluate_every_epochs = 100
  return config
