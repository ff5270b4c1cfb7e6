"""Plans of configurations on this machine's eight simulated devices."""

import json
import pathlib
import runpy
import types

import jax
import ml_collections
import pytest

from kd_jax import cli, plan, sharding
from kd_jax.plan import chips, estimate, program, rehearsal, steps
from kd_jax.recipe import fit, stages
from kd_jax.recipe.run import Run
from kd_jax.recipe.words import Training
from kd_jax.storage.workdir import Workdir

ROOT = pathlib.Path(__file__).parent.parent
DIGITS = ROOT / 'configs' / 'digits.py'


def tiny(**changes):
  """The tiny digits, with fields changed by their dotted names."""
  config = runpy.run_path(str(DIGITS))['get_config']('tiny')
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope='module')
def planned():
  """A plan of the tiny digits, measured, with estimates."""
  return plan.plan(tiny(), estimate=True, measured=True)


def _bytes(tree):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_memory_is_that_of_the_state(planned):
  step = steps.rehearse(rehearsal.Rehearsal(tiny()), 'distill')
  memory = planned.program.memory
  state = step.state
  assert memory['student'] == _bytes((state.params, state.model_state))
  assert memory['teacher'] == _bytes(state.teacher)
  assert memory['optimizer'] == _bytes(state.opt_state)
  # A byte a pixel, and three numbers of four bytes, for each of 8 images.
  assert memory['batch'] == 8 * (64 + 12)
  assert planned.program.bytes == sum(memory.values())
  assert memory['temporaries'] > 0
  assert planned.devices == 8 and planned.mesh['data'] == 8


@pytest.mark.parametrize('split', [(), ('fsdp',)])
def test_a_teacher_is_split_if_the_configuration_says_so(split):
  model = {'teacher.model.width': 32}
  config = tiny(**model, **{'mesh.fsdp': 8, 'teacher.shard': split})
  memory = plan.plan(config, alternatives=()).program.memory
  step = steps.rehearse(rehearsal.Rehearsal(tiny(**model)), 'distill')
  whole = _bytes(step.state.teacher)
  assert memory['teacher'] < whole / 4 if split else memory['teacher'] == whole


def test_an_axis_that_is_none_is_refused():
  with pytest.raises(ValueError, match="axis of teacher.shard 'data'.*fsdp"):
    plan.plan(tiny(**{'teacher.shard': ('data',)}), alternatives=())


def test_flops_are_those_of_the_models(planned):
  """Padding, which the compiler does not count, is most of what is missing."""
  assert 0.6 < planned.program.flops / planned.own_flops < 1.2
  assert 0.5 < planned.teacher_share < 1
  # Multiply-accumulates of the student's convolution and head, by hand.
  student = 8 * 8 * 9 * 1 * 8 + 8 * 10
  [network, _] = steps.rehearse(rehearsal.Rehearsal(tiny()), 'distill').networks
  assert _bytes(network[1]['params']) == 4 * (9 * 8 + 8 + 8 + 8 * 10 + 10)
  alone = plan.plan(tiny(), stage='alone', alternatives=())
  assert alone.own_flops == 2 * 8 * 3 * student
  assert alone.teacher_flops == 0 == alone.program.memory['teacher']


def test_collectives_are_the_gradients(planned):
  rows = {row['owner']: row for row in planned.program.collectives}
  assert rows.keys() <= {'gradients', 'statistics', 'metrics'}
  assert rows['gradients']['bytes'] == 4 * (9 * 8 + 8 + 8 + 8 * 10 + 10)
  assert planned.program.ici_bytes > 0


def test_a_device_without_figures_has_no_bounds(planned):
  assert planned.program.bounds == {} and planned.program.fits is None
  assert planned.program.seconds is planned.program.hours is None
  assert any('No published figures of cpu' in note for note in planned.notes)


