"""A forward of any linen module, without editing it, and its first variables.

Owns how a module is run: which outputs inside of it become features, which
collections it may change, and what is said when taps, patterns or inputs do not
fit it. What its submodules do otherwise than alone is in `interceptors`.
"""

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import errors, traverse_util
from flax import linen as nn

from kd_jax import rules
from kd_jax.adapters.interceptors import (
  Interceptor,
  computing_in,
  global_batch,
  intercepting,
  recomputing,
  store_inputs,
)
from kd_jax.adapters.plain import entries, untrained
from kd_jax.types import Batch, Forward, Reads, Variables, names_of

# For annotations elsewhere, which do not import linen.
LinenModule = nn.Module
# For what runs once: the same bits as by default, after a tenth of the time on
# CPUs.
_QUICKLY = {'xla_backend_optimization_level': 1}
# The `remat` that is no pattern.
_DOTS = 'dots'


def from_linen(
  model: nn.Module,
  *,
  taps: Sequence[str] = (),
  interceptors: Sequence[Interceptor] = (),
  axis_name: str | None = None,
  reads: Reads | None = None,
  train_argument: str | None = 'train',
  dtype: str | None = None,
  remat: str = '',
) -> 'LinenForward':
  """A forward of any linen module, without editing it.

  Args:
    model: a module whose `__call__` takes what it `reads` of a batch, and
      `train` when `train_argument` names it; it returns the output.
    taps: '/'-joined paths of submodules whose outputs `Forward.features`
      shall hold.
    interceptors: functions for `nn.intercept_methods`, such as
      `quantize.quantize_activations(...)`; the first one is the outermost.
    axis_name: the mapped axis under `shard_map` or `pmap`: BatchNorm takes
      its statistics over the whole axis, and Dropout draws the mask that it
      would draw for the global batch, so that the numbers are those of `jit`.
      Modules that call `make_rng` themselves draw alike on every device.
    reads: the entry of a batch that is the model's input, or the entries in
      the order of its arguments, such as `('ids', 'mask')`; None for the
      module's attribute `reads`, or 'image' where it has none.
    train_argument: name of the boolean argument of `__call__` that turns
      training on, or None if it has none.
    dtype: of the computation, such as 'bfloat16', instead of the modules' own:
      every submodule with an attribute `dtype` gets it. Parameters, running
      statistics and observers stay as they are.
    remat: pattern of submodules' paths whose insides are computed again in the
      backward pass instead of being kept, such as `'block[0-9]+'`; or 'dots',
      which keeps the outputs of convolutions and matrix products and nothing
      else. The numbers stay; memory goes down and time up. '' keeps all.

  Returns:
    `forward(variables, batch, rng=None, *, train=False) -> Forward`. When
    training, all collections but `params` are updated, and `rng` feeds the
    `dropout` stream. Its method `intercepted`, `(*outer) -> forward`, makes
    the same forward with more interceptors before the others.

  Raises:
    ValueError: for what is no linen module; when called, for a module
      that lacks `train_argument`, a tap that is no submodule's path, or a
      `remat` that matches none.

  References:
    Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016,
    arXiv:1604.06174, for `remat`.

  Example:
    >>> model = nn.Sequential([nn.Dense(4), nn.Dense(3)])
    >>> forward = from_linen(model, taps=['layers_0'], train_argument=None)
    >>> x = jax.numpy.ones((2, 5))
    >>> out = forward(model.init(jax.random.key(0), x), {'image': x})
    >>> out.output.shape, out.features['layers_0'].shape
    ((2, 3), (2, 4))
  """
  if isinstance(model, type):
    raise ValueError(
      f'from_linen takes a module, not the class: {model.__name__}(...).'
    )
  if not isinstance(model, nn.Module):
    raise ValueError(
      f'from_linen takes a flax.linen module, not {type(model).__name__}: '
      'from_nnx is for nnx modules, from_apply for functions.'
    )
  return LinenForward(
    model=model,
    taps=frozenset(names_of(taps)),
    interceptors=tuple(interceptors),
    axis_name=axis_name,
    reads=_reads(model) if reads is None else names_of(reads),
    train_argument=train_argument,
    dtype=dtype,
    remat=remat,
  )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LinenForward:
  """A `types.StudentFn` of a linen module; see `from_linen` for its fields.

  Example:
    >>> forward = from_linen(nn.Dense(2), train_argument=None)
    >>> variables = {'params': {'kernel': np.eye(2), 'bias': np.ones(2)}}
    >>> def doubled(next_fun, args, kwargs, context):
    ...   return 2 * next_fun(*args, **kwargs)
    >>> batch = {'image': np.ones((1, 2), 'float32')}
    >>> for f in (forward, forward.intercepted(doubled)):
    ...   print(f(variables, batch).output.tolist())
    [[2.0, 2.0]]
    [[4.0, 4.0]]
  """

  model: nn.Module
  taps: frozenset[str]
  interceptors: tuple[Interceptor, ...]
  axis_name: str | None
  reads: tuple[str, ...]
  train_argument: str | None
  dtype: str | None
  remat: str

  # What profiles and compiled programs show.
  __name__ = 'forward'

  def __call__(
    self,
    variables: Variables,
    batch: Batch,
    rng: jax.Array | None = None,
    *,
    train: bool = False,
  ) -> Forward:
    """What the module returns for one batch.

    Raises:
      ValueError: for an unknown tap, a `remat` that matches nothing, a batch
        without an entry that is read, or one whose shape does not fit the
        parameters.
    """
    inputs = entries(batch, self.reads)
    recomputed: set[str] = set()
    try:
      with intercepting(self._around(train, recomputed)):
        output, updated = self._run(variables, inputs, rng, train)
    except errors.ScopeParamShapeError as e:
      given = ', '.join(
        f'batch[{name!r}] of shape {x.shape}'
        for name, x in zip(self.reads, inputs, strict=True)
      )
      raise ValueError(
        f'{given} does not fit the parameters of {type(self.model).__name__}: '
        f'{str(e).split(" (https:")[0]}'
      ) from e
    except TypeError as e:
      name = self.train_argument
      if f'unexpected keyword argument {name!r}' not in str(e):
        raise
      raise ValueError(
        f'{type(self.model).__name__} takes no argument {name!r}: '
        'train_argument names the one that turns training on, or is None.'
      ) from e
    if train and self._recomputes and not recomputed:
      near = self._near_misses(self.remat, variables, inputs, train)
      raise ValueError(f'remat={self.remat!r} matches no submodule: {near}')
    features = _features(updated.pop('intermediates', {}))
    if missing := self.taps - set(features):
      name = min(missing)
      near = self._near_misses(name, variables, inputs, train)
      raise ValueError(f'Unknown tap {name!r}: {near}')
    return Forward(output, features, {**untrained(variables), **updated})

  def intercepted(self, *outer: Interceptor) -> 'LinenForward':
    """The same forward with more interceptors before the others.

    Args:
      *outer: functions for `nn.intercept_methods`; the first is the outermost.
    """
    return dataclasses.replace(self, interceptors=(*outer, *self.interceptors))

  @property
  def _recomputes(self) -> bool:
    """Whether `remat` is a pattern."""
    return self.remat not in ('', _DOTS)

  def _computing(self) -> list[Interceptor]:
    """Those given, and those that `dtype` and `axis_name` ask for."""
    found = list(self.interceptors)
    if self.dtype is not None:
      found.insert(0, computing_in(self.dtype))
    if self.axis_name is not None:
      # Innermost, so that the others see every layer's inputs as under jit.
      found.append(global_batch(self.axis_name))
    return found

  def _around(self, train: bool, recomputed: set[str]) -> list[Interceptor]:
    """`_computing`, and in training what is for the backward pass alone."""
    found = self._computing()
    if train:
      found.append(store_inputs)
    if train and self._recomputes:
      found.insert(0, recomputing(self.remat, recomputed))
    return found

  def _options(self, train: bool) -> dict[str, Any]:
    """Arguments of the module's `__call__` besides its inputs."""
    return {} if self.train_argument is None else {self.train_argument: train}

  def _run(
    self,
    variables: Variables,
    inputs: tuple[jax.Array, ...],
    rng: jax.Array | None,
    train: bool,
  ) -> tuple[Any, dict[str, Any]]:
    """The output, and the collections that changed."""
    options = self._options(train)
    # quant_stats may not exist yet: an observer creates its own.
    mutable = [*untrained(variables), 'quant_stats'] if train else []
    if self.taps:
      mutable.append('intermediates')
      options['capture_intermediates'] = self._is_tapped

    def apply(variables, inputs, rng):
      return self.model.apply(
        variables,
        *inputs,
        rngs=None if rng is None else {'dropout': rng},
        mutable=mutable or False,
        **options,
      )

    if train and self.remat == _DOTS:
      policy = jax.checkpoint_policies.dots_saveable
      apply = jax.checkpoint(apply, policy=policy)
    out = apply(_unsown(variables), inputs, rng)
    if not mutable:
      return out, {}
    output, updated = out
    return output, dict(updated)

  def _is_tapped(self, module: nn.Module, method: str) -> bool:
    return method == '__call__' and '/'.join(module.path) in self.taps

  def _near_misses(
    self,
    name: str,
    variables: Variables,
    inputs: tuple[jax.Array, ...],
    train: bool,
  ) -> str:
    """The paths of submodules that a wrong one may have meant."""
    options = {**self._options(train), 'capture_intermediates': True}

    def run(variables, inputs):
      rngs = {'dropout': jax.random.key(0)}
      return self.model.apply(
        variables, *inputs, rngs=rngs, mutable=True, **options
      )

    with intercepting(self._computing()):
      _, state = jax.eval_shape(run, dict(variables), inputs)
    paths = set(_features(state['intermediates'])) - {'__call__'}
    return rules.near_misses(name, sorted(paths))


