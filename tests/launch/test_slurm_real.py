"""The engine 'slurm' on a real Slurm: two nodes on this host, set up by tests/slurm/setup.sh.

An undisturbed sweep is the reference; whatever is done to a later one, its arms must end up with the same bits.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cheap
import pytest

from slm_jax import metrics

REPO = Path(__file__).parents[2]
SETUP = REPO / 'tests' / 'slurm' / 'setup.sh'
STEPS, KILLS, PATIENCE = 300, 20, 400.0
ARMS = ['teacher', 'scratch', 'long', 'short', 'distilled']

SWEEP = """
'''Does it survive?'''
import launch
from slm_jax.distill.logits import Distill
from tiny import config as tiny


def config():
  return tiny({steps})


def sweep():
  yield {{'name': 'teacher', 'model.n_layers': 3}}
  yield {{'name': 'scratch', 'optim.learning_rate': 3e-4}}  # rounding grows no further than 3e-6 on the way
  yield {{'name': 'distilled', 'transforms': (Distill('teacher'),)}}
  yield {{'name': 'long', 'optim.warmup': 20}}
  yield {{'name': 'short', 'optim.warmup': 2}}
  # It fails no sooner than its parent is done, so that a second launch right after the first does not try it again.
  yield {{'name': 'broken', 'init.arm': 'teacher', 'optim.learning_rate': 1e30}}
  yield {{'name': 'below', 'init.arm': 'broken'}}


if __name__ == '__main__':
  launch.main()
