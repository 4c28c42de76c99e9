"""Writes down what a teacher says of every training sequence, once: a cache that students learn from later.

    FOLDER/manifest.json              what was captured, from whom, of what; without 'shards', it is not finished yet
    FOLDER/shard-START-END/           the records of the sequences START..END: records.array_record, and index, 8 bytes
                                      of each one's hash (records.py says what a record holds)

A shard is whole or not there (data/folder.py), so a builder that was killed goes on where it was, and hosts each build
every n-th. The result depends on none of that: the teacher sees batches of one size, and the random numbers of a
sequence come of its own hash.
"""

import contextlib
import dataclasses
import fcntl
import functools
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Required, TypedDict

import grain
import jax
import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from slm_jax import losses, sharding
from slm_jax.checksum import checksum
from slm_jax.config import require, semantic_hash, to_dict
from slm_jax.data import batches, sources
from slm_jax.data import folder as folders
from slm_jax.data.dataset import Dataset
from slm_jax.data.store import Store
from slm_jax.distill import records, signals
from slm_jax.distill.divergences import log_softmax
from slm_jax.distill.records import Layout, Precision
from slm_jax.files import DamagedFile, disk_errors, read_json, write_json
from slm_jax.model import decoder
from slm_jax.model.api import Batch, Model, Params
from slm_jax.model.flops import flops_per_token
from slm_jax.vocabulary import whole

FORMAT = 1  # of records and folders; part of the key
SHARD = 1 << 20  # tokens of a shard
BATCH = 1 << 13  # tokens that the teacher sees at once
MANIFEST = folders.MANIFEST


class _Shard(folders.Manifest):
  records: int
  predicted: int
  width: int
  nats: float


class _Part(TypedDict):
  name: str
  records: int


