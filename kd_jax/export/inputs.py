"""What the formats take as a model's input: one array.

Owns that check alone; shapes, dtypes and names of inputs belong to the formats.
"""

from typing import Any

import jax


def check_one_input(what: str, input: Any) -> None:
  """Raises ValueError unless the input is one array, or its shape, as JAX has.

  Args:
    what: the function that asks; begins the message.
    input: anything.

  Example:
    >>> two = (jax.ShapeDtypeStruct((1, 8), 'int32'),) * 2
    >>> check_one_input('export_onnx', two)
    Traceback (most recent call last):
    ...
    ValueError: export_onnx: a file has one input, but 2 are given; bind the \
others, or join them to one array.
  """
  if not hasattr(input, 'shape'):
    raise ValueError(
      f'{what}: a file has one input, but {len(jax.tree.leaves(input))} are '
      'given; bind the others, or join them to one array.'
    )
  # Else the file is written, and asks for what JAX does not compute.
  narrow = jax.dtypes.canonicalize_dtype(input.dtype)
  if narrow != input.dtype:
    raise ValueError(
      f'{what}: an input of {input.dtype} is {narrow} in JAX: give that dtype.'
    )
