"""Source strings -> documents, each with its split.

    'stories'            the grammar of stories.py
    'addition'           sums of two numbers, worked out digit by digit: addition.py
    'python_stdlib'      the source text of the running interpreter's standard library
    'file.txt'           one document; so are .md, .py, ... and each of them may end in .gz
    'file.jsonl'         one document a line, in the field data.text_field; 'file.parquet' one a row
    'folder', 'a/**/*.md'  all such files, by name
    'hf:NAME[:CONFIG]'   a data set of the Hugging Face hub, or of a local folder

Splits: where one of the files (or a hub's splits) is named train*, it and those named valid* and test* are what they
say, and other files are left out. Otherwise the last `valid_fraction` of the documents is the valid split, or, of a
single document, of its characters. With `valid_sources`, the sources are for training whole.
"""

import difflib
import glob
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from slm_jax.config import ConfigError, require, to_install
from slm_jax.data import addition, records, stories
from slm_jax.data.config import DataConfig
from slm_jax.data.records import Document, Report
from slm_jax.files import expanded

Role = Literal['both', 'train', 'valid']  # for what a source is used
Split = Literal['train', 'valid']
EMBEDDED = ('stories', 'addition', 'python_stdlib')

_SPLIT = re.compile(r'(train|valid|val|dev|test)(?:ing|ation)?(?![a-z])')


class Source(NamedTuple):
  """A source string that was found to mean something. Reading it is left to `read`."""

  name: str
  role: Role
  read: dict[str, Callable[[Report], Iterator[Document]]]  # 'train' and 'valid', or 'all'
  fingerprint: str  # of the content


def open_sources(config: DataConfig) -> list[Source]:
  """The sources of a configuration, those for training first. ConfigError for one that does not exist."""
  train: Role = 'train' if config.valid_sources else 'both'
  return [_open(name, train, config, 'data.sources') for name in config.sources] + [
    _open(name, 'valid', config, 'data.valid_sources') for name in config.valid_sources
  ]


def fingerprint(config: DataConfig, found: list[Source] | None = None) -> str:
  """16 hex digits that say what the sources and the tokenizer's file hold, not where they are: `config.content`.

  found: `open_sources(config)`, if that is known already.
  """
  its_tokenizer = _hash_file(expanded(config.tokenizer_file)) if config.tokenizer_file else ''
  found = open_sources(config) if found is None else found
  return digest([its_tokenizer, [(source.role, source.fingerprint) for source in found]])


