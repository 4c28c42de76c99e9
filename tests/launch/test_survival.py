"""A real sweep on the local pool, its processes killed at random: nothing lost, nothing twice, the same numbers."""

import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import cheap
import pytest

from slm_jax import metrics
from slm_jax.ablate import workdir as workdirs

REPO = Path(__file__).parents[2]
KILLS = 20
TIMES = ('seconds', 'tokens_per_second', 'mfu', 'joules')  # the only things that may differ
NAMES = ['parent', 'x0.5', 'x1', 'x2', 'x4', 'alone1', 'alone2', 'alone3']

EXPERIMENT = '''
"""Does a sweep survive?"""
import dataclasses

import launch
import tiny
from slm_jax.experiment import EvalConfig


def config():
  base = tiny.config(60)
  model, rarely = dataclasses.replace(base.model, n_layers=1), EvalConfig(every=20, bytes=500, samples=0)
  run = dataclasses.replace(base.run, checkpoint_every=10, population=False)  # populations: equal but for rounding
  return dataclasses.replace(base, name='', model=model, transforms=(), eval=rarely, run=run)


def sweep():
  yield {'name': 'parent'}
  for factor in (0.5, 1, 2, 4):
    yield {'name': f'x{factor}', 'init.arm': 'parent', 'optim.learning_rate': 1e-3 * factor}
  for seed in (1, 2, 3):
    yield {'name': f'alone{seed}', 'seed': seed}


if __name__ == '__main__':
  launch.main()
'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Where the experiment file is."""
  path = tmp_path_factory.mktemp('survival')
  (path / 'survive.py').write_text(EXPERIMENT)
  return path


@pytest.fixture
def launch(folder):
  """Starts a launch; all that are left at the end are killed."""
  started = []

  def run(*argv):
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, (REPO, REPO / 'tests'))), 'XLA_FLAGS': cheap.flags(1)}
    command = [sys.executable, 'survive.py', *argv]
    started.append(
      subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    )
    return started[-1]

  yield run
  for process in started:
    process.kill()
    process.wait()


@pytest.fixture
def whole(folder, launch):
  """The sweep undisturbed."""
  if not (folder / 'whole').exists():
    process = launch('--workdir=whole', '--local_workers=2')
    out, _ = process.communicate(timeout=500)
    assert process.returncode == 0, out
  return folder / 'whole'


def fresh(whole, name):
  """A workdir of that name with the data and the compiled programs already there."""
  workdir = whole.parent / name
  for part in ('data', 'cache'):
    shutil.copytree(whole / part, workdir / part)
  return workdir


def results(workdir):
  """`{name: (metrics without times, checksum of the parameters)}` of arms that are done."""
  found = {}
  for arm_id, arm in workdirs.read_experiment(workdir).arms.items():
    folder = workdirs.folder(workdir, arm_id)
    assert (folder / 'DONE').exists(), arm['name']
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in metrics.read(folder / 'metrics.jsonl')]
    found[arm['name']] = lines, json.loads((folder / 'model' / 'model.json').read_text())['checksum']
  return found


def assert_nothing_lost_and_nothing_twice(workdir, whole, names):
  found, undisturbed = results(workdir), results(whole)
  assert list(found) == names
  for name, (lines, _) in found.items():
    assert [line['step'] for line in lines if line['kind'] == 'train'] == list(range(1, 61)), name
    assert [line['step'] for line in lines if line['kind'] == 'eval'] == [0, 20, 40, 60], name
    assert found[name] == undisturbed[name], name


def workers(launcher):
  """The processes that a launcher has started and that still run."""
  try:
    children = Path(f'/proc/{launcher.pid}/task/{launcher.pid}/children').read_text().split()
  except OSError:
    return []
  return [int(child) for child in children if alive(int(child))]


def alive(process):
  try:
    return Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[0] not in 'ZX'
  except OSError:
    return False


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


def kill_at_random(launcher, at_most, longest, rng):
  """Kills workers of a launch until it ends, each after at most `longest` seconds of life; how many."""
  deaths, killed = {}, set()
  while launcher.poll() is None and len(killed) < at_most:
    for process in set(workers(launcher)) - killed:
      deaths.setdefault(process, time.monotonic() + rng.uniform(0.02, 1.0) * longest)
      if time.monotonic() > deaths[process] and len(killed) < at_most:
        os.kill(process, signal.SIGKILL)
        killed.add(process)
    time.sleep(0.02)
  return len(killed)


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
