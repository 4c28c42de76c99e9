"""Small atomic files."""

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
  """The file holds either its old content or all of the new one, whatever happens in between."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    with open(temporary, 'w', encoding='utf-8') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def write_json(path: Path, value: Any) -> None:
  write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + '\n')
