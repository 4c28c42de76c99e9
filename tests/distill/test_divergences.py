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
  scale = 1 / (1e-3 * (1 - 1e-3)) if name == 'normalized_jsd' and mix in (0, 1) else 1  # of rounding
  close(f(P, P, mix), np.zeros(5), 1e-6 * scale)
  if not (name == 'skew_kl' and mix == 1) and not (name.startswith('skew') and mix == 1):
    assert (f(P, Q, mix) > (0 if name != 'jsd' or mix not in (0, 1) else -1e-6)).all()


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
  close(jsd(P, Q, 1e-3) / 1e-3, kl(P, Q), 3e-2)
  close(jsd(P, Q, 1 - 1e-3) / 1e-3, reverse_kl(P, Q), 3e-2)
  close(jsd(P, Q, 0.3), jsd(Q, P, 0.7))


def test_the_normalised_jsd_is_continuous_up_to_both_ends():
  """And there it is the two KLs, to first order in 1e-3."""
  small = P / 4, Q / 4
  close(normalized_jsd(*small, 0.0), kl(*small), 2e-3)
  close(normalized_jsd(*small, 1.0), reverse_kl(*small), 2e-3)
  values = np.stack([normalized_jsd(*small, b) for b in np.linspace(0, 1, 101)])
  assert np.abs(np.diff(values, axis=0)).max() < 0.02 * values.max()


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
