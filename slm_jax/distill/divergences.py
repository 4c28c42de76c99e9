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
from slm_jax.vocabulary import Logits, total

Divergence = Callable[[Logits, Logits, jax.Array | float], jax.Array]

LOWEST = -1e5  # stands for log 0: its exponential is 0, and 0 times it is 0
FAR = 80.0  # exp of more may overflow; a ratio of more than exp(80) is as good as one of exp(80)
TINY = 1e-30  # the least that is divided by


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
  """Computes b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q, b = mix (GKD, arXiv 2306.13649).

  It is 0 at both ends.
  """
  return mix * (1 - mix) * normalized_jsd(p, q, mix)


def normalized_jsd(p: Logits, q: Logits, mix: jax.Array | float) -> jax.Array:
  """Computes jsd / (b (1 - b)), which has one scale for all b: KL(p || q) at b = 0, and KL(q || p) at b = 1."""

  def terms(log_p, log_q):
    difference, bend_p, bend_q = _towards_mixture(log_p, log_q, mix)
    slopes = (log_p, difference * (1 + bend_p)), (log_q, -difference * (1 + bend_q))
    return _with_slopes(difference * (bend_p - bend_q), *slopes)

  return total(terms, log_softmax(p), log_softmax(q))


def skew_kl(p: Logits, q: Logits, mix: jax.Array | float) -> jax.Array:
  """Computes KL(p || a p + (1 - a) q), a = mix; 0.1 in DistiLLM (arXiv 2402.03898). It is KL(p || q) at a = 0."""
  return _skew(log_softmax(p), log_softmax(q), mix)


def skew_reverse_kl(p: Logits, q: Logits, mix: jax.Array | float) -> jax.Array:
  """Computes KL(q || a q + (1 - a) p), a = mix; 0.1 in DistiLLM (arXiv 2402.03898). It is KL(q || p) at a = 0."""
  return _skew(log_softmax(q), log_softmax(p), mix)


def _skew(log_p: Logits, log_q: Logits, mix: jax.Array | float) -> jax.Array:
  """Computes KL(p || a p + (1 - a) q) as sum p log(p/m) - p + m, whose terms are nowhere negative."""
  rest = 1 - mix

  def terms(log_p, log_q):
    difference, bend_p, _ = _towards_mixture(log_p, log_q, mix)
    q_over_m = 1 / jnp.maximum(mix * jnp.exp(jnp.minimum(log_p - log_q, FAR)) + rest, TINY)
    q_over_m = jax.lax.stop_gradient(q_over_m)
    slopes = (log_p, rest * difference * (bend_p + rest * q_over_m)), (log_q, -(rest**2) * difference * q_over_m)
    return _with_slopes(rest * difference * bend_p, *slopes)

  return total(terms, log_p, log_q)


def _towards_mixture(
  log_p: jax.Array, log_q: jax.Array, mix: jax.Array | float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns p - q, f(m/p - 1) and f(m/q - 1) as constants, for f(y) = log(1 + y)/y - 1 and m = b p + (1 - b) q.

  With these, p log(p/m) = (1 - b) (p - q) (1 + f(m/p - 1)) and q log(q/m) = b (q - p) (1 + f(m/q - 1)). Nothing is
  divided by b or by 1 - b, so both ends are exact. Near them float32 would lose the differences of log p, log q, log m.
  """
  log_p, log_q, b = (jax.lax.stop_gradient(jnp.float32(x)) for x in (log_p, log_q, mix))
  d, rest = log_p - log_q, 1 - b
  difference = -jnp.sign(d) * jnp.exp(jnp.maximum(log_p, log_q)) * jnp.expm1(-jnp.abs(d))
  return difference, _bend(-d, rest, b), _bend(d, b, rest)


def _bend(d: jax.Array, share: jax.Array, rest: jax.Array) -> jax.Array:
  """Computes log(1 + y)/y - 1 for y = share (exp(d) - 1) and share + rest = 1. It is 0 at y = 0."""
  y = share * jnp.expm1(jnp.minimum(d, FAR))
  # Where y is close to -1, 1 + y has lost its digits.
  log_1_y = jnp.where(y > -0.5, jnp.log1p(jnp.maximum(y, -0.5)), jnp.logaddexp(jnp.log(rest), jnp.log(share) + d))
  series = -y * (1 / 2 - y * (1 / 3 - y * (1 / 4 - y * (1 / 5 - y * (1 / 6 - y * (1 / 7 - y / 8))))))
  small = jnp.abs(y) < 0.1
  return jnp.where(small, series, log_1_y / jnp.where(small, 1.0, y) - 1)


def _with_slopes(value: jax.Array, *given: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Returns the value, a constant, with a gradient: for each pair (array, slope) the slope, also a constant.

  The slopes are those of the sum over tokens, less what a softmax takes away from them: one number times p or q.
  """
  return value + sum(slope * (x - jax.lax.stop_gradient(x)) for x, slope in given)


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
