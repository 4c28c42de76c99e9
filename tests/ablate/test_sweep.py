"""The algebra of sweeps: laws."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.ablate import sweep
from slm_jax.ablate.sweep import chain, choice, loguniform, product, sample, seeds, uniform, zipped
from slm_jax.config import ConfigError

LR = [{'optim.learning_rate': 1e-3}, {'optim.learning_rate': 3e-3}]
SPACE = {'optim.learning_rate': loguniform(1e-4, 1e-2), 'optim.clip': uniform(0.5, 1), 'train.steps': choice(5, 6, 7)}
lists = st.lists(st.integers(0, 4), max_size=4)
small = st.integers(1, 20)
any_seed = st.integers(-(2**70), 2**70)


def numbered(n, key='k'):
  return [{key: v} for v in range(n)]


# ---------------------------------------------------------------------------------------- product, zipped, chain, seeds


@settings(deadline=None)
@given(lists)
def test_product_has_every_combination_once(sizes):
  found = [tuple(sorted(changes.items())) for changes in product(*(numbered(n, f'k{i}') for i, n in enumerate(sizes)))]
  assert len(set(found)) == len(found) == math.prod(sizes)


@settings(deadline=None)
@given(st.integers(0, 6), st.integers(1, 4))
def test_zipped_is_the_diagonal_of_the_product(n, width):
  sweeps = [numbered(n, f'k{i}') for i in range(width)]
  found = list(zipped(*sweeps))
  assert found == [changes for changes in product(*sweeps) if len(set(changes.values())) == 1]
  assert len(found) == n


@given(lists, lists)
def test_chain_is_concatenation(a, b):
  assert list(chain(numbered(len(a)), numbered(len(b), 'j'))) == numbered(len(a)) + numbered(len(b), 'j')
  assert list(chain()) == []


def test_product_distributes_over_chain():
  """In the order of the product's first factor, so that chained sweeps can be multiplied by seeds."""
  a, b = numbered(2), numbered(3, 'j')
  assert list(product(chain(a, b), seeds(2))) == list(chain(product(a, seeds(2)), product(b, seeds(2))))


@pytest.mark.parametrize('combine', [product, zipped])
def test_two_sweeps_of_one_key_are_refused(combine):
  with pytest.raises(ConfigError, match=r'optim\.learning_rate is set by two'):
    list(combine(LR, LR))


def test_zipped_sweeps_must_be_as_long():
  with pytest.raises(ConfigError, match='^zipped sweeps: of 2, 3 elements'):
    list(zipped(LR, numbered(3)))


def test_seeds_change_parameters_and_order_of_data_together():
  assert list(seeds(2)) == [{'seed': 0, 'data.seed': 0}, {'seed': 1, 'data.seed': 1}]


# --------------------------------------------------------------------------------------------------------- sampling


@given(small, small, any_seed)
def test_a_sample_of_a_sweep_is_a_part_of_it_in_its_order(n, k, seed):
  if k > n:
    with pytest.raises(ConfigError, match=f'k={k}: the sweep has only {n} elements'):
      list(sample(numbered(n), k, seed))
    return
  found = [changes['k'] for changes in sample((changes for changes in numbered(n)), k, seed)]
  assert len(found) == k
  assert found == sorted(set(found))
  assert set(found) <= set(range(n))


@given(st.integers(2, 20), any_seed)
def test_a_larger_sample_keeps_the_smaller_one(n, seed):
  whole = [{tuple(c.items()) for c in sample(numbered(n), k, seed)} for k in range(1, n + 1)]
  assert all(a < b for a, b in itertools.pairwise(whole))


@given(st.permutations(list(SPACE)), small, any_seed)
def test_a_sample_of_a_space_depends_on_its_seed_alone(keys, k, seed):
  found = list(sample({key: SPACE[key] for key in keys}, k, seed))
  assert found == list(sample(SPACE, k, seed))
  assert found == list(sample(SPACE, k + 1, seed))[:k]
  (key, *_) = keys
  assert list(sample({key: SPACE[key]}, k, seed)) == [{key: changes[key]} for changes in found]
  for changes in found:
    assert 1e-4 <= changes['optim.learning_rate'] <= 1e-2
    assert 0.5 <= changes['optim.clip'] <= 1
    assert changes['train.steps'] in (5, 6, 7)


