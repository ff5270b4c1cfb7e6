"""The command line: `kd-jax run | compare | compress | evaluate | ...`.

Owns flags, messages and exit codes; everything else is a call.
"""

import contextlib
import os
import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from kd_jax.sharding.preemption import REQUEUE, Preempted, stoppable

USAGE = """\
kd-jax: a large model into a small fast one, in JAX.

  kd-jax run      --config FILE --workdir DIR   train a teacher, distil a
                  student, prune and quantize it, export and report
  kd-jax compare  --config FILE --workdir DIR   train one student with every
                  method of distillation and several seeds, and tabulate
  kd-jax compress --model PATH --recipe FILE --budget SIZE --workdir DIR
                  find and train the best small form of a trained network
                  within a size, FLOPs or a latency
  kd-jax cache-teacher --config FILE --workdir DIR
                  store what the run's teacher says of every image in every
                  epoch, to train students without running it
  kd-jax evaluate --workdir DIR [--split SPLIT] measure what a run made
  kd-jax shrink   --workdir DIR --sparsity X    remove channels and heads of a
                  trained student, and print what can leave and what it costs
  kd-jax report   --workdir DIR                 print the report of a run
  kd-jax launch   tpu-vm | queued | gke | xpk --name NAME --zone ZONE
                  --accelerator TYPE --config FILE --workdir gs://BUCKET/DIR
                  run on a Cloud TPU: create, install on all workers, start,
                  follow the log, start again after preemption, delete
  kd-jax plan     --config FILE [--topology v5e:16x16]
                  compile a train step for a TPU that need not be there, and
                  print what it holds, does, sends and how long that takes

run, compare and cache-teacher:
  --config FILE[:tiny]    a configuration such as configs/digits.py; ':tiny'
                          runs every stage in seconds and learns little; or
                          one stored as JSON, which is read and not executed.
                          To go on with a run, --workdir alone is enough
  --config.KEY=VALUE      changes one field, such as --config.seed=1
  --workdir DIR           where everything is written, also gs://BUCKET/DIR;
                          the same command continues a run that was stopped

run, compare, compress and cache-teacher, also with several processes, of which
the cluster tells on Cloud TPU and under SLURM and Open MPI; all need to share
the --workdir:
  --coordinator HOST:PORT where process 0 listens; :PORT is 127.0.0.1
  --num_processes N       how many there are
  --process_id I          which one this is, from 0
  --initialization_timeout SECONDS
                          how long to wait for all of them, 300 (default)
  --heartbeat_timeout SECONDS
                          when one that died ends the others, 100 (default)
  --compile_cache DIR     where each keeps compiled programs for later; off for
                          nowhere; by default JAX_COMPILATION_CACHE_DIR or
                          ~/.cache/kd_jax/compiled

run:
  --stages A,B            only these of: teacher, alone, distill, compress,
                          convert, export, report
  --overwrite             runs the stages again; deletes what depends on them
  --profile               measures how long the devices wait for data, prints
                          it, and writes a trace to <stage>/profile

cache-teacher:
  --out DIR               where to, WORKDIR/teacher_cache by default; then
                          train with --config.teacher.cache=DIR
  --dtype NAME            float16 (default), bfloat16 or float32
  --top_k K               keep the K largest outputs only, for the terms top_k
                          and hard_distillation; 0 (default) for all
  --features              keep the features that the terms read, too
  --epochs N              0 (default) for those of the longest training
  --overwrite             replaces what is there

compress:
  --model PATH            a work directory of kd-jax run, also gs://BUCKET/DIR,
                          or a safetensors file of the network that
                          --recipe.student.model names
  --recipe FILE           a configuration such as configs/compress.py;
                          --recipe.KEY=VALUE changes one field
  --budget LIMIT          such as '20 KB', '1.5 MFLOP' or '0.4 ms'
  --stage STAGE           of a work directory: distill (default) or alone

evaluate:
  --split SPLIT           train, validation or test (default)

shrink:
  --sparsity X            share of the units that leave, 0.5 (default)
  --structure NAME        what the units are: neurons (default), which are
                          channels and heads, or residual_blocks
  --stage STAGE           the student of distill (default) or alone
  --scope SCOPE           global (default): one ranking of all units; layer:
                          one in each group
  --keep A,B              patterns of groups and parameters that stay
  --multiple_of N         rounds the channels that a group keeps up
  --overwrite             replaces a smaller student made before

launch:
  tpu-vm, queued          a TPU VM, at once or as a queued resource
  gke, xpk                writes a workload file for Kubernetes, or prints what
                          to tell xpk; nothing is started
  --dry_run               prints all files and commands, a shell script
  --accelerator TYPE      such as v6e-8 or v5litepod-16
  --spot                  cheaper, and preempted at times
  --project, --runtime    of Google Cloud; that of gcloud, and that of the type
  --package SOURCE        what all workers install: kd_jax==VERSION, a URL, a
                          wheel, or a directory; what runs here (default)
  --keep                  does not delete the machine at the end
  --restarts N            after preemptions, 100 (default)
  --image, --cluster      of gke and xpk: the container, the xpk cluster

plan:
  --config FILE           as for run; --config.KEY=VALUE too
  --topology NAME         chip and shape, such as v5e:16x16 or v5p:4x4x8, with
                          the extra [tpu]; the devices of this machine if empty
  --stage STAGE           teacher, alone, distill (default) or compress
  --what_if A,B           cached_teacher, fsdp, remat, double_batch (all by
                          default), or none; each is compiled
  --estimate              estimates these instead
  --measure               also runs the step on random images; no --topology
  --examples N            images of the train split, if they are not known
  --json PATH             writes the numbers; --overwrite replaces the file

all:
  --debug                 shows the traceback of an error
"""
EXAMPLES = {
  'run': 'configs/digits.py',
  'cache-teacher': 'configs/digits.py',
  'compare': 'configs/compare_digits.py',
  'compress': 'configs/compress.py',
  'launch': 'configs/digits.py',
  'plan': 'configs/digits.py',
}
# The flag that names a configuration file.
CONFIGS = {
  'run': 'config',
  'cache-teacher': 'config',
  'compare': 'config',
  'compress': 'recipe',
  'launch': 'config',
  'plan': 'config',
}
# Those that may run as several processes.
TRAINING = ('run', 'compare', 'compress', 'cache-teacher')
COMMANDS = (
  'run',
  'compare',
  'compress',
  'evaluate',
  'shrink',
  'report',
  'cache-teacher',
  'launch',
  'plan',
)