def test_a_step_is_measured(planned):
  measured = planned.measured
  assert 0 < measured['low'] <= measured['seconds'] <= measured['high']
  assert measured['examples_per_second'] == 64 / measured['seconds']


def test_estimates_say_that_they_are(planned):
  base, others = planned.program, planned.alternatives
  assert {p.how for p in others.values()} == {'estimated'}
  cached = others['cached_teacher']
  assert cached.memory['teacher'] == 0
  assert cached.flops == base.flops - planned.teacher_flops
  # Ten classes in float16 come with each of eight images.
  assert cached.memory['batch'] == base.memory['batch'] + 8 * 10 * 2
  assert others['double_batch'].batch_size == 128
  assert others['double_batch'].total_steps == base.total_steps // 2
  assert others['remat'].flops > base.flops
  assert others['fsdp'].ici_bytes > base.ici_bytes


def test_a_plan_is_json(planned):
  again = json.loads(json.dumps(planned.as_dict()))
  assert again['program']['flops'] == planned.program.flops
  assert again['teacher_share'] == planned.teacher_share


@pytest.mark.parametrize(
  'changes',
  [
    {'teacher.precision': 'bfloat16'},
    {'teacher.precision': 'int8'},
    {'distill.scheme.cohort': 2},
    {'distill.scheme.ema': 0.9},
    {'distill.scheme.reuse_head': True},
    {'distill.scheme.generations': 2},
    {'compress.teacher': 'student', 'compress.quantize.ranges': 'lsq'},
  ],
  ids=str,
)
def test_a_rehearsal_needs_neither_data_nor_weights(changes):
  """Whatever the configuration, and every leaf a shape."""
  stage = 'compress' if 'compress.teacher' in changes else 'distill'
  step = steps.rehearse(rehearsal.Rehearsal(tiny(**changes)), stage)
  for leaf in jax.tree.leaves(step.state):
    assert isinstance(leaf, jax.ShapeDtypeStruct)
  assert step.total_steps == 4
  if changes.get('teacher.precision') == 'int8':
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(step.state.teacher)}
    assert 'int8' in dtypes


def test_a_rehearsal_says_that_it_has_no_files():
  with pytest.raises(ValueError, match='no work directory'):
    _ = rehearsal.Rehearsal(tiny()).workdir


def test_a_rehearsal_is_the_real_run(tmp_path, data_dir):
  config = tiny(**{'data.data_dir': str(data_dir), 'data.max_examples': 0})
  run = Run(config, Workdir(tmp_path, config.to_dict()))
  c = config.alone.train
  real = fit.make_step(run, 'alone', c, run.task.labels(), stages.untaught(run))
  for made in (config, tiny(**{'data.max_examples': 0})):
    # Prepared or not, the digits are as many.
    step = steps.rehearse(rehearsal.Rehearsal(made), 'alone')
    assert step.total_steps == Training.of(c, run.splits['train']).steps
    shapes = jax.eval_shape(lambda: real.state)
    assert jax.tree.all(jax.tree.map(lambda a, b: a == b, shapes, step.state))


def rehearse(stage='distill', *, cached=False, **changes):
  run = rehearsal.Rehearsal(tiny(**changes))
  return steps.rehearse(run, stage, cached=cached)


@pytest.mark.parametrize(
  'stage, changes, message',
  [
    ('alone', {}, 'there is no teacher'),
    ('distill', {'distill.scheme.ema': 0.9}, 'there is no teacher'),
    ('distill', {'distill.scheme.generations': 2}, 'teaches is the link'),
    ('compress', {'compress.teacher': 'student'}, 'teaches is distilled'),
    ('distill', {'teacher.cache': 'some/where'}, 'the configuration has'),
  ],
)
def test_what_cannot_be_cached_is_said(stage, changes, message):
  with pytest.raises(ValueError, match=message):
    rehearse(stage, cached=True, **changes)