"""


class Cluster:
  """A Slurm cluster, and launches of the sweep to it from a folder of their own."""

  def __init__(self, state: Path, folder: Path):
    self.folder = folder
    (folder / 'survive.py').write_text(SWEEP.format(steps=STEPS))
    path = os.pathsep.join(map(str, (REPO, REPO / 'tests')))
    self.env = {**os.environ, 'SLURM_CONF': f'{state}/slurm.conf', 'PYTHONPATH': path, 'JAX_PLATFORMS': 'cpu'}
    self.env['XLA_FLAGS'] = cheap.flags(1)  # a worker has one device

  def launch(self, name: str, *argv: str) -> str:
    """Launches the sweep into the workdir of that name; what it says."""
    often = ['--config.run.checkpoint_every=20', '--config.eval.every=100']
    command = [sys.executable, '-m', 'survive', '--launch=slurm', f'--workdir={name}', *often, *argv]
    done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

  def call(self, *argv: str) -> str:
    return subprocess.run(argv, env=self.env, capture_output=True, text=True, check=True).stdout.strip()

  def queue(self) -> list[str]:
    return self.call('squeue', '--noheader', '--array', '--format=%i %T').splitlines()

  def task_of(self, name: str, arm: str) -> str:
    """'123_4', the task that has the arm."""
    wanted = self.arms(name)[arm].name
    records = [json.loads(path.read_text()) for path in (self.folder / name / 'slurm').glob('*.json')]
    ((job, i),) = [(r['job'], i) for r in records for i, ids in enumerate(r['arms']) if wanted in ids]
    return f'{job}_{i}'

  def arms(self, name: str) -> dict[str, Path]:
    """The folders of the arms, by their names."""
    workdir = self.folder / name
    entries = json.loads((workdir / 'experiment.json').read_text())['arms']
    return {entry['name']: workdir / 'arms' / entry['arm_id'] for entry in entries}

  def log(self, name: str, arm: str = '') -> str:
    """Of all tasks of a launch, or of the one that has the arm."""
    paths = sorted((self.folder / name / 'logs').glob('*_[0-9]*.log'))
    wanted = self.arms(name)[arm].name if arm else ''
    return '\n'.join(text for text in map(Path.read_text, paths) if wanted in text)

  def wait(self, name: str) -> None:
    """Until the queue is empty."""
    until(lambda: not self.queue(), lambda: f'{self.queue()}\n{self.log(name)[-5000:]}')

  def train_until(self, name: str, arm: str, step: int) -> None:
    """Until the arm has come to that step, and is still on its way."""
    path = self.arms(name)[arm]
    until(lambda: step_of(path) >= step, lambda: self.log(name)[-5000:])
    assert not (path / 'DONE').exists(), 'too late: it is done already'


def until(condition, explain) -> None:
  end = time.monotonic() + PATIENCE
  while not condition():
    assert time.monotonic() < end, explain()
    time.sleep(0.1)


def lines(path: Path) -> list[dict]:
  """Of metrics.jsonl; one that is being written is left out."""
  return list(metrics.read(path / 'metrics.jsonl'))


def step_of(path: Path) -> int:
  return max((line['step'] for line in lines(path)), default=0)


def result(path: Path) -> tuple[int, list]:
  """All bits of the trained model, as a checksum, and everything that was measured on the way but the time it took."""
  assert (path / 'DONE').exists()
  times = ('seconds', 'tokens_per_second', 'mfu')
  measured = [{key: value for key, value in line.items() if key not in times} for line in lines(path)]
  return json.loads((path / 'model' / 'model.json').read_text())['checksum'], measured


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
  installed = all(map(shutil.which, ('sbatch', 'slurmctld', 'slurmd', 'munged')))
  if not installed and (os.geteuid() != 0 or not shutil.which('apt-get')):
    pytest.skip('Slurm is not installed, and cannot be: that needs root and apt-get')
  if os.geteuid() != 0:
    pytest.skip('slurmd needs root')
  done = subprocess.run([SETUP, 'install'], capture_output=True, text=True, check=False)
  if done.returncode:
    pytest.skip(f'Slurm cannot be installed: {done.stderr.strip().splitlines()[-1:]}')
  state = tempfile.mkdtemp(prefix='slurm-', dir='/tmp')  # short: the path of a socket
  try:
    subprocess.run([SETUP, 'start', state, str(os.getpid())], check=True, timeout=60)
    yield Cluster(Path(state), tmp_path_factory.mktemp('launches'))
  finally:
    subprocess.run([SETUP, 'stop', state], check=False, timeout=60)
    shutil.rmtree(state, ignore_errors=True)


@pytest.fixture(scope='module')
def reference(cluster):
  """The undisturbed sweep: `(what the launch said, what a launch right after it said, {name: folder})`."""
  first, second = cluster.launch('reference'), cluster.launch('reference')
  cluster.wait('reference')
  return first, second, cluster.arms('reference')


def test_a_sweep_is_done_and_reported(cluster, reference):
  first, second, arms = reference
  assert 'queued; to see how it goes: python -m launch.status reference' in first
  assert 'job ' in first
  assert 'job ' not in second  # nothing twice
  for name in ARMS:
    assert [line['step'] for line in result(arms[name])[1] if line['kind'] == 'train'] == list(range(1, STEPS + 1))
  assert json.loads((arms['broken'] / 'run.json').read_text())['status'] == 'diverged'
  assert not (arms['below'] / 'run.json').exists()  # never started: what it builds on has failed
  log = cluster.log('reference')
  assert log.count('restart 0: ') == len(ARMS) + 1
  assert log.count('the worker ended with 0') == len(ARMS)
  assert log.count('the worker ended with 1\n') == 1
  assert 'survive' in (cluster.folder / 'reference' / 'report.html').read_text()
  rows = (cluster.folder / 'reference' / 'results.csv').read_text()
  assert rows.count(',done,') == len(ARMS)  # made after the last arm was done


def test_preempted_and_requeued_arms_end_with_the_same_bits(cluster, reference):
  """One hears SIGTERM, as before a time limit; the other is put back into the queue by Slurm itself."""
  cluster.launch('preempted', '--only=scratch,distilled')
  cluster.train_until('preempted', 'teacher', STEPS // 4)
  cluster.call('scontrol', 'requeue', cluster.task_of('preempted', 'teacher'))
  cluster.train_until('preempted', 'scratch', STEPS // 4)
  cluster.call('scancel', '--signal=TERM', cluster.task_of('preempted', 'scratch'))
  cluster.wait('preempted')
  arms = cluster.arms('preempted')
  for name in ('teacher', 'scratch', 'distilled'):
    assert result(arms[name]) == result(reference[2][name])
  log = cluster.log('preempted')
  # Slurm does not wait for what it requeues, so how its worker ended may be missing from the log.
  assert cluster.log('preempted', 'scratch').count('the worker ended with 42') == 1
  assert log.count('restart 1: ') == 2
  assert log.count('restart 2: ') == 0


def test_what_is_cancelled_stays_so_until_it_is_launched_again(cluster, reference):
  cluster.launch('cancelled', '--only=scratch')
  cluster.train_until('cancelled', 'scratch', STEPS // 4)
  cluster.call('scancel', cluster.task_of('cancelled', 'scratch'))
  cluster.wait('cancelled')
  path = cluster.arms('cancelled')['scratch']
  assert json.loads((path / 'run.json').read_text())['status'] == 'preempted'  # and saved
  assert 'restart 1: ' not in cluster.log('cancelled')
  cluster.launch('cancelled', '--only=scratch')
  cluster.wait('cancelled')
  assert result(path) == result(reference[2]['scratch'])


def test_two_nodes_train_one_arm(cluster, reference):
  """Data-parallel, a process a node; stopped and queued again on the way. Workdir and name are hard to quote."""
  workdir = "two of 100% 'nodes' $x"
  cluster.launch(workdir, '--only=scratch', '--slurm_nodes=2', "--slurm_extra=--comment=it's a test")
  cluster.train_until(workdir, 'scratch', STEPS // 4)
  cluster.call('scancel', '--signal=TERM', cluster.task_of(workdir, 'scratch'))
  cluster.wait(workdir)
  ours, its = result(cluster.arms(workdir)['scratch'])[1], result(reference[2]['scratch'])[1]
  assert [(line['step'], line['kind']) for line in ours] == [(line['step'], line['kind']) for line in its]
  assert [line['loss'] for line in ours] == pytest.approx([line['loss'] for line in its], abs=1e-5)
  log = cluster.log(workdir)
  assert log.count('the worker ended with 42') == 1
  assert log.count('restart 1: ') == 1
  assert (cluster.folder / workdir / 'report.html').exists()


def test_killed_workers_lose_nothing_and_run_nothing_twice(cluster, reference):
  """kill -9, 20 times: of workers that start, and of workers that train."""
  cluster.launch('killed', f'--only={",".join(ARMS)}')
  dice, fates, killed = random.Random(0), {}, 0
  arms = cluster.arms('killed')
  steps = {path.name: path for path in arms.values()}

  def one_more() -> bool:
    nonlocal killed
    for pid, arm_id in workers('killed'):
      now, step = time.monotonic(), step_of(steps[arm_id])
      if (pid, arm_id) not in fates:
        fates[pid, arm_id] = (
          (now + dice.uniform(0, 3), STEPS) if dice.random() < 0.3 else (now + PATIENCE, step + dice.randint(1, 100))
        )
      at_time, at_step = fates[pid, arm_id]
      if (now > at_time or step >= at_step) and killed < KILLS:
        os.kill(pid, signal.SIGKILL)
        killed += 1
    return killed == KILLS or not cluster.queue()

  until(one_more, lambda: f'{killed} kills\n{cluster.log("killed")[-5000:]}')
  cluster.wait('killed')
  for name in ARMS:
    assert result(arms[name]) == result(reference[2][name])
  log = cluster.log('killed')
  assert killed == KILLS
  assert log.count('the worker ended with 0') == len(ARMS)  # each was finished once
  assert log.count('the worker ended with 137') == KILLS
  assert log.count(', restart ') == len(ARMS) + KILLS


def workers(workdir: str) -> list[tuple[int, str]]:
  """`(process, arm id)` of the workers that are alive."""
  found = []
  for path in Path('/proc').glob('[0-9]*/cmdline'):
    try:
      words = path.read_bytes().decode(errors='replace').split('\0')
    except OSError:
      continue  # it has just ended
    arm = next((word.removeprefix('--arm=') for word in words if word.startswith('--arm=')), '')
    if Path(words[0]).name.startswith('python') and f'--workdir={workdir}' in words and arm:
      found.append((int(path.parent.name), arm))
  return found
