"""What a trained student becomes: folded, converted, wrapped with its input.

Owns the path from trained variables to a function of raw images; nothing
about files, which is `export`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from kd_jax import adapters, quantize
from kd_jax.types import Batch, StudentFn, Variables

Preprocess = Callable[..., Batch]


def integer_forward(
  model: adapters.LinenModule, *, simulate: bool = False
) -> StudentFn:
  """The forward of a linen model whose layers `quantize.convert` replaced.

  Args:
    model: the module that was trained; it is not edited.
    simulate: see `quantize.execute_integers`.
  """
  return adapters.from_linen(
    model,
    interceptors=(
      quantize.skip_folded_batch_norms,
      quantize.execute_integers(simulate=simulate),
    ),
  )


def fold(
  model: adapters.LinenModule, variables: Variables, batch: Batch
) -> dict[str, Any]:
  """Folds every BatchNorm that directly follows a layer of a linen model.

  Args:
    model: the module.
    variables: its variables.
    batch: one batch; only its shapes and dtypes matter.
  """

  def make_forward(interceptor):
    return adapters.from_linen(model, interceptors=(interceptor,))

  norms = quantize.foldable_batch_norms(make_forward, variables, batch)
  return quantize.fold_batch_norm(variables, norms)


def from_images(
  forward: StudentFn, preprocess: Preprocess
) -> Callable[[Variables, jax.Array], jax.Array]:
  """`(variables, uint8 images) -> output`, pre-processing included.

  Args:
    forward: a student or teacher function.
    preprocess: `(batch, *, train) -> batch`, see `data.make_preprocess`.
  """

  def fn(variables: Mapping[str, Any], images: jax.Array) -> jax.Array:
    batch = preprocess({'image': images}, train=False)
    return forward(variables, batch).output

  return fn
