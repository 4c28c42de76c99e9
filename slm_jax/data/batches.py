"""Sequences -> batches. A batch is a pure function of (seed, step), on any number of hosts.

Batch entries (numpy, [B, T] with T = seq_len): inputs, targets, segments int32, where segments are those of the inputs
and 0 is padding; mask float32, 1 where the target is a token of the same document as the input and not of its prompt.
"""

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from slm_jax.data import packing
from slm_jax.data.packing import Sequences

HostBatch = dict[str, np.ndarray]


def order(parts: Sequence[Sequences], weights: Sequence[float], seed: int) -> grain.MapDataset:
  """An endless order of training sequences, by index.

  Without weights, every epoch shows every sequence of all parts once, in an order of its own. With weights, the parts
  are interleaved in those shares, and each has epochs and orders of its own.
  """
  datasets = [grain.MapDataset.source(part) for part in parts]
  if not weights:
    return grain.MapDataset.concatenate(datasets).shuffle(_seed(seed, 0)).repeat()
  endless = [dataset.shuffle(_seed(seed, i)).repeat() for i, dataset in enumerate(datasets)]
  return grain.MapDataset.mix(endless, list(weights))


def _seed(seed: int, part: int) -> int:
  """Grain orders epoch e of seed s as epoch 0 of seed s + e; hashed, runs of neighbouring seeds share no orders."""
  return int.from_bytes(hashlib.sha256(f'{seed} {part}'.encode()).digest()[:4], 'little')


# More entries [B, T, ...] of a batch, by its sequences.
Join = Callable[[Sequence[np.ndarray]], HostBatch]


def train_batch(
  sequences: Sequences, step: int, size: int, host: int = 0, hosts: int = 1, joins: Sequence[Join] = ()
) -> HostBatch:
  """Rows [host/hosts, (host + 1)/hosts) of the global batch of `size` sequences that `step` is taken on."""
  rows = range(step * size + host * size // hosts, step * size + (host + 1) * size // hosts)
  return _joined([sequences[i] for i in rows], joins)


def valid_batches(
  sequences: Sequences, size: int, host: int = 0, hosts: int = 1, joins: Sequence[Join] = ()
) -> Iterator[HostBatch]:
  """All sequences in order, `size` in a global batch; the last one is filled up with rows of mask 0."""
  n = len(sequences)
  for start in range(0, n, size):
    rows = range(start + host * size // hosts, start + (host + 1) * size // hosts)
    empty = np.zeros_like(sequences[0])
    yield _joined([sequences[i] if i < n else empty for i in rows], joins)


def _joined(taken: Sequence[np.ndarray], joins: Sequence[Join]) -> HostBatch:
  return {**batch_of(taken), **{name: entry for join in joins for name, entry in join(taken).items()}}


def batch_of(sequences: Sequence[np.ndarray]) -> HostBatch:
  """Sequences [2, L + 1] as a batch."""
  both = np.stack(sequences).astype(np.int32)
  tokens, segments = both[:, 0], both[:, 1]
  return {
    'inputs': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'segments': packing.documents(segments[:, :-1]),
    'mask': packing.mask(segments).astype(np.float32),
  }


class Prefetch(Iterator):
  """make(start), make(start + 1), ..., computed ahead by a thread; a context manager, which ends the thread.

  ahead: how many are kept ready. put: applied in the thread, say to send a batch to the devices.
  An exception in the thread is raised by the `next` that would have given its value.
  """

  def __init__(self, make: Callable[[int], Any], start: int, ahead: int = 2, put: Callable[[Any], Any] = lambda x: x):
    self._ready: queue.Queue = queue.Queue(max(ahead, 1))
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._work, args=(make, start, put), name='prefetch', daemon=True)
    self._thread.start()

  def _work(self, make: Callable[[int], Any], step: int, put: Callable[[Any], Any]) -> None:
    while not self._stop.is_set():
      item: tuple[Any, BaseException | None]
      try:
        item = (put(make(step)), None)
      except BaseException as error:  # for the consumer to deal with
        item = (None, error)
      while not self._stop.is_set():
        try:
          self._ready.put(item, timeout=0.1)
          break
        except queue.Full:
          continue
      if item[1] is not None:
        return
      step += 1

  def __next__(self) -> Any:
    if self._stop.is_set():
      raise StopIteration
    value, error = self._ready.get()
    if error is not None:
      self.close()
      raise error
    return value

  def close(self) -> None:
    self._stop.set()
    self._thread.join()

  def __enter__(self) -> 'Prefetch':
    return self

  def __exit__(self, *exc: Any) -> None:
    self.close()