def test_a_cache_of_the_configuration_need_not_be_there():
  """Its step is the one that 'cached_teacher' speaks of."""
  live = rehearse()
  there = rehearse(**{'teacher.cache': 'some/where'})
  assert there.batch == rehearse(cached=True).batch
  assert there.batch.keys() - live.batch.keys() == {'teacher/output'}
  assert there.state.teacher == {} and live.state.teacher
  assert live.networks[1] and there.networks[1] is None
  # The links after the first learn from one another.
  chain = {'teacher.cache': 'some/where', 'distill.scheme.generations': 2}
  assert rehearse(**chain).batch == live.batch


def test_a_cache_keeps_the_features_that_are_read():
  config = tiny()
  config.distill.terms = {'at': {'name': 'attention_transfer', 'weight': 1.0}}
  run = rehearsal.Rehearsal(config)
  taps = steps.rehearse(run, 'distill').reads
  step = steps.rehearse(run, 'distill', cached=True)
  added = step.batch.keys() - rehearse().batch.keys()
  assert added - {'teacher/output'} == {f'teacher/features/{t}' for t in taps}
  notes = plan.plan(config, alternatives=()).notes
  assert any('keeps with --features' in note for note in notes)


def test_recomputation_is_that_of_the_configuration():
  again = tiny(**{'teacher.train.remat': 'blocks'})
  made, own = (
    plan.plan(config, stage='teacher', alternatives=('remat',))
    for config in (tiny(), again)
  )
  assert made.alternatives['remat'].flops == own.program.flops
  assert own.program.flops > made.program.flops
  assert 'does so already' in own.alternatives['remat'].why


def test_an_unknown_set_needs_its_size(tmp_path):
  changes = {'data.name': 'svhn_cropped', 'data.data_dir': str(tmp_path)}
  config = tiny(**changes)
  with pytest.raises(ValueError, match='give --examples'):
    _ = rehearsal.Rehearsal(config).splits
  train = rehearsal.Rehearsal(config, examples=100).splits['train']
  assert train.image_shape == (32, 32, 3) and len(train) == 90


@pytest.mark.parametrize(
  'changes', [{'precision': 'bfloat16'}, {'student.model.dtype': 'bfloat16'}]
)
def test_the_rate_is_that_of_the_precision(changes, monkeypatch):
  rates = []

  def compile_program(step, target, *, dtype):
    rates.append(dtype)
    return program.compile_program(step, target, dtype=dtype)

  monkeypatch.setattr(estimate, 'compile_program', compile_program)
  plan.plan(tiny(**changes), stage='alone', alternatives=())
  assert rates == ['bfloat16']


def test_bounds_are_work_over_published_rates():
  v5e = chips.CHIPS['v5e']
  target = chips.Topology('v5e:4x4', range(16), v5e, (4, 4))
  work = {'flops': 197e12, 'hbm_bytes': 819e9, 'ici_bytes': 400e9}
  found = program.bounds(target, **work)
  assert found == {'compute': 1.0, 'memory': 1.0, 'network': 2.0}
  made = program.Program(
    'compiled', bounds=found, batch_size=64, total_steps=1800
  )
  assert (made.bound, made.seconds) == ('network', 2.0)
  assert (made.examples_per_second, made.hours) == (32.0, 1.0)
  # A core of two has half of its chip.
  halves = chips.Topology(
    'tpu7x:2x2x1', range(8), chips.CHIPS['tpu7x'], (2, 2, 1)
  )
  assert halves.devices_per_chip == 2
  found = program.bounds(halves, **work)
  assert found['compute'] == 2 * 197e12 / 2307e12
  assert found['memory'] == 2 * 819e9 / 7380e9
  assert program.fits(96 * 2**30, halves) and not program.fits(
    97 * 2**30, halves
  )


