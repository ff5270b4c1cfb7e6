"""What a teacher cache holds, how it is written, and when it is refused."""

import functools
import os
import shutil
import threading

import cached_networks as nets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import data, objectives
from kd_jax.data import cache_form, cache_writer, teacher_cache
from kd_jax.data.teacher_cache import CacheError
from kd_jax.sharding import hosts
from kd_jax.types import Forward

OUTPUT = cache_form.OUTPUT
# Relative errors of one rounding.
ROUNDING = {'float32': 1e-6, 'float16': 2**-11, 'bfloat16': 2**-8}


@pytest.fixture
def small_files(monkeypatch):
  """Files of four examples, so that there are many."""
  monkeypatch.setattr(cache_writer, 'SHARD_BYTES', 6 * 16)


@functools.cache
def _live(preprocess):
  """(raw batch) -> the teacher's forward in training."""
  return jax.jit(
    lambda batch: nets.network(nets.TEACHER, preprocess(batch, train=True))
  )


def _batches(batch_size=4, epochs=2, seed=nets.SEED, images=None):
  images = nets.images() if images is None else images
  return data.train_batches(
    images, batch_size=batch_size, seed=seed, epochs=epochs
  )


def _files(path):
  return {
    p.relative_to(path).as_posix(): p.read_bytes()
    for p in sorted(path.rglob('*'))
    if p.is_file()
  }


@pytest.mark.parametrize('dtype', ROUNDING)
def test_batches_carry_what_the_live_teacher_says(tmp_path, dtype):
  form = data.Form(dtype, features=('hidden',))
  nets.write(tmp_path / 'c', form=form)
  cache, preprocess = data.TeacherCache(tmp_path / 'c'), nets.preprocess()
  live, crops = _live(preprocess), []
  for batch in cache.attach(_batches()):
    want = live({k: batch[k] for k in ('image', 'label', 'id', 'epoch')})
    got = cache.forward({}, batch)
    assert batch[OUTPUT].dtype == jnp.dtype(dtype)
    tolerance = ROUNDING[dtype]
    for a, b in (
      (got.output, want.output),
      (got.features['hidden'], want.features['hidden']),
    ):
      np.testing.assert_allclose(a, b, rtol=tolerance, atol=2e-6)
    crops.append(np.asarray(want.output))
  # Both epochs had crops of their own, or half of the cache shows nothing.
  first, second = np.split(np.sort(np.concatenate(crops), axis=0), 2)
  assert np.abs(first - second).max() > 0.01


def test_examples_are_read_in_any_order_and_batch_size(tmp_path, small_files):
  nets.write(tmp_path / 'c')
  cache, live = data.TeacherCache(tmp_path / 'c'), _live(nets.preprocess())
  batches = _batches(batch_size=21, epochs=2, seed=99)
  for batch in batches:
    order = np.argsort(batch['id'])[::-1][:13]
    got = cache.read(batch['epoch'][0], batch['id'][order])[OUTPUT]
    want = live(batch).output[order]
    np.testing.assert_allclose(got, want, rtol=2**-11, atol=2e-6)


def test_images_that_never_change_are_stored_once(tmp_path):
  preprocess = nets.preprocess(crop_padding=0)
  made = nets.write(
    tmp_path / 'c', preprocess=preprocess, epochs=9, constant=True
  )
  assert made['epochs'] == 1 and len(made['shards']) == 1
  cache = data.TeacherCache(tmp_path / 'c')
  cache.check_epochs(1000)
  *_, batch = _batches(epochs=7)
  want = _live(preprocess)(batch).output
  got = cache.read(6, batch['id'])[OUTPUT]
  np.testing.assert_allclose(got, want, rtol=2**-11, atol=2e-6)


