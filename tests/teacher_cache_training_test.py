"""Training from a teacher cache is training with the live teacher."""

import json
import pathlib
import runpy
import socket
import subprocess
import sys

import cached_networks as nets
import jax
import numpy as np
import pytest

import kd_jax
from kd_jax import data, objectives, sharding, train
from kd_jax.data import cache_form
from kd_jax.storage.checkpoint import Checkpoints

pytestmark = pytest.mark.once
EPOCHS = 3
# Of the losses, relative: a rounding of the teacher's logits each.
TOLERANCE = {'float32': 2e-6, 'float16': 2e-3, 'bfloat16': 2e-2}
MESHES = {
  'jit': ('jit', {}),
  'fsdp': ('jit', {'fsdp': 4}),
  'shard_map': ('shard_map', {}),
  'pmap': ('pmap', {}),
}


@pytest.fixture(scope='module')
def caches(tmp_path_factory):
  """dtype -> a cache of the outputs and the feature."""
  path = tmp_path_factory.mktemp('caches')
  for dtype in TOLERANCE:
    form = data.Form(dtype, features=('hidden',))
    nets.write(path / dtype, form=form, epochs=EPOCHS)
  return {dtype: data.TeacherCache(path / dtype) for dtype in TOLERANCE}


def _batches():
  return data.train_batches(
    nets.images(), batch_size=nets.BATCH, seed=nets.SEED, epochs=EPOCHS
  )


def _history(where, cache=None):
  compiler, axes = MESHES[where]
  mesh = sharding.make_mesh(**axes)
  batches, teacher_fn = _batches(), nets.network
  if cache is not None:
    batches, teacher_fn = cache.attach(batches), cache.forward
  state, step = nets.training(mesh, compiler, teacher_fn, cache)
  made = list(nets.steps(state, step, batches))
  assert len(made) == 2 * EPOCHS
  return [metrics for _, metrics in made], made[-1][0]


@pytest.fixture(scope='module')
def live():
  """The history of training with the live teacher."""
  return _history('jit')


def _compare(got, want, tolerance):
  for row, wanted in zip(got, want, strict=True):
    assert row.keys() == wanted.keys()
    for name in wanted:
      np.testing.assert_allclose(
        row[name], wanted[name], rtol=tolerance, atol=tolerance / 10
      )


@pytest.mark.parametrize('dtype', TOLERANCE)
def test_losses_are_those_of_the_live_teacher(caches, live, dtype):
  history, state = _history('jit', caches[dtype])
  _compare(history, live[0], TOLERANCE[dtype])
  for got, want in zip(
    jax.tree.leaves(state.params), jax.tree.leaves(live[1].params), strict=True
  ):
    np.testing.assert_allclose(got, want, atol=TOLERANCE[dtype])


@pytest.mark.parametrize('where', [w for w in MESHES if w != 'jit'])
def test_losses_are_the_same_on_every_mesh(caches, live, where):
  history, _ = _history(where, caches['float32'])
  _compare(history, live[0], 5e-6)


def test_the_step_does_not_run_the_teacher(caches):
  """Nor does it move anything between devices to read what was stored."""
  cache = caches['float16']

  def hlo(teacher_fn, cache=None):
    state, step = nets.training(sharding.make_mesh(), 'jit', teacher_fn, cache)
    compiled, mesh = step
    batch = nets.images().read(np.arange(8))
    batch['epoch'] = np.zeros(8, np.int32)
    batch |= cache.placeholder(8) if cache else {}
    batch = sharding.shard_batch(batch, mesh)
    return jax.jit(compiled).lower(state, batch, jax.random.key(0)).compile()

  texts = {
    'live': hlo(nets.network).as_text(),
    'cached': hlo(cache.forward, cache).as_text(),
  }
  counts = {n: t.count(' dot(') for n, t in texts.items()}
  # Two products of the teacher; the student's forward and gradients stay.
  assert counts['live'] - counts['cached'] == 2
  for name in ('all-gather', 'all-to-all', 'collective-permute'):
    assert name not in texts['cached']


def test_top_k_stays_on_its_device(tmp_path):
  form = data.Form('float16', top_k=2)
  nets.write(tmp_path / 'c', form=form)
  cache = data.TeacherCache(tmp_path / 'c')
  mesh = sharding.make_mesh()
  batch = sharding.shard_batch(cache.placeholder(8), mesh)
  unpacked = jax.jit(lambda b: cache.forward({}, b).output)
  text = unpacked.lower(batch).compile().as_text()
  assert 'all-' not in text and 'collective' not in text


