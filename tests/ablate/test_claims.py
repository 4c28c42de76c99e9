"""Claims: what is tested, corrected and said; the chance of a wrong verdict over a whole experiment."""

import math

import numpy as np
import pytest
import scipy.stats
from fakes import summary

from slm_jax.ablate.claims import (
  CANNOT_TELL,
  EXPLORATORY,
  NOT_REPRODUCED,
  REPRODUCED,
  all_of,
  answer_of,
  by_test,
  decide,
  equal,
  inside,
  less,
  values,
)
from slm_jax.ablate.results import Row
from slm_jax.config import ConfigError

TRIALS = 1500
NOISE = 3 * math.sqrt(0.05 * 0.95 / TRIALS)


def seeds(xs):
  return dict(enumerate(xs))


def verdict(claim):
  return decide([claim._replace(primary=True)])[0].verdict


def shifted(shift, noise=(-0.002, 0.001, 0.002, -0.001, 0.0)):
  return seeds([1 + shift + e for e in noise]), seeds([1.0] * len(noise))


# --------------------------------------------------------------------------------------------------- one claim


@pytest.mark.parametrize(
  'by, expected', [(0.0, REPRODUCED), (0.02, REPRODUCED), (0.03, CANNOT_TELL), (0.04, NOT_REPRODUCED)]
)
def test_a_margin_moves_the_verdict_and_not_what_is_shown(by, expected):
  claim = less('a < b', *shifted(-0.03), by)
  assert verdict(claim) == expected
  assert claim.found == less('a < b', *shifted(-0.03)).found


@pytest.mark.parametrize(
  'shift, expected',
  [
    (0.0, REPRODUCED),
    (0.019, CANNOT_TELL),
    (-0.019, CANNOT_TELL),
    (0.03, NOT_REPRODUCED),
    (-0.03, NOT_REPRODUCED),
  ],
)
def test_equal_is_within_the_limit_on_both_sides(shift, expected):
  assert verdict(equal('a = b', *shifted(shift), 0.02)) == expected


def test_p_of_a_margin_is_the_two_sided_t_test_of_the_border():
  ours, theirs = shifted(-0.03)
  differences = [ours[i] - theirs[i] for i in ours]
  expected = scipy.stats.ttest_1samp(differences, -0.0295).pvalue
  assert less('', ours, theirs, 0.0295).p == pytest.approx(expected)


def test_p_of_an_equivalence_is_that_of_the_two_one_sided_tests():
  ours, theirs = shifted(0.018)
  differences = [ours[i] - theirs[i] for i in ours]
  below = scipy.stats.ttest_1samp(differences, 0.02, alternative='less').pvalue
  above = scipy.stats.ttest_1samp(differences, -0.02, alternative='greater').pvalue
  assert equal('', ours, theirs, 0.02).p == pytest.approx(2 * max(below, above))


@pytest.mark.parametrize('n', [3, 5])
@pytest.mark.parametrize('shift', [0.5, -0.5])
def test_at_the_border_an_equivalence_is_claimed_in_error_2_5_percent_of_the_time(n, shift):
  rng = np.random.default_rng(1)
  found = [
    verdict(equal('', seeds(rng.normal(shift, 1e-2, n)), dict.fromkeys(range(n), 0.0), 0.5)) for _ in range(TRIALS)
  ]
  assert found.count(REPRODUCED) / TRIALS < 0.025 + NOISE
  assert found.count(NOT_REPRODUCED) / TRIALS < 0.025 + NOISE


@pytest.mark.parametrize(
  'ours, theirs, why',
  [
    ({}, {0: 1.0}, 'no seed in common'),
    ({0: 1.0}, {0: 2.0}, 'one seed'),
    ({0: 1.0, 1: 1.1}, {0: 2.0, 1: 2.1}, 'all 2 differences are the same'),
    ({0: math.nan, 1: math.nan}, {0: 2.0, 1: 2.1}, '2 of 2 seeds diverged or failed'),
  ],
)
def test_what_cannot_be_tested_is_open_and_says_why(ours, theirs, why):
  for claim in (less('a < b', ours, theirs), equal('a = b', ours, theirs, 0.1)):
    (found,) = decide([claim._replace(primary=True)])
    assert found.verdict == CANNOT_TELL
    assert why in found.remark
    assert math.isnan(claim.p)


