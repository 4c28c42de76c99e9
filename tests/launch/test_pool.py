"""The local pool: order, places, restarts, failures, stopping. Real processes, which do as they are told (acted.py).

That real workers keep to the same protocol is test_survival.py's matter.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import acted
import pytest
from fakes import arms_of, experiment

from launch import places, pool
from launch.plan import Plan, Unit, units
from slm_jax.ablate import workdir
from slm_jax.config import ConfigError

REPO = Path(__file__).parents[2]
SWEEP = [  # a <- b <- c, and d and e alone
  {'name': 'a'},
  {'name': 'b', 'init.arm': 'a'},
  {'name': 'c', 'init.arm': 'b'},
  {'name': 'd', 'train.steps': 7},
  {'name': 'e', 'train.steps': 8},
]


def plan_of(path):
  module = experiment(sweep=SWEEP)
  module.__file__ = acted.__file__  # what a worker is started as
  return Plan(module, path, arms_of(module), [], 'a')


@pytest.fixture
def start(tmp_path, monkeypatch):
  """Runs the pool on what the arms are told: `(exit code, lines)`."""
  plan = plan_of(tmp_path)

  def run(workers=2, arms_per_job=1, restarts=3, **options):
    monkeypatch.setenv('ACTS', json.dumps(options.pop('acts', {})))
    plan.record()
    lines = []
    work = units(plan, arms_per_job)
    spots = options.pop('places', places.split(workers, '', []))
    return pool.run(plan, work, spots, restarts=restarts, say=lines.append, **options), lines

  run.plan = plan
  run.ids = {arm.name: arm.arm_id for arm in plan.arms}
  return run


def names(path):
  return [start['name'] for start in acted.starts(path)]


def said(lines, arm, words):
  return [line for line in lines if f' {arm}, seed 0 (' in line and words in line]


# ------------------------------------------------------------------------------------------------- order and places


def test_all_arms_run_once_and_parents_first(start, tmp_path):
  code, lines = start()
  assert code == 0
  assert sorted(names(tmp_path)) == ['a', 'b', 'c', 'd', 'e']
  done = {name: (workdir.folder(tmp_path, start.ids[name]) / 'DONE').stat().st_mtime for name in 'ab'}
  began = {each['name']: each['time'] for each in acted.starts(tmp_path)}
  assert done['a'] < began['b']
  assert done['b'] < began['c']
  for name in 'abcde':
    assert len(said(lines, name, ': starts on ')) == 1
    assert len(said(lines, name, ': done, loss 1.5')) == 1
  again, lines = start()
  assert (again, lines, len(names(tmp_path))) == (0, [], 5)


def test_each_worker_sees_its_place_only_and_no_two_share_one(start, tmp_path):
  cores = sorted(os.sched_getaffinity(0))
  two = [places.Place((cores[i % len(cores)],), {'CUDA_VISIBLE_DEVICES': f'gpu{i}'}) for i in range(2)]
  assert start(places=two)[0] == 0
  seen = [(each['gpu'], each['cores']) for each in acted.starts(tmp_path)]
  known = {place.env['CUDA_VISIBLE_DEVICES']: list(place.cores) for place in two}
  assert all(known[gpu] == its for gpu, its in seen)
  assert {gpu for gpu, _ in seen} == known.keys()


def test_logs_say_what_was_started_and_how_it_ended(start, tmp_path):
  assert start(acts={'d': ['kill', 0], 'e': [1]})[0] == 1
  text = {name: next((tmp_path / 'logs').glob(f'*{start.ids[name]}.log')).read_text() for name in 'de'}
  assert text['d'].count('] started on core') == 2
  assert text['d'].index('] ended: ended by SIGKILL') < text['d'].index('] ended: exit code 0')
  assert f'--arm={start.ids["d"]}' in text['d']
  assert text['e'].endswith('] ended: exit code 1\n')


# ----------------------------------------------------------------------------------------------- failures, restarts


def test_a_worker_that_was_called_wrongly_is_not_called_so_again(start, tmp_path):
  assert start(acts={'e': [2, 0]})[0] == 1
  assert names(tmp_path).count('e') == 1


def test_a_failed_arm_blocks_what_builds_on_it_and_nothing_else(start, tmp_path):
  code, lines = start(acts={'a': ['bug']})
  assert code == 1
  assert sorted(names(tmp_path)) == ['a', 'd', 'e']
  (line,) = said(lines, 'a', ': failed (')
  assert 'failed (RuntimeError: a bug); see ' in line
  assert Path(line.split('; see ')[1]).exists()
  assert said(lines, 'b', f': blocked, {start.ids["a"]} is not done')
  assert said(lines, 'c', f': blocked, {start.ids["b"]} is not done')


def test_the_reason_is_the_one_of_this_life(start, tmp_path):
  """What run.json said of an earlier launch is no reason now."""
  assert start(acts={'d': [1]})[0] == 1
  _, lines = start(acts={'d': [0, 'bug']})
  assert said(lines, 'd', 'failed (RuntimeError: a bug)')
  _, lines = start(acts={'d': [0, 0, 1]})
  assert said(lines, 'd', 'failed (not finite)')


def test_killed_and_preempted_workers_are_started_again(start, tmp_path):
  code, lines = start(acts={'a': [42, 'kill', 0], 'e': ['kill', 'kill', 'kill', 0]})
  assert code == 0
  assert [names(tmp_path).count(name) for name in 'abcde'] == [3, 1, 1, 1, 4]
  assert said(lines, 'a', ': preempted, with everything saved; starts again (1 of 3)')
  assert said(lines, 'a', ': ended by SIGKILL; starts again (2 of 3)')


def test_but_not_for_ever(start, tmp_path):
  code, lines = start(acts={'a': ['kill']}, restarts=2)
  assert code == 1
  assert names(tmp_path).count('a') == 3
  assert said(lines, 'a', ': failed (ended by SIGKILL, 3 times)')
  assert said(lines, 'b', ': blocked')
  assert sorted(set(names(tmp_path))) == ['a', 'd', 'e']


def test_a_worker_that_is_killed_after_its_last_write_is_not_started_again(start, tmp_path):
  code, lines = start(acts={'d': ['late']})
  assert code == 0
  assert names(tmp_path).count('d') == 1
  assert said(lines, 'd', ': done')
  assert not any('starts again' in line for line in lines)


def test_of_a_bundle_what_is_not_blocked_runs(start, tmp_path):
  """d fails; a unit of a child of d and of an arm of its own runs the latter."""
  code, _ = start(acts={'a': [1]}, workers=1)
  assert code == 1
  plan, ids = start.plan, start.ids
  (tmp_path / 'starts.jsonl').unlink()
  work = [Unit('first', (ids['a'],)), Unit('second', (ids['b'], ids['d'], ids['e']), ('first',))]
  for name in 'de':
    (workdir.folder(tmp_path, ids[name]) / 'DONE').unlink()
  lines = []
  assert pool.run(plan, work, places.split(2, '', []), restarts=0, say=lines.append) == 1
  assert names(tmp_path) == ['a', 'd', 'e']
  assert said(lines, 'b', f': blocked, {ids["a"]} is not done')
  assert said(lines, 'd', ': done')


def test_fail_fast_lets_the_others_save_and_starts_no_more(start, tmp_path):
  began = time.monotonic()
  code, lines = start(acts={'d': ['second'], 'a': ['wait']}, fail_fast=True)
  assert code == 1
  assert time.monotonic() - began < 50
  assert sorted(names(tmp_path)) == ['a', 'd']
  assert said(lines, 'a', ': preempted, with everything saved')


def test_what_may_not_be_started_is_not_and_what_runs_goes_on(start, tmp_path):
  code, lines = start(acts={}, admit=lambda arm: 'the money is spent' if arm.name == 'e' else '')
  assert code == 1
  assert 'no more arms are started: the money is spent' in lines
  assert set(names(tmp_path)) == {'a', 'd'}
  assert said(lines, 'a', ': done')


# ---------------------------------------------------------------------------------------------------------- stopping


def when(true, then):
  """Calls `then` from another thread as soon as `true()`."""

  def wait():
    end = time.monotonic() + 50
    while not true() and time.monotonic() < end:
      time.sleep(0.05)
    then()

  threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_all_workers_save_and_the_next_launch_goes_on(start, tmp_path, number):
  when(lambda: len(names(tmp_path)) == 2, lambda: os.kill(os.getpid(), number))
  before = signal.getsignal(number)
  code, lines = start(acts={'a': ['wait', 0], 'd': ['wait', 0]})
  assert code == 42
  assert signal.getsignal(number) is before
  assert lines[-1] == 'stopped; launch again to go on from here'
  assert len(said(lines, 'a', ': preempted, with everything saved')) == 1
  assert not any('starts again' in line for line in lines)
  assert all(not alive(each['process']) for each in acted.starts(tmp_path))
  assert start(acts={})[0] == 0
  assert [names(tmp_path).count(name) for name in 'abcde'] == [2, 1, 1, 2, 1]


def test_asked_twice_it_kills(start, tmp_path):
  def twice():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGINT)

  when(lambda: len(names(tmp_path)) == 2, twice)
  began = time.monotonic()
  code, lines = start(acts={'a': ['deaf'], 'd': ['deaf']})
  assert code == 42
  assert time.monotonic() - began < 50
  assert said(lines, 'a', ': ended by SIGKILL')
  assert all(not alive(each['process']) for each in acted.starts(tmp_path))


def test_an_error_of_the_pool_itself_leaves_no_worker(start, tmp_path):
  def look():
    if len(names(tmp_path)) == 2:
      raise ConfigError('the screen broke')

  with pytest.raises(ConfigError, match='the screen broke'):
    start(acts={'a': ['deaf'], 'd': ['deaf']}, look=look)
  assert all(not alive(each['process']) for each in acted.starts(tmp_path))


LAUNCHER = """
import sys
from pathlib import Path
from launch import places, pool
from launch.plan import units
from slm_jax.ablate import workdir
from test_pool import plan_of
plan = plan_of(Path(sys.argv[1]))
with workdir.lock(plan.workdir):
  plan.record()
  sys.exit(pool.run(plan, units(plan, 1), places.split(2, '', []), restarts=3))
