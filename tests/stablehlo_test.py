"""StableHLO artefacts: bitwise, loud about damage, whole or not there."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax

from kd_jax import adapters, deploy, export, models, quantize
from kd_jax.export import artefact as artefact_lib
from kd_jax.export import manifest as manifest_lib
from kd_jax.export.manifest import FILES, FIXED, GOLDEN, NAME, SYMBOLIC, WEIGHTS

ROOT = pathlib.Path(__file__).parents[1]
IMAGE = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.uint8)
CLASSES = [f'class {i}' for i in range(10)]


def images(count, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (count, *IMAGE.shape[1:]), dtype=np.uint8)


def preprocess(batch, *, train):
  assert not train
  return {'image': batch['image'].astype(jnp.float32) / 255}


def float_model():
  model = models.make_model('mlp', num_classes=10, hidden=(16,))
  batch = preprocess({'image': jnp.asarray(images(4))}, train=False)
  variables = adapters.init_linen(model, jax.random.key(0), batch)
  return deploy.from_raw(adapters.from_linen(model), preprocess), variables


def int8_model():
  model = models.make_model('cnn', num_classes=10, widths=(4,))
  batch = preprocess({'image': jnp.asarray(images(16))}, train=False)
  variables = adapters.init_linen(model, jax.random.key(0), batch)
  activations = [('.*', quantize.INT8_ACTIVATIONS)]
  observe = adapters.from_linen(
    model, interceptors=(quantize.quantize_activations(activations),)
  )
  variables['quant_stats'] = quantize.init_quant_stats(
    observe, variables, batch, activations
  )
  seen = jax.jit(lambda v: observe(v, batch, train=True).model_state)(variables)
  integers = quantize.convert(
    deploy.fold(model, variables | seen, batch),
    [('.*/kernel', quantize.INT8_WEIGHTS)],
    activations,
  )
  return deploy.from_raw(deploy.integer_forward(model), preprocess), integers


@pytest.fixture(scope='module')
def int8():
  return int8_model()


def write(fn, variables, directory, **options):
  options = {'class_names': CLASSES, 'golden': images(5)} | options
  return export.export_stablehlo(fn, variables, IMAGE, directory, **options)


@pytest.fixture(scope='module')
def original(int8, tmp_path_factory):
  return write(*int8, tmp_path_factory.mktemp('export') / 'model')


@pytest.fixture
def artefact(original, tmp_path):
  """A copy of an int8 artefact, to be damaged."""
  return shutil.copytree(original, tmp_path / 'model')


def linear(variables, images):
  x = images.reshape(images.shape[0], -1).astype(jnp.float32)
  return x @ variables['kernel']


LINEAR = {'kernel': np.eye(64, 10, dtype=np.float32)}


def contents(directory):
  return {p.name: p.read_bytes() for p in directory.iterdir()}


def rewrite_manifest(directory, edit):
  """Edits the manifest and seals it again, as a forger would."""
  manifest = json.loads((directory / NAME).read_text())
  edit(manifest)
  (directory / NAME).write_bytes(manifest_lib._render(manifest))


@pytest.mark.parametrize('kind', ['float', 'int8'])
def test_round_trip_is_bitwise(kind, int8, tmp_path):
  fn, variables = int8 if kind == 'int8' else float_model()
  loaded = export.load_stablehlo(write(fn, variables, tmp_path / 'model'))
  for count in (1, 3, 7):
    x = images(count, seed=count)
    expected = np.asarray(jax.jit(fn)(variables, x))
    assert np.ptp(expected) > 0
    np.testing.assert_array_equal(loaded.predict(x), expected)
    np.testing.assert_array_equal(loaded.predict(jnp.asarray(x)), expected)


def test_an_int8_artefact_stores_integers_once(original):
  weights = safetensors.flax.load_file(original / WEIGHTS)
  kernels = {k: v for k, v in weights.items() if k.endswith('/kernel')}
  assert kernels and {str(v.dtype) for v in kernels.values()} == {'int8'}
  # The programs take the weights as arguments and hold no copy of them.
  largest = max((np.asarray(v).tobytes() for v in kernels.values()), key=len)
  for name in (SYMBOLIC, FIXED):
    assert largest not in (original / name).read_bytes()


def test_the_files_need_nothing_of_this_library(original):
  weights = safetensors.flax.load_file(original / WEIGHTS)
  arguments = [weights[name] for name in sorted(weights)]
  expected = export.load_stablehlo(original).predict(images(4))
  for name, x in ((SYMBOLIC, images(4)), (FIXED, images(4)[:1])):
    raw = (original / name).read_bytes()
    model = jax.jit(jax.export.deserialize(bytearray(raw)).call)
    np.testing.assert_array_equal(model(arguments, x), expected[: len(x)])


def test_loads_in_a_process_without_the_model(original, tmp_path):
  np.save(tmp_path / 'images.npy', images(3))
  code = (
    'import sys, numpy as np\n'
    'from kd_jax.export import load_stablehlo\n'
    'model = load_stablehlo(sys.argv[1])\n'
    'folder = sys.argv[2]\n'
    'logits = model.predict(np.load(folder + "/images.npy"))\n'
    'np.save(folder + "/logits.npy", logits)\n'
    'for name in ("onnx", "onnxruntime", "tensorflow", "kd_jax.models"):\n'
    '  assert name not in sys.modules, name\n'
  )
  subprocess.run(
    [sys.executable, '-c', code, str(original), str(tmp_path)],
    check=True,
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )
  np.testing.assert_array_equal(
    np.load(tmp_path / 'logits.npy'),
    export.load_stablehlo(original).predict(images(3)),
  )


def test_manifest_says_what_the_artefact_is(tmp_path):
  metadata = {'dataset': 'digits', 'bits': (8, 8)}
  path = write(
    linear,
    LINEAR,
    tmp_path / 'a' / 'model',
    metadata=metadata,
    reads='pixels',
  )
  manifest = export.load_stablehlo(path).manifest
  assert manifest['format'] == 2
  assert manifest['versions']['jax'] == jax.__version__
  assert set(manifest['versions']) == {'kd_jax', 'jax', 'jaxlib', 'flax'}
  assert manifest['stablehlo'].count('.') == 2
  assert manifest['platforms'] == ['cpu', 'cuda', 'tpu']
  assert manifest['input'] == {
    'name': 'pixels',
    'shape': ['batch', 8, 8, 1],
    'dtype': 'uint8',
    'layout': 'NHWC',
    'range': [0, 255],
  }
  assert manifest['output'] == {
    'name': 'outputs',
    'shape': ['batch', 10],
    'dtype': 'float32',
  }
  assert manifest['class_names'] == CLASSES
  assert manifest['metadata'] == {'dataset': 'digits', 'bits': [8, 8]}
  for name in FILES:
    assert manifest['files'][name]['bytes'] == (path / name).stat().st_size


def test_classify_names_the_class(tmp_path):
  loaded = export.load_stablehlo(write(linear, LINEAR, tmp_path / 'model'))
  x = [pixels(0, 0, 0, 200), pixels(0, 2)]
  [first, second] = loaded.classify(np.concatenate(x))
  assert first == ('class 3', pytest.approx(1.0))
  assert second == ('class 1', pytest.approx(np.exp(2) / (np.exp(2) + 9)))


def test_classify_without_class_names_is_an_error(tmp_path):
  path = write(linear, LINEAR, tmp_path / 'model', class_names=())
  with pytest.raises(ValueError, match='exported without names'):
    export.load_stablehlo(path).classify(images(1))


def test_artefact_bytes_counts_all_but_the_golden_batch(artefact):
  sizes = {p.name: p.stat().st_size for p in artefact.iterdir()}
  assert set(sizes) == {*FILES, NAME}
  expected = sum(sizes.values()) - sizes[GOLDEN]
  assert export.artefact_bytes(artefact) == expected
  (artefact / FIXED).unlink()
  with pytest.raises(export.ArtefactError, match=FIXED):
    export.artefact_bytes(artefact)


def test_exports_of_one_model_are_equal_bytes(tmp_path):
  a, b = (write(linear, LINEAR, tmp_path / name) for name in 'ab')
  assert contents(a) == contents(b)


def test_programs_hold_no_source_paths_and_the_option_is_restored(tmp_path):
  before = jax.config.jax_traceback_in_locations_limit
  assert before != 0
  path = write(linear, LINEAR, tmp_path / 'model')
  assert jax.config.jax_traceback_in_locations_limit == before
  for name in (SYMBOLIC, FIXED):
    assert b'.py' not in (path / name).read_bytes()

  def broken(variables, images):
    raise RuntimeError('broken')

  with pytest.raises(RuntimeError, match='broken'):
    write(broken, LINEAR, tmp_path / 'broken')
  assert jax.config.jax_traceback_in_locations_limit == before


def test_any_tree_and_dtype_of_weights(tmp_path):
  variables = {
    'params': {},
    'list': [jnp.ones((64, 10), jnp.bfloat16), np.float32(3)],
    # 'b-c' comes before 'b/9' in the file, and after it in the tree.
    'b': {'10': np.arange(10, dtype=np.int16), '9': np.ones(10, bool)},
    'b-c': np.arange(10, 20, dtype=np.int16),
    'unused': np.zeros((0, 2), np.float16),
  }

  def fn(variables, images):
    assert variables['params'] == {}
    kernel, scale = variables['list']
    x = linear({'kernel': kernel.astype(jnp.float32)}, images) * scale
    b = variables['b']
    x = jnp.where(b['9'][None], x + b['10'][None], 0.0)
    return x * variables['b-c'][None]

  loaded = export.load_stablehlo(write(fn, variables, tmp_path / 'model'))
  np.testing.assert_array_equal(
    loaded.predict(images(2)), jax.jit(fn)(variables, images(2))
  )


@pytest.mark.parametrize('name', [*FILES, NAME])
def test_a_flipped_byte_is_refused(artefact, name):
  path = artefact / name
  data = bytearray(path.read_bytes())
  rng = np.random.default_rng(0)
  for i in [0, len(data) - 1, *rng.integers(0, len(data), 20)]:
    damaged = data.copy()
    damaged[i] ^= 1 << int(rng.integers(8))
    path.write_bytes(damaged)
    with pytest.raises(export.ArtefactError) as e:
      export.load_stablehlo(artefact)
    assert str(path) in str(e.value)


@pytest.mark.parametrize('name', [*FILES, NAME])
def test_a_missing_or_short_file_is_refused(artefact, name):
  path = artefact / name
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(export.ArtefactError) as e:
    export.load_stablehlo(artefact)
  assert str(path) in str(e.value)
  path.unlink()
  with pytest.raises(export.ArtefactError) as e:
    export.load_stablehlo(artefact)
  assert str(e.value) == f'{path} cannot be read: No such file or directory.'


def test_no_artefact_there(tmp_path):
  with pytest.raises(export.ArtefactError, match='nowhere'):
    export.load_stablehlo(tmp_path / 'nowhere')


@pytest.mark.parametrize('number', [1, 3])
def test_another_format_is_refused(artefact, number):
  manifest = json.loads((artefact / NAME).read_text())
  manifest['format'] = number
  (artefact / NAME).write_text(json.dumps(manifest))
  with pytest.raises(export.ArtefactError, match=f'has format {number}'):
    export.load_stablehlo(artefact)


def test_a_manifest_of_other_files_is_refused(artefact):
  def add(manifest):
    manifest['files']['../other'] = manifest['files'][WEIGHTS]

  rewrite_manifest(artefact, add)
  with pytest.raises(export.ArtefactError, match=r"also names '../other'"):
    export.load_stablehlo(artefact)

  def drop(manifest):
    del manifest['files']['../other'], manifest['files'][GOLDEN]

  rewrite_manifest(artefact, drop)
  with pytest.raises(export.ArtefactError, match=f"lacks '{GOLDEN}'"):
    export.load_stablehlo(artefact)


def test_a_manifest_of_something_else_is_refused(artefact):
  for text in ('[]', '{"kind": "other", "format": 1}'):
    (artefact / NAME).write_text(text)
    with pytest.raises(export.ArtefactError, match='is not the manifest'):
      export.load_stablehlo(artefact)


def forge(directory, name, data):
  """Replaces a file and makes the manifest agree."""
  (directory / name).write_bytes(data)
  described = {name: manifest_lib._describe(data)}
  rewrite_manifest(directory, lambda m: m['files'].update(described))


def test_weights_that_give_other_logits_are_refused(artefact):
  weights = safetensors.flax.load_file(artefact / WEIGHTS)
  forge(artefact, WEIGHTS, safetensors.flax.save(weights))
  export.load_stablehlo(artefact)  # the forger's hand alone is not noticed
  weights['int8/head/kernel'] = -weights['int8/head/kernel']
  forge(artefact, WEIGHTS, safetensors.flax.save(weights))
  with pytest.raises(export.ArtefactError, match='computes something else'):
    export.load_stablehlo(artefact)


def pixels(*values):
  """One image, for `linear` an image of its logits."""
  image = np.zeros((1, *IMAGE.shape[1:]), np.uint8)
  image[0, 0, : len(values), 0] = values
  return image


def test_nan_logits_are_refused(tmp_path):
  golden = pixels(0, 0, 0, 9)
  path = write(linear, LINEAR, tmp_path / 'model', golden=golden)
  # The NaN is where the largest logit was: argmax alone would not notice.
  kernel = LINEAR['kernel'].copy()
  kernel[3, 3] = np.nan
  forge(path, WEIGHTS, safetensors.flax.save({'kernel': jnp.asarray(kernel)}))
  with pytest.raises(export.ArtefactError, match='nan .*0 of 1 '):
    export.load_stablehlo(path)


@pytest.mark.parametrize(
  'stored, refused',
  [
    ([196.5, 195.5], None),
    ([195.5, 194.5], 'differ by up to 4.5 .* 0 of 1'),
    ([198.0, 201.0], None),  # another class, but a tie within the tolerance
    ([196.5, 202.5], 'differ by up to 3.5 .* 1 of 1'),
  ],
)
def test_replay_allows_rounding_but_no_other_class(tmp_path, stored, refused):
  golden = pixels(200, 199)
  path = write(linear, LINEAR, tmp_path / 'model', golden=golden)
  manifest = json.loads((path / NAME).read_text())
  assert manifest['golden']['tolerance'] == pytest.approx(4.0)
  tensors = safetensors.flax.load_file(path / GOLDEN)
  tensors['outputs'] = tensors['outputs'].at[0, :2].set(jnp.asarray(stored))
  forge(path, GOLDEN, safetensors.flax.save(tensors))
  if refused is None:
    export.load_stablehlo(path)
  else:
    with pytest.raises(export.ArtefactError, match=refused):
      export.load_stablehlo(path)


def unreadable(program):
  def call(weights, images):
    raise jax.errors.JaxRuntimeError('INVALID: Failed to deserialize StableHLO')

  return call


def test_falls_back_to_the_twin_for_one_image(artefact, monkeypatch):
  rewrite_manifest(artefact, lambda m: m['versions'].update(jax='99.1'))
  expected = export.load_stablehlo(artefact).predict(images(7))
  monkeypatch.setattr(artefact_lib, '_any_batch', unreadable)
  with pytest.warns(UserWarning) as warned:
    loaded = export.load_stablehlo(artefact)
  [message] = [str(w.message) for w in warned]
  assert f'{artefact / SYMBOLIC} cannot be run' in message
  assert f'written by jax 99.1 and this is jax {jax.__version__}' in message
  assert f'Using {FIXED}' in message
  found = loaded.predict(images(7))
  assert found.shape == expected.shape
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_neither_program_runs(artefact, monkeypatch):
  monkeypatch.setattr(artefact_lib, '_any_batch', unreadable)
  monkeypatch.setattr(artefact_lib, '_one_by_one', unreadable)
  with pytest.raises(export.ArtefactError) as e:
    export.load_stablehlo(artefact)
  assert str(artefact / FIXED) in str(e.value)
  assert 'Failed to deserialize' in str(e.value)


@pytest.mark.parametrize(
  'x, given',
  [
    (np.zeros((2, 8, 9, 1), np.uint8), 'uint8 [2, 8, 9, 1].'),
    (np.zeros((2, 8, 8, 1), np.float32), 'float32 [2, 8, 8, 1].'),
    (np.zeros((0, 8, 8, 1), np.uint8), 'uint8 [0, 8, 8, 1].'),
    (
      np.zeros((8, 8, 1), np.uint8),
      'uint8 [8, 8, 1]; a single input needs a batch axis, x[None].',
    ),
    (jnp.zeros((2, 64), jnp.uint8), 'uint8 [2, 64].'),
    (7, 'int64 [].'),
  ],
)
def test_images_that_do_not_fit_are_an_error(original, x, given):
  loaded = export.load_stablehlo(original)
  with pytest.raises(ValueError) as e:
    loaded.predict(x)
  assert str(e.value) == (
    f'predict: expected inputs uint8 [batch, 8, 8, 1] in 0..255 but was given '
    f'{given}'
  )


def test_an_existing_directory_is_untouched_without_overwrite(artefact):
  before = contents(artefact)
  with pytest.raises(export.ArtefactError, match='already exists'):
    write(linear, LINEAR, artefact)
  assert contents(artefact) == before
  assert os.listdir(artefact.parent) == [artefact.name]


def test_overwrite_replaces_an_artefact(artefact):
  write(linear, LINEAR, artefact, overwrite=True)
  x = images(2)
  np.testing.assert_array_equal(
    export.load_stablehlo(artefact).predict(x), jax.jit(linear)(LINEAR, x)
  )
  assert os.listdir(artefact.parent) == [artefact.name]


def test_overwrite_deletes_nothing_but_artefacts(artefact):
  (artefact / 'thesis.txt').write_text('years of work')
  before = contents(artefact)
  with pytest.raises(export.ArtefactError, match='thesis.txt'):
    write(linear, LINEAR, artefact, overwrite=True)
  assert contents(artefact) == before
  with pytest.raises(export.ArtefactError, match='is a file'):
    write(linear, LINEAR, artefact / 'thesis.txt', overwrite=True)


@pytest.mark.parametrize('name', [SYMBOLIC, GOLDEN, NAME])
def test_a_failure_midway_leaves_nothing(tmp_path, artefact, monkeypatch, name):
  before, write_bytes = contents(artefact), pathlib.Path.write_bytes

  def full(path, data):
    if path.name == name:
      write_bytes(path, data[: len(data) // 2])
      raise OSError(28, 'No space left on device')
    return write_bytes(path, data)

  monkeypatch.setattr(pathlib.Path, 'write_bytes', full)
  for path in (tmp_path / 'new', artefact):
    with pytest.raises(OSError, match='No space left'):
      write(linear, LINEAR, path, overwrite=True)
  assert os.listdir(tmp_path) == [artefact.name]
  assert contents(artefact) == before


def test_a_failed_replacement_puts_the_old_one_back(artefact, monkeypatch):
  before, rename = contents(artefact), os.rename

  def failing(source, target):
    if str(source).endswith('.tmp'):
      raise OSError('no')
    rename(source, target)

  monkeypatch.setattr(os, 'rename', failing)
  with pytest.raises(OSError, match='no'):
    write(linear, LINEAR, artefact, overwrite=True)
  assert contents(artefact) == before
  assert os.listdir(artefact.parent) == [artefact.name]


@pytest.mark.parametrize(
  'options, message',
  [
    ({'class_names': ['a']}, '1 class names for outputs of 10'),
    ({'golden': images(2)[:, :4]}, r'golden must be uint8'),
    ({'golden': images(0)}, r'but is uint8 \[0, 8, 8, 1\]'),
    ({'golden': images(2) / 255}, r'but is float64 \[2, 8, 8, 1\]'),
    ({'metadata': {'a': jnp}}, 'metadata is not JSON'),
  ],
)
def test_arguments_that_do_not_fit_are_an_error(tmp_path, options, message):
  with pytest.raises(ValueError, match=message):
    write(linear, LINEAR, tmp_path / 'model', **options)
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
  'fn, variables, message',
  [
    (lambda v, x: (linear(v, x),) * 2, LINEAR, r'returns \[batch, 10\], \['),
    (lambda v, x: linear(v, x).sum(0), LINEAR, r'but returns \[10\]'),
    (lambda v, x: linear(v, x) @ linear(v, x).T, LINEAR, 'batch, batch'),
    (lambda v, x: linear(v, x) / 0, LINEAR, 'not finite'),
    (linear, LINEAR | {'key': jax.random.key(0)}, 'key is array of key<fry>'),
    (linear, LINEAR | {'name': 'x'}, 'name is str, which'),
    (linear, LINEAR | {'a': {'b': 1 * np.eye(2)}, 'a/b': np.eye(2)}, "'a/b'"),
  ],
)
def test_models_that_cannot_be_stored_are_an_error(
  tmp_path, fn, variables, message
):
  with pytest.raises(ValueError, match=message):
    write(fn, variables, tmp_path / 'model')
  assert not os.listdir(tmp_path)


def test_tokens_go_in_and_logits_of_every_token_come_out(tmp_path):
  def fn(variables, tokens):
    return variables['embedding'][tokens] @ variables['head']

  variables = {
    'embedding': jax.random.normal(jax.random.key(0), (7, 4)),
    'head': jax.random.normal(jax.random.key(1), (4, 7)),
  }
  tokens = np.arange(10, dtype=np.int32).reshape(2, 5) % 7
  path = export.export_stablehlo(
    fn,
    variables,
    jax.ShapeDtypeStruct((1, 5), np.int32),
    tmp_path / 'model',
    class_names=list('abcdefg'),
    golden=tokens,
  )
  model = export.load_stablehlo(path)
  assert model.manifest['output']['shape'] == ['batch', 5, 7]
  found = model.predict(tokens[:1])
  np.testing.assert_allclose(found, fn(variables, tokens[:1]), rtol=1e-5)
  with pytest.raises(ValueError, match=r'are \[1, 5, 7\], not'):
    model.classify(tokens[:1])
