"""Choosing arms: what a pattern means, what comes along, what is refused."""

import pytest
from fakes import arms_of, experiment
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.ablate.choose import choose
from slm_jax.ablate.sweep import product, seeds
from slm_jax.config import ConfigError
from slm_jax.distill.logits import Distill
from slm_jax.ema import Ema

METHODS = [
  {'name': 'teacher', 'model.n_layers': 3},
  {'name': 'scratch', 'model.bias': True},
  {'name': 'distilled', 'transforms': (Distill('teacher', weight=0.25),)},
  {'name': 'distilled twice', 'init.arm': 'distilled', 'transforms': (Distill('teacher', weight=0.75), Ema(0.5))},
]
ARMS = arms_of(experiment(sweep=list(product(METHODS, seeds(2)))))


def chosen(arms=ARMS, **how):
  return [(arm.name, arm.config.seed) for arm in choose(arms, **how).arms]


def both(*names):
  return [(name, seed) for name in names for seed in (0, 1)]


def test_nothing_asked_is_all():
  assert choose(ARMS).arms == ARMS
  assert choose(ARMS).along == []


@pytest.mark.parametrize(
  'pattern, names',
  [
    ('scratch', ['scratch']),
    ('s*', ['scratch']),
    ('*t?acher', ['teacher']),
    ('distilled', ['teacher', 'distilled']),
    ('* twice', ['teacher', 'distilled', 'distilled twice']),
    ('model.n_layers=3', ['teacher']),
    ('n_layers=3.0', ['teacher']),
    ('bias=true', ['scratch']),
    ('distill.weight=0.25', ['teacher', 'distilled']),
    ('weight=2.5e-1', ['teacher', 'distilled']),
    ('weight=0.?5', ['teacher', 'distilled', 'distilled twice']),
    ('transforms.distill.teacher=teacher', ['teacher', 'distilled', 'distilled twice']),
    ('transforms=distill+ema', ['teacher', 'distilled', 'distilled twice']),
    ('init.arm=distilled', ['teacher', 'distilled', 'distilled twice']),
    ('n_layers=2', ['teacher', 'scratch', 'distilled', 'distilled twice']),
  ],
)
def test_what_a_pattern_means(pattern, names):
  assert chosen(only=[pattern]) == both(*names)


def test_seed_is_one_key_and_not_the_end_of_another():
  arms = arms_of(experiment(sweep=[{'seed': 0, 'data.seed': 1}, {'seed': 1, 'data.seed': 0}]))
  assert chosen(arms, only=['seed=1']) == [('base', 1)]
  assert chosen(arms, only=['data.seed=1']) == [('base', 0)]


@pytest.mark.parametrize('digits', [4, 7, 12])
def test_an_id_or_its_beginning(digits):
  for arm in ARMS:
    if not arm.parents:
      assert choose(ARMS, only=[arm.arm_id[:digits]]).arms == [arm]


def test_a_merged_arm_is_found_by_all_of_its_names():
  arms = arms_of(experiment(sweep=[{'name': 'one'}, {'name': 'two'}, {'name': 'three', 'seed': 5}]))
  assert chosen(arms, only=['two']) == [('one', 0)]


def test_patterns_add_up_and_exclusion_wins():
  assert chosen(only=['scratch', 'teacher']) == both('teacher', 'scratch')
  assert chosen(only=['scratch', 'teacher'], exclude=['seed=1']) == [('teacher', 0), ('scratch', 0)]
  assert chosen(exclude=['distilled*']) == both('teacher', 'scratch')


def test_limit_counts_what_was_asked_for():
  assert chosen(limit=3) == [*both('teacher'), ('scratch', 0)]
  assert chosen(only=['distilled'], limit=1) == [('teacher', 0), ('distilled', 0)]


def test_parents_that_are_not_done_come_along_and_are_told():
  teachers = {arm.arm_id for arm in ARMS if arm.name == 'teacher'}
  found = choose(ARMS, only=['distilled'])
  assert {arm.arm_id for arm in found.along} == teachers
  done = choose(ARMS, only=['distilled'], is_done=teachers.__contains__)
  assert done.along == []
  assert done.arms == found.arms  # what is launched is the same the second time