"""


def launcher(path, acts):
  where = [str(REPO), str(REPO / 'tests'), str(REPO / 'tests/launch')]
  env = {**os.environ, 'ACTS': json.dumps(acts), 'PYTHONPATH': os.pathsep.join(where)}
  return subprocess.Popen([sys.executable, '-c', LAUNCHER, str(path)], env=env, stdout=subprocess.PIPE, text=True)


def alive(process: int) -> bool:
  try:
    return Path(f'/proc/{process}/stat').read_text().split(')')[1].split()[0] not in 'ZX'
  except OSError:
    return False


def test_kill_9_of_the_launcher_takes_its_workers_with_it_and_another_goes_on(tmp_path):
  first = launcher(tmp_path, {'a': ['deaf'], 'd': ['deaf']})
  end = time.monotonic() + 60
  while len(names(tmp_path)) < 2 and time.monotonic() < end:
    time.sleep(0.05)
  workers = [each['process'] for each in acted.starts(tmp_path)]
  assert len(workers) == 2
  assert all(map(alive, workers))
  first.kill()
  first.wait()
  end = time.monotonic() + 5
  while any(map(alive, workers)) and time.monotonic() < end:
    time.sleep(0.01)
  assert not any(map(alive, workers))
  second = launcher(tmp_path, {})
  assert second.wait(timeout=60) == 0
  assert [names(tmp_path).count(name) for name in 'abcde'] == [2, 1, 1, 2, 1]
