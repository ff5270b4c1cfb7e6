"""The teacher cache of a run: writing it, and opening it to train with.

Owns what of a configuration a teacher's outputs depend on, and what students
ask for. How outputs are stored is `data.teacher_cache`; that students learn
from a cache is decided by `config.teacher.cache`.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_jax import data, terms
from kd_jax.recipe.network import Network
from kd_jax.recipe.run import Run
from kd_jax.storage.progress import ProgressBar

# Of the teacher's configuration: what does not change its function, given its
# weights.
_NOT_FUNCTION = ('train', 'pretrained', 'cache', 'shard')


def open_teacher(run: Run) -> Network:
  """The trained teacher of a run, with its cache if the configuration has one.

  Args:
    run: with `config.teacher.cache`, a directory, or '' for none.

  Raises:
    ValueError: if the stage is not finished, or the cache cannot be read or is
      one of another teacher, other data or another augmentation.
  """
  teacher, path = run.teacher(), run.config.teacher.cache
  if not path:
    return teacher
  cache = data.TeacherCache(path)
  cache.check(fingerprint(run, teacher))
  return dataclasses.replace(teacher, cache=cache)


def fingerprint(run: Run, teacher: Network) -> dict[str, Any]:
  """What the outputs of a run's teacher in training depend on.

  Args:
    run: its data, augmentation and seed count.
    teacher: of the run.
  """
  c, seed = run.config.data, run.config.seed
  augmentation = {name: c[name] for name in run.task.drawn} | run.statistics
  augmentation['seed'] = None if _constant(run) else seed
  words = run.config.teacher.to_dict()
  return data.make_fingerprint(
    teacher.variables,
    run.transfer,
    network={k: v for k, v in words.items() if k not in _NOT_FUNCTION},
    augmentation=augmentation,
    # Mixup pairs neighbours in the order of an epoch.
    order={'seed': seed} if c.mixup else None,
  )


def _constant(run: Run) -> bool:
  return not any(run.config.data[name] for name in run.task.drawn)


def kept(form: data.Form) -> terms.Kept:
  """What terms may ask of a teacher whose outputs are kept in a form."""
  return terms.Kept(form.features, form.top_k, form.temperature)


def make_form(
  run: Run,
  *,
  dtype: str = 'float16',
  top_k: int = 0,
  features: Sequence[str] = (),
) -> data.Form:
  """How to keep what a run's students ask for.

  Args:
    run: whose terms and teachers count.
    dtype: of all numbers.
    top_k: how many of the largest outputs; 0 for all.
    features: the taps that students read.
  """
  c = run.config
  members: tuple[str, ...] = ()
  if c.teacher.others and c.teacher.space == 'losses':
    members = tuple(f'{name}/output' for name in ('teacher', *c.teacher.others))
  return data.Form(dtype, top_k, _temperature(c), (*members, *features))


def _temperature(c: Any) -> float:
  """That of the terms which need what the other outputs are in total."""
  for words in (*c.distill.terms.values(), *c.compress.terms.values()):
    at = words.get('temperature', 1.0)
    spread = words['name'] == 'top_k' and words.get('tail') == 'uniform'
    if spread and not isinstance(at, Mapping):
      return float(at)
  return 1.0


def write(
  run: Run,
  teacher: Network,
  directory: str | Path,
  form: data.Form,
  *,
  epochs: int,
  overwrite: bool = False,
) -> dict[str, Any]:
  """Writes the cache of a run's teacher; prints its bytes first.

  Args:
    run: the run.
    teacher: its trained teacher.
    directory: where to.
    form: what to keep.
    epochs: of the longest training that learns from it; one is written where
      nothing is drawn at random.
    overwrite: replaces another cache.

  Returns:
    The manifest.

  Raises:
    ValueError: see `data.write_cache`.
  """
  started, bar = time.monotonic(), None

  def progress(done: int, total: int, written: int) -> None:
    nonlocal bar
    if bar is None:
      bar = ProgressBar('cache-teacher', total)
      bar.__enter__()
    rate = done / max(time.monotonic() - started, 1e-9)
    bar.update(done, {'MB': written / 1e6}, rate)

  try:
    return data.write_cache(
      directory,
      teacher.make(taps=_own_taps(form, teacher)),
      teacher.variables,
      run.transfer,
      run.preprocess,
      fingerprint=fingerprint(run, teacher),
      seed=run.config.seed,
      epochs=epochs,
      form=form,
      constant=_constant(run),
      batch_size=run.config.eval_batch_size,
      overwrite=overwrite,
      progress=progress,
    )
  finally:
    if bar is not None:
      bar.__exit__()


def _own_taps(form: data.Form, teacher: Network) -> tuple[str, ...]:
  """The features to ask for: an ensemble gives its members' outputs anyway."""
  members = teacher.taps if isinstance(teacher.taps, Mapping) else ()
  given = {f'{member}/output' for member in members}
  return tuple(t for t in form.features if t not in given)
