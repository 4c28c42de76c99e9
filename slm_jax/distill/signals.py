"""What a student is told about the next token: a teacher's distribution, its k largest entries, or draws from it.

All three are computed for a chunk of tokens, [..., V] or [..., K], so that full logits never exist; `Logits` may be
blocks of the vocabulary (vocabulary.py). Each knows its loss
against the student's logits, and what is to be logged of it: always at temperature 1, so that runs compare.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from slm_jax import vocabulary
from slm_jax.distill.divergences import LOWEST, Divergence, entropy_of_log, kl_of_logs, log_softmax, total_variation
from slm_jax.model.api import Batch
from slm_jax.vocabulary import Logits, each

Tail = Literal['bucket', 'none', 'renormalize_teacher', 'renormalize_both']
Nats = jax.Array  # [...], one number a token


class Dense(NamedTuple):
  """All of the distribution."""

  logits: Logits  # float32 [..., V]; -inf: no such token


class TopK(NamedTuple):
  """The k largest entries at temperature 1, and how much probability all others have together."""

  ids: jax.Array  # int32 [..., K], all different
  log_p: jax.Array  # float32 [..., K]
  log_rest: jax.Array  # float32 [...]; -inf if nothing is left


class Sampled(NamedTuple):
  """Draws from the distribution at temperature 1: an unbiased estimate of it that has few entries."""

  ids: jax.Array  # int32 [..., U]
  weights: jax.Array  # float32 [..., U], count / draws; entries of weight 0 are padding


Signal = Dense | TopK | Sampled
# (signal, the student's logits, the chunk's entries of the batch, temperature, mix)
SignalLoss = Callable[[Any, Logits, Batch, jax.Array, jax.Array], Nats]


# ------------------------------------------------------------------------------------------------------ to make them


def top_k(logits: Logits, k: int) -> TopK:
  """Of float32 logits [..., V]; k <= V."""
  log_p = log_softmax(logits)
  kept, ids = vocabulary.largest(log_p, k)
  return TopK(ids, kept, vocabulary.log_z(log_p, without=ids))


def sampled(logits: Logits, uniform: jax.Array) -> Sampled:
  """One draw for each of the numbers in [0, 1), [..., U], by the inverse of the cumulative distribution."""
  ids = vocabulary.drawn(logits, uniform)
  return Sampled(ids, jnp.full(uniform.shape, 1 / uniform.shape[-1], jnp.float32))


# ------------------------------------------------------------------------------------------------------- their losses


def dense_loss(divergence: Divergence) -> SignalLoss:
  """T^2 D(p_T, q_T), p_T = softmax(z / T): the gradient's size does not depend on T (arXiv 1503.02531).

  T TVD(p_T, q_T) for the total variation, which is of first order in p - q and not of second.
  """
  order = 1 if divergence is total_variation else 2

  def loss(signal: Dense, logits, tokens, temperature, mix):
    p, q = (each(lambda z: z / temperature, z) for z in (signal.logits, logits))
    return temperature**order * divergence(p, q, mix)

  return loss


def policy_gradient() -> SignalLoss:
  """The estimate log q(y)/p(y) of KL(q || p) by the student's own draw y, the target; its gradient is REINFORCE's.

  Each token has its own reward log p(y) - log q(y), with no discount over later ones ("on-policy distillation"). The
  mean over draws of value and gradient are those of KL(q || p) at each position. At T = 1, whatever T is.
  """

  def loss(signal: Dense, logits, tokens, temperature, mix):
    at = tokens['targets'][..., None]
    log_p, log_q = (vocabulary.at(log_softmax(z), at)[..., 0] for z in (signal.logits, logits))
    estimate = jax.lax.stop_gradient(log_q - log_p)
    return estimate + estimate * (log_q - jax.lax.stop_gradient(log_q))

  return loss


def top_k_loss(tail: Tail = 'bucket') -> SignalLoss:
  """KL over the support S of the k entries; tail says what becomes of the probability P_R outside of it.

    bucket               KL of {in S, not in S}, plus P_S T^2 KL_T(p(.|S) || q(.|S)); at T = 1 the same as
                         sum_S p log(p/q) + P_R log(P_R/Q_R), one more class (LFM2, arXiv 2511.23404)

  The others are what other toolkits do. They are wrong, and here to show what that costs (experiments/sparse_targets):

    none                 sum_S p log(p/q): q = p / P_S is its minimum
    renormalize_teacher  KL(p(.|S) || q): the same minimum
    renormalize_both     KL(p(.|S) || q(.|S)): no gradient at all outside of S
  """

  def loss(signal: TopK, logits, tokens, temperature, mix):
    log_z = vocabulary.log_z(logits)
    z_S = vocabulary.at(logits, signal.ids)
    log_q_S = jnp.maximum(z_S - log_z[..., None], LOWEST)
    if tail == 'none':
      return kl_of_logs(signal.log_p, log_q_S)
    p_tempered, q_tempered = log_softmax(signal.log_p / temperature), log_softmax(z_S / temperature)
    if tail == 'renormalize_teacher':
      return kl_of_logs(log_softmax(signal.log_p), log_q_S)
    if tail == 'renormalize_both':
      return temperature**2 * kl_of_logs(p_tempered, q_tempered)
    log_in = jax.nn.logsumexp(signal.log_p, axis=-1)
    log_q_in = jax.nn.logsumexp(log_q_S, axis=-1)
    # Not log(1 - Q_S), which has no digits left where Q_S is near 1.
    log_q_rest = vocabulary.log_z(logits, without=signal.ids) - log_z
    inside = temperature**2 * kl_of_logs(p_tempered, q_tempered)
    log_p_2 = jnp.maximum(jnp.stack([log_in, signal.log_rest], axis=-1), LOWEST)
    log_q_2 = jnp.maximum(jnp.stack([log_q_in, log_q_rest], axis=-1), LOWEST)
    return kl_of_logs(log_p_2, log_q_2) + jnp.exp(log_in) * inside

  return loss


def sampled_loss() -> SignalLoss:
  """-sum_i t_i log q_i (RS-KD, arXiv 2503.16870): a cross-entropy, whose gradient is that of KL(p || q) in the mean."""

  def loss(signal: Sampled, logits, tokens, temperature, mix):
    z = vocabulary.at(logits, signal.ids)
    return vocabulary.log_z(logits) - (signal.weights * z).sum(-1)

  return loss


# ------------------------------------------------------------------------------------------------------- for the log


def logged(signal: Signal, logits: Logits) -> dict[str, Nats]:
  """At temperature 1. kl: KL(p || q), or that of the k entries and the rest, its lower bound. entropy: of the teacher.

  Draws say neither.
  """
  if isinstance(signal, Dense):
    log_p = log_softmax(signal.logits)
    return {'kl': kl_of_logs(log_p, log_softmax(logits)), 'entropy': entropy_of_log(log_p)}
  if isinstance(signal, TopK):
    one = jnp.float32(1)
    return {'kl': top_k_loss('bucket')(signal, logits, {}, one, one)}
  return {}
