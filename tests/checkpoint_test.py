"""Checkpoints: bitwise, loud about damage, and safe to kill."""

import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax import types
from kd_jax.storage import checkpoint, files
from kd_jax.storage.checkpoint import CheckpointError, Checkpoints

ROOT = pathlib.Path(__file__).parents[1]


def small(step=0):
  """A state whose every value follows from the step."""
  rng = np.random.default_rng(step)
  return {
    'w': jnp.asarray(rng.normal(size=(64, 32)), jnp.float32),
    'none': None,
  }


def train_state():
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  params = {'conv': {'kernel': jnp.linspace(-1, 1, 12).reshape(3, 4)}, 'no': {}}
  opt_state = tx.init(params)
  updates, opt_state = tx.update(params, opt_state, params)
  return types.TrainState(
    step=jnp.array(7, jnp.int32),
    params=optax.apply_updates(params, updates),
    model_state={
      'mask': jnp.array([True, False, True]),
      'bf16': jnp.array([1.5, -0.0, jnp.nan, jnp.inf], jnp.bfloat16),
      'int8': jnp.arange(-128, 128, dtype=jnp.int8),
      'int4': jnp.array([-8, 7], jnp.int4),
      'uint32': jnp.array([2**32 - 1], jnp.uint32),
      'f64': np.array([1 / 3]),
      'i64': np.arange(2**40, 2**40 + 3),
      'empty': jnp.zeros((0, 3), jnp.float16),
      'a.b': jnp.ones(2),
      'a': {'b': jnp.zeros(2)},
    },
    opt_state=opt_state,
    objective=types.ObjectiveState(
      params=(), state={'rng': jax.random.key(3)}, opt_state=None
    ),
    teacher={'keys': jax.random.split(jax.random.key(1, impl='rbg'), 4)},
  )


def raw(x):
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  return np.asarray(x)


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert isinstance(x, np.ndarray) == isinstance(y, np.ndarray)
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    assert raw(x).tobytes() == raw(y).tobytes()


def save_steps(directory, *steps, **kwargs):
  kwargs.setdefault('keep', 9)
  with Checkpoints(directory, **kwargs) as saved:
    for step in steps:
      saved.save(step, small(step))


def array_file(directory, step):
  """The file that holds the numbers: by far the largest."""
  files = [p for p in (directory / str(step)).rglob('*') if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


def flip(path, where=0.5):
  data = bytearray(path.read_bytes())
  data[int(len(data) * where)] ^= 1
  path.write_bytes(data)


def run(code, *args, **kwargs):
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  return subprocess.Popen(
    [sys.executable, '-c', code, *map(str, args)],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **kwargs,
  )


@pytest.mark.parametrize('abstract', [False, True])
def test_round_trip_is_bitwise(tmp_path, abstract):
  state = train_state()
  with Checkpoints(tmp_path / 'run') as saved:
    assert saved.restore(state) is None
    assert saved.latest_step() is None
    saved.save(
      7, state, data_state={'next': 3}, metrics={'a': jnp.float32(0.5)}
    )
    assert saved.latest_step() == 7
  like = state
  if abstract:
    # A numpy leaf is asked for as numpy; the others by shape and dtype.
    like = jax.tree.map(
      lambda x: (
        x
        if isinstance(x, np.ndarray)
        else jax.ShapeDtypeStruct(x.shape, x.dtype)
      ),
      state,
    )
  restored = Checkpoints(tmp_path / 'run').restore(like)
  assert_same(restored.state, state)
  assert (restored.step, restored.data_state) == (7, {'next': 3})
  assert restored.metrics == {'a': 0.5}


def test_abstract_64_bit_leaf_is_not_narrowed(tmp_path):
  state = {'n': np.array([2**40]), 'x': np.array([1 / 3])}
  with Checkpoints(tmp_path) as saved:
    saved.save(1, state)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    assert_same(saved.restore(like).state, state)


def test_keeps_the_last_and_the_best(tmp_path):
  with Checkpoints(tmp_path, best='acc') as saved:
    assert saved.best_step() is None
    for step, acc in enumerate([float('nan'), 0.9, 0.1, 0.9, 0.2]):
      saved.save(step, small(step), metrics={'acc': acc})
    assert (saved.best_step(), saved.latest_step()) == (3, 4)
  # Another process must know the best of the one before.
  with Checkpoints(tmp_path, best='acc') as saved:
    assert saved.best_step() == 3
    saved.save(5, small(5))
    saved.save(6, small(6), metrics={'acc': 0.3})
  assert sorted(os.listdir(tmp_path)) == ['3', '6']
  restored = Checkpoints(tmp_path).restore(small(), step=3)
  assert_same(restored.state, small(3))
  assert restored.metrics == {'acc': 0.9}


def test_keeps_the_last_few(tmp_path):
  save_steps(tmp_path, 1, 2, 3, 4, keep=2)
  assert sorted(os.listdir(tmp_path)) == ['3', '4']


def test_flipped_byte_falls_back(tmp_path, caplog):
  save_steps(tmp_path, 1, 2)
  flip(array_file(tmp_path, 2))
  with Checkpoints(tmp_path) as saved:
    restored = saved.restore(small())
    assert saved.latest_step() == 1
    with pytest.raises(
      CheckpointError, match=r'step 2.*w is not what was saved'
    ):
      saved.restore(small(), step=2)
  assert restored.step == 1
  assert_same(restored.state, small(1))
  [record] = caplog.records
  assert (record.name, record.levelno) == ('kd_jax', logging.WARNING)
  assert 'step 2 is damaged: w is not what was saved' in record.getMessage()
  assert (tmp_path / '2').exists()


def truncate(step):
  path = array_file(step.parent, step.name)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
  'truncated': truncate,
  'deleted file': lambda step: array_file(step.parent, step.name).unlink(),
  'deleted arrays': lambda step: shutil.rmtree(step / 'state'),
  'deleted manifest': lambda step: shutil.rmtree(step / 'manifest'),
  'flipped manifest': lambda step: flip(step / 'manifest' / 'metadata', 0.7),
  'cut manifest': lambda step: (step / 'manifest/metadata').write_text('{"a'),
  'manifest of a list': lambda s: (s / 'manifest/metadata').write_text('[1]'),
  'empty': lambda step: (shutil.rmtree(step), step.mkdir()),
}


