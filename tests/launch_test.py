"""Launching: the commands, in order, and what happens under preemption."""

import json
import pathlib
import re
import shlex
import subprocess
import sys
import time

import pytest

import kd_jax
from kd_jax import cli, launch
from kd_jax.launch import accelerators, gcloud, jobset
from kd_jax.sharding import preemption

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parent.parent

RUN = ('kd-jax', 'run', '--config=c.py', '--workdir=gs://b/run one')


class Cloud:
  """Stands for gcloud: one machine, whose runs end as a script says.

  Attributes:
    ends: of each start: an exit code, 'gone' for a machine that vanishes, or
      several of them, one for each time that somebody looks.
    states: what a new machine goes through.
    refusals: exit codes of the creations; 0 when there are no more.
    blind: the numbers of the looks at the machine that fail.
  """

  def __init__(self, ends, states=('CREATING', 'READY'), refusals=(), blind=()):
    self.ends, self.states = list(ends), states
    self.refusals, self.blind = list(refusals), blind
    self.state, self.calls, self.seen = '', [], []
    self.codes = []

  def __call__(self, words, shown):
    kind, verb = words[3], words[4]
    self.calls.append(verb)
    assert words[5 if verb != 'scp' else 6].startswith('n')
    assert '--zone=z' in words
    return getattr(self, f'_{verb}')(words, kind)

  def _create(self, words, kind):
    assert not self.state, 'a machine is made twice'
    if self.refusals and self.refusals.pop(0):
      return 1, ''
    self.state, self.left = 'made', list(self.states)
    return 0, ''

  def _describe(self, words, kind):
    if not self.state or self.calls.count('describe') in self.blind:
      return 1, ''
    if self.left:
      self.state = self.left.pop(0)
    return 0, f'{self.state}\n'

  def _delete(self, words, kind):
    had, self.state = self.state, ''
    return (0 if had else 1), ''

  def _scp(self, words, kind):
    return 0, ''

  def _ssh(self, words, kind):
    command = words[-1].removeprefix('--command=')
    if 'nohup' in command:
      end = self.ends.pop(0)
      self.codes = list(end) if isinstance(end, tuple) else [end]
      self.state = 'PREEMPTED' if end == 'gone' else self.state
    self.seen.append(command)
    if self.state == 'PREEMPTED':
      return 255, ''
    if not command.startswith('cat'):
      return 0, ''
    code = self.codes.pop(0) if self.codes else None
    if code == 'gone':
      self.state = 'PREEMPTED'
      return 255, ''
    if code == 'broken':
      return 255, ''
    return 0, 'none\n' if code is None else f'{code}\n'


def _plan(keep=False, files=(), source='kd_jax==0.1.0', **options):
  machine = gcloud.Machine('n', 'z', 'v5litepod-16', **options)
  package = gcloud.package(source)
  return launch.plan(machine, RUN, package=package, files=files, keep=keep)


def _launch(cloud, restarts=100, **options):
  said = []
  run = launch.Launch(
    _plan(**options),
    restarts=restarts,
    execute=cloud,
    say=said.append,
    sleep=lambda seconds: None,
  )
  return run, said


