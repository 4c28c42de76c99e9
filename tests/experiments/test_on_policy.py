"""The verdicts of experiments/on_policy.py follow the numbers."""

import re

import numpy as np
import pytest
from fakes import arms_of, summary

from experiments import on_policy
from slm_jax.ablate.results import Row
from slm_jax.config import flatten

AS_EXPECTED = {
  'more sft': 0.3,
  'off-policy': 0.4,
  'reverse KL': 0.5,
  'jsd': 0.5,
  'policy gradient': 0.45,
  'replay': 0.5,
}


def verdicts(exact, noise=0.002):
  rows = []
  for i, arm in enumerate(arms_of(on_policy)):
    found = exact.get(arm.name, 0.9) + noise * np.random.default_rng(i).normal()
    its = {**summary(0.1), 'exact_match': found}
    rows.append(Row(arm.arm_id, arm.name, arm.group, 'done', flatten(arm.config), its, {}))
  lines = [line for line in on_policy.report(rows).splitlines() if line.startswith('- ')]
  return [re.search(r'(NOT REPRODUCED|REPRODUCED|CANNOT TELL)$', line).group(1) for line in lines]


def test_as_expected():
  assert verdicts(AS_EXPECTED) == ['REPRODUCED'] * 5


def test_the_other_way_round():
  assert verdicts({name: 1 - exact for name, exact in AS_EXPECTED.items()}) == ['NOT REPRODUCED'] * 5


@pytest.mark.parametrize('gain, verdict', [(0.01, 'NOT REPRODUCED'), (0.03, 'REPRODUCED')])
def test_the_gain_must_be_two_points(gain, verdict):
  assert verdicts({**AS_EXPECTED, 'reverse KL': AS_EXPECTED['off-policy'] + gain}, 1e-4)[0] == verdict
