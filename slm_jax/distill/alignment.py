"""Where two tokenizers cut a text at the same byte: what may be compared of models with different vocabularies.

A training sequence of the student is spelt out, each of its documents is tokenised again by the teacher's tokenizer,
and the bytes between two neighbouring cuts that both have are a chunk: the shortest stretch of text of which both
models know a probability (approximate likelihood matching, Minixhofer et al., arXiv 2503.20083).

    student   The| cat| sat|.          chunks   The| cat| sat.|
    teacher   T|he| c|at| sa|t.

Numbers of chunks and places count from 1; 0 is none.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from slm_jax.data import packing
from slm_jax.data.batches import HostBatch, batch_of
from slm_jax.data.tokenizer import Tokenizer


class Side(NamedTuple):
  """A document, or a piece of one, in one of the two vocabularies."""

  tokens: list[int]
  ends: np.ndarray  # int [n]: bytes of the text up to the end of each token; <eos> counts as one byte more


class Aligned(NamedTuple):
  """A student's sequence and its teacher's; L and M predictions."""

  chunk: np.ndarray  # int32 [L]: the chunk that the student's target lies in, 1..L
  place: np.ndarray  # int32 [L]: the teacher's input after which it has read just what the student has, 1..M
  sequence: np.ndarray  # uint32 [2, M + 1]: the teacher's tokens and their documents
  its_chunk: np.ndarray  # int32 [M]
  wanted: int  # tokens that the teacher has for the text; what is beyond M + 1 has no chunk


def align(sequence: np.ndarray, own: Tokenizer, other: Tokenizer, length: int) -> Aligned:
  """sequence: uint32 [2, L + 1], of the student, whose tokenizer is `own`. length: M.

  All tokens of a chunk are predicted by both: none is of a prompt, or the first of a piece of a document.
  """
  tokens, ids = sequence[0], packing.documents(sequence[1])
  predicted = packing.mask(sequence[1])
  chunk, place = np.zeros((2, len(tokens) - 1), np.int32)
  its_chunk = np.zeros(length, np.int32)
  its_sequence = np.zeros((2, length + 1), np.uint32)
  its_sequence[0] = other.pad
  used = chunks = wanted = 0
  for first, end in _documents(ids):
    ours = _side(tokens[first:end].tolist(), own, own.prefix * int(tokens[first] == own.bos))
    theirs = _again(ours.tokens, own, other)
    wanted += len(theirs.tokens)
    n = min(len(theirs.tokens), length + 1 - used)
    theirs = Side(theirs.tokens[:n], theirs.ends[:n])
    its_sequence[0, used : used + n], its_sequence[1, used : used + n] = theirs.tokens, ids[first]
    cuts, asked = np.intersect1d(ours.ends, theirs.ends), predicted[first : end - 1]
    mine, its = _between(ours.ends, cuts), _between(theirs.ends, cuts)
    mine[np.isin(mine, mine[~asked])] = 0
    its[~np.isin(its, mine)] = 0
    chunk[first : end - 1] = np.where(mine > 0, mine + chunks, 0)
    its_chunk[used : used + max(n - 1, 0)] = np.where(its > 0, its + chunks, 0)
    there = _there(ours.ends[:-1], theirs.ends[:-1])
    place[first : end - 1] = np.where(asked & (there > 0), there + used, 0)
    used, chunks = used + n, chunks + len(cuts)
  return Aligned(chunk, place, its_sequence, its_chunk, wanted)


def _documents(ids: np.ndarray) -> Iterator[tuple[int, int]]:
  """`(first, end)` of the stretches of one document; padding is none."""
  edges = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist(), len(ids)]
  return ((first, end) for first, end in itertools.pairwise(edges) if ids[first])


def _side(tokens: list[int], of: Tokenizer, skipped: int) -> Side:
  """skipped: bytes at the start that are not of the text."""
  lengths = of.byte_lengths[tokens]
  lengths[np.array(tokens) == of.eos] = 1
  return Side(tokens, np.maximum(np.cumsum(lengths) - skipped, 0))


def _again(tokens: list[int], own: Tokenizer, other: Tokenizer) -> Side:
  """The same text in the other vocabulary. A piece of a document may begin and end in the middle of a character."""
  whole = tokens[0] == own.bos
  spelt = b''.join(own.spelling[token] for token in tokens)[own.prefix * whole :]
  start = next((i for i, byte in enumerate(spelt) if byte & 0xC0 != 0x80), len(spelt))
  text = spelt[start:].decode(errors='ignore')
  ids, prefix = other.encode(text), other.prefix * bool(text)
  its = _side([other.bos] * whole + ids + [other.eos] * (tokens[-1] == own.eos), other, prefix)
  kept = b''.join(other.spelling[token] for token in ids)[prefix:] == text.encode()  # or nothing can be compared
  return Side(its.tokens, its.ends + start if kept else np.full_like(its.ends, -1))


def _between(ends: np.ndarray, cuts: np.ndarray) -> np.ndarray:
  """Of each token but the first: between which two neighbouring cuts it lies, 1 for the first two; or 0."""
  inside = (ends[:-1] >= cuts[0]) & (ends[1:] <= cuts[-1]) if len(cuts) else np.zeros(max(len(ends) - 1, 0), bool)
  return np.where(inside, np.searchsorted(cuts, ends[1:], side='left'), 0)


def _there(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
  """Of each of our ends: the last of theirs that is the same, 1 for the first; or 0."""
  last = np.searchsorted(theirs, ours, side='right')
  same = np.append(theirs, -1)[last - 1] == ours  # last = 0 looks at the -1
  return np.where(same, last, 0)


def entries(name: str, rows: Sequence[Aligned]) -> HostBatch:
  """The entries `name`_... of a batch, of its sequences."""
  its = batch_of([row.sequence for row in rows])
  return {
    **{f'{name}_{key}': np.stack([getattr(row, key) for row in rows]) for key in ('chunk', 'place', 'its_chunk')},
    **{f'{name}_its_{key}': its[key] for key in ('inputs', 'targets', 'segments')},
  }
