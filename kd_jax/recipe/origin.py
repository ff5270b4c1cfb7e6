"""What a work directory was made from: its data, and the software that ran.

Owns `origin.json`. Other data on resume is refused, because results would be
of neither; another version of the software or other devices are declared,
because bits may differ from there on: they are printed and in the report.
What the configuration says is compared by `workdir`.
"""

import hashlib
import itertools
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import jax

import kd_jax
from kd_jax import data
from kd_jax.recipe.run import Run
from kd_jax.sharding import hosts
from kd_jax.storage.workdir import read_json, write_json

_FILE = 'origin.json'
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain')


def software() -> dict[str, str]:
  """What bits depend on besides configuration and data.

  Versions, the devices and the number of processes; and `source`, a digest of
  the package's own files, which tells two checkouts of one version apart.
  """
  digest, package = hashlib.sha256(), Path(kd_jax.__file__).parent
  for path in sorted(package.rglob('*.py')):
    digest.update(path.relative_to(package).as_posix().encode())
    digest.update(path.read_bytes())
  return {
    'kd_jax': metadata.version('kd_jax'),
    'source': digest.hexdigest()[:12],
    'python': platform.python_version(),
    **{name: metadata.version(name) for name in _PACKAGES},
    'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    'processes': str(jax.process_count()),
  }


def record(run: Run, *, say: Callable[[str], None] = print) -> None:
  """Says what a directory is made from, before a stage runs in it.

  Args:
    run: whose directory it is; its configuration is written too.
    say: prints one line if the software changed since the last start.

  Raises:
    ValueError: if the data is not what the directory was started with.
  """
  run.workdir.write_config()
  found = hosts.together(lambda: check(run))
  hosts.on_first(lambda: _write(run.workdir.place / _FILE, found, say))


def _write(
  path: Path, found: dict[str, dict[str, str]], say: Callable[[str], None]
) -> None:
  now = software()
  used = read_json(path)['software'] if path.exists() else []
  if used and used[-1] != now:
    say(
      f'This run was started with {_changes(used[-1], now)}: from here on bits '
      'may differ from those of a run that was not stopped.'
    )
  if not used or used[-1] != now:
    write_json(path, {'data': found, 'software': [*used, now]})


def check(run: Run) -> dict[str, dict[str, str]]:
  """What identifies the data of a run, the same as it was.

  Returns:
    name of a data set -> see `tasks.Task.identity`.

  Raises:
    ValueError: if a directory that was started has other data.
  """
  c, identity = run.config.data, run.task.identity
  if identity is None:
    found = {c.name: {'train': data.digest(run.splits['train'])}}
  else:
    found = identity(c)
  path = run.workdir.place / _FILE
  if path.exists():
    for name, files in read_json(path)['data'].items():
      differ = [k for k, x in files.items() if found[name].get(k) != x]
      if differ:
        raise ValueError(
          f'The data set {name!r} is not the one that {run.workdir.place} was '
          f'started with: {differ[0]} differs. Use the same data, or another '
          '--workdir.'
        )
  return found


def resumed(run: Run) -> list[str]:
  """The changes of software while a run was made, in words."""
  path = run.workdir.place / _FILE
  used = read_json(path)['software'] if path.exists() else []
  return [_changes(a, b) for a, b in itertools.pairwise(used)]


def _changes(before: dict[str, str], now: dict[str, str]) -> str:
  changed = [k for k in now if before.get(k) != now[k]]
  old = ', '.join(f'{k} {before.get(k)}' for k in changed)
  return f'{old} and goes on with {", ".join(f"{k} {now[k]}" for k in changed)}'