def test_samples_are_the_same_on_every_machine():
  assert list(sample(SPACE, 2, seed=3)) == [
    {'optim.learning_rate': 0.0005072, 'optim.clip': 0.9442, 'train.steps': 7},
    {'optim.learning_rate': 0.003697, 'optim.clip': 0.9922, 'train.steps': 7},
  ]
  assert [changes['k'] for changes in sample(numbered(100), 3, seed=3)] == [55, 69, 98]


def test_other_seeds_are_other_samples():
  assert len({tuple(c['k'] for c in sample(numbered(40), 5, seed)) for seed in range(50)}) == 50
  assert len({c['optim.learning_rate'] for seed in range(50) for c in sample(SPACE, 4, seed)}) > 150


def test_every_element_is_as_likely():
  """Each of 10 elements in 3 of 10 samples: 2,000 samples, standard deviation 20.5; six of them is never seen."""
  counts = [0] * 10
  for seed in range(2000):
    for changes in sample(numbered(10), 3, seed):
      counts[changes['k']] += 1
  assert all(abs(count - 600) < 6 * 20.5 for count in counts)


@pytest.mark.parametrize(
  'quantile, median', [(uniform(2, 4), 3), (loguniform(1e-4, 1e-2), 1e-3), (choice('a', 'b', 'c'), 'b')]
)
def test_distributions_by_their_median_and_ends(quantile, median):
  assert quantile(0.5) == median
  ends = quantile(0.0), quantile(math.nextafter(1.0, 0.0))
  assert ends[0] != ends[1]
  key = SPACE['train.steps']
  drawn = [key((i + 0.5) / 300) for i in range(300)]
  assert [drawn.count(value) for value in (5, 6, 7)] == [100, 100, 100]


@given(st.floats(1e-8, 1e8), st.floats(1.0001, 1e6), st.floats(0, 1, exclude_max=True))
def test_rounding_stays_within_bounds(low, ratio, u):
  high = low * ratio
  for quantile in (uniform(low, high), loguniform(low, high)):
    assert low <= quantile(u) <= high


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: list(sample(LR, 0)), 'k=0: must be positive'),
    (lambda: list(sample(LR, 1e12)), 'k=1000000000000.0: expected int'),
    (lambda: list(seeds(1, -1)), 'first=-1: must not be negative'),
    (lambda: list(seeds(10**11)), r'n=100000000000, first=0: seeds must lie in \[0, 2\^32\)'),
    (lambda: list(sample({'optim.clip': 0.5}, 1)), r'optim.clip=0.5: expected a distribution; .* choice\(0.5\)'),
    (lambda: loguniform(0, 1), r'loguniform\(0, 1\): 0 < low < high'),
    (lambda: loguniform(1, 1e-3), '0 < low < high'),
    (lambda: uniform(1, 1), 'low < high'),
    (lambda: uniform(0, math.inf), 'low < high'),
    (lambda: choice(), 'at least one value'),
  ],
)
def test_what_cannot_be_sampled(make, message):
  with pytest.raises(ConfigError, match=message) as error:
    make()
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'make',
  [
    lambda: product(seeds(2**32), LR),
    lambda: zipped(seeds(2**32), LR),
    lambda: sample(product(*(numbered(1000, f'k{i}') for i in range(4))), 20),
    lambda: product(sample(SPACE, 10**12), seeds(3)),
  ],
)
def test_a_list_that_no_memory_holds_is_refused_before_it_is_made(make, monkeypatch):
  monkeypatch.setattr(sweep, 'LARGEST', 1000)  # the time of a million is not what is tested
  with pytest.raises(ConfigError, match='more than 1,000 elements'):
    next(iter(make()))


def test_the_points_of_a_space_are_made_one_by_one():
  assert len(list(itertools.islice(sample(SPACE, 10**12), 5))) == 5
