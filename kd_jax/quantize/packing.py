"""4-bit codes, two to a byte.

Owns the layout of packed codes and nothing else. Packed codes are uint8, which
tells them from int8 codes; they are unpacked before any arithmetic, for XLA
does not compile int4 products on every backend.
"""

import jax
import jax.numpy as jnp


def pack_int4(codes: jax.Array) -> jax.Array:
  """Packs 4-bit codes along the last axis, two neighbours to a byte.

  The code of the lower index is in the lower half of the byte. An odd last
  axis is filled up with one 0.

  Args:
    codes: int8 `[..., N]`, each in [-8, 7].

  Returns:
    uint8 `[..., ceil(N / 2)]`.

  Example:
    >>> packed = pack_int4(jnp.array([1, -1, 7], jnp.int8))
    >>> [hex(v) for v in packed.tolist()]
    ['0xf1', '0x7']
    >>> unpack_int4(packed, 3).tolist()
    [1, -1, 7]
  """
  if codes.shape[-1] % 2:
    edges = [(0, 0)] * (codes.ndim - 1) + [(0, 1)]
    codes = jnp.pad(codes, edges)
  nibbles = jax.lax.bitcast_convert_type(codes, jnp.uint8) & jnp.uint8(15)
  low, high = nibbles[..., ::2], nibbles[..., 1::2]
  return low | (high << 4)


def unpack_int4(packed: jax.Array, size: int) -> jax.Array:
  """The codes that `pack_int4` packed.

  Args:
    packed: uint8 `[..., ceil(N / 2)]`.
    size: N.

  Returns:
    int8 `[..., N]`, each in [-8, 7].

  Raises:
    ValueError: if `size` is not that of the packed codes.

  Example:
    >>> packed = jnp.array([0x7A, 0x0F], jnp.uint8)
    >>> unpack_int4(packed, 3).tolist()
    [-6, 7, -1]
  """
  if packed.shape[-1] != -(-size // 2):
    raise ValueError(
      f'unpack_int4: {size} codes do not fill {packed.shape[-1]} bytes.'
    )
  both = jnp.stack([packed << 4, packed & jnp.uint8(240)], axis=-1)
  both = both.reshape(*packed.shape[:-1], 2 * packed.shape[-1])
  signed = jax.lax.bitcast_convert_type(both, jnp.int8)
  # The shift of a signed integer copies its sign.
  return jax.lax.slice_in_dim(signed >> 4, 0, size, axis=-1)
