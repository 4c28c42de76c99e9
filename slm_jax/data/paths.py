"""A path, a folder or a glob -> the files that are read, each with its split, and the others with the reason.

Splits go by names. A name that begins with train, valid(ation), val, dev or test, in any case, belongs to that split
unless a letter follows: 'train-00001.jsonl', 'Validation', 'test_published.jsonl', but not 'tests' or 'developers.txt'.
The names of all folders below the given one count, and the file's own unless it is a program: test_utils.py is text
like any other. Of the names in one path, test goes before valid, and valid before train.

    some names say train        those files are for training; files without a split are left out
    none says train             only a split's word alone or with a number counts: 'validation', 'test-00001', and not
                                'valid_names.txt'; what is neither valid nor test is for training

What is named test is never read, unless the source is that very file or folder. Names that begin with a dot are not
looked at. Symbolic links are followed, and no file is read twice in one split.
"""

import difflib
import fnmatch
import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from slm_jax.config import ConfigError, require
from slm_jax.data import records
from slm_jax.files import expanded

_WORD = r'(train|valid|val|dev|test)(?:ing|ation)?'
_BEGINS = re.compile(rf'{_WORD}(?![a-z])')
_ALONE = re.compile(rf'{_WORD}(?:of|[^a-z])*\Z')  # 'test', 'test2', 'test-00000-of-00002'


class Located(NamedTuple):
  """What a source string stands for."""

  splits: dict[str, list[Path]]  # 'train' and 'valid' where names say so, else 'all'
  left_out: list[str] = []  # 'path (why)'
  about_splits: str = ''  # how they were chosen, where nobody may have meant it


def locate(name: str, key: str, embedded: Iterable[str]) -> Located:
  """The files of a path, folder or glob. ConfigError if there are none that can be read.

  embedded: names of other sources, one of which may be meant.
  """
  path = expanded(name)
  if path.is_file():
    kinds = ', '.join(sorted(records.TEXT | records.LINES | records.TABLE))
    require(bool(records.kind(path)), f'{key}={name!r}: cannot tell what a {path.suffix!r} file holds; known: {kinds}')
    return Located({'all': [path]})
  root = path if path.is_dir() else _fixed_part(path)
  found, left_out = _below(root) if path.is_dir() else _matches(path, root)
  require(bool(found or left_out) or not path.is_dir(), f'{key}={name!r}: an empty folder')
  if not found and not left_out:
    close = difflib.get_close_matches(name, embedded, 1)
    hint = f'did you mean {close[0]!r}? ' if close else ''
    raise ConfigError(f'{key}={name!r}: no such file; {hint}a path, folder, glob, hf:NAME, or {" or ".join(embedded)}')
  known = [p for p in found if records.kind(p)]
  left_out += [f'{p} (not a file of text)' for p in found if not records.kind(p)]
  require(
    bool(known), f'{key}={name!r}: {len(left_out)} files, but none that we can read, such as .txt, .jsonl or .parquet'
  )
  names = {p: p.relative_to(root).parts for p in known}
  splits = named_splits(names)
  left_out += [f'{p} (named test)' for p in splits.pop('test', [])]
  left_out += [f'{p} (its name says no split, and others say train)' for p in splits.pop('', [])]
  require(bool(splits), f'{key}={name!r}: all {len(known)} files are named test; to read them, name them themselves')
  once = {split: _once(files) for split, files in splits.items()}
  left_out += [f'{p} (the same file as another)' for split in splits for p in splits[split] if p not in once[split]]
  implied = splits.keys() == {'train', 'valid'} and 'train' not in map(split_of, names.values())
  return Located(once, left_out, _implied(name, **once) if implied else '')


def _implied(name: str, train: list[Path], valid: list[Path]) -> str:
  shown = records.listed(list(map(str, valid)), len(valid))
  return f'{name}: {len(valid)} of {len(train) + len(valid)} files are the valid split, by their names: {shown}'


# ---------------------------------------------------------------------------------------------------------- the splits


def named_splits(files: dict[Path, tuple[str, ...]]) -> dict[str, list[Path]]:
  """{split: files} by the names in their relative paths; see the module. {'all': files} if none says train or valid.

  Beside 'train' and 'valid', 'test' has what must not be read, and '' what is left out.
  """
  names = {file: split_of(parts, _BEGINS) for file, parts in files.items()}
  if 'train' not in names.values():
    names = {file: split_of(parts, _ALONE) or 'train' for file, parts in files.items()}
    if 'valid' not in names.values():
      names = {file: {'train': 'all'}.get(split, split) for file, split in names.items()}
  return {split: [file for file in files if names[file] == split] for split in dict.fromkeys(names.values())}


