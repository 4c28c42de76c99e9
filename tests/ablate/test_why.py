"""Why ids differ, and whether the same id was made by the same code."""

import dataclasses
import json

import pytest
from fakes import arms_of, experiment

from slm_jax.ablate.why import drift, explain, made_by_other_code, made_with_other_settings
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


# ---------------------------------------------------------------------------------------- made by other code

CODE = {'experiments/mine.py': '11111111', 'experiments/parts.py': '22222222'}


def test_an_arm_made_by_this_code_or_by_an_unknown_one_is_up_to_date(arms, tmp_path):
  assert made_by_other_code(arms, tmp_path, CODE) == {}
  leave(tmp_path, arms[0], run={'source': source(), 'experiment': CODE})
  leave(tmp_path, arms[1])
  leave(tmp_path, arms[2], run={'source': source()})  # made before experiment files were recorded
  assert made_by_other_code(arms, tmp_path, CODE) == {}
  assert drift(arms, {}) == ''


def test_every_changed_part_is_found_in_slm_jax_and_in_the_experiment(arms, tmp_path):
  leave(tmp_path, arms[0], run={'source': source(), 'experiment': CODE})
  leave(tmp_path, arms[1], run={'source': {**source(), 'step': '0' * 8}, 'experiment': CODE})
  old = {name: digits for name, digits in source().items() if name != 'optim'}
  leave(tmp_path, arms[2], run={'source': {**old, 'gone': '0' * 8}})
  leave(tmp_path, arms[3], run={'source': source(), 'experiment': {**CODE, 'experiments/mine.py': '0' * 8}})
  found = made_by_other_code(arms, tmp_path, CODE)
  assert found == {
    arms[1].arm_id: {'step'},
    arms[2].arm_id: {'gone', 'optim'},
    arms[3].arm_id: {'experiments/mine.py'},
  }
  line = drift(arms, found)
  assert line.startswith(
    'warning: 3 of 4 arms were made by other code (changed since then: experiments/mine.py, gone, optim, step): '
  )
  assert all(arm.title in line for arm in arms[1:])
  assert arms[0].title not in line
  assert '\n' not in line


def test_a_default_that_was_edited_is_found_in_the_record(arms, tmp_path):
  leave(tmp_path, arms[0])
  changed = to_dict(arms[1].config)
  changed['optim']['warmup'] = 7
  changed['run']['log_every'] = 99  # cannot change a result
  leave(tmp_path, arms[1], changed)
  assert made_with_other_settings(arms, tmp_path) == {arms[1].arm_id: ['optim.warmup=7, now 100']}
