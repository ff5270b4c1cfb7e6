"""Faults injected into a training: nothing is lost."""

import asyncio
import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import untrained_run
from damage import flip, largest
from flax import linen as nn

from kd_jax import adapters, cli, guard, metrics, objectives, quantize, train
from kd_jax.recipe import evaluation
from kd_jax.report import measure
from kd_jax.sharding import preemption
from kd_jax.sharding.preemption import Preempted
from kd_jax.step import init_state, make_train_step
from kd_jax.storage import weights
from kd_jax.storage.checkpoint import CheckpointError, Checkpoints
from kd_jax.storage.workdir import Workdir
from kd_jax.types import Forward

TINY = f'{untrained_run.CONFIGS / "digits.py"}:tiny'


class Batches:
  """Numbered batches; something happens in a step, while the next is drawn."""

  def __init__(self, events):
    self.at, self.events = 0, events

  def __next__(self):
    self.at += 1
    self.events.get(self.at - 1, lambda: None)()
    value = self.events.get(-self.at, 1 + self.at / 100)
    return {'x': np.full(2, value, np.float32), 'id': np.zeros(2)}

  def get_state(self):
    return {'at': self.at}

  def set_state(self, state):
    self.at = state['at']


@functools.cache
def _compiled():
  def student(v, batch, rng, *, train):
    return Forward((v['params'] ** 2).mean() * batch['x'])

  tx = optax.adam(0.01)
  objective = objectives.term(lambda i: i.student.output)
  step = guard.drop_nonfinite(make_train_step(student, objective, tx))
  # More bytes than any other file of a checkpoint.
  params = jnp.asarray(np.random.default_rng(0).normal(size=30_000), 'float32')
  batch = next(Batches({}))
  return jax.jit(step), init_state(
    student, objective, tx, {'params': params}, batch
  )


def loop(folder, events=None, evaluation=lambda step: None, steps=24):
  """A training of few steps with a save every 8 and a row every 5."""
  step, state = _compiled()

  def evaluate(state):
    evaluation(int(state.step))
    return {'eval/accuracy': float(state.params.sum())}

  with Checkpoints(folder, best='eval/accuracy', keep=2) as checkpoints:
    return train.train(
      step,
      state,
      Batches(events or {}),
      rng=jax.random.key(0),
      total_steps=steps,
      put=lambda batch: {'x': batch['x']},
      checkpoints=checkpoints,
      evaluate=evaluate,
      evaluate_every=8,
      log_every=5,
    )


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """The training that nothing happened to."""
  return loop(tmp_path_factory.mktemp('whole'))


