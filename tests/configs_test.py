"""What configurations say: their fields, variants, recipes and docstrings."""

import functools
import pathlib
import re
import runpy

import jax
import numpy as np
import pytest

from kd_jax import adapters, methods, models, published
from kd_jax.report import measure
from kd_jax.storage import workdir

DIRECTORY = pathlib.Path(__file__).parent.parent / 'configs'
CONFIGS = sorted(DIRECTORY.glob('*.py'))
# The tables of Tian et al., arXiv:1910.10699, as its public benchmark prints
# them, and of later publications; a column for each pair.
PAIRS = {
  'resnet32x4_resnet8x4': ('resnet32x4', 'resnet8x4'),
  'wrn_40_2_wrn_16_2': ('wrn_40_2', 'wrn_16_2'),
  'wrn_40_2_wrn_40_1': ('wrn_40_2', 'wrn_40_1'),
  'resnet56_resnet20': ('resnet56', 'resnet20'),
  'resnet110_resnet32': ('resnet110', 'resnet32'),
  'vgg13_vgg8': ('vgg13', 'vgg8'),
  'resnet50_mobilenet_v2': ('ResNet50', 'MobileNetV2'),
  'resnet32x4_shufflenet_v1': ('resnet32x4', 'ShuffleV1'),
  'resnet32x4_shufflenet_v2': ('resnet32x4', 'ShuffleV2'),
}
BENCHMARK = """
  teacher 79.42 75.61 75.61 72.34 74.31 74.64 79.34 79.42 79.42
  alone   72.50 73.26 71.98 69.06 71.14 70.36 64.60 70.50 71.82
  kd      73.33 74.92 73.54 70.66 73.08 72.98 67.35 74.07 74.45
  fitnet  73.50 73.58 72.24 69.21 71.06 71.02 63.16 73.59 73.54
  at      73.44 74.08 72.77 70.55 72.31 71.43 58.58 71.73 72.73
  sp      72.94 73.83 72.43 69.67 72.69 72.68 68.08 73.48 74.56
  cc      72.97 73.56 72.21 69.63 71.48 70.71 65.43 71.14 71.29
  vid     73.09 74.11 73.30 70.38 72.61 71.23 67.57 73.38 73.40
  rkd     71.90 73.35 72.22 69.61 71.82 71.48 64.43 72.28 73.21
  pkt     73.64 74.54 73.45 70.34 72.61 72.88 66.52 74.10 74.69
  ab      73.17 72.50 72.38 69.47 70.98 70.94 67.20 73.55 74.31
  ft      72.86 73.25 71.59 69.84 72.37 70.58 60.99 71.75 72.50
  fsp     72.62 72.91 -     69.95 71.89 70.23 -     -     -
  nst     73.30 73.68 72.24 69.60 71.96 71.53 64.96 74.12 74.68
  crd     75.51 75.48 74.14 71.16 73.48 73.94 69.11 75.11 75.65
"""
LATER = """
  ofd     74.95 -     -     -     -     -     -     -     -
  review  75.63 -     75.09 71.89 -     -     69.89 77.45 77.78
  dkd     76.32 76.23 74.81 71.97 74.11 74.68 70.35 76.45 77.07
  dist    76.31 -     74.43 71.75 -     -     68.66 76.34 77.35
  logit_standardization \
          76.62 76.11 74.37 71.43 74.17 74.36 69.02 -     75.56
  kdpp    75.54 -     74.59 72.53 -     -     70.10 75.45 76.42
  simkd   78.08 -     -     -     -     -     -     -     -
"""
IMAGENET = 'imagenet_resnet34_resnet18'
IMAGENET_TABLE = {
  'teacher': 73.31,
  'alone': 69.76,
  'kd': 70.66,
  'at': 70.70,
  'ft': 71.43,
  'review': 71.61,
  'dkd': 71.70,
  'srrl': 71.73,
  'nkd': 71.96,
  'kdpp': 71.98,
  'dist': 72.07,
}
# What authors chose for a pair: beta of DKD, weight of ReviewKD (None where
# they published none), weight of CAT-KD and whether its maps are normalised.
OWN = {
  'resnet32x4_resnet8x4': (8.0, 5.0, 15.0, False),
  'wrn_40_2_wrn_16_2': (6.0, 5.0, 12.0, False),
  'wrn_40_2_wrn_40_1': (6.0, 5.0, 1.5, False),
  'resnet56_resnet20': (2.0, 0.6, 0.7, False),
  'resnet110_resnet32': (2.0, 1.0, 1.8, False),
  'vgg13_vgg8': (6.0, None, 4.5, False),
  'resnet50_mobilenet_v2': (8.0, None, 40.0, True),
  'resnet32x4_shufflenet_v1': (8.0, 5.0, 600.0, True),
  'resnet32x4_shufflenet_v2': (8.0, 8.0, 600.0, True),
}
SLOW_RATE = (
  'resnet50_mobilenet_v2',
  'resnet32x4_shufflenet_v1',
  'resnet32x4_shufflenet_v2',
)


