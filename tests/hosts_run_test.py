"""Commands on two processes with two devices each, against one with four.

They are stopped, killed, and go on; in a directory and in a bucket.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time

import fake_bucket
import pytest
from pairs import BOUND, ROOT, RUN, environment, joined, small, stopped_at

from kd_jax import data
from kd_jax.report import read_report
from kd_jax.storage.checkpoint import read_manifest

pytestmark = [
  pytest.mark.slow,
  pytest.mark.once,
  pytest.mark.xdist_group('hosts'),
]
TRAINED = ('teacher', 'alone', 'distill', 'compress')
WORKER = 'tests/commands_worker.py'


@pytest.fixture(scope='module')
def configs(tmp_path_factory, data_dir):
  """A directory with the configurations."""
  directory = tmp_path_factory.mktemp('configs')

  def run(config):
    config.data.data_dir = str(data_dir)
    config.mesh.fsdp = 4

  def compare(config):
    config.data.data_dir = str(data_dir)
    config.student.model = {'name': 'mlp', 'hidden': (8,)}
    config.update({'methods': ('kd',), 'seeds': 1})

  def search(config):
    config.search.update({'weights': ('int8', 'int4'), 'neurons': (0.0,)})

  small('digits', directory / 'digits.json', run)
  small('compare_digits', directory / 'compare.json', compare)
  small('compress', directory / 'compress.json', search)
  return directory


def _commands(configs, place):
  """Words of each command, in turn; what a run needs is there before it."""
  run, cache = place / 'run', place / 'cache'
  config = f'--config={configs / "digits.json"}'
  return [
    ['run', config, f'--workdir={run}'],
    [
      'cache-teacher',
      config,
      f'--workdir={run}',
      f'--out={cache}',
      '--dtype=float32',
      '--epochs=2',
    ],
    [
      'run',
      config,
      f'--workdir={place / "cached"}',
      f'--config.teacher.cache={cache}',
      '--stages=teacher,distill',
    ],
    [
      'compare',
      f'--config={configs / "compare.json"}',
      f'--workdir={place / "compare"}',
    ],
    [
      'compress',
      f'--recipe={configs / "compress.json"}',
      f'--model={run}',
      '--budget=1.6 KB',
      f'--workdir={place / "small"}',
    ],
  ]


@pytest.fixture(scope='module')
def made(configs, tmp_path_factory):
  """What two processes and one with as many devices wrote and printed.

  The three run at the same time, because a pair often waits.
  """
  two, one = map(tmp_path_factory.mktemp, ('two', 'one'))
  commands = _commands(configs, two)
  for index in range(2):
    # At last one that is not the same on both.
    differ = [*commands[0][:2], f'--workdir={two / "differ"}']
    differ.append(f'--config.seed={index}')
    words = json.dumps([*commands, differ])
    (two / f'{index}.json').write_text(words)
  words = one / 'commands.json'
  words.write_text(json.dumps(_commands(configs, one)))
  pair = joined(WORKER, own=lambda index: [str(two / f'{index}.json')])
  command = [sys.executable, WORKER, str(words)]
  done = subprocess.run(command, cwd=ROOT, env=environment(4), timeout=BOUND)
  codes, said = pair.ended()
  assert (codes, done.returncode) == ([0, 0], 0), said
  return two, one, said


def test_all_commands_end_and_one_process_speaks(made):
  two, _, said = made
  names = ('run', 'cache-teacher', 'run', 'compare', 'compress')
  ends = [f'{name} ended with 0' for name in names] + ['run ended with 2']
  for words in said:
    assert [x for x in words.splitlines() if ' ended with ' in x] == ends
    assert 'Process 1 differs from process 0: seed is 1, not 0.' in words
  assert not (two / 'differ').exists()
  for word in (
    'report: done',
    'teacher: step 24/24',
    'cache-teacher: step',
    'Teacher cache: ',
    'kd: ',
    'Table and plot',
    'training',
    'Artefact: ',
  ):
    assert word in said[0] and word not in said[1], word


def test_a_whole_run_equals_one_process(made):
  two, one, _ = made
  _same_histories(two / 'run', one / 'run', TRAINED)
  a, b = (read_report(p / 'run' / 'report') for p in (two, one))
  assert '4 x cpu (cpu) of 2 processes' in a['hardware']
  for row, wanted in zip(a['models'], b['models'], strict=True):
    for name in ('name', 'parameters', 'nonzero_parameters', 'flops'):
      assert row[name] == wanted[name]
    assert row['accuracy'] == pytest.approx(wanted['accuracy'], abs=1e-5)
    assert row['kl'] == pytest.approx(wanted['kl'], rel=1e-4, abs=1e-5)


def test_a_teacher_cache_of_two_processes_is_that_of_one(made):
  two, one, _ = made
  caches = [data.TeacherCache(place / 'cache') for place in (two, one)]
  for name in ('rows', 'epochs', 'row_bytes', 'arrays'):
    assert caches[0].manifest[name] == caches[1].manifest[name]
  # One epoch each, and no file besides.
  assert len(caches[0].manifest['shards']) == 2
  files = [p.name for p in (two / 'cache').rglob('*') if p.is_file()]
  assert sorted(files) == ['manifest.json', *['shard0000.safetensors'] * 2]
  _same_histories(two / 'cached', one / 'cached', ('teacher', 'distill'))
  # As the live teacher, which it was not.
  live, cached = (two / name / 'distill' for name in ('run', 'cached'))
  _same_histories(two / 'cached', two / 'run', ['distill'])
  stored = [read_manifest(p / 'checkpoints') for p in (live, cached)]
  digests = [m['fingerprint'].get('teacher_cache') for m in stored]
  assert digests == [None, caches[0].digest]


def test_a_comparison_equals_that_of_one_process(made):
  tables = [_json(p / 'compare' / 'comparison.json') for p in made[:2]]
  for row, wanted in zip(*(t['rows'] for t in tables), strict=True):
    assert (row['name'], row['scale']) == (wanted['name'], wanted['scale'])
    for name in ('accuracy', 'agreement', 'kl', 'calibration_error'):
      assert row[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5)
  assert 'of 2 processes' in tables[0]['hardware']
  assert [row['name'] for row in tables[0]['rows']] == ['teacher', 'kd']


def test_a_search_equals_that_of_one_process(made):
  a, b = (_json(p / 'small/search/result.json') for p in made[:2])
  for row, wanted in zip(a['candidates'], b['candidates'], strict=True):
    del row['ms'], wanted['ms']
    assert row == pytest.approx(wanted, rel=1e-5, abs=1e-5)
  assert a['test'] == pytest.approx(b['test'], abs=1e-5)
  for place in made[:2]:
    names = {p.name for p in (place / 'small' / 'artefact').iterdir()}
    assert {'stablehlo', 'student.onnx', 'weights.safetensors'} <= names
  # Of what each process tried nothing is left.
  assert not list(made[0].rglob('untrained*'))


def _json(path):
  return json.loads(path.read_text())


def _same_histories(two, one, stages):
  for stage in stages:
    a, b = (_json(place / stage / 'result.json') for place in (two, one))
    assert a['steps'] == b['steps']
    for row, wanted in zip(a['history'], b['history'], strict=True):
      assert row == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_a_pair_that_was_stopped_and_killed_ends_with_the_same_bits(
  made, configs, tmp_path
):
  words = ['--stages=teacher', f'--config={configs / "digits.json"}']
  words.append(f'--workdir={tmp_path}')
  stage = tmp_path / 'teacher'
  pair = joined(*RUN, *words)
  saved = _saved(stage / 'checkpoints', pair)
  # One of them alone is told to stop.
  pair.send(signal.SIGTERM, 1)
  codes, said = pair.ended()
  assert codes == [75, 75], said
  stopped = stopped_at(said)
  assert stopped > saved

  pair = joined(*RUN, *words)
  _saved(stage / 'checkpoints', pair, after=stopped)
  pair.send(signal.SIGKILL, 1)
  codes, said = pair.ended(bound=120)
  assert codes[0] in (75, -signal.SIGABRT), said
  assert not (stage / 'result.json').exists()

  codes, said = joined(*RUN, *words).ended()
  assert codes == [0, 0], said
  name = 'weights.safetensors'
  straight = made[0] / 'run' / 'teacher'
  assert (straight / name).read_bytes() == (stage / name).read_bytes()
  results = [_json(p / 'result.json') for p in (straight, stage)]
  assert results[0]['history'] == results[1]['history']


def _saved(checkpoints, pair, after=0):
  """Waits for a checkpoint, and returns its step."""
  end = time.monotonic() + BOUND
  while True:
    steps = [int(p.name) for p in checkpoints.glob('*') if p.name.isdigit()]
    if max(steps, default=0) > after:
      return max(steps)
    assert time.monotonic() < end
    assert all(p.poll() is None for p in pair.processes), pair.ended()
    time.sleep(0.02)


@pytest.fixture
def doors():
  """A bucket with a door for each process."""
  with contextlib.ExitStack() as stack:
    bucket = stack.enter_context(contextlib.closing(fake_bucket.Bucket()))
    other = fake_bucket.Door(bucket)
    stack.enter_context(contextlib.closing(other))
    yield bucket, other


def test_a_pair_in_a_bucket_goes_on_from_other_machines(
  made, configs, doors, data_dir, tmp_path
):
  bucket = doors[0]
  for path in (data_dir / 'digits').rglob('*'):
    if path.is_file():
      name = path.relative_to(data_dir).as_posix()
      bucket.put(f'tfds/{name}', path.read_bytes())
  bucket.put('run.json', (configs / 'digits.json').read_bytes())

  def start(machine, when=None, act=lambda pair: None):
    """A pair that sees no file of those before; acts when one is written."""

    def environ(index):
      home = tmp_path / machine
      (home / str(index)).mkdir(parents=True)
      own = {'TMPDIR': str(home / str(index)), 'XDG_CACHE_HOME': str(home)}
      return doors[index].environment | own

    def written(name):
      if when and name.endswith(when):
        bucket.on_write = lambda name: None
        act(pair)

    bucket.on_write = written
    pair = joined(
      *RUN,
      '--config=gs://bucket/run.json',
      '--config.data.data_dir=gs://bucket/tfds',
      '--workdir=gs://bucket/run',
      environ=environ,
    )
    return pair.ended()

  codes, said = start(
    'first',
    'run/teacher/checkpoints/4/state/commit_success.txt',
    lambda pair: pair.send(signal.SIGTERM, 0, 1),
  )
  assert codes == [75, 75], said
  assert 4 < stopped_at(said) < 24
  assert 'run/teacher/result.json' not in bucket.objects
  codes, said = start(
    'second',
    'run/distill/checkpoints/4/state/commit_success.txt',
    lambda pair: pair.send(signal.SIGKILL, 1),
  )
  assert codes[0] in (75, -signal.SIGABRT) and codes[1] == -signal.SIGKILL
  assert 'run/alone/result.json' in bucket.objects
  assert 'run/distill/result.json' not in bucket.objects
  codes, said = start('third')
  assert codes == [0, 0], said
  assert 'alone: already done in gs://bucket/run/alone' in said[0]
  assert 'report: done' in said[0] and 'done' not in said[1]
  for stage in (*TRAINED, 'convert'):
    name = f'{stage}/weights.safetensors'
    straight = (made[0] / 'run' / name).read_bytes()
    assert bucket.objects[f'run/{name}'] == straight, stage
  assert 'run/report/report.html' in bucket.objects
  # Process 1 writes its share of the checkpoints, and nothing else.
  assert doors[1].written
  assert all('/checkpoints/' in name for name in doors[1].written)
  assert any('ocdbt.process_1' in name for name in doors[1].written)
  # Of a run that went on unchanged there is one origin.
  assert len(json.loads(bucket.objects['run/origin.json'])['software']) == 1
