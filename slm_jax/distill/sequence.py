"""Sequence-level distillation: the student reads what a teacher wrote (Kim & Rush, arXiv 1606.07947).

The teacher writes texts once, from <bos> or after the prompts of the training documents (data.prompt_end), with its
cache of keys and values; they are packed and kept as any other text is, and a share of the training sequences is taken
from them. What is evaluated on stays as it is.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from slm_jax import distributed, sharding
from slm_jax.conditions import Needs
from slm_jax.config import require, setting
from slm_jax.data import batches, folder, packing, sources, store
from slm_jax.data.dataset import Dataset
from slm_jax.data.packing import Piece
from slm_jax.data.store import Store
from slm_jax.distill import capture
from slm_jax.distill.judge import asked_at_the_end
from slm_jax.model.api import Model, Params
from slm_jax.model.decode import generate
from slm_jax.model.flops import flops_per_token
from slm_jax.step import Resources, Transform, TransformConfig

FORMAT = 2  # of what is written; part of the key
BATCH = 64  # texts that are written side by side


class _Written(store.Manifest):
  flops: float
  unfinished: int
  about: list[Any]


@dataclasses.dataclass(frozen=True)
class SequenceDistill(TransformConfig):
  """Train on texts that another arm's model writes, among the arm's own."""

  kind: ClassVar[str] = 'sequence_distill'
  before: ClassVar[tuple[str, ...]] = ('cached_distill',)  # which is to hold its texts as well
  teacher: str = setting('', arm=True)  # name of the arm
  documents: int = setting(10_000, '[1, 2^31)')  # that it writes, each at most a sequence long
  temperature: float = setting(1.0, '[0, inf)')  # of its draws; 0: greedy
  top_p: float = setting(1.0, '(0, 1]')  # of its draws
  share: float = setting(0.5, '(0, 1]')  # of the training sequences that it wrote; the others are the arm's own
  seed: int = setting(0, '[0, 2^32)')  # of its draws

  needs: ClassVar[Needs] = dict.fromkeys(('top_p', 'seed'), (lambda its: its.temperature, 'a temperature above 0'))

  def check(self, key: str) -> None:
    require(bool(self.teacher), f'{key}.teacher={self.teacher!r}: name the arm that writes')

  def check_in(self, config: Any, key: str) -> None:
    prompts = self.temperature > 0 or bool(config.data.prompt_end) or self.documents == 1
    require(prompts, f'{key}.temperature=0: without data.prompt_end, all {self.documents} texts would be the same')

  def open(self, dataset: Dataset, resources: Resources) -> Dataset:
    texts = self._store(dataset, resources)
    own = batches.order([texts.train()], (), dataset.config.seed)
    mixed = grain.MapDataset.mix([dataset.train, own], [1 - self.share, self.share]) if self.share < 1 else own
    made = {**dataset.made, texts.path.name: texts.manifest['flops']}
    notices = (*dataset.notices, *texts.notices, *self._unfinished(texts))
    return dataset._replace(train=mixed, stores=(*dataset.stores, texts), made=made, notices=notices)

  def build(self, resources: Resources) -> tuple[Transform, dict[str, Any]]:
    return asked_at_the_end(Transform(self.kind), self.teacher, resources), {}

  def _store(self, dataset: Dataset, resources: Resources) -> Store:
    """The texts; written first if they are not there, by one process, on its first device."""
    model, params = resources.load(self.teacher)
    params = sharding.to_host(params)  # by all processes together
    config = dataset.config
    key = {
      'format': [FORMAT, store.FORMAT],
      'teacher': capture.teacher_hash(model, params),
      'tokenizer': dataset.tokenizer.fingerprint,
      'data': [sources.digest(s.manifest['key']) for s in dataset.stores] if config.prompt_end else [],
      **{name: getattr(self, name) for name in ('documents', 'temperature', 'top_p', 'seed')},
      **{name: getattr(config, name) for name in ('seq_len', 'packing', 'prompt_end')},
    }
    path = resources.folder / f'written-{sources.digest(key)}'
    build = functools.partial(self._build, dataset, model, params, key)

    def opened() -> dict[str, Any]:
      resources.folder.mkdir(parents=True, exist_ok=True)
      with capture.alone(path.with_name(f'.lock-{path.name}'), logging.info):
        return folder.open_or_build(path, build, logging.info, _Written)

    return Store(f'{self.teacher}’s texts', path, distributed.main_first(opened))

  def _unfinished(self, texts: Store) -> list[str]:
    """A notice of texts that end nowhere, since the student learns from their beginnings alone."""
    n, (all_, teacher, limit) = texts.manifest['unfinished'], texts.manifest['about']
    return [f'{self.kind}: {n} of {all_} texts of {teacher} reached {limit} tokens without an end'] if n else []

  def _build(self, dataset: Dataset, model: Model, params: Params, key: dict[str, Any], path: Path) -> dict[str, Any]:
    tokens, limit = dataset.tokenizer, min(dataset.config.seq_len + 1, model.config.max_len)
    prompts = prompts_of(dataset.stores, tokens.bos, limit) if dataset.config.prompt_end else [np.array([tokens.bos])]
    require(bool(prompts), f'{self.kind}: no prompt of the training documents has at most half of {limit} tokens')
    texts = self.texts(model, params, prompts, limit, tokens.vocab_size, tokens.eos, tokens.pad)
    unfinished = 0

    def pieces() -> Iterator[Piece]:
      nonlocal unfinished
      for prompt, text in texts:
        unfinished += int(text[-1] != tokens.eos)
        yield Piece(text, prompt if dataset.config.prompt_end else 0)

    facts = store.write(path / 'train.array_record', pieces(), dataset.config, tokens)
    return {
      'key': key,
      'source': self.teacher,
      'splits': {'train': facts},
      'unfinished': unfinished,
      'about': [self.documents, self.teacher, limit],
      'flops': flops_per_token(model.config, limit, backward=False) * facts['tokens'],
    }

  def texts(
    self, model: Model, params: Params, prompts: Sequence[np.ndarray], limit: int, vocab: int, eos: int, pad: int
  ) -> Iterator[tuple[int, np.ndarray]]:
    """`(tokens of the prompt, all tokens)` of each text, up to its <eos> or `limit`; the prompts serve in turn."""
    room = max(map(len, prompts))
    write = jax.jit(generate, static_argnums=0, static_argnames=('max_new', 'vocab', 'eos', 'pad'))
    own = jax.device_put(params, jax.local_devices()[0])
    for number, start in enumerate(range(0, self.documents, BATCH)):
      rows = [prompts[i % len(prompts)] for i in range(start, min(start + BATCH, self.documents))]
      filled = [*rows, *[rows[0]] * (BATCH - len(rows))]  # one shape, whatever there is
      new = write(
        model.config,
        own,
        jnp.asarray(np.stack([np.pad(row, (0, room - len(row))) for row in filled]), jnp.int32),
        jnp.asarray([len(row) for row in filled], jnp.int32),
        jax.random.fold_in(jax.random.PRNGKey(self.seed), number),
        max_new=limit - room,
        temperature=jnp.float32(self.temperature),
        top_p=None if self.top_p == 1 else jnp.float32(self.top_p),
        vocab=vocab,
        eos=eos,
        pad=pad,
      )
      for row, text in zip(rows, np.asarray(new), strict=False):
        ended = text == eos
        end = int(ended.argmax()) + 1 if ended.any() else len(text)
        yield len(row), np.concatenate([row, text[:end]]).astype(np.uint32)


def prompts_of(stores: Sequence[Store], bos: int, limit: int) -> list[np.ndarray]:
  """The prompts of the training documents, in their order: those that stand whole in a sequence, and in half of one."""
  found = []
  for records in (its.train() for its in stores if its.has('train')):
    for i in range(len(records)):
      tokens, segments = records[i]
      ids, flagged = packing.documents(segments), segments >= packing.PROMPT
      ends = np.flatnonzero((ids[1:] == ids[:-1]) & flagged[:-1] & ~flagged[1:]) + 1
      for end in ends:
        prompt = tokens[:end][ids[:end] == ids[end]]
        if prompt[0] == bos and len(prompt) <= limit // 2:
          found.append(prompt)
  return found