def module(name):
  """A configuration's file, run."""
  return runpy.run_path(str(DIRECTORY / f'{name}.py'))


def load(name, variant=''):
  """A configuration as a plain dict."""
  return module(name)['get_config'](variant).to_dict()


def column(text, pair):
  """One column of a table: name -> number; those that are missing left out."""
  rows = [line.split() for line in text.strip().splitlines()]
  place = 1 + list(PAIRS).index(pair)
  return {row[0]: float(row[place]) for row in rows if row[place] != '-'}


def accuracies(text):
  """The accuracies that a docstring gives: name -> number."""
  found = re.findall(r'(\w+)\s(\d\d\.\d\d)(?=[,.])', text)
  return {name: float(number) for name, number in found}


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_config_has_a_tiny_form_with_the_same_fields(path):
  get_config = runpy.run_path(str(path))['get_config']
  full = workdir.flatten(get_config().to_dict())
  tiny = workdir.flatten(get_config('tiny').to_dict())
  options = {k for k in full if '.model.' in k}
  assert full.keys() - options == tiny.keys() - {
    k for k in tiny if '.model.' in k
  }
  assert tiny['teacher.train.epochs'] == 1 < full['teacher.train.epochs']
  with pytest.raises(ValueError, match='no variant'):
    get_config('huge')


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_config_gives_its_command(path):
  doc = runpy.run_path(str(path))['__doc__']
  command = path.stem.split('_')[0]
  if command == 'compress':
    assert 'kd-jax compress --model' in doc
    assert f'--recipe configs/{path.name}' in doc
    return
  command = 'compare' if command == 'compare' else 'run'
  assert f'kd-jax {command} --config configs/{path.name}' in doc


# The published recipes


@pytest.mark.parametrize('pair', PAIRS)
@pytest.mark.parametrize('stage', ['teacher', 'alone', 'distill'])
def test_cifar_recipe_is_the_published_one(pair, stage):
  config = load(f'cifar100_{pair}')
  train, optimizer = config[stage]['train'], config[stage]['train']['optimizer']
  slow = pair in SLOW_RATE and stage != 'teacher'
  assert (train['epochs'], train['batch_size']) == (240, 64)
  assert train['learning_rate'] == (0.01 if slow else 0.05)
  assert train['schedule'] == 'step' and train['warmup'] == 0
  assert [240 * share for share in train['boundaries']] == [150, 180, 210]
  assert optimizer == {
    'name': 'momentum',
    'momentum': 0.9,
    'l2': 5e-4,
    'decayed': '.*',
  }
  data = config['data']
  assert (data['name'], data['crop_padding'], data['flip']) == (
    'cifar100',
    4,
    True,
  )
  assert data['mean'] == (0.5071, 0.4867, 0.4408)
  assert data['std'] == (0.2675, 0.2565, 0.2761)
  assert data['validation'] == data['max_examples'] == data['mixup'] == 0
  teacher, student = PAIRS[pair]
  assert config['teacher']['model'] == {'name': teacher}
  assert config['student']['model'] == {'name': student}


