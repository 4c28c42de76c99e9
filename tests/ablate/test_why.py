"""Why ids differ, and whether the same id was made by the same code."""

import dataclasses
import json

import pytest
from fakes import arms_of, experiment

from slm_jax.ablate.why import drift, explain
from slm_jax.config import ConfigError, to_dict
from slm_jax.distill.logits import Distill
from slm_jax.revision import source

METHODS = [
  {'name': 'small', 'model.n_layers': 3},
  {'name': 'large', 'model.n_layers': 4, 'run.log_every': 7},
  {'name': 'a', 'transforms': (Distill('small'),)},
  {'name': 'b', 'transforms': (Distill('large', weight=0.25),), 'train.steps': 9},
]


@pytest.fixture
def arms():
  return arms_of(experiment(sweep=METHODS))


def leave(workdir, arm, config=None, run=None):
  """What a launch leaves of an arm that is done."""
  folder = workdir / 'arms' / arm.arm_id
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(json.dumps(config or to_dict(arm.config)))
  (folder / 'run.json').write_text(json.dumps({'summary': {'loss': 1.0}, **(run or {})}))
  (folder / 'DONE').touch()


def test_what_ids_are_made_of_is_compared_through_all_parents(arms, tmp_path):
  small, large, a, b = arms
  assert explain([a.arm_id[:6], b.arm_id], arms, tmp_path).split('\n') == [
    f'{a.arm_id} (a, seed 0) and {b.arm_id} (b, seed 0) differ in',
    '  train.steps: 1000 -> 9',
    '  transforms.distill.weight: 0.5 -> 0.25',
    f'  transforms.distill.teacher: {small.arm_id} -> {large.arm_id}, which differ in',
    '    model.n_layers: 3 -> 4',
  ]


def test_any_two_arms_of_different_ids_differ_in_something(arms, tmp_path):
  for one in arms:
    for other in arms:
      lines = explain([one.arm_id, other.arm_id], arms, tmp_path).split('\n')
      assert (len(lines) == 1) == (one == other)


def test_an_arm_of_an_earlier_launch_and_of_an_earlier_code(arms, tmp_path):
  old = arms[0]._replace(arm_id='0123456789ab', config=dataclasses.replace(arms[0].config, seed=4))
  config = to_dict(old.config)
  config['run']['log_every'] = 1
  del config['model']['n_heads']
  leave(tmp_path, old, config)
  assert explain(['0123', arms[0].arm_id], arms, tmp_path).split('\n')[1:] == [
    '  seed: 4 -> 0',
    f'  model.n_heads: not there -> {arms[0].config.model.n_heads}',
  ]


@pytest.mark.parametrize(
  'pair, message',
  [
    (['abc'], '--why=abc: expected two ids'),
    (['a', 'b', 'c'], '--why=a,b,c: expected two ids'),
    (['zzzz', 'zzzz'], '--why=zzzz: no such id in this sweep or in '),
    (['', ''], '--why=: no such id'),
  ],
)
def test_wrong_ids_are_one_line(arms, tmp_path, pair, message):
  with pytest.raises(ConfigError, match=message) as error:
    explain(pair, arms, tmp_path)
  assert '\n' not in str(error.value)


def test_a_beginning_of_several_ids_is_refused(arms, tmp_path):
  for digit in '0123':
    leave(tmp_path, arms[0]._replace(arm_id=f'zz{digit}'))
  with pytest.raises(ConfigError, match='--why=zz: could be any of zz0, zz1, zz2, zz3'):
    explain(['zz', arms[0].arm_id], arms, tmp_path)


# ------------------------------------------------------------------------------------------------------------ drift


def test_an_arm_made_by_this_code_or_by_an_unknown_one_is_no_drift(arms, tmp_path):
  assert drift(arms, tmp_path) == ''
  leave(tmp_path, arms[0], run={'source': source()})
  leave(tmp_path, arms[1])
  assert drift(arms, tmp_path) == ''


def test_arms_made_by_other_code_are_told_in_one_line(arms, tmp_path):
  leave(tmp_path, arms[0], run={'source': source()})
  leave(tmp_path, arms[1], run={'source': {**source(), 'step': '0' * 8}})
  old = {name: digits for name, digits in source().items() if name != 'optim'}
  leave(tmp_path, arms[2], run={'source': {**old, 'gone': '0' * 8}})
  found = drift(arms, tmp_path)
  assert found.startswith('2 of 3 finished arms were made by other code (since then gone, optim, step changed)')
  assert '\n' not in found
  assert drift(arms[:1], tmp_path) == ''
