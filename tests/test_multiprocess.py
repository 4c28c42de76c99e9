"""One arm on several processes: the same result as on one, whatever happens to which of them."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cheap
import many
import numpy as np
import pytest
from many import STEPS

from slm_jax import metrics, train
from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.arms import expand

TIMES = ('seconds', 'tokens_per_second', 'mfu')
ARMS = {arm.name: arm for arm in expand(many, 'pair', {})}
TEACHER, STUDENT, CACHED = (ARMS[name].arm_id for name in ('teacher', 'student', 'cached'))


# ------------------------------------------------------------------------------------------------- real processes


class Processes:
  """Workers that train together; their output is in WORKDIR/log.INDEX."""

  def __init__(self, workdir: Path, *options: str, arms=TEACHER, count=2, devices=1, folders=(), **environment: str):
    with socket.socket() as probe:
      probe.bind(('', 0))
      port = probe.getsockname()[1]
    workdir.mkdir(exist_ok=True)
    self.logs = [workdir / f'log.{i}' for i in range(count)]
    self.all = []
    for i, log in enumerate(self.logs):
      its = folders[i] if folders else workdir
      command = [sys.executable, many.__file__, '--sweep=pair', f'--workdir={its}', f'--arm={arms}', *options]
      with open(log, 'w') as file:
        process = subprocess.Popen(
          [*command, f'--distributed=127.0.0.1:{port},{count},{i}'],
          env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': cheap.flags(devices), **environment},
          stdout=file,
          stderr=file,
        )
      self.all.append(process)

  def wait(self, timeout: float = 600) -> list[int]:
    """The exit codes."""
    end = time.monotonic() + timeout
    try:
      return [process.wait(max(0, end - time.monotonic())) for process in self.all]
    finally:
      for process in self.all:
        process.kill()

  def done(self) -> None:
    assert self.wait() == [0] * len(self.all), self.output()

  def when_at(self, step: int, workdir: Path) -> None:
    """Returns once that step is in the log of the teacher."""
    end = time.monotonic() + 600
    while time.monotonic() < end and all(process.poll() is None for process in self.all):
      if any(line['step'] >= step for line in lines(workdir)):
        return
      time.sleep(0.01)
    raise AssertionError(self.output())

  def output(self) -> str:
    return '\n'.join(log.read_text()[-3000:] for log in self.logs)


def arm(workdir: Path, arm_id: str = TEACHER) -> Path:
  return workdirs.folder(workdir, arm_id)


def lines(workdir: Path, arm_id: str = TEACHER) -> list[dict]:
  return list(metrics.read(arm(workdir, arm_id) / 'metrics.jsonl'))


def results(workdir: Path, arm_id: str = TEACHER):
  """What must be equal bit for bit."""
  kept = [{k: v for k, v in line.items() if k not in TIMES} for line in lines(workdir, arm_id)]
  return kept, json.loads((arm(workdir, arm_id) / 'model' / 'model.json').read_text())['checksum']


def losses(workdir: Path, arm_id: str = TEACHER) -> np.ndarray:
  return np.array([line['loss'] for line in lines(workdir, arm_id)])


def status(workdir: Path) -> str:
  return json.loads((arm(workdir) / 'run.json').read_text())['status']


def seeded(source: Path, target: Path, *more: str) -> Path:
  """A new workdir with the data and the compiled programs of another one."""
  for name in ('data', 'cache', *more):
    shutil.copytree(source / name, target / name)
  return target


def with_teacher(source: Path, target: Path) -> Path:
  """The finished teacher of another workdir, in this one."""
  arm(target).mkdir(parents=True)
  shutil.copytree(arm(source) / 'model', arm(target) / 'model')
  for name in ('run.json', 'DONE'):
    shutil.copy(arm(source) / name, arm(target) / name)
  return target


def forget(workdir: Path, step: int) -> Path:
  """Makes an arm that is done one that was killed some time after its checkpoint of `step`."""
  (arm(workdir) / 'DONE').unlink()
  shutil.rmtree(arm(workdir) / 'model')
  for path in (arm(workdir) / 'checkpoints').glob('[0-9]*'):
    if int(path.name) != step:
      shutil.rmtree(path)
  kept = [
    line for line in (arm(workdir) / 'metrics.jsonl').read_text().splitlines() if json.loads(line)['step'] <= step
  ]
  (arm(workdir) / 'metrics.jsonl').write_text('\n'.join([*kept, '']))
  return workdir


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """All arms, on the eight devices of one process."""
  workdir = tmp_path_factory.mktemp('alone')
  for each in ARMS.values():
    config = dataclasses.replace(each.config, run=dataclasses.replace(each.config.run, keep=STEPS))
    assert train.run(config, workdir, each.arm_id) == 0
  return workdir


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """Both arms, on two processes with a device each."""
  workdir = tmp_path_factory.mktemp('two')
  Processes(workdir, arms=f'{TEACHER},{STUDENT}').done()
  return workdir


def test_two_processes_train_as_one_does(alone, two):
  """Data-parallel: the same tokens in the same order, evaluated on the same, and one set of files."""
  assert [line['step'] for line in lines(two)] == [line['step'] for line in lines(alone)]
  assert [line['tokens'] for line in lines(two)] == [line['tokens'] for line in lines(alone)]
  np.testing.assert_allclose(losses(two), losses(alone), atol=1e-5)
  run = json.loads((arm(two) / 'run.json').read_text())
  assert (run['status'], run['processes'], run['devices']) == ('done', 2, 2)
  assert not (two / 'log.1').read_text().count('starts')  # one of them speaks


def test_a_teacher_and_a_parent_of_another_arm(alone, two, tmp_path):
  """Distilling from, and starting from, the very model that one process trained."""
  workdir = with_teacher(alone, seeded(two, tmp_path / 'w'))
  Processes(workdir, arms=STUDENT).done()
  np.testing.assert_allclose(losses(workdir, STUDENT), losses(alone, STUDENT), atol=1e-5)
  kl = [[line.get('distill_kl', 0.0) for line in lines(where, STUDENT)] for where in (workdir, alone)]
  np.testing.assert_allclose(*kl, atol=1e-5)
  ends = [json.loads((arm(where, STUDENT) / 'run.json').read_text())['summary'] for where in (workdir, alone)]
  assert ends[0]['parent_flops'] > 0
  for name in ('teacher_loss', 'kl', 'reverse_kl', 'rollout_kl', 'teacher_ece'):  # of the finished student
    assert ends[0][name] == pytest.approx(ends[1][name], abs=1e-4), name


def test_four_processes_train_as_one_does(alone, two, tmp_path):
  """Distilling and pruning; eight sequences of a batch are two for each."""
  workdir = with_teacher(alone, seeded(two, tmp_path / 'w'))
  Processes(workdir, arms=STUDENT, count=4).done()
  assert [line['tokens'] for line in lines(workdir, STUDENT)] == [line['tokens'] for line in lines(alone, STUDENT)]
  np.testing.assert_allclose(losses(workdir, STUDENT), losses(alone, STUDENT), atol=1e-5)
  density = [[line['density'] for line in lines(where, STUDENT) if 'density' in line] for where in (workdir, alone)]
  assert density[0] == density[1]
  assert density[0][-1] == pytest.approx(0.5, abs=0.01)


def test_two_processes_write_down_together_what_a_teacher_says(alone, two, tmp_path):
  """Each a part of the cache, which then is one, and holds what one process alone would have written."""
  workdir = with_teacher(alone, seeded(two, tmp_path / 'w'))
  Processes(workdir, arms=CACHED, SHARD='8192').done()
  np.testing.assert_allclose(losses(workdir, CACHED), losses(alone, CACHED), atol=1e-5)
  (cache,) = {path.parent for path in (workdir / 'data').glob('*/shard-*')}
  shards = json.loads((cache / 'manifest.json').read_text())['shards']
  assert len(shards) > 2
  assert all(shard['records'] > 0 for shard in shards)


@pytest.mark.parametrize('devices,options', [(2, ['--config.run.fsdp=2']), (1, ['--config.run.tensor=2'])])
def test_a_model_in_parts_on_several_processes(devices, options, alone, two, tmp_path):
  """fsdp=2 on two processes of two devices; tensor=2 over two processes, which then need the same rows."""
  shutil.copytree(two / 'data', tmp_path / 'data')
  Processes(tmp_path, *options, devices=devices).done()
  np.testing.assert_allclose(losses(tmp_path), losses(alone), atol=1e-5)


def test_sigterm_to_one_stops_both_at_the_same_step(alone, two, tmp_path):
  workdir = seeded(two, tmp_path / 'w')
  processes = Processes(workdir, SABOTAGE='slow 3')
  processes.when_at(3, workdir)
  processes.all[1].send_signal(signal.SIGTERM)  # not the one that writes
  assert processes.wait() == [42, 42], processes.output()
  assert status(workdir) == 'preempted'
  assert not (arm(workdir) / 'DONE').exists()
  shutil.copytree(workdir, tmp_path / 'one')
  Processes(workdir).done()
  assert results(workdir) == results(two)
  assert train.run(ARMS['teacher'].config, tmp_path / 'one', TEACHER) == 0  # the other way on, by one process
  np.testing.assert_allclose(losses(tmp_path / 'one'), losses(alone), atol=1e-5)


@pytest.mark.parametrize('victim', [1, 0])  # process 0 has the service by which the others would know
def test_when_one_is_killed_the_other_ends_to_be_started_again(victim, alone, two, tmp_path):
  """From a checkpoint that one process with eight devices wrote."""
  shutil.copytree(alone, tmp_path / 'w', ignore=shutil.ignore_patterns('cache', STUDENT))
  workdir = forget(tmp_path / 'w', 15)
  shutil.copytree(two / 'cache', workdir / 'cache')
  processes = Processes(workdir, SABOTAGE='slow 18')
  processes.when_at(18, workdir)
  processes.all[victim].kill()
  began = time.monotonic()
  codes = processes.wait()
  assert codes[1 - victim] == 42, processes.output()
  assert time.monotonic() - began < 60
  if victim == 0:
    return  # once is enough
  Processes(workdir).done()
  np.testing.assert_allclose(losses(workdir), losses(alone), atol=1e-5)


def test_a_bug_of_one_process_ends_both(two, tmp_path):
  processes = Processes(seeded(two, tmp_path / 'w'), SABOTAGE='bug 7')
  assert processes.wait() == [1, 1], processes.output()
  assert 'a bug of one process' in processes.logs[1].read_text()


def test_nan_ends_both_and_says_so_once(two, tmp_path):
  processes = Processes(workdir := seeded(two, tmp_path / 'w'), SABOTAGE='nan 12')
  assert processes.wait() == [1, 1], processes.output()
  record = json.loads((arm(workdir) / 'run.json').read_text())
  assert record['status'] == 'diverged'
  assert record['error'].startswith('step 12:')
  assert max(int(p.name) for p in (arm(workdir) / 'checkpoints').glob('[0-9]*')) == 10


def test_what_only_process_0_can_see_is_an_error_of_both(tmp_path):
  """A lock that someone holds; a folder that is not shared. One line each, and nobody waits."""
  with workdirs.lock(arm(tmp_path)):
    processes = Processes(tmp_path)
    assert processes.wait() == [1, 1], processes.output()
  for log in processes.logs:
    assert 'another launch is at work here' in log.read_text()
    assert 'Traceback' not in log.read_text()
  processes = Processes(tmp_path / 'logs', folders=[tmp_path / 'a', tmp_path / 'b'])
  assert processes.wait() == [1, 1], processes.output()
  for log in processes.logs:
    assert ': not shared; ' in log.read_text().splitlines()[-1]
