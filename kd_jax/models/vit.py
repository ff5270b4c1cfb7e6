"""Vision transformers: ViT, and DeiT with its distillation token.

Owns the pre-norm encoder with a class token and learned positions. Everything
that a loss compares or a quantizer rounds is the output of a submodule:
projections, queries, keys and values by head, attention scores and
probabilities, and the hidden states.

In the shape descriptions L is the number of tokens, D the width, N the number
of heads and d = D / N.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from kd_jax.models import layers

_INIT = nn.initializers.normal(0.02)


class Tokens(nn.Module):
  """Class tokens before the patches, plus a learned position for each.

  Attributes:
    distilled: whether a distillation token follows the class token.
    dtype: dtype of the result; parameters are float32.

  Example:
    >>> block = Tokens(distilled=True)
    >>> x = jax.ShapeDtypeStruct((2, 16, 8), 'float32')
    >>> y, _ = jax.eval_shape(block.init_with_output, jax.random.key(0), x)
    >>> y.shape
    (2, 18, 8)
  """

  distilled: bool = False
  dtype: jax.typing.DTypeLike = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, patches, D] -> [B, L, D]`."""
    batch, patches, width = x.shape
    names = ('cls_token', 'dist_token')[: 1 + self.distilled]
    tokens = [self.param(name, _INIT, (1, 1, width)) for name in names]
    shape = (1, patches + len(names), width)
    positions = self.param('pos_embed', _INIT, shape)
    first = [jnp.broadcast_to(t, (batch, 1, width)) for t in tokens]
    x = jnp.concatenate([t.astype(self.dtype) for t in first] + [x], axis=1)
    return x + positions.astype(self.dtype)


class Token(nn.Module):
  """One token of a sequence: `[B, L, D] -> [B, D]`.

  Attributes:
    position: which one.

  Example:
    >>> x = jnp.arange(6.0).reshape(1, 3, 2)
    >>> Token(1).apply({}, x).tolist()
    [[2.0, 3.0]]
  """

  position: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return x[:, self.position]


class SplitHeads(nn.Module):
  """A projection by head: `[B, L, D] -> [B, L, N, d]`.

  Attributes:
    heads: N, which divides D.

  Example:
    >>> SplitHeads(2).apply({}, jnp.arange(4).reshape(1, 1, 4)).tolist()
    [[[[0, 1], [2, 3]]]]
  """

  heads: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-1], self.heads, -1)