def test_mixed_images_are_those_of_training(tmp_path, small_files):
  preprocess = nets.preprocess(crop_padding=2, mixup=1.0)
  printed = nets.fingerprint(order={'seed': nets.SEED})
  nets.write(tmp_path / 'c', preprocess=preprocess, fingerprint=printed)
  cache, live = data.TeacherCache(tmp_path / 'c'), _live(preprocess)
  for size in (4, 10):
    for batch in _batches(batch_size=size):
      got = cache.read(batch['epoch'][0], batch['id'])[OUTPUT]
      want = live(batch).output
      np.testing.assert_allclose(got, want, rtol=2**-11, atol=2e-6)
  with pytest.raises(CacheError, match='order.seed is 3 there and 4 here'):
    cache.check(nets.fingerprint(order={'seed': 4}))


def test_a_job_that_was_killed_goes_on(tmp_path, small_files):
  nets.write(tmp_path / 'whole')
  done = []

  def killed(*numbers):
    done.append(numbers)
    if len(done) == 4:
      raise KeyboardInterrupt

  path = tmp_path / 'cut'
  with pytest.raises(KeyboardInterrupt):
    nets.write(path, progress=killed)
  with pytest.raises(CacheError, match='not finished'):
    data.TeacherCache(path)
  first = sorted(path.rglob('*.safetensors'))
  assert len(first) == 4
  times = [p.stat().st_mtime_ns for p in first]
  nets.write(path)
  assert [p.stat().st_mtime_ns for p in first] == times
  assert _files(path) == _files(tmp_path / 'whole')


def test_epochs_are_added_and_what_is_there_stays(tmp_path, small_files):
  path = tmp_path / 'c'
  nets.write(path, epochs=1)
  before = _files(path)
  with pytest.raises(CacheError, match='has 1 epochs, but this training has 2'):
    data.TeacherCache(path).check_epochs(2)
  with pytest.raises(CacheError, match='no epoch 1'):
    data.TeacherCache(path).read(1, nets.images().id[:1])
  nets.write(path, epochs=2)
  data.TeacherCache(path).check_epochs(2)
  after = _files(path)
  assert all(after[n] == x for n, x in before.items() if n != 'manifest.json')
  nets.write(tmp_path / 'whole', epochs=2)
  assert after == _files(tmp_path / 'whole')
  # Fewer are no reason to write anything.
  nets.write(path, epochs=1)
  assert _files(path) == after