@pytest.mark.parametrize('how', DAMAGE)
def test_damage_falls_back_in_one_sentence(tmp_path, caplog, capfd, how):
  save_steps(tmp_path, 1, 2)
  DAMAGE[how](tmp_path / '2')
  restored = Checkpoints(tmp_path).restore(small())
  assert restored.step == 1
  assert_same(restored.state, small(1))
  [record] = caplog.records
  assert 'step 2 is damaged: ' in record.getMessage()
  assert len(record.getMessage()) < 400 and '\n' not in record.getMessage()
  assert capfd.readouterr() == ('', '')


def test_all_damaged_is_an_error(tmp_path):
  save_steps(tmp_path, 1, 2)
  flip(array_file(tmp_path, 1))
  array_file(tmp_path, 2).unlink()
  with pytest.raises(CheckpointError, match='step 2 is.*; step 1 is') as e:
    Checkpoints(tmp_path).restore(small())
  assert str(tmp_path) in str(e.value) and '\n' not in str(e.value)


def test_step_that_is_not_there(tmp_path):
  save_steps(tmp_path, 1, 3)
  with pytest.raises(CheckpointError, match=r'No step 2 .*step 1, 3'):
    Checkpoints(tmp_path).restore(small(), step=2)


def test_fingerprint_must_match(tmp_path):
  save_steps(tmp_path, 1, fingerprint={'seed': 0, 'shape': (1, 2), 'old': 'x'})
  save_steps(tmp_path, 2, fingerprint={'seed': 1, 'shape': (1, 2), 'new': 'y'})
  ours = Checkpoints(
    tmp_path, fingerprint={'seed': 0, 'shape': (1, 2), 'old': 'x'}
  )
  # No falling back to step 1, which would match.
  with pytest.raises(CheckpointError) as e:
    ours.restore(small())
  assert 'Step 2' in str(e.value) and 'shape' not in str(e.value)
  assert 'seed is 1 there and 0 here' in str(e.value)
  assert 'new is "y" there and absent here' in str(e.value)
  assert 'old is absent there and "x" here' in str(e.value)
  assert_same(ours.restore(small(), step=1).state, small(1))


def test_other_model_is_named(tmp_path):
  with Checkpoints(tmp_path) as saved:
    saved.save(1, {c: jnp.ones((2, 3)) for c in 'abcde'})
    like = {c: jnp.ones((2, 4)) for c in 'abcdf'}
    with pytest.raises(CheckpointError, match='another model') as e:
      saved.restore(like)
  assert 'a is float32[2,3] there and float32[2,4] here' in str(e.value)
  assert 'c is' in str(e.value) and 'd is' not in str(e.value)
  assert 'and 3 more' in str(e.value)


