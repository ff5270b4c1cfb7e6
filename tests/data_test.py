"""Splits, resumable batches and keyed augmentation."""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax import data

MEAN, STD = (0.3,), (0.4,)


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  return tmp_path_factory.mktemp('tfds')


@pytest.fixture(scope='module')
def digits(data_dir):
  return {
    split: data.load_images('digits', split, data_dir=data_dir)
    for split in ('train', 'validation', 'test')
  }


def tiny(n=23, size=6, channels=1):
  """Random images whose ids are not their positions."""
  rng = np.random.default_rng(0)
  return data.ImageData(
    image=rng.integers(0, 256, (n, size, size, channels), np.uint8),
    label=(np.arange(n) % 3).astype(np.int32),
    id=np.arange(100, 100 + n, dtype=np.int32),
    class_names=('a', 'b', 'c'),
  )


def batch_of(images, ids=None, epoch=0):
  n = len(images)
  return {
    'image': images,
    'id': np.arange(n, dtype=np.int32) if ids is None else ids,
    'epoch': np.full(n, epoch, np.int32),
  }


def set_of(images):
  """The images in an order of their own."""
  return sorted(image.tobytes() for image in images)


def augmented(batch, *, seed=0, **augmentation):
  """The crops as pixels again."""
  channels = batch['image'].shape[-1]
  preprocess = data.make_preprocess(
    mean=(0.0,) * channels, std=(1.0,) * channels, seed=seed, **augmentation
  )
  image = jax.jit(lambda b: preprocess(b, train=True)['image'])(batch)
  return np.rint(np.asarray(image) * 255).astype(np.uint8)


# Sources


def test_splits_partition_the_digits(digits):
  train, validation = digits['train'], digits['validation']
  assert len(digits['test']) == 359
  assert len(validation) == round(0.1 * 1438)
  ids = np.concatenate([train.id, validation.id])
  np.testing.assert_array_equal(np.sort(ids), np.arange(1438))
  assert train.num_classes == 10
  assert train.image_shape == (8, 8, 1)


def test_digits_are_those_of_scikit_learn(digits):
  sklearn = pytest.importorskip('sklearn.datasets')
  source = sklearn.load_digits()
  pixels = np.round(source.images * 255 / 16).astype(np.uint8).reshape(-1, 64)
  ours = np.concatenate([d.image.reshape(-1, 64) for d in digits.values()])
  labels = np.concatenate([d.label for d in digits.values()])
  got, want = np.c_[ours, labels], np.c_[pixels, source.target]
  assert sorted(got.tolist()) == sorted(want.tolist())


def test_test_split_is_stratified(digits):
  total = sum(np.bincount(d.label, minlength=10) for d in digits.values())
  test = np.bincount(digits['test'].label, minlength=10)
  assert np.abs(test - total / 5).max() < 1


def test_loading_again_gives_the_same_arrays(digits, data_dir):
  again = data.load_images('digits', 'validation', data_dir=data_dir)
  np.testing.assert_array_equal(again.image, digits['validation'].image)
  np.testing.assert_array_equal(again.id, digits['validation'].id)


def test_validation_split_is_frozen(digits):
  # A change here silently moves training images into everyone's validation
  # set. It is right only with a major version.
  assert digits['validation'].id[:5].tolist() == [4, 5, 31, 34, 45]


def test_ids_point_into_the_tfds_split(digits, data_dir):
  everything = data.load_images(
    'digits', 'train', data_dir=data_dir, validation=0.0
  )
  np.testing.assert_array_equal(everything.id, np.arange(1438))
  for split in ('train', 'validation'):
    np.testing.assert_array_equal(
      everything.image[digits[split].id], digits[split].image
    )


def test_max_examples_takes_a_part_of_the_split(digits, data_dir):
  part = data.load_images('digits', 'train', data_dir=data_dir, max_examples=50)
  assert len(part) == 50
  assert set(part.id) < set(digits['train'].id)
  assert len(set(part.label)) == 10


