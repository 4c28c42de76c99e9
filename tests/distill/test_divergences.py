"""Divergences: zero at p = q, never negative, gradients in closed form, limits, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.distill.divergences import DIVERGENCES, jsd, kl, normalized_jsd, reverse_kl

V = 9
P, Q = 2 * jax.random.normal(jax.random.PRNGKey(0), (2, 5, V))
NAMES = sorted(DIVERGENCES)


def close(a, b, tolerance=1e-6):
  np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('mix', [0.0, 0.1, 0.5, 0.9, 1.0])
def test_zero_at_equality_and_positive_elsewhere(name, mix):
  f = DIVERGENCES[name]
  close(f(P, P, mix), np.zeros(5), 1e-6)
  vanishes = (name == 'jsd' and mix in (0, 1)) or (name.startswith('skew') and mix == 1)
  assert ((f(P, Q, mix) == 0) if vanishes else (f(P, Q, mix) > 0)).all()


@pytest.mark.parametrize('name', NAMES)
def test_a_constant_added_to_a_tokens_logits_changes_nothing(name):
  f = DIVERGENCES[name]
  shift = jnp.arange(5.0)[:, None]
  close(f(P + shift, Q - 3 * shift, 0.3), f(P, Q, 0.3), 1e-5)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('mix', [0.0, 0.1, 0.5, 1.0])
def test_padding_of_the_vocabulary_changes_no_value_and_no_gradient(name, mix):
  """V -> V + 64 by -inf, in both."""
  f = DIVERGENCES[name]

  def padded(z):
    return jnp.pad(z, ((0, 0), (0, 64)), constant_values=-jnp.inf)

  ours, theirs = (jax.value_and_grad(lambda z, g=g: f(g(P), g(z), mix).sum())(Q) for g in (lambda z: z, padded))
  close(ours[0], theirs[0], 1e-5)
  close(ours[1], theirs[1], 1e-5)
  assert np.isfinite(theirs[1]).all()


def closed(name, b):
  """dL/dz of the divergences of reference, by hand."""
  p, q = jax.nn.softmax(P), jax.nn.softmax(Q)
  if name == 'kl':
    return q - p
  if name == 'reverse_kl':
    return q * (jnp.log(q / p) - reverse_kl(P, Q)[:, None])
  if name in ('jsd', 'normalized_jsd'):
    m = b * p + (1 - b) * q
    grad = (1 - b) * q * (jnp.log(q / m) - (q * jnp.log(q / m)).sum(-1, keepdims=True))
    return grad / (b * (1 - b) if name == 'normalized_jsd' else 1)
  u = {
    'skew_kl': lambda: -(1 - b) * p / (b * p + (1 - b) * q),
    'skew_reverse_kl': lambda: jnp.log(q / (b * q + (1 - b) * p)) - b * q / (b * q + (1 - b) * p),
    'total_variation': lambda: jnp.sign(q - p) / 2,
  }[name]()
  return q * (u - (q * u).sum(-1, keepdims=True))


@pytest.mark.parametrize('b', [0.1, 0.5, 0.9])
@pytest.mark.parametrize('name', [name for name in NAMES if name != 'mse'])
def test_gradients_in_closed_form(name, b):
  close(jax.grad(lambda z: DIVERGENCES[name](P, z, b).sum())(Q), closed(name, b), 2e-6)


def test_mse_is_of_centred_logits():
  centred = (P - P.mean(-1, keepdims=True)) - (Q - Q.mean(-1, keepdims=True))
  close(DIVERGENCES['mse'](P, Q), (centred**2).mean(-1))


def test_limits_of_the_jsd():
  """JSD_b / b -> KL(p || q), JSD_b / (1 - b) -> KL(q || p); JSD_b = JSD_{1 - b} the other way round."""
  close(jsd(P, Q, 1e-5) / 1e-5, kl(P, Q), 3e-2)
  close(jsd(P, Q, 1 - 1e-5) / 1e-5, reverse_kl(P, Q), 3e-2)
  close(jsd(P, Q, 0.3), jsd(Q, P, 0.7))


ENDS = [0.0, 1e-6, 1e-4, 1e-3]
MIXES = [*ENDS, 0.5, *(1 - end for end in reversed(ENDS))]


def log_softmax_64(z):
  z = np.asarray(z, np.float64)
  z = z - z.max(-1, keepdims=True)
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


def by_definition(name, p_logits, q_logits, b):
  """(value, gradient by the logits of q, size of what float32 rounds on the way to it), in float64.

  u is the derivative by q, less what is the same for all tokens: the gradient of a softmax does not see that.
  """
  log_p, log_q = log_softmax_64(p_logits), log_softmax_64(q_logits)
  p, q = np.exp(log_p), np.exp(log_q)

  def log_ratio(log_x, log_y, share):
    """log((share y + (1 - share) x) / x), also where that is nearly 0."""
    small = share * np.expm1(log_y - log_x)
    direct = np.log(share * np.exp(log_y) + (1 - share) * np.exp(log_x)) - log_x
    return np.where(abs(small) < 0.1, np.log1p(np.clip(small, -0.1, 0.1)), direct)

  log_of_p, log_of_q = log_ratio(log_p, log_q, 1 - b), log_ratio(log_q, log_p, b)  # of m/p and m/q

  def sum_of(x):
    return x.sum(-1)

  if name == 'normalized_jsd':
    at_p = -log_of_p / (1 - b) if b < 1 else 1 - q / p
    at_q = -log_of_q / b if b > 0 else 1 - p / q
    value, u = sum_of(p * at_p + q * at_q), at_q
  elif name == 'jsd':
    value, u = sum_of(-b * p * log_of_p - (1 - b) * q * log_of_q), -(1 - b) * log_of_q
  elif name == 'skew_kl':
    value, u = sum_of(-p * log_of_p), -((1 - b) ** 2) * (p - q) / (b * p + (1 - b) * q)
  else:
    log_of_q = log_ratio(log_q, log_p, 1 - b)
    value, u = sum_of(-q * log_of_q), -log_of_q + (1 - b) * b * (p - q) / (b * q + (1 - b) * p)
  return value, q * (u - sum_of(q * u)[..., None]), np.linalg.norm(q * u, axis=-1)


@pytest.mark.parametrize('name', ['normalized_jsd', 'jsd', 'skew_kl', 'skew_reverse_kl'])
@pytest.mark.parametrize('mix', MIXES)
@pytest.mark.parametrize('scale', [0.3, 2.0, 8.0])
def test_float32_keeps_its_digits_up_to_both_ends_of_the_mix(name, mix, scale):
  p, q = (scale * jax.random.normal(key, (20, 40)) for key in jax.random.split(jax.random.PRNGKey(1)))
  value, pull = jax.vjp(lambda z: DIVERGENCES[name](p, z, jnp.float32(mix)), q)
  expected = by_definition(name, p, q, float(np.float32(mix)))
  (grad,) = pull(jnp.ones(20))
  np.testing.assert_allclose(value, expected[0], rtol=2e-6, atol=1e-13)
  # Near a = 1 all of the skew KLs is of second order in 1 - a. Where p/q is 1e10 and more, two digits of that are left.
  share = 1e-5 if scale < 8 or mix <= 0.9 or not name.startswith('skew') else 0.05
  for ours, theirs, size in zip(np.asarray(grad), *expected[1:], strict=True):
    assert np.linalg.norm(ours - theirs) <= share * np.linalg.norm(theirs) + 1e-6 * size


def test_the_ends_of_the_normalised_jsd_are_the_two_kls():
  """Values and gradients, also where one of the two distributions has next to nothing."""

  def of(divergence, p, q, mix):
    return jax.value_and_grad(lambda z: divergence(p, z, mix).sum())(q)

  for p, q in ((P, Q), (P / 4, Q / 4), (6 * P, 6 * Q)):
    for mix, end in ((0.0, kl), (1.0, reverse_kl)):
      ours, theirs = of(normalized_jsd, p, q, mix), of(end, p, q, mix)
      np.testing.assert_allclose(ours[0], theirs[0], rtol=2e-6)
      close(ours[1], theirs[1], 1e-5)


def test_the_normalised_jsd_is_continuous():
  values = np.stack([normalized_jsd(P / 4, Q / 4, b) for b in np.linspace(0, 1, 101)])
  assert np.abs(np.diff(values, axis=0)).max() < 0.02 * values.max()


@pytest.mark.parametrize('name', ['normalized_jsd', 'jsd', 'skew_kl', 'skew_reverse_kl'])
@pytest.mark.parametrize('mix', [0.0, 1e-6, 0.3, 1.0])
def test_tokens_that_only_one_of_the_two_has_leave_everything_finite(name, mix):
  p, q = P.at[:, 0].set(-jnp.inf), Q.at[:, 1].set(-jnp.inf)
  value, grad = jax.value_and_grad(lambda z: DIVERGENCES[name](p, z, mix).sum())(q)
  assert np.isfinite(value)
  assert np.isfinite(grad).all()


def test_skew_of_zero_is_the_kl():
  close(DIVERGENCES['skew_kl'](P, Q, 0.0), kl(P, Q))
  close(DIVERGENCES['skew_reverse_kl'](P, Q, 0.0), reverse_kl(P, Q))


def test_against_torch():
  """The two KLs, by another implementation."""
  torch = pytest.importorskip('torch')
  p, q = (torch.log_softmax(torch.tensor(np.asarray(z)), -1) for z in (P, Q))
  theirs = torch.nn.functional.kl_div(q, p, reduction='none', log_target=True).sum(-1)
  close(kl(P, Q), theirs.numpy(), 1e-5)
  theirs = torch.nn.functional.kl_div(p, q, reduction='none', log_target=True).sum(-1)
  close(reverse_kl(P, Q), theirs.numpy(), 1e-5)
