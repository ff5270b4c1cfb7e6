"""Every method of distillation on Fashion-MNIST, over five seeds.

  kd-jax compare --config configs/compare_fashion_mnist.py \\
      --workdir runs/compare_fashion_mnist --config.data.data_dir=DIR

A ResNet-20 teaches a ResNet-8, networks of the CIFAR benchmarks, each for 30
epochs of all images. Data: TFDS `fashion_mnist`; DIR holds it prepared, without
it TFDS downloads (`kd_jax[tfds]`). Weights are chosen as in
`compare_digits.py`, which also says what is missing; FSP is here, as both
networks are equally wide.

Cost: 42 methods, most of them trained seven times, 30 epochs of 54,000 images
each: for an accelerator. No table was made yet. For an afternoon on a CPU take
fewer of everything: `--config.methods="('alone', 'kd', 'at')"
--config.seeds=3 --config.data.train_examples=2000`.
`configs/compare_fashion_mnist.py:tiny` takes seconds and three methods.
"""

import pathlib
import runpy

import ml_collections

_DIGITS = pathlib.Path(__file__).with_name('compare_digits.py')


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The comparison; `variant` is '' or 'tiny'."""
  config = runpy.run_path(str(_DIGITS))['get_config'](variant)
  tiny = variant == 'tiny'
  config.data.name = 'fashion_mnist'
  config.data.crop_padding = 2
  config.data.flip = True
  config.data.train_examples = 64 if tiny else 0
  config.overrides = ml_collections.ConfigDict()
  if not tiny:
    config.teacher.model = ml_collections.ConfigDict({'name': 'resnet20'})
    config.student.model = ml_collections.ConfigDict({'name': 'resnet8'})
    config.methods = (*config.methods, 'fsp')
  for part in (config.teacher, config.distill):
    part.train.epochs = 1 if tiny else 30
    part.train.batch_size = 32 if tiny else 128
  return config