def test_preparing_tolerates_another_process(monkeypatch, tmp_path):
  digits_module = pytest.importorskip('kd_jax.data.digits')
  generate = digits_module.Digits._generate_examples
  raced = []

  def racing(self, images, labels, positions):
    if not raced:
      raced.append(True)
      data.load_images('digits', 'test', data_dir=tmp_path)
    return generate(self, images, labels, positions[:30])

  monkeypatch.setattr(digits_module.Digits, '_generate_examples', racing)
  loser = data.load_images('digits', 'test', data_dir=tmp_path)
  assert raced and len(loser) == 30
  assert [p.name for p in (tmp_path / 'digits').iterdir()] == ['1.0.0']


def run_python(code, *arguments):
  """What a fresh interpreter prints to stdout and stderr."""
  out = subprocess.run(
    [sys.executable, '-c', code, *map(str, arguments)],
    capture_output=True,
    text=True,
    check=True,
  )
  return out.stdout, out.stderr


def test_preparing_and_reading_are_silent(tmp_path):
  # TFDS warns once in a process, hence a fresh one.
  code = (
    'import sys\n'
    'from kd_jax import data\n'
    "data.load_images('digits', 'test', data_dir=sys.argv[1])\n"
  )
  assert run_python(code, tmp_path) == ('', '')


@pytest.fixture(scope='module')
def tfds_builder(tmp_path_factory):
  """Makes a TFDS data set of the given images; returns its data_dir."""
  import tensorflow_datasets as tfds
  from etils import epath

  from kd_jax.data.digits import Digits

  def make(
    name, images, splits=('train', 'test'), label='label', image='image'
  ):
    directory = tmp_path_factory.mktemp(name)

    def info(self):
      features = {
        image: tfds.features.Image(
          shape=(None, None, 1), encoding_format='png'
        ),
        label: tfds.features.ClassLabel(num_classes=3),
      }
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def generate(self, positions):
      rows = Digits._generate_examples(self, images, [0, 1, 2] * 9, positions)
      for key, row in rows:
        yield key, {image: row['image'], label: row['label']}

    builder = type(
      name,
      (tfds.core.GeneratorBasedBuilder,),
      {
        'VERSION': tfds.core.Version('1.0.0'),
        'pkg_dir_path': epath.Path(directory),
        '_info': info,
        '_split_generators': lambda self, _: {
          s: self._generate_examples(range(len(images))) for s in splits
        },
        '_generate_examples': generate,
      },
    )
    builder(data_dir=directory).download_and_prepare(file_format='array_record')
    return directory

  return make


def test_any_image_classification_set_loads(tfds_builder):
  images = list(tiny(20).image)
  directory = tfds_builder('FakeEven', images)
  test = data.load_images('fake_even', 'test', data_dir=directory)
  assert len(test) == 20
  assert test.class_names == ('0', '1', '2')
  assert set_of(test.image) == set_of(images)


def test_validation_serves_as_test_where_there_is_none(tfds_builder):
  directory = tfds_builder(
    'FakeTestless', list(tiny(20).image), splits=('train', 'validation')
  )
  test = data.load_images('fake_testless', 'test', data_dir=directory)
  assert len(test) == 20


def test_images_of_unequal_shapes_are_refused(tfds_builder):
  images = [np.zeros((6, 6 + i % 2, 1), np.uint8) for i in range(9)]
  directory = tfds_builder('FakeUneven', images)
  with pytest.raises(ValueError, match="'fake_uneven' differ in shape"):
    data.load_images('fake_uneven', 'test', data_dir=directory)


def test_set_without_labels_is_refused(tfds_builder):
  directory = tfds_builder('FakeTarget', list(tiny(5).image), label='target')
  with pytest.raises(ValueError, match="no feature 'label' of type ClassLabel"):
    data.load_images('fake_target', 'test', data_dir=directory)


def test_set_without_labels_is_read_if_none_are_wanted(tfds_builder):
  source = tiny(20)
  directory = tfds_builder('FakeNameless', list(source.image), label='target')
  load = functools.partial(
    data.load_images,
    'fake_nameless',
    'train',
    data_dir=directory,
    labelled=False,
  )
  images = load(validation=0.0)
  assert images.label is None and not images.labelled
  assert images.class_names == () and images.num_classes == 0
  assert set_of(images.image) == set_of(source.image)
  streamed = load(image_size=4, validation=0.5)
  assert len(streamed) == 10 and not streamed.labelled


