"""To learn from what a teacher said earlier: the join of training batches with a cache (capture.py).

An entry is found by the hash of its token sequence, never by its place, so order, seeds and hosts are those of any
other arm. What is missing, damaged or of another corpus, tokenizer or teacher is an error that says which record.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from absl import logging
from array_record.python.array_record_data_source import ArrayRecordDataSource

from slm_jax import distributed, sharding
from slm_jax.conditions import Needs
from slm_jax.config import ConfigError, require, setting
from slm_jax.data import packing
from slm_jax.data.batches import HostBatch, Join
from slm_jax.data.dataset import Dataset
from slm_jax.data.store import Store
from slm_jax.distill import capture, records, signals
from slm_jax.distill.judge import asked_at_the_end
from slm_jax.distill.logits import SPARSE, Signal, TokenLoss, check_k, check_signal
from slm_jax.distill.records import Damaged, Layout, Precision, Told
from slm_jax.distill.signals import Dense, Sampled, SignalLoss, Tail, TopK
from slm_jax.distill.teachers import Source
from slm_jax.files import expanded
from slm_jax.step import Resources, Transform

AUTO = 'auto'
LOOKED_AT = 64  # sequences of each source that are looked up before anything is compiled


class Cache:
  """The records of a finished cache, by the sequences they are of. Threads may share it."""

  def __init__(self, folder: Path, what: str = 'cache'):
    self.folder, self.manifest = folder, capture.read_manifest(folder, what)
    self.layout = Layout(*(self.manifest['key'][name] for name in Layout._fields))
    self._shards = [(folder / shard['name'], shard['records']) for shard in self.manifest['shards']]
    try:
      self._source = ArrayRecordDataSource([str(path / 'records.array_record') for path, _ in self._shards])
      index = np.concatenate([np.fromfile(path / 'index', '<u8') for path, _ in self._shards])
      count = len(self._source)
    except (RuntimeError, OSError, ValueError) as error:
      raise ConfigError(f'{folder}: cannot be opened: {_line(error)}; {self._mend}') from error
    require(
      len(index) == count == sum(n for _, n in self._shards), f'{folder}: has lost records or their index; {self._mend}'
    )
    self._order = np.argsort(index, kind='stable')
    self._index = index[self._order]

  def find(self, sequence: np.ndarray) -> list[int]:
    """Where entries may be: records whose index agrees."""
    wanted = np.frombuffer(records.fingerprint(sequence)[:8], '<u8')[0]
    first, end = (int(np.searchsorted(self._index, wanted, side)) for side in ('left', 'right'))
    return [int(i) for i in self._order[first:end]]

  def read(self, sequence: np.ndarray) -> Told | None:
    """The entries [L, ...] of a sequence [2, L + 1]; None if there are none. ConfigError if the record is damaged."""
    if not (places := self.find(sequence)):
      return None
    try:
      data = self._source[places[0]]
      return records.decode(self.layout, sequence, data, self.manifest['width'])
    except (RuntimeError, OSError, ValueError, Damaged) as error:
      raise ConfigError(f'{self._name(places[0])} is damaged ({_line(error)}); {self._mend}') from error

  def _name(self, place: int) -> str:
    for path, n in self._shards:
      if place < n:
        return f'{path / "records.array_record"}: record {place}'
      place -= n
    raise IndexError(place)

  @property
  def _mend(self) -> str:
    return f'run again what made it (slm_jax.distill.cache mends it), or remove {self.folder}'


def _line(error: Exception) -> str:
  return ' '.join(str(error).split())[:200] or type(error).__name__


# ------------------------------------------------------------------------------------------------------------ the join


def joined(cache: Cache, stores: Sequence[Store], name: str, k: int) -> Join:
  """The entries `name`_ids, ... of a batch. k: of top_k, so many of those that are there."""

  def join(sequences: Sequence[np.ndarray]) -> HostBatch:
    rows = []
    for sequence in sequences:
      told = cache.read(sequence)
      if told is None:
        raise ConfigError(f'{_where(sequence, stores)}: not in the cache {cache.folder}; {_made_of(cache)}')
      rows.append(records.narrowed(told, k) if k < cache.layout.size and cache.layout.method == 'top_k' else told)
    return {f'{name}_{entry}': np.stack([row[entry] for row in rows]) for entry in rows[0] if entry != 'log_next'}

  return join


def look(cache: Cache, stores: Sequence[Store]) -> None:
  """ConfigError if some of the sequences, at even distances, are not in the cache or damaged there."""
  for store in stores:
    sequences = store.train()
    for i in packing.spread(len(sequences), LOOKED_AT):
      found = cache.read(sequences[i]) is not None
      require(found, f'{sequences.path}: record {i}: not in the cache {cache.folder}; {_made_of(cache)}')


def _where(sequence: np.ndarray, stores: Sequence[Store]) -> str:
  """Which record of the stores it is, for a message; there are many, so this takes a while."""
  digest = records.fingerprint(sequence)
  for store in stores:
    sequences = store.train()
    for i in range(len(sequences)):
      if records.fingerprint(sequences[i]) == digest:
        return f'{sequences.path}: record {i} ({digest.hex()})'
  return f'the training sequence {digest.hex()}, which begins with the tokens {sequence[0, :8].tolist()}'


def _made_of(cache: Cache) -> str:
  return f'that was made of {", ".join(cache.manifest["sources"])}: another corpus, or a token was changed'


def cached(name: str, layout: Layout) -> Source:
  """What stands in the batch."""

  def signal(slot: Any, tokens: Any, context: Any) -> signals.Signal:
    entry = {key: tokens[f'{name}_{key}'] for key in _ENTRIES[layout.method]}
    if layout.method == 'top_k':
      return TopK(entry['ids'], entry['log_p'], entry['log_rest'])
    return Sampled(entry['ids'], entry['weights']) if layout.method == 'sampled' else Dense(entry['log_p'])

  return Source(
    init=lambda params: (),
    data=lambda slot, batch, context: {},
    signal=signal,
    after=lambda slot, state, update: slot,
  )


_ENTRIES = {'dense': ('log_p',), 'top_k': ('ids', 'log_p', 'log_rest'), 'sampled': ('ids', 'weights')}


# ------------------------------------------------------------------------------------------------------- configuration


@dataclasses.dataclass(frozen=True)
class CachedDistill(TokenLoss):
  """Learn from what a teacher said of the training text, written down once: its forward pass costs no step anything."""

  kind: ClassVar[str] = 'cached_distill'
  teacher: str = setting('', arm=True)  # name of the arm; may be left out where a folder is given
  cache: str = setting(AUTO, semantic=False)  # a folder of slm_jax.distill.cache, or made when it is first needed
  content: str = ''  # what that folder holds; filled in when an experiment is resolved
  signal: Signal = 'top_k'
  k: int = setting(64, '[1, 2^31)')  # of top_k
  tail: Tail = 'bucket'  # of top_k
  # Of sampled; at 50, a weak teacher of a large vocabulary takes more than 48 bytes a token.
  draws: int = setting(40, '[1, 255]')
  precision: Precision = 'float16'  # of the log-probabilities

  needs: ClassVar[Needs] = {**TokenLoss.needs, **SPARSE}

  def check(self, key: str) -> None:
    super().check(key)
    require(bool(self.teacher or self.cache != AUTO), f'{key}.teacher={self.teacher!r}: name the arm to learn from')
    require(bool(self.cache), f'{key}.cache={self.cache!r}: allowed: {AUTO}, or a folder')
    check_signal(self, key)
    known = self.divergence != 'policy_gradient'
    require(known, f'{key}.divergence={self.divergence}: needs text that the student writes, of which no cache knows')

  def check_in(self, config: Any, key: str) -> None:
    check_k(self, config, key)

  def resolved(self, key: str) -> 'CachedDistill':
    require(not self.content, f"{key}.content={self.content!r}: is computed of what the cache holds; allowed: ''")
    if self.cache == AUTO:
      return self
    return dataclasses.replace(self, content=capture.read_manifest(expanded(self.cache), f'{key}.cache')['identity'])

  def open(self, dataset: Dataset, resources: Resources) -> Dataset:
    wanted = self._layout(resources.vocab)
    if self.cache == AUTO:
      cache = Cache(self._built(dataset, wanted, resources))
    else:
      cache = Cache(expanded(self.cache), f'{self.kind}.cache')
      self._check_cache(cache, wanted, dataset, resources)
    stores = [store for store in dataset.stores if store.has('train')]
    look(cache, stores)
    made = {**dataset.made, f'teacher-{cache.manifest["identity"]}': cache.manifest['flops']}
    return dataset._replace(joins=(*dataset.joins, joined(cache, stores, self.kind, self.k)), made=made)

  def stand_in(self, dataset: Dataset, resources: Resources) -> Dataset:
    join = functools.partial(noise, self.kind, self._layout(resources.vocab))
    return dataset._replace(joins=(*dataset.joins, join))

  def build(self, resources: Resources) -> tuple[Transform, dict[str, Any]]:
    loss: Callable[[], SignalLoss] = {
      'dense': self.dense_loss,
      'top_k': lambda: signals.top_k_loss(self.tail),
      'sampled': signals.sampled_loss,
    }[self.signal]
    transform = self.transform(cached(self.kind, self._layout(resources.vocab)), loss(), None, resources)
    return asked_at_the_end(transform, self.teacher, resources) if self.teacher else transform, {}

  def _layout(self, vocab: int) -> Layout:
    return capture.layout(self.signal, self.k, self.draws, vocab, self.precision, f'{self.kind}.')

  def _built(self, dataset: Dataset, wanted: Layout, resources: Resources) -> Path:
    """The folder of the cache of just this, which is built first unless it is there: by all processes together."""
    model, params = resources.load(self.teacher)
    # By value, as each process works by itself from here on.
    what = capture.Capture(dataset, model, sharding.to_host(params), wanted)
    folder = capture.place(resources.folder, what)
    if not distributed.on_main(capture.is_finished, folder):
      about = {'teacher': self.teacher}
      capture.build(folder, what, about, logging.info, jax.process_index(), jax.process_count())
      distributed.first_of('')  # all have built their shards
    if not distributed.on_main(capture.is_finished, folder):  # the last one did not see yet what others wrote
      distributed.on_main(capture.build, folder, what, about, logging.info)
    return folder

  def _check_cache(self, cache: Cache, wanted: Layout, dataset: Dataset, resources: Resources) -> None:
    where, key = f'{self.kind}.cache={self.cache!r}', cache.manifest['key']
    content = cache.manifest['identity']
    require(
      self.content in ('', content), f'{where}: now holds {content}; it was {self.content} when this was launched'
    )
    its_tokenizer = dataset.tokenizer.fingerprint
    require(
      key['tokenizer'] == its_tokenizer, f'{where}: of tokenizer {key["tokenizer"]}, but data has {its_tokenizer}'
    )
    length = dataset.config.seq_len
    require(key['seq_len'] == length, f'{where}: of sequences of {key["seq_len"]} tokens, but data.seq_len={length}')
    found = cache.layout
    for name, here, there in (
      ('signal', wanted.method, found.method),
      ('precision', wanted.precision, found.precision),
      ('draws' if wanted.method == 'sampled' else 'k', wanted.size, found.size),
    ):
      enough = here == there or (name == 'k' and wanted.size <= found.size)
      require(enough, f'{where}: holds {name}={there}, but {self.kind}.{name}={here}')
    if self.teacher:
      own = capture.teacher_hash(*resources.load(self.teacher))
      require(key['teacher'] == own, f'{where}: of teacher {key["teacher"]}, but {self.teacher} is {own}')


def noise(name: str, layout: Layout, sequences: Sequence[np.ndarray]) -> HostBatch:
  """Entries of the right shapes that mean nothing."""
  rng, rows = np.random.default_rng(0), (len(sequences), sequences[0].shape[1] - 1)
  size = min(layout.size, layout.vocab)
  log_p = np.full((*rows, size), -np.log(layout.vocab), np.float32)
  # Ids of a row must differ.
  ids = (rng.integers(0, layout.vocab, rows)[..., None] + np.arange(size)) % layout.vocab
  entries = {
    'ids': ids.astype(np.int32),
    'weights': np.full((*rows, size), 1 / size, np.float32),
    'log_p': log_p,
    'log_rest': np.full(rows, np.log(max(1 - size / layout.vocab, 1e-6)), np.float32),
  }
  return {f'{name}_{entry}': entries[entry] for entry in _ENTRIES[layout.method]}
