"""Distillation across vocabularies: a teacher whose tokens are not the student's.

    alm   tau KL(Bern(p_c^(1/tau)) || Bern(q_c^(1/tau))) over chunks c of text, of which the two models give the
          probabilities p_c and q_c (approximate likelihood matching, Minixhofer et al., arXiv 2503.20083)
    uld   sum_i |p_(i) - q_(i)| of the two distributions of the next token, each sorted, where both have read the same
          text; it does not know which token is which (universal logit distillation, Boizard et al., arXiv 2402.12030)

Which chunks and places those are, is found when a batch is made (alignment.py).

Shapes: B batch, T time of the student, M of the teacher, E the teacher's width, V its or the student's vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax import losses
from slm_jax.conditions import Needs
from slm_jax.config import require, setting
from slm_jax.data import batches, packing
from slm_jax.data.batches import HostBatch
from slm_jax.data.dataset import Dataset
from slm_jax.data.tokenizer import Tokenizer
from slm_jax.distill import alignment
from slm_jax.distill.divergences import log_softmax
from slm_jax.distill.teachers import Precision, check_precision, restored, stored
from slm_jax.losses import Auxiliary, Term, Terms
from slm_jax.model.api import Batch, Model, Params
from slm_jax.model.config import ModelConfig
from slm_jax.model.decoder import in_blocks
from slm_jax.model.flops import flops_per_token
from slm_jax.step import Context, Resources, Slot, Transform, TransformConfig
from slm_jax.vocabulary import Logits, at, first

LOOKED_AT = 64  # sequences of each source that are aligned before anything is compiled
COVERED = 0.5  # of their predicted tokens, at least so many must lie in a chunk
SURE = -1e-6  # log p of a chunk counts as at most so much: log(1 - p) is finite


# ------------------------------------------------------------------------------------------------------- configuration


@dataclasses.dataclass(frozen=True)
class CrossDistill(TransformConfig):
  """(1 - w) CE(y, q) + w D(p, q) with a teacher that has another tokenizer."""

  kind: ClassVar[str] = 'cross_distill'
  holds_teacher: ClassVar[bool] = True  # in memory, as `frozen`
  teacher: str = setting('', arm=True)  # name of the arm
  divergence: Literal['alm', 'uld'] = 'alm'
  weight: float = setting(0.5, '[0, 1]', traced=True)  # w of the teacher's term; the data's has 1 - w
  # Tau of alm; at 1, chunks of several tokens say next to nothing.
  temperature: float = setting(100.0, '(0, inf)', traced=True)
  # Tokens of the teacher that a sequence may take; 0: as many as data.seq_len.
  length: int = setting(0, '[1, 2^31) or 0')
  precision: Precision = 'own'  # of the teacher's parameters in memory

  needs: ClassVar[Needs] = {'temperature': (lambda its: its.divergence == 'alm', 'divergence=alm')}

  def check(self, key: str) -> None:
    require(bool(self.teacher), f'{key}.teacher={self.teacher!r}: name the arm to learn from')

  def check_in(self, config: Any, key: str) -> None:
    blocks = config.train.vocab_chunk
    require(
      self.divergence != 'uld' or not blocks,
      f'{key}.divergence=uld: sorts all of the vocabulary, but train.vocab_chunk={blocks}; allowed: 0',
    )
    check_precision(self, config, key)
    for other in config.transforms:
      require(other.kind != 'on_policy', f'{key}: text is aligned before the step, and on_policy writes it in the step')

  def open(self, dataset: Dataset, resources: Resources) -> Dataset:
    own, other, length = dataset.tokenizer, resources.tokenizer_of(self.teacher), self._length(resources)

    def join(sequences: Sequence[np.ndarray]) -> HostBatch:
      return alignment.entries(self.kind, [alignment.align(each, own, other, length) for each in sequences])

    stores = [store for store in dataset.stores if store.has('train')]
    notices = (*dataset.notices, *self._look([store.train() for store in stores], own, other, length))
    return dataset._replace(joins=(*dataset.joins, join), valid_joins=(*dataset.valid_joins, join), notices=notices)

  def _look(self, sources: Sequence[Any], own: Any, other: Any, length: int) -> list[str]:
    """Tries some sequences. A notice if the teacher sees not all of their text; ConfigError if it sees too little."""
    sample = [sequences[i] for sequences in sources for i in packing.spread(len(sequences), LOOKED_AT)]
    found = [alignment.align(each, own, other, length) for each in sample]
    predicted = sum(float(batches.batch_of([each])['mask'].sum()) for each in sample)
    covered = sum(int((row.chunk > 0).sum()) for row in found) / max(predicted, 1)
    wanted = max(row.wanted for row in found)
    chunks = sum(int(row.chunk.max()) for row in found)
    what = f'{covered:.1%} of the tokens lie in a chunk of text, {predicted * covered / max(chunks, 1):.2f} in each'
    needs = f'the teacher has up to {wanted} tokens for a sequence, {length + 1} allowed'
    require(covered >= COVERED, f'{self.kind}.length={self.length}: only {what}; {needs}')
    return [f'{self.kind}.length={self.length}: {what}; {needs}'] if wanted > length + 1 else []

  def stand_in(self, dataset: Dataset, resources: Resources) -> Dataset:
    vocab = resources.tokenizer_of(self.teacher).vocab_size
    join = functools.partial(noise, self.kind, vocab, self._length(resources))
    return dataset._replace(joins=(*dataset.joins, join), valid_joins=(*dataset.valid_joins, join))

  def build(self, resources: Resources) -> tuple[Transform, dict[str, Any]]:
    model, params = resources.load_any(self.teacher)
    other, length, name = resources.tokenizer_of(self.teacher), self._length(resources), f'teacher_{self.teacher}'
    require(
      length <= model.config.max_len,
      f'{self.kind}.length={length}: longer than max_len={model.config.max_len} of the teacher {self.teacher}',
    )
    other.check_vocabulary(model.config.vocab_size)
    teacher = Crossed(in_blocks(model, resources.vocab_chunk), name, other.vocab_size, self.kind)
    numbers = {f'{self.kind}.weight': self.weight, f'{self.kind}.temperature': self.temperature}
    if self.divergence == 'alm':
      made = matched(teacher, numbers, resources.vocab, resources.seq_len)
    else:
      made = ranked_alike(teacher, numbers, resources.vocab)
    flops = self.count_flops(resources.model.config, resources.seq_len, {self.teacher: model.config})
    judge = judged(resources.model, teacher, resources.vocab, resources.tokenizer)
    return made._replace(flops=flops, judge=judge), {name: stored(params, self.precision)}

  def count_flops(self, model: ModelConfig, seq_len: int, others: Mapping[str, ModelConfig]) -> dict[str, float]:
    """The teacher reads `length` slots of its own for each sequence of the student, padding included."""
    length = self.length or seq_len
    return {self.teacher: flops_per_token(others[self.teacher], length, backward=False) * length / seq_len}

  def _length(self, resources: Resources) -> int:
    return self.length or resources.seq_len


def noise(name: str, vocab: int, length: int, sequences: Sequence[np.ndarray]) -> HostBatch:
  """Entries of the right shapes that mean nothing."""
  rng, b, t = np.random.default_rng(0), len(sequences), sequences[0].shape[1] - 1
  place = {'chunk': t, 'place': t, 'its_chunk': length}
  each = {key: np.tile(np.arange(n, dtype=np.int32) % min(t, length) + 1, (b, 1)) for key, n in place.items()}
  its = {key: rng.integers(0, vocab, (b, length)).astype(np.int32) for key in ('its_inputs', 'its_targets')}
  return {f'{name}_{key}': x for key, x in {**each, **its, 'its_segments': np.ones((b, length), np.int32)}.items()}


# ---------------------------------------------------------------------------------------------------------- the teacher


@dataclasses.dataclass(frozen=True)
class Crossed:
  """A model that reads the text of a batch in tokens of its own; its parameters are `frozen[key]`."""

  model: Model
  key: str
  vocab: int  # of its tokenizer; what the model has beyond is padding
  name: str  # before the entries of the batch

  def hidden(self, batch: Batch, context: Context) -> jax.Array:
    """[B,M,E]"""
    its = {what: batch[f'{self.name}_its_{what}'] for what in ('inputs', 'segments')}
    return self.model.hidden(self._params(context), its)

  def logits(self, hidden: jax.Array, context: Context) -> jax.Array:
    return self.model.head(self._params(context), hidden)[..., : self.vocab]

  def log_p(self, batch: Batch, context: Context) -> jax.Array:
    """[B,T], nats of each chunk of the text."""
    its = {'targets': batch[f'{self.name}_its_targets'], 'chunk': batch[f'{self.name}_its_chunk']}
    t = batch['inputs'].shape[1]

    def of_chunks(logits, tokens, context):
      return {'log_p': by_chunk(first(logits, self.vocab), tokens['targets'], tokens['chunk'], t)}

    params, hidden = self._params(context), self.hidden(batch, context)
    return losses.over_chunks(of_chunks, self.model.head, params, hidden, its, context)['log_p'].sum

  def _params(self, context: Context) -> Params:
    return restored(context.frozen[self.key])


def by_chunk(logits: Logits, targets: jax.Array, chunk: jax.Array, t: int) -> Term:
  """Sums of log softmax(logits)[target] over the tokens of each chunk, [B,T]; they add up like any term.

  Full logits never exist, though a chunk of text may lie in two chunks of tokens.
  """
  there = chunk > 0
  log_q = at(log_softmax(logits), targets[..., None])[..., 0]
  rows, zeros = jnp.arange(len(chunk))[:, None], jnp.zeros((len(chunk), t + 1), jnp.float32)
  total, count = (
    zeros.at[rows, chunk].add(x)[:, 1:] for x in (jnp.where(there, log_q, 0.0), there.astype(jnp.float32))
  )
  return Term(total, count, 0.0)


# ----------------------------------------------------------------------------------------------------------- the losses


def binary_kl(log_p: jax.Array, log_q: jax.Array, tau: jax.Array | float) -> jax.Array:
  """tau KL(Bern(p^(1/tau)) || Bern(q^(1/tau))), elementwise.

  The factor keeps its size: for large tau it is u log(u/v) - u + v, of the nats u = -log p and v = -log q. A student
  that is surer than SURE has the gradient of one that is as sure as that: with none, nothing would make it less sure.
  """
  a, b = ((x - jax.lax.stop_gradient(jnp.maximum(x - SURE, 0))) / tau for x in (log_p, log_q))
  not_a, not_b = jnp.log(-jnp.expm1(a)), jnp.log(-jnp.expm1(b))
  return tau * (jnp.exp(a) * (a - b) - jnp.expm1(a) * (not_a - not_b))


def sorted_distance(logits: jax.Array, others: jax.Array) -> jax.Array:
  """sum_i |p_(i) - q_(i)|, 0..2, of two distributions over [..., V] of any two sizes; the shorter one has zeros."""
  size = max(logits.shape[-1], others.shape[-1])

  def ranked(z):
    p = jnp.sort(jax.nn.softmax(z), axis=-1, descending=True)
    return jnp.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, size - p.shape[-1])])

  return jnp.abs(ranked(logits) - ranked(others)).sum(-1)


def matched(teacher: Crossed, numbers: Mapping[str, float], vocab: int, t: int) -> Transform:
  """alm, in the mean over the chunks of a batch. t: tokens of a sequence. vocab: beyond it the student has padding.

  numbers: weight, temperature, each with the name and a dot before it; both are traced.
  """
  name = teacher.name

  def data(slot, params, batch, context):
    return {**batch, f'{name}_log_p': jax.lax.stop_gradient(teacher.log_p(batch, context))}

  def token_loss(slot, fn):
    def with_chunks(logits, tokens, context):
      log_q = by_chunk(first(logits, vocab), tokens['targets'], tokens[f'{name}_chunk'], t)
      return {**fn(logits, tokens, context), f'{name}_log_q': log_q}

    return with_chunks

  def loss(slot, fn):
    def with_alm(params, hidden_BTD, batch, context):
      terms = dict(fn(params, hidden_BTD, batch, context))
      log_q, in_chunks, mask = terms.pop(f'{name}_log_q'), batch[f'{name}_chunk'] > 0, batch['mask']
      there = log_q.count > 0
      nats = binary_kl(batch[f'{name}_log_p'], log_q.sum, context.hparams[f'{name}.temperature'])
      return {
        **terms,
        name: Term(jnp.where(there, nats, 0.0).sum(), there.sum(dtype=jnp.float32), context.hparams[f'{name}.weight']),
        f'{name}_covered': Term((in_chunks * mask).sum(), mask.sum(), 0.0),
      }

    return with_alm

  return Transform(name, numbers, data=data, token_loss=token_loss, loss=loss, data_weight=_data_weight(name))


def ranked_alike(teacher: Crossed, numbers: Mapping[str, float], vocab: int) -> Transform:
  """uld, in the mean over the places of a batch; otherwise as `matched`."""
  name = teacher.name

  def data(slot, params, batch, context):
    at = jnp.maximum(batch[f'{name}_place'] - 1, 0)
    hidden_BTE = jnp.take_along_axis(teacher.hidden(batch, context), at[..., None], axis=1)
    return {**batch, f'{name}_hidden': jax.lax.stop_gradient(hidden_BTE)}

  def token_loss(slot, fn):
    def with_distance(logits, tokens, context):
      theirs = jax.lax.stop_gradient(teacher.logits(tokens[f'{name}_hidden'], context))
      there, mask = (tokens[f'{name}_place'] > 0).astype(jnp.float32), tokens['mask']
      distance = sorted_distance(logits[..., :vocab], theirs) * there
      return {
        **fn(logits, tokens, context),
        name: Auxiliary(distance.sum(), there.sum(), context.hparams[f'{name}.weight']),
        f'{name}_covered': Term((there * mask).sum(), mask.sum(), 0.0),
      }

    return with_distance

  return Transform(name, numbers, data=data, token_loss=token_loss, data_weight=_data_weight(name))


def _data_weight(name: str) -> Callable[[Context], jax.Array]:
  return lambda context: 1 - context.hparams[f'{name}.weight']


# ------------------------------------------------------------------------------------------------- the finished student


def judged(student: Model, teacher: Crossed, vocab: int, tokenizer: Tokenizer) -> Callable[..., Terms]:
  """On held-out text, over what lies in chunks:

  teacher_bits_per_byte   of the teacher; the student's own is among what any arm is measured by
  chunk_kl                KL of the two Bernoullis of a chunk, at tau = 1
  """

  def measure(slot: Slot, params: Params, batch: Batch, context: Context) -> Terms:
    t = batch['inputs'].shape[1]

    def of_chunks(logits, tokens, context):
      return {'log_q': by_chunk(logits[..., :vocab], tokens['targets'], tokens['chunk'], t)}

    own = {'targets': batch['targets'], 'chunk': batch[f'{teacher.name}_chunk']}
    hidden = student.hidden(params, batch)
    log_q = losses.over_chunks(of_chunks, student.head, params, hidden, own, context)['log_q']
    log_p, there = teacher.log_p(batch, context), log_q.count > 0
    first = (batch['inputs'] == tokenizer.bos).astype(jnp.int32)
    n_bytes = (jnp.asarray(tokenizer.text_bytes)[first, own['targets']] * (own['chunk'] > 0)).sum(dtype=jnp.float32)
    kl = jnp.where(there, binary_kl(log_p, log_q.sum, 1.0), 0.0)
    return {
      'teacher_bits_per_byte': Term(-jnp.where(there, log_p, 0.0).sum() / math.log(2), n_bytes, 0.0),
      'chunk_kl': Term(kl.sum(), there.sum(dtype=jnp.float32), 0.0),
    }

  return measure
