"""Sums that are right, and a valid split that holds no problem of the train split."""

import re

import pytest

from slm_jax.data import addition


@pytest.mark.parametrize(
  'a, b, text',
  [
    (478, 256, '478+256=8+6=14;7+5+1=13;4+2+1=7;734'),
    (100, 200, '100+200=0+0=0;0+0=0;1+2=3;300'),
    (999, 999, '999+999=9+9=18;9+9+1=19;9+9+1=19;1998'),
  ],
)
def test_examples(a, b, text):
  assert addition.document(a, b) == text


def test_every_equation_holds():
  for text in addition.documents(300, 'train'):
    problem, *work, answer = text.replace('=', ';', 1).split(';')
    assert sum(map(int, problem.split('+'))) == int(answer)
    for line in work:
      left, right = line.split('=')
      assert sum(map(int, left.split('+'))) == int(right)


def test_splits_share_no_problem_and_are_the_same_each_time():
  train, valid = (list(addition.documents(20_000, split)) for split in ('train', 'valid'))
  assert not set(train) & set(valid)
  assert len(set(train)) > 19_000
  assert train[:50] == list(addition.documents(50, 'train'))
  share = sum(addition.held_out(a, b) for a in range(100, 1000, 7) for b in range(100, 1000)) / 129 / 900
  assert share == pytest.approx(1 / addition.HELD_OUT, abs=0.01)


def test_problems_have_three_digits():
  assert all(re.match(r'[1-9]\d\d\+[1-9]\d\d=', text) for text in addition.documents(200, 'valid'))