def test_one_launch_creates_runs_and_deletes(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  cloud = Cloud([0])
  run, said = _launch(cloud, files=[launch.File('x', 'c.json', '{}\n')])
  assert run() == 0
  assert (tmp_path / 'c.json').read_text() == '{}\n'
  verbs = [v for v in cloud.calls if v != 'describe']
  # copy, set up, start, follow, exit code
  assert verbs == ['create', 'scp', 'ssh', 'ssh', 'ssh', 'ssh', 'delete']
  assert not cloud.state
  # What the shell of a worker makes of the words is the words.
  (started,) = [c for c in cloud.seen if 'nohup' in c]
  inner = shlex.split(started)[shlex.split(started).index('-c') + 1]
  platforms, program, *words = shlex.split(inner.split(';')[0])
  assert platforms == 'JAX_PLATFORMS=tpu,cpu'
  assert [program, *words] == [f'kd_jax_env/bin/{RUN[0]}', *RUN[1:]]
  assert any('is CREATING' in line for line in said)


def test_a_run_goes_on_after_preemption():
  cloud = Cloud([('running', 'gone'), preemption.REQUEUE, 0])
  run, said = _launch(cloud)
  assert run() == 0
  # The machine that vanished was made again, that of the run that asked not.
  assert cloud.calls.count('create') == 2
  assert sum('nohup' in c for c in cloud.seen) == 3
  assert [line for line in said if line.startswith('Preempted')] == [
    'Preempted; start 2.',
    'Preempted; start 3.',
  ]
  # What is installed on a machine stays, and a new one has nothing.
  assert sum('uv pip install' in c for c in cloud.seen) == 2


def test_a_machine_that_cannot_be_had_again_is_asked_for_again():
  cloud = Cloud(['gone', 0], refusals=[0, 1, 1, 0])
  run, said = _launch(cloud)
  assert run() == 0
  assert cloud.calls.count('create') == 4
  with pytest.raises(launch.LaunchError, match='Create failed with exit code'):
    _launch(Cloud([], refusals=[1]))[0]()
  # A connection that was away for a moment is no preemption.
  cloud = Cloud([('running', 'running', 0)], blind={6})
  run, said = _launch(cloud)
  assert run() == 0
  assert cloud.calls.count('create') == 1
  assert not [line for line in said if line.startswith('Preempted')]


def test_a_launch_that_was_interrupted_finds_its_run():
  cloud = Cloud([], states=('READY',))
  cloud._create((), '')
  cloud.codes = ['running', 'running', 0]
  run, _ = _launch(cloud)
  assert run() == 0
  assert {'create', 'scp'}.isdisjoint(cloud.calls)
  assert not [c for c in cloud.seen if 'nohup' in c or 'pip' in c]
  # A machine that is there but was never made ready is.
  cloud = Cloud([0], states=('CREATING', 'READY'))
  cloud._create((), '')
  assert _launch(cloud)[0]() == 0
  assert 'create' not in cloud.calls
  assert [c for c in cloud.seen if 'uv pip install' in c]


def test_a_machine_that_is_not_deleted_is_named(monkeypatch):
  cloud = Cloud([0])
  monkeypatch.setattr(cloud, '_delete', lambda *_: (1, ''))
  run, said = _launch(cloud)
  assert run() == 0
  assert 'costs money' in said[-1] and 'tpu-vm delete n' in said[-1]


def test_a_broken_connection_is_made_again():
  cloud = Cloud([('running', 'running', 0)])
  run, _ = _launch(cloud)
  assert run() == 0
  assert sum(c.startswith('tail') for c in cloud.seen) == 3
  cloud = Cloud([('broken', 'running', 'broken', 'broken', 0)])
  run, said = _launch(cloud)
  assert run() == 0
  assert said.count('n does not answer.') == 3
  assert sum('nohup' in c for c in cloud.seen) == 1
  run, _ = _launch(Cloud([(None,)]))
  with pytest.raises(launch.LaunchError, match='without an exit code'):
    run()


def test_failures_end_and_the_machine_goes():
  cloud = Cloud([2])
  run, _ = _launch(cloud)
  assert run() == 2 and not cloud.state
  cloud = Cloud([2])
  run, _ = _launch(cloud, keep=True)
  assert run() == 2 and cloud.state == 'READY'
  cloud = Cloud([preemption.REQUEUE] * 3)
  run, _ = _launch(cloud, restarts=2)
  with pytest.raises(launch.LaunchError, match='preempted 3 times'):
    run()
  assert not cloud.state
  cloud = Cloud([0], states=('WAITING_FOR_RESOURCES', 'FAILED'))
  run, _ = _launch(cloud, queued=True, spot=True)
  with pytest.raises(launch.LaunchError, match='n is FAILED'):
    run()


def test_the_printed_commands_are_those_of_a_launch():
  machine = gcloud.Machine(
    'n', 'z', 'v6e-8', project='p', spot=True, queued=True
  )
  package = gcloud.package('kd_jax')
  planned = launch.plan(
    machine, RUN, package=package, files=[launch.File('x', 'b', '{}\n')]
  )
  for part in (
    "cat > b <<'END'\n{}\nEND",
    'queued-resources create n --zone=z --project=p',
    '--accelerator-type=v6e-8 --node-id=n --runtime-version=v2-alpha-tpuv6e',
    '--spot',
    'scp b n:b --zone=z --project=p --worker=all',
    'kd_jax[tpu]',
    'queued-resources delete n --zone=z --project=p --force --quiet',
  ):
    assert part in str(planned), part
  for command in planned.set_up:
    assert shlex.split(str(command).split('\n', 1)[1]) == list(command.words)
  plain = gcloud.Machine('n', 'z', 'v4-8')
  assert '--version=tpu-ubuntu2204-base' in gcloud.create(plain).words


def test_every_worker_gets_the_same_library(tmp_path):
  wheel = tmp_path / 'kd_jax-9-py3-none-any.whl'
  wheel.touch()
  found = gcloud.package(str(wheel))
  assert found.requirement == './kd_jax-9-py3-none-any.whl[tpu]'
  assert found.files == ((str(wheel), wheel.name),) and not found.before
  found = gcloud.package(str(ROOT))
  name = f'kd_jax-{kd_jax.__version__}-py3-none-any.whl'
  assert found.files == ((f'dist/{name}', name),)
  assert found.before[0].words[-1] == str(ROOT) == gcloud.here()
  for source in ('numpy', 'kd_jax-0.1.0', str(tmp_path), 'no.whl'):
    with pytest.raises(ValueError, match='--package='):
      gcloud.package(source)
  (tmp_path / 'kd_jax').mkdir()
  (tmp_path / 'kd_jax' / '__init__.py').write_text('"""Of no version."""\n')
  with pytest.raises(ValueError, match='no __version__'):
    gcloud.package(str(tmp_path))


@pytest.mark.parametrize('text', ['v5e', 'v9-8', 'v6e'])
def test_an_unknown_accelerator_gets_one_sentence(text):
  with pytest.raises(ValueError, match='accelerator'):
    accelerators.runtime_version(text)
  with pytest.raises(ValueError, match='accelerator'):
    accelerators.slice_of(text)


def test_a_jobset_asks_for_all_chips_of_the_slice():
  made = jobset.jobset(
    'run-1', 'v5litepod-32', RUN, image='i:1', config='{}', spot=True
  )
  assert json.loads(jobset.text(made)) == made
  file, workload = made['items']
  assert file['data'] == {'config.json': '{}'}
  job = workload['spec']['replicatedJobs'][0]['template']['spec']
  assert job['parallelism'] == job['completions'] == 8
  pod = job['template']['spec']
  assert pod['containers'][0]['resources']['limits'] == {'google.com/tpu': '4'}
  assert pod['containers'][0]['command'] == list(RUN)
  (mount,) = pod['containers'][0]['volumeMounts']
  assert f'{mount["mountPath"]}/config.json' == jobset.CONFIG
  (volume,) = pod['volumes']
  assert volume['name'] == mount['name']
  assert volume['configMap'] == {'name': file['metadata']['name']}
  # Bad input ends it, all else starts it again.
  (rule,) = job['podFailurePolicy']['rules']
  assert rule['onExitCodes']['values'] == [2]
  policy = workload['spec']['failurePolicy']
  assert policy['maxRestarts'] == 100
  assert policy['rules'][0]['action'] == 'FailJobSet'
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
    'cloud.google.com/gke-tpu-topology': '4x8',
    'cloud.google.com/gke-spot': 'true',
  }
  for accelerator, hosts, chips in (
    ('v6e-8', 1, 8),
    ('v6e-1', 1, 1),
    ('v5p-8', 1, 4),
    ('v4-32', 4, 4),
  ):
    found = accelerators.slice_of(accelerator)
    assert (found.hosts, found.chips) == (hosts, chips)
  with pytest.raises(ValueError, match="size of v6e '3'"):
    accelerators.slice_of('v6e-3')
  for name in ('Run 1', '-x', 'a;b', ''):
    with pytest.raises(ValueError, match='lower-case'):
      jobset.jobset(name, 'v6e-8', RUN, image='i', config='{}')


