"""Rescaled channels that quantize better: equalisation and SmoothQuant.

Owns the choice of scales that leave the network's function as it is; where
there are such scales is found by `channels`. Do this before calibration: the
ranges of activations change.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import rules as rules_lib
from kd_jax.placement import replicated
from kd_jax.quantize import record
from kd_jax.quantize.channels import FreeScale, free_scales
from kd_jax.types import Batch, Variables

# Rounds of the equalisation of all pairs: in chains the ranges meet by then.
_ROUNDS = 20


def equalize(
  forward: Callable[..., Any], variables: Variables, batch: Batch
) -> dict[str, Any]:
  """Cross-layer equalisation: consecutive kernels get equal channel ranges.

  With r1[i] = max |W1| of output channel i and r2[i] = max |W2| of the weights
  that read it, W1[i] and b1[i] are multiplied by sqrt(r2[i] / r1[i]) and W2
  is divided by it, so that both ranges become sqrt(r1[i] r2[i]). Pairs are
  visited in the order of the computation, again and again: in a chain
  such as convolution, depthwise, convolution all ranges meet.

  A pair is a Conv or Dense and all kernels that read its output, with nothing
  but ReLU, leaky ReLU, PReLU, pooling, reshapes and biases between. Pairs
  with ReLU6 are left out: its cap would have to be a parameter of each
  channel. Channels without any weight on one side keep their scale. It serves
  weights with one scale per tensor; weights with a scale per output channel
  gain little.

  Args:
    forward: `(variables, batch) -> Forward` in evaluation mode; of linen,
      nnx or a plain function.
    variables: its variables with BatchNorm folded; layers before a BatchNorm
      that is not are left as they are.
    batch: one batch; only its shapes and dtypes matter.

  Returns:
    New variables; the network computes the same up to rounding.

  References:
    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
    Correction", 2019, arXiv:1906.04721, section 4.1.

  Example:
    >>> from kd_jax.types import Forward
    >>> def forward(variables, batch):
    ...   p = variables['params']
    ...   return Forward(jax.nn.relu(batch['x'] @ p['a']) @ p['b'])
    >>> params = {'a': jnp.array([[4.0, 1.0]]), 'b': jnp.array([[1.0], [4.0]])}
    >>> x = {'x': jnp.ones((1, 1))}
    >>> equalize(forward, {'params': params}, x)['params']['a'].tolist()
    [[2.0, 2.0]]
  """
  pairs = [
    scale
    for scale in free_scales(forward, variables, batch)
    if scale.kind == 'layer'
  ]
  if not pairs:
    return dict(variables)

  @jax.jit
  def run(leaves):
    def visit(_, leaves):
      for pair in pairs:
        leaves = rescale(leaves, pair, _equalising(leaves, pair))
      return leaves

    wide = {k: v.astype(jnp.float32) for k, v in leaves.items()}
    wide = jax.lax.fori_loop(0, _ROUNDS, visit, wide)
    return {k: v.astype(leaves[k].dtype) for k, v in wide.items()}

  return _replace(variables, run(_leaves(variables, pairs)))


def _equalising(leaves: Mapping[str, jax.Array], pair: FreeScale) -> jax.Array:
  kernel, channels = next(iter(pair.multiplied.items()))
  first = channel_maxima(leaves[kernel], channels, pair)
  second = _read_maxima(leaves, pair)
  both = (first > 0) & (second > 0)
  ratio = jnp.where(both, second, 1.0) / jnp.where(both, first, 1.0)
  return jnp.sqrt(ratio)


def smooth(
  make_forward: record.MakeForward,
  variables: Variables,
  batches: Iterable[Batch],
  *,
  alpha: float = 0.5,
) -> dict[str, Any]:
  """SmoothQuant: moves outliers of activations into the weights.

  t[j] = max |X[j]|**alpha / max |W[j]|**(1 - alpha), at least 1e-5, with
  max |W[j]| over all kernels that read channel j, itself at least 1e-5. The
  activations are divided by t where they arise: in the scale and bias of the
  LayerNorm or BatchNorm, or in the kernel and bias of the layer, whose output
  reaches these kernels only; W[j] is multiplied by t[j]. In a transformer
  these are the norms before queries, keys and values and before the
  feed-forward; what follows a GELU or an attention is left as it is.

  Args:
    make_forward: `(*interceptors) -> forward` in evaluation mode; see `record`.
    variables: the model's variables.
    batches: a handful of pre-processed batches; each is read once.
    alpha: in [0, 1]; how much of the outliers moves. 0.5 is the paper's.

  Returns:
    New variables; the network computes the same up to rounding. Layers in a
    scan have scales of their own if its norms and kernels are stacked.

  Raises:
    ValueError: without any batch, or for another alpha.

  References:
    Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training
    Quantization for Large Language Models", 2022, arXiv:2211.10438.

  Example:
    >>> from flax import linen as nn
    >>> from kd_jax import adapters
    >>> model = nn.Sequential([nn.LayerNorm(), nn.Dense(2)])
    >>> make_forward = lambda *given: adapters.from_linen(
    ...   model, interceptors=given, train_argument=None)
    >>> x = jnp.array([[-1.0, 3.0, 0.5]])
    >>> variables = model.init(jax.random.key(0), x)
    >>> got = smooth(make_forward, variables, [{'image': x}])
    >>> np.allclose(*(model.apply(v, x) for v in (variables, got)), atol=1e-5)
    True
  """
  if not 0 <= alpha <= 1:
    raise ValueError(f'smooth: alpha is in [0, 1], not {alpha}.')
  batches = list(batches)
  if not batches:
    raise ValueError('There is no batch to smooth with.')
  found = free_scales(make_forward(), variables, batches[0])
  axes = {
    _layer(kernel): reader.axis
    for scale in found
    for kernel, reader in scale.divided.items()
  }
  if not axes:
    return dict(variables)

  def maxima(module, path, x, y):
    if path not in axes:
      return None
    kept = axes[path] % x.ndim
    others = tuple(i for i in range(x.ndim) if i != kept)
    return jnp.max(jnp.abs(x.astype(jnp.float32)), axis=others)

  forward = make_forward(record.record('maximum', maxima))
  observe = jax.jit(lambda v, b: record.measure(forward, v, b, 'maximum'))
  seen = None
  for batch in batches:
    now = observe(dict(variables), batch)
    seen = now if seen is None else jax.tree.map(jnp.maximum, seen, now)

  @jax.jit
  def run(leaves, seen):
    new = {k: v.astype(jnp.float32) for k, v in leaves.items()}
    for scale in found:
      x = jnp.zeros(())
      for kernel, reader in scale.divided.items():
        here = _by_channel(seen[_layer(kernel)], reader.inputs, scale)
        x = jnp.maximum(x, here)
      w = jnp.maximum(_read_maxima(new, scale), 1e-5)
      t = jnp.maximum(x**alpha / w ** (1 - alpha), 1e-5)
      new = rescale(new, scale, 1 / t)
    return {k: v.astype(leaves[k].dtype) for k, v in new.items()}

  return _replace(variables, run(_leaves(variables, found), seen))


def _layer(kernel: str) -> str:
  return kernel.removeprefix('params/').rpartition('/')[0]


def rescale(
  leaves: Mapping[str, jax.Array], scale: FreeScale, factor: jax.Array
) -> dict[str, jax.Array]:
  """Multiplies channels where they arise and divides where they are read.

  Args:
    leaves: variables by '/'-joined path.
    scale: which channels.
    factor: float32 `[..., C]` > 0, with the stacked axes in front.

  Returns:
    All leaves, those that `scale` names changed.
  """
  # Whole on every device: what it scales keeps a sharding of its own.
  new, factor = dict(leaves), replicated(factor)
  for name, channels in scale.multiplied.items():
    new[name] = new[name] * _expand(factor, channels, new[name].ndim)
  for name, reader in scale.divided.items():
    new[name] = new[name] / _expand(factor, reader.channels, new[name].ndim)
  return new


def _expand(factor: jax.Array, channels: np.ndarray, rank: int) -> jax.Array:
  stack = factor.shape[:-1]
  chosen = factor
  if not np.array_equal(channels.reshape(-1), np.arange(factor.shape[-1])):
    chosen = jnp.take(factor, channels.reshape(-1), axis=-1)
  ones = (1,) * (rank - len(stack) - channels.ndim)
  return chosen.reshape(stack + ones + channels.shape)


def channel_maxima(
  w: jax.Array, channels: np.ndarray, scale: FreeScale
) -> jax.Array:
  """The largest magnitude of each channel's weights, `[..., C]`.

  Args:
    w: a kernel, with stacked axes in front.
    channels: the channel of each weight; see `FreeScale`.
    scale: for the number of channels and of stacked axes.
  """
  alike = [i for i, size in enumerate(channels.shape) if size == 1]
  axes = tuple(scale.stacked + i for i in alike)
  largest = replicated(jnp.max(jnp.abs(w), axis=axes))
  return _by_channel(
    largest.reshape(*w.shape[: scale.stacked], -1), channels, scale
  )


def _by_channel(
  values: jax.Array, channels: np.ndarray, scale: FreeScale
) -> jax.Array:
  """`[..., n]` values >= 0 -> the largest of each channel, `[..., C]`."""
  index = channels.reshape(-1)
  if np.array_equal(index, np.arange(scale.size)):
    return values
  empty = jnp.zeros((*values.shape[:-1], scale.size), values.dtype)
  return empty.at[..., index].max(values)


def _read_maxima(
  leaves: Mapping[str, jax.Array], scale: FreeScale
) -> jax.Array:
  maxima = [
    channel_maxima(leaves[name], reader.channels, scale)
    for name, reader in scale.divided.items()
  ]
  return jnp.max(jnp.stack(maxima), axis=0)


def _leaves(
  variables: Variables, scales: Sequence[FreeScale]
) -> dict[str, jax.Array]:
  named = rules_lib.named_leaves(dict(variables))
  used = {n for s in scales for n in (*s.multiplied, *s.divided)}
  return {name: named[name] for name in named if name in used}


def _replace(
  variables: Variables, new: Mapping[str, jax.Array]
) -> dict[str, Any]:
  leaves, structure = jax.tree.flatten(dict(variables))
  names = rules_lib.leaf_names(dict(variables))
  return jax.tree.unflatten(
    structure,
    (new.get(name, leaf) for name, leaf in zip(names, leaves, strict=True)),
  )
