"""The files of an artefact: written whole or not at all, verified when read.

An artefact is a directory of `FILES` and `manifest.json`, which says what they
are and holds the SHA-256 of each, and its own. One flipped byte in an exported
program is accepted by JAX and gives wrong numbers, so nothing is used that was
not verified. Owns neither programs nor arrays: `stablehlo` writes
those, and `artefact` reads them.
"""

import hashlib
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Mapping
from typing import Any

from kd_jax.storage.files import seal

FORMAT = 2
KIND = 'kd_jax.stablehlo'
NAME = 'manifest.json'
SYMBOLIC = 'model.stablehlo'
FIXED = 'model.batch1.stablehlo'
WEIGHTS = 'weights.safetensors'
GOLDEN = 'golden.safetensors'
FILES = (SYMBOLIC, FIXED, WEIGHTS, GOLDEN)

_KEYS = frozenset(
  ('versions', 'input', 'output', 'class_names', 'golden', 'files')
)


class ArtefactError(ValueError):
  """An artefact that cannot be written, or must not be used."""


def artefact_bytes(directory: str | os.PathLike[str]) -> int:
  """The size of what computes the outputs, in bytes on disk.

  Counts both programs, the weights and the manifest, but not the golden batch:
  it is a test that `load_stablehlo` replays, and its size is that of however
  many inputs were chosen.

  Args:
    directory: an artefact.

  Raises:
    ArtefactError: if one of its files is missing.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   for i, name in enumerate((SYMBOLIC, FIXED, WEIGHTS, NAME, GOLDEN)):
    ...     _ = pathlib.Path(directory, name).write_bytes(bytes(10**i))
    ...   artefact_bytes(directory)
    1111
  """
  counted = [pathlib.Path(directory) / n for n in (*FILES, NAME) if n != GOLDEN]
  try:
    return sum(path.stat().st_size for path in counted)
  except OSError as e:
    raise ArtefactError(f'{e.filename} cannot be read: {e.strerror}.') from e


def check_target(directory: pathlib.Path, *, overwrite: bool) -> None:
  """Raises ArtefactError if an artefact must not be written there."""
  if not os.path.lexists(directory):
    return
  if not overwrite:
    raise ArtefactError(
      f'{directory} already exists; pass overwrite=True to replace it.'
    )
  if not directory.is_dir():
    raise ArtefactError(f'{directory} is a file, not a directory.')
  foreign = sorted({p.name for p in directory.iterdir()} - {*FILES, NAME})
  if foreign:
    raise ArtefactError(
      f'{directory} is not replaced: it holds {foreign[0]!r}, which is no '
      'file of an artefact.'
    )


def write(
  directory: pathlib.Path,
  files: Mapping[str, bytes],
  about: Mapping[str, Any],
  *,
  overwrite: bool,
) -> None:
  """Writes an artefact beside its place, then moves it there.

  A process killed meanwhile leaves a hidden `.<name>.<random>.tmp` behind, and
  in the instant of replacing an artefact possibly the old one as `.old`; what
  is at `directory` is always whole.

  Args:
    directory: where to; see `check_target`.
    files: name -> content of each of `FILES`.
    about: the rest of the manifest; JSON values.
    overwrite: replace an artefact that is there.
  """
  digests = {name: _describe(data) for name, data in files.items()}
  manifest = {'format': FORMAT, 'kind': KIND, **about, 'files': digests}
  target = directory.resolve()
  target.parent.mkdir(parents=True, exist_ok=True)
  built = target.parent / f'.{target.name}.{secrets.token_hex(4)}.tmp'
  built.mkdir()
  try:
    for name, data in files.items():
      (built / name).write_bytes(data)
    (built / NAME).write_bytes(_render(manifest))
    check_target(target, overwrite=overwrite)
    _move(built, target)
  except BaseException:
    shutil.rmtree(built, ignore_errors=True)
    raise


def read(directory: pathlib.Path) -> tuple[dict[str, Any], dict[str, bytes]]:
  """Reads an artefact, every byte verified.

  Returns:
    The manifest, and name -> content of each of `FILES`.

  Raises:
    ArtefactError: if a file is missing or is not what was written, or the
      manifest has another format or names other files.
  """
  manifest = _read_manifest(directory)
  files = {}
  for name in FILES:
    files[name] = _read_bytes(directory / name)
    found, written = _describe(files[name]), manifest['files'][name]
    if found['bytes'] != written['bytes']:
      raise ArtefactError(
        f'{directory / name} has {found["bytes"]} bytes, but {NAME} says '
        f'{written["bytes"]}: the file is damaged or was replaced.'
      )
    if found != written:
      raise ArtefactError(
        f'{directory / name} does not have the SHA-256 that {NAME} gives: '
        'the file is damaged or was replaced.'
      )
  return manifest, files


def _read_manifest(directory: pathlib.Path) -> dict[str, Any]:
  path = directory / NAME
  raw = _read_bytes(path)
  try:
    manifest = json.loads(raw)
  except ValueError as e:
    raise ArtefactError(f'{path} is damaged: it is not JSON ({e}).') from e
  if not isinstance(manifest, dict) or manifest.get('kind') != KIND:
    raise ArtefactError(f'{path} is not the manifest of a {KIND} artefact.')
  # Before the digest: a later format may be sealed in another way.
  if manifest.get('format') != FORMAT:
    raise ArtefactError(
      f'{path} has format {manifest.get("format")}, but this version of kd_jax '
      f'reads format {FORMAT}; use the version that wrote it, or export again.'
    )
  if _render(manifest) != raw:
    raise ArtefactError(
      f'{path} does not have its own SHA-256: the file is damaged or was '
      'changed.'
    )
  missing = sorted(_KEYS - set(manifest))
  if missing:
    raise ArtefactError(f'{path} has no entry {missing[0]!r}.')
  wrong = sorted(set(manifest['files']) ^ set(FILES))
  if wrong:
    raise ArtefactError(
      f'{path} must name the files {", ".join(FILES)}, but it '
      f'{"lacks" if wrong[0] in FILES else "also names"} {wrong[0]!r}.'
    )
  return manifest


def _render(manifest: Mapping[str, Any]) -> bytes:
  """The content of a manifest's file, with a digest of all its entries."""
  return (json.dumps(seal(manifest), indent=1) + '\n').encode()


def _describe(data: bytes) -> dict[str, Any]:
  return {'sha256': hashlib.sha256(data).hexdigest(), 'bytes': len(data)}


def _read_bytes(path: pathlib.Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as e:
    raise ArtefactError(f'{path} cannot be read: {e.strerror}.') from e


def _move(built: pathlib.Path, target: pathlib.Path) -> None:
  if not target.exists():
    os.rename(built, target)
    return
  old = built.with_suffix('.old')
  os.rename(target, old)
  try:
    os.rename(built, target)
  except BaseException:
    os.rename(old, target)
    raise
  shutil.rmtree(old)
