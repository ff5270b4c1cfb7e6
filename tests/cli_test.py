"""Messages and exit codes of the command line."""

import json
import pathlib
import re

import pytest

import kd_jax
from kd_jax import cli, defaults, launch
from kd_jax.cli import flags

ROOT = pathlib.Path(__file__).parent.parent
TINY = str(ROOT / 'configs' / 'digits.py') + ':tiny'

BAD = {
  'unknown command': (
    ['rnu'],
    'the commands are run, compare, compress, evaluate, shrink, report',
  ),
  'no config': (['run', '--workdir=x'], 'needs --config=FILE'),
  'no workdir': (['run', f'--config={TINY}'], 'needs --workdir=DIR'),
  'missing config': (
    ['run', '--config=nope.py', '--workdir=x'],
    "no configuration file 'nope.py'",
  ),
  'unknown variant': (
    ['run', f'--config={TINY}y', '--workdir=x'],
    "no variant 'tinyy'",
  ),
  'unknown key': (
    ['run', f'--config={TINY}', '--workdir=x', '--config.sed=1'],
    'did you mean seed?',
  ),
  'unknown nested key': (
    [
      'run',
      f'--config={TINY}',
      '--workdir=x',
      '--config.teacher.train.learning_rat=1',
    ],
    'did you mean teacher.train.learning_rate',
  ),
  'bad value': (
    ['run', f'--config={TINY}', '--workdir=x', '--config.seed=abc'],
    'config.seed=abc',
  ),
  'unknown flag': (
    ['run', f'--config={TINY}', '--workdir=x', '--stges=a'],
    'Did you mean: stages',
  ),
  'stray word': (
    ['run', f'--config={TINY}', '--workdir=x', 'digits'],
    "takes no argument 'digits'",
  ),
  'no run there': (
    ['evaluate', '--workdir=nowhere'],
    'no work directory of kd-jax run',
  ),
  'foreign directory': (
    ['run', f'--config={TINY}', f'--workdir={ROOT}'],
    'holds files but no config.json',
  ),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_gets_one_sentence(case, capsys, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  words, expected = BAD[case]
  assert cli.main(words) == 2
  error = capsys.readouterr().err
  assert expected in error
  assert error.startswith('kd-jax: ') and error.count('\n') == 1
  assert not list(tmp_path.iterdir())


CHANGES = {
  'stage': ('--stages=distil', "Unknown stage 'distil': did you mean distill"),
  'data set': ('--config.data.name=digts', "Unknown data set 'digts'"),
  'model': ('--config.teacher.model.name=resnt', "Unknown model 'resnt'"),
  'depth': ('--config.teacher.model.depth=9', 'depth=9 is not 6n + 2'),
  'optimizer': (
    '--config.teacher.train.optimizer.name=adamv',
    "Unknown optimizer 'adamv': did you mean adam or adamw",
  ),
  'schedule': (
    '--config.teacher.train.schedule=cosin',
    "Unknown schedule 'cosin'",
  ),
  'compiler': ('--config.compiler=jot', "Unknown compiler 'jot'"),
  'order': ('--stages=distill', "Stage 'teacher' is not finished"),
}


@pytest.mark.parametrize('case', CHANGES)
def test_a_bad_field_gets_one_sentence(case, capsys, tmp_path, data_dir):
  flag, expected = CHANGES[case]
  words = ['run', f'--config={TINY}', f'--workdir={tmp_path / "run"}']
  words += [f'--config.data.data_dir={data_dir}', flag]
  assert cli.main(words) == 2
  assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
  'flag, expected',
  [
    ('alone.train.epochs=-1', 'train.epochs=-1 is not a number from 1 on'),
    ('student.model.name=resnett', "Unknown model 'resnett': did you mean"),
    ('distill.train.batch_size=0', 'batch_size=0 is not a number from 1 on'),
    ('distill.train.accumulate=3', 'accumulate=3 does not divide train.batch'),
    ('distill.scheme.generations=0', 'generations=0 is not a number from 1'),
    ('teacher.train.evaluate_every_epochs=0', 'evaluate_every_epochs=0 is not'),
    ('eval_batch_size=0', 'eval_batch_size=0 is not a number from 1 on'),
    ('seed=-1', 'seed=-1 is not a number from 0 on'),
    ('data.placement=gpu', "Unknown data.placement 'gpu'"),
    ('teacher.cache=nowhere', 'nowhere is no teacher cache'),
    ('teacher.pretrained=nowhere', 'teacher.pretrained=nowhere is no file'),
    ("teacher.shard=('data',)", "Unknown axis of teacher.shard 'data'"),
    ('distill.terms.ce.name=features', 'hint needs equal shapes, to which'),
    ('distill.train.schedule=cosin', "Unknown schedule 'cosin'"),
    ('distill.terms.kd.name=soft', "Unknown term 'soft'"),
    ('distill.scheme.ema=2.0', 'ema_teacher: decay=2.0 is not in'),
    ('compress.prune.sparsity=80', 'A sparsity is a share in [0, 1), not 80'),
    ('compress.teacher=nobody', "Unknown compress.teacher 'nobody'"),
    ('compress.prune.score=taylr', "Unknown prune.score 'taylr'"),
    ('compress.prune.structure=2-4', "Unknown prune.structure '2-4'"),
    ('compress.prune.end=3 weeks', "prune.end='3 weeks' is no point in"),
    ('compress.quantize.observer=emma', "Unknown quantize.observer 'emma'"),
    (
      "compress.quantize.weights=(('.*', 'int7'),)",
      "Unknown quantize.weights 'int7'",
    ),
    ('compress.terms.ce.name=hard', "Unknown term 'hard'"),
    ('compress.train.remat=all', "Unknown train.remat 'all'"),
    ('compress.train.optimizer.name=adamv', "Unknown optimizer 'adamv'"),
    (
      "compress.quantize.weights=('.*/kernel','int8')",
      'A rule of quantize.weights is a pair of a pattern and a value',
    ),
  ],
)
def test_a_bad_word_of_a_late_stage_is_refused_before_any_training(
  flag, expected, capsys, tmp_path, data_dir
):
  place = tmp_path / 'run'
  words = ['run', f'--config={TINY}', f'--workdir={place}']
  words += [f'--config.data.data_dir={data_dir}', f'--config.{flag}']
  assert cli.main(words) == 2
  assert expected in capsys.readouterr().err
  assert not (place / 'config.json').exists()


@pytest.mark.parametrize(
  'line, expected',
  [
    (
      "distill.train.optimizer = {'name': 'adamw', 'weight_decay': 0.1}",
      "Unknown option of an optimizer 'weight_decay'",
    ),
    (
      "distill.train.optimizer = {'name': 'sgd', 'momentum': 0.9}",
      "Optimizer 'sgd' has no 'momentum'",
    ),
    ('distill.train.optimizer = {}', "Unknown field of an optimizer 'name'"),
    ("teacher.model = {'depth': 8}", "Unknown field of a model 'name'"),
    ('data.mean = (0.5,)', 'data.mean=(0.5,) and data.std=() come together'),
  ],
)
def test_a_bad_dictionary_of_a_file_is_refused(
  line, expected, capsys, tmp_path, data_dir
):
  own = tmp_path / 'own.py'
  own.write_text(
    'import runpy\n'
    'def get_config():\n'
    f"  made = runpy.run_path('{ROOT}/configs/digits.py')\n"
    "  config = made['get_config']('tiny')\n"
    f'  config.{line}\n'
    '  return config\n'
  )
  words = ['run', f'--config={own}', f'--workdir={tmp_path / "run"}']
  assert cli.main([*words, f'--config.data.data_dir={data_dir}']) == 2
  assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
  'flag, expected',
  [
    ('seeds=0', 'seeds=0 is not a number from 1 on'),
    ('scales=()', 'scales=() leaves no factor'),
    ('aims.drop=0.5', 'kd-jax compare does not read aims.drop=0.5'),
    ('seed=3', 'kd-jax compare does not read seed=3'),
    ("methods=('kdd',)", "Unknown entry of methods 'kdd': did you mean kd"),
  ],
)
def test_what_no_comparison_can_do_is_refused(flag, expected, capsys, tmp_path):
  words = ['compare', f'--config={ROOT}/configs/compare_digits.py:tiny']
  words += [f'--workdir={tmp_path / "new"}', f'--config.{flag}']
  assert cli.main(words) == 2
  assert expected in capsys.readouterr().err
  assert not (tmp_path / 'new').exists()


