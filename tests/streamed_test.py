"""Streamed images: crops, batches, and data sets as TFDS prepares them."""

import functools
import io
import json
import resource
import subprocess
import sys
from collections import Counter

import fake_tfds
import jax
import numpy as np
import PIL.Image
import pytest

from kd_jax import data
from kd_jax.data import crops


def encode(pixels, encoding='png'):
  encoded = io.BytesIO()
  PIL.Image.fromarray(pixels).save(encoded, format=encoding)
  return encoded.getvalue()


def records_of(n):
  """Records of random images of unequal sizes."""
  rng = np.random.default_rng(0)
  return [
    {
      'image': encode(
        rng.integers(0, 256, (*rng.integers(20, 40, 2), 3), np.uint8)
      ),
      'label': i % 3,
    }
    for i in range(n)
  ]


RECORDS = records_of(60)


def streamed(**fields):
  """Every second of the records."""
  return data.StreamedImages(
    **{
      'records': RECORDS,
      'id': np.arange(1, 60, 2, dtype=np.int32),
      'class_names': ('a', 'b', 'c'),
      'image_size': 16,
      'num_threads': 2,
    }
    | fields
  )


# Crops


def boxes(n, width=500, height=375, seed=0, epoch=0):
  return np.array(
    [
      crops.random_crop_box(width, height, seed=seed, example=i, epoch=epoch)
      for i in range(n)
    ]
  )


def test_random_windows_are_inside_and_of_the_drawn_shapes():
  left, top, right, bottom = boxes(2000).T
  assert left.min() >= 0 and top.min() >= 0
  assert right.max() <= 500 and bottom.max() <= 375
  width, height = right - left, bottom - top
  area, ratio = width * height / (500 * 375), width / height
  # Rounding to pixels moves both by a little.
  assert 0.079 < area.min() < 0.1 and area.max() > 0.9
  assert 0.74 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.345
  # Large windows fit less often, hence below the mean of 0.54.
  assert 0.4 < area.mean() < 0.54


def test_wide_and_tall_windows_are_as_frequent():
  left, top, right, bottom = boxes(4000, 400, 400).T
  # Drawn uniformly, the ratio would have a mean logarithm of 0.028.
  assert abs(np.log((right - left) / (bottom - top)).mean()) < 0.01


def test_random_windows_reach_every_border_and_are_centred_on_average():
  left, top, right, bottom = boxes(4000).T
  assert left.min() == 0 == top.min()
  assert right.max() == 500 and bottom.max() == 375
  assert abs((left + right).mean() / 2 - 250) < 4
  assert abs((top + bottom).mean() / 2 - 187.5) < 4


@pytest.mark.parametrize(
  ('width', 'height', 'box'),
  [
    (1000, 10, (493, 0, 506, 10)),
    (10, 1000, (0, 493, 10, 506)),
    (1, 1, (0, 0, 1, 1)),
  ],
)
def test_narrow_images_get_the_largest_central_window(width, height, box):
  assert {tuple(b) for b in boxes(20, width, height).tolist()} == {box}


def test_windows_are_frozen():
  # A change here changes what a resumed run sees.
  assert boxes(2, seed=5, epoch=2).tolist() == [
    [164, 68, 429, 372],
    [252, 34, 441, 266],
  ]


@pytest.mark.parametrize(
  'change', [{'seed': 1}, {'epoch': 1}, {'seed': 1, 'epoch': 1}]
)
def test_windows_change_with_seed_and_epoch(change):
  assert (boxes(50) != boxes(50, **change)).any(1).all()


def test_windows_of_examples_differ():
  assert len({tuple(b) for b in boxes(200).tolist()}) > 195
  # Neither the seed, the id nor the epoch stands in for another.
  zero = {'seed': 0, 'example': 0, 'epoch': 0}
  found = {crops.random_crop_box(500, 375, **zero | {k: 1}) for k in zero}
  assert len(found) == 3


def test_random_crop_is_the_resized_window():
  pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
  key = {'seed': 3, 'example': 4, 'epoch': 5}
  left, top, right, bottom = crops.random_crop_box(80, 60, **key)
  window = PIL.Image.fromarray(pixels[top:bottom, left:right])
  expected = window.resize((24, 24), PIL.Image.Resampling.BILINEAR)
  got = crops.decode_random_crop(encode(pixels), 24, **key)
  np.testing.assert_array_equal(got, np.asarray(expected))