def split_of(parts: tuple[str, ...], pattern: re.Pattern[str] = _BEGINS) -> str:
  """'train', 'valid' or 'test' by the names of a path's parts; '' if none of them says one."""
  *folders, file = parts
  words = [*folders, *([] if records.suffix_of(Path(file)) in records.PROGRAM else [file.partition('.')[0]])]
  found = {match[1] for match in (pattern.match(word.lower()) for word in words) if match}
  said = {'val': 'valid', 'dev': 'valid'}
  splits = {said.get(word, word) for word in found}
  return next((split for split in ('test', 'valid', 'train') if split in splits), '')


# ----------------------------------------------------------------------------------------------------------- the files


def _below(root: Path, hidden: bool = False) -> tuple[list[Path], list[str]]:
  """The files below a folder, in order, and what is left out: links that lead nowhere, or to what is read already.

  Folders that are links are walked last, so that a folder is read by its own path rather than by a link to it.
  hidden: whether names that begin with a dot are looked at.
  """
  files: list[Path] = []
  left_out: list[str] = []
  seen: set[str] = set()
  waiting = [str(root)]
  while waiting:
    start = waiting.pop(0)
    if os.path.realpath(start) in seen:
      left_out.append(f'{start} (a link to a folder that is read already)')
      continue
    for folder, folders, names in os.walk(start, onerror=_refuse):
      seen.add(os.path.realpath(folder))
      folders[:] = sorted(name for name in folders if hidden or name[0] != '.')
      links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
      waiting += [os.path.join(folder, name) for name in links]
      folders[:] = [
        name for name in folders if name not in links and os.path.realpath(os.path.join(folder, name)) not in seen
      ]
      files += [Path(folder, name) for name in names if hidden or name[0] != '.']
  good = [path for path in files if path.is_file()]
  left_out += [f'{path} ({_fault(path)})' for path in sorted(set(files) - set(good))]
  return sorted(good), left_out


def _matches(pattern: Path, root: Path) -> tuple[list[Path], list[str]]:
  """The files that a glob means, in order, and what is left out.

  `**` goes through `_below`: glob.glob follows links there without end, and several that form cycles take for ever.
  """
  parts = pattern.relative_to(root).parts
  if '**' not in parts:
    found = [Path(p) for p in sorted(glob.glob(str(pattern)))]
    return [p for p in found if p.is_file()], [f'{p} ({_fault(p)})' for p in found if not p.exists()]
  files, left_out = _below(root, hidden=any(part[0] == '.' for part in parts))
  return sorted((p for p in files if _fits(p.relative_to(root).parts, parts)), key=str), left_out


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
  """Whether a path matches a glob; a wildcard stands for no name that begins with a dot."""
  if not pattern or not parts:
    return not pattern and not parts
  if pattern[0] == '**':
    free = next((i for i, part in enumerate(parts) if part[0] == '.'), len(parts))  # so many may be skipped
    last = all(part == '**' for part in pattern)  # which then stands for the file too
    return free == len(parts) if last else any(_fits(parts[i:], pattern[1:]) for i in range(free + 1))
  same = fnmatch.fnmatchcase(parts[0], pattern[0]) and (parts[0][0] != '.' or pattern[0][0] == '.')
  return same and _fits(parts[1:], pattern[1:])


def _once(files: list[Path]) -> list[Path]:
  """The files without those that are another one by another path: the path with the fewest parts stays."""
  by_place: dict[str, Path] = {}
  for path in sorted(files, key=lambda p: (p.is_symlink(), len(p.parts), p)):
    by_place.setdefault(os.path.realpath(path), path)
  stay = set(by_place.values())
  return [path for path in files if path in stay]


def _fixed_part(pattern: Path) -> Path:
  """The folders of a glob before the first part with a wildcard: names below them may say a split."""
  parts = pattern.parts
  wild = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
  return Path(*parts[:wild])


def _fault(path: Path) -> str:
  return 'a link to what does not exist' if path.is_symlink() else 'not a file'


def _refuse(error: OSError) -> None:
  raise ConfigError(f'{error.filename}: cannot be read: {error.strerror}') from error
