"""Packed token sequences on disk: an ArrayRecord file a split, written once, keyed by all that matters to its content.

A record is 2 (L + 1) little-endian numbers: the tokens (uint16, or uint32 for a large vocabulary), then the segment ids
with their flags (uint16). See packing.py for what they mean, and folder.py for how a store is kept whole.
"""

import collections
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Required, TypedDict

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from slm_jax.config import ConfigError, require
from slm_jax.data import folder, packing, sources
from slm_jax.data.config import DataConfig
from slm_jax.data.folder import MANIFEST
from slm_jax.data.packing import Piece
from slm_jax.data.records import LISTED, Document, Report
from slm_jax.data.sources import Source
from slm_jax.data.tokenizer import Tokenizer

FORMAT = 1  # of the files; part of the key
_OPTIONS = 'group_size:1,zstd'  # one record a chunk, for random access
_PACK = {'split': packing.split, 'whole': packing.whole, 'single': packing.single}
_SAID = {'bad': 'bad records were skipped or mended', 'left_out': 'files were left out'}


class _Split(TypedDict, total=False):
  records: Required[int]
  predicted: Required[int]
  bytes: int  # and what the floor of a known entropy needs:
  nats: list[float]
  predicted_each: list[int]


class _Places(TypedDict):
  count: int
  places: list[str]


class Manifest(folder.Manifest):
  key: dict[str, Any]
  source: str
  wide: bool
  splits: dict[str, _Split]


class _OfSource(Manifest):
  bad: _Places
  left_out: _Places


class Records:
  """The sequences of one split, by index: uint32 [2, L + 1], tokens and segment ids. Threads may share it.

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
      return np.stack([tokens, np.frombuffer(data[cut:], '<u2')]).astype(np.uint32)
    except ValueError as error:
      raise ConfigError(
        f'{self.path}: record {index} has {len(data)} bytes, expected {cut + 2 * self.length + 2}'
      ) from error


class Store(NamedTuple):
  """A source's sequences."""

  source: str
  path: Path
  manifest: dict[str, Any]

  def records(self, split: str) -> Records:
    """The sequences of 'train' or 'valid'; KeyError if the source has none."""
    self.manifest['splits'][split]
    return Records(self.path / f'{split}.array_record', self.manifest['key']['seq_len'], self.manifest['wide'])


def open_store(
  source: Source, config: DataConfig, tokenizer: Tokenizer, cache: Path, log: Callable[[str], None]
) -> Store:
  """The source's store in the folder `cache`, built first if it is missing or damaged. Bad input is logged."""
  key = {
    'format': FORMAT,
    'content': source.fingerprint,
    'role': source.role,
    'tokenizer': tokenizer.fingerprint,
    **{
      name: getattr(config, name)
      for name in ('seq_len', 'packing', 'prompt_end', 'errors', 'text_field', 'documents', 'valid_fraction')
    },
  }
  path = cache / f'tokens-{sources.digest(key)}'
  manifest = folder.open_or_build(path, functools.partial(_build, source, config, tokenizer, key), log, _OfSource)
  for what in ('bad', 'left_out'):
    count, places = manifest[what]['count'], manifest[what]['places']
    if count:
      log(
        f'{source.name}: {count} {_SAID[what]}: {"; ".join(places[:3])}{"; ..." * (count > 3)}; see {path / MANIFEST}'
      )
  return Store(source.name, path, manifest)


def _build(source: Source, config: DataConfig, tokenizer: Tokenizer, key: dict[str, Any], path: Path) -> dict[str, Any]:
  report = Report(config.errors)
  wide = tokenizer.vocab_size > 1 << 16
  splits = {  # one pass over the source; its splits come one after the other
    split: _write(path / f'{split}.array_record', (document for _, document in pairs), config, tokenizer, wide)
    for split, pairs in itertools.groupby(sources.documents(source, config, report), key=operator.itemgetter(0))
  }
  return {
    'key': key,
    'source': source.name,
    'wide': wide,
    'splits': splits,
    'bad': {'count': report.count, 'places': report.places},
    'left_out': {'count': len(report.left_out), 'places': list(report.left_out)[:LISTED]},
    'versions': {name: version(name) for name in ('array_record', 'sentencepiece', 'numpy')},
  }


def _write(
  path: Path, documents: Iterable[Document], config: DataConfig, tokenizer: Tokenizer, wide: bool
) -> dict[str, Any]:
  """Writes one split; returns what there is to know about it."""
  counts: collections.Counter[str] = collections.Counter()  # bytes: of the predicted tokens
  marker = _prompt_end(config, tokenizer)

  def pieces() -> Iterator[Piece]:
    for document in documents:
      text = tokenizer.encode(document.text)
      tokens = np.array([tokenizer.bos, *text, tokenizer.eos], np.uint32)
      counts.update(documents=1, tokens=len(tokens))
      if marker is None:
        counts.update(bytes=len(document.text.encode()))
        yield Piece(tokens, document.nats)
        continue
      start = document.text[:40]
      require(marker in text, f'data.prompt_end={config.prompt_end!r}: not a token of the document {start!r}')
      prompt = text.index(marker) + 2
      counts.update(bytes=int(tokenizer.byte_lengths[text[prompt - 1 :]].sum()))
      yield Piece(tokens, None, prompt)

  written = write(path, pieces(), config, tokenizer.pad, wide)
  return {**counts, **written}


def write(path: Path, pieces: Iterable[Piece], config: DataConfig, pad: int, wide: bool) -> dict[str, Any]:
  """Packs documents into the records of a split."""
  writer = ArrayRecordWriter(str(path), _OPTIONS)
  predicted, padding, nats = [], 0, []
  for record in _PACK[config.packing](pieces, config.seq_len, pad):
    padding += int((record.segments == 0).sum())
    writer.write(record.tokens.astype('<u4' if wide else '<u2').tobytes() + record.segments.astype('<u2').tobytes())
    predicted.append(int(packing.mask(record.segments).sum()))
    nats.append(record.nats)
  writer.close()
  known = {'nats': nats, 'predicted_each': predicted} if None not in nats else {}
  share = padding / (len(predicted) * (config.seq_len + 1))
  return {'records': len(predicted), 'predicted': sum(predicted), 'padding': share, **known}


def _prompt_end(config: DataConfig, tokenizer: Tokenizer) -> int | None:
  """The token after which a document's prompt is over; None without prompts."""
  if not config.prompt_end:
    return None
  tokens = tokenizer.encode(config.prompt_end)
  require(len(tokens) == 1, f'data.prompt_end={config.prompt_end!r}: must be one token, and is {len(tokens)}')
  return tokens[0]
