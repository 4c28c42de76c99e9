"""Queued resources against a fake gcloud that is a real process; the remote line in a real shell."""

import json
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import clouds
import pytest
from clouds import CHILD, ONE, PARENT, TWO, UNITS, options_of, plan_on
from clouds import TPU_VM as HERE

from launch import cloud, tpu_vm
from slm_jax.config import ConfigError

REPO = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / 'golden'


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  monkeypatch.setattr(tpu_vm, 'POLL', 0.0)
  monkeypatch.setattr(cloud, 'PATIENCE', 0.1)


class Scene:
  def __init__(self, tmp_path, monkeypatch, capfd):
    self.plan = plan_on(tmp_path)
    self.options = options_of(*HERE, f'--tpu_vm_mount={tmp_path}')
    self.capfd = capfd
    self.make = lambda **state: clouds.Tool(
      tmp_path, 'gcloud', clouds.GCLOUD, monkeypatch, **{'state': '', 'workdir': str(self.plan.workdir), **state}
    )

  def run(self, units=UNITS, **state):
    """`(exit code, output, verbs)`"""
    tool = self.make(**state)
    code = tpu_vm.run(self.plan, units, self.options)
    self.tool = tool
    return code, self.capfd.readouterr().out, [words[3] for words, _ in tool.calls]


@pytest.fixture
def scene(tmp_path, monkeypatch, capfd):
  return Scene(tmp_path, monkeypatch, capfd)


SOON = {'ahead': ['WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE']}
DONE = [{'done': [ONE]}, {'done': [TWO]}]


def without_looks(verbs):
  return [verb for verb in verbs if verb != 'describe']


def test_one_slice_serves_all_units_and_is_deleted(scene):
  code, out, verbs = scene.run(creates=[SOON], sshs=DONE)
  assert code == 0
  assert without_looks(verbs) == ['create', 'ssh', 'ssh', 'delete']
  for state in ('WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE'):
    assert state in out
  assert scene.tool.state['state'] == ''


def test_a_preempted_slice_is_deleted_and_asked_for_again(scene):
  lost = {'code': 255, 'then': 'SUSPENDED'}
  code, out, verbs = scene.run(creates=[SOON, SOON], sshs=[lost, *DONE])
  assert code == 0
  assert without_looks(verbs) == ['create', 'ssh', 'delete', 'create', 'ssh', 'ssh', 'delete']
  assert 'SUSPENDED' in out


def test_a_worker_that_left_with_42_starts_again_on_the_same_slice(scene):
  code, out, verbs = scene.run(creates=[SOON], sshs=[{'code': 142}, *DONE])
  assert code == 0
  assert without_looks(verbs) == ['create', 'ssh', 'ssh', 'ssh', 'delete']
  assert 'ended with 42; starts again' in out


def test_exit_1_of_the_worker_stops_it_and_what_builds_on_it_and_says_why(scene):
  run = scene.plan.workdir / 'arms' / ONE / 'run.json'
  run.parent.mkdir(parents=True)
  run.write_text(json.dumps({'status': 'diverged', 'error': 'step 7: total not finite'}))
  code, out, verbs = scene.run(creates=[SOON], sshs=[{'code': 101}])
  assert code == 1
  assert without_looks(verbs) == ['create', 'ssh', 'delete']
  assert f'{PARENT.name}: failed; {ONE}: diverged (step 7: total not finite)' in out
  assert f'{CHILD.name}: blocked, {PARENT.name} failed' in out


@pytest.mark.parametrize('finished, built_upon', [(0, False), (1, True)])
def test_of_a_bundle_that_failed_what_is_done_is_built_upon(scene, finished, built_upon):
  scene.plan, (teachers, students) = clouds.bundles(scene.plan)
  failed = {'code': 101, 'done': teachers.arms[:finished]}
  code, out, verbs = scene.run([teachers, students], creates=[SOON], sshs=[failed, {'done': students.arms}])
  assert code == 1
  assert verbs.count('ssh') == 1 + built_upon
  assert (f'{students.name}: done' in out, f'{students.name}: blocked' in out) == (built_upon, not built_upon)


def test_exit_1_of_gcloud_itself_is_not_the_workers(scene):
  code, _, verbs = scene.run([PARENT], creates=[SOON], sshs=[{'code': 1}, {'code': 75}, DONE[0]])
  assert code == 0
  assert verbs.count('ssh') == 3


