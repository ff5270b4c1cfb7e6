"""A forward of an nnx module, in training and in evaluation mode.

Owns how a module becomes variables and a function of them, and nothing of its
training: its random streams stay its own.
"""

from typing import Any

import jax
from flax import nnx, traverse_util

from kd_jax.adapters.plain import entries, untrained
from kd_jax.types import Forward, Reads, StudentFn, Variables


def from_nnx(
  model: nnx.Module, *, reads: Reads = 'image'
) -> tuple[StudentFn, Variables]:
  """A forward of an nnx module, and its variables.

  Args:
    model: the module; called with what it reads, it returns the output.
      `train()` and `eval()` are called on a copy as the step asks.
    reads: the entry of a batch that is the model's input, or the entries in
      the order of its arguments.

  Returns:
    `(forward, variables)`: variables are nested dicts, `params` (every
    `nnx.Param`) and, where the module has any, `model_state` (BatchNorm
    statistics, random streams). `rng` is not used: an nnx module carries its
    own streams.

  Raises:
    ValueError: for what is no nnx module.

  Example:
    >>> forward, variables = from_nnx(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> forward(variables, {'image': jax.numpy.ones((2, 4))}).output.shape
    (2, 3)
  """
  if not isinstance(model, nnx.Module):
    raise ValueError(
      f'from_nnx takes an nnx module, not {type(model).__name__}: from_linen '
      'is for linen modules, from_apply for functions.'
    )
  graphs: dict[str, Any] = {}
  for mode in ('train', 'eval'):
    twin = nnx.clone(model)
    getattr(twin, mode)()
    graphs[mode], params_like, rest_like = _split(twin)
  variables = {'params': nnx.to_pure_dict(params_like)}
  if jax.tree.leaves(rest_like):
    variables['model_state'] = nnx.to_pure_dict(rest_like)

  def forward(variables, batch, rng=None, *, train=False):
    module = nnx.merge(
      graphs['train' if train else 'eval'],
      _filled(params_like, variables['params']),
      _filled(rest_like, variables.get('model_state', {})),
    )
    output = module(*entries(batch, reads))
    state = untrained(variables)
    if train and state:
      # Not what the module sowed, which is of one call.
      _, _, rest = _split(module)
      kept = traverse_util.flatten_dict(state['model_state'])
      flat = traverse_util.flatten_dict(nnx.to_pure_dict(rest))
      flat = {k: v for k, v in flat.items() if k in kept}
      state = {'model_state': traverse_util.unflatten_dict(flat)}
    return Forward(output, {}, state)

  return forward, variables


def _split(module: nnx.Module) -> tuple[Any, nnx.State, nnx.State]:
  """A module's graph, its parameters, and the rest of its state."""
  graph, params, *others = nnx.split(module, nnx.Param, ...)
  [rest] = others
  return graph, params, rest


def _filled(like: nnx.State, values: Any) -> nnx.State:
  state = jax.tree.map(lambda x: x, like)
  nnx.replace_by_pure_dict(state, values)
  return state
