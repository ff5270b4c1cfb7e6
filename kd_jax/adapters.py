"""Makes student and teacher functions out of linen, nnx and plain functions.

This file and `models` are the only ones that import linen or nnx. A function
made here serves as a student, `(variables, batch, rng, *, train)`, and as a
teacher, `(variables, batch)`.
"""

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from flax import errors, nnx, traverse_util
from flax import linen as nn

from kd_jax import rules
from kd_jax.types import Batch, Forward, StudentFn, Variables

Interceptor = Callable[..., Any]
# For annotations elsewhere, which do not import linen.
LinenModule = nn.Module
# For what runs once: the same bits as by default, after a tenth of the time on
# CPUs.
_QUICKLY = {'xla_backend_optimization_level': 1}


class LinenForward:
  """A `types.StudentFn` of a linen module, see `from_linen`.

  Attributes:
    intercepted: `(*outer) -> LinenForward`, the same forward with more
      interceptors before the others.
  """

  def __init__(
    self, forward: StudentFn, intercepted: Callable[..., 'LinenForward']
  ):
    # Its name is what profiles and compiled programs show.
    functools.update_wrapper(self, forward)
    self._forward = forward
    self.intercepted = intercepted

  def __call__(
    self,
    variables: Variables,
    batch: Batch,
    rng: jax.Array | None = None,
    *,
    train: bool = False,
  ) -> Forward:
    """What the module returns for one batch."""
    return self._forward(variables, batch, rng, train=train)