def test_processes_write_the_files_of_one(tmp_path, small_files, monkeypatch):
  """Two threads that wait for each other, as processes do."""
  nets.write(tmp_path / 'one')
  barrier, written = threading.Barrier(2, timeout=60), {}
  own = threading.local()
  monkeypatch.setattr(cache_writer, '_processes', lambda: (own.index, 2))
  monkeypatch.setattr(hosts, 'barrier', barrier.wait)

  def process(index):
    own.index, written[index] = index, []
    nets.write(
      tmp_path / 'two',
      progress=lambda *numbers: written[index].append(numbers),
    )

  threads = [threading.Thread(target=process, args=(i,)) for i in (0, 1)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert _files(tmp_path / 'one') == _files(tmp_path / 'two')
  assert len(written[0]) == len(written[1]) == 6


def _flip(path):
  content = bytearray(path.read_bytes())
  content[-3] ^= 1
  path.write_bytes(content)


DAMAGE = {
  'flipped': (_flip, 'not what was written, by its SHA-256'),
  'cut': (lambda p: p.write_bytes(p.read_bytes()[:-1]), 'not whole'),
  'missing': (lambda p: p.unlink(), 'is missing'),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_damage_is_named_and_repaired(tmp_path, small_files, damage):
  path = tmp_path / 'c'
  nets.write(path)
  before = _files(path)
  hurt, message = DAMAGE[damage]
  hurt(path / 'epoch00001' / 'shard0002.safetensors')

  def read():
    cache = data.TeacherCache(path)
    for batch in cache.attach(_batches(batch_size=21)):
      assert batch[OUTPUT].any()

  with pytest.raises(CacheError, match=f'epoch00001/shard0002.*{message}'):
    read()
  nets.write(path)
  assert _files(path) == before
  read()


def test_a_changed_manifest_is_noticed(tmp_path):
  nets.write(tmp_path)
  manifest = tmp_path / 'manifest.json'
  manifest.write_text(
    manifest.read_text().replace('"epochs": 2', '"epochs": 9')
  )
  with pytest.raises(CacheError, match='manifest.json is not what was written'):
    data.TeacherCache(tmp_path)
  manifest.write_text('{')
  with pytest.raises(CacheError, match='cannot be read'):
    data.TeacherCache(tmp_path)


def _relabelled():
  images = nets.images()
  return data.ImageData(
    images.image, images.label, images.id + 1, images.class_names
  )


def _one_pixel():
  images = nets.images()
  pixels = images.image.copy()
  pixels[7, 0, 0] ^= 1
  return data.ImageData(pixels, images.label, images.id, images.class_names)


OTHERS = {
  'teacher.weights': {'variables': nets.variables(2)},
  'teacher.network.name': {'network': {'name': 'sum'}},
  'data.ids': {'images': _relabelled()},
  'data.images': {'images': _one_pixel()},
  'data.examples': {'images': nets.images(20)},
  'augmentation.flip': {'augmentation': {'flip': False}},
  'augmentation.seed': {'augmentation': {'seed': 4}},
  'order': {'order': {'seed': 3}},
}


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  path = tmp_path_factory.mktemp('cache') / 'c'
  nets.write(path)
  return path


@pytest.mark.parametrize('field', OTHERS)
def test_what_does_not_match_is_refused_by_name(written, field):
  cache = data.TeacherCache(written)
  cache.check(nets.fingerprint())
  with pytest.raises(CacheError, match=rf'{field}.* is .* there and .* here'):
    cache.check(nets.fingerprint(**OTHERS[field]))
  with pytest.raises(CacheError, match=rf'is another cache: .*{field}'):
    nets.write(written, fingerprint=nets.fingerprint(**OTHERS[field]))


def test_labels_do_not_matter(written):
  images = nets.images()
  bare = data.ImageData(images.image, None, images.id, ())
  data.TeacherCache(written).check(nets.fingerprint(images=bare))


def test_only_a_cache_is_overwritten_and_only_if_asked(tmp_path):
  path = tmp_path / 'c'
  nets.write(path)
  with pytest.raises(CacheError, match='form.dtype is "float16" there'):
    nets.write(path, form=data.Form('float32'))
  nets.write(path, form=data.Form('float32'), overwrite=True)
  assert data.TeacherCache(path).form.dtype == 'float32'
  (tmp_path / 'mine.txt').write_text('mine')
  for overwrite in (False, True):
    with pytest.raises(CacheError, match='holds files that are no teacher'):
      nets.write(tmp_path, overwrite=overwrite)
  with pytest.raises(CacheError, match='is no teacher cache'):
    data.TeacherCache(tmp_path)


def test_bytes_are_said_before_and_a_full_disk_is_foreseen(
  tmp_path, monkeypatch
):
  said = []
  made = nets.write(tmp_path / 'c', epochs=3, say=said.append)
  assert made['row_bytes'] == 4 + 2 * nets.CLASSES
  assert '21 examples x 3 epochs x 16 bytes' in said[0]
  free = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: free)
  with pytest.raises(CacheError, match='has room for 0.0 MB'):
    nets.write(tmp_path / 'd', epochs=3)
  assert not list((tmp_path / 'd').rglob('*.safetensors'))


def test_a_disk_that_fills_up_leaves_no_half_file(tmp_path, monkeypatch):
  replace = os.replace

  def full(source, target):
    if str(target).endswith('.safetensors'):
      raise OSError(28, 'No space left on device')
    replace(source, target)

  monkeypatch.setattr(os, 'replace', full)
  with pytest.raises(OSError, match='No space left'):
    nets.write(tmp_path / 'c')
  assert [p.name for p in (tmp_path / 'c').rglob('*') if p.is_file()] == [
    'plan.json'
  ]
  monkeypatch.setattr(os, 'replace', replace)
  nets.write(tmp_path / 'c')


def test_numbers_too_large_for_the_dtype_are_refused(tmp_path):
  large = {'params': {k: 400 * v for k, v in nets.TEACHER['params'].items()}}
  large['params']['last'] *= 400
  with pytest.raises(CacheError, match='not finite as float16.*6.55e'):
    nets.write(tmp_path / 'c', variables=large)
  nets.write(tmp_path / 'd', variables=large, form=data.Form('bfloat16'))


def test_unknown_examples_and_options_are_refused(written):
  cache = data.TeacherCache(written)
  with pytest.raises(CacheError, match='no example 999 in epoch 1'):
    cache.read(1, np.array([nets.images().id[0], 999]))
  with pytest.raises(ValueError, match='did you mean float16'):
    data.Form('float6')
  with pytest.raises(ValueError, match="no feature 'hiden'.*hidden"):
    cache_form.pack(
      nets.network(nets.TEACHER, {'image': jnp.ones((2, 4, 4, 1))}),
      data.Form(features=('hiden',)),
    )
  with pytest.raises(ValueError, match='top_k is 6, but the teacher has 6'):
    cache_form.pack(Forward(jnp.ones((2, 6))), data.Form(top_k=6))
  with pytest.raises(ValueError, match='epochs is 0'):
    nets.write(written, epochs=0)


@functools.partial(jax.jit, static_argnums=2)
def _losses(student, teacher, temperature):
  inputs = objectives.Inputs(
    Forward(student), teacher, {}, jnp.int32(0), jax.random.key(0)
  )
  terms = {
    'one': objectives.top_k_targets(k=1, temperature=4.0),
    'all': objectives.top_k_targets(k=3, temperature=2.0),
    'uniform': objectives.top_k_targets(
      k=3, temperature=temperature, tail='uniform'
    ),
    'hard': objectives.on_outputs(lambda s, t: s[:, 0] * jnp.argmax(t, axis=1)),
  }
  return {n: t.apply({}, {}, inputs)[0] for n, t in terms.items()}


@pytest.mark.parametrize('temperature', [1.0, 4.0])
@pytest.mark.parametrize('shape', [(8, 30), (8, 5, 30)])
def test_the_top_k_are_what_the_loss_of_the_top_k_sees(temperature, shape):
  keys = jax.random.split(jax.random.key(0))
  student, teacher = (3 * jax.random.normal(k, shape) for k in keys)
  form = data.Form('float32', top_k=3, temperature=temperature)
  stored = cache_form.pack(Forward(teacher), form)
  assert cache_form.row_bytes(stored) * 2 < teacher[0].nbytes
  got = cache_form.unpack(stored, classes=30)
  if len(shape) > 2:  # tokens: the losses above take one row an example
    student, teacher = student[:, 2], teacher[:, 2]
    got = Forward(got.output[:, 2])
  want = _losses(student, Forward(teacher), temperature)
  for name, loss in _losses(student, got, temperature).items():
    np.testing.assert_allclose(
      loss, want[name], rtol=1e-5, atol=1e-6, err_msg=name
    )


def test_equal_outputs_outside_of_the_top_k_stay_outside():
  """Where all outputs are equal the tail must not tie with the top."""
  stored = cache_form.pack(Forward(jnp.full((1, 9), 5.0)), data.Form(top_k=2))
  output = cache_form.unpack(stored, classes=9).output
  top = set(np.asarray(jax.lax.top_k(jax.nn.softmax(output), 2)[1]).ravel())
  assert top == set(np.asarray(stored[cache_form.TOP_CLASSES]).ravel())


def test_streamed_images_are_told_apart_by_their_bytes():
  def streamed(name):
    records = [{'image': f'{name}{i}'.encode(), 'label': 0} for i in range(9)]
    ids = np.arange(9, dtype=np.int32)
    return data.StreamedImages(records, ids, ('a',), image_size=8)

  digests = {
    nets.fingerprint(images=streamed(n))['data']['images'] for n in 'aab'
  }
  assert len(digests) == 2
  assert teacher_cache.differences({'a': {'b': 1}}, {'a': {'b': 1}}) == []
