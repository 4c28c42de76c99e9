"""The local engine: order, failures, interruptions, locks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fakes import FakeTrain, arms_of, experiment

from launch import worker
from launch.worker import run_arms
from slm_jax.ablate import workdir
from slm_jax.config import ConfigError

REPO = Path(__file__).parents[2]
CHAIN = [
  {'name': 'a', 'train.steps': 5},
  {'name': 'b', 'init.arm': 'a'},
  {'name': 'c', 'init.arm': 'b'},
  {'name': 'd', 'train.steps': 7},
]


@pytest.fixture
def arms():
  return arms_of(experiment(sweep=CHAIN))


def run(arms, path, train, **options):
  """`(exit code, lines)`; folders are made as a launch makes them."""
  lines = []
  return run_arms(arms, path, train=train, say=lines.append, **options), lines


def names(train):
  return [name for name, _ in train.called]


def test_all_arms_run_once_in_order(arms, tmp_path):
  train = FakeTrain()
  code, lines = run(arms, tmp_path, train)
  assert (code, names(train)) == (0, ['a', 'b', 'c', 'd'])
  assert lines[1] == f'[1/4] a, seed 0 ({arms[0].arm_id}): done, loss 1.5, gap 0.4005, seconds 3'
  assert run(arms, tmp_path, train)[0] == 0
  assert len(train.called) == 4


def test_of_a_group_that_is_stopped_nobody_has_failed_who_never_ran(tmp_path, monkeypatch):
  arms = arms_of(experiment(sweep=[{'name': name, 'seed': i} for i, name in enumerate('abc')]))
  codes = {arms[0].arm_id: 0, arms[1].arm_id: 42}  # and nothing of the third
  monkeypatch.setattr(worker, '_population', lambda ready, workdir: arms)
  monkeypatch.setattr(worker, '_train_together', lambda: lambda members, workdir, code: codes)
  code, lines = run(arms, tmp_path, None)
  assert code == 42
  assert not any('failed' in line for line in lines)


@pytest.mark.parametrize('outcome', [1, RuntimeError('a bug'), ConfigError('no such file')])
def test_a_failed_arm_stops_its_children_only(arms, tmp_path, outcome, capsys):
  train = FakeTrain(b=outcome)
  code, lines = run(arms, tmp_path, train)
  assert (code, names(train)) == (1, ['a', 'b', 'd'])
  assert f'[3/4] c, seed 0 ({arms[2].arm_id}): blocked, {arms[1].arm_id} is not done' in lines
  error = capsys.readouterr().err
  assert ('Traceback' in error) == isinstance(outcome, RuntimeError)
  assert (error == 'error: no such file\n') == isinstance(outcome, ConfigError)


def test_launching_again_runs_just_what_is_missing(arms, tmp_path):
  run(arms, tmp_path, FakeTrain(b=1))
  train = FakeTrain()
  assert run(arms, tmp_path, train)[0] == 0
  assert names(train) == ['b', 'c']


def test_fail_fast_stops_at_the_first_failure(arms, tmp_path):
  train = FakeTrain(b=1)
  assert run(arms, tmp_path, train, fail_fast=True)[0] == 1
  assert names(train) == ['a', 'b']


def test_a_preempted_arm_ends_the_launch_with_42(arms, tmp_path):
  train = FakeTrain(b=42)
  code, lines = run(arms, tmp_path, train)
  assert (code, names(train)) == (42, ['a', 'b'])
  assert lines[-1] == 'stopped; launch again to go on from here'


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_outside_of_training_ends_the_launch_with_42(arms, tmp_path, number):
  before = signal.getsignal(signal.SIGTERM)

  def kill():
    os.kill(os.getpid(), number)
    time.sleep(5)

  train = FakeTrain(b=kill)
  assert run(arms, tmp_path, train)[0] == 42
  assert names(train) == ['a', 'b']
  assert signal.getsignal(signal.SIGTERM) is before


HOLD = """
import sys, time
from pathlib import Path
from slm_jax.ablate.workdir import lock
with lock(Path(sys.argv[1])):
  print('held', flush=True)
  time.sleep(60)
"""


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
  env = {**os.environ, 'PYTHONPATH': str(REPO)}
  other = subprocess.Popen([sys.executable, '-c', HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=env)
  try:
    assert other.stdout.readline() == 'held\n'
    refused = pytest.raises(ConfigError, match=f'another launch is at work here .process {other.pid} on ')
    with refused, workdir.lock(tmp_path):
      pass
  finally:
    other.kill()
    other.wait()
  with workdir.lock(tmp_path):
    assert f'process {os.getpid()} ' in (tmp_path / 'lock').read_text()


def test_an_arm_that_another_process_trains_is_not_trained_twice(arms, tmp_path, capsys):
  train = FakeTrain()
  with workdir.lock(workdir.folder(tmp_path, arms[3].arm_id)):
    assert run(arms, tmp_path, train)[0] == 1
  assert names(train) == ['a', 'b', 'c']
  assert 'another launch is at work here' in capsys.readouterr().err
