"""Masks by layer, output, n of m and blocks: against brute force, layer by layer, on any mesh, at any traced budget."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from slm_jax.config import ConfigError
from slm_jax.prune.patterns import Pattern, select
from slm_jax.sharding import make_mesh

SHAPES = {'q': (3, 16, 8), 'up': (3, 16, 24)}
PATTERNS = ['layer', 'output', '2:4', '1:8', '4x4']


def scores_of(seed=0, shapes=SHAPES):
  """With many ties."""
  keys = jax.random.split(jax.random.PRNGKey(seed), len(shapes))
  return {n: jnp.round(4 * jax.random.normal(k, s)) / 4 for k, (n, s) in zip(keys, shapes.items(), strict=True)}


masks_of = jax.jit(select, static_argnums=(2, 3))


def first_largest(scores, k):
  """The reference: a stable sort."""
  kept = np.zeros(scores.size, bool)
  kept[np.argsort(-scores.ravel(), kind='stable')[:k]] = True
  return kept.reshape(scores.shape)


# ---------------------------------------------------------------------------------------------- against brute force


@pytest.mark.parametrize('n, m', [(2, 4), (1, 4), (4, 8)])
def test_n_of_m_inputs_are_the_best_of_all_patterns(n, m):
  """Exactly n of every m that follow each other along I, and no choice of n has a larger sum."""
  scores = jnp.abs(scores_of(shapes={'up': (2, 16, 3)})['up'])
  mask = masks_of({'up': scores}, jnp.float32(n / m), f'{n}:{m}', 'uniform')['up']
  groups = np.asarray(mask).reshape(2, 16 // m, m, 3)
  assert (groups.sum(2) == n).all()
  values = np.asarray(scores).reshape(2, 16 // m, m, 3)
  best = np.max([values[:, :, list(chosen)].sum(2) for chosen in itertools.combinations(range(m), n)], axis=0)
  np.testing.assert_array_equal((values * groups).sum(2), best)


def test_n_of_m_comes_down_to_n_with_the_budget():
  for keep, left in {1.0: 4, 0.8: 3, 0.5: 2, 0.1: 2}.items():
    masks = masks_of(scores_of(), jnp.float32(keep), '2:4', 'uniform')
    assert (np.asarray(masks['up']).reshape(3, 4, 4, 24).sum(2) == left).all()


def test_a_layer_an_output_and_a_block_keep_their_best():
  scores = {'up': scores_of()['up']}
  s_LIO = np.asarray(scores['up'])
  for keep in (0.1, 0.33, 0.5, 0.9):
    k = round(keep * 16 * 24)
    patterns = ('layer', 'output', '4x4')
    layer, output, block = (np.asarray(masks_of(scores, jnp.float32(keep), p, 'uniform')['up']) for p in patterns)
    for i in range(3):
      np.testing.assert_array_equal(layer[i], first_largest(s_LIO[i], k))
      for o in range(24):
        np.testing.assert_array_equal(output[i][:, o], first_largest(s_LIO[i][:, o], k // 24 + (o < k % 24)))
      sums = s_LIO[i].reshape(4, 4, 6, 4).sum((1, 3))
      np.testing.assert_array_equal(block[i], np.kron(first_largest(sums, round(k / 16)), np.ones((4, 4))))
    assert output.sum() == layer.sum() == 3 * k


@pytest.mark.parametrize('allocation', ['tensor', 'global'])
def test_pools_keep_the_best_of_them(allocation):
  scores = scores_of()
  masks = masks_of(scores, jnp.float32(0.3), 'layer', allocation)
  flat = {name: np.asarray(s).ravel() for name, s in scores.items()}
  if allocation == 'global':
    kept = first_largest(np.concatenate(list(flat.values())), round(0.3 * sum(s.size for s in flat.values())))
    np.testing.assert_array_equal(np.concatenate([np.asarray(m).ravel() for m in masks.values()]), kept)
  else:
    for name, s in flat.items():
      np.testing.assert_array_equal(np.asarray(masks[name]).ravel(), first_largest(s, round(0.3 * s.size)))


@pytest.mark.parametrize('pattern', PATTERNS)
def test_the_stack_equals_its_layers_one_by_one(pattern):
  scores = scores_of()
  stacked = masks_of(scores, jnp.float32(0.5), pattern, 'uniform')
  for i in range(3):
    alone = masks_of({n: s[i : i + 1] for n, s in scores.items()}, jnp.float32(0.5), pattern, 'uniform')
    for name, mask in alone.items():
      np.testing.assert_array_equal(mask[0], stacked[name][i])


def test_blocks_with_some_weights_gone_are_chosen_by_those_that_are_left():
  alive = {'up': jax.random.bernoulli(jax.random.PRNGKey(1), 0.5, SHAPES['up']).at[0, :4, :4].set(False)}
  scores = {'up': scores_of()['up'] - 10}  # negative: a block of nothing must not look better for its 0
  left = np.where(alive['up'], scores['up'], 0)[0].reshape(4, 4, 6, 4).sum((1, 3))
  left[0, 0] = -np.inf
  mask = np.asarray(masks_of(scores, jnp.float32(0.25), '4x4', 'uniform', alive)['up'])[0]
  blocks = np.kron(first_largest(left, 6), np.ones((4, 4), bool))
  np.testing.assert_array_equal(mask, blocks & np.asarray(alive['up'][0]))


def test_nan_goes_first():
  scores = {'up': jnp.full((1, 8, 4), jnp.nan).at[0, 3:5].set(-1.0)}
  for pattern, keep in {'layer': 0.25, 'output': 0.25, '1:4': 0.25}.items():
    mask = masks_of(scores, jnp.float32(keep), pattern, 'uniform')['up']
    np.testing.assert_array_equal(mask, ~jnp.isnan(scores['up']))


# ------------------------------------------------------------------------------------------------- traced, anywhere


@pytest.mark.parametrize(
  'pattern, allocation',
  [
    ('layer', 'global'),
    ('layer', 'erk'),
    ('output', 'uniform'),
    ('output', 'global'),
    ('1:8', 'uniform'),
    ('4x4', 'erk'),
  ],
)
def test_one_program_has_all_sparsities_and_their_masks_are_nested(pattern, allocation):
  keeps = jnp.linspace(1.0, 0.0, 13)
  curve = jax.jit(jax.vmap(lambda keep: select(scores_of(), keep, pattern, allocation)))(keeps)
  for masks in curve.values():
    masks = np.asarray(masks)
    assert masks[0].all()
    assert (masks[1:] <= masks[:-1]).all()
    assert masks[-1].any((1, 2)).all()  # a budget of nothing is one weight (output, group, block) of each layer's
    if pattern == 'output' and allocation == 'uniform':
      assert masks[-1].any(1).all()


def test_a_change_of_the_budget_compiles_nothing():
  before = masks_of._cache_size()
  counts = [
    int(masks_of(scores_of(), jnp.float32(keep), 'output', 'owl')['up'].sum()) for keep in (0.1, 0.4, 0.400001, 0.9)
  ]
  assert counts == sorted(counts)
  assert masks_of._cache_size() == before + 1


def test_new_masks_are_within_the_old_ones():
  """However much the budget grows, and whatever the scores say; and a smaller one is met to the weight."""
  old = masks_of(scores_of(0), jnp.float32(0.4), 'layer', 'global')
  for keep in (0.2, 0.35, 0.8):
    for allocation in ('uniform', 'erk', 'owl', 'global'):
      new = masks_of(scores_of(1), jnp.float32(keep), 'layer', allocation, old)
      assert all((new[n] <= old[n]).all() for n in SHAPES)
      total, n = sum(int(m.sum()) for m in new.values()), sum(m.size for m in new.values())
      if allocation != 'uniform':
        assert total == min(round(keep * n), sum(int(m.sum()) for m in old.values()))


@pytest.mark.parametrize(
  'pattern, allocation', [('layer', 'uniform'), ('layer', 'global'), ('output', 'owl'), ('2:4', 'uniform')]
)
def test_the_same_masks_on_every_mesh_and_nothing_moves_but_counts(pattern, allocation):
  scores, keep = scores_of(), jnp.float32(0.5)
  alone = masks_of(scores, keep, pattern, allocation)
  for shape in ((1, 8, 1), (1, 2, 4), (2, 4, 1)):
    if pattern == '2:4' and shape[1] == 8:
      continue  # a device would hold half a group
    mesh = make_mesh(*shape)
    spread = jax.device_put(scores, NamedSharding(mesh, PartitionSpec(None, 'fsdp', 'tensor')))
    together = masks_of(spread, keep, pattern, allocation)
    jax.tree.map(np.testing.assert_array_equal, alone, together)
    text = masks_of.lower(spread, keep, pattern, allocation).compile().as_text()
    moved = set(re.findall(r' (all-gather|all-reduce|all-to-all|collective-permute|sort)\(', text))
    assert moved <= {'all-reduce'}, shape


# ------------------------------------------------------------------------------------------------- what cannot be meant


@pytest.mark.parametrize('text', ['row', '4:4', '0:4', '5:4', '2:4:8', '4x8', '1x1', '', '2:', 'x4'])
def test_a_pattern_that_is_none(text):
  with pytest.raises(ConfigError, match=f'^p={re.escape(text)}: allowed: layer, output, n of m') as error:
    Pattern.parse(text, 'p')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'keep, pattern, allocation, message',
  [
    (0.5, '2:5', 'uniform', 'pattern=2:5: 5 does not divide the 16 inputs of q'),
    (0.5, '12x12', 'uniform', 'pattern=12x12: 12 does not divide the 16 inputs of q'),
    (0.5, '16x16', 'uniform', 'pattern=16x16: 16 does not divide the 8 outputs of q'),
    (0.003, 'layer', 'uniform', 'keep=0.003: leaves no weight in a matrix of q'),
    (0.04, 'output', 'uniform', 'keep=0.04: leaves no weight in an output of q'),
    (0.04, '4x4', 'uniform', 'keep=0.04: leaves no block in a matrix of q'),
    (0.4, '2:4', 'uniform', 'keep=0.4: less than the 2 of 4 of the pattern'),
    (0.001, 'layer', 'erk', 'keep=0.001: leaves no weight in a matrix of q'),
    (0.002, 'layer', 'global', 'keep=0.002: leaves 3 weights for 6 matrices, each of which needs one'),
    (0.004, 'layer', 'tensor', 'keep=0.004: leaves 2 weights for 3 matrices, each of which needs one'),
  ],
)
def test_a_budget_that_empties_a_matrix_is_one_line_where_it_is_known(keep, pattern, allocation, message):
  with pytest.raises(ConfigError) as error:
    select(scores_of(), keep, pattern, allocation)
  assert str(error.value) == message
