"""How a total is shared out: exact totals, ERK against the usual loop, OWL's range, matrices that would be emptied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.prune.allocate import allocate, erk, owl
from slm_jax.prune.patterns import select

SHAPES = {'q': (3, 16, 8), 'up': (3, 16, 24), 'down': (3, 24, 16)}
TOTAL = sum(n * i * o for n, i, o in SHAPES.values())
counts_of = jax.jit(allocate, static_argnums=2)
masks_of = jax.jit(select, static_argnums=(2, 3))
KEEPS = np.linspace(0.02, 1.0, 50, dtype=np.float32)


def scores_of(seed=0):
  """Heavy tails, heavier in later layers."""
  keys = jax.random.split(jax.random.PRNGKey(seed), len(SHAPES))
  power = jnp.array([1.0, 2.0, 4.0]).reshape(3, 1, 1)
  return {n: jnp.abs(jax.random.normal(k, s)) ** power for k, (n, s) in zip(keys, SHAPES.items(), strict=True)}


def curve(allocation):
  """Counts [K, M, L] at all KEEPS."""
  counts = jax.jit(jax.vmap(lambda keep: allocate(scores_of(), keep, allocation)))(KEEPS)
  return np.stack([counts[name] for name in SHAPES], axis=1)


@pytest.mark.parametrize('allocation', ['erk', 'owl', 'global'])
def test_totals_are_exact_at_every_share(allocation):
  counts_KML = curve(allocation)
  np.testing.assert_array_equal(counts_KML.sum((1, 2)), np.round(KEEPS * TOTAL))
  sizes_M1 = np.array([[i * o] for _, i, o in SHAPES.values()])
  assert (counts_KML >= 1).all()
  assert (counts_KML <= sizes_M1).all()
  assert len(np.unique(counts_KML[10] / sizes_M1)) > 1  # it is not uniform


def test_uniform_is_the_same_share_of_each():
  sizes = [i * o for _, i, o in SHAPES.values()]
  expected = [np.maximum(np.round(KEEPS * np.float32(size)), 1) for size in sizes]
  np.testing.assert_array_equal(curve('uniform'), np.stack(expected, 1)[..., None] * np.ones(3))


def test_erk_is_the_usual_loop():
  """arXiv 1911.11134's code: what would be denser than 1 is made dense, and the rest is scaled anew."""
  shapes = {'a': (2, 4, 4), 'b': (2, 64, 32), 'c': (2, 8, 128), 'd': (2, 256, 256)}
  for keep in (0.01, 0.1, 0.3, 0.6, 0.95, 1.0):
    size = {n: s[1] * s[2] for n, s in shapes.items()}
    raw = {n: (s[1] + s[2]) / size[n] for n, s in shapes.items()}
    dense: set[str] = set()
    while True:
      rest = [n for n in shapes if n not in dense]
      left = keep * sum(size.values()) - sum(size[n] for n in dense)
      scale = left / sum(raw[n] * size[n] for n in rest) if rest else 0
      full = {n for n in rest if scale * raw[n] > 1}
      if not full:
        break
      dense |= full
    expected = [1.0 if n in dense else scale * raw[n] for n in shapes]
    np.testing.assert_allclose(erk(shapes, keep), expected, rtol=1e-6)
    counts = counts_of({n: jnp.ones(s) for n, s in shapes.items()}, jnp.float32(keep), 'erk')
    for (name, count), share in zip(counts.items(), expected, strict=True):
      assert np.abs(count - share * size[name]).max() <= 1


def test_owl_gives_more_to_layers_with_outliers():
  """Within .08 of the mean, which is met; of two layers with shares D of outliers, one differs from it by .08."""
  scores = {'up': jnp.ones((3, 10, 10)).at[1, 0, :2].set(1e3).at[2, 0, 0].set(1e3)}
  outliers = np.array([0.0, 0.02, 0.01])  # of 100, above 5 times the mean
  for keep in (0.3, 0.5, 0.9):
    off = outliers - outliers.mean()
    np.testing.assert_allclose(owl(scores, jnp.float32(keep)), keep + 0.08 * off / np.abs(off).max(), rtol=1e-5)
  near = owl(scores, jnp.float32(0.99))
  assert near.max() <= 1
  assert near.mean() == pytest.approx(0.99)
  np.testing.assert_allclose(owl({'up': jnp.ones((3, 4, 4))}, jnp.float32(0.5)), 0.5)  # none has any


def test_owl_sees_the_layer_and_not_the_matrix():
  """A matrix all of whose scores are large is no outlier by itself; it is one beside small ones."""
  small, large = jnp.ones((2, 50, 10)), jnp.ones((2, 5, 2)).at[1].set(100.0)
  shares = owl({'up': small, 'q': large}, jnp.float32(0.5))
  assert shares[1] > shares[0]


def test_no_matrix_is_emptied_and_the_total_stays():
  """One whose scores are all smaller than anybody's keeps its best; without that, nothing of it would be left."""
  scores = scores_of()
  scores['q'] = scores['q'].at[1].multiply(1e-20)
  masks = masks_of(scores, jnp.float32(0.1), 'layer', 'global')
  kept = np.asarray(masks['q'][1])
  assert kept.sum() == 1
  assert kept.ravel()[np.argmax(scores['q'][1])]
  assert sum(int(m.sum()) for m in masks.values()) == round(0.1 * TOTAL)


def test_pools_of_other_patterns_have_the_pools_counts():
  keep = jnp.float32(0.25)
  counts, masks = counts_of(scores_of(), keep, 'global'), masks_of(scores_of(), keep, 'output', 'global')
  for name, mask in masks.items():
    np.testing.assert_array_equal(mask.sum((1, 2)), jnp.maximum(counts[name], mask.shape[2]))


def test_a_larger_budget_takes_from_none():
  """Also where rounding and correcting the sum would: three full matrices, and a total that is one short of theirs."""
  for allocation in ('erk', 'global'):
    assert (np.diff(curve(allocation), axis=0) >= 0).all()


def test_what_is_full_leaves_the_rest_to_the_others():
  most = {name: jnp.full(3, 20) for name in SHAPES} | {'up': jnp.array([384, 384, 5])}
  counts = jax.jit(lambda keep: allocate(scores_of(), keep, 'erk', most))(jnp.float32(0.2))
  assert sum(int(c.sum()) for c in counts.values()) == round(0.2 * TOTAL)
  assert all((counts[name] <= most[name]).all() for name in SHAPES)
  assert abs(int(counts['up'][0]) - int(counts['up'][1])) <= 1
