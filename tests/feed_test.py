"""What the loop dispatches: batches ahead, in groups, from where they lie."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax import data, objectives, sharding, train
from kd_jax.data.resident import Resident
from kd_jax.guard import drop_nonfinite
from kd_jax.step import init_state, make_train_step
from kd_jax.storage.checkpoint import CheckpointError, Checkpoints
from kd_jax.train import feed, profiling
from kd_jax.types import Forward

pytestmark = pytest.mark.once


@pytest.mark.parametrize('steps', [1, 3, 4, 50])
@pytest.mark.parametrize('every', [1, 5, 8])
def test_dispatches_meet_every_evaluation_and_resume_alike(steps, every):
  counts = list(feed.dispatches(0, 21, every, steps))
  ends = np.cumsum(counts).tolist()
  assert ends[-1] == 21 and set(range(every, 21, every)) <= set(ends)
  assert len(set(counts)) <= 2 and max(counts) == min(steps, every)
  for done, end in enumerate(ends, start=1):
    assert list(feed.dispatches(end, 21, every, steps)) == counts[done:]


def _images(count=40):
  rng = np.random.default_rng(0)
  return data.ImageData(
    image=rng.integers(0, 256, (count, 4, 4, 1), np.uint8),
    label=(np.arange(count) % 3).astype('i4'),
    id=np.arange(count, dtype='i4')[::-1].copy(),
    class_names=('a', 'b', 'c'),
  )


def _student(variables, batch, rng, *, train):
  x = batch['image'].reshape(batch['image'].shape[0], -1) / 255.0
  return Forward(jnp.tanh(x @ variables['params']))


class _Counted:
  """Batches, and how many were read."""

  def __init__(self, batches):
    self.batches, self.read = batches, 0
    self.get_state, self.set_state = batches.get_state, batches.set_state

  def __next__(self):
    self.read += 1
    return next(self.batches)


def _train(
  folder, where, *, total=13, steps=1, every=6, devices=8, stop=None, **options
):
  """A run of the loop on images; `stop` ends it there as a kill would."""
  mesh = sharding.make_mesh(jax.devices()[:devices])
  source = data.make_input(_images(), mesh, where)
  batches = _Counted(data.train_batches(source.examples, batch_size=8, seed=0))
  objective, tx = objectives.hard_labels(), optax.adam(0.05)
  start = {'params': jnp.zeros((16, 3))}
  example = data.train_batches(_images(), batch_size=8, seed=0)
  state = init_state(_student, objective, tx, start, next(example))
  pure = drop_nonfinite(make_train_step(_student, objective, tx))
  compiled = sharding.compile_step(pure, mesh)
  several = None
  if steps > 1:
    several = feed.Several(
      steps,
      sharding.compile_step(pure, mesh, stacked=True),
      lambda batch: source.put(batch, stacked=True),
    )
  evaluated = []

  def evaluate(state):
    evaluated.append(int(state.step))
    if evaluated[-1] == stop:
      raise InterruptedError
    return {'eval/norm': float(jnp.abs(state.params).sum())}

  with Checkpoints(folder, fingerprint={}) as checkpoints:
    trained = train.train(
      compiled,
      sharding.place_state(state, mesh),
      batches,
      rng=jax.random.key(0),
      total_steps=total,
      put=source.put,
      checkpoints=checkpoints,
      evaluate=evaluate,
      evaluate_every=every,
      log_every=4,
      several=several,
      **options,
    )
  traces = compiled.traces + (several.step.traces if several else [])
  return trained, evaluated, batches.read, traces


def test_a_feed_says_what_it_lacks():
  batches = data.train_batches(_images(), batch_size=8, seed=0)
  with pytest.raises(ValueError, match='2 steps needs `several`'):
    feed.Feed(batches, dict, iter([2])).take()
  ended = feed.Feed(batches, dict, iter([1]))
  ended.take()
  with pytest.raises(ValueError, match='no batch to take'):
    ended.take()


def test_a_checkpoint_of_no_training_is_refused(tmp_path):
  state = {'params': jnp.zeros((16, 3))}
  objective, tx = objectives.hard_labels(), optax.adam(0.05)
  example = next(data.train_batches(_images(), batch_size=8, seed=0))
  state = init_state(_student, objective, tx, state, example)
  with Checkpoints(tmp_path, fingerprint={}) as checkpoints:
    checkpoints.save(3, {'state': state, 'rng': jax.random.key(0)})
  with pytest.raises(CheckpointError, match='step 3 does not say where'):
    _train(tmp_path, 'host')


def test_images_on_the_devices_give_the_bits_of_images_from_the_host(tmp_path):
  host, evaluated, read, _ = _train(tmp_path / 'host', 'host')
  device, *_ = _train(tmp_path / 'device', 'device')
  np.testing.assert_array_equal(host.state.params, device.state.params)
  assert host.history == device.history
  assert evaluated == [6, 12, 13]
  assert read == 13  # one ahead, but none beyond the end


def test_groups_of_steps_train_as_single_steps_and_resume_to_the_bit(tmp_path):
  single, *_ = _train(tmp_path / 'single', 'host')
  together, evaluated, _, traces = _train(
    tmp_path / 'together', 'device', steps=4
  )
  np.testing.assert_allclose(
    single.state.params, together.state.params, rtol=1e-5, atol=1e-6
  )
  assert evaluated == [6, 12, 13]
  # Rows at 4, 6, 10, 12, 13 in place of 4, 6, 8, 12, 13.
  assert [row['step'] for row in together.history] == [4, 6, 10, 12, 13]
  assert len(traces) == 2  # one of a group and one of a single step
  with pytest.raises(InterruptedError):
    _train(tmp_path / 'killed', 'device', steps=4, stop=12)
  resumed, evaluated, read, _ = _train(tmp_path / 'killed', 'device', steps=4)
  assert evaluated == [12, 13] and read == 7
  np.testing.assert_array_equal(resumed.state.params, together.state.params)
  assert resumed.history == together.history


@pytest.mark.parametrize('parts', [1, 2])
def test_examples_are_those_of_the_global_batch(parts):
  """However many processes read the same part of it."""
  batches = data.train_batches(
    _images(), batch_size=8, seed=0, part=0, parts=parts
  )

  def put(batch):
    return {k: np.concatenate([v] * parts) for k, v in batch.items()}

  assert feed.Feed(batches, put, iter([1])).take().examples == 8


def test_a_step_that_is_compiled_again_is_said(tmp_path, capsys):
  """Once a batch of another dtype arrives."""
  mesh = sharding.make_mesh(jax.devices()[:1])
  batches = data.train_batches(_images(), batch_size=8, seed=0)
  objective, tx = objectives.hard_labels(), optax.sgd(0.05)
  start = {'params': jnp.zeros((16, 3))}
  state = init_state(_student, objective, tx, start, next(batches))
  pure = make_train_step(_student, objective, tx)
  seen = []

  def put(batch):
    seen.append(batch)
    dtype = np.int32 if len(seen) > 5 else np.uint8
    batch = {**batch, 'image': batch['image'].astype(dtype)}
    return sharding.shard_batch(batch, mesh)

  with Checkpoints(tmp_path, fingerprint={}) as checkpoints:
    train.train(
      sharding.compile_step(pure, mesh),
      sharding.place_state(state, mesh),
      batches,
      rng=jax.random.key(0),
      total_steps=8,
      put=put,
      checkpoints=checkpoints,
      log_every=2,
    )
  said = capsys.readouterr().err
  assert said.count('compiled again') == 1
  assert 'compiled again before step 6' in said


def _arrays(count=40):
  """Examples of another kind, as many as `_images` and of the same ids."""
  rng = np.random.default_rng(0)
  return data.ArrayData(
    {
      'x': rng.normal(size=(count, 5)).astype('f4'),
      'label': (np.arange(count) % 3).astype('i4'),
    },
    id=np.arange(count, dtype='i4')[::-1].copy(),
    reads='x',
    num_classes=3,
  )


@pytest.mark.parametrize('make', [_images, _arrays])
def test_only_row_numbers_cross_for_inputs_on_the_devices(make):
  mesh = sharding.make_mesh()
  images = make()
  resident = data.make_input(images, mesh, 'device').examples
  assert isinstance(resident, Resident)
  batches = data.train_batches(resident, batch_size=16, seed=3)
  plain = data.train_batches(images, batch_size=16, seed=3)
  sent, want = next(batches), next(plain)
  assert (
    images.reads not in sent and sum(x.nbytes for x in sent.values()) == 4 * 64
  )
  placed = resident.put(sent)
  assert placed.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_array_equal(placed[name], value)
    assert placed[name].sharding.is_equivalent_to(
      jax.NamedSharding(mesh, sharding.batch_spec()), value.ndim
    )
  assert batches.get_state() == plain.get_state()
  stack = {k: np.stack([v, v[::-1]]) for k, v in sent.items()}
  both = resident.put(stack, stacked=True)[images.reads]
  np.testing.assert_array_equal(both[1], want[images.reads][::-1])


def test_where_images_lie_is_checked():
  mesh = sharding.make_mesh()
  assert data.make_input(_images(), mesh, 'auto').examples.image_shape  # a CPU
  with pytest.raises(ValueError, match="placement 'gpu'"):
    data.make_input(_images(), mesh, 'gpu')
  streamed = data.StreamedImages([], np.arange(0, dtype='i4'), (), 8)
  with pytest.raises(ValueError, match="placement='device' is for examples in"):
    data.make_input(streamed, mesh, 'device')


def test_profile_measures_the_wait_and_writes_a_trace(tmp_path):
  profile = profiling.Profile(tmp_path / 'profile')
  trained, *_ = _train(
    tmp_path / 'run', 'host', total=60, every=60, devices=1, profile=profile
  )
  numbers = trained.profile
  assert 0 <= numbers['waiting'] <= 1 and numbers['steps_per_second'] > 0
  # Without the first row and those of the trace.
  assert 20 <= profile.steps <= 40
  written = {p.suffix for p in (tmp_path / 'profile').rglob('*.*')}
  assert {'.pb', '.gz'} <= written
  assert '% of the time; trace in ' in profiling.sentence(numbers)


def test_time_with_nothing_to_compute_is_waiting(tmp_path):
  profile = profiling.Profile(tmp_path)
  profile.fetched(9.0, idle=True)
  profile.window(5, 10.0)  # compiles: left out
  profile.fetched(1.0, idle=True)
  profile.fetched(2.0, idle=False)
  profile.window(5, 4.0)
  numbers = profile.close()
  assert numbers == {'steps_per_second': 1.25, 'waiting': 0.25, 'trace': None}
