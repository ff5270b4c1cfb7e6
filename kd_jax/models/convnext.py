"""ConvNeXt: a convolutional network shaped like a transformer.

Owns the network for ImageNet of Liu et al. and its blocks; transformers are in
`vit`.
"""

from collections.abc import Sequence

import jax
from flax import linen as nn

from kd_jax.models import layers

_INIT = nn.initializers.normal(0.02)


class LayerScale(nn.Module):
  """A learned factor for each channel, near 0 at the start.

  Attributes:
    initial: its first value.
    dtype: dtype of the result; the parameter is float32.

  References:
    Touvron et al., "Going deeper with Image Transformers", 2021,
    arXiv:2103.17239.

  Example:
    >>> x = jax.numpy.ones((1, 3))
    >>> y, _ = LayerScale(0.5).init_with_output(jax.random.key(0), x)
    >>> y.tolist()
    [[0.5, 0.5, 0.5]]
  """

  initial: float = 1e-6
  dtype: jax.typing.DTypeLike = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[..., D] -> [..., D]`."""
    initializer = nn.initializers.constant(self.initial)
    gamma = self.param('gamma', initializer, (x.shape[-1],))
    return x * gamma.astype(self.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class ConvNeXtBlock(nn.Module):
  """A depthwise 7x7 convolution, LayerNorm and a feed-forward, added to x.

  Taps: `conv`, `norm`, `dense1`, `dense2`, `scale` and `add`.

  Attributes:
    drop_path: the chance that an example skips the branch in training.
    layer_scale: first value of the branch's factors.
    dtype: dtype of the computation.

  Example:
    Where the factors are 0 the branch adds nothing:

    >>> x = jax.numpy.arange(8.0).reshape(1, 2, 2, 2)
    >>> block = ConvNeXtBlock(layer_scale=0.0)
    >>> y, _ = block.init_with_output(jax.random.key(0), x)
    >>> bool((y == x).all())
    True
  """

  drop_path: float = 0.0
  layer_scale: float = 1e-6
  dtype: jax.typing.DTypeLike = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, D] -> [B, H, W, D]`."""
    width = x.shape[-1]
    y = layers.convolution(
      'conv',
      width,
      7,
      groups=width,
      use_bias=True,
      kernel_init=_INIT,
      dtype=self.dtype,
    )(x)
    y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name='norm')(y)
    y = nn.Dense(4 * width, dtype=self.dtype, kernel_init=_INIT, name='dense1')(
      y
    )
    y = nn.gelu(y, approximate=False)
    y = nn.Dense(width, dtype=self.dtype, kernel_init=_INIT, name='dense2')(y)
    y = LayerScale(self.layer_scale, self.dtype, name='scale')(y)
    y = nn.Dropout(
      self.drop_path, broadcast_dims=(1, 2, 3), deterministic=not train
    )(y)
    return layers.Add(name='add')(x, y)


class ConvNeXt(nn.Module):
  """ConvNeXt for images of 224x224, which become 7x7.

  A 4x4 stem with stride 4, and stages of blocks with a LayerNorm and a 2x2
  convolution of stride 2 before all but the first.

  Taps: `stem` (before its norm), `stage1_block1`, ..., `stage4_block<n>`,
  `downsample2`, ..., `pool`, `head_norm` and `head`.

  Kernels start normal with deviation 0.02, biases at 0.

  Attributes:
    num_classes: size of the output; 0 returns the last feature map,
      `[B, H / 32, W / 32, widths[-1]]`.
    blocks: blocks of each stage.
    widths: channels of each stage.
    layer_scale: first value of the branches' factors.
    dropout: rate before the head.
    drop_path: stochastic depth: the chance that an example skips the last
      block's branch in training; it grows linearly from 0 in the first.
    dtype: dtype of the computation; parameters are float32.

  Raises:
    ValueError: if a stage has no block, or `blocks` and `widths` differ in
      length.

  References:
    Liu et al., "A ConvNet for the 2020s", 2022, arXiv:2201.03545.

  Example:
    >>> ConvNeXt(num_classes=10).taps.stages
    ('stage1_block3', 'stage2_block3', 'stage3_block9', 'stage4_block3')
  """

  num_classes: int = 1000
  blocks: Sequence[int] = (3, 3, 9, 3)
  widths: Sequence[int] = (96, 192, 384, 768)
  layer_scale: float = 1e-6
  dropout: float = 0.0
  drop_path: float = 0.0
  dtype: jax.typing.DTypeLike = 'float32'

  @property
  def taps(self) -> layers.Taps:
    """The stages are the resolutions; no activation follows a block."""
    stages = layers.last_blocks(self.blocks)
    return layers.Taps(
      stages=stages,
      preactivations=stages,
      norms=(),
      embedding='head_norm' if self.num_classes else '',
      head='head' if self.num_classes else '',
    )

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, 3]` images -> `[B, num_classes]` logits."""
    if min(self.blocks, default=0) < 1 or len(self.blocks) != len(self.widths):
      raise ValueError(
        f'ConvNeXt: blocks={tuple(self.blocks)}, widths={tuple(self.widths)}; '
        'every stage needs a width and at least one block.'
      )

    def shrink(x, name, width, factor):
      return nn.Conv(
        width,
        (factor, factor),
        strides=factor,
        padding='VALID',
        dtype=self.dtype,
        kernel_init=_INIT,
        name=name,
      )(x)

    def norm(x, name):
      return nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name=name)(x)

    done, total = 0, sum(self.blocks)
    for stage, (blocks, width) in enumerate(
      zip(self.blocks, self.widths, strict=True), start=1
    ):
      if stage == 1:
        x = norm(shrink(x, 'stem', width, 4), 'stem_norm')
      else:
        x = norm(x, f'downsample{stage}_norm')
        x = shrink(x, f'downsample{stage}', width, 2)
      for block in range(1, blocks + 1):
        x = ConvNeXtBlock(
          drop_path=self.drop_path * done / max(total - 1, 1),
          layer_scale=self.layer_scale,
          dtype=self.dtype,
          name=f'stage{stage}_block{block}',
        )(x, train)
        done += 1
    if not self.num_classes:
      return x
    x = norm(layers.GlobalAveragePool(name='pool')(x), 'head_norm')
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(
      self.num_classes, dtype=self.dtype, kernel_init=_INIT, name='head'
    )(x)
