"""Source strings -> documents, each with its split.

    'stories'            the grammar of stories.py
    'addition'           sums of two numbers, worked out digit by digit: addition.py
    'python_stdlib'      the source text of the running interpreter's standard library
    'file.txt'           one document; so are .md, .py, ... and each of them may end in .gz
    'file.jsonl'         one document a line, in the field data.text_field; 'file.parquet' one a row
    'folder', 'a/**/*.md'  all such files, by name
    'hf:NAME[:CONFIG]'   a data set of the Hugging Face hub, or of a local folder

Splits: files and folders that are named for a split belong to it, and test data are never read (paths.py has the
rule). Without a valid split by name, the last `valid_fraction` of the distinct texts is the valid split, or, of a
single document, of its characters. With `valid_sources`, the sources are for training whole.

A text of a valid split is never trained on, wherever else it stands: all sources drop it from their training split
(`HeldOut`). Two documents are the same text if they are equal without white space at their ends.
"""

import array
import collections
import functools
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from slm_jax.config import ConfigError, require, to_install
from slm_jax.data import addition, paths, records, stories
from slm_jax.data.config import EMBEDDED, DataConfig
from slm_jax.data.records import Document, Report
from slm_jax.files import expanded

Role = Literal['both', 'train', 'valid']  # for what a source is used
Split = Literal['train', 'valid']
SPLITS: tuple[Split, ...] = ('train', 'valid')


class Source(NamedTuple):
  """A source string that was found to mean something. Reading it is left to `read`."""

  name: str
  role: Role
  read: dict[str, Callable[[Report], Iterator[Document]]]  # 'train' and 'valid', or 'all'
  fingerprint: str  # of the content
  files: tuple[Path, ...] = ()  # that are read, if it is files
  left_out: tuple[str, ...] = ()  # 'path (why)' of files that are not read
  about_splits: str = ''  # how they were chosen, where nobody may have meant it

  @property
  def notices(self) -> list[str]:
    """What is not read, or not as one may think."""
    n = len(self.left_out)
    what = f'{self.name}: {n} {"splits" if self.name.startswith("hf:") else "files"} were left out: '
    lines = [what + records.listed(self.left_out, n)] if n else []
    return [*lines, self.about_splits] if self.about_splits else lines


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


def content_of(config: DataConfig) -> str:
  """Returns the fingerprint of data of which the first records could be read, so that a dry run finds what is wrong."""
  found = open_sources(config)
  probe(found, config)
  return fingerprint(config, found)


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
  located = paths.locate(name, key, EMBEDDED)
  splits = located.splits
  require(role == 'valid' or splits.keys() != {'valid'}, f'{key}={name!r}: all files are named for the valid split')
  readers = {split: _reader(files, config) for split, files in splits.items()}
  return Source(
    name,
    role,
    readers,
    _hash_files(splits),
    files=tuple(file for part in splits.values() for file in part),
    left_out=tuple(located.left_out),
    about_splits=located.about_splits if role == 'both' else '',
  )


def probe(found: Sequence[Source], config: DataConfig) -> None:
  """Reads the first record of each split and file, for the error it may give; of plain text, only the first file."""
  for source in found:
    for read in source.read.values():
      next(read(Report(config.errors)), None)
    for file in source.files:
      if records.kind(file) != 'text' or file.suffix == '.gz':
        next(records.read(file, config.text_field, Report(config.errors)), None)


# -------------------------------------------------------------------------------------------------------------- splits


def documents(
  source: Source, config: DataConfig, report: Report, held_out: 'HeldOut | None' = None
) -> Iterator[tuple[Split, Document]]:
  """All documents of a source, each with its split, those for training first.

  held_out: what is not trained on, of all sources of the configuration; if not given, what this source holds out.
  ConfigError if there are none, or too few to split.
  """
  held_out = HeldOut([source], config) if held_out is None else held_out
  kept: collections.Counter[Split] = collections.Counter()
  before = report.crossed

  def require_some(split: Split) -> None:
    dropped = report.crossed - before
    none = f'all training documents ({dropped}) stand in a valid split too; nothing is left to train on'
    require(kept[split] > 0, f'{source.name}: {none if dropped else f"no documents for the {split} split"}')

  for split, document in _pairs(source, config, report, held_out):
    if split == 'train' and document.text in held_out:
      report.cross(document.text)
      continue
    if split == 'valid' and source.role == 'both' and not kept['valid']:
      require_some('train')
    kept[split] += 1
    yield split, document
  for split in _wanted(source):
    require_some(split)


def _wanted(source: Source) -> tuple[Split, ...]:
  return SPLITS if source.role == 'both' else (source.role,)


