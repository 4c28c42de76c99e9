"""The questions about distillation: their verdicts follow the numbers, and each can come out any way."""

import collections

import numpy as np
import pytest
from fakes import arms_of, summary, verdicts_of

from experiments import capacity_gap, divergences, few_stories, kd_or_ce, on_policy, sparse_targets
from slm_jax.ablate import population
from slm_jax.ablate.results import Row
from slm_jax.config import flatten
from slm_jax.model.flops import flops_per_token

QUESTIONS = (kd_or_ce, sparse_targets, divergences, few_stories, capacity_gap)


def verdicts(module, numbers, noise=3e-4):
  """numbers: {name of an arm: what its summary says}; of others, a loss of 1."""
  rows = []
  for i, arm in enumerate(arms_of(module)):
    jitter = noise * np.random.default_rng(i).normal()
    its = {key: value + jitter for key, value in {'loss': 1.0, 'ece': 0.01, **numbers.get(arm.name, {})}.items()}
    rows.append(Row(arm.arm_id, arm.name, arm.group, 'done', flatten(arm.config), summary(**its), {}))
  return verdicts_of(module.report(rows))


def losses(**by_name):
  return {name: {'loss': value} for name, value in by_name.items()}


@pytest.mark.parametrize('module', QUESTIONS)
def test_arms_that_differ_in_seeds_only_are_one_population(module):
  arms = arms_of(module)
  names = {arm.arm_id: arm.name for arm in arms}
  groups = [collections.Counter(map(names.get, g)) for g in population.groups({a.arm_id: a.config for a in arms})]
  sizes = {name: [group[name] for group in groups if name in group] for name in names.values()}
  assert sizes[module.BASELINE] == [module.SEEDS]
  shared = {name for name, size in sizes.items() if size == [1]}
  assert all(size == [module.SEEDS] for name, size in sizes.items() if name not in shared)
  assert all(name.startswith(('teacher', 'sft')) for name in shared)


def test_kd_or_ce():
  gain, null = losses(ce=1.0, kd=0.9), {'ce, equal FLOPs': {'loss': 0.9}}
  assert verdicts(kd_or_ce, {**gain, **null}) == ['REPRODUCED', 'REPRODUCED']
  assert verdicts(kd_or_ce, {**gain, 'ce, equal FLOPs': {'loss': 0.8}}) == ['REPRODUCED', 'NOT REPRODUCED']
  assert verdicts(kd_or_ce, {**losses(kd=0.99), 'ce, equal FLOPs': {'loss': 0.99}})[0] == 'NOT REPRODUCED'
  assert verdicts(kd_or_ce, gain, noise=1.0) == ['CANNOT TELL', 'CANNOT TELL']


def test_the_arm_of_equal_flops_has_them():
  arms = {arm.name: arm.config for arm in arms_of(kd_or_ce)}
  teacher, kd, longer = (arms[name] for name in ('teacher', 'kd', 'ce, equal FLOPs'))
  own, its = (flops_per_token(c.model, 64, backward=b) for c, b in ((kd, True), (teacher, False)))
  assert longer.train.steps * own == pytest.approx(kd.train.steps * (own + its), rel=1e-3)


def test_sparse_targets():
  right = {
    'hard labels': {'loss': 1.2},
    'renormalised teacher': {'loss': 1.3, 'ece': 0.05},
    'unnormalised': {'loss': 1.3, 'ece': 0.05},
    'renormalised both': {'loss': 3.0},
  }
  assert set(verdicts(sparse_targets, right)) == {'REPRODUCED'}
  wrong = {**right, 'full': {'loss': 1.4}, 'unnormalised': {'loss': 1.3, 'ece': 0.011}}
  found = verdicts(sparse_targets, wrong)
  assert found[:3] == ['NOT REPRODUCED', 'NOT REPRODUCED', 'REPRODUCED']
  assert found[3:5] == ['NOT REPRODUCED', 'NOT REPRODUCED']  # no draws are as good, and hard labels are better
  assert found[6] == 'NOT REPRODUCED'  # not twice the calibration error


def test_divergences():
  """Twice: from random parameters, and from a student that saw the data."""
  names = [f'{name}{start}' for start in ('', ', warm') for name in divergences.DIVERGENCES]
  others = {name: {'loss': 1.1, 'entropy': 0.9, 'rollout_kl': 0.1} for name in names}
  best = {'loss': 1.0, 'entropy': 1.0, 'rollout_kl': 0.2}
  right = {**others, 'kl': best, 'kl, warm': best}
  assert verdicts(divergences, right) == ['REPRODUCED'] * 21
  found = verdicts(divergences, {**right, 'kl, warm': {'loss': 1.2, 'entropy': 0.8, 'rollout_kl': 0.2}})
  assert found[:3] == ['NOT REPRODUCED', 'NOT REPRODUCED', 'REPRODUCED']
  lowest, sharper, closer = found[3:17], found[17:19], found[19:]
  assert lowest == ['REPRODUCED'] * 7 + ['NOT REPRODUCED'] * 7
  assert sharper == ['REPRODUCED', 'NOT REPRODUCED']
  assert closer == ['REPRODUCED'] * 2


def test_few_stories():
  teachers = {'teacher 1': {'loss': 1.2}, 'teacher 2': {'loss': 1.1}}
  assert verdicts(few_stories, {**teachers, **losses(twin=1.2, distilled=1.0)}) == ['REPRODUCED', 'REPRODUCED']
  assert verdicts(few_stories, {**teachers, **losses(twin=1.18, distilled=1.15)}) == ['NOT REPRODUCED'] * 2


def test_capacity_gap():
  right = {'taught by 0.25x': {'loss': 1.3}, 'taught by 4x': {'loss': 0.8}, 'taught by 2x': {'loss': 0.81}}
  assert verdicts(capacity_gap, right) == ['REPRODUCED'] * 3
  wrong = {'taught by 0.25x': {'loss': 0.9}, 'taught by 4x': {'loss': 1.2}, 'taught by 2x': {'loss': 0.8}}
  assert verdicts(capacity_gap, wrong) == ['NOT REPRODUCED'] * 3


EXACT = {
  'more sft': 0.3,
  'off-policy': 0.4,
  'reverse KL': 0.5,
  'jsd': 0.5,
  'policy gradient': 0.45,
  'replay': 0.5,
}


def on_policy_verdicts(exact, noise=0.002):
  return verdicts(on_policy, {name: {'exact_match': share} for name, share in exact.items()}, noise)


def test_on_policy():
  assert on_policy_verdicts(EXACT) == ['REPRODUCED'] * 6
  assert on_policy_verdicts({name: 1 - share for name, share in EXACT.items()}) == ['NOT REPRODUCED'] * 6


@pytest.mark.parametrize('gain, verdict', [(0.01, 'NOT REPRODUCED'), (0.03, 'REPRODUCED')])
def test_the_gain_on_off_policy_must_be_two_points(gain, verdict):
  assert on_policy_verdicts({**EXACT, 'reverse KL': EXACT['off-policy'] + gain}, 1e-4)[3] == verdict
