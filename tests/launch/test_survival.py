"""A real sweep on the local pool, its processes killed at random: nothing lost, nothing twice, the same numbers.

`python -m tests.survive` is the same with more signals, of more kinds.
"""

import itertools
import random
import signal
import statistics
import time
from datetime import datetime

import pytest
import survive
from survive import NAMES, alive, assert_nothing_lost_and_nothing_twice, fresh, kill_at_random, workers

from slm_jax.ablate import workdir as workdirs

KILLS = 20


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Where the experiment file is."""
  return tmp_path_factory.mktemp('survival')


@pytest.fixture
def launch(folder):
  """Starts a launch; all that are left at the end are killed."""
  started = []

  def run(*argv):
    started.append(survive.start(folder, *argv))
    return started[-1]

  yield run
  for process in started:
    process.kill()
    process.wait()


@pytest.fixture
def whole(folder):
  """The sweep undisturbed."""
  return folder / 'whole' if (folder / 'whole').exists() else survive.undisturbed(folder)


def ends(workdir):
  """`{name: [how each of its workers ended]}`, by the logs."""
  found = {}
  for arm_id, arm in workdirs.read_experiment(workdir).arms.items():
    (path,) = (workdir / 'logs').glob(f'*-{arm_id}.log')
    lines = path.read_text().splitlines()
    found[arm['name']] = [line.partition('] ended: ')[2] for line in lines if '] ended: ' in line]
    assert len(found[arm['name']]) == sum('] started on ' in line for line in lines)
  return found


def undisturbed(workdir):
  """Seconds that a worker lives if it need not compile: the median, by the logs."""
  lives = []
  for path in (workdir / 'logs').glob('*.log'):
    began, *_, ended = (line[1:26] for line in path.read_text().splitlines() if line.startswith('[20'))
    lives.append((datetime.fromisoformat(ended) - datetime.fromisoformat(began)).total_seconds())
  return statistics.median(lives)


def test_kill_9_of_twenty_workers_at_random_moments(whole, launch):
  """Over as many sweeps as it takes: how many die in one depends on how fast the machine is just then."""
  life, rng, deaths = undisturbed(whole), random.Random(0), 0
  for sweep in itertools.count():
    workdir = fresh(whole, f'killed{sweep}')
    launcher = launch(f'--workdir={workdir.name}', '--local_workers=2', '--local_restarts=20')
    killed = kill_at_random(launcher, KILLS - deaths, 0.7 * life, rng)
    out, _ = launcher.communicate(timeout=500)
    assert launcher.returncode == 0, out
    how = ends(workdir)
    assert sum(its.count('ended by SIGKILL') for its in how.values()) == killed > 0
    for its in how.values():  # each was started again until it was done, and then no more
      assert its[:-1] == ['ended by SIGKILL'] * (len(its) - 1)
    assert_nothing_lost_and_nothing_twice(workdir, whole, NAMES)
    deaths += killed
    if deaths == KILLS:
      break


def test_kill_9_of_the_launcher_and_another_launch(whole, launch):
  """Then one is stopped as by Ctrl-C, and the next ends the work; a launch beside another is refused."""
  workdir = fresh(whole, 'relaunched')
  few = ['parent', 'x1', 'x2', 'alone1']
  command = ['--workdir=relaunched', '--local_workers=2', f'--only={",".join(few)}']
  first = launch(*command)
  while first.poll() is None and not any(workdir.glob('arms/*/checkpoints/[0-9]*')):
    time.sleep(0.02)
  second = launch(*command)
  out, _ = second.communicate(timeout=200)
  assert second.returncode == 1, out
  assert f'another launch is at work here (process {first.pid} on ' in out
  theirs = workers(first)
  while first.poll() is None and not theirs:  # one may have ended just now, and the next not begun
    theirs = workers(first)
  assert theirs
  first.kill()
  first.wait()
  end = time.monotonic() + 10
  while any(map(alive, theirs)) and time.monotonic() < end:
    time.sleep(0.01)
  assert not any(map(alive, theirs))
  done = {path: path.stat().st_mtime_ns for path in workdir.glob('arms/*/DONE')}
  third = launch(*command)
  while third.poll() is None and len(workers(third)) < 2:
    time.sleep(0.02)
  third.send_signal(signal.SIGTERM)
  out, _ = third.communicate(timeout=200)
  assert third.returncode == 42, out
  assert out.endswith('stopped; launch again to go on from here\n')
  last = launch(*command)
  out, _ = last.communicate(timeout=500)
  assert last.returncode == 0, out
  assert {path: path.stat().st_mtime_ns for path in done} == done
  assert_nothing_lost_and_nothing_twice(workdir, whole, sorted(few, key=NAMES.index))
