"""Documents -> records of L + 1 tokens, from which L predictions are made.

A document is <bos> text <eos>. A record's segment ids count the documents in it from 1; padding is segment 0. Only a
token whose predecessor stands in the same segment is predicted, so no document ever looks into another one; and every
token but <bos> is predicted exactly once, for where a document is cut the next piece begins with the last token of the
one before. Tokens of a document's prompt, whose ids carry the flag PROMPT, are not predicted.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from slm_jax.config import require

PROMPT = 1 << 30  # in a segment id: the token belongs to the document's prompt; ids of documents stay below it
OPEN = 64  # records that wait for a document that fills them


class Sequences(Protocol):
  """[2, L + 1] by index: tokens and segment ids."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> np.ndarray: ...


class Piece(NamedTuple):
  tokens: np.ndarray
  prompt: int = 0  # of the tokens, so many at the start belong to the prompt


class Record(NamedTuple):
  tokens: np.ndarray  # [L + 1]
  segments: np.ndarray  # [L + 1] uint32, with flags: a record of many short documents needs more than 16 bits


def spread(n: int, k: int) -> list[int]:
  """k of n indices at even distances; all if k is 0 or more than n."""
  k = min(k or n, n)
  return [i * n // k for i in range(k)]


def mask(segments: np.ndarray) -> np.ndarray:
  """[..., L + 1] segment ids -> [..., L]: is the target a token of the same document as the input, after its prompt?"""
  ids = documents(segments)
  return (ids[..., 1:] == ids[..., :-1]) & (ids[..., :-1] > 0) & (segments[..., 1:] < PROMPT)


def documents(segments: np.ndarray) -> np.ndarray:
  """The segment ids without flags."""
  return segments % PROMPT


def split(documents: Iterable[Piece], length: int, pad: int) -> Iterator[Record]:
  """Documents one after another, cut wherever a record of `length` + 1 tokens is full. No space is lost."""
  pieces: list[Piece] = []  # what the next record holds so far
  used = 0
  for document in documents:
    at = 0
    while at < len(document.tokens):
      if used == length + 1:
        yield _record(pieces, length, pad)
        pieces, used, at = [], 0, max(at - 1, 0)  # the last token is the first input of the next record
      tokens = document.tokens[at : at + length + 1 - used]
      pieces.append(Piece(tokens, max(document.prompt - at, 0)))
      used, at = used + len(tokens), at + len(tokens)
  if pieces:
    yield _record(pieces, length, pad)


def whole(documents: Iterable[Piece], length: int, pad: int) -> Iterator[Record]:
  """Each document whole in one record: in the fullest of the open ones that have room (best fit).

  A document of more than `length` + 1 tokens is cut.
  """
  waiting: list[tuple[int, list[Piece]]] = []  # (tokens, pieces)
  for document in documents:
    for piece in _cut(document, length):
      n = len(piece.tokens)
      room = [i for i, (used, _) in enumerate(waiting) if used + n <= length + 1]
      used, pieces = waiting.pop(max(room, key=lambda i: waiting[i][0])) if room else (0, [])
      pieces.append(piece)
      waiting.append((used + n, pieces))
      if used + n == length + 1 or len(waiting) > OPEN:
        fullest = max(range(len(waiting)), key=lambda i: waiting[i][0])
        yield _record(waiting.pop(fullest)[1], length, pad)
  for _, pieces in waiting:
    yield _record(pieces, length, pad)


def single(documents: Iterable[Piece], length: int, pad: int) -> Iterator[Record]:
  """One document a record. ConfigError for one of more than `length` + 1 tokens: cut, it would have no end."""
  for number, document in enumerate(documents, 1):
    check_single(number, document, length)
    yield _record([document], length, pad)


def check_single(number: int, document: Piece, length: int) -> None:
  n = len(document.tokens)
  require(n <= length + 1, f'data.packing=single: document {number} has {n} tokens, data.seq_len={length} + 1 allowed')


def _cut(document: Piece, length: int) -> Iterator[Piece]:
  n = len(document.tokens)
  if n <= length + 1:
    yield document
    return
  for start in range(0, n - 1, length):
    yield Piece(document.tokens[start : start + length + 1], max(document.prompt - start, 0))


def _record(pieces: list[Piece], length: int, pad: int) -> Record:
  tokens = np.full(length + 1, pad, np.uint32)
  segments = np.zeros(length + 1, np.uint32)
  at = 0
  for segment, piece in enumerate(pieces, 1):
    tokens[at : at + len(piece.tokens)] = piece.tokens
    segments[at : at + len(piece.tokens)] = segment
    segments[at : at + min(piece.prompt, len(piece.tokens))] |= PROMPT
    at += len(piece.tokens)
  return Record(tokens, segments)
