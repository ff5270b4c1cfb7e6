"""Every configuration of a published result runs, in its tiny form, on fake
data with the real names and shapes: all stages, from the command line."""

import functools
import pathlib
import runpy
import tempfile

import fake_tfds
import jax
import pytest

from kd_jax import cli
from kd_jax.plan import rehearsal, steps
from kd_jax.recipe import stages
from kd_jax.report import measure, read_report
from kd_jax.storage.workdir import read_json

CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'
NAMES = sorted(
  path.stem
  for pattern in ('cifar100_*.py', 'imagenet_*.py')
  for path in CONFIGS.glob(pattern)
)
# The steps of all are made and not compiled. One of each protocol trains for
# its row of the table, which is what is published, and one runs every stage:
# many layers compile for a minute and more, and small networks of all families
# are tested elsewhere.
WHOLE = ('cifar100_vgg13_vgg8',)
ROWS = ('cifar100_resnet56_resnet20', 'imagenet_resnet34_resnet18')
TRAINED = ('teacher', 'alone', 'distill', 'compress')
MODELS = [
  'teacher',
  'student alone',
  'distilled',
  'compressed',
  'integer (JAX)',
  'integer (StableHLO)',
  'integer (ONNX)',
]

pytestmark = [pytest.mark.slow, pytest.mark.once]


@pytest.fixture(scope='session')
def fake_dir(session_dir):
  """A directory with fake data sets, prepared once for all workers."""
  shared, own = session_dir / 'fake_data', tempfile.mkdtemp(dir=session_dir)
  for name in fake_tfds.NAMES:
    fake_tfds.prepare(name, pathlib.Path(own))
  try:
    pathlib.Path(own).rename(shared)
  except OSError:
    # Another worker was faster, and what it wrote is as good.
    assert shared.is_dir()
  return shared


def run(name, variant, fake_dir, workdir, *names):
  """`kd-jax run` in this process."""
  return cli.main(
    [
      'run',
      f'--config={CONFIGS / name}.py:{variant}',
      f'--workdir={workdir}',
      f'--config.data.data_dir={fake_dir}',
      f'--stages={",".join(names)}',
    ]
  )


@pytest.mark.parametrize('name', ROWS)
def test_config_makes_its_row_of_the_table(name, fake_dir, tmp_path, capsys):
  assert run(name, 'tiny', fake_dir, tmp_path, *TRAINED[:3]) == 0
  for stage in TRAINED[:3]:
    assert read_json(tmp_path / stage / 'result.json')['steps'] == 4
  assert cli.main(['evaluate', f'--workdir={tmp_path}']) == 0
  shown = capsys.readouterr().out
  assert all(n in shown for n in ('teacher', 'student alone', 'distilled'))


@pytest.mark.parametrize('name', NAMES)
def test_config_makes_its_steps(name, fake_dir):
  """The last has what those between have: both networks, and all terms."""
  config = runpy.run_path(str(CONFIGS / f'{name}.py'))['get_config']('tiny')
  config.data.data_dir = str(fake_dir)
  for stage in ('teacher', 'compress'):
    step = steps.rehearse(rehearsal.Rehearsal(config), stage)
    state, metrics = jax.eval_shape(step.step, step.state, step.batch, step.rng)
    assert jax.tree.structure(state) == jax.tree.structure(step.state)
    # The pair of ViTs is nobody's published one, and holds a tenth out.
    assert step.total_steps == (3 if 'vit' in name else 4)
    losses = {name for name in metrics if name.startswith('loss/')}
    taught = stage == 'compress'
    assert (losses > {'loss/ce', 'loss/total'}) == taught


@pytest.mark.parametrize('name', WHOLE)
def test_config_runs_every_stage(
  name, fake_dir, tmp_path, monkeypatch, request
):
  assert run(name, 'tiny', fake_dir, tmp_path, *TRAINED) == 0
  # Compiled quickly, integer convolutions take a second and more.
  request.getfixturevalue('full_optimization')
  # Two rounds of measurements do here.
  latencies = functools.partial(measure.latencies, runs=2)
  monkeypatch.setattr(measure, 'latencies', latencies)
  rest = [stage for stage in stages.STAGES if stage not in TRAINED]
  assert run(name, 'tiny', fake_dir, tmp_path, *rest) == 0

  results = {
    stage: read_json(tmp_path / stage / 'result.json')
    for stage in stages.STAGES
  }
  # 64 images in batches of 16, once: no image is held out.
  assert [results[stage]['steps'] for stage in TRAINED] == [4] * 4
  report = read_report(tmp_path / 'report')
  assert [row['name'] for row in report['models']] == MODELS
  assert report['dataset']['train_examples'] == 64
  assert 'validation_examples' not in report['dataset']
  for row in report['parity']:
    # The first compares integers with what was trained.
    close = 0.9 if row['name'] == 'integer (JAX)' else 0.995
    assert row['agreement'] >= close and row['examples'] == 64


@pytest.mark.parametrize(
  'name, method, term',
  [
    ('cifar100_resnet56_resnet20', 'crd', 'contrastive'),
    ('cifar100_vgg13_vgg8', 'funmatch,review', 'review'),
  ],
)
def test_config_runs_with_a_method(name, method, term, fake_dir, tmp_path):
  names = ('teacher', 'distill')
  assert run(name, f'tiny,{method}', fake_dir, tmp_path, *names) == 0
  history = read_json(tmp_path / 'distill' / 'result.json')['history']
  assert history[-1]['step'] == 4
  assert {'loss/ce', f'loss/{term}'} <= history[-1].keys()
  assert 'loss/soft_targets' not in history[-1]


def test_a_split_that_the_protocol_has_not_is_refused(
  fake_dir, tmp_path, capsys
):
  name = 'cifar100_vgg13_vgg8'
  assert run(name, 'tiny', fake_dir, tmp_path, 'teacher') == 0
  words = ['evaluate', f'--workdir={tmp_path}', '--split']
  assert cli.main([*words, 'validation']) == 2
  assert "'validation'" in capsys.readouterr().err
  assert cli.main([*words, 'test']) == 0
  assert 'teacher' in capsys.readouterr().out
