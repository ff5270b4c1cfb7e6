"""A work directory whose students were never trained, for tests of commands."""

import pathlib
import runpy

import jax

from kd_jax import adapters
from kd_jax.recipe.run import Run
from kd_jax.storage import workdir
from kd_jax.storage.weights import save_weights

CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'


def config_of(data_dir, widths):
  """The tiny configuration of the digits with a small CNN as student."""
  config = runpy.run_path(str(CONFIGS / 'digits.py'))['get_config']('tiny')
  config.data.data_dir = str(data_dir)
  config.student.model = {'name': 'cnn', 'widths': widths}
  return config


def finish_distill(config, path):
  """Makes a work directory in which 'distill' is finished."""
  folder = workdir.Workdir(path, config.to_dict())
  folder.write_config()
  run = Run(config, folder)
  model = run.model('student')
  variables = adapters.init_linen(model, jax.random.key(0), run.example)
  save_weights(folder.stage('distill') / 'weights.safetensors', variables)
  folder.finish('distill', {})
  return folder.path