def _features(intermediates: Mapping[str, Any]) -> dict[str, Any]:
  flat = traverse_util.flatten_dict(intermediates, sep='/')
  # linen keeps one output per call; a tap is the last one.
  return {k.removesuffix('/__call__'): v[-1] for k, v in flat.items()}


def _unsown(variables: Variables) -> dict[str, Any]:
  """Without what a module sowed into a collection of its own: that is of one
  call, and would grow with each."""
  kept = {}
  for name, values in variables.items():
    flat = traverse_util.flatten_dict(dict(values), keep_empty_nodes=True)
    if any(isinstance(v, tuple) for v in flat.values()):
      flat = {k: v for k, v in flat.items() if not isinstance(v, tuple)}
      values = traverse_util.unflatten_dict(flat)
    kept[name] = values
  return kept


def init_linen(
  model: nn.Module,
  rng: jax.Array,
  batch: Batch,
  *,
  reads: Reads | None = None,
  train_argument: str | None = 'train',
) -> dict[str, Any]:
  """The initial variables of a linen module, in evaluation mode, compiled.

  Args:
    model: the module.
    rng: typed key.
    batch: one batch; only the inputs' shapes and dtypes matter.
    reads: see `from_linen`.
    train_argument: likewise; nothing is passed to modules that have no such
      argument.

  Example:
    >>> model = nn.Sequential([nn.Dense(4), nn.Dense(3)])
    >>> batch = {'image': np.ones((2, 5), np.float32)}
    >>> variables = init_linen(model, jax.random.key(0), batch)
    >>> variables['params']['layers_1']['kernel'].shape
    (4, 3)
  """
  given = entries(batch, _reads(model) if reads is None else reads)
  inputs = [jax.numpy.zeros(x.shape, x.dtype) for x in given]
  # A part of another program is compiled with it.
  options = _QUICKLY if all(map(_is_concrete, inputs)) else None
  call = inspect.signature(type(model).__call__)
  off: dict[str, Any] = {}
  if train_argument is not None and train_argument in call.parameters:
    off[train_argument] = False
  init = jax.jit(functools.partial(model.init, **off), compiler_options=options)
  return dict(init({'params': rng, 'dropout': rng}, *inputs))


def _reads(model: nn.Module) -> tuple[str, ...]:
  return names_of(getattr(model, 'reads', 'image'))


def _is_concrete(x: Any) -> bool:
  try:
    np.asarray(x)
  except jax.errors.TracerArrayConversionError:
    return False
  return True