def test_set_without_images_is_refused(tfds_builder):
  directory = tfds_builder('FakeSound', list(tiny(5).image), image='sound')
  with pytest.raises(ValueError, match="no image data set: .* feature 'image'"):
    data.load_images('fake_sound', 'test', data_dir=directory, labelled=False)


def test_set_without_test_split_is_refused(tfds_builder):
  directory = tfds_builder('FakeTrain', list(tiny(5).image), splits=('train',))
  with pytest.raises(ValueError, match="no split for 'test'; it has train"):
    data.load_images('fake_train', 'test', data_dir=directory)


def test_unknown_name_lists_near_misses(tmp_path):
  with pytest.raises(ValueError, match='did you mean fashion_mnist'):
    data.load_images('fashion_mnst', 'test', data_dir=tmp_path)
  with pytest.raises(ValueError, match='did you mean digits'):
    data.load_images('digit', 'test', data_dir=tmp_path)


def test_unprepared_set_says_what_to_do(tmp_path, monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(FileNotFoundError) as error:
    data.load_images('fashion_mnist', 'test', data_dir=tmp_path / 'wrong')
  for part in ("'fashion_mnist'", 'wrong', 'data_dir', 'kd_jax[tfds]'):
    assert part in str(error.value)


@pytest.mark.parametrize(
  ('arguments', 'match'),
  [
    ({'split': 'valid'}, 'did you mean validation'),
    ({'split': 'train', 'validation': 1.0}, r'must be in \[0, 1\)'),
    ({'split': 'train', 'max_examples': 0}, 'must be positive'),
    ({'split': 'validation', 'validation': 0.0}, 'leaves none'),
  ],
)
def test_load_images_checks_its_arguments(digits, data_dir, arguments, match):
  with pytest.raises(ValueError, match=match):
    data.load_images('digits', data_dir=data_dir, **arguments)


@pytest.mark.parametrize(
  ('field', 'array'),
  [
    ('image', np.zeros((2, 4, 4, 1), np.float32)),
    ('image', np.zeros((2, 4, 4), np.uint8)),
    ('image', np.zeros((3, 4, 4, 1), np.uint8)),
    ('label', np.zeros(2, np.int64)),
    ('id', np.zeros(3, np.int32)),
  ],
)
def test_image_data_refuses_other_arrays(field, array):
  arrays = {
    'image': np.zeros((2, 4, 4, 1), np.uint8),
    'label': np.zeros(2, np.int32),
    'id': np.zeros(2, np.int32),
  }
  data.ImageData(**arrays, class_names=('a',))
  with pytest.raises(ValueError, match=f'ImageData.{field} must be'):
    data.ImageData(**(arrays | {field: array}), class_names=('a',))


def test_import_is_light():
  code = (
    'import sys, kd_jax.data\n'
    "heavy = {'tensorflow_datasets', 'tensorflow', 'sklearn', 'PIL'}\n"
    'print(sorted(heavy & set(sys.modules)))\n'
  )
  assert run_python(code)[0].strip() == '[]'


@pytest.mark.parametrize('field', ['image', 'id'])
def test_image_data_without_labels_checks_its_arrays(field):
  arrays = {
    'image': np.zeros((2, 4, 4, 1), np.uint8),
    'id': np.zeros(2, np.int32),
  }
  images = data.ImageData(**arrays, label=None, class_names=())
  assert len(images) == 2 and not images.labelled
  arrays[field] = arrays[field][:, None]
  with pytest.raises(ValueError, match=f'ImageData.{field} must be'):
    data.ImageData(**arrays, label=None, class_names=())


# Batches


def test_every_epoch_is_a_new_permutation():
  images = tiny(24)
  batches = list(data.train_batches(images, batch_size=4, seed=1, epochs=3))
  assert len(batches) == 3 * data.batches_per_epoch(images, 4) == 18
  ids = np.stack([b['id'] for b in batches]).reshape(3, 24)
  epochs = np.stack([b['epoch'] for b in batches]).reshape(3, 24)
  for epoch in range(3):
    np.testing.assert_array_equal(np.sort(ids[epoch]), images.id)
    np.testing.assert_array_equal(epochs[epoch], epoch)
  assert len({tuple(row) for row in (*ids, images.id)}) == 4


def test_remainder_is_dropped_and_differs_by_epoch():
  images = tiny(23)
  batches = list(data.train_batches(images, batch_size=5, seed=0, epochs=2))
  assert [len(b['id']) for b in batches] == [5] * 8
  seen = [
    set(np.concatenate([b['id'] for b in e]))
    for e in (batches[:4], batches[4:])
  ]
  assert [len(s) for s in seen] == [20, 20]
  assert seen[0] != seen[1]


def test_rows_of_a_batch_belong_together():
  images = tiny(23)
  batch = next(data.train_batches(images, batch_size=8, seed=0))
  rows = batch['id'] - 100
  np.testing.assert_array_equal(batch['image'], images.image[rows])
  np.testing.assert_array_equal(batch['label'], images.label[rows])
  assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
    'image': ('uint8', (8, 6, 6, 1)),
    'label': ('int32', (8,)),
    'id': ('int32', (8,)),
    'epoch': ('int32', (8,)),
  }


