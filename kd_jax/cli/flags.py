"""Which flags each command has: data, for `parsing` to read words by.

Owns names, kinds and defaults. What they mean is said to the user in `usage`,
and made true in `commands`.
"""

from typing import Any, NamedTuple


class Flag(NamedTuple):
  """A flag of a command.

  Attributes:
    name: what follows '--'.
    kind: str, int, float, bool, or list for words between commas.
    default: of that kind, or None; that of a list as text.
    needed: what to write, for a flag that a command cannot do without.
  """

  name: str
  kind: type = str
  default: Any = ''
  needed: str = ''


class Command(NamedTuple):
  """A command of `kd-jax`.

  Attributes:
    flags: its own.
    config: the flag that names a configuration file; '' without one.
    example: such a file.
    field: what such a file has and others have not; '' if any will do.
    several: whether it may run as several processes.
    registers: whether it may be given a configuration file, to be executed for
      what that registers; the fields are those of the work directory.
    sent: whether the fields go to other machines, without the file.
  """

  flags: tuple[Flag, ...]
  config: str = ''
  example: str = ''
  field: str = ''
  several: bool = False
  registers: bool = False
  sent: bool = False


DEBUG = Flag('debug', bool, False)
_WORKDIR = Flag('workdir', needed='DIR')
_OVERWRITE = Flag('overwrite', bool, False)
_STAGE = Flag('stage', default='distill')

# Those of a command that may run as several processes.
PROCESSES = (
  Flag('coordinator', default=None),
  Flag('num_processes', int, None),
  Flag('process_id', int, None),
  Flag('initialization_timeout', int, 300),
  Flag('heartbeat_timeout', int, 100),
  Flag('compile_cache'),
)

COMMANDS = {
  'run': Command(
    (_WORKDIR, Flag('stages', list), Flag('profile', bool, False), _OVERWRITE),
    config='config',
    example='configs/digits.py',
    several=True,
  ),
  'compare': Command(
    (_WORKDIR,),
    config='config',
    example='configs/compare_digits.py',
    field='methods',
    several=True,
  ),
  'compress': Command(
    (
      _WORKDIR,
      Flag('model', needed='PATH'),
      Flag('budget', needed="'20 KB'"),
      _STAGE,
    ),
    config='recipe',
    example='configs/compress.py',
    field='search',
    several=True,
  ),
  'evaluate': Command(
    (_WORKDIR, Flag('split', default='test')), registers=True
  ),
  'shrink': Command(
    (
      _WORKDIR,
      _STAGE,
      Flag('sparsity', float, 0.5),
      Flag('structure', default='neurons'),
      Flag('scope', default='global'),
      Flag('keep', list),
      Flag('multiple_of', int, 1),
      _OVERWRITE,
    ),
    registers=True,
  ),
  'report': Command((_WORKDIR,), registers=True),
  'cache-teacher': Command(
    (
      _WORKDIR,
      Flag('out'),
      Flag('dtype', default='float16'),
      Flag('top_k', int, 0),
      Flag('features', bool, False),
      Flag('epochs', int, 0),
      _OVERWRITE,
    ),
    config='config',
    example='configs/digits.py',
    several=True,
  ),
  # And those of its place.
  'launch': Command(
    (
      _WORKDIR,
      Flag('name', needed='NAME'),
      Flag('place'),
      Flag('dry_run', bool, False),
      Flag('restarts', int, 100),
    ),
    config='config',
    example='configs/digits.py',
    sent=True,
  ),
  'plan': Command(
    (
      Flag('topology'),
      _STAGE,
      Flag('what_if', list, 'all'),
      Flag('estimate', bool, False),
      Flag('measure', bool, False),
      Flag('examples', int, 0),
      Flag('json'),
      _OVERWRITE,
    ),
    config='config',
    example='configs/digits.py',
  ),
}

_ZONE = Flag('zone', needed='us-central1-a')
_ACCELERATOR = Flag('accelerator', needed='v6e-8')
_IMAGE = Flag('image', needed='IMAGE')
_PROJECT = Flag('project')
_SPOT = Flag('spot', bool, False)
_MACHINE = (
  _ZONE,
  _ACCELERATOR,
  _PROJECT,
  Flag('runtime'),
  Flag('package'),
  _SPOT,
  Flag('keep', bool, False),
)

# Those of `launch`, by the place to launch on.
PLACES = {
  'tpu-vm': _MACHINE,
  'queued': _MACHINE,
  'gke': (_ACCELERATOR, _IMAGE, _SPOT),
  'xpk': (
    _ZONE,
    _ACCELERATOR,
    Flag('cluster', needed='CLUSTER'),
    _IMAGE,
    _PROJECT,
  ),
}
