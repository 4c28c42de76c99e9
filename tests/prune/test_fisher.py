"""Three estimators of the Fisher diagonal, each against the sum that it is, written out on a small decoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax import losses
from slm_jax.config import ConfigError
from slm_jax.model import decoder
from slm_jax.model.config import ModelConfig
from slm_jax.prune import fisher
from slm_jax.prune.matrices import matrices, put

TINY = ModelConfig(vocab_size=11, d_model=6, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=8, max_len=8)
MODEL = decoder.build(TINY)
B, T = 4, 5


@functools.cache
def params():
  return jax.tree.map(lambda p: p * 12 if p.ndim > 1 else p, jax.jit(MODEL.init)(jax.random.PRNGKey(0)))


@functools.cache
def batch(ragged=True):
  rng = np.random.default_rng(0)
  lengths = np.array([T, 3, 2, 0]) if ragged else np.full(B, T)
  real = np.arange(T) < lengths[:, None]
  return {
    'inputs': jnp.asarray(rng.integers(0, 11, (B, T)), jnp.int32),
    'targets': jnp.asarray(rng.integers(0, 11, (B, T)), jnp.int32),
    'segments': jnp.asarray(real, jnp.int32),
    'mask': jnp.asarray(real & (np.arange(T) > 0), jnp.float32),  # the first token is not predicted
  }


def nats(w, batch):
  """-log p(target) of each token, [B,T]."""
  p = put(params(), w)
  log_p = jax.nn.log_softmax(MODEL.head(p, MODEL.hidden(p, batch)))
  return -jnp.take_along_axis(log_p, batch['targets'][..., None], axis=-1)[..., 0]


@functools.cache
def token_gradients(ragged=True):
  """Of each token's own loss, [B,T,L,I,O] by name."""
  return jax.jit(jax.jacrev(nats))(matrices(params()), batch(ragged))


def estimate(estimator, ragged=True, key=None):
  return fisher.average(estimator, MODEL, params(), [batch(ragged)], key)


def close(a, b, tolerance=1e-4):
  assert a.keys() == b.keys() != set()
  for name in b:
    np.testing.assert_allclose(a[name], b[name], rtol=tolerance, atol=tolerance * float(np.abs(b[name]).max()))


def over_tokens(weights, tree):
  return {name: np.einsum('bt,btlio->lio', weights, x) for name, x in tree.items()}


def test_the_gradient_is_that_of_the_mean_loss():
  mask = np.asarray(batch()['mask'])
  close(estimate(fisher.gradient), over_tokens(mask / mask.sum(), token_gradients()), 1e-3)


def test_per_sequence_is_the_mean_square_of_the_gradients_of_sequences_mean_losses():
  mask = np.asarray(batch()['mask'])
  rows = [i for i in range(B) if mask[i].sum()]
  assert len(rows) == 3
  expected = {name: 0 for name in token_gradients()}
  for i in rows:
    for name, g in token_gradients().items():
      expected[name] = expected[name] + np.einsum('t,tlio->lio', mask[i] / mask[i].sum(), g[i]) ** 2 / len(rows)
  close(estimate(fisher.per_sequence), expected)


def test_per_token_is_that_of_tokens_own_losses_where_positions_no_longer_mix():
  """In the last layer from o on; elsewhere it is another sum."""
  mask = np.asarray(batch()['mask'])
  found, own = estimate(fisher.per_token), {name: g**2 for name, g in token_gradients().items()}
  expected = over_tokens(mask / mask.sum(), own)
  last = TINY.n_layers - 1
  for name in ('o', 'gate', 'up', 'down'):
    np.testing.assert_allclose(found[name][last], expected[name][last], rtol=1e-4, atol=1e-7)
    assert not np.allclose(found[name][0], expected[name][0], rtol=0.05)
  assert not np.allclose(found['v'][last], expected['v'][last], rtol=0.05)


def test_taps_are_the_cotangents_of_a_matrixs_output():
  """sum_t x_t d_t^T, which makes them per token's squares, is the gradient; and a tap of zeros changes no logit."""
  config = TINY
  taps = {
    'up_tap': jnp.zeros((config.n_layers, B, T, config.d_ff)),
    'q_tap': jnp.zeros((config.n_layers, B, T, config.n_heads, config.head_dim)),
  }
  hidden = jax.jit(MODEL.hidden)
  np.testing.assert_array_equal(hidden({**params(), 'taps': taps}, batch()), hidden(params(), batch()))
  moved = {**taps, 'up_tap': taps['up_tap'].at[1, 0, 2].set(1.0)}
  change = jnp.abs(hidden({**params(), 'taps': moved}, batch()) - hidden(params(), batch())).max(-1)
  assert (np.asarray(change > 1e-3) == np.zeros((B, T), bool)).sum() == B * T - 1  # of that token only
  assert change[0, 2] > 1e-3


