"""The valid split: the text that arms are evaluated on, which is the same whatever their tokens are.

An evaluation takes whole documents, at even distances, that hold about as many bytes as it was asked for. They are
packed as `packing.whole` does it. So each tokenizer, sequence length and packing of the training text predicts exactly
the same bytes, and the end of each document; what differs is how much of a document stands before a token.

A document of more than LONG characters is kept in parts of about so many, which end before white space. An evaluation
may take some of them. What a part predicts first is told the last token before it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from slm_jax.config import ConfigError, require
from slm_jax.data import packing
from slm_jax.data.config import DataConfig
from slm_jax.data.packing import Piece, Sequences, spread
from slm_jax.data.records import Document
from slm_jax.data.tokenizer import Tokenizer

OPTIONS = 'group_size:1,zstd'  # one record a chunk, for random access
LONG = 8192  # characters of a part
BEFORE = 64  # characters that a part knows of what stands before it: enough for the last token


class Part(NamedTuple):
  """A document, or a part of a long one."""

  text: str
  before: str = ''  # the end of the part before it; '' where its document begins
  ends: bool = True  # whether its document ends here
  nats: float | None = None  # exact -log p of a whole document, if known


class Packed(NamedTuple):
  """The sequences of an evaluation."""

  sequences: Sequences  # [2, seq_len + 1]
  tokens: int  # that are predicted
  bytes: int  # of their text
  floor: float | None  # its exact entropy in nats per predicted token; None unless the sources know p(text)
  digest: str  # 16 hex digits: of the text, and of where its prompts end


class Parts:
  """What is stored of a valid split, by index. A damaged record is a ConfigError that names file and record."""

  def __init__(self, path: Path):
    self.path, self._source = path, ArrayRecordDataSource(str(path))

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Part:
    if not 0 <= index < len(self):
      raise IndexError(f'{self.path}: record {index} of {len(self)}')
    try:
      text, before, ends, nats = json.loads(self._source[index])
      return Part(text + '', before + '', ends, nats)
    except (RuntimeError, OSError, ValueError, TypeError) as error:
      raise ConfigError(f'{self.path}: record {index} cannot be read: {error}') from error


class Valid:
  """The valid splits of all sources of a configuration, one after another."""

  def __init__(self, splits: Sequence[tuple[Parts, int]], config: DataConfig, tokenizer: Tokenizer):
    """splits: each source's parts, and the bytes of their texts."""
    self._splits, self._config, self._tokenizer = splits, config, tokenizer
    self._bytes = sum(size for _, size in splits)
    self._packed: dict[int, Packed] = {}

  def __len__(self) -> int:
    return sum(len(parts) for parts, _ in self._splits)

  def __getitem__(self, index: int) -> Part:
    for parts, _ in self._splits:
      if index < len(parts):
        return parts[index]
      index -= len(parts)
    raise IndexError(index)

  def texts(self, n: int) -> list[str]:
    """The beginnings of some documents or parts, at even distances."""
    return [self[i].text[: 8 * BEFORE] for i in spread(len(self), n)]

  def packed(self, n_bytes: int = 0) -> Packed:
    """About so many bytes of whole documents, but at least one document; 0: all."""
    if n_bytes not in self._packed:
      self._packed[n_bytes] = self._pack(n_bytes)
    return self._packed[n_bytes]

  def _pack(self, n_bytes: int) -> Packed:
    n = len(self)
    wanted = max(1, round(n * n_bytes / max(self._bytes, 1))) if n_bytes else 0
    parts = [self[i] for i in spread(n, wanted)]
    pieces = [piece_of(part, self._config, self._tokenizer) for part in parts]
    pack = packing.single if self._config.has_completions else packing.whole
    sequences = [np.stack(record) for record in pack(pieces, self._config.seq_len, self._tokenizer.pad)]
    nats = [part.nats for part in parts if part.nats is not None]
    predicted = sum(int(packing.mask(segments).sum()) for _, segments in sequences)
    known = [[part.text, part.before, part.ends] for part in parts]
    return Packed(
      sequences,
      predicted,
      sum(bytes_of(piece, self._tokenizer) for piece in pieces),
      sum(nats) / predicted if len(nats) == len(parts) else None,
      hashlib.sha256(json.dumps([self._config.prompt_end, known]).encode()).hexdigest()[:16],
    )


# ---------------------------------------------------------------------------------------------------------- documents


def parts_of(document: Document) -> Iterator[Part]:
  """The document, or the parts of a long one, in order."""
  text, at, before = document.text, 0, ''
  while len(text) - at > LONG + LONG // 2:
    blank = max(text.rfind(space, at + LONG // 2, at + LONG) for space in ' \n')
    end = blank if blank > 0 else at + LONG
    yield Part(text[at:end], before, ends=False)
    at, before = end, text[max(0, end - BEFORE) : end]
  yield Part(text[at:], before, nats=None if at else document.nats)


def piece_of(part: Part, config: DataConfig, tokenizer: Tokenizer) -> Piece:
  """The tokens of a part: what stands before it, its text, and the end of its document.

  ConfigError if the prompt of a document has no end.
  """
  first = tokenizer.encode(part.before)[-1] if part.before else tokenizer.bos
  text = tokenizer.encode(part.text, inside=bool(part.before))
  tokens = np.array([first, *text, *([tokenizer.eos] if part.ends else [])], np.uint32)
  if not config.prompt_end:
    return Piece(tokens)
  marker = tokenizer.encode(config.prompt_end)
  require(len(marker) == 1, f'data.prompt_end={config.prompt_end!r}: must be one token, and is {len(marker)}')
  require(marker[0] in text, f'data.prompt_end={config.prompt_end!r}: not a token of the document {part.text[:40]!r}')
  return Piece(tokens, text.index(marker[0]) + 2)


def bytes_of(piece: Piece, tokenizer: Tokenizer) -> int:
  """Of its text that is predicted."""
  first = (piece.tokens[:-1] == tokenizer.bos).astype(np.int32)
  sizes = tokenizer.text_bytes[first, piece.tokens[1:]]
  return int(sizes[max(piece.prompt, 1) - 1 :].sum())


def write(path: Path, documents: Iterable[Document], config: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
  """Writes a valid split; returns what there is to know about it.

  ConfigError for a document that could not be evaluated: without the end of a prompt, or, if it is to be completed as
  a whole, longer than a sequence.
  """
  writer, count, size = ArrayRecordWriter(str(path), OPTIONS), 0, 0
  for count, document in enumerate(documents, 1):
    size += len(document.text.encode())
    if config.prompt_end:  # whose document stays whole: it says once where its prompt ends
      parts: Iterable[Part] = [Part(document.text, nats=document.nats)]
      piece = piece_of(Part(document.text), config, tokenizer)
      if config.has_completions:
        packing.check_single(count, piece, config.seq_len)
    else:
      parts = parts_of(document)
    for part in parts:
      writer.write(json.dumps(part).encode())
  writer.close()
  return {'documents': count, 'bytes': size}