def test_a_chip_of_devices_that_are_there_has_as_many_as_share_its_place():
  def seconds(*devices):
    target = chips.Topology('here', devices, chips.CHIPS['H100'], ())
    work = {'flops': 989e12, 'hbm_bytes': 0.0, 'ici_bytes': 0.0}
    return program.bounds(target, **work, dtype='bfloat16')['compute']

  gpus = [types.SimpleNamespace() for _ in range(8)]
  cores = [types.SimpleNamespace(coords=(i // 2, 0, 0)) for i in range(8)]
  assert seconds(*gpus) == 1.0 and seconds(*cores) == 2.0


def test_a_configuration_that_is_none_is_refused():
  with pytest.raises(ValueError, match="Nothing reads the field 'a'"):
    plan.plan(ml_collections.ConfigDict({'a': 1}))


@pytest.mark.parametrize(
  'shape, links', [((1, 1), 0), ((2, 1), 1), ((2, 2), 2), ((4, 4, 8), 6)]
)
def test_links(shape, links):
  chip = chips.CHIPS['v5p']
  devices = range(shape[0] * shape[1] * (shape + (1,))[2])
  assert chips.Topology('', devices, chip, shape).links == links


@pytest.mark.parametrize(
  'name, message',
  [
    ('v5e-256', "no topology 'v5e-256'.*such as 'v5e:16x16'"),
    ('v9:4x4', "Unknown chip of the topology 'v9'"),
    ('v5e:4x4x4', 'has 3 axes, but v5e is connected along 2'),
    ('v5p:4x4', 'has 2 axes, but v5p is connected along 3'),
    ('H100:2x2', "Unknown chip of the topology 'H100'"),
  ],
)
def test_a_wrong_topology_gets_one_sentence(name, message):
  with pytest.raises(ValueError, match=message):
    chips.topology(name)


def test_without_libtpu_the_extra_is_named(monkeypatch):
  monkeypatch.setattr(chips.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ImportError, match=r'pip install "kd_jax\[tpu\]"'):
    chips.topology('v5e:2x2')


def test_the_command(tmp_path, capsys):
  path = tmp_path / 'plan.json'
  words = ['plan', f'--config={DIGITS}:tiny', '--stage=alone']
  words += ['--estimate', f'--json={path}']
  assert cli.main(words) == 0
  printed = capsys.readouterr().out
  for text in (
    'alone on cpu: 8 devices (data 8), batch 64 (8 on each), 4 steps',
    'temporaries: activations, gradients',
    "models' own count",
    'gradients',
    'cached teacher (impossible): there is no teacher',
    'estimated',
  ):
    assert text in printed
  assert json.loads(path.read_text())['stage'] == 'alone'
  assert cli.main(words) == 2
  assert 'give --overwrite' in capsys.readouterr().err


@pytest.mark.parametrize(
  'words, message',
  [
    (['--stage=export'], "Unknown stage 'export'"),
    (['--what_if=fdsp'], 'did you mean fsdp'),
    (['--config.compiler=pmap'], "compiler='pmap' cannot be planned"),
    (['--config.alone.train.batch_size=12'], 'batch of 12 does not divide'),
    (['--topology=v5e:2x2', '--measure'], 'Only devices that are here'),
    (['--topology=v5e'], "no topology 'v5e'"),
  ],
)
def test_bad_words_get_one_sentence(words, message, capsys):
  given = ['plan', f'--config={DIGITS}:tiny', '--what_if=none', '--stage=alone']
  assert cli.main([*given, *words]) == 2
  error = capsys.readouterr().err.splitlines()[-1]
  assert message in error and error.startswith('kd-jax: ')


def test_a_compiled_step_can_be_lowered():
  """Under both compilers that need no device."""
  for compiler in ('jit', 'shard_map'):
    config = tiny(compiler=compiler)
    step = steps.rehearse(rehearsal.Rehearsal(config), 'alone')
    call = sharding.compile_step(step.step, step.run.mesh, compiler)
    lowered = call.lower(step.state, step.batch, step.rng)
    assert 'all_reduce' in lowered.as_text() or compiler == 'jit'
    assert lowered.out_info[0].step.shape == ()