def from_linen(
  model: nn.Module,
  *,
  taps: Sequence[str] = (),
  interceptors: Sequence[Interceptor] = (),
  axis_name: str | None = None,
  image: str | None = None,
  train_argument: str | None = 'train',
  dtype: str | None = None,
  remat: str = '',
) -> LinenForward:
  """A forward of any linen module, without editing it.

  Args:
    model: a module whose `__call__` takes `batch[image]`, and `train` when
      `train_argument` names it; it returns the output.
    taps: '/'-joined paths of submodules whose outputs `Forward.features`
      shall hold.
    interceptors: functions for `nn.intercept_methods`, such as
      `quantize.quantize_activations(...)`; the first one is the outermost.
    axis_name: the mapped axis under `shard_map` or `pmap`: BatchNorm takes
      its statistics over the whole axis, and Dropout draws the mask that it
      would draw for the global batch, so that the numbers are those of `jit`.
      Modules that call `make_rng` themselves draw alike on every device.
    image: the key of the model's input in the batch.
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
    `dropout` stream. Its attribute `intercepted`, `(*outer) -> forward`, makes
    the same forward with more interceptors before the others.

  Raises:
    ValueError: when called, for a tap that is no submodule's path, or a `remat`
      that matches none.

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
  image = image or getattr(model, 'reads', 'image')
  wanted = frozenset(taps)
  given = tuple(interceptors)
  if axis_name is not None:
    # Innermost, so that the others see every layer's inputs as under jit.
    interceptors = (*interceptors, _global_batch(axis_name))
  if dtype is not None:
    interceptors = (_computing_in(dtype), *interceptors)
  blocks = '' if remat == 'dots' else remat

  def tapped(module, method):
    return method == '__call__' and '/'.join(module.path) in wanted

  def forward(variables, batch, rng=None, *, train=False):
    state = {k: v for k, v in variables.items() if k != 'params'}
    # quant_stats may not exist yet: an observer creates its own.
    mutable = [*state, 'quant_stats'] if train else []
    options = {} if train_argument is None else {train_argument: train}
    if wanted:
      mutable = [*mutable, 'intermediates']
      options['capture_intermediates'] = tapped
    x = _entry(batch, image)
    recomputed: set[str] = set()
    own = (_recomputed(blocks, recomputed),) if blocks and train else ()
    stored = (_stored,) if train else ()

    def apply(variables, x, rng):
      return model.apply(
        variables,
        x,
        rngs=None if rng is None else {'dropout': rng},
        mutable=mutable or False,
        **options,
      )

    if remat == 'dots' and train:
      policy = jax.checkpoint_policies.dots_saveable
      apply = jax.checkpoint(apply, policy=policy)
    try:
      with _intercept((*own, *interceptors, *stored)):
        out = apply(dict(variables), x, rng)
    except errors.ScopeParamShapeError as e:
      raise ValueError(
        f'batch[{image!r}] of shape {x.shape} does not fit the parameters of '
        f'{type(model).__name__}: {str(e).split(" (https:")[0]}'
      ) from e
    if own and not recomputed:
      with _intercept(interceptors):
        paths = _paths(model, variables, x, options)
      raise ValueError(
        f'remat={remat!r} matches no submodule: '
        f'{rules.near_misses(remat, paths)}'
      )
    output, updated = out if mutable else (out, {})
    updated = dict(updated)
    features = _features(updated.pop('intermediates', {}))
    missing = wanted - set(features)
    if missing:
      with _intercept(interceptors):
        _raise_unknown_tap(model, variables, x, options, missing)
    return Forward(output, features, {**state, **updated} if train else state)

  def intercepted(*outer):
    return from_linen(
      model,
      taps=taps,
      interceptors=(*outer, *given),
      axis_name=axis_name,
      image=image,
      train_argument=train_argument,
      dtype=dtype,
      remat=remat,
    )

  return LinenForward(forward, intercepted)


def _entry(batch: Batch, key: str) -> jax.Array:
  if key not in batch:
    raise ValueError(
      f'The batch has no {key!r}; it has {", ".join(map(repr, batch))}.'
    )
  return batch[key]


class _intercept:
  """`nn.intercept_methods` of several functions, the first outermost."""

  def __init__(self, interceptors: Sequence[Interceptor]):
    self.contexts = [nn.intercept_methods(f) for f in interceptors]

  def __enter__(self) -> None:
    for context in self.contexts:
      context.__enter__()

  def __exit__(self, *error: Any) -> None:
    for context in reversed(self.contexts):
      context.__exit__(*error)


def _features(intermediates: Mapping[str, Any]) -> dict[str, Any]:
  flat = traverse_util.flatten_dict(intermediates, sep='/')
  # linen keeps one output per call; a tap is the last one.
  return {k.removesuffix('/__call__'): v[-1] for k, v in flat.items()}


def _raise_unknown_tap(
  model: nn.Module,
  variables: Variables,
  x: jax.Array,
  options: Mapping[str, Any],
  missing: Collection[str],
) -> NoReturn:
  name = min(missing)
  paths = _paths(model, variables, x, options)
  raise ValueError(f'Unknown tap {name!r}: {rules.near_misses(name, paths)}')


def _paths(
  model: nn.Module,
  variables: Variables,
  x: jax.Array,
  options: Mapping[str, Any],
) -> list[str]:
  """The paths of all submodules."""
  everything = {**options, 'capture_intermediates': True}

  def run(variables, x):
    rngs = {'dropout': jax.random.key(0)}
    return model.apply(variables, x, rngs=rngs, mutable=True, **everything)[1]

  state = jax.eval_shape(run, dict(variables), x)
  return sorted(set(_features(state['intermediates'])) - {'__call__'})


def _computing_in(dtype: str) -> Interceptor:
  def interceptor(next_fun, args, kwargs, context):
    module = context.module
    if context.method_name == '__call__' and hasattr(module, 'dtype'):
      # As in `_global_batch`, a bound copy that lives for this one forward.
      object.__setattr__(module, 'dtype', dtype)
    return next_fun(*args, **kwargs)

  return interceptor


def _recomputed(pattern: str, found: set[str]) -> Interceptor:
  """Recomputes the modules of a pattern; their paths are added to `found`."""
  inside: list[str] = []

  def interceptor(next_fun, args, kwargs, context):
    module, path = context.module, '/'.join(context.module.path)
    chosen = re.fullmatch(pattern, path) and not inside
    if context.method_name != '__call__' or not chosen:
      return next_fun(*args, **kwargs)
    found.add(path)
    leaves, structure = jax.tree.flatten((args, kwargs))
    traced = [isinstance(leaf, jax.Array) for leaf in leaves]

    def call(module, *arrays):
      given = iter(arrays)
      filled = [
        next(given) if t else x for t, x in zip(traced, leaves, strict=True)
      ]
      args, kwargs = jax.tree.unflatten(structure, filled)
      return module(*args, **kwargs)

    inside.append(path)
    try:
      arrays = [x for t, x in zip(traced, leaves, strict=True) if t]
      return nn.remat(call)(module, *arrays)
    finally:
      inside.pop()

  return interceptor


def _stored(
  next_fun: Callable[..., Any],
  args: Sequence[Any],
  kwargs: Mapping[str, Any],
  context: Any,
) -> Any:
  """Makes XLA:CPU store what a convolution reads.

  The gradient of a kernel reads it again, in another order. XLA:CPU would fuse
  that with all that led there since the convolution before, or through several
  residual blocks, and compute it anew, each value at its slowest.
  """
  if context.method_name != '__call__' or not isinstance(
    context.module, nn.Conv
  ):
    return next_fun(*args, **kwargs)
  x, *rest = args
  x = jax.lax.platform_dependent(
    x, cpu=jax.lax.optimization_barrier, default=lambda x: x
  )
  return next_fun(x, *rest, **kwargs)


def _global_batch(axis_name: str) -> Interceptor:
  def interceptor(next_fun, args, kwargs, context):
    module = context.module
    if context.method_name != '__call__':
      return next_fun(*args, **kwargs)
    if isinstance(module, nn.BatchNorm):
      # Modules are frozen to guard against state that hides in them; this is
      # a bound copy that lives for this one forward.
      object.__setattr__(module, 'axis_name', axis_name)
    if isinstance(module, nn.Dropout):
      return _global_dropout(module, axis_name, *args, **kwargs)
    return next_fun(*args, **kwargs)

  return interceptor


def _global_dropout(
  module: Any,
  axis_name: str,
  inputs: jax.Array,
  deterministic: bool | None = None,
  rng: jax.Array | None = None,
) -> jax.Array:
  deterministic = nn.merge_param(
    'deterministic', module.deterministic, deterministic
  )
  if module.rate == 0.0 or deterministic:
    return inputs
  if module.rate == 1.0:
    return jax.numpy.zeros_like(inputs)
  rng = module.make_rng(module.rng_collection) if rng is None else rng
  keep = 1.0 - module.rate
  devices = jax.lax.axis_size(axis_name)
  shape = [inputs.shape[0] * devices, *inputs.shape[1:]]
  for axis in module.broadcast_dims:
    shape[axis] = 1
  mask = jax.random.bernoulli(rng, p=keep, shape=shape)
  if shape[0] > 1 or devices == 1:
    # XLA computes the slice alone: each random bit depends on its index only.
    start = jax.lax.axis_index(axis_name) * inputs.shape[0]
    mask = jax.lax.dynamic_slice_in_dim(mask, start, inputs.shape[0])
  mask = jax.numpy.broadcast_to(mask, inputs.shape)
  return jax.lax.select(mask, inputs / keep, jax.numpy.zeros_like(inputs))


def init_linen(
  model: nn.Module,
  rng: jax.Array,
  batch: Batch,
  *,
  image: str | None = None,
) -> dict[str, Any]:
  """The initial variables of a linen module, in evaluation mode, compiled.

  Args:
    model: the module.
    rng: typed key.
    batch: one batch; only the input's shape and dtype matter.
    image: the key of the model's input in the batch.
  """
  image = image or getattr(model, 'reads', 'image')
  x = jax.numpy.zeros(batch[image].shape, batch[image].dtype)
  # A part of another program is compiled with it.
  options = _QUICKLY if _is_concrete(x) else None
  init = jax.jit(model.init, compiler_options=options)
  return dict(init({'params': rng, 'dropout': rng}, x))


def _is_concrete(x: Any) -> bool:
  try:
    np.asarray(x)
  except jax.errors.TracerArrayConversionError:
    return False
  return True


def from_nnx(
  model: nnx.Module, *, image: str = 'image'
) -> tuple[StudentFn, Variables]:
  """A forward of an nnx module, and its variables.

  Args:
    model: the module; `model(batch[image])` returns the output. `train()` and
      `eval()` are called on a copy as the step asks.
    image: the key of the model's input in the batch.

  Returns:
    `(forward, variables)`: variables are nested dicts, `params` (every
    `nnx.Param`) and, where the module has any, `model_state` (BatchNorm
    statistics, random streams). `rng` is not used: an nnx module carries its
    own streams.

  Example:
    >>> forward, variables = from_nnx(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> forward(variables, {'image': jax.numpy.ones((2, 4))}).output.shape
    (2, 3)
  """
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
    output = module(_entry(batch, image))
    state = {k: v for k, v in variables.items() if k != 'params'}
    if train and state:
      _, _, rest = _split(module)
      state = {'model_state': nnx.to_pure_dict(rest)}
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


def from_apply(
  apply: Callable[[Any, Any], jax.Array], *, image: str = 'image'
) -> StudentFn:
  """A forward of a plain function of parameters and input.

  Args:
    apply: `(params, x) -> output`; no state, no randomness. For more, write
      the forward itself: it is only a function.
    image: the key of the input in the batch.

  Example:
    >>> forward = from_apply(lambda params, x: x @ params)
    >>> eye = jax.numpy.eye(2)
    >>> forward({'params': eye}, {'image': eye}).output.tolist()
    [[1.0, 0.0], [0.0, 1.0]]
  """

  def forward(variables, batch, rng=None, *, train=False):
    state = {k: v for k, v in variables.items() if k != 'params'}
    return Forward(apply(variables['params'], _entry(batch, image)), {}, state)

  return forward
