"""Paths, small atomic files with a checksum, and how a full disk shows."""

import contextlib
import errno
import functools
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from slm_jax import schema
from slm_jax.config import ConfigError

CHECKSUM = 'crc32'  # the key under which an object has the checksum of all its other entries
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # as the errno of an OSError


def expanded(path: str) -> Path:
  """With a leading ~ or ~user replaced; ConfigError if there is no such user."""
  try:
    return Path(path).expanduser()
  except RuntimeError:
    raise ConfigError(f'{path}: no such user') from None


class DamagedFile(ConfigError):
  """A file that this project wrote is not as it was written."""


@functools.cache
def warn_once(message: str) -> None:
  """A warning about a file: several tables of one command may read it."""
  logging.warning('%s', message)


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
  """Writes a text as UTF-8, as `write_bytes` does.

  Half of a surrogate pair, as in the name of a file that is not UTF-8, is written as \\udce9.
  """
  write_bytes(path, text.encode(errors='backslashreplace'))


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
  """Writes JSON; an object gets its checksum, which `read_json` verifies."""
  plain = json.loads(json.dumps(value, allow_nan=False))  # as it will be read
  plain = sealed(plain) if isinstance(plain, dict) else plain
  write_text(path, json.dumps(plain, indent=1, sort_keys=True) + '\n')


def read_json(path: Path, kind: Any = dict) -> tuple[Any, str]:
  """`(value, what is wrong)` of a JSON file; the value is None if there is no file, or something is wrong.

  kind: what the value must be, see schema.py. An object of an earlier version has no checksum, and none is asked for.
  """
  try:
    return parse_json(path.read_text(encoding='utf-8'), kind)
  except FileNotFoundError:
    return None, ''
  except UnicodeDecodeError as error:
    return None, f'not UTF-8 at byte offset {error.start}'
  except (OSError, ValueError) as error:  # ValueError: a path with a null byte
    return None, f'cannot be read ({getattr(error, "strerror", None) or error})'


def parse_json(text: str, kind: Any = dict) -> tuple[Any, str]:
  """As `read_json`, of a text."""
  try:
    value = _DECODER.decode(text)
  except (ValueError, RecursionError) as error:
    return None, f'not JSON ({error})'
  if isinstance(value, dict) and CHECKSUM in value:
    written = value.pop(CHECKSUM)
    if written != checksum(value):
      return None, 'its checksum is wrong, so some of it was changed'
  fault = schema.fault(value, kind)
  return (None, fault) if fault else (value, '')


def _refuse(name: str) -> None:
  raise ValueError(f'{name} is no number')


# `json.loads` and `json.dumps` with options would make these anew for every line of a log.
_DECODER = json.JSONDecoder(parse_constant=_refuse)
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(',', ':'), allow_nan=False)


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
  """The entries, of JSON types, and their checksum."""
  return {**value, CHECKSUM: checksum(value)}


def checksum(value: Mapping[str, Any]) -> str:
  """8 hex digits: the CRC-32 of the value as JSON, so that white space and the order of keys do not count.

  Every error of one bit, and all but one in 4e9 of others, gives another checksum.
  """
  return f'{zlib.crc32(_ENCODER.encode(value).encode()):08x}'
