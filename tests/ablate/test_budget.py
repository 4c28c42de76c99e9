"""Budgets: what is dropped and what never is, what counts as spent, when a worker is stopped."""

import json
import math

import hypothesis
import pytest
from fakes import arms_of, experiment
from hypothesis import strategies as st

from slm_jax.ablate import budget, workdir
from slm_jax.ablate.budget import Amount, Limits
from slm_jax.ablate.sweep import product, seeds
from slm_jax.config import ConfigError
from slm_jax.distill.logits import Distill

SHARED = {'name': 'teacher', 'train.steps': 50}
STUDENTS = [
  {'name': 'scratch'},
  {'name': 'taught', 'transforms': (Distill('teacher'),)},
  {'name': 'cut', 'init.arm': 'teacher'},
]


def paired(n=3, shared=True):
  """A teacher and three students for each of n seeds, the teacher for all of them or one for each."""
  if shared:
    return arms_of(experiment(sweep=[SHARED, *product(seeds(n), STUDENTS)]))
  return arms_of(experiment(sweep=list(product(seeds(n), [SHARED, *STUDENTS]))))


def names(arms):
  return [(arm.name, arm.config.seed) for arm in arms]


def fit(arms, limit, done=(), amount=1.0, besides=0.0):
  amounts = dict.fromkeys((arm.arm_id for arm in arms), Amount(flops=amount))
  return budget.fit(arms, amounts, set(done), Limits(flops=limit), Amount(flops=besides))


def test_whole_seeds_go_first_so_that_what_stays_is_paired():
  arms = paired(3)
  assert names(fit(arms, 9.5)) == names(arms[:7])
  assert fit(arms, 10) == arms
  assert {seed for _, seed in names(fit(arms, 9.5))} == {0, 1}
  assert {seed for _, seed in names(fit(arms, 6))} == {0}


def test_of_one_seed_arms_go_from_the_end_and_a_parent_after_its_children():
  arms = paired(1)
  assert names(fit(arms, 3)) == [('teacher', 0), ('scratch', 0), ('taught', 0)]
  assert names(fit(arms, 2)) == [('teacher', 0), ('scratch', 0)]
  assert names(fit(arms, 1)) == [('teacher', 0)]
  assert fit(arms, 0.5) == []


def test_a_teacher_of_the_dropped_seed_stays_if_a_kept_arm_builds_on_it():
  arms = arms_of(
    experiment(
      sweep=[
        {'name': 'teacher', 'seed': 7, 'train.steps': 5},
        *product(seeds(2), [{'name': 'cut', 'init.arm': 'teacher'}]),
      ]
    )
  )
  assert names(fit(arms, 2)) == [('teacher', 7), ('cut', 0)]


def test_what_is_done_stays_and_what_was_used_elsewhere_counts():
  arms = paired(2)
  last = arms[-1]
  assert last in fit(arms, 5, done=[last.arm_id])
  assert len(fit(arms, 7, besides=3)) == 4
  assert fit(arms, 7, done=[arm.arm_id for arm in arms], besides=100) == arms


CACHE = {}  # expanding takes longer than everything else


