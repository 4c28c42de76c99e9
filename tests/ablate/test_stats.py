"""Intervals, p values and sample sizes against scipy and what they promise; verdicts that claim no more."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slm_jax.ablate import stats
from slm_jax.ablate.comparison import compare

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=12).filter(lambda xs: np.std(xs) > 1e-3)


# ------------------------------------------------------------------------------------------------------- intervals


@settings(deadline=None)
@given(VALUES)
def test_interval_is_scipys(values):
  found = stats.interval(values)
  low, high = scipy.stats.t.interval(0.95, len(values) - 1, np.mean(values), scipy.stats.sem(values))
  np.testing.assert_allclose([found.mean - found.half, found.mean + found.half], [low, high], rtol=1e-9, atol=1e-9)
  assert found.n == len(values)
  assert found.sd == pytest.approx(np.std(values, ddof=1))


def test_interval_by_hand():
  # mean 2, s = 1, t(0.975, 2) = 4.3027: half = 4.3027 / sqrt(3)
  assert stats.interval([1, 2, 3]) == pytest.approx((2.0, 2.48414, 1.0, 3), abs=1e-5)


@settings(deadline=None)
@given(VALUES, st.randoms(use_true_random=False))
def test_p_is_that_of_the_paired_t_test_and_agrees_with_the_interval(values, random):
  ours, theirs = dict(enumerate(values)), {i: v + random.uniform(-1, 2) for i, v in enumerate(values)}
  found = compare(ours, theirs).difference
  assume(found.sd > 1e-6)
  p = scipy.stats.ttest_rel(list(ours.values()), list(theirs.values())).pvalue
  assert found.p == pytest.approx(p, rel=1e-6, abs=1e-12)
  if abs(p - 0.05) > 1e-6:
    assert (abs(found.mean) > found.half) == (found.p < 0.05)


def test_p_of_values_that_do_not_vary_or_are_too_few():
  assert math.isnan(stats.interval([0.5, 0.5]).p)  # a test needs a spread
  assert stats.interval([0.0, 0.0]).p == 1.0
  assert math.isnan(stats.interval([1.0]).p)
  assert math.isnan(stats.interval([]).p)


def test_pairing_removes_what_the_seeds_have_in_common():
  baseline = {seed: 10.0 * seed for seed in range(5)}
  ours = {seed: 10.0 * seed - 1 + 0.01 * (seed % 2) for seed in range(5)}
  assert compare(ours, baseline).difference.half < 0.02 < stats.interval(ours.values()).half


def test_pairs_are_the_common_seeds_and_missing_or_infinite_values_do_not_count():
  ours, theirs = {0: 1.0, 1: 2.0, 2: math.nan, 3: None, 4: 1.0}, {1: 1.5, 2: 1.0, 3: 1.0, 4: 1.0, 5: 9.0}
  found = compare(ours, theirs).difference
  assert (found.mean, found.n) == (0.25, 2)
  assert stats.interval([1.0, math.inf, None, 3.0])[::3] == (2.0, 2)


@pytest.mark.parametrize('n', [3, 5])
def test_the_interval_covers_the_truth_19_times_in_20(n):
  draws = np.random.default_rng(0).normal(1.0, 2.0, (2000, n))
  covered = [abs(i.mean - 1.0) <= i.half for i in map(stats.interval, draws)]
  assert 0.93 < np.mean(covered) < 0.97


# ------------------------------------------------------------------------------------------------------- bootstrap


@pytest.mark.parametrize('method', ['BCa', 'percentile'])
def test_bootstrap_is_reproducible_and_near_the_t_interval_of_many_values(method):
  values = np.random.default_rng(0).normal(3.0, 1.0, 200)
  low, high = stats.bootstrap(values, method=method)
  assert (low, high) == stats.bootstrap(values, method=method)
  assert (low, high) != stats.bootstrap(values, method=method, seed=1)
  t = stats.interval(values)
  np.testing.assert_allclose([low, high], [t.mean - t.half, t.mean + t.half], atol=0.02)


def test_bootstrap_of_skewed_values_covers_their_mean():
  draws = np.random.default_rng(0).exponential(1.0, (300, 40))
  spans = [stats.bootstrap(values, draws=500) for values in draws]
  assert 0.89 < np.mean([low <= 1.0 <= high for low, high in spans]) < 0.98


def test_bootstrap_of_another_statistic_and_of_next_to_nothing():
  low, high = stats.bootstrap([1.0, 2.0, 3.0, 4.0, 100.0], np.median, method='percentile')
  assert 1 <= low <= 3 <= high <= 100
  assert stats.bootstrap([2.0, 2.0, 2.0]) == (2.0, 2.0)
  assert all(map(math.isnan, stats.bootstrap([1.0])))


# ------------------------------------------------------------------------------------------- several comparisons


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_holm_is_the_closed_test_of_bonferroni(ps):
  """A hypothesis is refuted if every set of hypotheses that holds it is: by Bonferroni, min over the set x its size."""
  subsets = [s for k in range(1, len(ps) + 1) for s in itertools.combinations(range(len(ps)), k)]
  closed = [max(min(1.0, len(s) * min(ps[j] for j in s)) for s in subsets if i in s) for i in range(len(ps))]
  np.testing.assert_allclose(stats.holm(ps), closed, rtol=1e-12)


def test_holm_by_hand():
  assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm's own example
  assert stats.holm([0.5, 0.6]) == [1.0, 1.0]
  assert stats.holm([]) == []
  assert stats.holm([0.02, math.nan, 0.03]) == pytest.approx([0.04, math.nan, 0.04], nan_ok=True)  # two, not three


def test_holm_keeps_the_chance_of_a_false_claim_at_5_percent():
  """Four arms that are all as good as the baseline, three seeds, all compared with the same baseline values."""
  rng = np.random.default_rng(0)
  raw, adjusted = 0, 0
  for _ in range(2000):
    baseline = rng.normal(size=3)
    ps = [stats.interval(rng.normal(size=3) - baseline).p for _ in range(4)]
    raw += min(ps) < 0.05
    adjusted += min(stats.holm(ps)) < 0.05
  noise = 3 * math.sqrt(0.05 * 0.95 / 2000)
  assert adjusted / 2000 <= 0.05 + noise
  assert raw / 2000 > 0.08  # which is what the correction is for


# ------------------------------------------------------------------------------------------------- how many seeds


@pytest.mark.parametrize('n', [2, 3, 5, 11, 30, 300])
@pytest.mark.parametrize('alpha', [0.05, 0.0125])
def test_detectable_effects_have_power_80(n, alpha):
  found = stats.noncentrality(n, alpha)
  critical = scipy.stats.t.isf(alpha / 2, n - 1)
  assert scipy.stats.nct.sf(critical, n - 1, found) == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize('n', [3, 60])
def test_the_detectable_effect_is_detected_4_times_in_5(n):
  rng = np.random.default_rng(1)
  effect = stats.noncentrality(n) * 0.1 / math.sqrt(n)
  found = [abs(i.mean) > i.half for i in map(stats.interval, rng.normal(effect, 0.1, (3000, n)))]
  assert np.mean(found) == pytest.approx(0.8, abs=0.025)
  assert stats.Interval(0.0, math.nan, 0.1, n).detectable == pytest.approx(effect)


@settings(deadline=None)
@given(st.floats(1e-3, 10), st.floats(1e-3, 10), st.sampled_from([0.05, 0.01]))
def test_so_many_seeds_are_enough_and_one_less_is_not(effect, sd, alpha):
  n = stats.seeds_needed(effect, sd, alpha)
  assert stats.seeds_needed(-effect, sd, alpha) == n

  def shows(k):
    return effect >= stats.noncentrality(k, alpha) * sd / math.sqrt(k)

  if n is None:
    assert not shows(stats.MOST_SEEDS)
  else:
    assert shows(n)
    assert n == 2 or not shows(n - 1)


@settings(deadline=None)
@given(VALUES, st.integers(1, 20))
def test_what_cannot_be_told_needs_more_seeds_than_there_were(values, comparisons):
  found = stats.interval(values)
  if found.p > stats.ALPHA / comparisons:
    needed = stats.seeds_needed(found.mean, found.sd, stats.ALPHA / comparisons)
    assert needed is None or needed > found.n


def test_the_range_of_seeds_holds_the_right_number_4_times_in_5():
  rng = np.random.default_rng(3)
  right, held, point = stats.seeds_needed(0.5, 1.0), 0, []
  assert right == 34
  for values in rng.normal(0.5, 1.0, (1500, 3)):
    found = stats.interval(values)
    fewest, most = stats.seeds_range(found)
    held += (fewest is not None and fewest <= right) and (most is None or most >= right)
    point.append(stats.seeds_needed(found.mean, found.sd) or math.inf)
  assert held / 1500 > 0.8
  # which the number by itself, post-hoc power, is far from
  low, high = np.quantile(point, [0.1, 0.9])
  assert low < 10
  assert high > 400


@settings(deadline=None)
@given(VALUES)
def test_the_number_that_the_difference_as_it_stands_would_take_is_in_the_range(values):
  found = stats.interval(values)
  needed, (fewest, most) = stats.seeds_needed(found.mean, found.sd), stats.seeds_range(found)
  if needed is not None:
    assert fewest is not None
    assert fewest <= needed
    assert most is None or needed <= most


# ----------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
  'mean, half, text',
  [
    (0.0213, 0.0061, '0.0213 ± 0.0061'),
    (-2.5, 0.25, '−2.50 ± 0.25'),
    (1e-6, 2e-6, '0.0000010 ± 0.0000020'),
    (0.5, math.nan, '0.5000'),
  ],
)
def test_as_many_digits_as_the_interval_says_something_about(mean, half, text):
  assert stats.digits(mean, half) == text
