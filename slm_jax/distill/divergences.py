"""How far a student's distribution q is from a teacher's p, as functions of logits, in nats. float32 throughout.

    (p_logits, q_logits, mix) -> [...]        both [..., V], over the last axis, or blocks of it (vocabulary.py)

All are 0 at p = q and nowhere negative, and adding a constant to a token's logits changes none. A logit of -inf is an
entry that does not exist (padding of the vocabulary): it adds nothing to a value or a gradient. `mix` is the one number
that some of them have. Gradients in closed form, with q = softmax(z): dL/dz = q (u - <q, u>), u = dL/dq; see the tests.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from slm_jax import vocabulary
from slm_jax.vocabulary import Logits, each, total

Divergence = Callable[[Logits, Logits, jax.Array | float], jax.Array]

LOWEST = -1e5  # stands for log 0: its exponential is 0, and 0 times it is 0


def log_softmax(logits: Logits) -> Logits:
  """With LOWEST in place of -inf."""
  return vocabulary.log_softmax(logits, LOWEST)


def kl_of_logs(log_p: Logits, log_q: Logits) -> jax.Array:
  """sum p log(p/q) of log-probabilities."""
  return total(lambda log_p, log_q: jnp.exp(log_p) * (log_p - log_q), log_p, log_q)


def entropy_of_log(log_p: Logits) -> jax.Array:
  """-sum p log p."""
  return -total(lambda log_p: jnp.exp(log_p) * log_p, log_p)


def kl(p: Logits, q: Logits, mix: jax.Array | float = 0.0) -> jax.Array:
  """Forward KL(p || q) (Hinton et al., arXiv 1503.02531)."""
  return kl_of_logs(log_softmax(p), log_softmax(q))


def reverse_kl(p: Logits, q: Logits, mix: jax.Array | float = 0.0) -> jax.Array:
  """KL(q || p) (MiniLLM, arXiv 2306.08543)."""
  return kl_of_logs(log_softmax(q), log_softmax(p))


def jsd(p: Logits, q: Logits, mix: jax.Array | float) -> jax.Array:
  """b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q, b = mix (GKD, arXiv 2306.13649); 0 at both ends."""
  log_p, log_q = log_softmax(p), log_softmax(q)
  b = jnp.clip(mix, 1e-6, 1 - 1e-6)
  log_m = each(lambda log_p, log_q: jnp.logaddexp(log_p + jnp.log(b), log_q + jnp.log1p(-b)), log_p, log_q)
  return b * kl_of_logs(log_p, log_m) + (1 - b) * kl_of_logs(log_q, log_m)


def normalized_jsd(p: Logits, q: Logits, mix: jax.Array | float) -> jax.Array:
  """jsd / (b (1 - b)): goes to KL(p || q) as b -> 0 and to KL(q || p) as b -> 1, so that all b are of one scale.

  b is kept 1e-3 away from the ends, where float32 would lose the difference of p and m.
  """
  b = jnp.clip(mix, 1e-3, 1 - 1e-3)
  return jsd(p, q, b) / (b * (1 - b))


def skew_kl(p: Logits, q: Logits, mix: jax.Array | float) -> jax.Array:
  """KL(p || a p + (1 - a) q), a = mix; 0.1 in DistiLLM (arXiv 2402.03898)."""
  return _skew(log_softmax(p), log_softmax(q), mix)


def skew_reverse_kl(p: Logits, q: Logits, mix: jax.Array | float) -> jax.Array:
  """KL(q || a q + (1 - a) p), a = mix; 0.1 in DistiLLM (arXiv 2402.03898)."""
  return _skew(log_softmax(q), log_softmax(p), mix)


def _skew(log_p: Logits, log_q: Logits, mix: jax.Array | float) -> jax.Array:
  a = jnp.clip(mix, 0.0, 1 - 1e-6)
  log_a = jnp.maximum(jnp.log(a), LOWEST)  # log 0 would be fine as a value, but not in the gradient of logaddexp
  log_m = each(lambda log_p, log_q: jnp.logaddexp(log_p + log_a, log_q + jnp.log1p(-a)), log_p, log_q)
  return kl_of_logs(log_p, log_m)


def total_variation(p: Logits, q: Logits, mix: jax.Array | float = 0.0) -> jax.Array:
  """sum |p - q| / 2."""
  return total(lambda log_p, log_q: jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), log_softmax(p), log_softmax(q)) / 2


def mse(p: Logits, q: Logits, mix: jax.Array | float = 0.0) -> jax.Array:
  """Mean squared difference of the logits, each less its mean over the vocabulary (logits are defined up to that)."""

  def difference(p, q):
    there = (p > -jnp.inf) & (q > -jnp.inf)
    return jnp.where(there, p, 0.0) - jnp.where(there, q, 0.0), there.astype(jnp.float32)

  summed, n = total(difference, p, q)
  mean = (summed / n)[..., None]

  def squared(p, q):
    d, there = difference(p, q)
    return there * (d - mean) ** 2

  return total(squared, p, q) / n


DIVERGENCES: dict[str, Divergence] = {
  'kl': kl,
  'reverse_kl': reverse_kl,
  'jsd': jsd,
  'normalized_jsd': normalized_jsd,
  'skew_kl': skew_kl,
  'skew_reverse_kl': skew_reverse_kl,
  'total_variation': total_variation,
  'mse': mse,
}