def test_no_claim_favours_an_arm_that_lost_a_seed():
  good, bad = {i: 1 + 0.01 * i for i in range(5)}, {i: 2 + 0.011 * i for i in range(5)}
  lost = {**good, 4: math.nan}
  assert verdict(less('', lost, bad)) == CANNOT_TELL
  assert verdict(less('', bad, lost)) == CANNOT_TELL  # NOT REPRODUCED would favour it
  assert verdict(less('', good, {**bad, 4: math.nan})) == REPRODUCED
  assert verdict(less('', {**bad, 4: math.nan}, good)) == NOT_REPRODUCED
  assert verdict(equal('', lost, {i: x + 1e-4 * (i % 2) for i, x in good.items()}, 0.5)) == CANNOT_TELL


@pytest.mark.parametrize('n', [3, 5, 8])
def test_diverging_seeds_make_no_false_claim(n):
  rng, wrong = np.random.default_rng(0), 0
  for _ in range(TRIALS):
    ours, theirs = rng.normal(size=(2, n))
    found = verdict(less('', {i: x if x < 0.5 else math.nan for i, x in enumerate(ours)}, seeds(theirs)))
    wrong += found == REPRODUCED and bool((ours >= 0.5).any())
  assert wrong == 0


# ----------------------------------------------------------------------------------------------- several at once


def experiment(rng, arms, n, primary):
  """Arms that are all as good as their common baseline; claims that each is better."""
  baseline = seeds(rng.normal(size=n))
  return [less(f'{i}', seeds(rng.normal(size=n)), baseline, primary=i < primary) for i in range(arms)]


@pytest.mark.parametrize('n', [3, 5])
def test_the_chance_of_any_wrong_verdict_of_an_experiment_is_at_most_5_percent(n):
  rng, wrong = np.random.default_rng(2), 0
  for _ in range(TRIALS):
    found = decide(experiment(rng, 18, n, 3))
    wrong += any(each.verdict in (REPRODUCED, NOT_REPRODUCED) for each in found)
  assert wrong / TRIALS <= 0.05 + NOISE


def test_uncorrected_it_would_be_every_third_experiment():
  rng, false = np.random.default_rng(2), 0
  for _ in range(TRIALS):
    false += any(claim.p < 0.05 and claim.holds for claim in experiment(rng, 18, 3, 0))
  assert false / TRIALS > 0.2


def test_only_primary_claims_have_verdicts_and_are_corrected():
  strong, weak = shifted(-0.03), shifted(-0.001)
  found = decide([less('first', *strong, primary=True), less('second', *weak), less('third', *weak, primary=True)])
  assert [(each.what, each.verdict) for each in found] == [
    ('first', REPRODUCED),
    ('third', CANNOT_TELL),
    ('second', EXPLORATORY),
  ]
  raw = less('second', *weak).p
  assert f'p={raw:.3f} uncorrected' in found[2].evidence
  assert f'p={raw:.3f} (Holm over 2)' in found[1].evidence


def test_a_claim_that_cannot_be_tested_takes_no_share_of_the_correction():
  found = decide([less('a', *shifted(-0.03), primary=True), less('b', {0: 1.0}, {0: 2.0}, primary=True)])
  assert 'Holm' not in found[0].evidence


def test_more_than_three_primary_claims_are_refused():
  with pytest.raises(ConfigError, match=r"4 primary claims \('a < b', .*\); allowed: 3") as error:
    decide([less('a < b', *shifted(-0.03), primary=True)] * 4)
  assert '\n' not in str(error.value)


# ---------------------------------------------------------------------------------------------- composed claims


def test_all_of_holds_only_where_each_part_does():
  good, open_, bad = less('', *shifted(-0.03)), less('', *shifted(-0.0005)), less('', *shifted(0.03))
  assert verdict(all_of('', [good, good])) == REPRODUCED
  assert verdict(all_of('', [good, open_])) == CANNOT_TELL
  assert verdict(all_of('', [good, bad])) == verdict(all_of('', [open_, bad])) == NOT_REPRODUCED
  assert verdict(all_of('', [good, less('', {0: 1.0}, {0: 2.0})])) == CANNOT_TELL
  assert all_of('', [good, open_]).p == open_.p
  assert all_of('', [good, bad]).p == 2 * bad.p


def test_one_part_that_does_not_hold_is_missed_5_percent_of_the_time_at_most():
  rng, wrong = np.random.default_rng(3), 0
  for _ in range(TRIALS):
    sure = less('', *shifted(-0.03))
    null = less('', seeds(rng.normal(size=3)), seeds(rng.normal(size=3)))
    wrong += verdict(all_of('', [sure, null])) == REPRODUCED
  assert wrong / TRIALS < 0.05