class _Manifest(TypedDict, total=False):
  """Of a cache; it is finished if it has shards, and then it has all of these."""

  key: Required[dict[str, Any]]
  identity: Required[str]
  shards: list[_Part]
  records: int
  tokens: int
  bytes: int
  bytes_per_token: float
  width: int
  nats: float
  flops: float
  sources: list[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Capture:
  """What is to be written down, and all that it depends on."""

  dataset: Dataset
  model: Model  # the teacher
  params: Params  # that this process can see all of; it works on its first device
  layout: Layout
  seed: int = 0  # of draws

  @property
  def sequences(self) -> grain.MapDataset:
    """[2, L + 1] by index: the training sequences of all sources, in the order of the text."""
    return grain.MapDataset.concatenate([grain.MapDataset.source(store.train()) for store in self.stores])

  @property
  def stores(self) -> list[Store]:
    return [store for store in self.dataset.stores if store.has('train')]

  @functools.cached_property
  def key(self) -> dict[str, Any]:
    """Two captures with one key give the same cache, up to rounding."""
    config, layout = self.dataset.config, self.layout
    return {
      'format': FORMAT,
      'teacher': teacher_hash(self.model, self.params),
      'tokenizer': self.dataset.tokenizer.fingerprint,
      'data': [sources.digest(store.manifest['key']) for store in self.stores],
      'seq_len': config.seq_len,
      **layout._asdict(),
      **({'seed': self.seed} if layout.method == 'sampled' else {}),
      'temperature': 1,
    }


def layout(method: Any, k: int, draws: int, vocab: int, precision: Precision, key: str = '--') -> Layout:
  """ConfigError if no such thing can be captured; `key` stands before the setting's name there."""
  require(method != 'top_k' or 0 < k <= vocab, f'{key}k={k}: allowed: 1..{vocab}, the tokens of the tokenizer')
  require(method != 'sampled' or 0 < draws < 256, f'{key}draws={draws}: allowed: 1..255')
  return Layout(method, {'top_k': k, 'sampled': draws}.get(method, vocab), vocab, precision)


def teacher_hash(model: Model, params: Params) -> str:
  """16 hex digits that say which model it is: a hash of its configuration, and a checksum of its parameters."""
  return sources.digest([semantic_hash(model.config), int(checksum(params))])


def identity(key: dict[str, Any]) -> str:
  return sources.digest(key)


def place(cache: Path, capture: Capture) -> Path:
  """Where it is unless somebody says otherwise."""
  return cache / f'teacher-{identity(capture.key)}'


def is_finished(folder: Path) -> bool:
  return 'shards' in (read_json(folder / MANIFEST, _Manifest)[0] or {})


def read_manifest(folder: Path, what: str) -> dict[str, Any]:
  """ConfigError unless `folder` holds a finished cache; what: the setting that names it."""
  path = folder / MANIFEST
  require(path.exists(), f'{what}={str(folder)!r}: no cache there (no {MANIFEST}); python -m slm_jax.distill.cache')
  manifest, fault = read_json(path, _Manifest)
  if manifest is None:
    raise DamagedFile(f'{path}: cannot be read ({fault})')
  key = manifest['key']
  written = key.get('format')
  require(written == FORMAT, f'{path}: format {written}, this version knows {FORMAT}; make the cache again')
  require(manifest['identity'] == identity(key), f'{path}: cannot be read (it was changed)')
  require('shards' in manifest, f'{what}={str(folder)!r}: not finished; run the command that makes it again')
  return manifest


# ------------------------------------------------------------------------------------------------------------ building


def build(
  folder: Path,
  capture: Capture,
  about: dict[str, Any],
  log: Callable[[str], None],
  host: int = 0,
  hosts: int = 1,
  shard: int = SHARD,
) -> dict[str, Any] | None:
  """Builds what is missing of this host's shards; the manifest, or None while other hosts have yet to build theirs.

  about: more for the manifest, such as the teacher's name. shard: tokens of one, the same on all hosts.
  ConfigError if the folder holds another cache, or the disk is full; finished shards stay.
  """
  n, length = len(capture.sequences), capture.dataset.config.seq_len
  each = max(shard // length, 1)
  parts = [(start, min(start + each, n)) for start in range(0, n, each)]
  with disk_errors(folder):
    begin(folder, capture.key)
    one = jax.local_devices()[:1]
    teacher = decoder.build(capture.model.config, sharding.devices(sharding.make_mesh(devices=one)))
    tell = functools.partial(teller(teacher, capture.layout), jax.device_put(capture.params, one[0]))
    with alone(folder / f'.lock-{host}-of-{hosts}', log):
      for start, end in parts[host::hosts]:
        log(f'{folder}: sequences {start:,} to {end:,} of {n:,}')
        build_part = functools.partial(_build_shard, capture, tell, start, end)
        folders.open_or_build(folder / _name(start, end), build_part, log, _Shard)
    if not all((folder / _name(*part) / MANIFEST).exists() for part in parts):
      return None
    return finish(folder, capture, [_name(*part) for part in parts], about)


def begin(folder: Path, key: dict[str, Any]) -> None:
  """Marks the folder as this cache's, or ConfigError if it is another's."""
  path = folder / MANIFEST
  others = [] if not folder.exists() else [each for each in folder.iterdir() if each.name[0] != '.' and each != path]
  if path.exists():  # looked for last: another process may be here at the same time
    manifest, fault = read_json(path, _Manifest)
    if manifest is None:
      raise DamagedFile(f'{path}: cannot be read ({fault}); remove the folder')
    other = [name for name in key if manifest['key'].get(name) != key[name]]
    require(
      not other, f'{folder}: holds a cache of another {", ".join(other)}; choose another folder, or remove this one'
    )
    return
  require(not others, f'{folder}: holds something else (it has no {MANIFEST})')  # but locks and a manifest to be
  write_json(path, {'key': key, 'identity': identity(key)})


@contextlib.contextmanager
def alone(path: Path, log: Callable[[str], None]) -> Iterator[None]:
  """Waits until no other process of this machine has this lock; the kernel drops it when a process ends, however."""
  with open(path, 'a', encoding='utf-8') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      log(f'{path.parent}: another process is building it; waiting')
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


def finish(folder: Path, capture: Capture, shards: list[str], about: dict[str, Any]) -> dict[str, Any]:
  """Writes the manifest of a cache whose shards are all there."""
  facts = [folders.manifest(folder / name, _Shard) for name in shards]
  size = sum(described['size'] for each in facts for described in each['files'].values())
  tokens = sum(each['predicted'] for each in facts)
  length = capture.dataset.config.seq_len
  count = sum(each['records'] for each in facts)
  manifest = {
    'key': capture.key,
    'identity': identity(capture.key),
    'shards': [{'name': name, 'records': each['records']} for name, each in zip(shards, facts, strict=True)],
    'records': count,
    'tokens': tokens,  # that are predicted
    'bytes': size,
    'bytes_per_token': size / tokens,
    'width': max(each['width'] for each in facts),
    'nats': sum(each['nats'] for each in facts) / tokens,  # the teacher's loss
    'flops': flops_per_token(capture.model.config, length, backward=False) * count * length,
    'sources': [store.source for store in capture.stores],
    'model': to_dict(capture.model.config),
    'captured_in': capture.model.config.dtype,
    'versions': {name: version(name) for name in ('array_record', 'jax', 'numpy')},
    **about,
  }
  write_json(folder / MANIFEST, manifest)
  return manifest


def _name(start: int, end: int) -> str:
  return f'shard-{start:09d}-{end:09d}'


def _build_shard(capture: Capture, tell: Callable[[Any, Any], Any], start: int, end: int, path: Path) -> dict[str, Any]:
  layout, sequences = capture.layout, capture.sequences
  rows = max(BATCH // capture.dataset.config.seq_len, 1)
  writer = ArrayRecordWriter(str(path / 'records.array_record'), 'group_size:1,zstd')
  index, tokens, width, nats = [], 0, 0, 0.0
  for first in range(start, end, rows):
    here = [sequences[i] for i in range(first, min(first + rows, end))]
    filled = here + [np.zeros_like(here[0])] * (rows - len(here))  # one shape, whatever there is
    told = jax.device_get(tell(batches.batch_of(filled), _uniform(layout, filled, capture.seed)))
    for i, sequence in enumerate(here):
      own = {name: values[i] for name, values in told.items()}
      writer.write(records.encode(layout, sequence, own))
      mask = records.predicted(sequence)
      index.append(np.frombuffer(records.fingerprint(sequence)[:8], '<u8'))
      tokens += int(mask.sum())
      nats -= float(own['log_next'][mask].sum(dtype=np.float64))
      if layout.method == 'sampled' and mask.any():
        width = max(width, int((np.diff(np.sort(own['ids'][mask], axis=-1), axis=-1) != 0).sum(-1).max()) + 1)
  writer.close()
  np.concatenate(index).tofile(path / 'index')
  return {'records': end - start, 'predicted': tokens, 'width': width, 'nats': nats}


# --------------------------------------------------------------------------------------------------------- the teacher


def teller(model: Model, layout: Layout) -> Callable[[Params, Any, Any], Any]:
  """The function (params, batch, uniform [B, T, draws]) -> entries [B, T, ...] to be written down.

  Full logits exist for a chunk of tokens at a time.
  """

  def of_chunk(params: Params, hidden: jax.Array, targets: jax.Array, uniform: jax.Array) -> dict[str, jax.Array]:
    logits = model.head(params, hidden)[..., : layout.vocab].astype(jnp.float32)
    log_p = whole(log_softmax(logits))
    log_next = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    if layout.method == 'top_k':
      return {**signals.top_k(logits, layout.size)._asdict(), 'log_next': log_next}
    if layout.method == 'sampled':
      return {'ids': signals.sampled(logits, uniform).ids, 'log_next': log_next}
    return {'log_p': log_p, 'log_next': log_next}

  def tell(params: Params, batch: Batch, uniform: jax.Array) -> dict[str, jax.Array]:
    hidden = model.hidden(params, batch)
    pieces = losses.cut((hidden, batch['targets'], uniform), losses.CHUNK)
    return losses.uncut(jax.lax.map(lambda piece: of_chunk(params, *piece), pieces), hidden.shape[1])

  return jax.jit(tell)


def _uniform(layout: Layout, sequences: list[np.ndarray], seed: int) -> np.ndarray:
  """Numbers in [0, 1), [B, T, draws], each sequence's own by its hash; of other methods, none."""
  length = sequences[0].shape[1] - 1
  if layout.method != 'sampled':
    return np.zeros((len(sequences), length, 0), np.float32)

  def of(sequence: np.ndarray) -> np.ndarray:
    entropy = [int.from_bytes(records.fingerprint(sequence), 'little'), seed]
    return np.random.default_rng(entropy).random((length, layout.size), np.float32)

  return np.stack([of(sequence) for sequence in sequences])