def digest(value: Any) -> str:
  """16 hex digits of SHA-256 over the value's JSON."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _open(name: str, role: Role, config: DataConfig, key: str) -> Source:
  if name in _DRAWN:
    return Source(name, role, _drawn(name, role, config), _DRAWN[name][1]())
  if name == 'python_stdlib':
    files = stdlib_files()
    return Source(name, role, {'all': _reader(files, config)}, _hash_files({'all': files}))
  if name.startswith('hf:'):
    return _hub(name, role, config, key)
  splits, left_out = _find(name, key)
  readers = {split: _reader(files, config, left_out) for split, files in splits.items()}
  return Source(name, role, readers, _hash_files(splits))


# -------------------------------------------------------------------------------------------------------------- splits


def documents(source: Source, config: DataConfig, report: Report) -> Iterator[tuple[Split, Document]]:
  """All documents of a source, each with its split. ConfigError if there are none, or too few to split.

  A source without named splits is read twice: once to count.
  """
  if source.role == 'both' and 'valid' not in source.read:
    yield from _last_part(source, config, report)
    return
  for split in ('train', 'valid') if source.role == 'both' else (source.role,):
    read = source.read.get(split) or source.read.get('all') or source.read['train']
    found = False
    for document in _limited(read(report), config):
      found = True
      yield split, document
    require(found, f'{source.name}: no documents for the {split} split')


def _last_part(source: Source, config: DataConfig, report: Report) -> Iterator[tuple[Split, Document]]:
  read = source.read.get('all') or source.read['train']
  n = sum(1 for _ in _limited(read(Report(report.errors)), config))
  require(n > 0, f'{source.name}: no documents')
  if n == 1:
    (document,) = _limited(read(report), config)
    at = int(len(document.text) * (1 - config.valid_fraction))
    require(0 < at < len(document.text), f'{source.name}: its only document is too short to be split')
    yield 'train', Document(document.text[:at])
    yield 'valid', Document(document.text[at:])
    return
  train = n - max(1, round(n * config.valid_fraction))
  require(
    train > 0, f'{source.name}: {n} documents with data.valid_fraction={config.valid_fraction} leave none to train on'
  )
  for i, document in enumerate(_limited(read(report), config)):
    yield 'train' if i < train else 'valid', document


def _limited(found: Iterator[Document], config: DataConfig) -> Iterator[Document]:
  return islice(found, config.documents) if config.documents else found


# ---------------------------------------------------------------------------------------------------------------- files


def _reader(
  files: list[Path], config: DataConfig, left_out: Sequence[str] = ()
) -> Callable[[Report], Iterator[Document]]:
  def read(report: Report) -> Iterator[Document]:
    report.left_out |= dict.fromkeys(left_out)
    for file in files:
      yield from records.read(file, config.text_field, report)

  return read


def _find(name: str, key: str) -> tuple[dict[str, list[Path]], list[str]]:
  """The files of a path, folder or glob by split ('all' without named ones), and those that are left out."""
  path = expanded(name)
  if path.is_file():
    kinds = ', '.join(sorted(records.TEXT | records.LINES | records.TABLE))
    require(bool(records.kind(path)), f'{key}={name!r}: cannot tell what a {path.suffix!r} file holds; known: {kinds}')
    return {'all': [path]}, []
  if path.is_dir():
    found = [p for p in sorted(path.rglob('*')) if not any(s.startswith('.') for s in p.relative_to(path).parts)]
  else:
    found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
  found = [p for p in found if p.is_file()]
  require(bool(found) or not path.is_dir(), f'{key}={name!r}: an empty folder')
  if not found:
    close = difflib.get_close_matches(name, EMBEDDED, 1)
    hint = f'did you mean {close[0]!r}? ' if close else ''
    raise ConfigError(f'{key}={name!r}: no such file; {hint}a path, folder, glob, hf:NAME, or {" or ".join(EMBEDDED)}')
  known = [p for p in found if records.kind(p)]
  require(
    bool(known), f'{key}={name!r}: {len(found)} files, but none that we can read, such as .txt, .jsonl or .parquet'
  )
  splits = _named_splits(known) or {'all': known}
  used = {p for files in splits.values() for p in files}
  return {k: v for k, v in splits.items() if k != 'test'}, [str(p) for p in found if p not in used]


def _named_splits(files: list[Path]) -> dict[str, list[Path]]:
  """{'train': files, 'valid': files, 'test': files} by name; empty unless there are files named train."""
  splits: dict[str, list[Path]] = {}
  for file in files:
    if match := _SPLIT.match(file.name.lower()):
      name = {'val': 'valid', 'dev': 'valid'}.get(match[1], match[1])
      splits.setdefault(name, []).append(file)
  return splits if 'train' in splits else {}


def _hash_files(splits: dict[str, list[Path]]) -> str:
  return digest(
    [(split, records.kind(path), _hash_file(path)) for split, files in sorted(splits.items()) for path in files]
  )


def _hash_file(path: Path) -> str:
  try:
    with open(path, 'rb') as file:
      return hashlib.file_digest(file, 'sha256').hexdigest()
  except OSError as error:
    raise ConfigError(f'{path}: cannot be read: {error.strerror}') from error


# ------------------------------------------------------------------------------------------------ embedded, and the hub


_DRAWN: dict[str, tuple[Callable[[int, str], Iterator[Document]], Callable[[], str]]] = {  # documents, fingerprint
  'stories': (
    lambda n, split: (Document(text, nats) for text, nats in stories.documents(n, f'stories {split}')),
    stories.fingerprint,
  ),
  'addition': (lambda n, split: map(Document, addition.documents(n, split)), addition.fingerprint),
}
DOCUMENTS = 20_000  # that are drawn, if the configuration does not say


def _drawn(name: str, role: Role, config: DataConfig) -> dict[str, Callable[[Report], Iterator[Document]]]:
  """Documents that are drawn anew for each split; stories with their exact nats."""
  n = config.documents or DOCUMENTS
  held_out = max(1, round(n * config.valid_fraction))
  sizes = {'train': n - held_out, 'valid': held_out} if role == 'both' else {role: n}
  require(all(sizes.values()), f'data.documents={config.documents}: too few {name} to split')

  def reader(split: str, size: int) -> Callable[[Report], Iterator[Document]]:
    return lambda report: _DRAWN[name][0](size, split)

  return {split: reader(split, size) for split, size in sizes.items()}


_NO_SOURCE = re.compile(  # tests, tables of data, what the build left, other projects
  r'test|tests|idle_test|idlelib|lib2to3|turtledemo|encodings|pydoc_data|site-packages|dist-packages|_bundled|config-.*'
  r'|_sysconfigdata.*'
)


def stdlib_files() -> list[Path]:
  """The standard library's modules, in the order of a hash of their names: any part is a fair sample."""
  root = Path(sysconfig.get_paths()['stdlib'])
  names: list[str] = []
  for folder, folders, files in os.walk(root):
    folders[:] = [name for name in folders if not _NO_SOURCE.fullmatch(name)]
    names += [
      Path(folder, name).relative_to(root).as_posix()
      for name in files
      if name.endswith('.py') and not _NO_SOURCE.fullmatch(name)
    ]
  return [root / name for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())]


def _hub(name: str, role: Role, config: DataConfig, key: str) -> Source:
  try:
    import datasets
  except ImportError:
    raise ConfigError(f'{key}={name!r}: needs the package datasets; {to_install("hf")}') from None
  path, _, subset = name.removeprefix('hf:').partition(':')
  require(bool(path), f'{key}={name!r}: expected hf:NAME or hf:NAME:CONFIG')
  try:
    found = datasets.load_dataset(path, subset or None)
  except Exception as error:  # whatever the hub, the network or a builder says
    raise ConfigError(f'{key}={name!r}: {" ".join(repr(error).split())[:300]}') from error
  parts = {'valid' if split in ('valid', 'validation', 'dev') else split: part for split, part in found.items()}
  require('train' in parts, f'{key}={name!r}: no train split; there is: {", ".join(found)}')
  parts = {split: parts[split] for split in ('train', 'valid') if split in parts}
  field = config.text_field
  columns = parts['train'].column_names
  require(field in columns, f'{key}={name!r}: no column data.text_field={field!r}; there is: {", ".join(columns)}')

  def reader(split: str) -> Callable[[Report], Iterator[Document]]:
    def read(report: Report) -> Iterator[Document]:
      number = 0
      for table in parts[split].select_columns([field]).with_format('arrow').iter(batch_size=1000):
        for value in (value for chunk in table.column(field).chunks for value in records.entries(chunk)):
          number += 1
          yield from records.check(value, f'column {field!r}', f'{name}/{split}:{number}', report)

    return read

  prints = [(split, part._fingerprint) for split, part in parts.items()]
  return Source(name, role, {split: reader(split) for split in parts}, digest([name, prints]))
