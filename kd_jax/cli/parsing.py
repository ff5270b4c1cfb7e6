"""From the words of a command line to the values of its flags.

Owns the reading of words and of the configuration file that they name; which
flags there are is in `flags`.
"""

import contextlib
import inspect
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_collections
from absl import flags as absl_flags
from ml_collections import config_flags

from kd_jax import rules
from kd_jax.cli.flags import COMMANDS, DEBUG, PLACES, PROCESSES, Flag
from kd_jax.storage import mirror, workdir

_DEFINE: dict[type, Callable[..., Any]] = {
  str: absl_flags.DEFINE_string,
  int: absl_flags.DEFINE_integer,
  float: absl_flags.DEFINE_float,
  bool: absl_flags.DEFINE_boolean,
  list: absl_flags.DEFINE_list,
}


def parse(command: str, words: Sequence[str]) -> absl_flags.FlagValues:
  """The values of a command's flags, and its configuration.

  Args:
    command: of `flags.COMMANDS`.
    words: what follows it.

  Returns:
    The values, as attributes.

  Raises:
    ValueError: for words that the command does not take, or without those that
      it needs.
  """
  kind = COMMANDS[command]
  own: tuple[Flag, ...] = (*kind.flags, DEBUG)
  if kind.several:
    own += PROCESSES
  if command == 'launch':
    place, others = _place(words)
    own += PLACES[place]
    words = [f'--place={place}', *others]
  values = absl_flags.FlagValues()
  for flag in own:
    define = _DEFINE[flag.kind]
    define(flag.name, flag.default, None, flag_values=values)
  words = _define_config(command, list(words), values)
  _read(f'kd-jax {command}', words, values)
  for flag in own:
    if flag.needed and not values[flag.name].value:
      raise ValueError(f'kd-jax {command} needs --{flag.name}={flag.needed}.')
  return values


def _place(words: Sequence[str]) -> tuple[str, Sequence[str]]:
  """The place that `launch` names first, and the other words."""
  if not words or words[0].startswith('-'):
    raise ValueError(f'kd-jax launch needs a place: {", ".join(PLACES)}.')
  rules.choose('place to launch on', words[0], PLACES)
  return words[0], words[1:]


def _read(
  program: str, words: Sequence[str], values: absl_flags.FlagValues
) -> None:
  try:
    with _arguments(program, words):
      left = values(sys.argv)
  except absl_flags.Error as e:
    raise ValueError(f'{e}. See kd-jax --help.') from e
  if left[1:]:
    raise ValueError(f'{program} takes no argument {left[1]!r}.')


@contextlib.contextmanager
def _arguments(program: str, words: Sequence[str]) -> Iterator[None]:
  """Sets sys.argv, where ml_collections looks for --config.KEY."""
  argv, sys.argv = sys.argv, [program, *words]
  try:
    yield
  finally:
    sys.argv = argv


def _define_config(
  command: str, words: list[str], values: absl_flags.FlagValues
) -> list[str]:
  """Defines --config.KEY by the file that --config names; the other words."""
  kind = COMMANDS[command]
  flag, example = kind.config, kind.example
  if kind.registers:
    path, words = _taken('config', words)
    if path is not None:
      _executed(path)
  if not flag:
    return words
  path, others = _taken(flag, words)
  if path is None and command == 'run' and _started(words):
    for word in words:
      if word.startswith(f'--{flag}.'):
        raise ValueError(f'{word} needs --{flag}=FILE, whose field it changes.')
    return words
  if path is None:
    raise ValueError(
      f'kd-jax {command} needs --{flag}=FILE, such as {example}.'
    )
  if path.endswith('.json'):
    config = _stored(path)
  else:
    config = (_alone if kind.sent else _executed)(path)
  if kind.field and kind.field not in config:
    raise ValueError(
      f'{path} has no field {kind.field!r}: kd-jax {command} needs a '
      f'configuration such as {example}.'
    )
  _check_overrides(flag, config, others)
  with _arguments(command, others):
    config_flags.DEFINE_config_dict(flag, config, flag_values=values)
  return others


def _taken(flag: str, words: list[str]) -> tuple[str | None, list[str]]:
  """What a flag is given, if it is, and the words without that."""
  for i, word in enumerate(words):
    name, equals, value = word.partition('=')
    if name not in (f'-{flag}', f'--{flag}'):
      continue
    if equals:
      return value, words[:i] + words[i + 1 :]
    if i + 1 < len(words):
      return words[i + 1], words[:i] + words[i + 2 :]
  return None, words


def _started(words: list[str]) -> bool:
  """Whether the work directory has a configuration, which is all it takes."""
  path, _ = _taken('workdir', words)
  if not path:
    return False
  return (mirror.resolve(path) / 'config.json').exists()


def _stored(path: str) -> Any:
  stored = workdir.read_json(mirror.resolve(path))
  if not isinstance(stored, dict):
    raise ValueError(f'{path} holds no configuration.')
  return ml_collections.ConfigDict(workdir.frozen(stored))


def _executed(path: str) -> Any:
  file, *variant = path.split(':', 1)
  if not os.path.isfile(file):
    raise ValueError(f'There is no configuration file {file!r}.')
  with _named(file):
    made = runpy.run_path(file).get('get_config')
  if made is None:
    raise ValueError(f'{file} is no configuration: it has no get_config().')
  if variant and not inspect.signature(made).parameters:
    raise ValueError(f'{file} has no variants, such as {variant[0]!r}.')
  with _named(file):
    config = made(*variant)
  if not isinstance(config, ml_collections.ConfigDict):
    raise ValueError(
      f'get_config() of {file} returned {type(config).__name__}, and not an '
      'ml_collections.ConfigDict, as kd_jax.defaults.get_config() is.'
    )
  return config


@contextlib.contextmanager
def _named(file: str) -> Iterator[None]:
  """Says of what a configuration file does wrong in which line it is."""
  try:
    yield
  except ValueError:
    raise  # Written for who chose the variant.
  except Exception as e:
    frames = traceback.extract_tb(e.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    if isinstance(e, SyntaxError):
      lines = [e.lineno]
    where = f', line {lines[-1]}' if lines else ''
    raise ValueError(f'{file}{where}: {type(e).__name__}: {e}') from e


def _alone(path: str) -> Any:
  """A configuration that says all by its fields, and registers nothing."""
  # Imported late, since other commands need it later or never.
  from kd_jax.cli import registries

  before = registries.entries()
  config = _executed(path)
  added = [
    name
    for name, entry in registries.entries().items()
    if before.get(name) is not entry
  ]
  if added:
    raise ValueError(
      f'{path} registers {", ".join(added)}, which the machines that are '
      'launched would not know, as they get the fields alone: move that into '
      'a clone of kd_jax, and have them install the clone (--package, --image).'
    )
  return config


def _check_overrides(flag: str, config: Any, words: list[str]) -> None:
  """Names the near misses of an unknown --config.KEY."""
  known = workdir.flatten(config.to_dict())
  for word in words:
    match = re.match(rf'--(?:no)?{flag}\.([\w.]+)', word)
    if match:
      rules.choose(f'{flag} key', match[1], known)