def test_imagenet_recipe_is_the_published_one():
  config = load(IMAGENET)
  for stage in ('teacher', 'alone', 'distill'):
    train = config[stage]['train']
    assert (train['epochs'], train['batch_size']) == (100, 256)
    assert train['learning_rate'] == 0.1 and train['schedule'] == 'step'
    assert [100 * share for share in train['boundaries']] == [30, 60, 90]
    assert train['optimizer']['l2'] == 1e-4
    assert train['optimizer']['decayed'] == '.*'
  data = config['data']
  assert data['name'] == 'imagenet2012' and data['image_size'] == 224
  assert data['flip'] and not data['crop_padding'] and not data['validation']
  assert data['mean'] == (0.485, 0.456, 0.406)
  assert data['std'] == (0.229, 0.224, 0.225)
  # Plain KD is the protocol's, asked for or not.
  for terms in (config['distill']['terms'], load(IMAGENET, 'kd')['distill']):
    terms = terms.get('terms', terms)
    by_name = {term['name']: term for term in terms.values()}
    assert by_name['soft_targets']['weight'] == 0.5
    assert by_name['soft_targets']['temperature'] == 1.0
    assert by_name['hard_labels']['weight'] == 0.5


# Variants


@pytest.mark.parametrize('method', methods.METHODS)
def test_every_method_is_a_variant(method):
  made = load('cifar100_resnet56_resnet20', method)
  plain = load('cifar100_resnet56_resnet20')
  own = methods.METHODS[method]
  if method not in ('dkd', 'review', 'cat'):
    assert made['distill']['terms'] == own.terms
  assert own.scheme.items() <= made['distill']['scheme'].items()
  if method != 'ab':
    assert made['distill']['train'] == plain['distill']['train']
  for part in ('teacher', 'student', 'alone', 'compress', 'data'):
    assert made[part] == plain[part]


@pytest.mark.parametrize('pair', PAIRS)
def test_methods_have_the_weights_published_for_the_pair(pair):
  beta, review, cat, normalize = OWN[pair]
  terms = {
    method: load(f'cifar100_{pair}', method)['distill']['terms']
    for method in ('dkd', 'review', 'cat')
  }
  dkd = terms['dkd']['decoupled_kd']
  assert (dkd['alpha'], dkd['beta'], dkd['temperature']) == (1.0, beta, 4.0)
  # Both rise over 20 of 240 epochs.
  default = methods.METHODS['review'].terms['review']['weight']['end']
  weight = terms['review']['review']['weight']
  assert weight['end'] == (default if review is None else review)
  assert 240 * weight['until'] == 240 * dkd['weight']['until'] == 20
  maps = terms['cat']['class_attention']
  assert maps['weight'] == cat and maps.get('normalize', True) == normalize
  shuffle = 'shufflenet' in pair
  assert maps.get('size', 2) == (4 if shuffle else 2)


def test_imagenet_has_its_own_weights():
  terms = {
    method: load(IMAGENET, method)['distill']['terms']
    for method in ('dkd', 'review', 'cat', 'dist', 'at')
  }
  dkd = terms['dkd']['decoupled_kd']
  assert (dkd['beta'], dkd['temperature']) == (0.5, 1.0)
  assert dkd['weight'] == {'end': 1.0, 'until': 0.01}
  assert terms['review']['review']['weight'] == {'end': 1.0, 'until': 0.01}
  assert terms['cat']['class_attention']['weight'] == 0.5
  assert terms['dist']['dist']['temperature'] == 1.0
  assert terms['at'] == methods.METHODS['at'].terms


def test_activation_boundaries_train_before_the_labels_count():
  made = load('cifar100_resnet32x4_resnet8x4', 'ab')['distill']
  train = made['train']
  assert train['epochs'] == 270
  falls = [round(270 * share) for share in train['boundaries']]
  assert falls == [180, 210, 240]
  assert round(270 * made['terms']['ce']['weight']['until']) == 30


def test_a_method_and_tiny_go_together_in_either_order():
  name = 'cifar100_vgg13_vgg8'
  both = load(name, 'tiny,crd')
  assert both == load(name, 'crd,tiny')
  assert both['distill']['terms'] == methods.METHODS['crd'].terms
  tiny = load(name, 'tiny')
  assert both['teacher'] == tiny['teacher'] and both['data'] == tiny['data']
  assert tiny['distill']['terms'] == load(name)['distill']['terms']


@pytest.mark.parametrize('protocol', ['dkd2022', 'dist2022'])
def test_a_protocol_with_the_same_recipe_is_a_variant(protocol):
  pair = 'cifar100_resnet50_mobilenet_v2'
  method = published.PROTOCOLS[protocol].method
  made, plain = load(pair, protocol), load(pair, method)
  assert made.pop('compress')['terms'] == plain['distill']['terms']
  del plain['compress']
  assert made == plain != load(pair)


