"""Plans of two pairs for a TPU v5e of 256 chips, by the real TPU compiler.

They need libtpu, which the extra [test] installs on x86 Linux, and no TPU.
"""

import pathlib
import runpy

import jax
import pytest

from kd_jax import plan
from kd_jax.plan import chips, rehearsal, steps
from kd_jax.report import plan as report_plan

pytestmark = [pytest.mark.once, pytest.mark.slow]
CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'
PAIRS = {
  # Images a chip, compiled / own FLOPs: the compiler leaves out products with
  # padding, and counts what is no product, softmax and norms, too.
  'cifar100_resnet56_resnet20': (64, (0.88, 1.0)),
  'cifar100_vit_s_vit_ti': (16, (1.0, 1.1)),
}


@pytest.fixture(scope='module', autouse=True)
def quick():
  """Half of the time to compile, to a slower program that does the same."""
  jax.config.update('jax_optimization_level', 'O0')
  yield
  jax.config.update('jax_optimization_level', 'UNKNOWN')


@pytest.fixture(scope='module', params=PAIRS)
def pair(request):
  """A pair's name, plan and parameters."""
  name = request.param
  config = runpy.run_path(str(CONFIGS / f'{name}.py'))['get_config']()
  config.distill.train.batch_size = 256 * PAIRS[name][0]
  made = plan.plan(config, 'v5e:16x16', alternatives=())
  step = steps.rehearse(rehearsal.Rehearsal(config), 'distill')
  return name, made, step.state.params


def test_it_fits(pair):
  _, made, params = pair
  memory = made.program.memory
  assert made.program.fits and made.program.bytes == sum(memory.values())
  assert made.program.bytes < 1e9 < made.chip['hbm_bytes'] == 16 * 2**30
  # Replicated: every chip has all of the student, and its part of the batch.
  assert memory['student'] >= sum(4 * p.size for p in jax.tree.leaves(params))
  assert memory['batch'] == PAIRS[pair[0]][0] * (32 * 32 * 3 + 12)
  assert memory['temporaries'] > memory['batch']


def test_flops_are_those_of_the_models(pair):
  name, made, _ = pair
  low, high = PAIRS[name][1]
  assert low < made.program.flops / made.own_flops < high
  assert 0.4 < made.teacher_share < 0.6


def test_the_gradients_alone_cross_the_network(pair):
  name, made, params = pair
  rows = made.program.collectives
  assert {row['kind'] for row in rows} == {'all-reduce'}
  by_owner = {row['owner']: row for row in rows}
  assert 'teacher' not in by_owner and 'parameters' not in by_owner
  size = sum(4 * p.size for p in jax.tree.leaves(params))
  assert by_owner['gradients']['bytes'] == size
  assert by_owner['metrics']['bytes'] <= 4 * 8
  if name == 'cifar100_vit_s_vit_ti':
    assert by_owner['gradients']['count'] == 1
    assert 'statistics' not in by_owner
  else:
    # Sums of BatchNorm, forward and backward, of every layer's channels.
    assert by_owner['statistics']['bytes'] < size / 50


def test_bounds_follow_from_the_chip(pair):
  _, made, _ = pair
  program = made.program
  assert program.bounds['compute'] == program.flops / 197e12
  assert program.bounds['memory'] == program.hbm_bytes / 819e9
  assert program.bounds['network'] == pytest.approx(
    program.ici_bytes / (4 * 50e9)
  )
  assert program.seconds == max(program.bounds.values())
  assert program.hours == program.total_steps * program.seconds / 3600


def test_what_does_not_fit_is_said():
  """Of one chip, a batch of gigabytes."""
  config = runpy.run_path(str(CONFIGS / 'cifar100_vit_s_vit_ti.py'))[
    'get_config'
  ]('tiny')
  config.data.max_examples = 0
  config.alone.train.batch_size = 2**21
  made = plan.plan(
    config,
    'v5e:1x1',
    stage='alone',
    alternatives=(),
    examples=2**22,
  )
  assert made.program.fits is False
  assert made.program.bytes > 16 * 2**30
  assert 'Does not fit: ' in report_plan.verdict(made.as_dict())
  report_plan.print_plan(made.as_dict())


@pytest.mark.parametrize('name', ['v4:2x2x1', 'v5p:2x2x2', 'v6e:4x4'])
def test_topologies_of_other_chips(name):
  found = chips.topology(name)
  assert found.devices_per_chip == 1
  assert chips.chip_of(found.devices[0].device_kind) == found.chip


def test_a_shape_that_libtpu_does_not_know_gets_one_sentence():
  with pytest.raises(ValueError, match="libtpu has no topology 'v5e:3x3': .*"):
    chips.topology('v5e:3x3')
