"""Compiled programs that are kept on disk for the next run.

Owns where they lie and that a cache never stops a run; the cache itself is
JAX's.
"""

import logging
import os
import tempfile
from pathlib import Path

import jax

OFF = 'off'


def default_directory() -> Path:
  """`kd_jax/compiled` in the user's directory of caches.

  That is `$XDG_CACHE_HOME`, or `~/.cache` where the variable is empty or unset.

  Example:
    >>> default_directory().parts[-2:]
    ('kd_jax', 'compiled')
  """
  home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
  return Path(home) / 'kd_jax' / 'compiled'


def enable(directory: str = '') -> str | None:
  """Makes JAX keep what it compiles, and take it from there in later runs.

  The programs of a run are found again by what they compute, the versions and
  the devices. The directory may be deleted at any time.

  Args:
    directory: where to; 'off' for nowhere. When empty, what JAX was told
      already, such as by the environment variable `JAX_COMPILATION_CACHE_DIR`,
      or else `default_directory()`. Also 'gs://...'.

  Returns:
    The directory; None if it is off or cannot be written, of which the logger
    'kd_jax' has a warning.
  """
  if directory == OFF:
    jax.config.update('jax_enable_compilation_cache', False)
    return None
  told = jax.config.values['jax_compilation_cache_dir']
  if not directory and told:
    return told
  chosen = directory or str(default_directory())
  try:
    if '://' not in chosen:
      Path(chosen).mkdir(parents=True, exist_ok=True)
      with tempfile.TemporaryFile(dir=chosen):
        pass
  except OSError as e:
    logging.getLogger('kd_jax').warning(
      'Compiled programs are not kept for later runs: %s', e
    )
    return None
  jax.config.update('jax_compilation_cache_dir', chosen)
  # Small programs too: a run has hundreds of them.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  return chosen
