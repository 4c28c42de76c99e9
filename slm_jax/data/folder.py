"""Folders that are written once: whole and undamaged, or not there.

A folder is built under another name beside its place, and renamed. Its manifest.json lists the size and the SHA-256 of
each file; a folder that does not agree with it is built again. Any number of processes may build the same folder: the
first rename wins, and the others use that one.
"""

import errno
import hashlib
import os
import shutil
import socket
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from slm_jax.files import DamagedFile, disk_errors, read_json, write_json

MANIFEST = 'manifest.json'


class _File(TypedDict):
  size: int
  sha256: str


class Manifest(TypedDict):
  """What every manifest has; what its builder says beside it is a class below this one."""

  files: dict[str, _File]


def open_or_build(
  folder: Path, build: Callable[[Path], dict[str, Any]], log: Callable[[str], None], kind: Any = Manifest
) -> dict[str, Any]:
  """The manifest of `folder`, which is built first if it is missing or damaged.

  build: writes files into the folder that it is given; what it returns (JSON) goes into the manifest. Files that no
    manifest entry stands for are not looked at.
  kind: what its manifest must be, see schema.py.
  The manifest of a folder that was damaged, and is built again, says so (`rebuilt`).
  ConfigError if the disk is full; then nothing of the attempt is left.
  """
  fault = damage(folder, kind)
  if fault is None:
    return manifest(folder, kind)
  again = {}
  if folder.exists():
    log(f'{folder}: {fault}; it is built again')
    again = {'rebuilt': fault}
  _sweep(folder)
  temporary = folder.with_name(f'.{folder.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}')
  try:
    with disk_errors(folder):
      temporary.mkdir(parents=True)
      facts = build(temporary)
      files = {path.name: _describe(path) for path in sorted(temporary.iterdir())}
      write_json(temporary / MANIFEST, {**facts, **again, 'files': files})
      _sync(temporary)
      _install(temporary, folder, kind)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return manifest(folder, kind)


def manifest(folder: Path, kind: Any = Manifest) -> dict[str, Any]:
  """The manifest of a folder that is there; DamagedFile if it cannot be trusted."""
  found, fault = read_json(folder / MANIFEST, kind)
  if found is None:
    raise DamagedFile(f'{folder / MANIFEST}: {f"damaged ({fault})" if fault else "is missing"}')
  return found


def rebuilt(manifest: dict[str, Any]) -> str:
  """What was wrong with the folder that this one replaced; '' if it replaced none."""
  return manifest.get('rebuilt', '')


def damage(folder: Path, kind: Any = Manifest) -> str | None:
  """What is wrong with the folder; None if nothing is."""
  found, fault = read_json(folder / MANIFEST, kind)
  if found is None:
    return f'{MANIFEST} cannot be read ({fault})' if fault else f'{MANIFEST} is missing'
  try:
    for name, described in found['files'].items():
      if (folder / name).stat().st_size != described['size']:
        return f'{name} is {(folder / name).stat().st_size} bytes long, expected {described["size"]}'
      if _describe(folder / name) != described:
        return f'{name} was changed (SHA-256 differs)'
  except FileNotFoundError as error:
    return f'{Path(error.filename).name} is missing'
  except (OSError, ValueError) as error:
    return f'cannot be read ({type(error).__name__})'
  return None


def _describe(path: Path) -> dict[str, Any]:
  with open(path, 'rb') as file:
    return {'size': path.stat().st_size, 'sha256': hashlib.file_digest(file, 'sha256').hexdigest()}


def _install(temporary: Path, folder: Path, kind: Any) -> None:
  """Renames `temporary` to `folder`, unless a good one has come to stand there meanwhile."""
  while damage(folder, kind) is not None:
    aside = temporary.with_name(temporary.name + '.old')
    try:
      if folder.exists():
        folder.rename(aside)
      temporary.rename(folder)
      _fsync(folder.parent)
      return
    except OSError as error:
      if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
        raise  # else another process was faster; is what it left good?
    finally:
      shutil.rmtree(aside, ignore_errors=True)


def _sync(folder: Path) -> None:
  for path in [*folder.iterdir(), folder]:
    _fsync(path)


def _fsync(path: Path) -> None:
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def _sweep(folder: Path) -> None:
  """Removes what builders of this folder left that were killed on this machine."""
  start = f'.{folder.name}.{socket.gethostname()}.'
  for path in folder.parent.glob('.*'):
    if path.name.startswith(start) and not _alive(path.name.removeprefix(start).split('.')[0]):
      shutil.rmtree(path, ignore_errors=True)


def _alive(pid: str) -> bool:
  try:
    os.kill(int(pid), 0)
  except (ProcessLookupError, ValueError):
    return False
  except PermissionError:
    return True
  return True
