"""Decoding with a cache equals the forward pass; sampling draws from what it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, SMALL, B, T, setup

from slm_jax.config import ConfigError
from slm_jax.model import decode

LENGTHS = np.array([9, 1, 6], np.int32)


@functools.cache
def generator(config, **static):
  def run(params, prompt, lengths, key, *numbers):
    names = ('temperature', 'top_k', 'top_p')[: len(numbers)]
    return decode.generate(config, params, prompt, lengths, key, **static, **dict(zip(names, numbers, strict=True)))

  return jax.jit(run)


@pytest.mark.parametrize('family', FAMILIES)
def test_cached_logits_equal_the_forward_pass(family):
  """Ragged prompts, then four tokens at once, then one by one, past the window of the local layers."""
  config, (params, forward) = FAMILIES[family], setup(family)
  rng = np.random.default_rng(0)
  prompt, more = (rng.integers(0, SMALL['vocab_size'], (3, t), dtype=np.int32) for t in (9, 10))

  @jax.jit
  def cached(params, prompt, more):
    tokens, start = decode.align_right(prompt, LENGTHS)
    x, cache = decode.extend(config, params, decode.init_cache(config, start, 9 + 10), tokens)
    four, cache = decode.extend(config, params, cache, more[:, :4])

    def one(cache, token_B):
      x, cache = decode.extend(config, params, cache, token_B[:, None])
      return cache, x[:, 0]

    _, six = jax.lax.scan(one, cache, more[:, 4:].T)
    hidden = jnp.concatenate([x[:, -1:], four, six.swapaxes(0, 1)], axis=1)
    return decode.logits(config, params, hidden)

  got = np.asarray(cached(params, prompt, more))
  whole = np.zeros((B, T), np.int32)  # padded on the right: the plain forward pass
  for row, n in enumerate(LENGTHS):
    whole[row, : n + 10] = np.concatenate([prompt[row, :n], more[row]])
  full = np.asarray(forward(params, whole, None))
  for row, n in enumerate(LENGTHS):
    np.testing.assert_allclose(got[row], full[row, n - 1 : n + 10], atol=1e-5)


@pytest.mark.parametrize('family', FAMILIES)
def test_greedy_equals_argmax_of_the_forward_pass(family):
  config, (params, forward) = FAMILIES[family], setup(family)
  prompt = np.random.default_rng(1).integers(0, SMALL['vocab_size'], (3, 9), dtype=np.int32)
  got = np.asarray(generator(config, max_new=7)(params, prompt, LENGTHS, jax.random.key(0), 0.0))
  whole = np.zeros((B, T), np.int32)
  whole[:3, :9] = prompt
  for i in range(7):
    z = np.asarray(forward(params, whole, None))
    for row, n in enumerate(LENGTHS):
      assert got[row, i] == z[row, n + i - 1].argmax()
      whole[row, n + i] = got[row, i]


def test_padding_of_the_prompt_and_other_rows_do_not_matter():
  config, (params, _) = FAMILIES['gemma3'], setup('gemma3')
  prompt = np.random.default_rng(2).integers(0, SMALL['vocab_size'], (3, 9), dtype=np.int32)
  other = np.where(np.arange(9) < LENGTHS[:, None], prompt, 60)
  run = generator(config, max_new=7)
  a, b = (run(params, p, LENGTHS, jax.random.key(0), 0.0) for p in (prompt, other))
  np.testing.assert_array_equal(a, b)
  permuted = run(params, prompt[::-1], LENGTHS[::-1], jax.random.key(0), 0.0)
  np.testing.assert_array_equal(a, np.asarray(permuted)[::-1])


def test_after_eos_comes_padding():
  config, (params, _) = FAMILIES['llama'], setup('llama')
  prompt = np.random.default_rng(3).integers(0, SMALL['vocab_size'], (3, 9), dtype=np.int32)
  free = np.asarray(generator(config, max_new=7)(params, prompt, LENGTHS, jax.random.key(0), 0.0))
  eos = int(free[0, 2])
  stopped = np.asarray(generator(config, max_new=7, eos=eos, pad=60)(params, prompt, LENGTHS, jax.random.key(0), 0.0))
  for before, after in zip(free, stopped, strict=True):
    end = list(before).index(eos) + 1 if eos in before else 7
    np.testing.assert_array_equal(after[:end], before[:end])
    assert (after[end:] == 60).all()
  assert (stopped[0, 3:] == 60).all()


def test_one_executable_for_all_temperatures_and_populations():
  config, (params, _) = FAMILIES['llama'], setup('llama')
  prompt = np.random.default_rng(4).integers(0, SMALL['vocab_size'], (2, 4), dtype=np.int32)
  lengths = np.array([4, 2], np.int32)
  run = jax.jit(lambda p, key, t, k, top_p: decode.generate(
    config, p, prompt, lengths, key, max_new=3, temperature=t, top_k=k, top_p=top_p
  ))  # fmt: skip
  greedy = run(params, jax.random.key(0), 0.0, 10, 0.9)
  cold = run(params, jax.random.key(1), 1e-4, 10, 0.9)
  only_one = run(params, jax.random.key(2), 5.0, 1, 1.0)
  nucleus = run(params, jax.random.key(3), 5.0, 61, 0.0)
  assert run._cache_size() == 1
  for other in (cold, only_one, nucleus):
    np.testing.assert_array_equal(greedy, other)
  stacked = jax.tree.map(lambda p: np.stack([p, p]), params)
  both = jax.vmap(run, in_axes=(0, None, None, None, None))(stacked, jax.random.key(0), 0.0, 10, 0.9)
  np.testing.assert_array_equal(both, np.stack([greedy, greedy]))


def test_samples_follow_the_distribution():
  logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
  many = jnp.broadcast_to(logits, (20_000, 4))

  def frequencies(temperature, top_k=None, top_p=None):
    return np.bincount(decode.sample(many, jax.random.key(0), temperature, top_k, top_p), minlength=4) / 20_000

  p = np.array([0.4, 0.3, 0.2, 0.1])
  np.testing.assert_allclose(frequencies(1.0), p, atol=0.015)  # four standard errors
  np.testing.assert_allclose(frequencies(0.5), p**2 / (p**2).sum(), atol=0.015)
  np.testing.assert_allclose(frequencies(1.0, top_k=3), p * [1, 1, 1, 0] / 0.9, atol=0.015)
  np.testing.assert_allclose(frequencies(1.0, top_p=0.6), p * [1, 1, 0, 0] / 0.7, atol=0.015)
  np.testing.assert_allclose(frequencies(1.0, top_k=3, top_p=0.5), p * [1, 1, 0, 0] / 0.7, atol=0.015)
  np.testing.assert_array_equal(frequencies(0.0), [1, 0, 0, 0])


def test_restrictions_keep_what_transformers_keeps():
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  logits = np.random.default_rng(0).normal(size=(50, 37)).astype(np.float32) * 3
  for top_k, top_p in ((5, None), (None, 0.7), (8, 0.9), (1, 0.99), (37, 0.05)):
    expected = torch.tensor(logits)
    if top_k:
      expected = transformers.TopKLogitsWarper(top_k)(None, expected)
    if top_p:
      expected = transformers.TopPLogitsWarper(top_p)(None, expected)
    got = decode.restrict(jnp.asarray(logits), top_k, top_p)
    np.testing.assert_array_equal(got, expected.numpy())


def test_more_tokens_than_positions_is_an_error():
  config, (params, _) = FAMILIES['llama'], setup('llama')
  prompt, lengths = np.zeros((1, 60), np.int32), np.array([3])
  arguments = (config, params, prompt, lengths, jax.random.key(0))
  with pytest.raises(ConfigError, match='max_new=5: .* prompt of 60 at most model.max_len=64'):
    decode.generate(*arguments, max_new=5)
  with pytest.raises(ConfigError, match='max_new=0'):
    decode.generate(*arguments, max_new=0)
  fits = jax.eval_shape(lambda *a: decode.generate(config, *a, max_new=4), *arguments[1:])
  assert fits.shape == (1, 4)