def test_a_factor_is_not_chosen_without_a_validation_split(capsys, tmp_path):
  words = ['compare', f'--config={ROOT}/configs/compare_digits.py:tiny']
  words += [f'--workdir={tmp_path / "new"}', '--config.data.validation=0.0']
  assert cli.main([*words, '--config.scales=(1.0, 0.1)']) == 2
  assert 'data.validation=0 leaves none' in capsys.readouterr().err


CONFIGURATIONS = {
  'compare': (
    f'compare --config={TINY}',
    "has no field 'methods': kd-jax compare needs a configuration such as "
    'configs/compare_digits.py',
  ),
  'compress': (
    f'compress --recipe={TINY} --model=m --budget=1KB',
    "has no field 'search': kd-jax compress needs a configuration such as",
  ),
  'no function': ('run --config=empty.py', 'it has no get_config()'),
  'no variant': ('run --config=plain.py:tiny', "no variants, such as 'tiny'"),
  'a dict': ('run --config=plain.py', 'of plain.py returned dict, and not an'),
  'an error': ('run --config=wrong.py', 'wrong.py, line 2: ZeroDivisionError'),
  'no Python': ('run --config=text.md', 'text.md, line 1: SyntaxError'),
  'no such field': (
    'run --config=field.py',
    "Nothing reads the field 'data.nme': did you mean data.name",
  ),
  'an old one': (
    'run --config=old.json',
    "The configuration has no field 'aims.drop'. New ones begin with",
  ),
}