def _pairs(source: Source, config: DataConfig, report: Report, held_out: 'HeldOut') -> Iterator[tuple[Split, Document]]:
  """All documents, each with the split in which it stands: duplicates too."""
  if not _is_cut(source):
    for split in _wanted(source):
      for document in _limited(_read(source, split)(report), config):
        yield split, document
    return
  start = held_out.start(source)
  for i, document in enumerate(_limited(_read(source, 'train')(report), config)):
    if start:
      yield 'train' if i < start else 'valid', document
    else:
      at = _middle(source, document, config)
      yield 'train', Document(document.text[:at])
      yield 'valid', Document(document.text[at:])


def _is_cut(source: Source) -> bool:
  """Whether its last part is the valid split, since no name says what is."""
  return source.role == 'both' and 'valid' not in source.read


def _read(source: Source, split: Split) -> Callable[[Report], Iterator[Document]]:
  return source.read.get(split) or source.read.get('all') or source.read['train']


def _middle(source: Source, document: Document, config: DataConfig) -> int:
  """Where a source's only document is cut."""
  at = int(len(document.text) * (1 - config.valid_fraction))
  require(0 < at < len(document.text), f'{source.name}: its only document is too short to be split')
  return at


class HeldOut:
  """The texts of all valid splits of a configuration, which no training split may hold. Reads them when first asked.

  It keeps 8 bytes for each document of a source that is to be cut, and an integer for each text that is held out.
  """

  def __init__(self, found: Sequence[Source], config: DataConfig):
    self._sources, self._config = [source for source in found if source.role != 'train'], config

  @property
  def fingerprint(self) -> str:
    """What decides which texts are held out, beside the settings of the configuration."""
    return digest([(source.role, source.fingerprint) for source in self._sources])

  def __contains__(self, text: str) -> bool:
    return text_key(text) in self._found[0]

  def start(self, source: Source) -> int:
    """How many documents of a source come before its valid part; 0 if its only document is cut."""
    return self._found[1][source.fingerprint]

  @functools.cached_property
  def _found(self) -> tuple[set[int], dict[str, int]]:
    keys: set[int] = set()
    starts: dict[str, int] = {}
    for source in self._sources:
      own, document = array.array('Q'), Document('')
      for document in _limited(_read(source, 'valid')(Report(self._config.errors)), self._config):
        own.append(text_key(document.text))
      if _is_cut(source):
        require(len(own) > 0, f'{source.name}: no documents')
        if len(own) == 1:
          tail = document.text[_middle(source, document, self._config) :]
          own = (
            array.array('Q', [text_key(tail), *own]) if tail.strip() else own[:0]
          )  # another source may have it whole
          starts[source.fingerprint] = 0
        else:
          starts[source.fingerprint] = _start(source, np.frombuffer(own, np.uint64), self._config)
          own = own[starts[source.fingerprint] :]
      keys.update(own)
    return keys, starts


def text_key(text: str) -> int:
  """64 bits of BLAKE2b; equal for texts that are equal without white space at their ends."""
  return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), 'little')


def _start(source: Source, keys: np.ndarray, config: DataConfig) -> int:
  """Where the last `valid_fraction` of the distinct texts begins; each counts where it stands last."""
  last = len(keys) - 1 - np.unique(keys[::-1], return_index=True)[1]
  n = len(last)
  train = n - max(1, round(n * config.valid_fraction))
  what = f'{n} documents' if n == len(keys) else f'{len(keys)} documents, of which {n} differ,'
  require(train > 0, f'{source.name}: {what} with data.valid_fraction={config.valid_fraction} leave none to train on')
  return int(np.sort(last)[train])


def _limited(found: Iterator[Document], config: DataConfig) -> Iterator[Document]:
  return islice(found, config.documents) if config.documents else found


# ---------------------------------------------------------------------------------------------------------------- files


def _reader(files: list[Path], config: DataConfig) -> Callable[[Report], Iterator[Document]]:
  def read(report: Report) -> Iterator[Document]:
    for file in files:
      yield from records.read(file, config.text_field, report)

  return read


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
  parts = {'valid' if split in ('valid', 'validation', 'val', 'dev') else split: part for split, part in found.items()}
  require('train' in parts, f'{key}={name!r}: no train split; there is: {", ".join(found)}')
  left_out = tuple(sorted(set(parts).difference(SPLITS)))
  parts = {split: parts[split] for split in SPLITS if split in parts}
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
  return Source(name, role, {split: reader(split) for split in parts}, digest([name, prints]), left_out=left_out)
