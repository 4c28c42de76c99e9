"""Who teaches: models beside the student's, several at once, or an average of the student itself.

A teacher works in two parts. `data` runs once a batch, outside of the gradient, and leaves what it found in the batch
(hidden states); `logits` turns that into a distribution for a chunk of tokens at a time, when the student's logits of
the same tokens exist. What a teacher remembers is a slot; frozen parameters are not, they are in `context.frozen`.

    Source = what a loss needs: dense(teacher) | largest(teacher, k) | drawn(teacher, draws) | cached (cached.py)
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from slm_jax.config import require
from slm_jax.distill import signals
from slm_jax.distill.divergences import log_softmax
from slm_jax.distill.signals import Dense, Signal
from slm_jax.ema import follow
from slm_jax.model.api import Batch, Model, Params
from slm_jax.step import Context, Slot, TrainState, Update
from slm_jax.vocabulary import Logits, each, first

Average = Literal['probabilities', 'logits']
Precision = Literal['own', 'bfloat16', 'int8']


class Teacher(NamedTuple):
  """V is the tokenizer's vocabulary: what a model has beyond is padding, and no teacher speaks of it."""

  init: Callable[[Params], Slot]
  data: Callable[[Slot, Batch, Context], dict[str, jax.Array]]  # entries [B, T, ...] of the batch
  logits: Callable[[Slot, Batch, Context], Logits]  # (slot, a chunk's entries, context) -> float32 [..., V]
  after: Callable[[Slot, TrainState, Update], Slot]


class Source(NamedTuple):
  """A teacher, and which of the signals it gives."""

  init: Callable[[Params], Slot]
  data: Callable[[Slot, Batch, Context], dict[str, jax.Array]]
  signal: Callable[[Slot, Batch, Context], Signal]  # for a chunk
  after: Callable[[Slot, TrainState, Update], Slot]


def online(model: Model, key: str = 'teacher', vocab: int | None = None) -> Teacher:
  """Another model, whose parameters are `frozen[key]`, as `stored` made them. vocab: all that it has, unless given."""

  def params(context):
    return restored(context.frozen[key])

  return Teacher(
    init=lambda params: (),
    data=lambda slot, batch, context: {f'{key}_hidden': model.hidden(params(context), batch)},
    logits=lambda slot, tokens, context: first(model.head(params(context), tokens[f'{key}_hidden']), vocab),
    after=lambda slot, state, update: slot,
  )


def average_of(teachers: Sequence[Teacher], shares: Sequence[float], average: Average) -> Teacher:
  """Several teachers: sum_i share_i p_i, or softmax(sum_i share_i z_i), the normalised geometric mean of the p_i."""
  total = sum(shares)

  def data(slots, batch, context):
    return {k: v for t, slot in zip(teachers, slots, strict=True) for k, v in t.data(slot, batch, context).items()}

  def logits(slots, tokens, context):
    logs = [log_softmax(t.logits(slot, tokens, context)) for t, slot in zip(teachers, slots, strict=True)]
    if average == 'logits':
      return each(lambda *logs: sum(s / total * p for s, p in zip(shares, logs, strict=True)), *logs)

    def mean(*logs):
      return jax.nn.logsumexp(jnp.stack([jnp.log(s / total) + p for s, p in zip(shares, logs, strict=True)]), axis=0)

    return each(mean, *logs)

  return Teacher(
    init=lambda params: tuple(t.init(params) for t in teachers),
    data=data,
    logits=logits,
    after=lambda slots, state, update: tuple(
      t.after(slot, state, update) for t, slot in zip(teachers, slots, strict=True)
    ),
  )


def own_average(model: Model, name: str, vocab: int | None = None) -> Teacher:
  """The student's own moving average; its decay is the traced `name`.decay (mean teacher, arXiv 1703.01780)."""

  return Teacher(
    init=lambda params: jax.tree.map(lambda p: p.astype(jnp.float32), params),
    data=lambda slot, batch, context: {f'{name}_hidden': model.hidden(slot, batch)},
    logits=lambda slot, tokens, context: first(model.head(slot, tokens[f'{name}_hidden']), vocab),
    after=lambda slot, state, update: follow(slot, state.params, update.context.step, state.hparams[f'{name}.decay']),
  )


# ------------------------------------------------------------------------------------------------ what they tell


def dense(teacher: Teacher) -> Source:
  """All of the distribution."""
  return Source(
    teacher.init,
    teacher.data,
    lambda slot, tokens, context: Dense(teacher.logits(slot, tokens, context)),
    teacher.after,
  )


def largest(teacher: Teacher, k: int) -> Source:
  """The k largest entries, and what is left."""
  return Source(
    teacher.init,
    teacher.data,
    lambda slot, tokens, context: signals.top_k(teacher.logits(slot, tokens, context), k),
    teacher.after,
  )


def drawn(teacher: Teacher, draws: int, name: str) -> Source:
  """Independent draws, other ones in each step. The random numbers, not the draws, are made before the chunks."""

  def data(slot, batch, context):
    key = jax.random.fold_in(context.key, zlib.crc32(name.encode()))
    uniform = jax.random.uniform(key, (*batch['inputs'].shape, draws))
    return {**teacher.data(slot, batch, context), f'{name}_uniform': uniform}

  def signal(slot, tokens, context):
    return signals.sampled(teacher.logits(slot, tokens, context), tokens[f'{name}_uniform'])

  return Source(teacher.init, data, signal, teacher.after)


# ------------------------------------------------------------------------------------------- frozen parameters, stored


def check_precision(spec: Any, config: Any, key: str) -> None:
  """Raises ConfigError if another transform has one of the teachers of `spec` in memory, in another precision.

  A teacher's parameters are in memory once, as `frozen['teacher_NAME']`.
  """
  own = {spec.teacher, *getattr(spec, 'co_teachers', ())}
  for other in config.transforms:
    holds = getattr(other, 'holds_teacher', False)
    theirs = {getattr(other, 'teacher', ''), *getattr(other, 'co_teachers', ())} if holds else set()
    precision = getattr(other, 'precision', spec.precision)
    require(
      not own & theirs or precision == spec.precision,
      f'{key}.precision={spec.precision}: transforms.{other.kind} has the same teacher, in precision {precision}',
    )


class Int8(NamedTuple):
  """A matrix of 8-bit integers; times `scale`, it is the matrix."""

  values: jax.Array  # int8
  scale: jax.Array  # float32, one for each layer and entry of the last axis


def stored(params: Params, precision: Precision) -> Params:
  """`params` as `frozen` holds them. int8: the layers' matrices, symmetric, to nearest; the rest is bfloat16."""
  if precision == 'own':
    return params

  def of(path, w):
    if precision == 'int8' and path[0].key == 'layers' and w.ndim > 2 and not path[-1].key.endswith('_bias'):
      w = w.astype(jnp.float32)
      scale = jnp.maximum(jnp.abs(w).max(axis=tuple(range(1, w.ndim - 1)), keepdims=True), 1e-30) / 127
      return Int8(jnp.round(w / scale).astype(jnp.int8), scale)
    return w.astype(jnp.bfloat16)

  def all_of(params):
    return jax.tree_util.tree_map_with_path(of, params)

  shapes_only = isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct)
  return jax.eval_shape(all_of, params) if shapes_only else jax.jit(all_of)(params)


def restored(params: Params) -> Params:
  """What a model can be applied to."""

  def of(w: Any):
    return (w.values * w.scale).astype(jnp.bfloat16) if isinstance(w, Int8) else w

  return jax.tree.map(of, params, is_leaf=lambda w: isinstance(w, Int8))
