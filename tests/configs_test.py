"""Every configuration loads, in both forms, and has the same fields."""

import pathlib
import runpy

import pytest

from kd_jax import workdir

CONFIGS = sorted(
  (pathlib.Path(__file__).parent.parent / 'configs').glob('*.py')
)


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
  assert f'kd-jax run --config configs/{path.name}' in doc