def test_funmatch_trains_students_long_on_mixed_images_without_labels():
  pair = 'cifar100_resnet50_mobilenet_v2'
  made, plain = load(pair, 'funmatch'), load(pair)
  assert made['data'] == plain['data'] | {'mixup': 1.0}
  for stage in ('alone', 'distill'):
    train = made[stage]['train']
    assert (train['epochs'], train['learning_rate']) == (1200, 3e-3)
    assert train['optimizer']['name'] == 'adamw'
  for stage in ('teacher', 'compress'):
    assert made[stage]['train'] == plain[stage]['train']
  assert 'hard_labels' not in {
    term['name'] for term in made['distill']['terms'].values()
  }
  other = load(pair, 'funmatch,at')
  assert other['distill']['train'] == made['distill']['train']
  assert other['distill']['terms'] == load(pair, 'at')['distill']['terms']


@pytest.mark.parametrize(
  'variant',
  [
    'funmatch,dkd2022',
    'huge',
    'crd,at',
    'tiny,tiny',
    'tiny,',
    ',crd',
    'tiny,crd,crd',
  ],
)
def test_other_variants_are_refused_by_name(variant):
  with pytest.raises(ValueError) as caught:
    load('cifar100_wrn_40_2_wrn_16_2', variant)
  message = str(caught.value)
  assert repr(variant) in message and "'tiny'" in message
  assert all(method in message for method in methods.METHODS)
  assert 'funmatch' in message and 'imagenet' not in message


# What docstrings promise


@functools.cache
def measured(name, size, classes):
  """Parameters and multiply-accumulates of one image, from the model."""
  model = models.make_model(name, num_classes=classes)
  forward = adapters.from_linen(model)
  batch = {'image': np.zeros((1, size, size, 3), np.float32)}
  variables = jax.eval_shape(model.init, jax.random.key(0), batch['image'])
  parameters = sum(p.size for p in jax.tree.leaves(variables['params']))
  return parameters, measure.multiply_accumulates(
    lambda v: forward(v, batch).output, variables
  )


def check_costs(doc, names, *, size, classes, images, epochs):
  """The table of networks, and the FLOPs of one epoch and of all."""
  found = dict(
    (name, (int(a.replace(',', '')), int(b.replace(',', ''))))
    for name, a, b in re.findall(r'\n  (\w+) +([\d,]+) +([\d,]+)(?=\n)', doc)
  )
  assert found == {name: measured(name, size, classes) for name in names}
  teacher, student = (found[name][1] for name in names)
  epoch = 2 * (3 * student + teacher) * images
  text = ' '.join(doc.split())
  assert (
    f'{epoch:.2e} for an epoch of {images:,} images, '
    f'{epochs * epoch:.2e} for {epochs}.'
  ).replace('e+', 'e') in text


@pytest.mark.parametrize('pair', PAIRS)
def test_docstring_has_the_pairs_costs(pair):
  check_costs(
    module(f'cifar100_{pair}')['__doc__'],
    PAIRS[pair],
    size=32,
    classes=100,
    images=50000 // 64 * 64,
    epochs=240,
  )


def test_docstring_has_the_costs_of_imagenet():
  check_costs(
    module(IMAGENET)['__doc__'],
    ('resnet34', 'resnet18'),
    size=224,
    classes=1000,
    images=1281167 // 256 * 256,
    epochs=100,
  )


@pytest.mark.parametrize('pair', PAIRS)
def test_docstring_has_the_published_accuracies(pair):
  name = f'cifar100_{pair}'
  benchmark, later = module(name)['__doc__'].split('Other publications')
  expected = column(BENCHMARK, pair)
  assert accuracies(benchmark) == expected
  assert accuracies(later) == column(LATER, pair)
  named = set(expected) | set(column(LATER, pair))
  assert named - {'teacher'} <= set(methods.METHODS)
  aims = load(name)['aims']
  assert aims['teacher'] == pytest.approx(expected['teacher'] / 100 - 0.005)
  assert aims['drop'] == pytest.approx(
    (expected['teacher'] - expected['kd']) / 100 + 0.01
  )


def test_docstring_has_the_published_accuracies_of_imagenet():
  first, others = module(IMAGENET)['__doc__'].split('The KD of 70.66')
  assert accuracies(first) == IMAGENET_TABLE and '71.37' in others
