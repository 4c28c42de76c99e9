"""Text <-> token ids: bytes, and SentencePiece.

Both lay their ids out alike, as SentencePiece does with byte fallback: 0 is <unk>, which never occurs in text and so
serves as padding; 1 begins a document, 2 ends it; 3..258 are the 256 bytes; pieces of text come after those. A model
over bytes is thus one over a SentencePiece vocabulary without pieces, and can be exported in the same way.

Text is only ever text: '<s>' in a document is encoded letter by letter. For every string s that UTF-8 can express,
decode(encode(s)) == s.
"""

import abc
import functools
import hashlib
import io
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from slm_jax.config import ConfigError, require

PROBES = ('The cat.', '  two  spaces ', '\ttab\nline\r\n', 'é😀ﬁ', '▁', '0123')  # what tokenizers stumble over
_CROSSED = 'transforms.cross_distill learns across vocabularies'
SAMPLE_BYTES = 10_000_000  # of training text from which a vocabulary is learnt
_BYTES = b'bytes\n'
LINE = 4000  # characters; a longer line is cut before training

# Under these settings SentencePiece, Hugging Face's fast tokenizer and llama.cpp agree, and no space is ever lost.
SETTINGS: dict[str, Any] = {
  'model_type': 'bpe',
  'character_coverage': 1.0,
  'byte_fallback': True,
  'split_digits': True,
  'allow_whitespace_only_pieces': True,
  'normalization_rule_name': 'identity',
  'remove_extra_whitespaces': False,
  'add_dummy_prefix': False,
}


class Tokenizer(abc.ABC):
  """Text <-> token ids. Ids are 0 .. vocab_size - 1; a model's vocabulary may be padded beyond."""

  vocab_size: int
  pad: int
  bos: int
  eos: int
  spelling: Sequence[bytes]  # [V]: the UTF-8 bytes that a token stands for; none for special ones
  fingerprint: str  # 16 hex digits of SHA-256 over `serialize()`
  prefix: int = 0  # bytes that it puts before every text: some put a space there

  @functools.cached_property
  def byte_lengths(self) -> np.ndarray:
    """int32 [V], of `spelling`."""
    return np.array([len(text) for text in self.spelling], np.int32)

  @functools.cached_property
  def text_bytes(self) -> np.ndarray:
    """int32 [2, V]: bytes of its text that a token stands for inside of a document, and as the first after <bos>."""
    spaced = np.array([text[:1] == b' ' for text in self.spelling])
    return np.stack([self.byte_lengths, self.byte_lengths - self.prefix * spaced])

  @abc.abstractmethod
  def encode(self, text: str, inside: bool = False) -> list[int]:
    """The text's tokens, without bos and eos. inside: other text stands before it, so no `prefix` does."""

  @abc.abstractmethod
  def decode(self, ids: Iterable[int]) -> str:
    """The text. Special and unknown ids say nothing; bytes that are not UTF-8 become U+FFFD."""

  @abc.abstractmethod
  def serialize(self) -> bytes:
    """What `load` reads; of a SentencePiece, its .model file."""

  def check_vocabulary(self, vocab_size: int) -> None:
    """ConfigError unless a model of `vocab_size` has room for all tokens."""
    require(
      self.vocab_size <= vocab_size,
      f'model.vocab_size={vocab_size}: too small for the tokenizer, which has {self.vocab_size} tokens',
    )

  def check_same(self, other: 'Tokenizer', who: str, texts: Iterable[str]) -> None:
    """ConfigError unless `other`, that of the model `who`, has the same tokens: in its vocabulary, and on the texts.

    Two files of one vocabulary may differ in what no text shows. Two vocabularies of one size are two vocabularies.
    """
    if other.fingerprint == self.fingerprint:
      return
    what = f'{who} was trained with another tokenizer, {other.fingerprint} and not {self.fingerprint} of data.tokenizer'
    for text in (*PROBES, *texts):
      theirs, ours = other.encode(text), self.encode(text)
      at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours)))
      shown = [f'{ids[at : at + 3]}' for ids in (theirs, ours)]
      require(
        theirs == ours, f'{what}: token {at} ff. of {text[:40]!r} are {shown[0]} there and {shown[1]} here; {_CROSSED}'
      )
    for name in ('vocab_size', 'bos', 'eos', 'pad', 'spelling'):
      require(getattr(other, name) == getattr(self, name), f'{what}: they differ in {name}; {_CROSSED}')


class Bytes(Tokenizer):
  """One token a byte: id = byte + 3."""

  vocab_size = 259
  pad, bos, eos = 0, 1, 2

  def __init__(self):
    self.spelling = [b''] * 3 + [bytes([b]) for b in range(256)]
    self.fingerprint = _fingerprint(self.serialize())

  def encode(self, text: str, inside: bool = False) -> list[int]:
    return (np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3).tolist()

  def decode(self, ids: Iterable[int]) -> str:
    return bytes(i - 3 for i in ids if 3 <= i < 259).decode(errors='replace')

  def serialize(self) -> bytes:
    return _BYTES


