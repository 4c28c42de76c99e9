"""Statistics against numpy over the tokens one by one, and the laws of a monoid."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.config import ConfigError
from slm_jax.model import decoder
from slm_jax.model.api import Feature
from slm_jax.model.config import ModelConfig
from slm_jax.prune.matrices import SITES, matrices
from slm_jax.prune.stats import KINDS, collect, collect_all, merge

TINY = ModelConfig(vocab_size=32, d_model=12, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=20, max_len=16)
B, T = 6, 8


@functools.cache
def model_and_params(dtype='float32'):
  model = decoder.build(dataclasses.replace(TINY, dtype=dtype))
  return model, jax.tree.map(lambda p: p * 8 if p.ndim > 2 else p, jax.jit(model.init)(jax.random.PRNGKey(0)))


def ragged(seed=0, b=B):
  """Rows that end in padding; one of two documents; one that is padding only."""
  rng = np.random.default_rng(seed)
  segments = (np.arange(T) < rng.integers(2, T + 1, b)[:, None]).astype(np.int32)
  segments[0, T // 2 :] *= 2
  segments[-1] = 0
  return {'inputs': jnp.asarray(rng.integers(0, 32, (b, T)), jnp.int32), 'segments': jnp.asarray(segments)}


def rows(batch, index):
  return {name: x[jnp.asarray(index)] for name, x in batch.items()}


@functools.cache
def compiled(gram=True, dtype='float32'):
  model, params = model_and_params(dtype)
  return functools.partial(jax.jit(lambda params, batch: collect(model, params, batch, gram)), params)


@functools.cache
def features_of(dtype):
  model, _ = model_and_params(dtype)
  wanted = [Feature(kind, layer) for kind in ('hidden', *KINDS) for layer in range(kind != 'hidden', TINY.n_layers + 1)]
  return jax.jit(lambda params, batch: model.features(params, batch, wanted)[1])


def seen(batch, kind, layer, dtype='float32'):
  """What a matrix or the stream was given, float64 [B,T,I]."""
  x = features_of(dtype)(model_and_params(dtype)[1], batch)[Feature(kind, layer)]
  return np.asarray(x.astype(jnp.float32), np.float64).reshape(*batch['inputs'].shape, -1)


def close(a, b, tolerance=1e-5):
  """Each array, relative to its largest entry."""
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * float(np.abs(np.asarray(y)).max()))


def test_every_sum_is_that_over_the_tokens_one_by_one():
  batch, stats = ragged(), compiled()(ragged())
  real = np.asarray(batch['segments']) > 0
  assert stats.tokens == real.sum()
  assert stats.sequences == B - 1
  for kind in KINDS:
    for layer in range(TINY.n_layers):
      x_BTI = seen(batch, kind, layer + 1)
      x_NI = x_BTI[real]
      moments = stats.moments[kind]
      assert moments.count == len(x_NI)
      np.testing.assert_allclose(moments.mean[layer], x_NI.mean(0), rtol=1e-5, atol=1e-6)
      np.testing.assert_allclose(moments.variance[layer], x_NI.var(0, ddof=1), rtol=1e-4, atol=1e-7)
      np.testing.assert_allclose(moments.squares[layer], (x_NI**2).sum(0), rtol=1e-5)
      by_sequence = [np.abs(x_BTI[i][real[i]]).mean(0) ** 2 for i in range(B) if real[i].any()]
      np.testing.assert_allclose(stats.strength[kind][layer], sum(by_sequence), rtol=1e-5)
      close(stats.gram[kind][layer], x_NI.T @ x_NI)


def test_influence_and_angles_of_the_residual_stream():
  batch, stats = ragged(), compiled()(ragged())
  real = np.asarray(batch['segments']) > 0
  stream = [seen(batch, 'hidden', layer)[real] for layer in range(TINY.n_layers + 1)]

  def cosines(x, y):
    return (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)

  for i in range(TINY.n_layers):
    np.testing.assert_allclose(stats.influence[i], (1 - cosines(stream[i], stream[i + 1])).sum(), rtol=1e-4)
    assert stats.influence[i] > 0.1  # the layers do something, so that this says something
    for j in range(i + 1, TINY.n_layers + 1):
      np.testing.assert_allclose(
        stats.angle[i, j], np.arccos(cosines(stream[i], stream[j])).sum() / np.pi, rtol=1e-4, atol=1e-4
      )


def test_the_inputs_are_those_of_the_matrices():
  stats, w = compiled()(ragged()), matrices(model_and_params()[1])
  for name, w_LIO in w.items():
    assert stats.moments[SITES[name].into].mean.shape == w_LIO.shape[:2]
    assert stats.gram[SITES[name].into].shape == (*w_LIO.shape[:2], w_LIO.shape[1])


def test_statistics_of_parts_merge_to_those_of_the_whole_in_any_order_and_grouping():
  batch = ragged()
  a, b, c = (compiled()(rows(batch, part)) for part in ([0, 1], [2, 3], [4, 5]))
  whole = compiled()(batch)
  close(merge(merge(a, b), c), whole)
  close(merge(a, merge(b, c)), whole)
  close(merge(merge(c, a), b), whole)
  zero = jax.tree.map(jnp.zeros_like, a)
  close(merge(a, zero), a, 0)
  close(merge(zero, a), a, 0)


def test_old_and_new_mean_are_kept_apart():
  """Far-off means, few tokens: the merge whose means alias one another loses (mean_a - mean_b)^2."""
  a, b = compiled()(rows(ragged(), [0])), compiled()(rows(ragged(), [1]))
  far = a.moments['into_o']._replace(mean=a.moments['into_o'].mean + 100)
  m2 = merge(a._replace(moments={**a.moments, 'into_o': far}), b).moments['into_o'].m2
  expected = far.m2 + b.moments['into_o'].m2
  between = far.count * b.moments['into_o'].count / (far.count + b.moments['into_o'].count)
  np.testing.assert_allclose(m2, expected + between * (far.mean - b.moments['into_o'].mean) ** 2, rtol=1e-5)


@pytest.mark.parametrize('fill', [0, 31])
def test_padding_counts_nowhere(fill):
  """Neither the tokens that fill a row up nor rows of padding change anything, whatever they hold."""
  batch = ragged()
  other = {**batch, 'inputs': jnp.where(batch['segments'] > 0, batch['inputs'], fill)}
  more = jax.tree.map(lambda x: jnp.pad(x, ((0, 3), (0, 5))), other)
  more['inputs'] = jnp.where(more['segments'] > 0, more['inputs'], fill)
  close(compiled()(other), compiled()(batch))
  close(compiled()(more), compiled()(batch))
  unmasked = compiled()({**other, 'segments': jnp.ones((B, T), jnp.int32)})
  assert unmasked.tokens == B * T  # and that is another result
  assert not np.allclose(unmasked.moments['into_down'].mean, compiled()(batch).moments['into_down'].mean, rtol=1e-2)


def test_all_batches_at_once_and_one_after_another():
  model, params = model_and_params()
  batches = [{**ragged(seed), 'more': None} for seed in range(3)]
  expected = functools.reduce(merge, [compiled(gram=False)(ragged(seed)) for seed in range(3)])
  assert expected.gram == {}
  close(collect_all(model, params, iter(batches)), expected)


def test_sums_of_a_bfloat16_model_are_float32():
  """Thousands of equal tokens: a sum in bfloat16 stops growing at 256 of them."""
  batch = {'inputs': jnp.full((64, 16), 5, jnp.int32), 'segments': jnp.ones((64, 16), jnp.int32)}
  stats = compiled(dtype='bfloat16')(batch)
  assert {x.dtype for x in jax.tree.leaves(stats)} == {jnp.dtype('float32')}
  x_NI = seen(batch, 'into_qkv', 1, 'bfloat16').reshape(64 * 16, -1)
  close(stats.moments['into_qkv'].mean[0], x_NI.mean(0))
  close(stats.gram['into_qkv'][0], x_NI.T @ x_NI)


def test_what_cannot_be():
  model, params = model_and_params()
  with pytest.raises(ConfigError, match='calibration: no tokens'):
    collect_all(model, params, [])
  with pytest.raises(ConfigError, match='gram'):
    merge(compiled(gram=False)(ragged()), compiled()(ragged()))