def test_central_crop_keeps_seven_eighths_of_the_short_side():
  # The value of a pixel is its row or column; the short side stays 256.
  rows = np.arange(256, dtype=np.uint8)[:, None, None]
  tall = np.broadcast_to(rows, (256, 512, 3))
  got = crops.decode_central_crop(encode(tall), 224)
  assert got.shape == (224, 224, 3)
  np.testing.assert_array_equal(got[:, 0, 0], np.arange(16, 240))
  wide = tall.swapaxes(0, 1)
  got = crops.decode_central_crop(encode(wide), 224)
  np.testing.assert_array_equal(got[0, :, 0], np.arange(16, 240))


@pytest.mark.parametrize('shape', [(100, 200), (200, 100), (100, 133)])
def test_central_crop_is_central_on_both_axes(shape):
  # Symmetric images have symmetric crops, up to a pixel of the long side.
  y, x = (np.abs(np.linspace(-1, 1, n)) for n in shape)
  pixels = np.rint(127 * (y[:, None] + x[None, :])).astype(np.uint8)
  got = crops.decode_central_crop(encode(pixels), 56).astype(int)
  assert np.abs(got - got[::-1, ::-1]).max() <= 8
  # Symmetry alone would not notice a stretched image.
  scale = 64 / min(shape)
  step = 127 * 2 / (max(shape) * scale)
  longest = got[28] if shape[1] > shape[0] else got[:, 28]
  assert abs((longest[0, 0] - longest[28, 0]) / 28 - step) < 0.15 * step


def test_shrinking_is_antialiased():
  board = np.indices((256, 256)).sum(0) % 2 * np.uint8(255)
  got = crops.decode_central_crop(encode(board.astype(np.uint8)), 28)
  assert np.abs(got.astype(int) - 128).max() <= 2


@pytest.mark.parametrize('size', [1, 17, 224])
def test_small_images_are_enlarged(size):
  encoded = encode(np.full((3, 2, 3), 9, np.uint8))
  crop = crops.decode_random_crop(encoded, size, seed=0, example=0, epoch=0)
  for got in (crops.decode_central_crop(encoded, size), crop):
    np.testing.assert_array_equal(got, np.full((size, size, 3), 9))


# Reading


def test_streamed_images_have_what_all_images_have():
  images = streamed()
  assert len(images) == 30
  assert images.num_classes == 3 and images.labelled
  assert images.image_shape == (16, 16, 3)
  members = {name for name in dir(data.ImageData) if name[0] != '_'}
  assert members - set(dir(images)) == {'arrays', 'reads'}  # of `InMemory`


def test_rows_are_positions_in_the_split():
  batch = streamed().read([4, 0, 29])
  assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
    'image': ('uint8', (3, 16, 16, 3)),
    'label': ('int32', (3,)),
    'id': ('int32', (3,)),
  }
  assert batch['id'].tolist() == [9, 1, 59]
  assert batch['label'].tolist() == [0, 1, 2]
  for i, image in zip(batch['id'], batch['image'], strict=True):
    expected = crops.decode_central_crop(RECORDS[i]['image'], 16)
    np.testing.assert_array_equal(image, expected)


def test_training_reads_the_window_of_seed_id_and_epoch():
  batch = streamed().read([7, 3], key=(11, 2))
  for i, image in zip(batch['id'], batch['image'], strict=True):
    expected = crops.decode_random_crop(
      RECORDS[i]['image'], 16, seed=11, example=int(i), epoch=2
    )
    np.testing.assert_array_equal(image, expected)


def test_crops_do_not_depend_on_position_or_threads():
  one = streamed(num_threads=1).read(np.arange(30), key=(0, 1))
  part = streamed(id=np.arange(59, 0, -2, dtype=np.int32), num_threads=5)
  other = part.read(np.arange(30)[::-1], key=(0, 1))
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_images_in_memory_are_read_as_they_are():
  images = data.ImageData(
    image=np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2, 1),
    label=np.arange(5, dtype=np.int32),
    id=np.arange(10, 15, dtype=np.int32),
    class_names=tuple('abcde'),
  )
  for key in (None, (0, 0)):
    batch = images.read([3, 1], key=key)
    assert batch['id'].tolist() == [13, 11]
    assert batch['label'].tolist() == [3, 1]
    np.testing.assert_array_equal(batch['image'], images.image[[3, 1]])


def test_damaged_image_is_named():
  records = list(RECORDS)
  records[5] = {'image': RECORDS[5]['image'][:300], 'label': 0}
  images = streamed(records=records)
  images.read([0, 1])
  with pytest.raises(ValueError, match='image of example 5 cannot be decoded'):
    images.read([1, 2])


@pytest.mark.parametrize('label', [-1, 3])
def test_label_out_of_range_is_refused(label):
  records = [{**r, 'label': label} for r in RECORDS]
  with pytest.raises(ValueError, match=f'Example 1 has label {label}, but'):
    streamed(records=records).read([0])


