"""Paths, small atomic files, and how a full disk shows."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slm_jax.config import ConfigError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # as the errno of an OSError


def expanded(path: str) -> Path:
  """With a leading ~ or ~user replaced; ConfigError if there is no such user."""
  try:
    return Path(path).expanduser()
  except RuntimeError:
    raise ConfigError(f'{path}: no such user') from None


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
  """Turns 'no space left', however deep it happened, into a ConfigError that names the folder. What was there stays."""
  try:
    yield
  except ConfigError:
    raise
  except Exception as error:
    seen: BaseException | None = error
    while seen is not None:
      if getattr(seen, 'errno', None) in DISK_FULL or 'No space left' in str(seen):
        raise ConfigError(f'{folder}: disk full; what was written before is intact') from error
      seen = seen.__cause__ or seen.__context__
    raise


def write_text(path: Path, text: str) -> None:
  """Writes a text as UTF-8, as `write_bytes` does."""
  write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
  """Replaces a file: it holds either its old content or all of the new one, whatever happens in between."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    with open(temporary, 'wb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def write_json(path: Path, value: Any) -> None:
  write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + '\n')


def read_object(path: Path) -> dict[str, Any]:
  """The object in a JSON file; empty if there is none or it is damaged: one bad file must not hide the others."""
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return {}
  return value if isinstance(value, dict) else {}