class Scores(nn.Module):
  """Scaled dot products of queries and keys, before the softmax.

  `[B, L, N, d]` twice -> `[B, N, L, L]`, a row for each query.

  Example:
    >>> queries = 3 * jnp.ones((1, 2, 1, 4))
    >>> Scores().apply({}, queries, jnp.ones((1, 2, 1, 4))).tolist()
    [[[[6.0, 6.0], [6.0, 6.0]]]]
  """

  @nn.compact
  def __call__(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
    scale = queries.shape[-1] ** -0.5
    return jnp.einsum('bqnd,bknd->bnqk', queries * scale, keys)


class Probabilities(nn.Module):
  """The softmax of scores over the keys, computed in float32.

  The result has the dtype of the scores.

  Example:
    >>> p = Probabilities().apply({}, jnp.log(jnp.array([1.0, 3.0])))
    >>> [round(float(x), 4) for x in p]
    [0.25, 0.75]
  """

  @nn.compact
  def __call__(self, scores: jax.Array) -> jax.Array:
    return nn.softmax(scores.astype(jnp.float32)).astype(scores.dtype)


class Context(nn.Module):
  """Values weighted by attention, heads side by side: the input of `out`.

  `[B, N, L, L]` and `[B, L, N, d]` -> `[B, L, D]`.

  Example:
    >>> p = jnp.array([[[[0.5, 0.5], [0.0, 1.0]]]])
    >>> Context().apply({}, p, jnp.array([[[[2.0]], [[4.0]]]])).tolist()
    [[[3.0], [4.0]]]
  """

  @nn.compact
  def __call__(self, probabilities: jax.Array, values: jax.Array) -> jax.Array:
    x = jnp.einsum('bnqk,bknd->bqnd', probabilities, values)
    return x.reshape(*x.shape[:2], -1)


class Attention(nn.Module):
  """Multi-head self-attention.

  Taps: `query`, `key` and `value`, the projections `[B, L, D]`; `queries`,
  `keys` and `values`, the same by head `[B, L, N, d]`; `scores` and
  `probabilities`, `[B, N, L, L]`; `context` and `out`, `[B, L, D]`.

  Attributes:
    heads: number of heads; it divides the width.
    dropout: rate after `out`.
    attention_dropout: rate of the probabilities.
    dtype: dtype of the computation.

  Example:
    >>> x = jax.ShapeDtypeStruct((2, 5, 8), 'float32')
    >>> _, state = jax.eval_shape(
    ...   lambda x: Attention(heads=2).init_with_output(
    ...     jax.random.key(0), x, capture_intermediates=True, mutable=True), x)
    >>> state['intermediates']['scores']['__call__'][0].shape
    (2, 2, 5, 5)
  """

  heads: int
  dropout: float = 0.0
  attention_dropout: float = 0.0
  dtype: jax.typing.DTypeLike = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, L, D] -> [B, L, D]`."""
    dense = functools.partial(
      nn.Dense, x.shape[-1], dtype=self.dtype, kernel_init=_INIT
    )
    queries = SplitHeads(self.heads, name='queries')(dense(name='query')(x))
    keys = SplitHeads(self.heads, name='keys')(dense(name='key')(x))
    values = SplitHeads(self.heads, name='values')(dense(name='value')(x))
    scores = Scores(name='scores')(queries, keys)
    p = Probabilities(name='probabilities')(scores)
    p = nn.Dropout(self.attention_dropout, deterministic=not train)(p)
    x = dense(name='out')(Context(name='context')(p, values))
    return nn.Dropout(self.dropout, deterministic=not train)(x)


class FeedForward(nn.Module):
  """`dense1`, exact GELU and `dense2`, applied to each token.

  Attributes:
    hidden: width of `dense1`.
    dropout: rate after each dense layer.
    dtype: dtype of the computation.

  Example:
    >>> x = jax.ShapeDtypeStruct((2, 5, 8), 'float32')
    >>> shapes = jax.eval_shape(FeedForward(32).init, jax.random.key(0), x)
    >>> [shapes['params'][f'dense{i}']['kernel'].shape for i in (1, 2)]
    [(8, 32), (32, 8)]
  """

  hidden: int
  dropout: float = 0.0
  dtype: jax.typing.DTypeLike = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[..., D] -> [..., D]`."""
    dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=_INIT)
    drop = nn.Dropout(self.dropout, deterministic=not train)
    y = drop(nn.gelu(dense(self.hidden, name='dense1')(x), approximate=False))
    return drop(dense(x.shape[-1], name='dense2')(y))


class EncoderBlock(nn.Module):
  """Attention and feed-forward, each after a LayerNorm and added to its input.

  Taps: `norm1`, `attention`, `add1`, `norm2`, `mlp` and `add2`.

  Attributes:
    heads: see `Attention`.
    hidden: see `FeedForward`.
    dropout: see both.
    attention_dropout: see `Attention`.
    drop_path: the chance that an example skips a branch in training.
    dtype: dtype of the computation.

  Example:
    >>> block = EncoderBlock(heads=2, hidden=32)
    >>> x = jax.ShapeDtypeStruct((2, 5, 8), 'float32')
    >>> y, _ = jax.eval_shape(block.init_with_output, jax.random.key(0), x)
    >>> y.shape
    (2, 5, 8)
  """

  heads: int
  hidden: int
  dropout: float = 0.0
  attention_dropout: float = 0.0
  drop_path: float = 0.0
  dtype: jax.typing.DTypeLike = 'float32'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, L, D] -> [B, L, D]`."""
    norm = functools.partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)
    drop_path = nn.Dropout(
      self.drop_path, broadcast_dims=(1, 2), deterministic=not train
    )
    y = Attention(
      self.heads,
      dropout=self.dropout,
      attention_dropout=self.attention_dropout,
      dtype=self.dtype,
      name='attention',
    )(norm(name='norm1')(x), train)
    x = layers.Add(name='add1')(x, drop_path(y))
    y = FeedForward(self.hidden, self.dropout, self.dtype, name='mlp')(
      norm(name='norm2')(x), train
    )
    return layers.Add(name='add2')(x, drop_path(y))


