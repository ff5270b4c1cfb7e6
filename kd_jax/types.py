"""The types every room speaks: batches, forwards, states, metrics, and checks.

Owns no computation and imports nothing of ours. In the shape descriptions of
this library `B` is the batch, `C` classes, `D` features, `L` tokens, `V` the
vocabulary, and images are `[B, H, W, C]`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import numpy as np

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
# By path.
Arrays = dict[str, jax.Array]
Params = Any
Variables = Mapping[str, Any]
# Which entries of a batch a network sees: one, or several in their order.
Reads = str | Sequence[str]
# Of one process, before it is on the devices.
HostBatch = Mapping[str, np.ndarray]
# What a batch's entries with a teacher's stored outputs begin with.
CACHED = 'teacher/'
# `[B, L]` of a batch of tokens, where it has some that only pad: 0 for those.
ATTENTION_MASK = 'attention_mask'


class BatchStream(Iterator[HostBatch], Protocol):
  """An iterator of host batches that can be taken up at any of them.

  `data.train_batches` makes one; `train.train` takes any object that has these
  two methods and `__next__`.

  Example:
    >>> class Numbers(Iterator):
    ...   def __init__(self):
    ...     self.next = 0
    ...   def __next__(self):
    ...     self.next += 1
    ...     return {'x': np.full(2, self.next)}
    ...   def get_state(self):
    ...     return {'next': self.next}
    ...   def set_state(self, state):
    ...     self.next = state['next']
    >>> batches = Numbers()
    >>> batches.set_state({'next': 7})
    >>> next(batches)['x'].tolist(), batches.get_state()
    ([8, 8], {'next': 8})
  """

  def get_state(self) -> dict[str, Any]:
    """Where it stands; JSON values."""

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to where it stood."""


class Forward(NamedTuple):
  """What a network returned for one batch.

  Attributes:
    output: `[B, C]` logits, `[B, D]` regression values or `[B, L, V]` token
      logits; any float dtype.
    features: tap name -> `[B, ...]` intermediate output; empty without taps.
    model_state: the collections that the forward updated, such as
      `{'batch_stats': ...}`; those given, unchanged, in evaluation.

  Example:
    A network is any function that returns one:

    >>> def student_fn(variables, batch, rng=None, *, train=False):
    ...   hidden = jax.nn.relu(batch['x'] @ variables['params']['w1'])
    ...   return Forward(hidden @ variables['params']['w2'], {'hidden': hidden})
    >>> w1, w2 = np.ones((4, 3), 'float32'), np.ones((3, 2), 'float32')
    >>> out = student_fn(
    ...   {'params': {'w1': w1, 'w2': w2}}, {'x': np.ones((5, 4), 'float32')})
    >>> out.output.shape, out.features['hidden'].shape, out.model_state
    ((5, 2), (5, 3), {})
  """

  output: jax.Array
  features: Mapping[str, Any] = {}
  model_state: Mapping[str, Any] = {}


# (variables, batch, rng, *, train) -> Forward
StudentFn = Callable[..., Forward]
# (variables, batch) -> Forward, always in evaluation mode
TeacherFn = Callable[[Variables, Batch], Forward]


class ObjectiveState(flax.struct.PyTreeNode):
  """What an objective owns: it trains beside the student, never in it.

  Attributes:
    params: trainable parameters of the terms (regressors, embeddings).
    state: arrays of the terms that no gradient reaches (memory banks).
    opt_state: the optimizer state of `params`.
  """

  params: Params
  state: Any
  opt_state: Any


