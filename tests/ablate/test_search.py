"""Adaptive search: the same losses in the same order ask for the same trials."""

import json
import math
import statistics
import sys

import pytest
from fakes import experiment

from slm_jax.ablate.arms import base_config
from slm_jax.ablate.search import explore, outcome
from slm_jax.config import ConfigError

pytest.importorskip('optuna')


def search(trial):
  changes = {'optim.learning_rate': trial.suggest_float('lr', 1e-4, 1e-1, log=True)}
  if trial.suggest_categorical('clipped', [True, False]):
    changes['optim.clip'] = trial.suggest_float('clip', 0.1, 1.0)
  return changes


def bowl(changes):
  """Best at a learning rate of 3e-3 and without clipping; diverges above 3e-2."""
  rate = changes['optim.learning_rate']
  return math.inf if rate > 3e-2 else abs(math.log(rate / 3e-3)) + ('optim.clip' in changes)


def asked(n, together=1, losses=lambda changes: bowl(changes), function=search):
  module, rounds = experiment(search=function), []

  def told(trials):
    rounds.append(trials)
    return [losses(changes) for changes in trials]

  explore(module, base_config(module), n, together, told)
  return rounds


def flat(rounds):
  return [changes for trials in rounds for changes in trials]


@pytest.mark.parametrize('together', [1, 4])
def test_a_search_can_be_told_again_and_goes_on_where_it_was(together):
  short, long = flat(asked(22, together)), flat(asked(40, together))
  assert short == flat(asked(22, together)) == long[:22]
  assert [changes['name'] for changes in long] == [f'trial {i}' for i in range(40)]
  assert len({json.dumps(changes) for changes in long}) == 40
  assert [len(trials) for trials in asked(9, together)] == {1: [1] * 9, 4: [4, 4, 1]}[together]


def test_losses_matter():
  """The trials after the first ten depend on what was told, and come to lie where the losses are low."""
  found = flat(asked(60))
  other = flat(asked(60, losses=lambda changes: -bowl(changes) if bowl(changes) < math.inf else 0.0))
  assert found[:10] == other[:10]
  assert found != other
  first, last = (statistics.median(map(bowl, part)) for part in (found[:10], found[-20:]))
  assert last < first * 2 / 3
  assert math.inf in map(bowl, found[:10])
  assert math.inf not in map(bowl, found[-20:])


def test_it_ends_where_a_loss_is_not_known():
  rounds = asked(20, 4, losses=lambda changes: None if changes['name'] == 'trial 6' else bowl(changes))
  assert [len(trials) for trials in rounds] == [4, 4]
  assert rounds == asked(20, 4)[:2]


def test_it_may_ask_for_the_base():
  rounds = asked(1, losses=lambda changes: 1.0, function=lambda trial, base: {'train.steps': base.train.steps + 1})
  assert flat(rounds) == [{'name': 'trial 0', 'train.steps': 1001}]


@pytest.mark.parametrize(
  'function, message',
  [
    (None, '--search=3: tiny has no function search'),
    (lambda trial: None, r'search\(trial\) returned None, expected'),
    (lambda trial: {'name': 'x'}, "search\\(trial\\) sets 'name'"),
  ],
)
def test_a_wrong_search_is_one_line(function, message):
  with pytest.raises(ConfigError, match=message) as error:
    asked(3, function=function)
  assert '\n' not in str(error.value)


def test_without_optuna_one_line_says_how_to_get_it(monkeypatch):
  monkeypatch.setitem(sys.modules, 'optuna', None)
  with pytest.raises(ConfigError, match='--search: needs Optuna; pip install'):
    asked(3)


@pytest.mark.parametrize(
  'run, done, expected',
  [
    ({'status': 'done', 'summary': {'loss': 0.9, 'bits_per_byte': 1.25}}, True, 1.25),
    (
      {'status': 'done', 'summary': {'loss': 0.9, 'bits_per_byte': 1.25}},
      False,
      None,
    ),  # killed between the two writes: it runs again
    ({'status': 'diverged', 'error': 'not finite'}, False, math.inf),
    ({'status': 'failed'}, False, None),
    ({'status': 'preempted'}, False, None),
    ({'status': 'running'}, False, None),
    (None, False, None),
    (None, True, None),  # its record was lost
  ],
)
def test_what_the_store_says_of_an_arm(tmp_path, run, done, expected):
  folder = tmp_path / 'arms' / 'abc'
  folder.mkdir(parents=True)
  if run is not None:
    (folder / 'run.json').write_text(json.dumps(run))
  if done:
    (folder / 'DONE').touch()
  assert outcome(tmp_path, 'abc') == expected