def test_order_depends_on_the_seed_alone():
  def order(seed):
    batches = data.train_batches(tiny(), batch_size=4, seed=seed, epochs=2)
    return [b['id'].tolist() for b in batches]

  assert order(0) == order(0)
  assert order(0) != order(1)
  # Neighbouring seeds share no epoch, as seed + epoch would make them.
  assert order(0)[5:] != order(1)[:5]


@pytest.mark.parametrize('steps', [0, 3, 5, 13])
def test_resumed_iterator_continues_identically(steps):
  make = functools.partial(data.train_batches, tiny(), batch_size=4, seed=7)
  batches = make()
  for _ in range(steps):
    next(batches)
  state = json.loads(json.dumps(batches.get_state()))
  expected = [next(batches) for _ in range(12)]
  resumed = make()
  resumed.set_state(state)
  for want in expected:
    got = next(resumed)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize('count', [2, 4])
def test_process_slices_concatenate_to_the_global_batch(count):
  make = functools.partial(
    data.train_batches, tiny(), batch_size=8, seed=3, epochs=2
  )
  parts = [make(part=i, parts=count) for i in range(count)]
  for whole in make():
    local = [next(p) for p in parts]
    joined = {k: np.concatenate([b[k] for b in local]) for k in whole}
    jax.tree.map(np.testing.assert_array_equal, joined, whole)
  assert [next(p, None) for p in parts] == [None] * count


def test_endless_by_default():
  batches = data.train_batches(tiny(4), batch_size=4, seed=0)
  assert [next(batches)['epoch'][0] for _ in range(50)] == list(range(50))


@pytest.mark.parametrize(
  ('arguments', 'match'),
  [
    ({'batch_size': 24}, 'between 1 and the 23 examples'),
    ({'batch_size': 0}, 'between 1 and the 23 examples'),
    ({'batch_size': 4, 'parts': 3}, 'not divisible by the 3'),
    ({'batch_size': 4, 'part': 2, 'parts': 2}, 'there are 2'),
    ({'batch_size': 4, 'seed': -1}, 'seed is -1'),
    ({'batch_size': 4, 'epochs': 0}, 'epochs is 0'),
  ],
)
def test_train_batches_checks_its_arguments(arguments, match):
  with pytest.raises(ValueError, match=match):
    data.train_batches(tiny(), **({'seed': 0} | arguments))


@pytest.mark.parametrize('batch_size', [1, 5, 23, 40])
def test_eval_batches_hold_every_example_once(batch_size):
  images = tiny(23)
  batches = list(data.eval_batches(images, batch_size=batch_size))
  assert {b['image'].shape for b in batches} == {(batch_size, 6, 6, 1)}
  assert {b['mask'].dtype.name for b in batches} == {'float32'}
  assert sum(b['mask'].sum() for b in batches) == 23
  joined = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
  real = joined['mask'] == 1
  for name in ('image', 'label', 'id'):
    assert joined[name].dtype == getattr(images, name).dtype
    np.testing.assert_array_equal(joined[name][real], getattr(images, name))
  assert (joined['id'][~real] == -1).all()
  assert not joined['image'][~real].any()


