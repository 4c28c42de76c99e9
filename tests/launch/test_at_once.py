"""Workers that start at the same moment in a new workdir, as a cluster starts them; and a report beside them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slm_jax.ablate import results
from slm_jax.ablate import workdir as workdirs

ROOT = Path(__file__).parents[2]
N = 8

WORKER = '''
"""Which?"""
import sys, time
from pathlib import Path
from fakes import FakeTrain
from launch import cli
from slm_jax.experiment import Config

def config():
  return Config()

def sweep():
  for seed in range(8):
    yield {'name': 'a', 'seed': seed, 'data.seed': seed}

if __name__ == '__main__':
  arms = cli.expand(sys.modules['__main__'], fingerprint=lambda data: 'x')
  import slm_jax.ablate.arms as module
  module._content_of = lambda fingerprint: lambda data: 'x'
  place, workdir = int(sys.argv[1]), sys.argv[2]
  Path(f'ready-{place}').touch()
  while not Path('go').exists():
    time.sleep(0.001)
  cli.main(argv=[f'--workdir={workdir}', f'--arm={arms[place].arm_id}', '--distributed=off'], train=FakeTrain())
'''


@pytest.mark.parametrize('turn', range(3))
def test_workers_that_start_together_in_a_new_workdir_all_run(tmp_path, turn):
  """Each wants experiment.json to hold its arms: the second and the third were refused."""
  (tmp_path / 'worker.py').write_text(WORKER)
  env = {**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, (ROOT, ROOT / 'tests')))}
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  command = [sys.executable, 'worker.py']
  processes = [subprocess.Popen([*command, str(i), 'runs'], cwd=tmp_path, env=env, **pipes) for i in range(N)]
  while len(list(tmp_path.glob('ready-*'))) < N:
    assert all(process.poll() is None for process in processes)
    time.sleep(0.05)
  (tmp_path / 'go').touch()
  shown = 0
  while any(process.poll() is None for process in processes):
    if (tmp_path / 'runs').exists():
      shown = len(results.read(tmp_path / 'runs'))  # somebody looks meanwhile
  ended = [(process.returncode, process.communicate()[1]) for process in processes]
  assert ended == [(0, '')] * N
  assert shown <= N
  rows = results.read(tmp_path / 'runs')
  assert [row.status for row in rows] == ['done'] * N
  assert len(workdirs.read_experiment(tmp_path / 'runs').arms) == N
  assert {row.name for row in rows} == {'a'}
