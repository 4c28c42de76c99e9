"""How a finished student stands to its teacher, on held-out text and on what it writes itself. All at temperature 1.

    teacher_loss, teacher_ece     the teacher's cross-entropy and calibration error
    agreement                     share of tokens where both think the same token the most likely
    kl, reverse_kl                KL(p || q) and KL(q || p), p of the teacher, q of the student
    entropy, teacher_entropy      of q and p
    rollout_kl                    KL(q || p) a token of the student's own text (MiniLLM, arXiv 2306.08543)

Sums over tokens, in nats, over the tokenizer's vocabulary: what a model has beyond that is padding. If transforms of an
arm have different teachers, these are of the last one's.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from slm_jax import losses
from slm_jax.distill import rollouts
from slm_jax.distill.divergences import entropy_of_log, kl_of_logs, log_softmax
from slm_jax.distill.rollouts import Rows
from slm_jax.distill.teachers import Teacher, online
from slm_jax.losses import Term, Terms
from slm_jax.model.api import Batch, Model, Params
from slm_jax.step import Context, Resources, Slot, Transform
from slm_jax.vocabulary import whole

SEQUENCES = 64  # texts that the student writes, in all; a whole batch at a time
PROMPT = 8  # tokens of a document after which it does, where the data have no prompts
MAX_NEW = 64  # tokens that it writes at most, and at most three quarters of a sequence

Judge = Callable[[Slot, Params, Batch, Context], Terms]


def judge(student: Model, teacher: Teacher, resources: Resources) -> Judge:
  """By that teacher: the slot is what it remembers, its parameters are in `context.frozen`.

  Full logits exist for a chunk of tokens at a time. The rollouts are those of the first batches, up to SEQUENCES rows.
  """
  vocab = resources.vocab

  def compared(slot: Slot, params: Params, batch: Batch, context: Context, token_loss: Callable[..., Terms]) -> Terms:
    """Sums of token_loss(log p, log q, tokens)."""

    def of_chunk(logits, tokens, context):
      log_p = log_softmax(whole(teacher.logits(slot, tokens, context))[..., :vocab])
      return token_loss(log_p, log_softmax(logits[..., :vocab]), tokens)

    batch = {**batch, **teacher.data(slot, batch, context)}
    return losses.over_chunks(of_chunk, student.head, params, student.hidden(params, batch), batch, context)

  def own_text(slot: Slot, params: Params, batch: Batch, context: Context) -> Terms:
    rows = written(student, params, batch, jax.random.fold_in(context.key, context.step), resources)
    return compared(slot, params, rollouts.entries(rows), context, on_rollout)

  def measure(slot: Slot, params: Params, batch: Batch, context: Context) -> Terms:
    some = {name: x[:: -(-len(x) // SEQUENCES)] for name, x in batch.items()}
    nothing = {'rollout_kl': Term(jnp.float32(0), jnp.float32(0), 0.0)}
    due = context.step * len(some['inputs']) < SEQUENCES
    rollout = jax.lax.cond(due, lambda: own_text(slot, params, some, context), lambda: nothing)
    return {**compared(slot, params, batch, context, on_text), **rollout}

  return measure


def on_text(log_p: jax.Array, log_q: jax.Array, tokens: Batch) -> Terms:
  targets, mask = tokens['targets'], tokens['mask']

  def term(values: jax.Array) -> Term:
    return Term((values * mask).sum(), mask.sum(), 0.0)

  same = jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)
  return {
    'teacher_loss': term(-jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]),
    'agreement': term(same.astype(jnp.float32)),
    'kl': term(kl_of_logs(log_p, log_q)),
    'reverse_kl': term(kl_of_logs(log_q, log_p)),
    'entropy': term(entropy_of_log(log_q)),
    'teacher_entropy': term(entropy_of_log(log_p)),
    'teacher_ece': losses.calibration(log_p, targets, mask),
  }


def on_rollout(log_p: jax.Array, log_q: jax.Array, tokens: Batch) -> Terms:
  """Exact at each position, given the text before it; only the text is drawn."""
  mask = tokens['mask']
  return {'rollout_kl': Term((kl_of_logs(log_q, log_p) * mask).sum(), mask.sum(), 0.0)}


def written(student: Model, params: Params, batch: Batch, key: jax.Array, resources: Resources) -> Rows:
  """The student's continuations of the beginnings of a batch's rows, drawn at temperature 1.

  A prompt is what the data say (data.prompt_end), or else PROMPT tokens, or all but the last of a shorter document.
  Rows without a document have none, nor do those whose own prompt leaves less room than is to be written.
  """
  t = batch['inputs'].shape[1]
  max_new = max(1, min(MAX_NEW, 3 * t // 4))
  segments = batch['segments']
  first = (segments == segments[:, :1]).sum(axis=1, dtype=jnp.int32)  # tokens of the row's first document
  prompts = rollouts.of_mask(batch, batch['mask'])
  beginning = jnp.maximum(jnp.minimum(first - 1, min(PROMPT, t - max_new)), 1)
  start = jnp.where(prompts.start > 1, prompts.start, jnp.where(rollouts.there(prompts), beginning, 0))
  return rollouts.written(
    student.config,
    params,
    prompts._replace(start=start),
    key,
    max_new=max_new,
    temperature=1.0,
    vocab=resources.vocab,
    eos=resources.eos,
    pad=resources.pad,
  )


def asked_at_the_end(transform: Transform, arm: str, resources: Resources) -> Transform:
  """The transform, with what that arm says of the finished student; it is loaded only then."""
  name, load = f'teacher_{arm}', functools.cache(lambda: resources.load(arm))

  def of_arm(slot: Slot, params: Params, batch: Batch, context: Context) -> Terms:
    return judge(resources.model, online(load()[0], name, resources.vocab), resources)((), params, batch, context)

  return transform._replace(judge=of_arm, witnesses=lambda: {name: load()[1]})