def test_a_resumed_training_ends_with_the_same_bits(caches, tmp_path):
  """Stopped in the middle of an epoch, with a cache that is opened anew."""

  def run(name, *, until):
    cache = data.TeacherCache(caches['float16'].path)
    state, (compiled, mesh) = nets.training(
      sharding.make_mesh(), 'jit', cache.forward, cache
    )
    with Checkpoints(tmp_path / name) as checkpoints:
      return train.train(
        compiled,
        state,
        cache.attach(_batches()),
        rng=jax.random.key(0),
        total_steps=until,
        put=lambda batch: sharding.shard_batch(batch, mesh),
        checkpoints=checkpoints,
        log_every=1,
      )

  straight = run('straight', until=6)
  run('cut', until=3)
  resumed = run('cut', until=6)
  assert resumed.history == straight.history
  for got, want in zip(
    jax.tree.leaves(resumed.state.params),
    jax.tree.leaves(straight.state.params),
    strict=True,
  ):
    np.testing.assert_array_equal(got, want)


def test_a_term_that_runs_the_teacher_again_is_refused(caches):
  """Else it would see outputs of other images, without a word."""
  cache = caches['float16']
  grad = kd_jax.weighted_sum({'grad': (1.0, objectives.input_gradients())})
  state, step = nets.training(
    sharding.make_mesh(), 'jit', cache.forward, cache, objective=grad
  )
  with pytest.raises(ValueError, match='for the images of the batch and for'):
    next(nets.steps(state, step, cache.attach(_batches())))


def test_batches_stand_where_they_stood(caches):
  batches = caches['float16'].attach(_batches())
  state = batches.get_state()
  first = next(batches)
  second = next(batches)
  batches.set_state(state)
  for want in (first, second):
    got = next(batches)
    np.testing.assert_array_equal(got['id'], want['id'])
    np.testing.assert_array_equal(
      got[cache_form.OUTPUT], want[cache_form.OUTPUT]
    )
  mixed = {**first, 'epoch': np.arange(len(first['id']))}
  with pytest.raises(ValueError, match='A batch is of one epoch'):
    next(caches['float16'].attach(iter([mixed])))


@pytest.mark.slow
@pytest.mark.once
def test_two_processes_write_and_read_their_own_parts(tmp_path):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  script = pathlib.Path(__file__).with_name('cached_processes.py')
  processes = [
    subprocess.Popen(
      [sys.executable, script, str(i), str(port), tmp_path],
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in (0, 1)
  ]
  errors = [p.communicate(timeout=600)[1] for p in processes]
  assert [p.returncode for p in processes] == [0, 0], errors
  got = json.loads((tmp_path / 'losses.json').read_text())
  state, step = nets.training(sharding.make_mesh(), 'jit', nets.network)
  batches = data.train_batches(
    nets.images(), batch_size=nets.BATCH, seed=nets.SEED, epochs=2
  )
  want = [metrics for _, metrics in nets.steps(state, step, batches)]
  _compare(got, want, 5e-6)


@pytest.mark.slow
@pytest.mark.once
def test_the_benchmark_tabulates_bound_and_bytes(tmp_path, monkeypatch):
  path = pathlib.Path(__file__).parent.parent / 'benchmarks/teacher_cache.py'
  monkeypatch.syspath_prepend(path.parent)
  script = runpy.run_path(str(path))
  # Every step is made, and its time is given.
  given = dict.fromkeys(script['FORMS'], 2.0)
  given |= {'live teacher': 3.0, 'no teacher': 1.0}

  def timed(calls, *, runs):
    for once in calls.values():
      _, metrics = once()
      assert np.isfinite(float(metrics['loss/total']))
    return {}, {name: np.full(runs, given[name]) for name in calls}

  monkeypatch.setattr(script['turns'], 'in_turns', timed)
  words = ['--pairs', 'tiny', '--size', '8', '--batch', '8', '--images', '16']
  out = tmp_path / 'made' / 'table.md'
  script['main']([*words, '--runs', '4', '--out', str(out)])
  rows = [line.split(' | ') for line in out.read_text().splitlines()[2:7]]
  rows = {row[1]: row for row in rows}
  assert rows['cached, float16'][3] == '1.500 (1.500 to 1.500)'
  assert rows['no teacher'][3].startswith('3.000')
  stored = {name: row[-1].strip(' |') for name, row in rows.items()}
  # The id, and 100 numbers; of the top 10 values, classes and the tail.
  assert stored['cached, float16'] == str(4 + 2 * 100)
  assert stored['cached, float32'] == str(4 + 4 * 100)
  assert stored['cached, top 10'] == str(4 + 10 * (2 + 2) + 4)
  # Multiply-accumulates of 192 -> 64 -> 100 and of 192 -> 4 -> 100.
  teacher, student = 192 * 64 + 64 * 100, 192 * 4 + 4 * 100
  assert float(rows['live teacher'][5]) == pytest.approx(
    1 + teacher / 3 / student, abs=1e-3
  )
  assert 1.5 < float(rows['live teacher'][4]) < 1 + teacher / student