@hypothesis.given(
  n=st.integers(1, 4),
  shared=st.booleans(),
  sizes=st.lists(st.floats(0.1, 10), min_size=16, max_size=16),
  limit=st.floats(0, 80),
  data=st.data(),
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_laws_of_fitting(n, shared, sizes, limit, data):
  arms = CACHE.setdefault((n, shared), paired(n, shared))
  done = data.draw(st.sets(st.sampled_from([arm.arm_id for arm in arms])))
  amounts = {arm.arm_id: Amount(flops=size) for arm, size in zip(arms, sizes, strict=False)}
  kept = budget.fit(arms, amounts, done, Limits(flops=limit))
  ids = [arm.arm_id for arm in kept]
  assert ids == [arm.arm_id for arm in arms if arm.arm_id in ids]  # in order
  assert done <= set(ids)
  assert all(parent in ids for arm in kept for parent in arm.parents.values())
  used = sum(amounts[i].flops for i in ids)
  needed = done | {p for arm in arms if arm.arm_id in done for p in arm.parents.values()}
  assert used <= limit * (1 + 1e-9) or set(ids) == needed
  assert budget.fit(arms, amounts, done, Limits(flops=math.inf)) == arms


def test_the_first_limit_that_is_exceeded_is_named():
  limits = Limits(flops=1e12, hours=2)
  assert budget.exceeded(Amount(1e12, 1e9, 2), limits) == ''
  assert budget.exceeded(Amount(2e12, 0, 3), limits) == '--max_flops=1e+12'
  assert budget.exceeded(Amount(0, 0, 3), limits) == '--max_hours=2'
  assert budget.shown(Amount(2e12, 1.5, 3), '--max_flops=1e+12') == '2T FLOPs'
  assert budget.shown(Amount(2e12, 1.5, 3), 'max_cost') == '$1.5'


def test_dollars_cannot_be_counted_where_an_hour_costs_nothing_or_nobody_knows():
  for kind in ('cpu', 'NVIDIA Unheard Of'):
    with pytest.raises(ConfigError, match='--config.run.price=DOLLARS'):
      budget.require_price(paired(1), kind)
  budget.require_price(paired(1), 'TPU v4')
  budget.require_price(arms_of(experiment(sweep=[{'run.price': '0.1'}])), 'cpu')


# -------------------------------------------------------------------------------------------------- while it runs


def write(path, arm, run, lines=(), done=False):
  folder = workdir.folder(path, arm.arm_id)
  folder.mkdir(parents=True)
  summary = {'summary': {'loss': 1.0, **run.get('summary', {})}} if done else {}
  (folder / 'run.json').write_text(json.dumps({**run, **summary}))
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  if done:
    (folder / 'DONE').touch()


def per_step(arm):
  return 1e5


def test_spent_is_the_summary_of_what_is_done_and_the_log_of_what_is_not(tmp_path):
  done, broken, never, priced = paired(1)
  write(tmp_path, done, {'summary': {'flops': 5e9, 'seconds': 7200, 'dollars': 3.0}}, done=True)
  lines = [{'step': s, 'kind': 'train', 'tokens': 1000.0 * s, 'seconds': 36.0 * s} for s in (1, 2)]
  chip = {'device_kind': 'TPU v5 lite', 'devices': 4, 'processes': 1}
  write(tmp_path, broken, {'status': 'diverged', **chip}, lines)
  write(tmp_path, priced, {'summary': {'flops': 1.0, 'seconds': 3600, 'dollars': None}, **chip}, done=True)
  assert budget.spent(tmp_path, done, per_step) == Amount(5e9, 3.0, 2.0)
  assert budget.spent(tmp_path, broken, per_step) == pytest.approx((2 * 1e5, 0.02 * 4 * 1.20, 0.02))
  assert budget.spent(tmp_path, never, per_step) == Amount()
  write(tmp_path, never, {'status': 'running', **chip, 'chip_share': 0.5}, lines)
  assert budget.spent(tmp_path, never, per_step) == pytest.approx((2 * 1e5, 0.02 * 4 * 1.20 / 2, 0.02))
  assert budget.spent(tmp_path, priced, per_step) == pytest.approx((1.0, 4 * 1.20, 1.0))


def test_a_run_that_was_cut_off_before_its_first_line_has_used_nothing(tmp_path):
  (arm, *_) = paired(1)
  folder = workdir.folder(tmp_path, arm.arm_id)
  folder.mkdir(parents=True)
  (folder / 'run.json').write_text('{"status": "runn')
  (folder / 'metrics.jsonl').write_text('{"step": 1')
  assert budget.spent(tmp_path, arm, per_step) == Amount()


@pytest.mark.parametrize(
  'limits, words',
  [
    (Limits(), ''),
    (Limits(flops=2.1e9), ''),
    (Limits(flops=2e9), '--max_flops=2e+09 is reached (2G FLOPs used)'),
    (Limits(dollars=1.5), '--max_cost=1.5 is reached ($2 used)'),
    (Limits(hours=2), '--max_hours=2 is reached (2 hours used)'),
  ],
)
def test_a_worker_starts_nothing_once_a_limit_is_reached(tmp_path, limits, words):
  """Half of it was used by a finished arm, half by one that is running elsewhere."""
  first, second, third, _ = arms = paired(1)
  write(tmp_path, first, {'summary': {'flops': 1e9, 'seconds': 3600, 'dollars': 1.0}}, done=True)
  admit = budget.admission(limits, tmp_path, arms, lambda arm: 1e9)
  assert admit(third) == ''
  running = {'status': 'running', 'device_kind': 'TPU v5 lite', 'devices': 1, 'processes': 1}
  line = {'step': 1, 'kind': 'train', 'tokens': 1000.0, 'seconds': 3600.0, 'dollars': 1.0}
  write(tmp_path, second, running, [line])
  assert admit(third) == words
