"""TFDS builders of image data sets: found, checked, prepared, and opened.

Owns what is said when a data set is unknown, is no data set of images, or is
not prepared. What becomes of its records is `sources`.
"""

import contextlib
import importlib.util
import io
import logging
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from kd_jax.data.prepared import Records, identify
from kd_jax.rules import near_misses


def identity(
  name: str, *, data_dir: str | os.PathLike[str] | None = None
) -> dict[str, str]:
  """What tells a prepared data set from another; see `prepared.identify`.

  Args:
    name: as for `load_images`.
    data_dir: likewise.

  Returns:
    file -> SHA-256, and one of the names and sizes of all files.

  Raises:
    ValueError: as `load_images`, for an unknown name.
    FileNotFoundError: likewise, if the data set is not prepared.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as data_dir:
    ...   list(identity('digits', data_dir=data_dir))
    ['dataset_info.json', 'features.json', 'names and sizes of its files']
  """
  builder = prepared_builder(name, data_dir, labelled=False)
  return identify(builder.data_path)


class Described(NamedTuple):
  """What is known of a data set without reading an image.

  Attributes:
    image_shape: height, width and channels; None where images differ.
    class_names: one name per class.
    train_examples: of the TFDS train split; None unless it is prepared here.
  """

  image_shape: tuple[int | None, ...]
  class_names: tuple[str, ...]
  train_examples: int | None


def describe(
  name: str, *, data_dir: str | os.PathLike[str] | None = None
) -> Described:
  """What TFDS says of a labelled data set; prepares and downloads nothing.

  Args:
    name: as for `load_images`.
    data_dir: likewise; where to look for a prepared one.

  Raises:
    ValueError: as `load_images`, and so ImportError.

  Example:
    >>> describe('cifar100').image_shape
    (32, 32, 3)
  """
  builder = _builder(name, data_dir, labelled=True)
  features, splits = builder.info.features, builder.info.splits
  known = builder.data_path.exists() and 'train' in splits
  return Described(
    tuple(features['image'].shape),
    tuple(features['label'].names),
    splits['train'].num_examples if known else None,
  )


def _builder(
  name: str, data_dir: str | os.PathLike[str] | None, labelled: bool
) -> Any:
  """The TFDS builder of a data set of images, prepared or not."""
  # TFDS costs seconds to import, hence only here and where it is needed.
  import tensorflow_datasets as tfds

  def make():
    if name == 'digits':
      from kd_jax.data import digits

      return digits.Digits(data_dir=data_dir)
    try:
      return tfds.builder(name, data_dir=data_dir)
    except ValueError:
      known = tfds.list_builders(with_community_datasets=False)
      if re.split('[:/]', name)[0] in known:
        raise
      raise ValueError(
        f'Unknown data set {name!r}: {near_misses(name, ["digits", *known])}'
      ) from None
    except ImportError as e:
      raise ImportError(
        f'TFDS cannot read {name!r} here, `pip install kd_jax[tfds]` may '
        f'help: {e}'
      ) from e

  builder = make()
  features = builder.info.features
  kinds = {'image': tfds.features.Image}
  if labelled:
    kinds['label'] = tfds.features.ClassLabel
  for feature, kind in kinds.items():
    if not isinstance(dict(features).get(feature), kind):
      raise ValueError(
        f'{name!r} is no image {"classification " if labelled else ""}data '
        f'set: it has no feature {feature!r} of type {kind.__name__}; its '
        f'features are {", ".join(features)}.'
      )
  return builder


def prepared_builder(
  name: str, data_dir: str | os.PathLike[str] | None, labelled: bool
) -> Any:
  """The same, ready to be read.

  Raises:
    FileNotFoundError: if it is not prepared there.
  """
  builder = _builder(name, data_dir, labelled)
  if not builder.data_path.exists():
    # Those that are defined elsewhere need not download nor decode.
    published = type(builder).__module__.startswith('tensorflow_datasets.')
    if published and importlib.util.find_spec('tensorflow') is None:
      raise FileNotFoundError(
        f'Data set {name!r} is not prepared, there is no '
        f'{builder.data_path}: give the data_dir that holds it, or `pip '
        'install kd_jax[tfds]` to let TFDS download and prepare it.'
      )
    _prepare(builder, quiet=not published)
    builder = _builder(name, data_dir, labelled)
  return builder


def _prepare(builder: Any, *, quiet: bool) -> None:
  with silenced() if quiet else contextlib.nullcontext():
    try:
      builder.download_and_prepare(file_format='array_record')
    except OSError:
      # TFDS writes beside the data and renames at the end, which fails when
      # another process was faster; what that one wrote is as good.
      if not builder.data_path.exists():
        raise


@contextlib.contextmanager
def silenced() -> Iterator[None]:
  """Drops what TFDS prints and warns about work of a few seconds."""
  logger = logging.getLogger('absl')
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    with (
      contextlib.redirect_stdout(io.StringIO()),
      contextlib.redirect_stderr(io.StringIO()),
    ):
      yield
  finally:
    logger.setLevel(level)


def tfds_split(name: str, split: str, builder: Any, labelled: bool) -> str:
  """Which of TFDS' splits is meant by 'train', 'validation' or 'test'.

  Args:
    name: of the data set, for messages.
    split: see `sources.load_images`.
    builder: of the data set, prepared.
    labelled: whether its labels are needed, which secret ones are not.

  Raises:
    ValueError: if it has no such split.
  """
  splits = builder.info.splits
  wanted = ('test', 'validation') if split == 'test' else ('train',)
  found = [candidate for candidate in wanted if candidate in splits]
  if not found:
    raise ValueError(
      f'{name!r} has no split for {split!r}; it has {", ".join(splits)}.'
    )
  if len(found) == 1 or not labelled:
    return found[0]
  # TFDS gives the label -1 to the images of a benchmark's secret test.
  secret = records(builder, found[0], encoded=True)[0]['label'] < 0
  return found[1] if secret else found[0]


def records(builder: Any, tfds_split: str, *, encoded: bool = False) -> Records:
  """The records of a TFDS split, with images decoded or as bytes.

  Raises:
    ValueError: for files of a format that cannot be read here.
  """
  import tensorflow_datasets as tfds

  decoders = {'image': tfds.decode.SkipDecoding()} if encoded else None
  split = builder.info.splits[tfds_split]
  shards = list(
    zip(map(str, split.filepaths), split.shard_lengths, strict=True)
  )
  try:
    source = builder.as_data_source(tfds_split, decoders=decoders)
    return Records(source, shards)
  except NotImplementedError as e:
    raise ValueError(
      f'{builder.name!r} in {builder.data_path} is prepared in a format '
      "without random access; prepare it with file_format='array_record'."
    ) from e
