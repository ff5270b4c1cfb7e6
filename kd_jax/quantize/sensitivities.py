"""Which parameters suffer most: one is quantized or pruned at a time.

Owns the measurement. What it is used for is `allocation`; how it looks is
`report.sensitivity_figure`.
"""

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from kd_jax import rules as rules_lib
from kd_jax.losses import logits
from kd_jax.quantize.fake_quant import fake_quant_params
from kd_jax.quantize.specs import QuantSpec
from kd_jax.types import Batch, Variables

Perturbation = Callable[[jax.Array], jax.Array]
Option = TypeVar('Option', bound=Hashable)


class Sensitivity(NamedTuple, Generic[Option]):
  """What it costs to change one parameter.

  Attributes:
    path: '/'-joined path in `params`.
    option: which change, a key of the options.
    loss: mean over the examples.
  """

  path: str
  option: Option
  loss: float


def weight_options(specs: Iterable[QuantSpec]) -> dict[QuantSpec, Perturbation]:
  """Quantizers as options of `sensitivity`.

  Args:
    specs: the quantizers to compare.

  Returns:
    spec -> the function that fake-quantizes a parameter with it.

  Example:
    >>> [spec.bits for spec in weight_options([QuantSpec(8), QuantSpec(4)])]
    [8, 4]
  """
  return {spec: functools.partial(_fake_quant, spec=spec) for spec in specs}


def _fake_quant(w: jax.Array, spec: QuantSpec) -> jax.Array:
  return fake_quant_params([w], [('0', spec)])[0]


def sensitivity(
  forward: Callable[..., Any],
  variables: Variables,
  batches: Iterable[Batch],
  rules: rules_lib.Rules[bool],
  options: Mapping[Option, Perturbation],
  *,
  loss: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> list[Sensitivity[Option]]:
  """The loss of changing one parameter at a time, all others as they are.

  One function is compiled for all parameters and options: which of them is
  changed, and how, is an input of it.

  Args:
    forward: `(variables, batch) -> Forward` in evaluation mode; of linen, nnx
      or a plain function.
    variables: its variables.
    batches: a handful of pre-processed batches; no labels are needed.
    rules: `(pattern, True or None)` pairs that choose parameters by path.
    options: what may be done to a parameter: name -> function of it. From
      `weight_options`, or any other, such as pruning:
      `{0.5: lambda w: w * (abs(w) > jnp.median(abs(w)))}`.
    loss: `(output, float_output) -> [...]` of the changed and the unchanged
      network; KL(float || changed) at temperature 1 when None.

  Returns:
    A row for each chosen parameter and option, in the order of the parameters.

  Raises:
    ValueError: without any batch or option, or if a rule matches nothing.

  Example:
    >>> from kd_jax.types import Forward
    >>> forward = lambda v, batch: Forward(batch['x'] @ v['params']['w'])
    >>> w = jnp.array([[1.0, 0.2], [-0.7, 0.4]])
    >>> variables, batch = {'params': {'w': w}}, {'x': jnp.eye(2)}
    >>> options = weight_options([QuantSpec(8), QuantSpec(4)])
    >>> rows = sensitivity(forward, variables, [batch], [('w', True)], options)
    >>> [row.option.bits for row in rows], rows[0].loss < rows[1].loss
    ([8, 4], True)
  """
  batches = list(batches)
  if not batches or not options:
    raise ValueError('sensitivity: needs at least one batch and one option.')
  loss = loss or functools.partial(logits.kl_divergence, temperature=1.0)
  names = rules_lib.leaf_names(variables['params'])
  chosen = rules_lib.match(rules, names, kind='sensitivity rule')
  branches = [lambda w: w, *options.values()]

  @jax.jit
  def evaluate(variables, batch, reference, choice):
    leaves, structure = jax.tree.flatten(variables['params'])
    for i, name in zip(choice, chosen, strict=True):
      index = names.index(name)
      leaves[index] = jax.lax.switch(i, branches, leaves[index])
    params = jax.tree.unflatten(structure, leaves)
    changed = {**variables, 'params': params}
    return jnp.mean(loss(forward(changed, batch).output, reference))

  variables = dict(variables)
  plain = jax.jit(lambda v, b: forward(v, b).output)
  references = [plain(variables, batch) for batch in batches]
  sizes = [len(jax.tree.leaves(batch)[0]) for batch in batches]
  rows = []
  for i, name in enumerate(chosen):
    for j, option in enumerate(options, start=1):
      choice = jnp.zeros(len(chosen), jnp.int32).at[i].set(j)
      total = sum(
        size * float(evaluate(variables, batch, reference, choice))
        for size, batch, reference in zip(
          sizes, batches, references, strict=True
        )
      )
      rows.append(Sensitivity(name, option, total / sum(sizes)))
  return rows
