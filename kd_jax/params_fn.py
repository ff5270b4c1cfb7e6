"""Maps from the trained parameters to those that the student runs with.

Owns how one is called, with the step or without; what it computes is its own,
such as `quantize.fake_quant_params`.
"""

import inspect
from collections.abc import Callable

import jax

from kd_jax.types import Params

_POSITIONAL = (
  inspect.Parameter.POSITIONAL_ONLY,
  inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


def with_step(
  params_fn: Callable[..., Params],
) -> Callable[[Params, jax.Array], Params]:
  """A map of parameters as a function of the parameters and the step.

  Args:
    params_fn: `params -> params` or `(params, step) -> params`. Other arguments
      have defaults, and keep them.

  Example:
    >>> [int(fn(3, 2)) for fn in (with_step(lambda p: p), with_step(pow))]
    [3, 9]
  """
  try:
    arguments = list(inspect.signature(params_fn).parameters.values())
  except ValueError:  # Some builtins have no signature.
    arguments = []
  needed = [
    a
    for a in arguments
    if a.kind in _POSITIONAL and (a.default is a.empty or a.name == 'step')
  ]
  if len(needed) > 1:
    return params_fn
  return lambda params, step: params_fn(params)