def test_xpk_gets_the_same_run():
  create, delete = jobset.xpk(
    'run-1', 'v6e-16', RUN, cluster='c', zone='z', image='i', project='p'
  )
  words = create.words
  assert words[:3] == ('xpk', 'workload', 'create')
  assert shlex.split(words[-1].removeprefix('--command=')) == list(RUN)
  assert '--tpu-type=v6e-16' in words and '--project=p' in words
  assert f'--restart-on-exit-codes={preemption.REQUEUE}' in words
  assert delete.words[:3] == ('xpk', 'workload', 'delete')


TINY = str(ROOT / 'configs' / 'digits.py') + ':tiny'
FLAGS = ['--name=n', '--accelerator=v6e-16', f'--config={TINY}']
FLAGS += ['--workdir=gs://b/r', '--config.seed=7']
WORDS = {
  'tpu-vm': [*FLAGS, '--zone=z', '--package=kd_jax==0.1.0'],
  'queued': [*FLAGS, '--zone=z', '--package=kd_jax==0.1.0', '--spot'],
  'gke': [*FLAGS, '--image=i'],
  'xpk': [*FLAGS, '--image=i', '--zone=z', '--cluster=c'],
}


@pytest.mark.parametrize('place', WORDS)
def test_a_dry_run_prints_all_and_does_nothing(
  place, capsys, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('PATH', '')
  assert cli.main(['launch', place, *WORDS[place], '--dry_run']) == 0
  printed = capsys.readouterr().out
  assert not list(tmp_path.iterdir())
  # The whole of it is a shell script.
  subprocess.run(['/bin/sh', '-n'], input=printed, text=True, check=True)
  lines = re.sub(r"cat > \S+ <<'END'\n.*?\nEND", '', printed, flags=re.S)
  commands = [x for x in lines.splitlines() if x and not x.startswith('# ')]
  verbs = [' '.join(shlex.split(c)[:5]) for c in commands]
  kind = {'tpu-vm': 'tpu-vm', 'queued': 'queued-resources'}.get(place)
  expected = {
    'gke': ['kubectl apply', 'kubectl logs', 'kubectl delete'],
    'xpk': ['gcloud storage cp', 'xpk workload create', 'xpk workload delete'],
  }.get(
    place,
    [f'gcloud compute tpus {kind} create', f'gcloud compute tpus {kind} desc']
    + ['gcloud compute tpus tpu-vm scp']
    + ['gcloud compute tpus tpu-vm ssh'] * 4
    + [f'gcloud compute tpus {kind} delete'],
  )
  assert [v[: len(e)] for v, e in zip(verbs, expected, strict=True)] == expected
  assert '"seed":7' in printed.replace('\\', '')


def test_a_workload_file_is_written_and_not_replaced(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  words = ['launch', 'gke', *WORDS['gke']]
  assert cli.main(words) == 0
  made = json.loads((tmp_path / 'n.gke.json').read_text())
  config = json.loads(made['items'][0]['data']['config.json'])
  assert config['seed'] == 7
  assert 'kubectl apply --filename=n.gke.json' in capsys.readouterr().out
  assert cli.main(words) == 0
  assert cli.main([*words, '--config.seed=8']) == 2
  assert 'n.gke.json is there and differs' in capsys.readouterr().err
  assert json.loads((tmp_path / 'n.gke.json').read_text()) == made


GCLOUD = """#!{python} -IS
import pathlib, sys
here = pathlib.Path(__file__).parent
verb, words = sys.argv[4], ' '.join(sys.argv[1:])
with open(here / 'log', 'a') as log:
  print(words, file=log)
state, starts = here / 'state', here / 'starts'
if verb == 'create':
  state.write_text('READY')
elif verb == 'describe':
  print(state.read_text()) if state.exists() else sys.exit(1)
elif verb == 'delete':
  state.unlink()
elif 'nohup' in words:
  starts.write_text(starts.read_text() + 'x' if starts.exists() else 'x')
  if starts.read_text() == 'x':
    state.write_text('PREEMPTED')
elif 'tail' in words:
  print('step 1 of the run')
elif 'cat kd_jax.code' in words and starts.exists():
  print(0 if starts.read_text() == 'xx' else 'running')
"""


def test_the_command_runs_gcloud_and_survives_preemption(
  tmp_path, monkeypatch, capfd
):
  monkeypatch.chdir(tmp_path)
  program = tmp_path / 'bin' / 'gcloud'
  program.parent.mkdir()
  program.write_text(GCLOUD.format(python=sys.executable))
  program.chmod(0o755)
  monkeypatch.setenv('PATH', str(program.parent))
  monkeypatch.setattr(time, 'sleep', lambda seconds: None)
  assert cli.main(['launch', 'queued', *WORDS['queued']]) == 0
  out = capfd.readouterr().out
  assert 'step 1 of the run' in out and 'Preempted; start 2.' in out
  log = (program.parent / 'log').read_text().splitlines()
  verbs = [line.split()[3] for line in log]
  assert verbs.count('create') == 2 and verbs.count('scp') == 2
  assert verbs[-1] == 'delete' and not (program.parent / 'state').exists()
  # What was sent is what the worker reads, and no Python.
  sent = json.loads((tmp_path / 'n.json').read_text())
  assert sent['seed'] == 7 and sent['data']['max_examples'] == 256
  assert [line for line in log if '--config=n.json' in line]


BAD = {
  'no place': ([], 'needs a place: tpu-vm, queued, gke, xpk'),
  'place': (['tpuvm'], 'did you mean tpu-vm'),
  'no name': (['gke', *FLAGS[1:], '--image=i'], 'needs --name=NAME'),
  'no zone': (['tpu-vm', *FLAGS], 'needs --zone=us-central1-a'),
  'foreign flag': (['gke', *WORDS['gke'], '--cluster=c'], "flag 'cluster'"),
  'name': (['gke', *WORDS['gke'], '--name=A_b'], '--name=A_b: use lower-case'),
  'type': (
    ['tpu-vm', *WORDS['tpu-vm'], '--accelerator=v5e-8'],
    "type of --accelerator 'v5e'",
  ),
  'local': (
    ['tpu-vm', *WORDS['tpu-vm'], '--workdir=runs/x'],
    'would be lost with the machine',
  ),
  'package': (['tpu-vm', *WORDS['tpu-vm'], '--package=x'], '--package=x is no'),
  'key': (['xpk', *WORDS['xpk'], '--config.sed=1'], 'did you mean seed?'),
  'no gcloud': (['tpu-vm', *WORDS['tpu-vm']], 'gcloud is not installed'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_gets_one_sentence(case, capsys, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('PATH', '')
  words, expected = BAD[case]
  assert cli.main(['launch', *words]) == 2
  error = capsys.readouterr().err
  assert expected in error
  assert error.startswith('kd-jax: ') and error.count('\n') == 1


README = (ROOT / 'README.md').read_text()
# What a user does once, outside of a launch.
ONCE = ('gcloud auth', 'gcloud config', 'gcloud services', 'gcloud storage')


def _readme_commands(*programs):
  blocks = re.findall(r'```bash\n(.*?)```', README, re.DOTALL)
  lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
  return [x.strip() for x in lines if x.strip().startswith(programs)]


def test_the_commands_of_the_readme_are_those_of_a_launch(
  capsys, tmp_path, monkeypatch
):
  monkeypatch.chdir(ROOT)
  launches = _readme_commands('kd-jax launch', '.venv/bin/kd-jax launch')
  places = set()
  for line in launches:
    _, _, place, *words = shlex.split(line)
    places.add(place)
    assert cli.main(['launch', place, *words, '--dry_run']) == 0, line
  assert places == set(launch.PLACES)
  printed = capsys.readouterr().out.splitlines()
  shown = _readme_commands('gcloud', 'kubectl', 'xpk')
  shown = [line for line in shown if not line.startswith(ONCE)]
  assert len(shown) >= 3
  for line in shown:
    assert ' '.join(line.split()) in printed, line
