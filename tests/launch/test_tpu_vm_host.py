"""What a host of a TPU slice runs, run here: the line that ssh brings, the code, `tpu_vm.sh`, the worker."""

import io
import os
import platform
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import clouds
import pytest
from clouds import ONE, PARENT, options_of, plan_on
from clouds import TPU_VM as HERE
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launch import cloud, tpu_vm

REPO = Path(__file__).parents[2]
HOSTILE = st.text(st.characters(exclude_characters='\x00', exclude_categories=['Cs']), max_size=30)
STUBS = 'mountpoint() { :; }; mkdir() { :; }; tar() { :; }; cd() { :; }; hostname() { echo h; };'
STUBS += ' bash() { printf "%s\\0" "$@"; };'


@settings(max_examples=40, deadline=None)
@given(HOSTILE, HOSTILE)
@example("a b; rm -rf $HOME 'x'", '$(touch x) "`')
def test_no_value_of_a_config_is_read_by_a_shell(value, folder):
  plan = plan_on('/mnt/slm', [f'--config.name={value}'])._replace(workdir=Path('/mnt/slm') / f'x{folder}')
  line = tpu_vm.remote(plan, PARENT, cloud.code_path(plan, 'c0ffee000000'), options_of(*HERE))
  # gcloud splits the line at spaces, ssh joins it again, and the login shell reads it
  line = STUBS + ' '.join(line.split(' '))
  done = subprocess.run(['/bin/bash', '-c', line], capture_output=True, check=True, env={'HOME': '/nowhere'})
  words = done.stdout.decode().split('\0')[:-1]
  assert words[3:] == plan.argv(ONE)
  assert words[2] == f'{plan.workdir}/logs/{PARENT.name}.h.log'


@pytest.fixture
def host(tmp_path, monkeypatch):
  """A fake VM: its home, with this interpreter in place of a fresh environment, and no mounts to make."""
  home = tmp_path / 'vm'
  tools = home / 'bin'
  tools.mkdir(parents=True)
  version = '.'.join(platform.python_version_tuple()[:2])
  scripts = {
    'mountpoint': 'exit 0',
    'sudo': 'echo "sudo was called" >&2; exit 1',
    'python3': f"""case "$3 $4" in
'pip install'*|'--quiet --user'*) exit 0;; esac
case "$*" in
*' uv venv '*) mkdir -p "$HOME/.slm_jax/venv-{version}/bin"
  printf '#!/bin/bash\nexec {sys.executable} "$@"' > "$HOME/.slm_jax/venv-{version}/bin/python"
  chmod +x "$HOME/.slm_jax/venv-{version}/bin/python"; echo made >> "$HOME/made";;
esac""",
  }
  for name, text in scripts.items():
    (tools / name).write_text(f'#!/bin/bash\n{text}\n')
    (tools / name).chmod(0o755)
  monkeypatch.setenv('PATH', f'{tools}{os.pathsep}{os.environ["PATH"]}')
  monkeypatch.setenv('VM', str(home))
  return home


TINY = """
'''Does a launch to a slice end where a launch here ends?'''
import sys

import launch
from fakes import FakeTrain
from slm_jax.data.config import DataConfig
from slm_jax.experiment import Config


def config():
  return Config(data=DataConfig(batch_size=32))


def sweep():
  yield {'name': 'one'}
  yield {'name': 'two', 'init.arm': 'one'}


if __name__ == '__main__':
  launch.main(train=FakeTrain() if '--arm' in ' '.join(sys.argv) else None)
"""


