"""Networks made of networks: ensembles, cohorts, other inputs, other dtypes.

All are functions of the house's form, `(variables, batch, rng=None, *,
train=False) -> Forward`, from functions of that form; any of them serves as a
student or as a teacher. Owns no layers, and knows neither linen nor nnx.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.types import Forward, StudentFn, Variables

SPACES = ('logits', 'probabilities', 'first')


def combine(
  networks: Mapping[str, StudentFn],
  *,
  space: str = 'logits',
  weights: Mapping[str, float] | None = None,
) -> StudentFn:
  """Several networks as one: an ensemble of teachers, a cohort of students.

  Args:
    networks: name -> function; the architectures may differ.
    space: what the output is: 'logits' averages logits; 'probabilities'
      averages softmaxes and returns their logarithms; 'first' returns the
      first network's output.
    weights: name -> weight of an average, normalised to sum 1; equal when
      None.

  Returns:
    A function of variables as `combine_variables` makes them. Its features
    are `<name>/output` and `<name>/<tap>` of every network, which
    `objectives.each_teacher`, `each_student` and `mutual` read.

  Raises:
    ValueError: without networks, for an unknown space, or weights of other
      names.

  Example:
    >>> double = lambda v, b, rng=None, *, train=False: Forward(2 * b['x'])
    >>> half = lambda v, b, rng=None, *, train=False: Forward(b['x'] / 2)
    >>> both = combine({'double': double, 'half': half})
    >>> both({'params': {'double': {}, 'half': {}}},
    ...      {'x': jnp.ones((1, 2))}).output.tolist()
    [[1.25, 1.25]]
  """
  if space not in SPACES:
    raise ValueError(f'space={space!r} is not one of {", ".join(SPACES)}.')
  shares = _shares(networks, weights)

  def forward(variables, batch, rng=None, *, train=False):
    outs = {}
    for i, (name, network) in enumerate(networks.items()):
      key = None if rng is None else jax.random.fold_in(rng, i)
      own = variables_of(variables, name)
      outs[name] = network(own, batch, key, train=train)
    features: dict[str, Any] = {}
    state: dict[str, dict[str, Any]] = {}
    for name, out in outs.items():
      features[f'{name}/output'] = out.output
      features |= {f'{name}/{tap}': x for tap, x in out.features.items()}
      for collection, values in out.model_state.items():
        state.setdefault(collection, {})[name] = values
    logits = [out.output.astype(jnp.float32) for out in outs.values()]
    return Forward(_output(logits, shares, space), features, state)

  return forward


def _shares(
  networks: Mapping[str, Any], weights: Mapping[str, float] | None
) -> list[float]:
  if not networks:
    raise ValueError('There are no networks to combine.')
  if weights is None:
    weights = dict.fromkeys(networks, 1.0)
  check_weights(networks, weights)
  total = sum(weights.values())
  if min(weights.values()) < 0 or total <= 0:
    raise ValueError(f'Weights are >= 0 with a positive sum, not {weights}.')
  return [weights[name] / total for name in networks]


def exact(params: Any) -> Any:
  """Parameters as their average keeps them: in float32 at least.

  In bfloat16 a thousandth of a difference would be rounded away, and the
  average would never move.

  Args:
    params: a pytree of arrays; integers and float32 or wider stay as they are.

  Example:
    >>> exact({'w': jnp.ones(2, jnp.bfloat16)})['w'].dtype.name
    'float32'
  """

  def wide(p):
    if not jnp.issubdtype(p.dtype, jnp.floating):
      return p
    return p.astype(jnp.promote_types(p.dtype, jnp.float32))

  return jax.tree.map(wide, params)


def check_weights(names: Iterable[str], weights: Mapping[str, Any]) -> None:
  """Raises ValueError unless each network of `combine` has a weight.

  Args:
    names: of the networks.
    weights: name -> weight.

  Raises:
    ValueError: for a name without weight, or a weight without network.

  Example:
    >>> check_weights(['a', 'b'], {'a': 1.0})
    Traceback (most recent call last):
    ValueError: There are weights for a, but the networks are a, b.
  """
  if set(weights) != set(names):
    raise ValueError(
      f'There are weights for {", ".join(weights)}, but the networks are '
      f'{", ".join(names)}.'
    )


def _output(
  logits: Sequence[jax.Array], shares: Sequence[float], space: str
) -> jax.Array:
  if space == 'first':
    return logits[0]
  if space == 'logits':
    weighted = [w * z for w, z in zip(shares, logits, strict=True)]
    return sum(weighted[1:], start=weighted[0])
  log_p = [jax.nn.log_softmax(z) for z in logits]
  each = jnp.array(shares).reshape(-1, *(1 for _ in logits[0].shape))
  return jax.nn.logsumexp(jnp.stack(log_p), axis=0, b=each)


def combine_variables(variables: Mapping[str, Variables]) -> dict[str, Any]:
  """Variables of several networks in the layout that `combine` reads.

  Args:
    variables: name -> `{'params': ..., **collections}`.

  Returns:
    collection -> name -> values.

  Example:
    >>> combine_variables({'a': {'params': 1}, 'b': {'params': 2}})
    {'params': {'a': 1, 'b': 2}}
  """
  combined: dict[str, Any] = {}
  for name, own in variables.items():
    for collection, values in own.items():
      combined.setdefault(collection, {})[name] = values
  return combined


def variables_of(variables: Variables, name: str) -> dict[str, Any]:
  """One network's variables out of those of `combine`.

  Args:
    variables: collection -> name -> values, see `combine_variables`.
    name: of the network.

  Example:
    >>> variables_of({'params': {'a': 1, 'b': 2}, 'batch_stats': {'b': 3}}, 'b')
    {'params': 2, 'batch_stats': 3}
  """
  return {
    collection: values[name]
    for collection, values in variables.items()
    if name in values
  }


def taps_of(taps: Iterable[str], name: str) -> list[str]:
  """One network's own taps out of those of `combine`.

  Args:
    taps: such as '<name>/<tap>'.
    name: of the network.

  Example:
    >>> taps_of(['a/conv1', 'a/block/conv2', 'b/conv1'], 'a')
    ['conv1', 'block/conv2']
  """
  start = f'{name}/'
  return [tap.removeprefix(start) for tap in taps if tap.startswith(start)]


def with_input(
  network: StudentFn,
  transform: Callable[[jax.Array], jax.Array],
  *,
  reads: str = 'image',
) -> StudentFn:
  """A network that sees its own version of the input.

  For a teacher that was trained with another normalisation or resolution than
  the student: both get the same crop, each in its own form.

  Args:
    network: any function of the house's form.
    transform: of the image, such as `data.renormalize` or `data.resize` with
      their arguments bound.
    reads: the entry of a batch that is transformed.

  Example:
    >>> network = lambda v, b, rng=None, *, train=False: Forward(b['image'])
    >>> halved = with_input(network, lambda x: x / 2)
    >>> halved({}, {'image': jnp.ones(2)}).output.tolist()
    [0.5, 0.5]
  """

  def forward(variables, batch, rng=None, *, train=False):
    batch = {**batch, reads: transform(batch[reads])}
    return network(variables, batch, rng, train=train)

  return forward


def cast_params(variables: Variables, dtype: Any) -> dict[str, Any]:
  """Variables with their float parameters in another dtype.

  A teacher in bfloat16 takes half the memory; build its model with the same
  `dtype`, or it computes in float32. Running statistics stay as they are.

  Args:
    variables: `{'params': ..., **collections}`.
    dtype: such as 'bfloat16'.

  Example:
    >>> variables = {'params': jnp.ones(2), 'batch_stats': jnp.ones(2)}
    >>> half = cast_params(variables, 'bfloat16')
    >>> half['params'].dtype.name, half['batch_stats'].dtype.name
    ('bfloat16', 'float32')
  """

  def cast(x):
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(dtype) if floating else x

  return {**variables, 'params': jax.tree.map(cast, variables['params'])}