def exact_diagonal():
  """(1/N) sum_t diag(J_t^T (diag p - p p^T) J_t), J_t = d logits_t / dW: Gauss-Newton, by V pulls for each token."""

  def logits(w):
    p = put(params(), w)
    return MODEL.head(p, MODEL.hidden(p, batch()))

  w = matrices(params())
  p_BTV, jacobian = jax.nn.softmax(jax.jit(logits)(w)), jax.jit(jax.jacrev(logits))(w)
  mask = np.asarray(batch()['mask'])
  out = {}
  for name, j in jacobian.items():
    mean = np.einsum('btv,btvlio->btlio', p_BTV, j)
    out[name] = np.einsum('bt,btlio->lio', mask / mask.sum(), np.einsum('btv,btvlio->btlio', p_BTV, j**2) - mean**2)
  return out


def test_sampled_is_the_gauss_newton_diagonal():
  """Every entry, and the sum of each matrix, within 4 standard errors of the mean of 1000 draws."""

  def one(key):
    sums = fisher.sampled(MODEL, params(), batch(), key)
    return {name: x / sums.count for name, x in sums.sum.items()}

  draws = jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.PRNGKey(1), 1000))

  def off(draws, exact):  # in standard errors
    return np.abs(draws.mean(0) - exact) / (draws.std(0, ddof=1) / np.sqrt(len(draws)) + 1e-9)

  exact = exact_diagonal()
  entries = {name: off(np.asarray(draws[name]), x).max() for name, x in exact.items()}
  totals = {name: off(np.asarray(draws[name]).sum((1, 2, 3)), x.sum()) for name, x in exact.items()}
  print('in standard errors', entries, totals)
  assert max(entries.values()) < 4
  assert max(totals.values()) < 4
  # which tells it from the other estimators
  for other in (fisher.per_sequence, fisher.per_token):
    assert max(off(np.asarray(draws[name]), x).max() for name, x in estimate(other).items()) > 20


def test_with_equal_lengths_it_is_t_times_that_of_sequences():
  """h = T E[g_seq^2] over sampled labels: the same draws, as the gradient of the mean loss."""
  key = jax.random.PRNGKey(5)
  found = estimate(fisher.sampled, ragged=False, key=key)
  p, full = params(), batch(False)
  keys = jax.random.split(jax.random.fold_in(key, 0), B * T)
  logits = MODEL.head(p, MODEL.hidden(p, full)).reshape(B * T, -1)
  labels = jax.vmap(jax.random.categorical)(keys, logits).reshape(B, T)
  drawn = {**full, 'targets': labels}
  t = float(full['mask'][0].sum())
  close(found, {name: t * h for name, h in fisher.average(fisher.per_sequence, MODEL, p, [drawn]).items()})


def test_a_vocabulary_in_chunks_gives_the_same(monkeypatch):
  whole = {e: estimate(e) for e in (fisher.sampled, fisher.per_token)}
  monkeypatch.setattr(losses.over_chunks, '__defaults__', (2,))  # tokens of a chunk
  for estimator, expected in whole.items():
    close(estimate(estimator), expected, 1e-3)  # those of keys are what is left of sums a thousand times as large


def test_batches_add_up_and_none_is_an_error():
  halves = [{name: x[i : i + 2] for name, x in batch().items()} for i in (0, 2)]
  for estimator in (fisher.gradient, fisher.per_sequence):
    close(fisher.average(estimator, MODEL, params(), halves), estimate(estimator))
  a, b = (estimate(fisher.sampled, key=jax.random.PRNGKey(i)) for i in range(2))
  assert not np.allclose(a['up'], b['up'])
  with pytest.raises(ConfigError, match='no tokens'):
    fisher.average(fisher.gradient, MODEL, params(), [])
  with pytest.raises(ConfigError, match='no tokens'):
    fisher.average(fisher.gradient, MODEL, params(), [{**batch(), 'mask': jnp.zeros((B, T))}])