def assert_same(trained, whole):
  a, b = (jax.tree.leaves(t.state) for t in (trained, whole))
  for x, y in zip(a, b, strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
  assert trained.history == whole.history


def send(signum=signal.SIGTERM):
  return lambda: signal.raise_signal(signum)


@pytest.mark.parametrize('signum', preemption.SIGNALS)
@pytest.mark.parametrize('at', [3, 10, 16, 23])
def test_a_signal_saves_and_leaves_no_trace(tmp_path, whole, at, signum):
  before = signal.getsignal(signum)
  with pytest.raises(Preempted, match=f'saved at step {at}'):
    loop(tmp_path, {at: send(signum)})
  assert signal.getsignal(signum) is before
  assert_same(loop(tmp_path), whole)


@pytest.mark.parametrize('at', [8, 24])
def test_a_signal_breaks_an_evaluation_off(tmp_path, whole, at):
  def endless(step):
    if step == at:
      signal.raise_signal(signal.SIGTERM)
      time.sleep(60)

  started = time.monotonic()
  with pytest.raises(Preempted, match=f'saved at step {at}'):
    loop(tmp_path, evaluation=endless)
  assert time.monotonic() - started < 30
  # And once more, where the training goes on with what it still owes.
  with pytest.raises(Preempted):
    loop(tmp_path, evaluation=endless)
  seen = []
  assert_same(loop(tmp_path, evaluation=seen.append), whole)
  assert seen == list(range(at, 25, 8))


def test_a_signal_that_nobody_asked_about_is_passed_on():
  """Of the last moment of a training; the next stage must not begin."""
  with (
    pytest.raises(Preempted, match='SIGTERM'),
    preemption.stoppable(),
    preemption.deferred(),
  ):
    signal.raise_signal(signal.SIGTERM)


def test_in_a_thread_signals_are_left_alone():
  found = []

  def look():
    with preemption.deferred() as stop:
      found.append((signal.getsignal(signal.SIGTERM), stop.is_set()))

  before = signal.getsignal(signal.SIGTERM)
  thread = threading.Thread(target=look)
  thread.start()
  thread.join()
  assert found == [(before, False)]


TWICE = """
import signal
from kd_jax.sharding import preemption
with preemption.stoppable(), preemption.deferred() as stop:
  signal.raise_signal(signal.SIGINT)
  assert stop.is_set()
  print('held back', flush=True)
  signal.raise_signal(signal.SIGINT)
  print('not reached', flush=True)
"""


def test_a_second_interrupt_ends_at_once():
  done = subprocess.run(
    [sys.executable, '-c', TWICE], capture_output=True, text=True
  )
  assert (done.returncode, done.stdout) == (-signal.SIGINT, 'held back\n')
  # Killed, without the traceback of a KeyboardInterrupt.
  assert not done.stderr


def test_a_second_interrupt_in_a_notebook_is_a_keyboard_interrupt():
  # As in a notebook; a job in the background of a shell ignores interrupts.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with pytest.raises(KeyboardInterrupt), preemption.deferred():
      signal.raise_signal(signal.SIGINT)
      signal.raise_signal(signal.SIGINT)
  finally:
    signal.signal(signal.SIGINT, before)


def _dense():
  model = nn.Sequential([nn.Dense(4)])
  batch = {'image': jnp.ones((8, 4))}
  variables = model.init(jax.random.key(0), batch['image'])

  def make(interceptor):
    return adapters.from_linen(
      model, interceptors=(interceptor,), train_argument=None
    )

  return make, variables, batch


def _rounding():
  make, variables, batch = _dense()
  rules = [('.*/kernel', quantize.INT8_WEIGHTS)]
  quantize.adaround(make, variables, [batch], rules, steps=10**9)


def _calibration():
  make, variables, batch = _dense()
  endless = iter(lambda: batch, None)
  quantize.calibrate(make, variables, endless, [('.*', quantize.INT8_WEIGHTS)])


def _evaluation():
  metrics.evaluate(lambda batch: time.sleep(1e-3), iter(lambda: {}, None), {})


def _latencies():
  apply = jax.jit(lambda x: x + 1)
  measure.latencies({'f': apply}, np.zeros(2), runs=10**9)


LOOPS = {
  'rounding': _rounding,
  'calibration': _calibration,
  'evaluation': _evaluation,
  'latencies': _latencies,
}


@pytest.mark.parametrize('name', LOOPS)
def test_a_signal_ends_every_other_loop(name):
  signum = signal.SIGTERM
  timer = threading.Timer(2.0, os.kill, (os.getpid(), signum))
  with pytest.raises(Preempted, match='SIGTERM'), preemption.stoppable():
    timer.start()
    LOOPS[name]()


def test_a_signal_that_python_dropped_is_found_later(monkeypatch):
  class Dropped:
    def __del__(self):
      signal.raise_signal(signal.SIGTERM)

  monkeypatch.setattr(sys, 'unraisablehook', lambda dropped: None)
  with pytest.raises(Preempted), preemption.stoppable():
    Dropped()
    preemption.poll()


@pytest.mark.parametrize('call', ['restore', 'wait'])
def test_a_signal_in_an_event_loop_is_not_lost(tmp_path, monkeypatch, call):
  """Asyncio drops what a callback raises: a read then never ends."""
  state = {'w': jnp.arange(3.0)}
  with Checkpoints(tmp_path, fingerprint={}) as checkpoints:
    checkpoints.save(1, state)
  ended = []

  def looping(self, *args, **kwargs):
    async def interrupted():
      asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGTERM)
      await asyncio.sleep(0.01)

    asyncio.run(interrupted())
    ended.append(call)
    return original(self, *args, **kwargs)

  cls, name = {
    'restore': (ocp.PyTreeCheckpointHandler, 'restore'),
    'wait': (ocp.CheckpointManager, 'wait_until_finished'),
  }[call]
  original = getattr(cls, name)
  with Checkpoints(tmp_path, fingerprint={}) as checkpoints:
    if call == 'wait':
      checkpoints.save(2, state)
    with monkeypatch.context() as patch:
      patch.setattr(cls, name, looping)
      with pytest.raises(Preempted, match='SIGTERM'), preemption.stoppable():
        checkpoints.restore(state)
  assert ended == [call]


DAMAGE = {
  'deleted': lambda step: largest(step).unlink(),
  'truncated': lambda step: os.truncate(largest(step), 999),
  'flipped': lambda step: flip(largest(step)),
  'empty': lambda step: (shutil.rmtree(step), step.mkdir()),
}


@pytest.mark.parametrize('how', DAMAGE)
def test_a_damaged_checkpoint_costs_time_alone(tmp_path, whole, how, caplog):
  with pytest.raises(Preempted):
    loop(tmp_path, {19: send()})
  DAMAGE[how](tmp_path / '19')
  seen = []
  assert_same(loop(tmp_path, evaluation=seen.append), whole)
  assert seen == [24]  # from step 16
  assert 'step 19 is damaged: ' in caplog.text


