"""The way of the data: sources -> tokenizer -> token stores -> batches."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grain

from slm_jax.config import require
from slm_jax.data import batches, folder, sources, tokenizer
from slm_jax.data.batches import HostBatch, Join, Prefetch
from slm_jax.data.config import DataConfig
from slm_jax.data.records import Report
from slm_jax.data.sources import HeldOut, Source
from slm_jax.data.store import Store, open_store
from slm_jax.data.tokenizer import Tokenizer
from slm_jax.data.valid import Valid
from slm_jax.files import expanded


class Dataset(NamedTuple):
  """Tokenised text, ready to be trained and evaluated on."""

  config: DataConfig
  tokenizer: Tokenizer
  stores: tuple[Store, ...]  # one a source; their manifests tell counts, padding and bad input
  train: grain.MapDataset  # [2, seq_len + 1] by index, endless
  valid: Valid
  host: int = 0
  hosts: int = 1
  joins: tuple[Join, ...] = ()  # what a training batch has beside its text
  valid_joins: tuple[Join, ...] = ()  # and one of the valid split
  made: Mapping[str, float] = {}  # FLOPs of what was made for it (texts, predictions of a teacher), by its content
  notices: tuple[str, ...] = ()  # what changes what is read: one sentence each, the same at every opening

  def batch(self, step: int) -> HostBatch:
    """This host's rows of the batch that `step` (0, 1, ...) is taken on; a pure function of (config.seed, step)."""
    return batches.train_batch(self.train, step, self.config.batch_size, self.host, self.hosts, self.joins)

  def row(self) -> HostBatch:
    """A batch of one row: the shapes of one of any size, which may be too large to be made."""
    return batches.train_batch(self.train, 0, 1, 0, 1, self.joins)

  def batches(self, start: int, ahead: int = 2, put: Callable[[Any], Any] = lambda x: x) -> Prefetch:
    """batch(start), batch(start + 1), ... by a thread that is `ahead` of its consumer; to be used in a `with`."""
    return Prefetch(self.batch, start, ahead, put)

  def calibration(self, sequences: int) -> Iterator[HostBatch]:
    """At least so many of the training sequences, in batches: the same ones on all hosts."""
    whole = self._replace(host=0, hosts=1, joins=())
    return (whole.batch(step) for step in range(-(-sequences // self.config.batch_size)))

  def valid_batches(self, size: int, n_bytes: int = 0) -> Iterator[HostBatch]:
    """The text of an evaluation on about so many bytes of the valid split, or on all of it, in batches of one shape."""
    found = self.valid.packed(n_bytes).sequences
    return batches.valid_batches(found, size, self.host, self.hosts, self.valid_joins)

  @property
  def bytes_per_token(self) -> float:
    """UTF-8 bytes of the sources' training text per predicted token, of which the end of a document is one."""
    facts = [store.manifest['splits']['train'] for store in self.stores if store.has('train')]
    shares = self.config.weights or [each['records'] for each in facts]  # a transform's stores have shares of their own
    rates = [(share / each['records'], each) for share, each in zip(shares, facts, strict=False)]
    return sum(rate * each['bytes'] for rate, each in rates) / sum(rate * each['predicted'] for rate, each in rates)


def open_data(config: DataConfig, cache: Path, log: Callable[[str], None], host: int = 0, hosts: int = 1) -> Dataset:
  """Opens the data of a configuration; what is not in the folder `cache` yet, or is damaged there, is built.

  host of hosts: whose rows of each batch are wanted.
  ConfigError: a source that does not exist, cannot be read or is empty; input that `config.errors` does not allow;
  sources that changed since `config.content` was taken; a vocabulary that cannot be made; a batch that hosts cannot
  share; a full disk.
  """
  require(config.batch_size % hosts == 0, f'data.batch_size={config.batch_size}: not divisible among {hosts} hosts')
  found = sources.open_sources(config)
  content = sources.fingerprint(config, found)
  require(
    config.content in ('', content),
    f'data.content={config.content!r}: the files now hold {content!r}; they changed since the experiment was launched',
  )
  held_out = HeldOut(found, config)
  its_tokenizer, rebuilt = _tokenizer(config, found, held_out, cache, log)
  stores = tuple(open_store(source, config, its_tokenizer, cache, log, held_out) for source in found)
  train = [store.train() for store in stores if store.has('train')]
  valid = [store.valid() for store in stores if store.has('valid')]
  return Dataset(
    config,
    its_tokenizer,
    stores,
    batches.order(train, config.weights, config.seed),
    Valid(valid, config, its_tokenizer),
    host,
    hosts,
    notices=tuple(dict.fromkeys(itertools.chain(rebuilt, *(s.notices for s in found), *(s.notices for s in stores)))),
  )


def _tokenizer(
  config: DataConfig, found: list[Source], held_out: HeldOut, cache: Path, log: Callable[[str], None]
) -> tuple[Tokenizer, list[str]]:
  """The configuration's tokenizer, and notices of it.

  A SentencePiece without a file is trained, once, on the sources' training splits.
  """
  if config.tokenizer == 'bytes':
    return tokenizer.Bytes(), []
  if config.tokenizer_file:
    return tokenizer.load(expanded(config.tokenizer_file)), []
  training = [source for source in found if source.role != 'valid']
  key = [
    [(source.role, source.fingerprint) for source in training],
    held_out.fingerprint,
    [getattr(config, name) for name in ('vocab_size', 'errors', 'text_field', 'documents', 'valid_fraction')],
    [tokenizer.SETTINGS, tokenizer.SAMPLE_BYTES],
  ]

  def texts() -> Iterator[str]:
    for source in training:
      for split, document in sources.documents(source, config, Report(config.errors), held_out):
        if split == 'valid':
          break
        yield document.text

  def build(path: Path) -> dict[str, Any]:
    model = tokenizer.train(tokenizer.sample(texts()), config.vocab_size)
    (path / 'tokenizer.model').write_bytes(model.serialize())
    return {'fingerprint': model.fingerprint}

  path = cache / f'tokenizer-{sources.digest(key)}'
  fault = folder.rebuilt(folder.open_or_build(path, build, log))
  rebuilt = [f'{path} was damaged ({fault}), and the tokenizer was trained again'] if fault else []
  return tokenizer.load(path / 'tokenizer.model'), rebuilt
