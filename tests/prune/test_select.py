"""Exact selection against a sort, and cutting against masking."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from slm_jax.config import ConfigError
from slm_jax.prune.select import keep_largest
from slm_jax.sharding import make_mesh

values = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 1.0, 1e-45, -1e-45])
select = jax.jit(lambda scores, share: keep_largest(scores, share))


@settings(max_examples=60, deadline=None)
@given(st.lists(values, min_size=12, max_size=12), st.integers(0, 12))
def test_it_keeps_the_k_largest_first_come_first_served(numbers, k):
  """Ties, zeros of both signs, denormals; two arrays of different shape are one pool."""
  a, b = np.array(numbers[:8], np.float32).reshape(2, 4), np.array(numbers[8:], np.float32)
  kept = select([jnp.asarray(a), jnp.asarray(b)], k / 12)
  flat = np.concatenate([np.asarray(m).ravel() for m in kept])
  expected = np.zeros(12, bool)
  expected[np.argsort(-np.array(numbers, np.float32), kind='stable')[:k]] = True
  np.testing.assert_array_equal(flat, expected)


@pytest.mark.parametrize('mesh', [(8, 1, 1), (2, 4, 1), (4, 2, 1)])
def test_the_same_masks_on_one_and_on_eight_devices(mesh):
  """Normals, and whole numbers: almost all of those are ties."""
  normals = jax.random.normal(jax.random.PRNGKey(0), (64, 32))
  for scores in (normals, jnp.round(normals)):
    spread = jax.device_put(scores, NamedSharding(make_mesh(*mesh), PartitionSpec('data', 'fsdp')))
    for share in (0.1, 0.5, 0.9, 0.99, 0.0, 1.0):
      alone, together = select([scores], share)[0], select([spread], share)[0]
      np.testing.assert_array_equal(alone, together)
      assert alone.sum() == round(share * scores.size)


def test_more_scores_than_a_count_can_hold_are_refused():
  with pytest.raises(ConfigError, match='a budget for 2147483648 weights at once: allowed are fewer than 2'):
    jax.eval_shape(lambda s: keep_largest([s], 0.5), jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32))


def test_a_sharded_selection_moves_nothing_but_counts():
  where = NamedSharding(make_mesh(data=8), PartitionSpec('data'))
  shape = jax.ShapeDtypeStruct((4096, 64), jnp.float32, sharding=where)
  text = select.lower([shape], 0.5).compile().as_text()
  moved = set(re.findall(r'= (\S+) (all-gather|all-reduce|all-to-all|collective-permute|sort)\(', text))
  assert moved == {('s32[]', 'all-reduce')}


def test_nan_is_dropped_first():
  scores = jnp.array([1.0, jnp.nan, 0.0, -3.0])
  np.testing.assert_array_equal(select([scores], 0.75)[0], [True, False, True, True])
