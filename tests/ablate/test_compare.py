"""Two workdirs compared: what was matched, what differs, and a page of it."""

import pytest
from fakes import FakeTrain, arms_of, experiment
from test_report import EVIL, Page

from launch import report as command
from launch.plan import Plan
from launch.worker import run_arms
from slm_jax.ablate import compare, results
from slm_jax.ablate.sweep import product, seeds
from slm_jax.config import ConfigError
from slm_jax.distill.logits import Distill

METHODS = [{'name': 'teacher'}, {'name': 'student', 'transforms': (Distill('teacher'),)}]


def launched(path, methods=METHODS, n=3, train=None, **overrides):
  module = experiment(sweep=list(product(seeds(n), methods)))
  arms = arms_of(module, **overrides)
  Plan(module, path, arms, [], arms[0].name).record()
  run_arms(arms, path, train=train or FakeTrain(), say=lambda line: None)
  return path


class Noisy(FakeTrain):
  """Training whose losses have a part that runs of one seed do not share."""

  def __init__(self, losses, scale):
    super().__init__(losses)
    self.noise = iter(scale * x for x in (0, 1, 0, -1, 0, 2))

  def __call__(self, config, workdir, arm_id):
    train = FakeTrain({config.name: self.losses[config.name] + next(self.noise)})
    return train(config, workdir, arm_id)


def test_differences_are_b_minus_a_by_seed(tmp_path):
  a = launched(tmp_path / 'a', train=Noisy({'teacher': 1.5, 'student': 1.4}, 0.0))
  b = launched(tmp_path / 'b', train=Noisy({'teacher': 1.5, 'student': 1.3}, 0.0001), **{'optim.learning_rate': '5e-4'})
  teacher, student = compare.pairs(results.read(a), results.read(b))
  assert teacher.difference == pytest.approx((0, 0, 0, 3), abs=1e-12)
  assert student.difference.mean == pytest.approx(-0.1, abs=1e-3)
  assert student.difference.half < 0.001 < student.losses[0].half  # what the seeds share cancels
  assert str(student.verdict).startswith('better: −0.0999')
  assert teacher.verdict.word == 'no difference'


def test_only_common_seeds_and_common_names_are_compared(tmp_path):
  a = launched(tmp_path / 'a', [*METHODS, {'name': 'old', 'train.steps': 9}], n=2)
  b = launched(tmp_path / 'b', [*METHODS, {'name': 'new', 'train.steps': 8}], n=4)
  text = compare.publish(a, b)
  assert [pair.difference.n for pair in compare.pairs(results.read(a), results.read(b))] == [2, 2]
  assert f'only in {a}: old' in text
  assert f'only in {b}: new' in text
  assert 'no setting differs' in text


def test_settings_that_differ_are_told_once_with_their_arms(tmp_path):
  a = launched(tmp_path / 'a', **{'run.log_every': '3'})
  slower = [METHODS[0], {**METHODS[1], 'optim.clip': 0.5}]
  b = launched(tmp_path / 'b', slower, **{'optim.learning_rate': '5e-4'})
  rows = [results.read(where) for where in (a, b)]
  found = compare.differing_settings(compare.pairs(*rows), {row.arm_id: row.name for of in rows for row in of})
  # neither the teacher's id, which is another, nor how often something is logged
  assert sorted(found) == [
    ('optim.clip', '1', '0.5', 'student'),
    ('optim.learning_rate', '0.001', '0.0005', 'all arms'),
  ]


def test_the_page_is_complete_and_escaped(tmp_path):
  a = launched(tmp_path / 'a', [{'name': EVIL}, {'name': 'two', 'train.steps': 7}])
  b = launched(tmp_path / 'b', [{'name': EVIL}, {'name': 'two', 'train.steps': 7}], **{'eval.prompt': EVIL})
  compare.publish(a, b)
  page = Page((b / 'compare.html').read_text())
  assert page.open == []
  assert page.tags.count('script') == 1
  assert 'img' not in page.tags
  assert page.tags.count('svg') == 1
  for text in ('b against a', EVIL, f'– → {EVIL}', 'no difference (n=3); the same within rounding'):
    assert text in page.text
  assert (b / 'plots/compare.svg').exists()
  assert not (a / 'compare.html').exists()


def test_the_latest_launches_are_compared_unless_all_are_wanted(tmp_path):
  a, b = launched(tmp_path / 'a', [{'name': 'one'}]), launched(tmp_path / 'b', [{'name': 'one'}])
  launched(b, [{'name': 'two', 'train.steps': 9}])
  with pytest.raises(ConfigError, match='no arm has the same name in both; there is .one.; and .two.$'):
    compare.publish(a, b)
  assert 'only in' in compare.publish(a, b, everything=True)


def test_the_command_takes_one_or_two_workdirs(tmp_path, capsys):
  a, b = launched(tmp_path / 'a'), launched(tmp_path / 'b')
  assert command.main([str(a), str(b)]) == 0
  out = capsys.readouterr().out
  assert f'A: {a}\nB: {b}' in out
  assert str(b / 'compare.html') in out
  for wrong in ([str(a), str(b), str(a)], [str(a), str(tmp_path / 'c')], [str(a), '--al']):
    assert command.main(wrong) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: ')
    assert error.count('\n') == 1