def test_from_the_command_line_to_workers_and_back(host, tmp_path, monkeypatch):
  runs = {'creates': [{'ahead': ['ACTIVE']}], 'sshs': [{'run': True}, {'run': True}]}
  tool = clouds.Tool(tmp_path, 'gcloud', clouds.GCLOUD, monkeypatch, state='', workdir='', **runs)
  project, share = tmp_path / 'project', tmp_path / 'share'
  project.mkdir()
  (project / 'tiny.py').write_text(TINY)
  monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(REPO / 'tests'), str(REPO)]))
  argv = ['--launch=tpu_vm', *HERE, f'--tpu_vm_mount={share}', f'--workdir={share / "a b"}']
  command = [sys.executable, '-m', 'tiny', *argv, "--config.name=it's; exit 3"]
  done = subprocess.run(command, cwd=project, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  verbs = [words[3] for words, _ in tool.calls]
  assert [verb for verb in verbs if verb != 'describe'] == ['create', 'ssh', 'ssh', 'delete']
  assert len(list((share / 'a b').glob('arms/*/DONE'))) == 2
  assert (share / 'a b' / 'report.html').exists()
  assert (host / 'made').read_text() == 'made\n'  # the environment is made once
  logs = sorted((share / 'a b' / 'logs').iterdir())
  assert len(logs) == 2
  assert ': done, loss' in logs[0].read_text()
  calls = len(tool.calls)
  again = subprocess.run(command, cwd=project, capture_output=True, text=True)
  assert 'all 2 arms are done; nothing to do' in again.stdout
  assert len(tool.calls) == calls


WORKER = """
import signal, sys, time
def stop(*_):
  print('saves', flush=True)
  time.sleep(0.5)
  sys.exit(42)
signal.signal(signal.SIGTERM, stop)
print('trains', flush=True)
for i in range(600):
  time.sleep(0.1)
  print(i, flush=True)
"""


def python_on(host, log):
  """The command by which a host runs Python as a worker."""
  (host / 'requirements.lock').write_text('jax\n')
  version = '.'.join(platform.python_version_tuple()[:2])
  return ['bash', str(REPO / 'launch/tpu_vm.sh'), version, str(log), 'python', '-c']


def test_a_worker_whose_connection_is_lost_goes_on_until_the_next_one_comes(host, tmp_path):
  log = tmp_path / 'logs' / 'x.log'
  argv = python_on(host, log)
  env = {**os.environ, 'HOME': str(host)}

  def until(condition):
    end = time.monotonic() + 20
    while not condition():
      assert time.monotonic() < end
      time.sleep(0.05)

  first = subprocess.Popen([*argv, WORKER], env=env, cwd=host, stdout=subprocess.PIPE)
  assert first.stdout.readline() == b'trains\n'
  first.stdout.close()  # nobody listens any more
  seen = log.read_text()
  until(lambda: log.read_text().count('\n') > seen.count('\n') + 5)
  assert first.poll() is None

  second = subprocess.run([*argv, 'import sys; print("mine"); sys.exit(7)'], env=env, cwd=host, capture_output=True)
  assert (second.returncode, second.stdout) == (7, b'mine\n')
  assert first.wait(10) == 42
  lines = log.read_text().splitlines()
  assert lines[lines.index('saves') + 1 :] == ['mine']


def test_a_worker_that_does_not_leave_is_killed(host, tmp_path, monkeypatch):
  log = tmp_path / 'x.log'
  argv = python_on(host, log)
  env = {**os.environ, 'HOME': str(host), 'SLM_GRACE': '1'}
  deaf = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)'
  first = subprocess.Popen([*argv, deaf], env=env, cwd=host, stdout=subprocess.PIPE)
  assert first.stdout.readline() == b'1\n'
  assert subprocess.run([*argv, 'pass'], env=env, cwd=host).returncode == 0
  assert first.wait(10) == 137


def test_a_host_without_its_share_has_no_worker(host):
  (host / 'bin' / 'mountpoint').write_text('#!/bin/bash\nexit 1\n')
  plan = plan_on('/mnt/slm')
  line = tpu_vm.remote(plan, PARENT, cloud.code_path(plan, 'c0ffee000000'), options_of(*HERE))
  done = subprocess.run(['bash', '-c', line], cwd=host, capture_output=True, text=True)
  assert done.returncode == 75
  assert 'sudo was called' in done.stderr


def test_the_code_that_is_sent_is_the_projects_and_always_the_same(tmp_path):
  plan = plan_on(tmp_path)
  path = cloud.send(plan)
  first = path.read_bytes()
  assert cloud.send(plan) == path
  assert path.read_bytes() == first == cloud.pack(plan)[1]
  with tarfile.open(fileobj=io.BytesIO(first)) as archive:
    names = archive.getnames()
  assert {'requirements.lock', 'slm_jax/train.py', 'launch/tpu_vm.sh'} <= set(names)
  assert {name.partition('/')[0] for name in names} == {'slm_jax', 'launch', 'requirements.lock'}
  assert not [name for name in names if '__pycache__' in name]
