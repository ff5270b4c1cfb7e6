"""What of a teacher's outputs is kept, as arrays with one row an example.

Owns the way from a forward to stored arrays and back to a forward that a loss
can read; files are `teacher_cache`. Pure functions, for inside of jit.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import rules
from kd_jax.types import CACHED, Batch, Forward, Variables

DTYPES = dict.fromkeys(('float16', 'bfloat16', 'float32'))
OUTPUT = f'{CACHED}output'
TOP_VALUES = f'{CACHED}top_values'
TOP_CLASSES = f'{CACHED}top_classes'
TAIL = f'{CACHED}tail'
FEATURES = f'{CACHED}features/'


@dataclasses.dataclass(frozen=True)
class Form:
  """How a teacher's outputs are kept.

  Attributes:
    dtype: of all numbers: float16 (11 bits, up to 65504), bfloat16 (8 bits) or
      float32.
    top_k: how many of the largest outputs are kept; 0 for all. The others are
      replaced by one number, see `unpack`.
    temperature: T > 0 of a softmax in which that number keeps their total
      probability.
    features: the taps that are kept besides.

  Raises:
    ValueError: for another dtype, or a number out of range.

  Example:
    >>> stored = pack(Forward(jnp.ones((2, 10))), Form(top_k=3))
    >>> {name.removeprefix(CACHED): x.shape for name, x in stored.items()}
    {'top_values': (2, 3), 'top_classes': (2, 3), 'tail': (2,)}
  """

  dtype: str = 'float16'
  top_k: int = 0
  temperature: float = 1.0
  features: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    rules.choose('dtype of a teacher cache', self.dtype, DTYPES)
    if self.top_k < 0:
      raise ValueError(f'top_k is {self.top_k}; it must not be negative.')
    if not self.temperature > 0:
      raise ValueError(f'temperature is {self.temperature}; it must be > 0.')


DEFAULT = Form()


class Entries:
  """What a cache adds to a batch, and the teacher that is read from there.

  Args:
    form: what is kept of the teacher.
    arrays: name of an entry -> `dtype`, and `shape` of one row; see `describe`.
    classes: outputs of the teacher.
  """

  def __init__(self, form: Form, arrays: Mapping[str, Any], classes: int):
    self.form, self.arrays, self.classes = form, arrays, classes

  def forward(
    self,
    variables: Variables,
    batch: Batch,
    rng: jax.Array | None = None,
    *,
    train: bool = False,
  ) -> Forward:
    """The teacher as a function of a batch that carries its outputs.

    Takes the place of the teacher's function; what else it is given is
    ignored. See `unpack`.
    """
    del variables, rng, train
    return unpack(batch, classes=self.classes)

  def placeholder(self, size: int = 1) -> dict[str, np.ndarray]:
    """Zeros in the shapes of the entries of a batch.

    Args:
      size: examples in the batch.
    """
    return {
      name: np.zeros((size, *about['shape']), jnp.dtype(about['dtype']))
      for name, about in self.arrays.items()
    }


def describe(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """name -> dtype, and shape of one row, of arrays `[B, ...]` or shapes."""
  return {
    name: {'dtype': str(x.dtype), 'shape': list(x.shape[1:])}
    for name, x in arrays.items()
  }


def pack(forward: Forward, form: Form) -> dict[str, jax.Array]:
  """The arrays that are stored for a batch.

  Args:
    forward: of the teacher, with at least the features of the form.
    form: what to keep.

  Returns:
    name -> `[B, ...]`; the names are those of entries of a batch.

  Raises:
    ValueError: if the outputs are not more than `top_k`, or a feature is
      missing.

  Example:
    >>> stored = pack(Forward(jnp.ones((2, 10))), Form())
    >>> {name: (x.shape, str(x.dtype)) for name, x in stored.items()}
    {'teacher/output': ((2, 10), 'float16')}
  """
  dtype, output = jnp.dtype(form.dtype), forward.output.astype(jnp.float32)
  packed = {OUTPUT: output.astype(dtype)}
  if form.top_k:
    packed = _pack_top(output, form, dtype)
  for name in form.features:
    if name not in forward.features:
      raise ValueError(
        f'The teacher has no feature {name!r}, '
        f'{rules.near_misses(name, forward.features)}'
      )
    packed[FEATURES + name] = forward.features[name].astype(dtype)
  return packed


def _pack_top(
  output: jax.Array, form: Form, dtype: Any
) -> dict[str, jax.Array]:
  classes, k = output.shape[-1], form.top_k
  if k >= classes:
    raise ValueError(
      f'top_k is {k}, but the teacher has {classes} outputs: keep all of them '
      'with 0.'
    )
  values, index = jax.lax.top_k(output, k)
  values = values.astype(dtype)
  t = form.temperature
  others = _scattered(output / t, index, jnp.full(values.shape, -jnp.inf))
  tail = t * (jax.nn.logsumexp(others, axis=-1) - math.log(classes - k))
  # Rounding must not lift the tail to the last of the top k.
  last = values[..., -1].astype(jnp.float32)
  tail = jnp.minimum(tail, last - (jnp.abs(last) + 1) * 2.0**-10)
  small = classes <= 2**16
  return {
    TOP_VALUES: values,
    TOP_CLASSES: index.astype(jnp.uint16 if small else jnp.int32),
    TAIL: tail,
  }


def _scattered(x: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
  """`x` `[..., C]` with `values` `[..., k]` at `index`, row by row."""

  def put(row, at, new):
    return row.at[at].set(new.astype(row.dtype))

  # As a batched scatter, which leaves rows on the devices where they are.
  scatter = put
  for _ in range(x.ndim - 1):
    scatter = jax.vmap(scatter)
  return scatter(x, index, values)


def unpack(batch: Batch, *, classes: int) -> Forward:
  """The teacher's forward, from what a batch carries of it.

  Of the k largest outputs alone, the others all get the same value: that with
  which softmax(output / T) gives them their total probability at the T of the
  form. Targets among the k classes, divided by their sum, are thus right at any
  temperature, and those spread evenly over the others at T.

  Args:
    batch: with the arrays of `pack`.
    classes: C, outputs of the teacher.

  Returns:
    output and features in float32.

  Raises:
    ValueError: if the batch carries none of it.

  Example:
    >>> stored = pack(Forward(jnp.array([[3.0, 1.0, 2.0, 1.0]])), Form(top_k=2))
    >>> unpack(stored, classes=4).output.tolist()
    [[3.0, 1.0, 2.0, 1.0]]
  """
  features = {
    name.removeprefix(FEATURES): x.astype(jnp.float32)
    for name, x in batch.items()
    if name.startswith(FEATURES)
  }
  if OUTPUT in batch:
    return Forward(batch[OUTPUT].astype(jnp.float32), features)
  if TOP_VALUES not in batch:
    raise ValueError(
      f'The batch has no {OUTPUT!r}: this teacher is read from a cache, which '
      'holds its outputs for the images of the batch and for no others. Terms '
      'that run the teacher again, such as input_gradients, need the live '
      'one.'
    )
  shape = (*batch[TAIL].shape, classes)
  tail = jnp.broadcast_to(batch[TAIL][..., None], shape)
  index = batch[TOP_CLASSES].astype(jnp.int32)
  return Forward(_scattered(tail, index, batch[TOP_VALUES]), features)


def row_bytes(arrays: Mapping[str, Any]) -> int:
  """Bytes of one example.

  Args:
    arrays: name -> `[B, ...]`, arrays or shapes.

  Example:
    >>> row_bytes(pack(Forward(jnp.ones((2, 10))), Form()))
    20
  """
  return sum(
    math.prod(x.shape[1:]) * jnp.dtype(x.dtype).itemsize
    for x in arrays.values()
  )