def test_unlabelled_batches_have_no_label():
  images = dataclasses.replace(tiny(), label=None, class_names=())
  train = next(data.train_batches(images, batch_size=4, seed=0))
  assert set(train) == {'image', 'id', 'epoch'}
  for batch in data.eval_batches(images, batch_size=8):
    assert set(batch) == {'image', 'id', 'epoch', 'mask'}


def test_eval_batches_check_the_batch_size():
  with pytest.raises(ValueError, match='must be positive'):
    data.eval_batches(tiny(), batch_size=0)


# Augmentation


def test_normalisation_matches_numpy():
  images = tiny(5, channels=3).image
  mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
  preprocess = data.make_preprocess(mean=mean, std=std, crop_padding=2)
  out = preprocess({'image': images, 'label': np.arange(5)}, train=False)
  expected = (images / 255 - np.array(mean)) / np.array(std)
  assert out['image'].dtype == jnp.float32
  np.testing.assert_allclose(out['image'], expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(out['label'], np.arange(5))


def test_statistics_normalise_to_zero_mean_and_unit_deviation():
  images = tiny(2000, channels=2)
  mean, std = images.statistics
  assert all(isinstance(x, float) for x in (*mean, *std))
  pixels = images.image / 255
  np.testing.assert_allclose(mean, pixels.mean((0, 1, 2)), rtol=1e-12)
  np.testing.assert_allclose(std, pixels.std((0, 1, 2)), rtol=1e-9)


def test_crop_is_keyed_by_id_and_not_by_position():
  images = tiny(16).image
  batch = batch_of(images)
  order = np.random.default_rng(1).permutation(16)
  moved = {k: v[order] for k, v in batch.items()}
  kw = {'crop_padding': 2, 'flip': True}
  whole = augmented(batch, **kw)
  np.testing.assert_array_equal(augmented(moved, **kw), whole[order])
  alone = {k: v[3:4] for k, v in batch.items()}
  np.testing.assert_array_equal(augmented(alone, **kw), whole[3:4])


def test_crops_do_not_depend_on_the_default_generator():
  batch = batch_of(tiny(8).image)
  expected = augmented(batch, crop_padding=2)
  with jax.default_prng_impl('rbg'):
    got = augmented(batch, crop_padding=2)
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize('change', ['id', 'epoch', 'seed'])
def test_crop_differs_with_id_epoch_and_seed(change):
  images = np.repeat(tiny(1).image, 32, axis=0)
  same = batch_of(images, ids=np.full(32, 5, np.int32))
  crops = augmented(same, crop_padding=2)
  assert len({c.tobytes() for c in crops}) == 1
  if change == 'seed':
    one = {name: value[:1] for name, value in same.items()}
    others = [augmented(one, crop_padding=2, seed=s) for s in range(3)]
  else:
    varied = same | {change: np.arange(32, dtype=np.int32)}
    others = augmented(varied, crop_padding=2)
  assert len({c.tobytes() for c in others}) > 2


def test_crops_are_windows_of_the_padded_image_and_all_occur():
  image = tiny(1).image[0]
  padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
  windows = {
    padded[i : i + 6, j : j + 6].tobytes() for i in range(3) for j in range(3)
  }
  crops = augmented(batch_of(np.stack([image] * 200)), crop_padding=1)
  assert {c.tobytes() for c in crops} == windows


def test_half_of_the_images_are_flipped():
  image = tiny(1).image[0]
  out = augmented(batch_of(np.stack([image] * 400)), flip=True)
  flipped = (out == image[:, ::-1]).all((1, 2, 3))
  assert (flipped | (out == image).all((1, 2, 3))).all()
  assert 150 < flipped.sum() < 250


def test_crop_and_flip_are_independent():
  image = tiny(1).image[0]
  kw = batch_of(np.stack([image] * 300))
  out = {c.tobytes() for c in augmented(kw, crop_padding=1, flip=True)}
  assert len(out) == 2 * 9


def test_evaluation_does_not_augment():
  batch = batch_of(tiny(8).image)
  plain = data.make_preprocess(mean=MEAN, std=STD)
  wild = data.make_preprocess(mean=MEAN, std=STD, crop_padding=2, flip=True)
  np.testing.assert_array_equal(
    wild(batch, train=False)['image'], plain(batch, train=True)['image']
  )
  assert not np.array_equal(
    wild(batch, train=True)['image'], plain(batch, train=True)['image']
  )


@pytest.mark.parametrize('how', ['jit', 'vmap', 'shard_map', 'pmap'])
def test_any_compiler_sees_the_same_crops(how):
  batch = batch_of(tiny(16).image, epoch=2)
  preprocess = data.make_preprocess(
    mean=MEAN, std=STD, crop_padding=2, flip=True
  )
  fn = functools.partial(preprocess, train=True)
  plain = data.make_preprocess(mean=MEAN, std=STD)
  crops = augmented(batch, crop_padding=2, flip=True)
  expected = plain({'image': crops}, train=False)['image']
  stacked = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)
  mesh = jax.make_mesh((8,), ('batch',), axis_types=(AxisType.Auto,))
  got = {
    'jit': lambda: jax.jit(fn)(batch),
    'vmap': lambda: jax.jit(jax.vmap(fn))(stacked),
    'pmap': lambda: jax.pmap(fn)(stacked),
    'shard_map': lambda: jax.jit(
      jax.shard_map(fn, mesh=mesh, in_specs=P('batch'), out_specs=P('batch'))
    )(batch),
  }[how]()['image']
  # XLA may turn the divisions into products, hence not bit for bit.
  np.testing.assert_allclose(
    np.reshape(got, expected.shape), expected, rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize(
  ('arguments', 'match'),
  [
    ({'mean': (0.5,), 'std': (1.0, 1.0)}, 'mean has 1 channels but std has 2'),
    ({'mean': (0.5,), 'std': (0.0,)}, 'must be positive'),
    ({'mean': (0.5,), 'std': (1.0,), 'crop_padding': -1}, 'not be negative'),
    ({'mean': (0.5,), 'std': (1.0,), 'mixup': -0.1}, 'mixup is -0.1'),
  ],
)
def test_make_preprocess_checks_its_arguments(arguments, match):
  with pytest.raises(ValueError, match=match):
    data.make_preprocess(**arguments)


@pytest.mark.parametrize(
  'image',
  [
    np.zeros((2, 4, 4, 1), np.float32),
    np.zeros((4, 4, 1), np.uint8),
    np.zeros((2, 4, 4, 3), np.uint8),
  ],
)
def test_preprocess_checks_the_image(image):
  preprocess = data.make_preprocess(mean=MEAN, std=STD)
  with pytest.raises(ValueError, match=r'must be uint8 \[B, H, W, 1\]'):
    preprocess({'image': image}, train=False)


def test_augmentation_without_keys_is_refused():
  preprocess = data.make_preprocess(mean=MEAN, std=STD, flip=True)
  with pytest.raises(ValueError, match="no 'id' and no 'epoch'"):
    preprocess({'image': tiny(2).image}, train=True)


# Mixup


def mixed_batch(n=16, *, epoch=0, seed=0, ids=None, **augmentation):
  """A labelled batch, and what mixup makes of it, as pixels in 0..1."""
  images = tiny(n, channels=3)
  ids = images.id if ids is None else ids
  batch = batch_of(images.image, ids, epoch) | {'label': images.label}
  preprocess = data.make_preprocess(
    mean=(0.0,) * 3,
    std=(1.0,) * 3,
    seed=seed,
    **({'mixup': 1.0} | augmentation),
  )
  return batch, jax.jit(lambda b: preprocess(b, train=True))(batch)


def test_mixup_matches_numpy():
  batch, out = mixed_batch(crop_padding=1, flip=True)
  crops = augmented(batch, crop_padding=1, flip=True) / 255
  swapped = np.arange(16) ^ 1
  w = np.asarray(out['mix_weight'])
  assert w.shape == (16,) and w.dtype == np.float32
  np.testing.assert_array_equal(w, w[swapped])
  share = w[:, None, None, None]
  expected = share * crops + (1 - share) * crops[swapped]
  np.testing.assert_allclose(out['image'], expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(out['mix_label'], batch['label'][swapped])
  assert out['mix_label'].dtype == np.int32
  np.testing.assert_array_equal(out['label'], batch['label'])


@pytest.mark.parametrize(('alpha', 'deviation'), [(0.2, 0.4226), (1.0, 0.2887)])
def test_shares_are_beta_distributed(alpha, deviation):
  ids = np.arange(4000, dtype=np.int32)
  _, out = mixed_batch(4000, ids=ids, mixup=alpha)
  shares = np.asarray(out['mix_weight'])[::2]
  assert shares.min() >= 0 and shares.max() <= 1
  assert abs(shares.mean() - 0.5) < 0.025
  assert abs(shares.std() - deviation) < 0.01
  if alpha == 1.0:
    histogram = np.histogram(shares, 10, (0, 1))[0]
    assert histogram.min() > 150 and histogram.max() < 250


@pytest.mark.parametrize('change', ['first', 'second', 'epoch', 'seed'])
def test_share_is_keyed_by_both_ids_epoch_and_seed(change):
  ids = np.tile(np.array([5, 9], np.int32), 8)

  def weights(**changed):
    return np.asarray(mixed_batch(**{'ids': ids} | changed)[1]['mix_weight'])

  same = weights()
  assert len(set(same)) == 1
  other = ids.copy()
  if change in ('first', 'second'):
    other[change == 'second' :: 2] = np.arange(100, 108)
    assert len(set(weights(ids=other)) | set(same)) == 9
  else:
    assert set(weights(**{change: 1})) != set(same)


def test_share_is_no_draw_of_the_crop():
  # Ids and epochs must not stand in for each other.
  draws = [
    float(
      mixed_batch(2, ids=np.array(ids, np.int32), epoch=e)[1]['mix_weight'][0]
    )
    for *ids, e in ((1, 2, 3), (1, 3, 2), (2, 1, 3), (2, 3, 1), (3, 1, 2))
  ]
  assert len(set(draws)) == len(draws)


def test_mixup_does_not_change_the_crops_and_is_for_training_only():
  batch, out = mixed_batch(crop_padding=2, flip=True)
  again = data.make_preprocess(
    mean=(0.0,) * 3, std=(1.0,) * 3, crop_padding=2, flip=True, mixup=1.0
  )
  plain = again(batch, train=False)
  assert set(plain) == set(batch)
  np.testing.assert_allclose(plain['image'], batch['image'] / 255, rtol=1e-6)
  # The sum of a pair has no share in it.
  crops = augmented(batch, crop_padding=2, flip=True) / 255
  got, want = (
    np.asarray(x)[::2] + np.asarray(x)[1::2] for x in (out['image'], crops)
  )
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
  ('how', 'alpha'),
  [
    ('sharded', 1.0),
    ('vmap', 1.0),
    ('pmap', 1.0),
    ('shard_map', 1.0),
    ('shard_map', 0.4),
  ],
)
def test_any_sharding_mixes_the_same(how, alpha):
  keywords = {'crop_padding': 1, 'flip': True, 'mixup': alpha}
  batch, expected = mixed_batch(epoch=3, **keywords)
  preprocess = data.make_preprocess(mean=(0.0,) * 3, std=(1.0,) * 3, **keywords)
  fn = functools.partial(preprocess, train=True)
  stacked = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)
  mesh = jax.make_mesh((8,), ('batch',), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, P('batch'))
  got = {
    'sharded': lambda: jax.jit(fn)(jax.device_put(batch, sharding)),
    'vmap': lambda: jax.jit(jax.vmap(fn))(stacked),
    'pmap': lambda: jax.pmap(fn)(stacked),
    'shard_map': lambda: jax.jit(
      jax.shard_map(fn, mesh=mesh, in_specs=P('batch'), out_specs=P('batch'))
    )(batch),
  }[how]()
  assert set(got) == set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(
      np.reshape(got[name], value.shape), value, rtol=1e-5, atol=1e-6
    )


