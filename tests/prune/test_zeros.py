"""What model.json says of zeros: the pattern that a recipe made, and never one that fits by chance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from slm_jax.config import override
from slm_jax.model import decoder
from slm_jax.prune import zeros
from slm_jax.prune.matrices import matrices, put
from slm_jax.prune.patterns import select
from slm_jax.prune.sparse import OneShot
from slm_jax.prune.transform import Prune

MODEL = decoder.build(tiny.config(1).model)
DENSE = MODEL.init(jax.random.PRNGKey(0))


def masked(pattern: str, keep: float, seed: int = 0):
  keys = jax.random.split(jax.random.PRNGKey(seed), len(matrices(DENSE)))
  scores = {
    name: jax.random.uniform(key, w.shape) for key, (name, w) in zip(keys, matrices(DENSE).items(), strict=True)
  }
  masks = select(scores, keep, pattern)
  return put(DENSE, {name: jnp.where(masks[name], w, 0) for name, w in matrices(DENSE).items()})


def recipe(**changes):
  return zeros.made(override(tiny.config(4), {'transforms': (), **changes}), lambda arm: {})


def test_zeros_that_fit_a_pattern_by_chance_are_not_called_so():
  """At a density of 0.03, nearly every matrix of this size is 4:8 by chance."""
  params = masked('layer', 0.03)
  assert all(its['4:8'] for its in zeros.count(params, ['4:8']).values())
  found = zeros.record(params, recipe(**{'init.sparse': OneShot('magnitude', 0.97)}))
  assert found.keys() == matrices(DENSE).keys()
  assert not any('pattern' in its for its in found.values())
  for name, its in found.items():
    assert its['density'] == pytest.approx(float((matrices(params)[name] != 0).mean()), abs=1e-6)


@pytest.mark.parametrize(
  'made',
  [{'init.sparse': OneShot('wanda', 0.5, '2:4')}, {'transforms': (Prune(0.5, pattern='2:4'),)}],
)
def test_a_pattern_that_the_recipe_made_is_told_and_checked(made):
  patterns = recipe(**made)
  assert {its['pattern'] for its in zeros.record(masked('2:4', 0.5), patterns).values()} == {'2:4'}
  assert not any('pattern' in its for its in zeros.record(masked('layer', 0.5), patterns).values())  # filled up again
  assert zeros.record(DENSE, patterns) == {}


@pytest.mark.parametrize('changes', [{'init.arm': 'parent'}, {'transforms': (Prune(0.0, ticket='parent'),)}])
def test_a_pattern_is_inherited_matrix_by_matrix(changes):
  said = {'up': {'density': 0.5, 'pattern': '2:4'}, 'down': {'density': 0.5}}
  patterns = zeros.made(override(tiny.config(4), {'transforms': (), **changes}), {'parent': said}.__getitem__)
  found = zeros.record(masked('2:4', 0.5), patterns)
  assert [name for name, its in found.items() if 'pattern' in its] == ['up']


def test_what_is_not_pruned_makes_no_pattern():
  assert recipe(transforms=(Prune(0.0, pattern='2:4', ticket='parent'),)) == {'': []}
  assert recipe(**{'init.sparse': OneShot('none', pattern='2:4')}) == {'': []}


def test_zeros_are_counted():
  params = masked('layer', 0.25)
  n = sum(int((np.asarray(w) == 0).sum()) for w in matrices(params).values())
  assert zeros.total(params) == {'zeros': n}
  assert zeros.total(DENSE) == {}
