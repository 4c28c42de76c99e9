"""Which code this is, by what its files hold: with and without git, committed or not."""

import hashlib
from pathlib import Path
from typing import Any


def source(package: Path = Path(__file__).parent) -> dict[str, str]:
  """`{'model': 8 hex digits, 'step': ..., ...}`: a hash of every module and subpackage, over the text of its files."""
  hashes: dict[str, Any] = {}
  for path in sorted(package.rglob('*.py')):
    inside = path.relative_to(package)
    part = hashes.setdefault(inside.parts[0].removesuffix('.py'), hashlib.sha256())
    part.update(f'{inside.as_posix()}\n'.encode() + path.read_bytes())
  return {name: part.hexdigest()[:8] for name, part in hashes.items()}