def test_mixup_without_labels():
  batch, _ = mixed_batch()
  del batch['label']
  preprocess = data.make_preprocess(mean=(0.0,) * 3, std=(1.0,) * 3, mixup=1.0)
  out = preprocess(batch, train=True)
  assert set(out) == {'image', 'id', 'epoch', 'mix_weight'}


def test_mixup_of_an_odd_batch_is_refused():
  preprocess = data.make_preprocess(mean=MEAN, std=STD, mixup=1.0)
  with pytest.raises(ValueError, match='mixes pairs .* has 5'):
    preprocess(batch_of(tiny(5).image), train=True)
  # Two images on a device each are fine, one is not.
  batch = batch_of(tiny(8).image)
  stacked = jax.tree.map(lambda x: x.reshape(8, 1, *x.shape[1:]), batch)
  with pytest.raises(ValueError, match='this device has 1'):
    jax.pmap(lambda b: preprocess(b, train=True))(stacked)


def test_mixup_without_keys_is_refused():
  preprocess = data.make_preprocess(mean=MEAN, std=STD, mixup=1.0)
  with pytest.raises(ValueError, match="no 'id' and no 'epoch'"):
    preprocess({'image': tiny(2).image}, train=True)


# Another network's images


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_renormalized_images_are_as_if_normalised_directly(dtype):
  images = tiny(3, channels=3).image
  ours = {'mean': (0.1, 0.2, 0.3), 'std': (0.4, 0.5, 0.6)}
  theirs = {'mean': (0.5, 0.4, 0.45), 'std': (0.2, 0.25, 1.0)}

  def normalise(to):
    return data.make_preprocess(**to)({'image': images}, train=False)['image']

  got = data.renormalize(
    normalise(ours).astype(dtype),
    **ours,
    to_mean=theirs['mean'],
    to_std=theirs['std'],
  )
  assert got.dtype == dtype
  np.testing.assert_allclose(
    got.astype('float32'),
    normalise(theirs),
    atol=1e-5 if dtype == 'float32' else 0.1,
  )


