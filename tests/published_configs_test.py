"""Every configuration of a published result runs, in its tiny form, on fake
data of the real shape: all stages, from the command line."""

import os
import pathlib
import tempfile

import fake_tfds
import jax
import pytest

from kd_jax import cli, recipe
from kd_jax.report import read_report
from kd_jax.workdir import read_json

CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'
NAMES = sorted(
  path.stem
  for pattern in ('cifar100_*.py', 'imagenet_*.py')
  for path in CONFIGS.glob(pattern)
)
TRAINED = ('teacher', 'alone', 'distill', 'compress')
MODELS = [
  'teacher',
  'student alone',
  'distilled',
  'pruned + int8 fake-quant',
  'integer (JAX)',
  'StableHLO int8',
  'ONNX int8',
]


@pytest.fixture(scope='session')
def fake_dir(tmp_path_factory):
  """A directory with fake data sets, prepared once for all workers."""
  base = tmp_path_factory.getbasetemp()
  # With xdist every worker has a base of its own, in one of the session.
  base = base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base
  shared = base / 'kd_jax_fake_data'
  own = pathlib.Path(tempfile.mkdtemp(dir=base))
  for name in fake_tfds.NAMES:
    fake_tfds.prepare(name, own)
  try:
    own.rename(shared)
  except OSError:
    # Another worker was faster; what it wrote is as good.
    assert shared.is_dir()
  return shared


@pytest.fixture
def quick_compilation():
  """Compiles in less time to slower programs, which matters in training."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


def run(name, variant, fake_dir, workdir, *words):
  """The command, in this process."""
  return cli.main(
    [
      'run',
      f'--config={CONFIGS / name}.py:{variant}',
      f'--workdir={workdir}',
      f'--config.data.data_dir={fake_dir}',
      *words,
    ]
  )


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_config_runs_every_stage(name, fake_dir, tmp_path, quick_compilation):
  stages = f'--stages={",".join(TRAINED)}'
  assert run(name, 'tiny', fake_dir, tmp_path, stages) == 0
  # Programs that are measured are compiled as they should be.
  jax.config.update('jax_disable_most_optimizations', False)
  assert run(name, 'tiny', fake_dir, tmp_path) == 0
  for stage in recipe.STAGES:
    assert (tmp_path / stage / 'result.json').exists()
  for stage in TRAINED:
    assert read_json(tmp_path / stage / 'result.json')['steps'] == 4
  report = read_report(tmp_path / 'report')
  assert [row['name'] for row in report['models']] == MODELS
  # All images are for training, as published.
  assert report['dataset']['train_examples'] == 64
  assert 'validation_examples' not in report['dataset']
  for row in report['parity'][1:]:
    assert row['against'] == 'integer (JAX)' and row['agreement'] >= 0.995