class SentencePiece(Tokenizer):
  """A SentencePiece model, trained here or brought along.

  ConfigError if the bytes are no model, if it has no ids for the begin and the end of a document, or if it loses text
  (it normalises, or has no byte fallback): a loss per byte of text that was changed first would mean nothing.
  """

  def __init__(self, model: bytes, name: str = 'SentencePiece model'):
    try:
      self.pieces = pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
      raise ConfigError(f'{name}: not a SentencePiece model') from error
    require(bool(model), f'{name}: not a SentencePiece model, but empty')
    self.vocab_size = pieces.get_piece_size()
    self.bos, self.eos = pieces.bos_id(), pieces.eos_id()
    self.pad = pieces.pad_id() if pieces.pad_id() >= 0 else pieces.unk_id()
    require(min(self.bos, self.eos) >= 0, f'{name}: has no ids for the begin and the end of a document')
    self.spelling = [self._spelt(i) for i in range(self.vocab_size)]
    self._space = [pieces.piece_to_id(f'<0x{b:02X}>') for b in '▁'.encode()]
    self.prefix = sum(len(self.spelling[token]) for token in pieces.encode('a')) - 1
    self._inside = pieces if not self.prefix else _without_prefix(model)
    self._model = model
    self.fingerprint = _fingerprint(model)
    for probe in PROBES:
      require(
        self.decode(self.encode(probe)) == probe, f'{name}: loses text; {probe!r} is not decoded as it was encoded'
      )

  def encode(self, text: str, inside: bool = False) -> list[int]:
    # '▁' stands for a space inside of SentencePiece, so one in the text is spelt by its bytes.
    pieces = self._inside if inside else self.pieces
    if '▁' not in text:
      return pieces.encode(text)
    first, *rest = text.split('▁')
    ids = pieces.encode(first)
    for part in rest:
      ids += self._space + self._inside.encode(part)
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    return self.pieces.decode([i for i in map(int, ids) if 0 <= i < self.vocab_size and self.byte_lengths[i]])

  def serialize(self) -> bytes:
    return self._model

  def _spelt(self, i: int) -> bytes:
    pieces = self.pieces
    if pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_unused(i):
      return b''
    piece = pieces.id_to_piece(i)  # of a byte, '<0x41>'
    return bytes([int(piece[3:5], 16)]) if pieces.is_byte(i) else piece.replace('▁', ' ').encode()


def _without_prefix(model: bytes) -> sentencepiece.SentencePieceProcessor:
  from sentencepiece import sentencepiece_model_pb2

  model_pb2: Any = sentencepiece_model_pb2  # its classes are made when it is imported
  proto = model_pb2.ModelProto.FromString(model)
  proto.normalizer_spec.add_dummy_prefix = False
  return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def _fingerprint(serialized: bytes) -> str:
  return hashlib.sha256(serialized).hexdigest()[:16]


def train(texts: Iterable[str], vocab_size: int) -> SentencePiece:
  """Learns a BPE vocabulary; the same texts give the same bytes. ConfigError if the texts do not suffice for it.

  The text is taken line by line, so a newline is always a token by itself.
  """
  lines = (line[i : i + LINE] for text in texts for line in text.split('\n') for i in range(0, len(line), LINE))
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=itertools.chain([' '], lines),  # a space must be known: its bytes would be decoded as '▁'
      model_writer=model,
      vocab_size=vocab_size,
      max_sentence_length=4 * LINE,
      num_threads=1,
      minloglevel=2,
      **SETTINGS,
    )
  except RuntimeError as error:
    raise ConfigError(f'data.vocab_size={vocab_size}: {str(error).split("] ")[-1].splitlines()[0]}') from error
  return SentencePiece(model.getvalue())


def sample(texts: Iterable[str], limit: int = SAMPLE_BYTES) -> list[str]:
  """Every 2^k-th text, for the least k with which they hold at most `limit` bytes: an even sample in one pass."""
  kept: list[str] = []
  stride, size = 1, 0
  for i, text in enumerate(texts):
    if i % stride:
      continue
    kept.append(text.encode()[:limit].decode(errors='ignore'))
    size += len(kept[-1].encode())
    while size > limit:
      kept, stride = kept[::2], 2 * stride
      size = sum(len(text.encode()) for text in kept)
  return kept


def load(path: Path) -> Tokenizer:
  """A tokenizer from a file of `serialize()`. ConfigError if it is missing or something else."""
  try:
    data = path.read_bytes()
  except OSError as error:
    raise ConfigError(f'tokenizer {str(path)!r}: {error.strerror}') from error
  return Bytes() if data == _BYTES else SentencePiece(data, f'tokenizer {str(path)!r}')