def test_an_arm_that_is_done_needs_no_parents():
  done = {arm.arm_id for arm in ARMS if arm.name == 'distilled'}
  assert chosen(only=['distilled'], is_done=done.__contains__) == both('distilled')


def test_an_arm_that_others_build_on_cannot_be_excluded_unless_it_is_done():
  with pytest.raises(ConfigError, match=r"--exclude=teach\*: 'distilled.*' builds on 'teacher', which is not done"):
    choose(ARMS, exclude=['teach*'])
  done = {arm.arm_id for arm in ARMS if arm.name == 'teacher'}
  assert chosen(exclude=['teach*'], is_done=done.__contains__) == both('scratch', 'distilled', 'distilled twice')
  assert chosen(exclude=['teach*', 'dist*']) == both('scratch')


@pytest.mark.parametrize(
  'how, message',
  [
    ({'only': ['scrtch']}, '--only=scrtch: no arm .*; there is: teacher, scratch, distilled, distilled twice$'),
    ({'only': ['scratch', 'weight=0.3']}, '--only=weight=0.3: no arm'),
    ({'only': ['Scratch']}, '--only=Scratch: no arm'),
    ({'exclude': ['x']}, '--exclude=x: no arm'),
    ({'only': ['abc']}, '--only=abc: no arm'),
    ({'only': ['']}, '--only=: no arm'),
    ({'exclude': ['*']}, r'--exclude=\*: leaves no arm'),
    ({'only': ['scratch'], 'exclude': ['scr*', 'teacher']}, r'--exclude=scr\*,teacher: leaves no arm'),
  ],
)
def test_what_means_nothing_is_one_line(how, message):
  with pytest.raises(ConfigError, match=message) as error:
    choose(ARMS, **how)
  assert '\n' not in str(error.value)


def test_many_names_are_not_all_listed():
  arms = arms_of(experiment(sweep=[{'name': f'a{i}', 'train.steps': 5 + i} for i in range(50)]))
  with pytest.raises(ConfigError, match='a18, a19 and 30 more$'):
    choose(arms, only=['b'])


@settings(deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 12), st.data())
def test_whatever_is_chosen_can_run(random, n, data):
  """In any graph of arms, with any of them done: parents are first, and there or done; the order is kept."""
  names = [f'arm{i}' for i in range(n)]
  sweep = [{'name': names[0], 'model.d_ff': 64}]
  sweep += [
    {
      'name': names[i],
      'model.d_ff': 64 - i,
      **({'init.arm': random.choice(names[:i])} if random.random() < 0.7 else {}),
    }
    for i in range(1, n)
  ]
  arms = arms_of(experiment(sweep=sweep))
  some = st.lists(st.sampled_from(names), max_size=3)
  done = {arm.arm_id for arm in arms if random.random() < 0.3}
  only, exclude, limit = data.draw(some), data.draw(some), data.draw(st.none() | st.integers(1, n))
  try:
    found = choose(arms, only=only, exclude=exclude, limit=limit, is_done=done.__contains__)
  except ConfigError:
    assert exclude
    return
  assert found.arms == [arm for arm in arms if arm in found.arms]
  available = set(done)
  for arm in found.arms:
    assert arm.arm_id in done or available.issuperset(arm.parents.values())
    available.add(arm.arm_id)
  asked = [arm for arm in arms if (not only or arm.name in only) and arm.name not in exclude][:limit]
  assert all(arm in found.arms for arm in asked)
  assert all(arm.name not in exclude for arm in found.arms)
  assert {arm.arm_id for arm in found.along} == {arm.arm_id for arm in found.arms if arm not in asked} - done
  again = choose(arms, only=only, exclude=exclude, limit=limit, is_done=(done | available).__contains__)
  assert {arm.arm_id for arm in again.arms} >= {arm.arm_id for arm in asked}