@pytest.mark.parametrize('case', CONFIGURATIONS)
def test_a_file_that_is_no_such_configuration_is_named(
  case, capsys, monkeypatch, tmp_path
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'empty.py').write_text('')
  (tmp_path / 'plain.py').write_text('get_config = lambda: {}')
  (tmp_path / 'wrong.py').write_text('def get_config():\n  return 1 / 0\n')
  (tmp_path / 'text.md').write_text('It is no Python.')
  (tmp_path / 'field.py').write_text(
    'from kd_jax import defaults\n'
    'def get_config():\n'
    '  config = defaults.get_config(tiny=True)\n'
    "  config.data.nme = 'digits'\n"
    '  return config\n'
  )
  (tmp_path / 'old.json').write_text('{"seed": 0, "mesh": {}}')
  words, expected = CONFIGURATIONS[case]
  assert cli.main([*words.split(), '--workdir=new']) == 2
  assert expected in capsys.readouterr().err
  assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('command', ['run', 'evaluate', 'shrink', 'report'])
def test_a_directory_of_an_earlier_version_is_refused(
  command, capsys, tmp_path
):
  config = defaults.get_config().to_dict()
  del config['data']['task']
  (tmp_path / 'config.json').write_text(json.dumps(config))
  assert cli.main([command, f'--workdir={tmp_path}']) == 2
  error = capsys.readouterr().err
  assert "has no field 'data.task'" in error and 'of an earlier kd_jax' in error


def test_a_field_changes_only_with_a_file(capsys, tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  words = ['run', f'--workdir={tmp_path}', '--config.seed=1']
  assert cli.main(words) == 2
  assert '--config.seed=1 needs --config=FILE' in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys):
  assert cli.main(['--version']) == 0
  assert capsys.readouterr().out == f'kd-jax {kd_jax.__version__}\n'


def test_help_names_every_command(capsys):
  assert cli.main(['--help']) == 0
  printed = capsys.readouterr().out
  for command in cli.COMMANDS:
    assert f'kd-jax {command}' in printed


def test_help_names_every_flag(capsys):
  cli.main(['--help'])
  told = set(re.findall(r'--([a-z_]+)', capsys.readouterr().out))
  known = [flags.DEBUG, *flags.PROCESSES]
  known += [f for command in flags.COMMANDS.values() for f in command.flags]
  known += [f for place in flags.PLACES.values() for f in place]
  names = {flag.name for flag in known}
  names |= {command.config for command in flags.COMMANDS.values()}
  # The place is no flag to those who type.
  assert told == names - {'', 'place'} | {'version'}
  assert tuple(flags.PLACES) == launch.PLACES


def test_help_tells_which_place_of_a_launch_has_a_flag(capsys):
  cli.main(['--help'])
  _, _, text = capsys.readouterr().out.partition('launch, by place:\n')
  told = re.findall(r'^  --(\w+)[A-Z ]+([a-z-]+(?:, [a-z-]+)*):', text, re.M)
  shared = set.intersection(*map(set, flags.PLACES.values()))
  known = {
    flag.name: [p for p, own in flags.PLACES.items() if flag in own]
    for own in flags.PLACES.values()
    for flag in own
    if flag not in shared
  }
  assert {name: places.split(', ') for name, places in told} == known


@pytest.mark.parametrize('flag', ['--debug', '--debug=true'])
def test_debug_shows_where_an_error_comes_from(flag):
  with pytest.raises(ValueError, match='no work directory of kd-jax run'):
    cli.main(['evaluate', '--workdir=nowhere', flag])