# Flags that a command needs if it has them.
_NEEDED = {
  'workdir': 'DIR',
  'model': 'PATH',
  'budget': "'20 KB'",
  'name': 'NAME',
  'zone': 'us-central1-a',
  'accelerator': 'v6e-8',
  'cluster': 'CLUSTER',
  'image': 'IMAGE',
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command.

  Args:
    argv: the words after the program's name; those of the process when None.

  Returns:
    The exit code: 0, 2 for bad input, 75 when stopped by a signal after what
    could be saved was saved (run the same command again).
  """
  words = list(sys.argv[1:] if argv is None else argv)
  if not words or words[0] in ('help', '--help', '-h') or '--help' in words:
    print(USAGE, end='')
    return 0 if words else 2
  debug = '--debug' in words
  try:
    with stoppable():
      return _dispatch(words)
  except Preempted as e:
    print(f'kd-jax: {e} Run the same command to go on.', file=sys.stderr)
    return REQUEUE
  except (ValueError, OSError, ImportError, FloatingPointError) as e:
    if debug:
      raise
    print(f'kd-jax: {_sentence(e)}', file=sys.stderr)
    return 2


def _sentence(error: BaseException) -> str:
  return ' '.join(str(error).split())


def _dispatch(words: list[str]) -> int:
  command, *rest = words
  if command not in COMMANDS:
    raise ValueError(
      f'There is no command {command!r}; the commands are '
      f'{", ".join(COMMANDS)}. See kd-jax --help.'
    )
  values = _parse(command, rest)
  # Imported late: --help and a wrong flag should not wait for JAX.
  from kd_jax import commands  # noqa: PLC0415
  from kd_jax.sharding import hosts  # noqa: PLC0415

  work = getattr(commands, command.replace('-', '_'))
  if command not in TRAINING:
    return work(values)
  hosts.initialize(
    values.coordinator,
    values.num_processes,
    values.process_id,
    initialization_timeout=values.initialization_timeout,
    heartbeat_timeout=values.heartbeat_timeout,
  )
  with hosts.as_one():
    return work(values)


def _parse(command: str, words: list[str]) -> flags.FlagValues:
  values = flags.FlagValues()
  if command == 'launch':
    words = _define_launch(words, values)
  if command == 'plan':
    _define_plan(values)
  else:
    flags.DEFINE_string('workdir', None, 'work directory', flag_values=values)
  flags.DEFINE_boolean('debug', False, 'show tracebacks', flag_values=values)
  if command == 'run':
    flags.DEFINE_list('stages', [], 'stages to run', flag_values=values)
    flags.DEFINE_boolean('profile', False, 'measure', flag_values=values)
  if command in ('run', 'cache-teacher'):
    flags.DEFINE_boolean('overwrite', False, 'run again', flag_values=values)
  if command in TRAINING:
    flags.DEFINE_string('compile_cache', '', 'directory', flag_values=values)
    _define_processes(values)
  if command in CONFIGS:
    _define_config(command, words, values)
  if command == 'cache-teacher':
    flags.DEFINE_string('out', '', 'directory', flag_values=values)
    flags.DEFINE_string('dtype', 'float16', 'of numbers', flag_values=values)
    flags.DEFINE_integer('top_k', 0, 'outputs kept', flag_values=values)
    flags.DEFINE_boolean('features', False, 'too', flag_values=values)
    flags.DEFINE_integer('epochs', 0, 'how many', flag_values=values)
  if command == 'compress':
    flags.DEFINE_string('model', None, 'what to compress', flag_values=values)
    flags.DEFINE_string('budget', None, 'limit', flag_values=values)
  if command == 'evaluate':
    flags.DEFINE_string('split', 'test', 'split', flag_values=values)
  if command in ('shrink', 'compress'):
    flags.DEFINE_string('stage', 'distill', 'whose student', flag_values=values)
  if command == 'shrink':
    flags.DEFINE_float('sparsity', 0.5, 'share to remove', flag_values=values)
    flags.DEFINE_string('structure', 'neurons', 'units', flag_values=values)
    flags.DEFINE_string('scope', 'global', 'ranking', flag_values=values)
    flags.DEFINE_list('keep', [], 'what stays', flag_values=values)
    flags.DEFINE_integer('multiple_of', 1, 'of channels', flag_values=values)
    flags.DEFINE_boolean('overwrite', False, 'replace', flag_values=values)
  program = f'kd-jax {command}'
  try:
    with _arguments(program, words):
      left = values(sys.argv)
  except flags.Error as e:
    raise ValueError(f'{e}. See kd-jax --help.') from e
  if left[1:]:
    raise ValueError(f'{program} takes no argument {left[1]!r}.')
  for name, example in _NEEDED.items():
    if name in values and not values[name].value:
      raise ValueError(f'{program} needs --{name}={example}.')
  return values


def _define_processes(values: flags.FlagValues) -> None:
  for name, default in (
    ('num_processes', None),
    ('process_id', None),
    ('initialization_timeout', 300),
    ('heartbeat_timeout', 100),
  ):
    flags.DEFINE_integer(name, default, 'of processes', flag_values=values)
  flags.DEFINE_string('coordinator', None, 'process 0', flag_values=values)


@contextlib.contextmanager
def _arguments(program: str, words: list[str]) -> Iterator[None]:
  """Sets sys.argv, where ml_collections looks for --config.KEY."""
  argv, sys.argv = sys.argv, [program, *words]
  try:
    yield
  finally:
    sys.argv = argv


def _define_launch(words: list[str], values: flags.FlagValues) -> list[str]:
  """Defines the flags of the place that is named first."""
  from kd_jax import rules  # noqa: PLC0415
  from kd_jax.launch import PLACES  # noqa: PLC0415

  if not words or words[0].startswith('-'):
    raise ValueError(f'kd-jax launch needs a place: {", ".join(PLACES)}.')
  place, *words = words
  rules.choose('place to launch on', place, dict.fromkeys(PLACES))
  machine, pods = place in ('tpu-vm', 'queued'), place in ('gke', 'xpk')
  texts = {
    'place': True,
    'name': True,
    'accelerator': True,
    'zone': place != 'gke',
    'project': place != 'gke',
    'runtime': machine,
    'package': machine,
    'image': pods,
    'cluster': place == 'xpk',
  }
  for name in (name for name, known in texts.items() if known):
    flags.DEFINE_string(name, '', name, flag_values=values)
  switches = {'dry_run': True, 'spot': place != 'xpk', 'keep': machine}
  for name in (name for name, known in switches.items() if known):
    flags.DEFINE_boolean(name, False, name, flag_values=values)
  flags.DEFINE_integer('restarts', 100, 'restarts', flag_values=values)
  return [f'--place={place}', *words]


def _define_plan(values: flags.FlagValues) -> None:
  texts = {'topology': '', 'stage': 'distill', 'json': ''}
  for name, default in texts.items():
    flags.DEFINE_string(name, default, name, flag_values=values)
  for name in ('estimate', 'measure', 'overwrite'):
    flags.DEFINE_boolean(name, False, name, flag_values=values)
  flags.DEFINE_list('what_if', ['all'], 'alternatives', flag_values=values)
  flags.DEFINE_integer('examples', 0, 'of the split', flag_values=values)


def _define_config(
  command: str, words: list[str], values: flags.FlagValues
) -> None:
  from ml_collections import config_flags  # noqa: PLC0415

  flag = CONFIGS[command]
  path = _value_of(flag, words)
  if path is None and command == 'run' and _started(words):
    return
  if path is None:
    raise ValueError(
      f'kd-jax {command} needs --{flag}=FILE, such as {EXAMPLES[command]}.'
    )
  stored = path.endswith('.json')
  config = _stored_config(path) if stored else _executed_config(path)
  _check_overrides(flag, config, words)
  _remove(flag, words)
  with _arguments(command, words):
    config_flags.DEFINE_config_dict(flag, config, flag_values=values)


def _started(words: list[str]) -> bool:
  """Whether the work directory has a configuration, which is all it takes."""
  from kd_jax.storage import mirror  # noqa: PLC0415

  workdir = _value_of('workdir', words)
  if not workdir:
    return False
  return (mirror.resolve(workdir) / 'config.json').exists()


def _stored_config(path: str) -> Any:
  import ml_collections  # noqa: PLC0415

  from kd_jax.storage import mirror, workdir  # noqa: PLC0415

  stored = workdir.read_json(mirror.resolve(path))
  if not isinstance(stored, dict):
    raise ValueError(f'{path} holds no configuration.')
  return ml_collections.ConfigDict(workdir.frozen(stored))


def _executed_config(path: str) -> Any:
  file, *variant = path.split(':', 1)
  if not os.path.isfile(file):
    raise ValueError(f'There is no configuration file {file!r}.')
  return runpy.run_path(file)['get_config'](*variant)


def _value_of(flag: str, words: list[str]) -> str | None:
  for i, word in enumerate(words):
    if re.fullmatch(rf'--?{flag}=.*', word):
      return word.split('=', 1)[1]
    if re.fullmatch(rf'--?{flag}', word) and i + 1 < len(words):
      return words[i + 1]
  return None


def _remove(flag: str, words: list[str]) -> None:
  """Removes what `_value_of` found."""
  for i, word in enumerate(words):
    if re.fullmatch(rf'--?{flag}(=.*)?', word):
      del words[i : i + (1 if '=' in word else 2)]
      return


def _check_overrides(flag: str, config: Any, words: list[str]) -> None:
  """Names the near misses of an unknown --config.KEY."""
  from kd_jax import rules  # noqa: PLC0415
  from kd_jax.storage import workdir  # noqa: PLC0415

  known = workdir.flatten(config.to_dict())
  for word in words:
    match = re.match(rf'--(?:no)?{flag}\.([\w.]+)', word)
    if match:
      rules.choose(f'{flag} key', match[1], known)