def test_restarts_have_an_end(scene):
  scene.options.tpu_vm_restarts = 2
  code, out, verbs = scene.run([PARENT], creates=[SOON], sshs=[{'code': 142}] * 3)
  assert code == 1
  assert verbs.count('ssh') == 3
  assert 'failed; ended with 42 after --tpu_vm_restarts=2' in out
  assert verbs[-1] == 'delete'


def test_quota_is_told_and_nothing_is_tried_again(scene):
  error = "ERROR: (gcloud...create) RESOURCE_EXHAUSTED: Quota limit 'TPUV6EPerProjectPerZone' has been exceeded."
  code, out, verbs = scene.run(creates=[{'error': error}])
  assert code == 1
  assert "Quota limit 'TPUV6EPerProjectPerZone' has been exceeded" in out
  assert verbs == ['describe', 'create', 'delete']
  assert 'NOT deleted' not in out


def test_a_request_that_fails_is_told_and_deleted(scene):
  code, out, verbs = scene.run(creates=[{'ahead': ['WAITING_FOR_RESOURCES', 'FAILED']}])
  assert code == 1
  assert 'no slice: no capacity in this zone' in out
  assert without_looks(verbs) == ['create', 'delete']


@pytest.mark.parametrize(
  'left, verbs',
  [
    ('ACTIVE', ['ssh', 'delete']),
    ('FAILED', ['delete', 'create', 'ssh', 'delete']),
    ('SUSPENDED', ['delete', 'create', 'ssh', 'delete']),
  ],
)
def test_what_a_killed_launch_left_is_used_or_cleared_away(scene, left, verbs):
  code, _, seen = scene.run([PARENT], state=left, creates=[SOON], sshs=[DONE[0]])
  assert code == 0
  assert without_looks(seen) == verbs


def test_a_network_that_is_down_for_a_while_ends_nothing(scene):
  assert scene.run([PARENT], creates=[SOON], sshs=[DONE[0]], broken=tpu_vm.TRIES - 1)[0] == 0


def test_a_network_that_stays_down_ends_it_in_words(scene):
  code, out, _ = scene.run([PARENT], broken=tpu_vm.TRIES)
  assert code == 1
  assert 'stopped: gcloud: ERROR: gcloud crashed (ConnectionError): no route to host' in out


def test_results_that_do_not_appear_here_are_an_error(scene):
  code, out, verbs = scene.run([PARENT], creates=[SOON], sshs=[{'code': 0}])
  assert code == 1
  assert 'is it the same share?' in out
  assert verbs.count('ssh') == 1


def test_a_slice_that_cannot_be_deleted_is_told_with_the_command(scene):
  code, out, _ = scene.run([PARENT], creates=[SOON], sshs=[DONE[0]], undeletable=True)
  assert code == 0
  assert 'NOT deleted (ERROR: (gcloud) PERMISSION_DENIED), and it costs money' in out
  assert shlex.split(out.splitlines()[-1])[:5] == [*tpu_vm.GCLOUD, 'delete']


def test_fail_fast_starts_nothing_more(scene):
  scene.options.fail_fast = True
  other = PARENT._replace(name='tiny-other', arms=(TWO,))
  code, _, verbs = scene.run([PARENT, other], creates=[SOON], sshs=[{'code': 102}])
  assert (code, verbs.count('ssh'), verbs[-1]) == (1, 1, 'delete')


FOLLOW = """
import sys
sys.path[:0] = {path!r}
from clouds import *
from launch import tpu_vm
tpu_vm.POLL = 0.0
sys.exit(tpu_vm.run(plan_on({share!r}), UNITS, options_of(*{argv!r})))
"""


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_launch_deletes_its_slice(scene, tmp_path, number):
  tool = scene.make(creates=[SOON], sshs=[{'sleep': 60}])
  path = [str(REPO), str(REPO / 'tests'), str(Path(__file__).parent)]
  code = FOLLOW.format(path=path, share=str(tmp_path), argv=[*HERE, f'--tpu_vm_mount={tmp_path}'])
  launch = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
  end = time.monotonic() + 60
  while not (tool.folder / 'connected').exists():
    assert time.monotonic() < end
    time.sleep(0.05)
  launch.send_signal(number)
  out, _ = launch.communicate(timeout=30)
  assert launch.returncode == 42
  assert tool.calls[-1][0][3] == 'delete'
  assert tool.state['state'] == ''
  assert 'launch again to go on' in out


# -------------------------------------------------------------------------------------------- what is shown and refused