@pytest.mark.parametrize(
  ('change', 'match'),
  [
    ({'to_mean': (0.5,) * 2}, 'to_mean has 2 channels but the image has 3'),
    ({'to_std': (0.5, 0.0, 0.5)}, r'to_std is \(0.5, 0.0, 0.5\); it must be'),
    ({'image': jnp.zeros((1, 3), jnp.uint8)}, 'must be float, not uint8'),
  ],
)
def test_renormalize_checks_its_arguments(change, match):
  names = ('mean', 'std', 'to_mean', 'to_std')
  arguments = {name: (0.5,) * 3 for name in names}
  arguments = {'image': jnp.zeros((1, 3))} | arguments | change
  with pytest.raises(ValueError, match=match):
    data.renormalize(arguments.pop('image'), **arguments)


@pytest.mark.parametrize(('height', 'width', 'size'), [(8, 8, 4), (5, 7, 16)])
def test_resize_matches_pillow(height, width, size):
  rng = np.random.default_rng(0)
  image = rng.normal(size=(2, height, width, 3)).astype(np.float32)
  got = jax.jit(lambda x: data.resize(x, size))(image)
  assert got.shape == (2, size, size, 3) and got.dtype == jnp.float32
  for i in range(2):
    for c in range(3):
      expected = PIL.Image.fromarray(image[i, :, :, c]).resize(
        (size, size), PIL.Image.Resampling.BILINEAR
      )
      np.testing.assert_allclose(got[i, :, :, c], expected, atol=1e-5)


@pytest.mark.parametrize(
  ('image', 'size', 'match'),
  [
    (jnp.zeros((4, 4, 3)), 8, r'must be float \[B, H, W, C\]'),
    (jnp.zeros((1, 4, 4, 3), jnp.uint8), 8, 'but it is uint8'),
    (jnp.zeros((1, 4, 4, 3)), 0, 'size is 0'),
  ],
)
def test_resize_checks_its_arguments(image, size, match):
  with pytest.raises(ValueError, match=match):
    data.resize(image, size)
