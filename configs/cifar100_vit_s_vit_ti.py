"""CIFAR-100: a ViT of width 384 teaches one of width 192.

  kd-jax run --config configs/cifar100_vit_s_vit_ti.py \\
      --workdir runs/vit_s_vit_ti
  kd-jax plan --config configs/cifar100_vit_s_vit_ti.py \\
      --topology v5e:4x4 --config.distill.train.batch_size=1024

The blocks of ViT-S and ViT-Ti (Dosovitskiy et al., arXiv:2010.11929; Touvron
et al., arXiv:2012.12877), six of them, on patches of 4x4 pixels. Schedules are
ours: AdamW with a cosine and warm-up, 200 epochs in batches of 256, plain KD.
No accuracies are published for this pair and none were measured: what it is for
is a pair of transformers at CIFAR's size. Data: TFDS `cifar100`;
`--config.data.data_dir=DIR` names a directory that holds it prepared. `:tiny`
takes seconds.

  network       parameters    multiply-accumulates
  teacher       10,730,212             710,780,928
  student        2,710,948             182,866,944
"""

import ml_collections

from kd_jax import defaults

_STATISTICS = {
  'mean': (0.5071, 0.4867, 0.4408),
  'std': (0.2675, 0.2565, 0.2761),
}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The recipe; `variant` is '' or 'tiny'."""
  tiny = defaults.is_tiny(variant)
  config = defaults.get_config(tiny=tiny)
  config.data.update(_STATISTICS)
  config.data.name = 'cifar100'
  config.data.crop_padding = 4
  config.data.flip = True
  config.data.max_examples = 64 if tiny else 0
  config.eval_batch_size = 32 if tiny else 500
  shape = {'name': 'vit', 'patch_size': 8 if tiny else 4}
  shape['depth'] = 2 if tiny else 6
  for part, heads in ((config.teacher, 6), (config.student, 3)):
    width = 8 * heads if tiny else 64 * heads
    part.model = ml_collections.ConfigDict(
      shape | {'width': width, 'heads': heads}
    )
  for stage in defaults.TRAINED:
    train = config[stage].train
    train.epochs = 1 if tiny else 60 if stage == 'compress' else 200
    train.batch_size = 16 if tiny else 256
    train.learning_rate = 2e-4 if stage == 'compress' else 1e-3
    train.optimizer = {'name': 'adamw', 'l2': 5e-2}
    train.warmup = 0.05
    train.evaluate_every_epochs = 10
  config.aims.update({'teacher': 0.6, 'parameter_share': 0.5})
  return config
