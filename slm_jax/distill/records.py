"""What a teacher said of one token sequence, as bytes: a record of a cache.

    16 bytes   hash of the sequence, by which it is found again
    entries    one after another, little-endian, a row for each of the M tokens that are predicted (packing.mask)
     8 bytes   hash of all of the above

    dense      log_p [M, V], log_next [M]
    top_k      ids [M, K], log_p [M, K], log_rest [M], log_next [M]
    sampled    n uint8 [M], then of all rows together: gaps (of the ids, which ascend in a row; as byte planes, so that
               they compress), counts uint8; log_next [M]

ids and gaps are uint16, or uint32 for a large vocabulary; log-probabilities, all at temperature 1, are float16 or
float32; log_next is that of the token which came next. Padding is not stored. Needs no JAX.
"""

import hashlib
import math
from typing import Any, Literal, NamedTuple

import numpy as np

from slm_jax.data import packing

Precision = Literal['float16', 'float32']
Told = dict[str, np.ndarray]  # entries by name, [T, ...] or [M, ...]

LOWEST = -1e5  # stands for log 0, as in divergences.py


class Damaged(ValueError):
  """A record that is not what was written."""


class Layout(NamedTuple):
  """What records hold."""

  method: Literal['dense', 'top_k', 'sampled']
  size: int  # k of top_k, draws of sampled, V of dense
  vocab: int
  precision: Precision

  @property
  def ids(self) -> np.dtype:
    return np.dtype('<u4' if self.vocab > 1 << 16 else '<u2')

  @property
  def floats(self) -> np.dtype:
    return np.dtype('<f2' if self.precision == 'float16' else '<f4')

  def arrays(self, m: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """{entry: (type, shape)} of M rows; of draws, without those whose length depends on them."""
    rows, floats = (m,), self.floats
    wide = {'ids': (self.ids, (m, self.size))} if self.method == 'top_k' else {}
    if self.method == 'sampled':
      return {'n': (np.dtype('u1'), rows), 'log_next': (floats, rows)}
    rest = {'log_rest': (floats, rows)} if self.method == 'top_k' else {}
    return {**wide, 'log_p': (floats, (m, self.size)), **rest, 'log_next': (floats, rows)}


def fingerprint(sequence: np.ndarray) -> bytes:
  """16 bytes of BLAKE2b over tokens and segment ids, [2, L + 1] as little-endian uint32."""
  return hashlib.blake2b(np.ascontiguousarray(sequence, '<u4').tobytes(), digest_size=16).digest()


def predicted(sequence: np.ndarray) -> np.ndarray:
  """bool [L]: the tokens that have a row."""
  return packing.mask(sequence[1])


def encode(layout: Layout, sequence: np.ndarray, told: Told) -> bytes:
  """The record of a sequence [2, L + 1]. told: entries [L, ...]; of draws, their ids [L, draws]."""
  rows = predicted(sequence)
  kept = {name: values[rows] for name, values in told.items()}
  parts = [fingerprint(sequence)]
  if layout.method == 'sampled':
    n, ids, counts = _runs(kept['ids'])
    parts += [n.tobytes(), _gaps(n, ids).astype(layout.ids).view('u1').reshape(-1, layout.ids.itemsize).T.tobytes()]
    parts += [counts.tobytes(), _rounded(kept['log_next'], layout).tobytes()]
  else:
    for name, (dtype, _) in layout.arrays(int(rows.sum())).items():
      parts.append((_rounded(kept[name], layout) if dtype.kind == 'f' else kept[name].astype(dtype)).tobytes())
  data = b''.join(parts)
  return data + _sum(data)


def decode(layout: Layout, sequence: np.ndarray, data: bytes, width: int) -> Told:
  """The entries [L, ...] of a sequence, ids int32 and the rest float32; rows that are not predicted are zeros.

  width: of draws, as many different ids as any row may have; entries of weight 0 fill up.
  Damaged unless the bytes are those that were written, and for this sequence.
  """
  if data[-8:] != _sum(data[:-8]) or data[:16] != fingerprint(sequence):
    raise Damaged('its checksum is wrong')
  rows, at = predicted(sequence), 16
  m = int(rows.sum())

  def take(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    nonlocal at
    size = math.prod(shape)
    at += size * dtype.itemsize
    return np.frombuffer(data, dtype, size, at - size * dtype.itemsize).reshape(shape)

  def spread(values: np.ndarray) -> np.ndarray:
    out = np.zeros((len(rows), *values.shape[1:]), np.int32 if values.dtype.kind in 'iu' else np.float32)
    out[rows] = values
    return out

  arrays: dict[str, Any] = {}
  if layout.method == 'sampled':
    n = take(np.dtype('u1'), (m,))
    total = int(n.sum())
    planes = take(np.dtype('u1'), (layout.ids.itemsize, total))
    gaps = np.ascontiguousarray(planes.T).view(layout.ids)[:, 0]
    filled = np.arange(width) < n[:, None]
    ids, weights = np.zeros((m, width), np.int32), np.zeros((m, width), np.float32)
    ids[filled] = _ids(n, gaps)
    weights[filled] = take(np.dtype('u1'), (total,)) / np.float32(layout.size)
    arrays = {'ids': ids, 'weights': weights, 'log_next': take(layout.floats, (m,))}
  else:
    arrays = {name: take(*described) for name, described in layout.arrays(m).items()}
  # float16 has no -1e5; and 0 times -inf would be no number.
  return {
    name: np.maximum(spread(a), LOWEST) if name != 'weights' and a.dtype.kind == 'f' else spread(a)
    for name, a in arrays.items()
  }


def narrowed(told: Told, k: int) -> Told:
  """The k largest of more entries [..., K]: what is left out comes to the rest."""
  left_out = told['log_p'][..., k:]
  rest = np.logaddexp.reduce(np.concatenate([left_out, told['log_rest'][..., None]], axis=-1), axis=-1)
  return {**told, 'ids': told['ids'][..., :k], 'log_p': told['log_p'][..., :k], 'log_rest': rest.astype(np.float32)}


def _runs(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """[M, N] ids -> how many different ones each row has [M] uint8; all of them, ascending in a row; how often, uint8."""
  ordered = np.sort(draws, axis=-1)
  first = np.diff(ordered, axis=-1, prepend=-1) != 0
  ends = np.append(np.flatnonzero(first), ordered.size)
  return first.sum(-1).astype('u1'), ordered[first], np.diff(ends).astype('u1')


def _gaps(n: np.ndarray, ids: np.ndarray) -> np.ndarray:
  """Each id less the one before it in its row; the first as it is."""
  gaps = np.diff(ids, prepend=0)
  starts = np.cumsum(n, dtype=np.int64) - n
  gaps[starts] = ids[starts]
  return gaps


def _ids(n: np.ndarray, gaps: np.ndarray) -> np.ndarray:
  total = np.cumsum(gaps, dtype=np.int64)
  starts = np.cumsum(n, dtype=np.int64) - n
  before = np.concatenate([[0], total])[starts]
  return total - np.repeat(before, n)


def _rounded(values: np.ndarray, layout: Layout) -> np.ndarray:
  with np.errstate(over='ignore'):  # to -inf, which is meant
    return values.astype(layout.floats)


def _sum(data: bytes) -> bytes:
  return hashlib.blake2b(data, digest_size=8).digest()
