"""Intervals against scipy and against what they promise; verdicts that claim no more than that."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.ablate import stats

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=12).filter(lambda xs: np.std(xs) > 1e-3)


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
def test_a_paired_difference_excludes_zero_exactly_when_the_paired_t_test_does(values, random):
  ours, theirs = dict(enumerate(values)), {i: v + random.uniform(-1, 2) for i, v in enumerate(values)}
  found = stats.paired(ours, theirs)
  p = scipy.stats.ttest_rel(list(ours.values()), list(theirs.values())).pvalue
  if abs(p - 0.05) > 1e-6:
    assert (abs(found.mean) > found.half) == (p < 0.05)


def test_pairing_removes_what_the_seeds_have_in_common():
  baseline = {seed: 10.0 * seed for seed in range(5)}
  ours = {seed: 10.0 * seed - 1 + 0.01 * (seed % 2) for seed in range(5)}
  assert stats.paired(ours, baseline).half < 0.02 < stats.interval(ours.values()).half


def test_pairs_are_the_common_seeds_and_missing_or_infinite_values_do_not_count():
  found = stats.paired({0: 1.0, 1: 2.0, 2: math.nan, 3: None, 4: 1.0}, {1: 1.5, 2: 1.0, 3: 1.0, 4: 1.0, 5: 9.0})
  assert (found.mean, found.n) == (0.25, 2)
  assert stats.interval([1.0, math.inf, None, 3.0])[::3] == (2.0, 2)


@pytest.mark.parametrize('n', [3, 5])
def test_the_interval_covers_the_truth_19_times_in_20(n):
  draws = np.random.default_rng(0).normal(1.0, 2.0, (4000, n))
  covered = [abs(i.mean - 1.0) <= i.half for i in map(stats.interval, draws)]
  assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_the_detectable_effect_is_detected_4_times_in_5():
  n, sd = 60, 0.1
  effect = stats.Interval(0.0, math.nan, sd, n).detectable
  draws = np.random.default_rng(1).normal(effect, sd, (3000, n))
  found = [abs(i.mean) > i.half for i in map(stats.interval, draws)]
  assert np.mean(found) == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(
  'differences, words',
  [
    ([-0.020, -0.021, -0.022], 'better by 0.0210 ± 0.0025 nats (95 %), n=3'),
    ([0.020, 0.021, 0.022], 'worse by 0.0210 ± 0.0025 nats (95 %), n=3'),
    ([-0.02, 0.01, 0.03], 'cannot tell: +0.007 ± 0.063 nats (95 %), n=3; an effect below about 0.041 would not show'),
    ([-0.02], 'cannot tell: −0.0200 nats, but n=1'),
    ([], 'cannot tell: no seed in common'),
    ([-0.5, -0.5], 'better by 0.50000 ± 0.00000 nats (95 %), n=2'),
    ([0.0, 0.0], 'cannot tell: +0.00000 ± 0.00000 nats (95 %), n=2; an effect below about 0 would not show'),
  ],
)
def test_verdicts(differences, words):
  assert stats.verdict(stats.interval(differences)) == words


def test_an_expectation_is_met_missed_or_open():
  def of(*values):
    return stats.expectation(stats.interval(values))

  assert of(-1.0, -1.1, -0.9) == 'REPRODUCED'
  assert of(1.0, 1.1, 0.9) == 'NOT REPRODUCED'
  assert of(-1.0, 1.1, -0.9) == of(-1.0) == of() == 'CANNOT TELL'
