"""The train and eval steps: pure functions, compiled by `sharding`.

One train step is: teacher forward; mask -> fake-quant -> student forward ->
objective -> optimizer. Pruning masks live in the optimizer (`prune`), so that
the parameters that arrive here are already masked. Owns neither compilation nor
loops, data and files.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kd_jax import loops
from kd_jax.objectives import Inputs, Objective, mean
from kd_jax.params_fn import with_step
from kd_jax.types import (
  ATTENTION_MASK,
  CACHED,
  Batch,
  Forward,
  ObjectiveState,
  Params,
  StudentFn,
  TeacherFn,
  TrainState,
  TrainStep,
  Variables,
  check_function,
  check_has,
  check_variables,
)


def make_train_step(
  student_fn: StudentFn,
  objective: Objective,
  tx: optax.GradientTransformation,
  *,
  teacher_fn: TeacherFn | None = None,
  params_fn: Callable[..., Params] = lambda params: params,
  axis_name: str | None = None,
  num_shards: int | None = None,
  objective_tx: optax.GradientTransformation | None = None,
  accumulate: int = 1,
) -> TrainStep:
  """Makes the step that trains a student; pure and not compiled.

  Args:
    student_fn: `(variables, batch, rng, *, train) -> Forward`.
    objective: what to minimise; see `objectives`.
    tx: optimizer of the student's parameters.
    teacher_fn: `(variables, batch) -> Forward`, or None without a teacher.
    params_fn: map from the trained parameters to those the student runs with,
      `(params) -> params`, such as `fake_quant_params`; differentiated through.
      If its second positional argument has no default or is called `step`, it
      is called as `(params, step)` with the int32 scalar `state.step`, as
      `prune.straight_through` asks for; which one is found out here, once.
    axis_name: the mapped axis under `shard_map` or `pmap`, None under `jit`.
    num_shards: under `jit`, the devices over which the batch is split: parts
      of the batch for the terms with `scope='local'`, which need it.
    objective_tx: optimizer of the objective's own parameters; needed only if
      it has any. Usually the student's, without pruning.
    accumulate: into how many parts the batch is divided, which go through the
      networks one after the other; the optimizer sees the mean of their
      gradients. On accelerators they take the memory of one; on CPUs, where
      loops are slow, they are written out and save none. The mean is the
      gradient of the whole batch where the loss is a mean over examples. It
      differs where examples meet: BatchNorm, observers and relational terms
      see one part at a time, each part moves running statistics and memory
      banks, and dropout draws anew.

  Returns:
    `train_step(state, batch, rng) -> (state, metrics)`. `rng` is the run's
    key: the step folds `state.step` into it. Metrics are scalars, means over
    the global batch: those of the objective, where integers and flags have to
    be equal on all devices; and the norms of the gradients, `grad_norm` and, of
    what the objective owns, `grad_norm/objective`.

  Raises:
    ValueError: for a module in place of a function, or what is no objective or
      optimizer; when traced, for a state without the teacher, no key, or if
      `accumulate` does not divide the batch.

  Example:
    >>> from kd_jax.objectives import term
    >>> student_fn = lambda v, batch, rng, *, train: Forward(
    ...   batch['x'] @ v['params'])
    >>> objective = term(lambda i: jnp.square(i.student.output - i.batch['y']))
    >>> tx, batch = optax.sgd(0.25), {'x': jnp.eye(2), 'y': jnp.ones(2)}
    >>> train_step = jax.jit(make_train_step(student_fn, objective, tx))
    >>> state = init_state(
    ...   student_fn, objective, tx, {'params': jnp.zeros(2)}, batch)
    >>> state, metrics = train_step(state, batch, jax.random.key(0))
    >>> state.params.tolist()
    [0.25, 0.25]
  """
  if accumulate < 1:
    raise ValueError(f'accumulate={accumulate} is not a number from 1 on.')
  _check_parts(student_fn, teacher_fn, objective, tx)
  params_at = with_step(params_fn)
  # Names that profiles and compiled programs show.
  student_fn = jax.named_scope('student')(student_fn)
  if teacher_fn is not None:
    teacher_fn = jax.named_scope('teacher')(teacher_fn)

  def train_step(state, batch, rng):
    if teacher_fn is not None and state.teacher is None:
      raise ValueError(
        'The step has a teacher_fn and the state no teacher: give init_state '
        'teacher_fn and teacher too.'
      )
    if not hasattr(rng, 'dtype'):
      raise ValueError(f'rng is a key, such as jax.random.key(0), not {rng!r}.')
    rng = jax.random.fold_in(rng, state.step)
    trainable = (state.params, state.objective.params)
    zeros = jax.tree.map(jnp.zeros_like, trainable)
    tokens = batch.get(ATTENTION_MASK)
    trainable, zeros = _varying((trainable, zeros), axis_name)

    def gradients(carried, batch, rng, part):
      """Of one part of the batch: new states, loss and metrics, gradients."""
      model_state, objective_state = carried
      teacher = None
      if teacher_fn is not None:
        teacher = jax.lax.stop_gradient(teacher_fn(state.teacher, batch))

      def loss_fn(trainable):
        params, objective_params = trainable
        variables = {'params': params_at(params, state.step), **model_state}
        student = student_fn(variables, batch, rng, train=True)
        inputs = Inputs(
          student,
          teacher,
          _without_cached(batch),
          state.step,
          rng,
          student_fn=student_fn,
          student_variables=variables,
          teacher_fn=teacher_fn,
          teacher_variables=jax.lax.stop_gradient(state.teacher),
          axis_name=axis_name,
          num_shards=num_shards,
          part=part,
          tokens=tokens,
        )
        loss, new_state, metrics = objective.apply(
          objective_params, objective_state, inputs
        )
        return mean(loss, inputs), (student.model_state, new_state, metrics)

      found, grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable)
      loss, (*states, metrics) = _mean_over(found, axis_name)
      return tuple(states), (loss, metrics), grads

    carried = (state.model_state, state.objective.state)
    carried, (loss, metrics), grads = loops.accumulate(
      gradients, carried, zeros, batch, rng, accumulate
    )
    grads = _mean_over(grads, axis_name)
    model_state, objective_state = carried

    with jax.named_scope('optimizer'):
      params, opt_state = _apply(tx, grads[0], state.opt_state, state.params)
      objective_params, objective_opt_state = _apply(
        objective_tx,
        grads[1],
        state.objective.opt_state,
        state.objective.params,
      )
    new_state = state.replace(
      step=state.step + 1,
      params=params,
      model_state=model_state,
      opt_state=opt_state,
      objective=ObjectiveState(
        objective_params, objective_state, objective_opt_state
      ),
    )
    norms = {'grad_norm': _norm(grads[0])}
    if jax.tree.leaves(grads[1]):
      norms['grad_norm/objective'] = _norm(grads[1])
    return new_state, {'loss/total': loss} | metrics | norms

  # What `sharding.compile_step` compares with its compiler.
  vars(train_step)['axis_name'] = axis_name
  return train_step


def _check_parts(
  student_fn: Any, teacher_fn: Any, objective: Any, tx: Any
) -> None:
  check_function('student_fn', student_fn)
  check_function('teacher_fn', teacher_fn)
  what = 'what a function of kd_jax.objectives returns'
  check_has('objective', objective, ('init', 'apply'), what)
  check_has('tx', tx, ('init', 'update'), 'an optimizer of optax')


def init_state(
  student_fn: StudentFn,
  objective: Objective,
  tx: optax.GradientTransformation,
  variables: Variables,
  batch: Batch,
  *,
  teacher_fn: TeacherFn | None = None,
  teacher: Variables | None = None,
  objective_tx: optax.GradientTransformation | None = None,
  rng: jax.Array | None = None,
) -> TrainState:
  """The state before the first step.

  Args:
    student_fn: as for `make_train_step`, and so are `objective`, `tx`,
      `teacher_fn` and `objective_tx`.
    variables: the student's variables: `{'params': ..., **collections}`,
      copied once: a step that is compiled with donation deletes the copy,
      never the caller's own.
    batch: one batch; only its shapes and dtypes matter.
    teacher: the teacher's variables; copied too.
    rng: key for the objective's parameters; `jax.random.key(0)` when None.

  Returns:
    A `TrainState` at step 0.

  Raises:
    ValueError: if only one of `teacher_fn` and `teacher` is given, variables
      have no 'params', the objective has parameters and there is no
      `objective_tx`, or for a module in place of a function and the like.

  Example:
    >>> from kd_jax.objectives import regression
    >>> student_fn = lambda v, batch, rng, *, train: Forward(
    ...   batch['x'] @ v['params']['w'])
    >>> batch = {'x': jnp.ones((4, 3)), 'target': jnp.ones((4, 2))}
    >>> state = init_state(
    ...   student_fn, regression(), optax.sgd(0.1, momentum=0.9),
    ...   {'params': {'w': jnp.ones((3, 2))}}, batch)
    >>> int(state.step), [x.shape for x in jax.tree.leaves(state.opt_state)]
    (0, [(3, 2)])
  """
  _check_parts(student_fn, teacher_fn, objective, tx)
  if (teacher_fn is None) != (teacher is None):
    raise ValueError('teacher_fn and teacher variables come together.')
  check_variables(variables)
  variables = jax.tree.map(jnp.array, dict(variables))
  params = variables['params']
  model_state = {k: v for k, v in variables.items() if k != 'params'}
  rng = jax.random.key(0) if rng is None else rng

  def init_objective(variables, teacher, batch, rng):
    student = student_fn(variables, batch, rng, train=True)
    forward = None if teacher_fn is None else teacher_fn(teacher, batch)
    inputs = Inputs(
      student,
      forward,
      _without_cached(batch),
      jnp.int32(0),
      rng,
      student_fn=student_fn,
      student_variables=variables,
      teacher_fn=teacher_fn,
      teacher_variables=teacher,
    )
    return objective.init(inputs)

  # jit drops the forwards, of which the objective reads the shapes only.
  objective_params, objective_state = jax.jit(init_objective)(
    variables, teacher, dict(batch), rng
  )
  objective_opt_state = ()
  if jax.tree.leaves(objective_params):
    if objective_tx is None:
      raise ValueError(
        'The objective has parameters of its own: give make_train_step and '
        'init_state an objective_tx that trains them.'
      )
    objective_opt_state = objective_tx.init(objective_params)
  return TrainState(
    step=jnp.int32(0),
    params=params,
    model_state=model_state,
    opt_state=tx.init(params),
    objective=ObjectiveState(
      objective_params, objective_state, objective_opt_state
    ),
    teacher=jax.tree.map(jnp.array, teacher),
  )


def make_eval_step(
  student_fn: StudentFn,
  metrics: Any,
  *,
  teacher_fn: TeacherFn | None = None,
  params_fn: Callable[[Params], Params] = lambda params: params,
) -> Callable[[Variables, Variables | None, Batch], Any]:
  """Makes the step that measures a student on one batch; not compiled.

  Args:
    student_fn: `(variables, batch, rng, *, train) -> Forward`.
    metrics: name -> `metrics.Metric`.
    teacher_fn: needed by the metrics that compare with a teacher.
    params_fn: as for `make_train_step`, of the parameters alone: bind the step
      of one that takes it, `functools.partial(params_fn, step=1000)`.

  Returns:
    `eval_step(variables, teacher, batch) -> sums`, a pytree that adds over
    batches and that `metrics.evaluate` turns into numbers. `batch['mask']`
    `[B]` marks with 0 the examples that only pad the batch.

  Raises:
    ValueError: for metrics without names; when called, for variables without
      'params'.

  Example:
    >>> from kd_jax import metrics
    >>> measured = {'accuracy': metrics.accuracy()}
    >>> student_fn = lambda v, batch, rng, *, train: Forward(batch['x'])
    >>> eval_step = jax.jit(make_eval_step(student_fn, measured))
    >>> batch = {'x': jnp.eye(3), 'label': jnp.array([0, 1, 0]),
    ...          'mask': jnp.array([1, 1, 0])}
    >>> sums = eval_step({'params': {}}, None, batch)['accuracy']
    >>> float(sums['sum']), float(sums['count'])
    (2.0, 2.0)
  """

  check_function('student_fn', student_fn)
  check_has('metrics', metrics, ('items',), 'name -> metric')
  for name, metric in metrics.items():
    what = 'a Metric, such as metrics.accuracy()'
    check_has(f'metrics[{name!r}]', metric, ('update', 'result'), what)

  def eval_step(variables, teacher, batch):
    check_variables(variables)
    variables = {**variables, 'params': params_fn(variables['params'])}
    student: Forward = student_fn(variables, batch, None, train=False)
    forward = None if teacher_fn is None else teacher_fn(teacher, batch)
    mask = batch.get('mask')
    if mask is None:
      mask = jnp.ones(student.output.shape[:1], jnp.float32)
    return {
      name: metric.update(student, forward, batch, mask)
      for name, metric in metrics.items()
    }

  return eval_step


def _without_cached(batch: Batch) -> Batch:
  """What an objective sees of a batch.

  A term that runs the teacher again, on other images, must not get the outputs
  that were stored for these.
  """
  return {k: v for k, v in batch.items() if not k.startswith(CACHED)}


def _varying(tree: Any, axis_name: str | None) -> Any:
  """Replicated parameters as each device's own, where an axis is mapped.

  Their gradients would otherwise come summed over the axis, N times too large,
  under `shard_map`.
  """
  if axis_name is None:
    return tree
  return jax.lax.pcast(tree, axis_name, to='varying')


def _mean_over(tree: Any, axis_name: str | None) -> Any:
  """The mean over a mapped axis; the tree itself without one."""
  if axis_name is None:
    return tree

  def mean_over(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      return x
    if jnp.issubdtype(x.dtype, jnp.inexact):
      return jax.lax.pmean(x, axis_name)
    # Counters and flags, equal on every device; a mean would make floats.
    return jax.lax.pmax(x, axis_name)

  return jax.tree.map(mean_over, tree)


def _norm(grads: Any) -> jax.Array:
  """In float32: a sum of squares overflows float16 at a norm of 256."""
  return optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))


def _apply(tx: Any, grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
  if not jax.tree.leaves(params):
    return params, opt_state
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state
