"""The code that makes a result, identified by the content of its files: with and without git, committed or not."""

import ast
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = Path(__file__).parent
# slm_jax has hashes of its own; launch starts arms, and cannot change what comes out.
LEFT_OUT = ('slm_jax', 'launch')


def source(package: Path = PACKAGE) -> dict[str, str]:
  """Returns `{'model': 8 hex digits, 'step': ..., ...}`: a hash for every module and subpackage of slm_jax."""
  hashes: dict[str, Any] = {}
  for path in sorted(package.rglob('*.py')):
    inside = path.relative_to(package)
    part = hashes.setdefault(inside.parts[0].removesuffix('.py'), hashlib.sha256())
    part.update(f'{inside.as_posix()}\n'.encode() + path.read_bytes())
  return {name: part.hexdigest()[:8] for name, part in hashes.items()}


def experiment_files(module: ModuleType) -> dict[str, Path]:
  """Returns the experiment's file, and all files of its project that it imports, directly or not: `{name: path}`.

  Imports are read from the text, those inside of functions included; a module that is imported by a computed name is
  not found. A name is the path below the folder from which Python imports the module. A module without a file has none.
  """
  file = getattr(module, '__file__', None)
  if not file or not Path(file).is_file():
    return {}
  spec, path = getattr(module, '__spec__', None), Path(file).resolve()
  own = path.parents[spec.name.count('.')] if spec else path.parent
  roots = list(dict.fromkeys([own, PACKAGE.resolve().parent]))
  found: dict[str, Path] = {}
  waiting = [path]
  while waiting:
    path = waiting.pop()
    root = next((root for root in roots if path.is_relative_to(root)), None)
    if root is None or (name := path.relative_to(root).as_posix()) in found:
      continue
    found[name] = path
    for imported in _imports(path, root):
      waiting += _files(imported, roots)
  return dict(sorted(found.items()))


def hash_files(files: Mapping[str, Path]) -> dict[str, str]:
  """Returns `{name: 8 hex digits}` of the files' content."""
  return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:8] for name, path in files.items()}


def digest(hashes: Mapping[str, str]) -> str:
  """Returns 12 hex digits that stand for all of the files."""
  return hashlib.sha256(repr(sorted(hashes.items())).encode()).hexdigest()[:12]


def _imports(path: Path, root: Path) -> Iterator[str]:
  """Yields the dotted names of what a file imports; of `from a import b` both a and a.b."""
  try:
    tree = ast.parse(path.read_bytes())
  except (SyntaxError, ValueError):
    return
  package = path.relative_to(root).parent.parts
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      above = package[: len(package) - node.level + 1] if node.level else ()
      base = '.'.join([*above, *([node.module] if node.module else [])])
      yield base
      yield from (f'{base}.{alias.name}' for alias in node.names)


def _files(name: str, roots: Iterable[Path]) -> list[Path]:
  """The files that an import of a dotted name runs, as far as they lie below one of the roots."""
  parts = name.split('.')
  if parts[0] in LEFT_OUT or not all(parts):
    return []
  for root in roots:
    packages = [root.joinpath(*parts[:n], '__init__.py') for n in range(1, len(parts) + 1)]
    candidates = [*packages, root.joinpath(*parts).with_suffix('.py')]
    if found := [path for path in candidates if path.is_file()]:
      return found
  return []