class TrainState(flax.struct.PyTreeNode):
  """Everything a train step reads and writes; arrays only, no functions.

  Attributes:
    step: int32 scalar, number of completed steps.
    params: the student's trainable parameters.
    model_state: its other collections (`batch_stats`, `quant_stats`).
    opt_state: the state of the optax chain, pruning masks included.
    objective: parameters and state of the objective's terms.
    teacher: the teacher's variables, or None. Never differentiated, never in
      the optimizer and never in a checkpoint.

  Example:
    `step.init_state` makes one. It is a pytree, and changed by `replace`:

    >>> state = TrainState(
    ...   step=np.int32(0), params={'w': np.ones(3)}, model_state={},
    ...   opt_state=(), objective=ObjectiveState({}, {}, ()))
    >>> state = state.replace(step=state.step + 1)
    >>> [x.shape for x in jax.tree.leaves(state)], int(state.step)
    ([(), (3,)], 1)
  """

  step: jax.Array
  params: Params
  model_state: Mapping[str, Any]
  opt_state: Any
  objective: ObjectiveState
  teacher: Any = None


# (state, batch, rng) -> (state, metrics)
TrainStep = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]


def names_of(names: Reads) -> tuple[str, ...]:
  """One name, or several, as a tuple.

  Args:
    names: a name, or a sequence of them.

  Example:
    >>> names_of('image'), names_of(['ids', 'mask'])
    (('image',), ('ids', 'mask'))
  """
  return (names,) if isinstance(names, str) else tuple(names)


def check_same_shape(what: str, **arrays: Any) -> None:
  """Raises ValueError naming two arrays whose shapes differ.

  Args:
    what: what the caller needs the shapes for; begins the message.
    **arrays: two named arrays (anything with `.shape`).

  Raises:
    ValueError: if their shapes differ.

  Example:
    >>> import numpy as np
    >>> check_same_shape('kl', student=np.zeros((2, 3)), teacher=np.zeros(2))
    Traceback (most recent call last):
    ...
    ValueError: kl: student has shape (2, 3) but teacher has shape (2,).
  """
  (a, x), (b, y) = arrays.items()
  if tuple(x.shape) != tuple(y.shape):
    raise ValueError(
      f'{what}: {a} has shape {tuple(x.shape)} but {b} has shape '
      f'{tuple(y.shape)}.'
    )


def check_function(name: str, fn: Any) -> None:
  """Raises ValueError for a module where its function is asked for.

  Args:
    name: of the argument; begins the message.
    fn: what was given; None is no module.

  Raises:
    ValueError: for a module of linen or nnx, or the class of one.

  Example:
    >>> from flax import linen
    >>> check_function('student_fn', linen.Dense(10))
    Traceback (most recent call last):
    ...
    ValueError: student_fn is a module, not a function: \
kd_jax.from_linen(module) makes it.
  """
  if isinstance(fn, type) or (hasattr(fn, 'init') and hasattr(fn, 'apply')):
    raise ValueError(
      f'{name} is a module, not a function: kd_jax.from_linen(module) makes it.'
    )


def check_has(name: str, value: Any, methods: Sequence[str], what: str) -> None:
  """Raises ValueError for what cannot be used as the argument it is given as.

  Args:
    name: of the argument; begins the message.
    value: what was given.
    methods: names of what it has to have.
    what: what the argument is, in words.

  Raises:
    ValueError: if one of them is missing.

  Example:
    >>> check_has('tx', 0.1, ('init', 'update'), 'an optimizer of optax')
    Traceback (most recent call last):
    ...
    ValueError: tx is an optimizer of optax, not float.
  """
  if not all(hasattr(value, method) for method in methods):
    raise ValueError(f'{name} is {what}, not {type(value).__name__}.')


def check_variables(variables: Any) -> None:
  """Raises ValueError for parameters where variables are asked for.

  Args:
    variables: what was given.

  Raises:
    ValueError: for what is no mapping with an entry 'params'.

  Example:
    >>> check_variables({'kernel': np.ones(3), 'bias': np.ones(1)})
    Traceback (most recent call last):
    ...
    ValueError: Variables are {'params': ..., **collections}, and there is no \
'params' among 'kernel', 'bias'.
  """
  check_has('variables', variables, ('keys',), "{'params': ..., **collections}")
  if 'params' not in variables:
    raise ValueError(
      "Variables are {'params': ..., **collections}, and there is no 'params' "
      f'among {", ".join(map(repr, variables))}.'
    )
