"""Verdicts about two arms: they claim no more than the seeds show, and favour no arm that lost seeds."""

import math

import numpy as np
import pytest

from slm_jax.ablate import comparison
from slm_jax.ablate.comparison import compare, judge

INF, NAN = math.inf, math.nan


def of(*differences, base=0.5):
  """A comparison with these differences, in the order of seeds."""
  theirs = {seed: base + 0.01 * seed for seed in range(len(differences))}
  return compare({seed: theirs[seed] + d for seed, d in enumerate(differences)}, theirs)


@pytest.mark.parametrize(
  'differences, words',
  [
    (
      [-0.020, -0.021, -0.022, -0.02, -0.022],
      'better: −0.0210 ± 0.0012 nats (p<0.001, n=5, 5 of 5 seeds agree in sign)',
    ),
    (
      [0.020, 0.021, 0.022],
      'worse: +0.0210 ± 0.0025 nats (p<0.001, n=3 (fewer than 5 seeds), 3 of 3 seeds agree in sign)',
    ),
    (
      [-0.02, 0.01, 0.03],
      'cannot tell: +0.007 ± 0.063 nats (p=0.691, n=3 (fewer than 5 seeds), 2 of 3 seeds agree in sign);'
      ' needs 11 to more than 1,000 seeds',
    ),
    ([-0.02], 'cannot tell: −0.0200 nats; one seed'),
    ([], 'cannot tell; no seed in common'),
    ([0.0, 0.0], 'no difference (n=2); the same within rounding'),
    ([0.0], 'no difference (n=1); the same within rounding'),
    ([1e-9, -1e-9, 2e-9], 'no difference (n=3); the same within rounding'),
  ],
)
def test_verdicts(differences, words):
  assert str(judge(of(*differences))) == words


def test_a_verdict_over_several_comparisons_goes_by_the_adjusted_p():
  found = of(-0.01, -0.02, -0.03, -0.01)
  assert 0.02 < found.p < 0.04
  assert judge(found).word == 'better'
  verdict = judge(found, p=0.106, comparisons=3)
  assert verdict.word == 'cannot tell'
  assert 'p=0.106 (Holm over 3)' in verdict.evidence
  assert verdict.remark.startswith('needs 5 to ')


@pytest.mark.parametrize('n', [2, 3, 5])
def test_differences_that_are_all_the_same_prove_nothing(n):
  """Two equal differences made p = 0: seeds that change nothing are no repetitions."""
  found = of(*[-0.05] * n)
  assert math.isnan(found.p)
  assert judge(found).word == 'cannot tell'
  assert f'all {n} differences are the same' in judge(found).remark


def test_what_is_nearer_than_float32_can_tell_is_no_difference():
  rng = np.random.default_rng(0)
  for size in (1e-9, 1e-8, 1e-7):
    assert judge(of(*(-size * (1 + 0.1 * rng.normal(size=4))))).word == 'no difference'
  assert judge(of(*(-1e-4 * (1 + 0.1 * rng.normal(size=4))))).word == 'better'


# ------------------------------------------------------------------------------------------------------ lost seeds

GOOD, BAD = {0: 1.0, 1: 1.011, 2: 1.02, 3: 1.031, 4: 1.04}, {0: 2.0, 1: 2.01, 2: 2.021, 3: 2.03, 4: 2.041}


@pytest.mark.parametrize('value', [INF, NAN, None])
def test_no_verdict_favours_an_arm_that_lost_a_seed(value):
  lost = {**GOOD, 4: value}
  verdict = judge(compare(lost, BAD))
  assert verdict.word == 'cannot tell'
  assert verdict.remark == '1 of 5 seeds diverged or failed'
  assert judge(compare(BAD, lost)).word == 'cannot tell', 'worse would favour the other, which lost one'
  assert judge(compare(BAD, lost)).remark == '1 of 5 seeds of the other diverged or failed'


def test_a_verdict_against_the_arm_that_lost_seeds_stands_and_names_them():
  lost = {**BAD, 3: INF, 4: INF}
  worse = judge(compare(lost, GOOD))
  assert (worse.word, worse.remark) == ('worse', '2 of 5 seeds diverged or failed')
  better = judge(compare(GOOD, lost))
  assert (better.word, better.remark) == ('better', '2 of 5 seeds of the other diverged or failed')


def test_an_arm_of_which_nothing_is_left_cannot_be_judged():
  verdict = judge(compare(dict.fromkeys(GOOD, INF), BAD))
  assert (verdict.word, verdict.remark) == ('cannot tell', '5 of 5 seeds diverged or failed')


@pytest.mark.parametrize('n', [3, 5, 8])
def test_where_the_worst_seeds_diverge_nothing_is_better_for_it(n):
  """Two equal arms, of which one diverges above its 69th percentile: without its worst seeds it looked better."""
  rng, wrong, naive = np.random.default_rng(0), 0, 0
  for _ in range(1500):
    ours, theirs = rng.normal(size=(2, n))
    kept = {i: x if x < 0.5 else INF for i, x in enumerate(ours)}
    found = compare(kept, dict(enumerate(theirs)))
    wrong += judge(found).word == 'better' and found.lost[0] > 0
    naive += found.n > 1 and found.p < 0.05 and found.difference.mean < 0
  assert wrong == 0
  assert naive / 1500 > 0.03, 'which is what counting them is for'


def test_few_is_said_where_it_is_few():
  few, enough = of(-0.1, -0.11, -0.12, -0.1), of(-0.1, -0.11, -0.12, -0.1, -0.13)
  assert f'fewer than {comparison.FEW} seeds' in judge(few).evidence
  assert 'fewer' not in judge(enough).evidence
