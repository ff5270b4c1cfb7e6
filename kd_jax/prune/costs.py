"""What each parameter costs: multiply-accumulates, bytes, entries.

Owns the attribution of the products in a traced forward to the parameters in
them. Latency is measured, not counted: see `report.measure`.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from kd_jax import rules as rules_lib
from kd_jax.prune.trace import output_of
from kd_jax.types import Batch, Variables

# The row of products in which no parameter takes part.
ACTIVATIONS = '(activations)'


class LayerCost(NamedTuple):
  """The cost of one parameter.

  Attributes:
    path: '/'-joined, beginning with the collection; `ACTIVATIONS` for products
      of activations with each other, such as those of attention.
    macs: multiply-accumulates of one example; FLOPs are twice that.
    parameters: entries.
    bytes: of storage.
  """

  path: str
  macs: int
  parameters: int
  bytes: int


def layer_costs(
  forward: Callable[..., Any], variables: Variables, batch: Batch
) -> list[LayerCost]:
  """Multiply-accumulates, entries and bytes of every parameter.

  Nothing is run. A product counts for the parameter that it multiplies, or
  from which what it multiplies is computed elementwise, such as a rounded or
  scaled kernel; of two parameters, for the larger one. Steps of a scan
  multiply.

  Args:
    forward: as for `find_groups`.
    variables: the model's variables, or their shapes.
    batch: one batch, or its shapes.

  Returns:
    A row for every leaf of `params`, for other leaves that are multiplied,
    such as integer kernels, and for products of activations where there are
    any. The sum of `macs` is that of `report.measure.multiply_accumulates` for
    one example.

  Raises:
    ValueError: if the arrays of the batch differ in their number of examples.

  Example:
    >>> from kd_jax import adapters
    >>> forward = adapters.from_apply(lambda params, x: x @ params['w'])
    >>> variables = {'params': {'w': np.ones((3, 5), 'f')}}
    >>> layer_costs(forward, variables, {'image': np.ones((2, 3), 'f')})
    [LayerCost(path='params/w', macs=15, parameters=15, bytes=60)]
  """
  variables, batch = dict(variables), dict(batch)

  closed = jax.make_jaxpr(functools.partial(output_of, forward))(
    variables, batch
  )
  leaves = jax.tree.leaves(variables)
  names = rules_lib.leaf_names(variables)
  sizes = {
    name: int(np.prod(x.shape)) for name, x in zip(names, leaves, strict=True)
  }
  macs: dict[str, int] = {}
  sources = [*names, *[ACTIVATIONS] * (len(closed.jaxpr.invars) - len(names))]
  _count(closed.jaxpr, sources, sizes, 1, macs)
  examples = _examples(batch)
  rows = [
    LayerCost(
      name,
      macs.get(name, 0) // examples,
      sizes[name],
      sizes[name] * np.dtype(leaf.dtype).itemsize,
    )
    for name, leaf in zip(names, leaves, strict=True)
    if name.startswith('params/') or name == 'params' or name in macs
  ]
  if ACTIVATIONS in macs:
    rows.append(LayerCost(ACTIVATIONS, macs[ACTIVATIONS] // examples, 0, 0))
  return rows


def _examples(batch: Batch) -> int:
  sizes = {x.shape[0] for x in jax.tree.leaves(batch) if x.ndim}
  if len(sizes) != 1:
    raise ValueError(
      f'layer_costs: the arrays of the batch have {sorted(sizes)} examples.'
    )
  return sizes.pop()


def _count(
  jaxpr: Any,
  sources: Sequence[str | None],
  sizes: Mapping[str, int],
  times: int,
  macs: dict[str, int],
) -> list[str | None]:
  """Adds up the products of a jaxpr; the sources of its outputs.

  A source is the parameter that a value is computed from, `ACTIVATIONS` for
  one that depends on the batch, or None for a constant.
  """
  known = dict(zip(jaxpr.invars, sources, strict=True))

  def read(atom):
    return None if hasattr(atom, 'val') else known.get(atom)

  for eqn in jaxpr.eqns:
    inputs = [read(v) for v in eqn.invars]
    source = _main(inputs, sizes)
    products = _products(eqn)
    if products:
      parameters = [s for s in inputs[:2] if s in sizes]
      name = (
        max(parameters, key=sizes.__getitem__) if parameters else ACTIVATIONS
      )
      macs[name] = macs.get(name, 0) + products * times
    outputs = [source] * len(eqn.outvars)
    repeats = times * eqn.params.get('length', 1)
    for inner, first in _inner(eqn):
      made = _count(inner, inputs[first:], sizes, repeats, macs)
      if len(made) == len(outputs):
        outputs = made
    known.update(zip(eqn.outvars, outputs, strict=True))
  return [read(v) for v in jaxpr.outvars]


def _main(inputs: Sequence[str | None], sizes: Mapping[str, int]) -> str | None:
  if ACTIVATIONS in inputs:
    return ACTIVATIONS
  return max((s for s in inputs if s), key=sizes.__getitem__, default=None)


def _products(eqn: Any) -> int:
  """Multiply-accumulates of one equation."""
  name = eqn.primitive.name
  if name == 'dot_general':
    (contracted, _), _ = eqn.params['dimension_numbers']
    shape = eqn.invars[0].aval.shape
    inner = int(np.prod([shape[i] for i in contracted], dtype=np.int64))
    return inner * eqn.outvars[0].aval.size
  if name == 'conv_general_dilated':
    kernel = eqn.invars[1].aval
    made = eqn.params['dimension_numbers'].rhs_spec[0]
    return kernel.size // kernel.shape[made] * eqn.outvars[0].aval.size
  return 0


def _inner(eqn: Any) -> Iterator[tuple[Any, int]]:
  """The jaxprs that an equation runs, and where their inputs begin."""
  name, p = eqn.primitive.name, eqn.params
  if name == 'cond':
    found = [(branch, 1) for branch in p['branches']]
  elif name == 'while':
    found = [(p['body_jaxpr'], p['cond_nconsts'])]
  else:
    body = p.get('jaxpr', p.get('call_jaxpr'))
    found = [] if body is None else [(body, 0)]
  for body, first in found:
    body = getattr(body, 'jaxpr', body)
    if len(body.invars) == len(eqn.invars) - first:
      yield body, first