class ViT(nn.Module):
  """A vision transformer; with `distilled`, DeiT with its second token.

  Taps: `patch`, the patches' projection; `tokens`, the first hidden states;
  `block1`, ..., `block<depth>`, the next ones, and in each block what
  `EncoderBlock` and `Attention` name, such as `block1/attention/scores`;
  `norm`; `class_token`, `[B, D]`; `head`; and with `distilled` also
  `distillation_token` and `head_dist`.

  A distilled model has two linear heads, one on each token. It returns the
  average of their logits, in training too; a loss that treats them apart
  reads the taps `head` and `head_dist`.

  Kernels, tokens and positions start normal with deviation 0.02, biases at 0.

  Attributes:
    num_classes: size of the output; 0 returns all tokens after the last norm,
      `[B, L, D]`.
    patch_size: side of a patch in pixels; L is `(H / patch_size) *
      (W / patch_size)` and 1, or 2 with `distilled`.
    width: D.
    depth: number of blocks.
    heads: number of heads; it divides `width`.
    mlp_ratio: hidden width of the feed-forward, in multiples of D.
    distilled: whether there is a distillation token.
    dropout: rate after the positions and in every block.
    attention_dropout: rate of the attention probabilities.
    drop_path: stochastic depth: the chance that an example skips a branch of
      the last block in training; it grows linearly from 0 in the first.
    dtype: dtype of the computation; parameters are float32.

  Raises:
    ValueError: if patches do not tile the image, or heads the width.

  References:
    Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image
    Recognition at Scale", 2020, arXiv:2010.11929; Touvron et al., "Training
    data-efficient image transformers & distillation through attention", 2020,
    arXiv:2012.12877, for the distillation token.

  Example:
    >>> ViT(num_classes=10, depth=12).taps.stages
    ('block3', 'block6', 'block9', 'block12')
  """

  num_classes: int = 1000
  patch_size: int = 16
  width: int = 192
  depth: int = 12
  heads: int = 3
  mlp_ratio: int = 4
  distilled: bool = False
  dropout: float = 0.0
  attention_dropout: float = 0.0
  drop_path: float = 0.0
  dtype: jax.typing.DTypeLike = 'float32'

  @property
  def taps(self) -> layers.Taps:
    """The stages are the blocks at each quarter of the depth."""
    ends = sorted({-(-self.depth * i // 4) for i in (1, 2, 3, 4)})
    stages = tuple(f'block{i}' for i in ends)
    return layers.Taps(
      stages=stages,
      preactivations=stages,
      norms=(),
      embedding='class_token' if self.num_classes else '',
      head='head' if self.num_classes else '',
    )

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, 3]` images -> `[B, num_classes]` logits."""
    size = self.patch_size
    if x.shape[1] % size or x.shape[2] % size:
      raise ValueError(
        f'ViT: patches of patch_size={size} do not tile images of '
        f'{x.shape[1]}x{x.shape[2]}.'
      )
    if self.width % self.heads:
      raise ValueError(
        f'ViT: heads={self.heads} does not divide width={self.width}.'
      )
    x = nn.Conv(
      self.width,
      (size, size),
      strides=size,
      padding='VALID',
      dtype=self.dtype,
      kernel_init=_INIT,
      name='patch',
    )(x)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    x = Tokens(self.distilled, self.dtype, name='tokens')(x)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    for i in range(1, self.depth + 1):
      x = EncoderBlock(
        self.heads,
        hidden=self.mlp_ratio * self.width,
        dropout=self.dropout,
        attention_dropout=self.attention_dropout,
        drop_path=self.drop_path * (i - 1) / max(self.depth - 1, 1),
        dtype=self.dtype,
        name=f'block{i}',
      )(x, train)
    x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name='norm')(x)
    if not self.num_classes:
      return x
    head = functools.partial(
      nn.Dense, self.num_classes, dtype=self.dtype, kernel_init=_INIT
    )
    logits = head(name='head')(Token(0, name='class_token')(x))
    if not self.distilled:
      return logits
    token = Token(1, name='distillation_token')(x)
    return (logits + head(name='head_dist')(token)) / 2