def test_a_full_disk_is_told_at_the_next_step(tmp_path, whole):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  reached = []

  def fill():
    while not (tmp_path / '8').exists():
      time.sleep(0.01)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))

  # Time for the save of step 16 to fail, which runs in the background.
  events = {12: fill, 17: lambda: time.sleep(2)}
  events |= {at: functools.partial(reached.append, at) for at in (18, 19)}
  try:
    with pytest.raises(CheckpointError, match='^Saving to .* failed: ') as e:
      loop(tmp_path, events)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert '\n' not in str(e.value) and reached == []
  assert Checkpoints(tmp_path).latest_step() == 8
  assert_same(loop(tmp_path), whole)


def test_a_full_disk_keeps_the_file_that_was_there(tmp_path):
  path = tmp_path / 'weights.safetensors'
  weights.save_weights(path, {'params': {'w': np.ones(3)}})
  before = path.read_bytes()
  # What is written beside the file goes to a device without space.
  (tmp_path / 'weights.safetensors.tmp').symlink_to('/dev/full')
  with pytest.raises(OSError, match='cannot be written: No space left') as e:
    weights.save_weights(path, {'params': {'w': np.zeros(3)}})
  assert str(path) in str(e.value)
  assert path.read_bytes() == before and len(os.listdir(tmp_path)) == 1


def test_a_save_that_is_not_there_is_an_error(tmp_path):
  with Checkpoints(tmp_path) as saved:
    saved.save(1, {'w': np.ones(3)})
    saved.wait()
    saved.save(2, {'w': np.ones(3)})
    saved._manager.wait_until_finished()
    shutil.rmtree(tmp_path / '2')
    with pytest.raises(CheckpointError, match='Step 2 was saved .* not there'):
      saved.wait()


@pytest.mark.parametrize('name', ['evaluate_every', 'log_every'])
def test_intervals_of_no_steps_are_refused(tmp_path, name):
  step, state = _compiled()
  with (
    Checkpoints(tmp_path) as checkpoints,
    pytest.raises(ValueError, match=f'{name}=0.*from 1 on'),
  ):
    train.train(
      step,
      state,
      Batches({}),
      rng=jax.random.key(0),
      total_steps=8,
      put=lambda batch: batch,
      checkpoints=checkpoints,
      **{name: 0},
    )


def test_what_failed_is_counted_over_a_restart(tmp_path):
  # Batches 3 to 5 and 11 are bad, 16 and 17 jump; by -number, the values.
  bad = dict.fromkeys((-3, -4, -5, -11), np.nan) | {-16: 900.0, -17: 900.0}
  straight = loop(tmp_path / 'straight', bad, steps=24)
  with pytest.raises(Preempted):
    loop(tmp_path / 'stopped', bad | {4: send()})
  with pytest.raises(Preempted):
    loop(tmp_path / 'stopped', bad | {15: send()})
  assert_same(loop(tmp_path / 'stopped', bad), straight)
  assert sum(row['dropped'] for row in straight.history) == 4
  assert sum(row['spikes'] for row in straight.history) == 2


def test_a_window_of_dropped_steps_has_no_mean(tmp_path):
  bad = dict.fromkeys(range(-10, -5), np.nan)
  history = loop(tmp_path, bad).history
  (row,) = [row for row in history if row['step'] == 10]
  assert row == {'step': 10, 'dropped': 2, 'spikes': 0}
  json.dumps(history, allow_nan=False)


@pytest.mark.slow
def test_a_run_goes_on_from_its_directory_alone(
  tmp_path, data_dir, monkeypatch, caplog
):
  """Stopped, its last checkpoint damaged, its weights damaged: same bits."""
  words = [
    'run',
    f'--config={TINY}',
    '--stages=teacher',
    f'--config.data.data_dir={data_dir}',
    '--config.teacher.train.epochs=4',
    '--config.teacher.train.evaluate_every_epochs=1',
  ]
  straight, stopped = tmp_path / 'straight', tmp_path / 'stopped'
  assert cli.main([*words, f'--workdir={straight}']) == 0
  evaluate, calls = evaluation.evaluate, []

  def evaluating(*args, **kwargs):
    calls.append(1)
    if len(calls) == 3:
      signal.raise_signal(signal.SIGTERM)
    return evaluate(*args, **kwargs)

  monkeypatch.setattr(evaluation, 'evaluate', evaluating)
  assert cli.main([*words, f'--workdir={stopped}']) == preemption.REQUEUE
  folder = stopped / 'teacher' / 'checkpoints'
  last = max(int(p.name) for p in folder.iterdir() if p.name.isdigit())
  flip(largest(folder / str(last)))
  again = ['run', f'--workdir={stopped}', '--stages=teacher']
  assert cli.main(again) == 0
  assert f'step {last} is damaged' in caplog.text
  name = 'teacher/weights.safetensors'

  def same():
    results = [Workdir(w).result('teacher') for w in (straight, stopped)]
    assert results[0]['history'] == results[1]['history']
    assert (straight / name).read_bytes() == (stopped / name).read_bytes()

  same()
  flip(stopped / name)
  assert cli.main(again) == 2
  (stopped / 'teacher' / 'result.json').unlink()
  assert cli.main(again) == 0
  same()
