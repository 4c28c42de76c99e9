"""A source's text on disk: packed token sequences to train on, and the texts of its valid split (valid.py).

Each split is an ArrayRecord file, written once, keyed by all that matters to its content. A record to train on is
2 (L + 1) little-endian numbers: the tokens (uint16, or uint32 for a large vocabulary), then the segment ids with their
flags (uint32). See packing.py for what they mean, and folder.py for how a store is kept whole.
"""

import collections
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from slm_jax.config import ConfigError
from slm_jax.data import folder, packing, sources, valid
from slm_jax.data.config import DataConfig
from slm_jax.data.folder import MANIFEST
from slm_jax.data.packing import Piece
from slm_jax.data.records import LISTED, Document, Report, listed
from slm_jax.data.sources import HeldOut, Source
from slm_jax.data.tokenizer import Tokenizer
from slm_jax.data.valid import Part, Parts, bytes_of, piece_of

FORMAT = 2  # of the files; part of the key
_PACK = {'split': packing.split, 'whole': packing.whole, 'single': packing.single}
_SAID = {
  'empty': 'files are empty',
  'bad': 'bad records were skipped or mended',
  'crossing': 'training documents were left out, since the valid split holds the same text',
}


class _Train(TypedDict):
  documents: int
  records: int
  predicted: int
  bytes: int
  wide: bool


class _Valid(TypedDict):
  documents: int
  bytes: int


class _Splits(TypedDict, total=False):
  train: _Train
  valid: _Valid


class _Places(TypedDict):
  count: int
  places: list[str]


class Manifest(folder.Manifest):
  key: dict[str, Any]
  source: str
  splits: _Splits


class _OfSource(Manifest):
  bad: _Places
  empty: _Places
  crossing: _Places


class Records:
  """The sequences of a training split, by index: uint32 [2, L + 1], tokens and segment ids. Threads may share it.

  A damaged record is a ConfigError that names file and record.
  """

  def __init__(self, path: Path, length: int, wide: bool):
    self.path, self.length = path, length
    self._token = np.dtype('<u4' if wide else '<u2')
    self._source = ArrayRecordDataSource(str(path))

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> np.ndarray:
    if not 0 <= index < len(self):
      raise IndexError(f'{self.path}: record {index} of {len(self)}')
    try:
      data = self._source[index]
    except (RuntimeError, OSError) as error:
      raise ConfigError(f'{self.path}: record {index} cannot be read: {error}') from error
    cut = (self.length + 1) * self._token.itemsize
    try:
      tokens = np.frombuffer(data[:cut], self._token)
      return np.stack([tokens, np.frombuffer(data[cut:], '<u4')]).astype(np.uint32)
    except ValueError as error:
      raise ConfigError(
        f'{self.path}: record {index} has {len(data)} bytes, expected {cut + 4 * self.length + 4}'
      ) from error


class Store(NamedTuple):
  """A source's text."""

  source: str
  path: Path
  manifest: dict[str, Any]

  def has(self, split: str) -> bool:
    return split in self.manifest['splits']

  def train(self) -> Records:
    """The sequences to train on."""
    wide = self.manifest['splits']['train']['wide']
    return Records(self.path / 'train.array_record', self.manifest['key']['seq_len'], wide)

  def valid(self) -> tuple[Parts, int]:
    """The texts that are held out, and their bytes."""
    return Parts(self.path / 'valid.array_record'), self.manifest['splits']['valid']['bytes']

  @property
  def notices(self) -> list[str]:
    """What was not read as it came; the same at every opening."""
    lines = []
    for what, said in _SAID.items():
      found = self.manifest.get(what, {'count': 0})
      if found['count']:
        places = listed(found['places'], found['count'])
        lines.append(f'{self.source}: {found["count"]} {said}: {places}; see {self.path / MANIFEST}')
    if fault := folder.rebuilt(self.manifest):
      lines.append(f'{self.source}: {self.path} was damaged ({fault}), and built again')
    return lines


def open_store(
  source: Source,
  config: DataConfig,
  tokenizer: Tokenizer,
  cache: Path,
  log: Callable[[str], None],
  held_out: HeldOut | None = None,
) -> Store:
  """The source's store in the folder `cache`, built first if it is missing or damaged.

  held_out: of all sources of the configuration; if not given, of this one.
  """
  held_out = HeldOut([source], config) if held_out is None else held_out
  key = {
    'format': FORMAT,
    'content': source.fingerprint,
    'role': source.role,
    'held_out': held_out.fingerprint if source.role != 'valid' else '',
    'tokenizer': tokenizer.fingerprint,
    **{
      name: getattr(config, name)
      for name in ('seq_len', 'packing', 'prompt_end', 'errors', 'text_field', 'documents', 'valid_fraction')
    },
  }
  path = cache / f'tokens-{sources.digest(key)}'
  build = functools.partial(_build, source, config, tokenizer, held_out, key)
  return Store(source.name, path, folder.open_or_build(path, build, log, _OfSource))


def _build(
  source: Source, config: DataConfig, tokenizer: Tokenizer, held_out: HeldOut, key: dict[str, Any], path: Path
) -> dict[str, Any]:
  report = Report(config.errors)
  found = sources.documents(source, config, report, held_out)
  splits = {  # one pass over the source; its splits come one after the other
    split: _WRITE[split](path / f'{split}.array_record', (document for _, document in pairs), config, tokenizer)
    for split, pairs in itertools.groupby(found, key=operator.itemgetter(0))
  }
  return {
    'key': key,
    'source': source.name,
    'splits': splits,
    'bad': {'count': report.count, 'places': report.places},
    'empty': {'count': len(report.empty), 'places': list(report.empty)[:LISTED]},
    'crossing': {'count': report.crossed, 'places': list(report.crossing)},
    'versions': {name: version(name) for name in ('array_record', 'sentencepiece', 'numpy')},
  }


def _write(path: Path, documents: Iterable[Document], config: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
  """Writes the training split; returns what there is to know about it."""
  pieces = (piece_of(Part(document.text), config, tokenizer) for document in documents)
  return write(path, pieces, config, tokenizer)


_WRITE = {'train': _write, 'valid': valid.write}


def write(path: Path, pieces: Iterable[Piece], config: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
  """Packs documents into the records of a training split; returns what there is to know about it."""
  counts: collections.Counter[str] = collections.Counter()  # bytes: of the predicted tokens

  def counted() -> Iterator[Piece]:
    for piece in pieces:
      counts.update(documents=1, tokens=len(piece.tokens), bytes=bytes_of(piece, tokenizer))
      yield piece

  writer = ArrayRecordWriter(str(path), valid.OPTIONS)
  wide, padding = tokenizer.vocab_size > 1 << 16, 0
  for record in _PACK[config.packing](counted(), config.seq_len, tokenizer.pad):
    padding += int((record.segments == 0).sum())
    writer.write(record.tokens.astype('<u4' if wide else '<u2').tobytes() + record.segments.astype('<u4').tobytes())
    counts.update(records=1, predicted=int(packing.mask(record.segments).sum()))
  writer.close()
  return {**counts, 'padding': padding / (counts['records'] * (config.seq_len + 1)), 'wide': wide}