@pytest.mark.parametrize(
  ('fields', 'match'),
  [
    ({'image_size': 0}, 'image_size is 0'),
    ({'num_threads': 0}, 'num_threads is 0'),
    ({'id': np.arange(3)}, r'must be int32 \[any\], not int64 \[3\]'),
  ],
)
def test_streamed_images_check_their_fields(fields, match):
  with pytest.raises(ValueError, match=match):
    streamed(**fields)


# Batches


def test_every_epoch_sees_every_example_in_another_crop():
  batches = list(
    data.train_batches(streamed(), batch_size=10, seed=1, epochs=2)
  )
  joined = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
  assert joined['epoch'].tolist() == [0] * 30 + [1] * 30
  assert set(Counter(joined['id'].tolist()).values()) == {2}
  first, second = (
    {
      int(i): image.tobytes()
      for i, image, e in zip(
        *(joined[k] for k in ('id', 'image', 'epoch')), strict=True
      )
      if e == epoch
    }
    for epoch in (0, 1)
  )
  assert all(first[i] != second[i] for i in first)


def test_order_is_that_of_images_in_memory_and_crops_are_keyed():
  images = streamed()
  memory = data.ImageData(
    image=np.zeros((30, 4, 4, 1), np.uint8),
    label=images.id % 3,
    id=images.id,
    class_names=images.class_names,
  )
  for a, b in zip(
    data.train_batches(images, batch_size=4, seed=5, epochs=2),
    data.train_batches(memory, batch_size=4, seed=5, epochs=2),
    strict=True,
  ):
    for name in ('id', 'label', 'epoch'):
      np.testing.assert_array_equal(a[name], b[name])
    rows = np.searchsorted(images.id, a['id'])
    expected = images.read(rows, key=(5, int(a['epoch'][0])))
    np.testing.assert_array_equal(a['image'], expected['image'])


@pytest.mark.parametrize('steps', [0, 2, 3, 8])
def test_resumed_iterator_continues_identically(steps):
  make = functools.partial(data.train_batches, streamed(), batch_size=8, seed=7)
  batches = make()
  for _ in range(steps):
    next(batches)
  state = json.loads(json.dumps(batches.get_state()))
  expected = [next(batches) for _ in range(4)]
  resumed = make()
  # As after a restart, some batches have been read ahead already.
  next(resumed)
  resumed.set_state(state)
  for want in expected:
    jax.tree.map(np.testing.assert_array_equal, next(resumed), want)


@pytest.mark.parametrize('count', [2, 4])
def test_process_slices_concatenate_to_the_global_batch(count):
  make = functools.partial(
    data.train_batches, streamed(), batch_size=8, seed=3, epochs=1
  )
  parts = [make(part=i, parts=count) for i in range(count)]
  for whole in make():
    local = [next(p) for p in parts]
    joined = {k: np.concatenate([b[k] for b in local]) for k in whole}
    jax.tree.map(np.testing.assert_array_equal, joined, whole)


def test_a_run_may_resume_on_another_number_of_processes():
  make = functools.partial(data.train_batches, streamed(), batch_size=8, seed=3)
  whole, halves = (
    make(),
    [make(part=i, parts=2) for i in (0, 1)],
  )
  for _ in range(5):
    next(whole)
  for half in halves:
    half.set_state(whole.get_state())
  local = [next(half) for half in halves]
  joined = {k: np.concatenate([b[k] for b in local]) for k in local[0]}
  jax.tree.map(np.testing.assert_array_equal, joined, next(whole))


@pytest.mark.parametrize('batch_size', [7, 30, 40])
def test_eval_batches_hold_every_example_once(batch_size):
  images = streamed()
  batches = list(data.eval_batches(images, batch_size=batch_size))
  assert {b['image'].shape for b in batches} == {(batch_size, 16, 16, 3)}
  joined = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
  real = joined['mask'] == 1
  expected = images.read(np.arange(30))
  for name in ('image', 'label', 'id'):
    np.testing.assert_array_equal(joined[name][real], expected[name])
  assert (joined['id'][~real] == -1).all()
  assert not joined['image'][~real].any()


def test_unlabelled_batches_have_no_label():
  images = streamed(
    class_names=(), records=[{'image': r['image']} for r in RECORDS]
  )
  assert not images.labelled and images.num_classes == 0
  assert set(images.read([0])) == {'image', 'id'}
  train = next(data.train_batches(images, batch_size=4, seed=0))
  assert set(train) == {'image', 'id', 'epoch'}
  test = next(data.eval_batches(images, batch_size=4))
  assert set(test) == {'image', 'id', 'epoch', 'mask'}


