"""Rotary embedding: a rotation, relative, and Llama 3's scaling at both of its ends."""

import jax.numpy as jnp
import numpy as np

from slm_jax.model import rope


def rotated(x, position, frequencies):
  return np.asarray(rope.rotate(x, *rope.angles(jnp.asarray([[position]]), frequencies)))[0, 0]


def test_is_multiplication_by_a_unit_complex_number():
  x = np.random.default_rng(0).normal(size=(1, 1, 3, 8)).astype(np.float32)
  f = rope.frequencies(8, 10_000.0)
  pairs = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * 7 * f)
  np.testing.assert_allclose(rotated(x, 7, f), np.concatenate([pairs.real, pairs.imag], -1)[0, 0], atol=1e-6)


def test_scores_depend_on_the_distance_only():
  q, k = np.random.default_rng(1).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)
  f = rope.frequencies(16, 100.0)
  scores = [rotated(q, 5 + shift, f)[0] @ rotated(k, 2 + shift, f)[0] for shift in (0, 1, 50)]
  np.testing.assert_allclose(scores, scores[0], atol=1e-4)
  assert abs(scores[0] - rotated(q, 6, f)[0] @ rotated(k, 2, f)[0]) > 1e-2


def test_llama3_scaling_leaves_fast_frequencies_and_divides_slow_ones():
  plain, scaled = rope.frequencies(64, 500_000.0), rope.frequencies(64, 500_000.0, (32.0, 1.0, 4.0, 8192.0))
  turns = 8192 * plain / (2 * np.pi)
  np.testing.assert_array_equal(scaled[turns > 4], plain[turns > 4])
  np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 32, rtol=1e-6)
  between = (turns >= 1) & (turns <= 4)
  assert between.any()
  assert (scaled[between] < plain[between]).all()
  assert (scaled[between] > plain[between] / 32).all()
  assert (np.diff(scaled) < 0).all()
