"""Sparse signals: unbiased draws, the tail bucket, and what the renormalised variants get wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.distill import signals
from slm_jax.distill.divergences import DIVERGENCES, kl, log_softmax, reverse_kl
from slm_jax.distill.signals import Dense, policy_gradient, sampled_loss, top_k, top_k_loss

V, K = 24, 5
P, Q = 1.5 * jax.random.normal(jax.random.PRNGKey(0), (2, 7, V))
ONE = jnp.float32(1)


def close(a, b, tolerance=1e-6):
  np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


def value(loss, signal, logits, temperature=ONE):
  return loss(signal, logits, {}, temperature, jnp.float32(0.5))


# --------------------------------------------------------------------------------------------------------------- top-k


def test_top_k_holds_the_largest_and_all_of_the_rest():
  signal = top_k(P, K)
  p = np.asarray(jax.nn.softmax(P))
  close(np.exp(signal.log_p), -np.sort(-p, axis=-1)[:, :K])
  close(np.take_along_axis(p, np.asarray(signal.ids), -1), np.exp(signal.log_p))
  close(np.exp(signal.log_rest), 1 - np.exp(signal.log_p).sum(-1))


def test_the_tail_bucket_is_a_lower_bound_and_equal_with_the_whole_vocabulary():
  bucket = value(top_k_loss('bucket'), top_k(P, K), Q)
  assert (bucket <= kl(P, Q) + 1e-6).all()
  assert (bucket < 0.9 * kl(P, Q)).any()
  close(value(top_k_loss('bucket'), top_k(P, V), Q), kl(P, Q))


def test_what_the_tail_bucket_leaves_out_is_the_kl_inside_of_the_rest():
  signal = top_k(P, K)
  outside = np.ones((7, V), bool)
  np.put_along_axis(outside, np.asarray(signal.ids), False, -1)
  rest = [jnp.where(outside, z, -jnp.inf) for z in (P, Q)]
  left_out = jnp.exp(signal.log_rest) * kl(*rest)
  close(kl(P, Q) - value(top_k_loss('bucket'), signal, Q), left_out)


def test_at_temperature_one_it_is_the_sum_over_k_plus_one_classes():
  signal, q = top_k(P, K), jax.nn.softmax(Q)
  q_S = jnp.take_along_axis(q, signal.ids, -1)
  p_S, p_R = jnp.exp(signal.log_p), jnp.exp(signal.log_rest)
  by_hand = (p_S * jnp.log(p_S / q_S)).sum(-1) + p_R * jnp.log(p_R / (1 - q_S.sum(-1)))
  close(value(top_k_loss('bucket'), signal, Q), by_hand, 1e-5)


def test_gradient_of_the_tail_bucket():
  """q - p on S, q (1 - P_R/Q_R) off it."""
  signal, p, q = top_k(P, K), jax.nn.softmax(P), jax.nn.softmax(Q)
  on = np.zeros((7, V), bool)
  np.put_along_axis(on, np.asarray(signal.ids), True, -1)
  q_R = jnp.where(on, 0, q).sum(-1, keepdims=True)
  expected = jnp.where(on, q - p, q * (1 - jnp.exp(signal.log_rest)[:, None] / q_R))
  close(jax.grad(lambda z: value(top_k_loss('bucket'), signal, z).sum())(Q), expected, 1e-5)


def test_the_rest_of_a_certain_student_keeps_its_digits():
  """log(1 - Q_S) in float32 would be log 0."""
  logits = jnp.zeros((1, V)).at[0, 0].set(40.0)
  signal = top_k(jnp.zeros((1, V)).at[0, 0].set(5.0), 1)
  loss, grad = jax.value_and_grad(lambda z: value(top_k_loss('bucket'), signal, z).sum())(logits)
  assert np.isfinite(loss)
  assert loss > 3
  assert grad[0, 0] > 0.1  # and it is told to be less certain


@pytest.mark.parametrize('tail', ['none', 'renormalize_teacher'])
def test_fixed_point_without_a_tail_is_over_confident(tail):
  """q = p / P_S on S and 0 off it: the gradient there is zero, and at q = p it is not."""
  signal = top_k(P, K)

  def slope(z):
    return jax.grad(lambda z: value(top_k_loss(tail), signal, z).sum())(z)

  on = np.zeros((7, V), bool)
  np.put_along_axis(on, np.asarray(signal.ids), True, -1)
  close(slope(jnp.where(on, P, -60.0)), np.zeros((7, V)))
  assert np.abs(slope(P)).max() > 0.05


def test_both_renormalised_there_is_no_gradient_outside_of_the_support():
  signal = top_k(P, K)
  grad = np.asarray(jax.grad(lambda z: value(top_k_loss('renormalize_both'), signal, z).sum())(Q))
  on = np.zeros((7, V), bool)
  np.put_along_axis(on, np.asarray(signal.ids), True, -1)
  assert (grad[~on] == 0).all()
  assert np.abs(grad[on]).max() > 0.01


def test_temperature_of_the_bucket_keeps_the_gradients_size():
  def norm(t):
    loss = lambda z: value(top_k_loss('renormalize_both'), top_k(P, K), z, jnp.float32(t)).sum()  # noqa: E731
    return jnp.linalg.norm(jax.grad(loss)(Q))

  assert norm(32.0) / norm(16.0) == pytest.approx(1, rel=0.1)


# -------------------------------------------------------------------------------------------------------------- draws


def test_draws_are_by_the_inverse_of_the_cumulative_distribution():
  uniform = jnp.tile((jnp.arange(20_000) + 0.5) / 20_000, (7, 1))
  drawn = signals.sampled(P, uniform)
  shares = np.stack([np.bincount(row, minlength=V) for row in np.asarray(drawn.ids)]) / 20_000
  close(shares, jax.nn.softmax(P), 1.1e-4)
  assert drawn.weights.sum(-1) == pytest.approx(1)


def test_a_draw_never_gives_what_has_no_probability():
  z = jnp.where(jnp.arange(V) % 2 == 0, P, -jnp.inf)
  ids = signals.sampled(z, jnp.tile(jnp.array([0.0, 0.25, 0.5, 1 - 2**-24]), (7, 1))).ids
  assert (np.asarray(ids) % 2 == 0).all()


def test_the_mean_gradient_of_draws_is_the_full_gradient():
  """RS-KD is unbiased: 2,000 gradients, within 4 standard errors in norm, 5 elementwise."""

  def gradient(key):
    signal = signals.sampled(P, jax.random.uniform(key, (7, 12)))
    return jax.grad(lambda z: value(sampled_loss(), signal, z).sum())(Q)

  each = np.asarray(jax.lax.map(gradient, jax.random.split(jax.random.PRNGKey(1), 2000)), np.float64)
  error = each.mean(0) - np.asarray(jax.grad(lambda z: kl(P, z).sum())(Q))
  se = each.std(0, ddof=1) / np.sqrt(2000)
  assert np.linalg.norm(error) < 4 * np.linalg.norm(se)
  assert np.abs(error / np.maximum(se, 1e-9)).max() < 5


def test_entries_of_weight_zero_are_padding():
  signal = signals.sampled(P, jax.random.uniform(jax.random.PRNGKey(1), (7, 6)))
  padded = signal._replace(ids=jnp.pad(signal.ids, ((0, 0), (0, 3))), weights=jnp.pad(signal.weights, ((0, 0), (0, 3))))
  close(value(sampled_loss(), signal, Q), value(sampled_loss(), padded, Q))


# ---------------------------------------------------------------------------------------------------- policy gradient


def test_the_policy_gradient_is_the_reverse_kl_in_the_mean():
  """Exactly: the mean over all tokens y, each with its probability q(y)."""
  q = jax.nn.softmax(Q)

  def of(y):
    tokens = {'targets': jnp.full(7, y)}
    loss = lambda z: policy_gradient()(Dense(P), z, tokens, ONE, ONE)  # noqa: E731
    return loss(Q), jax.vmap(jax.grad(lambda z, row: loss(Q.at[row].set(z))[row]))(Q, jnp.arange(7))

  values, slopes = zip(*(of(y) for y in range(V)), strict=True)
  close(sum(q[:, y] * values[y] for y in range(V)), reverse_kl(P, Q), 1e-5)
  mean = sum(q[:, y, None] * slopes[y] for y in range(V))
  close(mean, jax.grad(lambda z: reverse_kl(P, z).sum())(Q), 1e-5)


# ------------------------------------------------------------------------------------------------------- what is logged


@pytest.mark.parametrize('name', sorted(DIVERGENCES))
def test_no_divergences_gradient_depends_on_the_temperature_where_it_is_high(name):
  loss = signals.dense_loss(DIVERGENCES[name])

  def size(temperature):
    return jnp.linalg.norm(jax.grad(lambda q: value(loss, Dense(P), q, jnp.float32(temperature)).sum())(Q))

  np.testing.assert_allclose(size(32.0), size(16.0), rtol=0.1)


def test_what_is_logged_is_at_temperature_one():
  plain = signals.logged(Dense(P), Q)
  close(plain['kl'], kl(P, Q), 1e-5)
  close(plain['entropy'], -(jax.nn.softmax(P) * log_softmax(P)).sum(-1), 1e-5)
  close(signals.logged(top_k(P, V), Q)['kl'], kl(P, Q), 1e-5)