def test_an_error_in_reading_reaches_the_caller():
  records = [{'image': b'no image', 'label': 0}] * 60
  batches = data.train_batches(streamed(records=records), batch_size=4, seed=0)
  with pytest.raises(ValueError, match='cannot be decoded'):
    next(batches)


def test_statistics_of_streamed_images_are_refused():
  with pytest.raises(ValueError, match='as published'):
    _ = streamed().statistics


# Data sets as TFDS prepares them


@pytest.fixture(scope='module')
def tfds_dir(tmp_path_factory):
  directory = tmp_path_factory.mktemp('fake')
  fake_tfds.prepare('cifar100', directory, examples=40)
  fake_tfds.prepare('imagenet2012', directory, examples=24, secret_test=True)
  return directory


def test_cifar100_loads_into_memory(tfds_dir):
  splits = {
    s: data.load_images('cifar100', s, data_dir=tfds_dir, validation=0.25)
    for s in ('train', 'validation', 'test')
  }
  assert [len(s) for s in splits.values()] == [30, 10, 40]
  assert splits['train'].num_classes == 100
  assert splits['train'].class_names[:2] == ('label 0', 'label 1')
  assert splits['test'].image_shape == (32, 32, 3)


def test_imagenet_is_streamed(tfds_dir):
  splits = {
    s: data.load_images(
      'imagenet2012', s, data_dir=tfds_dir, validation=0.25, image_size=32
    )
    for s in ('train', 'validation', 'test')
  }
  assert [len(s) for s in splits.values()] == [18, 6, 24]
  ids = np.concatenate([splits['train'].id, splits['validation'].id])
  np.testing.assert_array_equal(np.sort(ids), np.arange(24))
  assert splits['train'].num_classes == 1000
  batch = next(data.train_batches(splits['train'], batch_size=18, seed=0))
  assert batch['image'].shape == (18, 32, 32, 3)
  assert set(batch['label']) <= {37 * i % 1000 for i in range(24)}
  # Those without colour are spread over the channels.
  grey = (np.ptp(batch['image'], axis=-1) == 0).all((1, 2))
  assert 0 < grey.sum() < 4


def test_validation_serves_as_test_where_test_labels_are_secret(tfds_dir):
  load = functools.partial(
    data.load_images, 'imagenet2012', 'test', data_dir=tfds_dir, image_size=32
  )
  labels = load().read(np.arange(24))['label']
  assert sorted(labels) == sorted(37 * i % 1000 for i in range(24))
  # Without labels the test split is as good as any.
  pixels = load(labelled=False).read([0])['image']
  assert not np.array_equal(pixels, load().read([0])['image'])


def test_streamed_split_is_the_one_in_memory(tfds_dir):
  kw = {'data_dir': tfds_dir, 'max_examples': 12}
  memory = data.load_images('cifar100', 'train', **kw)
  stream = data.load_images('cifar100', 'train', image_size=28, **kw)
  np.testing.assert_array_equal(stream.id, memory.id)
  batch = stream.read(np.arange(12))
  np.testing.assert_array_equal(batch['label'], memory.label)
  # 28 of 32 pixels: the short side stays as it is.
  np.testing.assert_array_equal(batch['image'], memory.image[:, 2:30, 2:30])


def test_labels_can_be_left_out(tfds_dir):
  for image_size in (None, 32):
    images = data.load_images(
      'cifar100',
      'train',
      data_dir=tfds_dir,
      image_size=image_size,
      labelled=False,
    )
    assert images.class_names == () and not images.labelled
    assert set(images.read([0, 1])) == {'image', 'id'}


def test_images_of_unequal_sizes_do_not_fit_in_memory(tfds_dir):
  with pytest.raises(ValueError, match='differ in shape.*give image_size'):
    data.load_images('imagenet2012', 'train', data_dir=tfds_dir)


def test_image_size_must_be_positive(tfds_dir):
  with pytest.raises(ValueError, match='image_size is 0'):
    data.load_images('cifar100', 'train', data_dir=tfds_dir, image_size=0)


def test_more_files_may_be_opened(tfds_dir):
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
  try:
    data.load_images('cifar100', 'train', data_dir=tfds_dir, image_size=32)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (513, hard)
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_program_that_stops_in_between_ends_quietly(tfds_dir):
  code = (
    'import sys\n'
    'from kd_jax import data\n'
    'images = data.load_images(\n'
    "  'imagenet2012', 'train', data_dir=sys.argv[1], image_size=64\n"
    ')\n'
    'batches = data.train_batches(images, batch_size=8, seed=0)\n'
    'next(batches)\n'
  )
  out = subprocess.run(
    [sys.executable, '-c', code, str(tfds_dir)],
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert (out.returncode, out.stdout, out.stderr) == (0, '', '')