def test_golden_commands(monkeypatch):
  monkeypatch.setattr(cloud, 'pack', lambda plan: ('c0ffee000000', b''))
  monkeypatch.setattr(platform, 'python_version_tuple', lambda: ('3', '12', '1'))
  monkeypatch.setattr(tpu_vm, 'POLL', 30.0)
  plan = plan_on('/mnt/slm', ['--config.name=a b; rm -rf $HOME'], [{'data.batch_size': 128}])
  more = ['--tpu_vm_capacity=spot', '--tpu_vm_slices=4', '--tpu_vm_valid_until=6h', '--tpu_vm_project=p']
  more += ['--tpu_vm_create=--network=n', '--tpu_vm_ssh=--internal-ip']
  options = options_of(*HERE, *more)
  tpu_vm.check(plan, options)
  shown = tpu_vm.show(plan, UNITS, options)
  assert shown + '\n' == (GOLDEN / 'tpu_vm.sh').read_text()
  assert subprocess.run(['bash', '-n'], input=shown, text=True).returncode == 0


def test_names_of_two_workdirs_differ_and_are_valid():
  names = {tpu_vm.Slice(plan_on(share), options_of(*HERE)).name for share in ('/a', '/b')}
  assert len(names) == 2
  assert all(name.replace('-', '').isalnum() and name.islower() and len(name) <= 28 for name in names)


@pytest.mark.parametrize(
  'argv, words',
  [
    (['--tpu_vm_zone='], '--tpu_vm_zone: needed'),
    (['--tpu_vm_share=gs://bucket'], 'expected SERVER:/PATH'),
    (['--tpu_vm_share=/vol1'], 'expected SERVER:/PATH'),
    (['--tpu_vm_mount=mnt'], '--tpu_vm_mount=mnt: expected an absolute path'),
    (['--tpu_vm_mount=/mnt/other'], '--workdir=/mnt/slm/tiny: workers elsewhere share no folder'),
    (['--tpu_vm_type=v6e-64'], 'data.batch_size=32: not divisible by train.accumulate=1 x 64'),
    (['--tpu_vm_slices=3'], 'x 48 data-parallel devices'),
    (['--tpu_vm_create=network=n'], '--tpu_vm_create=network=n: expected a flag'),
  ],
)
def test_what_cannot_be_meant_is_one_line(argv, words):
  with pytest.raises(ConfigError) as error:
    tpu_vm.check(plan_on('/mnt/slm'), options_of(*HERE, *argv))
  assert words in str(error.value)
  assert '\n' not in str(error.value)


def test_a_path_through_the_share_is_not_on_it():
  with pytest.raises(ConfigError, match='share no folder'):
    tpu_vm.check(plan_on('/mnt/slm/../x'), options_of(*HERE))


def test_data_that_workers_cannot_read_is_refused():
  plan = plan_on('/mnt/slm', sweep=[{'data.batch_size': 32, 'data.sources': ('texts',)}])
  with pytest.raises(
    ConfigError, match="data: 'texts' cannot be read by workers elsewhere; put it below --tpu_vm_mount"
  ):
    tpu_vm.check(plan, options_of(*HERE))


def test_ready_says_what_is_missing_or_wrong(scene, monkeypatch, tmp_path):
  scene.make(broken=1)
  with pytest.raises(ConfigError, match='no route to host'):
    tpu_vm.ready(scene.plan, scene.options)
  tpu_vm.ready(scene.plan, scene.options)
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(ConfigError, match='gcloud: no such command on this machine; to get it: https://'):
    tpu_vm.ready(scene.plan, scene.options)


def test_gclouds_own_parser_knows_every_command(tmp_path, monkeypatch):
  if not shutil.which('gcloud'):
    pytest.skip('gcloud is not installed')
  monkeypatch.setenv('CLOUDSDK_CONFIG', str(tmp_path))
  one = tpu_vm.Slice(plan_on('/mnt/slm'), options_of(*HERE, '--tpu_vm_capacity=reserved', '--tpu_vm_valid_until=6h'))
  many = tpu_vm.Slice(plan_on('/mnt/slm'), options_of(*HERE, '--tpu_vm_capacity=spot', '--tpu_vm_slices=2'))
  commands = [one.create_command(), many.create_command(), one.command('describe', '--format=json')]
  commands += [one.delete_command(), one.ssh_command('true'), [*one.delete_command(), '--no-such-flag']]
  asked = tmp_path / 'commands.json'
  asked.write_text(json.dumps([{'command_string': shlex.join(command)} for command in commands]))
  lint = ['gcloud', 'meta', 'lint-gcloud-commands', f'--commands-file={asked}']
  answers = json.loads(subprocess.run(lint, capture_output=True, text=True, check=True).stdout)
  assert [answer['success'] for answer in answers] == [True] * 5 + [False], answers
