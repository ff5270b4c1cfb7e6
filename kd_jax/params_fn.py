"""Maps from the trained parameters to those that the student runs with.

Owns how one is called, with the step or without; what it computes is its own,
such as `quantize.fake_quant_params`.
"""

import inspect
from collections.abc import Callable

import jax

from kd_jax.types import Params

_KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, _KEYWORD)


def with_step(
  params_fn: Callable[..., Params],
) -> Callable[[Params, jax.Array], Params]:
  """A map of parameters as a function of the parameters and the step.

  Args:
    params_fn: `params -> params` or `(params, step) -> params`, where the step
      goes to the argument of this name or else to the second. Other arguments
      have defaults, and keep them.

  Example:
    >>> [int(fn(3, 2)) for fn in (with_step(lambda p: p), with_step(pow))]
    [3, 9]
  """
  try:
    arguments = list(inspect.signature(params_fn).parameters.values())
  except ValueError:  # Some builtins have no signature.
    arguments = []
  # One that `functools.partial` bound counts as a keyword with a default.
  if any(a.name == 'step' and a.kind == _KEYWORD for a in arguments):
    return lambda params, step: params_fn(params, step=step)
  needed = [
    a for a in arguments if a.default is a.empty and a.kind in _POSITIONAL
  ]
  if len(needed) > 1:
    return params_fn
  return lambda params, step: params_fn(params)
