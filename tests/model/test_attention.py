"""Attention against a loop in float64, and the slots where documents start against their definition."""

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from slm_jax.model.attention import attention, document_starts


def slowly(q, k, v, low, high, scale):
  (b, t, h, _), (_, _, g, d) = q.shape, v.shape
  out = np.zeros((b, t, h, d))
  for i in range(b):
    for j in range(t):
      seen = slice(low[i % len(low), j], high[i % len(high), j] + 1)
      for n in range(h):
        group = n // (h // g)  # query heads that share a key/value head are neighbours
        scores = scale * k[i, seen, group] @ q[i, j, n]
        weights = np.exp(scores - scores.max())
        out[i, j, n] = weights / weights.sum() @ v[i, seen, group]
  return out


@pytest.mark.parametrize('heads, groups', [(4, 4), (4, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize('rows', [1, 2])
def test_equals_the_definition(heads, groups, rows):
  rng = np.random.default_rng(heads * 10 + groups)
  q, k, v = (rng.normal(size=shape) for shape in ((2, 5, heads, 6), (2, 9, groups, 6), (2, 9, groups, 6)))
  high = rng.integers(0, 9, (rows, 5))
  low = rng.integers(0, high + 1)
  got = attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), jnp.asarray(low), jnp.asarray(high), 0.7)
  np.testing.assert_allclose(got, slowly(q, k, v, low, high, 0.7), atol=2e-6)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_document_starts(ids):
  ids = ids + [0] * (20 - len(ids))  # one shape, one compilation
  expected, start = [], 0
  for t, segment in enumerate(ids):
    start = t if t and segment != ids[t - 1] else start
    expected.append(start)
  np.testing.assert_array_equal(document_starts(jnp.asarray([ids])), [expected])