@pytest.mark.parametrize(
  'like, message',
  [
    (
      {'w': np.ones(3, np.float16)},
      r'w is float32\[3\] there and float16\[3\]',
    ),
    ({}, r'w is float32\[3\] there and absent here'),
    ({'w': np.ones(3, np.float32), 'v': np.ones(1)}, 'v is absent there and'),
    ({'w': jax.ShapeDtypeStruct((3,), jax.random.key(0).dtype)}, 'key<fry>'),
  ],
)
def test_no_silent_cast_and_no_missing_leaf(tmp_path, like, message):
  with Checkpoints(tmp_path) as saved:
    saved.save(1, {'w': np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match=message):
      saved.restore(like)


def test_foreign_directories_are_refused(tmp_path):
  (tmp_path / 'thesis.tex').write_text('mine')
  with pytest.raises(CheckpointError, match=r'thesis\.tex'):
    Checkpoints(tmp_path)
  with pytest.raises(CheckpointError, match='is a file'):
    Checkpoints(tmp_path / 'thesis.tex')
  theirs = tmp_path / 'theirs'
  with ocp.CheckpointManager(theirs) as manager:
    manager.save(1, args=ocp.args.StandardSave(small()))
  with pytest.raises(CheckpointError, match='no checkpoint of kd_jax'):
    Checkpoints(theirs)
  assert (theirs / '1').exists()


@pytest.mark.parametrize('restore_first', [True, False])
@pytest.mark.parametrize('how', ['truncated', 'empty', 'deleted arrays'])
def test_saves_over_a_damaged_step(tmp_path, restore_first, how):
  save_steps(tmp_path, 1, 3)
  DAMAGE[how](tmp_path / '3')
  with Checkpoints(tmp_path, keep=2) as saved:
    if restore_first:
      assert saved.restore(small()).step == 1
    saved.save(2, small(2))  # before the damaged one, which stays until 3
    assert saved.latest_step() == 2 and (tmp_path / '3').exists()
    saved.save(3, small(3))
    assert saved.latest_step() == 3
    assert_same(saved.restore(small()).state, small(3))
  assert sorted(os.listdir(tmp_path)) == ['2', '3']


def test_damaged_step_takes_no_good_ones_place(tmp_path):
  save_steps(tmp_path, 1, 2, 3)
  flip(array_file(tmp_path, 3))
  with Checkpoints(tmp_path, keep=2) as saved:
    assert saved.restore(small()).step == 2
    saved.save(4, small(4))
  assert sorted(os.listdir(tmp_path)) == ['2', '4']


def test_replaced_step_loses_its_metric(tmp_path):
  with Checkpoints(tmp_path, best='acc', keep=2) as saved:
    saved.save(1, small(1), metrics={'acc': 0.5})
    saved.save(2, small(2), metrics={'acc': 0.9})
  flip(array_file(tmp_path, 2))
  with Checkpoints(tmp_path, best='acc') as saved:
    assert saved.restore(small()).step == 1
    for step in (2, 3, 4):
      saved.save(step, small(step), metrics={'acc': 0.1})
  assert sorted(os.listdir(tmp_path)) == ['1', '4']


def test_save_never_goes_back(tmp_path):
  save_steps(tmp_path, 2, 5)
  with Checkpoints(tmp_path) as saved:
    for step in (3, 5):
      with pytest.raises(CheckpointError, match='already has step 5'):
        saved.save(step, small(step))
    saved.save(6, small(6))
    with pytest.raises(CheckpointError, match='already has step 6'):
      saved.save(6, small(7))  # though 6 is still being written
    assert_same(saved.restore(small()).state, small(6))


def test_skipped_save_raises(tmp_path, monkeypatch):
  monkeypatch.setattr(ocp.CheckpointManager, 'save', lambda *a, **k: False)
  with pytest.raises(CheckpointError, match='skipped step 1'):
    Checkpoints(tmp_path).save(1, small())


DISK_FULL = """
import resource, sys
import numpy as np
from kd_jax.storage.checkpoint import CheckpointError, Checkpoints

def limit(size):
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

state = {'w': np.random.default_rng(0).normal(size=(256, 256))}
with Checkpoints(sys.argv[1]) as saved:
  saved.save(1, state)
  saved.wait()
  limit(50_000)
  for fail in (saved.wait, lambda: saved.save(3, state)):
    try:
      saved.save(2, state)
      fail()
    except CheckpointError as e:
      print(e)
  assert saved.latest_step() == saved.restore(state).step == 1
  limit(resource.RLIM_INFINITY)
  saved.save(2, state)
  saved.wait()
  limit(50_000)
  try:
    saved.save(3, state)
    saved.close()
  except CheckpointError as e:
    print(e)
"""


def test_full_disk_surfaces_and_the_next_save_works(tmp_path):
  with run(DISK_FULL, tmp_path) as process:
    out, err = process.communicate()
  assert (process.returncode, err) == (0, '')
  assert len(out.splitlines()) == 3
  for line in out.splitlines():
    assert line.startswith(f'Saving to {tmp_path} failed: ')
  assert Checkpoints(tmp_path).latest_step() == 2


def test_state_may_be_donated_and_written_to(tmp_path):
  step = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  w, n = jnp.arange(500_000.0), np.arange(500_000)
  want = {'w': np.asarray(w).copy(), 'n': n.copy()}
  with Checkpoints(tmp_path) as saved:
    saved.save(1, {'w': w, 'n': n})
    n[:] = 0
    jax.block_until_ready(step(w))
    assert_same(saved.restore(want).state, want)


@pytest.mark.parametrize(
  'state, message',
  [
    ({'w': np.ones(2), 'lr': 0.1}, 'lr is a float'),
    ({'a/b': np.ones(2), 'a': {'b': np.ones(2)}}, "path 'a/b'"),
    ({'a': {}}, 'no array'),
  ],
)
def test_what_cannot_be_saved(tmp_path, state, message):
  with pytest.raises(CheckpointError, match=message):
    Checkpoints(tmp_path / 'run').save(1, state)
  assert not (tmp_path / 'run').exists()


def test_settings_must_be_json(tmp_path):
  with pytest.raises(CheckpointError, match='fingerprint is not JSON'):
    Checkpoints(tmp_path, fingerprint={'f': small})
  with pytest.raises(CheckpointError, match='data_state is not JSON'):
    Checkpoints(tmp_path).save(1, small(), data_state={'f': b''})
  with pytest.raises(CheckpointError, match='keep'):
    Checkpoints(tmp_path, keep=0)


def test_load_state_reads_a_part_of_any_run(tmp_path):
  with Checkpoints(tmp_path, fingerprint={'seed': 0}, keep=2) as saved:
    saved.save(1, train_state())
    saved.save(2, train_state())
  before = sorted(tmp_path.rglob('*'))
  state = train_state()
  whole = checkpoint.load_state(tmp_path, state, step=1)
  assert whole.step == 1
  assert_same(whole.state, state)
  part = checkpoint.load_state(tmp_path, {'params': state.params})
  assert part.step == 2
  assert_same(part.state, {'params': state.params})
  with pytest.raises(CheckpointError, match='params/w is absent there'):
    checkpoint.load_state(tmp_path, {'params': {'w': np.ones(2)}})
  assert sorted(tmp_path.rglob('*')) == before


def test_load_state_says_where_there_is_none(tmp_path):
  for load in (checkpoint.load_state, checkpoint.read_manifest):
    args = (small(),) if load is checkpoint.load_state else ()
    with pytest.raises(CheckpointError, match=str(tmp_path / 'no')):
      load(tmp_path / 'no', *args)
  assert not (tmp_path / 'no').exists()


def test_read_manifest(tmp_path):
  save_steps(tmp_path, 1, 2, fingerprint={'seed': 0})
  manifest = checkpoint.read_manifest(tmp_path)
  assert manifest['fingerprint'] == {'seed': 0} and manifest['format'] == 1
  assert manifest['versions']['jax'] == jax.__version__
  assert manifest['leaves']['w']['shape'] == [64, 32]
  assert len(manifest['leaves']['w']['sha256']) == 64
  assert checkpoint.read_manifest(tmp_path, 1) != manifest
  flip(tmp_path / '2/manifest/metadata')
  one = checkpoint.read_manifest(tmp_path, 1)
  assert checkpoint.read_manifest(tmp_path) == one
  with pytest.raises(CheckpointError, match='step 2 is damaged'):
    checkpoint.read_manifest(tmp_path, 2)


def test_newer_format_is_refused(tmp_path):
  save_steps(tmp_path, 1)
  path = tmp_path / '1/manifest/metadata'
  manifest = {**json.loads(path.read_text()), 'format': 99}
  path.write_text(json.dumps(files.seal(manifest)))
  with pytest.raises(CheckpointError, match='format 99'):
    Checkpoints(tmp_path).restore(small())


KILLED = """
import sys
from kd_jax.storage.checkpoint import Checkpoints
import numpy as np
with Checkpoints(sys.argv[1], keep=2) as saved:
  like = {'w': np.zeros((512, 512), np.int32)}
  restored = saved.restore(like)
  step = restored.step if restored else 0
  while True:
    step += 1
    saved.save(step, {'w': np.random.default_rng(step).integers(
        9, size=(512, 512), dtype=np.int32)})
    print(step, flush=True)
"""


def test_sigkill_leaves_a_directory_that_resumes(tmp_path):
  like = {'w': np.zeros((512, 512), np.int32)}

  def check(reached):
    restored = Checkpoints(tmp_path).restore(like)
    # The step announced last was being written when the signal came.
    assert restored.step >= reached - 1
    want = np.random.default_rng(restored.step).integers(
      9, size=(512, 512), dtype=np.int32
    )
    np.testing.assert_array_equal(restored.state['w'], want)
    return restored.step

  reached = 0
  for more in (4, 3):
    before = reached
    with run(KILLED, tmp_path) as process:
      while reached < before + more:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        reached = int(line)
      process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    reached = check(reached)
  (tmp_path / '99.orbax-checkpoint-tmp').mkdir()
  with Checkpoints(tmp_path) as saved:
    saved.save(100, like)
  assert os.listdir(tmp_path) == ['100']  # nothing is left of the killed


ONE_DEVICE = """
import sys
import jax
jax.config.update('jax_num_cpu_devices', 1)
import numpy as np
from absl import logging
from kd_jax.storage.checkpoint import Checkpoints, load_state
logging.set_verbosity(logging.INFO)  # as absl.app.run does
assert jax.device_count() == 1
like = {'w': jax.ShapeDtypeStruct((8, 4), np.float32),
        'rng': jax.ShapeDtypeStruct((8,), jax.random.key(0).dtype)}
state = load_state(sys.argv[1], like).state
np.testing.assert_array_equal(state['w'], np.arange(32.0).reshape(8, 4))
assert not state['w'].committed
with Checkpoints(sys.argv[2]) as saved:
  saved.save(1, {'w': state['w'] + 1, 'rng': state['rng'],
                 'none': np.zeros((8, 0), np.float32)})
"""


def test_eight_devices_to_one_and_back(tmp_path):
  assert jax.device_count() == 8
  mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
  keys = jax.random.split(jax.random.key(0), 8)
  state = {
    'w': jnp.arange(32.0).reshape(8, 4),
    'rng': keys,
    'none': jnp.zeros((8, 0)),
  }
  specs = {'w': P('x', 'y'), 'rng': P('x'), 'none': P('x')}
  state = {
    name: jax.device_put(x, NamedSharding(mesh, specs[name]))
    for name, x in state.items()
  }
  with Checkpoints(tmp_path / 'eight') as saved:
    saved.save(1, state)
    assert_same(saved.restore(state).state, state)
  with run(ONE_DEVICE, tmp_path / 'eight', tmp_path / 'one') as process:
    # Also the check that nobody sees what Orbax logs.
    assert process.communicate() == ('', '') and process.returncode == 0
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  restored = Checkpoints(tmp_path / 'one').restore(like)
  assert_same(restored.state, {**state, 'w': state['w'] + 1})
  for name in state:
    got = restored.state[name].sharding
    assert got.is_equivalent_to(state[name].sharding, state[name].ndim)
    assert len(got.device_set) == 8


def test_uncommitted_stays_uncommitted(tmp_path):
  # Or else a restored state could not enter a step compiled for a mesh.
  device = jax.devices()[1]
  state = {'a': jnp.ones(4), 'b': jax.device_put(jnp.ones(4), device)}
  with Checkpoints(tmp_path) as saved:
    saved.save(1, state)
    restored = saved.restore(state).state
  assert not restored['a'].committed
  assert restored['b'].committed and restored['b'].devices() == {device}


def test_a_save_compiles_nothing(tmp_path):
  """However many devices hold copies, and slices are given to large arrays."""
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  copies = NamedSharding(mesh, P())
  state = {
    f'w{n}': jax.device_put(jnp.arange(8.0 * n), copies) for n in range(1, 5)
  }
  lowered = []

  def count(name, seconds, **_):
    if name.endswith('jaxpr_to_mlir_module_duration'):
      lowered.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(count)
  with Checkpoints(tmp_path, fingerprint={}) as checkpoints:
    checkpoints.save(1, state)
  assert not lowered
  jax.jit(lambda x: x + 17)(1.0)
  assert len(lowered) == 1
  restored = checkpoint.Checkpoints(tmp_path, fingerprint={}).restore(state)
  assert_same(restored.state, state)