@pytest.mark.parametrize(
  'centre, expected', [(0.0, REPRODUCED), (2.0, NOT_REPRODUCED), (-2.0, NOT_REPRODUCED), (0.95, CANNOT_TELL)]
)
def test_inside_goes_by_the_draws_beyond_the_nearer_border(centre, expected):
  draws = np.random.default_rng(0).normal(centre, 0.2, 500)
  claim = inside('', centre, draws, -1.0, 1.0)
  assert verdict(claim) == expected
  assert claim.p >= 2 / 501
  assert verdict(inside('', centre, draws, -1.0, 1.0, undecided='at an end')) == CANNOT_TELL


# -------------------------------------------------------------------------------------------- from rows to an answer


def row(name, seed, loss=1.0, status='done', tokenizer='t', held_out='h', **more):
  config = {'seed': seed, 'data.seed': seed}
  known = {} if status != 'done' else summary(loss, tokenizer=tokenizer, held_out=held_out, **more)
  return Row(f'{name}{seed}', name, name, status, config, known, {})


def test_values_are_by_arm_and_seed_and_count_what_was_lost():
  rows = [row('a', 0, 1.5), row('a', 1, status='diverged'), row('a', 2, status='missing'), row('b', 0, 2.5)]
  found = values(rows)
  assert found['b'] == {(0, 0): 2.5}
  assert found['a'].keys() == {(0, 0), (1, 1)}, 'what was never run is not lost'
  assert math.isnan(found['a'][1, 1])
  assert values(rows, 'loss', lambda x: 2 * x)['b'] == {(0, 0): 5.0}
  assert values(rows, 'rollout_kl') == {}


def test_arms_of_two_tokenizers_are_compared_in_bits_per_byte():
  """500 tokens are worse in nats, which count larger tokens, and better in bits per byte."""
  rows = []
  for seed in range(5):
    jitter = 1e-3 * (seed % 3)
    rows.append(row('350', seed, 3.0 + jitter, bits_per_byte=4.06 + jitter, tokenizer='small'))
    rows.append(row('500', seed, 3.9, bits_per_byte=3.7, tokenizer='large'))
  loss = values(rows)
  claim = less('500 < 350', loss['500'], loss['350'])
  assert verdict(claim) == REPRODUCED
  assert 'bits/byte' in claim.found
  within = less('500 < 500', loss['500'], loss['500'])
  assert 'nats' in within.found
  accuracy = values(rows, 'accuracy')
  refused = less('', accuracy['500'], accuracy['350'])
  assert verdict(refused) == CANNOT_TELL
  assert 'accuracy is a mean over tokens, and the tokenizers differ' in refused.undecided


def test_arms_of_different_text_are_not_compared():
  rows = [row(name, seed, 1.0 + seed, held_out=name) for name in 'ab' for seed in range(3)]
  loss = values(rows)
  for claim in (less('', loss['a'], loss['b']), equal('', loss['a'], loss['b'], 1.0)):
    assert verdict(claim) == CANNOT_TELL
    assert claim.undecided == 'evaluated on different held-out text'


def test_an_answer_keeps_text_and_claims_apart():
  answer = answer_of(
    ['a table', less('a < b', *shifted(-0.03), primary=True), 'a note', less('c < d', *shifted(-0.03))]
  )
  assert answer.text == 'a table\na note'
  assert [claim.what for claim in answer.claims] == ['a < b', 'c < d']
  assert str(answer).split('\n\n')[1].startswith('Primary claims:\n- REPRODUCED: a < b: −0.0300 ± 0.0020, n=5, 5 of 5')
  assert str(answer).split('\n\n')[2].startswith('Exploratory, uncorrected: no verdicts:\n- exploratory: c < d: ')
  assert str(answer_of('only text')) == 'only text'


@pytest.mark.parametrize('said', [None, 3, [3], ['text', None]])
def test_an_answer_of_another_kind_is_one_line(said):
  with pytest.raises(ConfigError, match='expected texts and claims'):
    answer_of(said)


def test_a_claim_with_a_test_of_its_own():
  assert verdict(by_test('five of five', '5 of 5', 2 * 0.5**5, True)) == CANNOT_TELL
  assert verdict(by_test('eight of eight', '8 of 8', 2 * 0.5**8, True)) == REPRODUCED
